"""The exact ranking: which groups have the lowest scores, ties in index order, on the CPU and on a GPU."""
