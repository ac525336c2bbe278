"""Knowledge of torch models: their layers and the axes of their weights, data flow, wrappers, and how to run them."""
