"""Joint groups: weights of several layers that belong together, such as those of one attention head."""
