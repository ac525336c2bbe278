"""How sparsity grows in training, in whatever loop: what was asked for, the ramp of the sparsity, and plans."""
