"""Which groups have the lowest scores: exact, with ties in index order, on the CPU and on a GPU."""
