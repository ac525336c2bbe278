"""What is known of a torch model: its layers and the axes of their weights, its data flow, its wrappers."""
