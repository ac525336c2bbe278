"""Recipes of SparseML, read and converted to recipes of this library."""
