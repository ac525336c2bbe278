"""Recipes: one file that says how a model is trained sparse, read within bounds and checked before anything runs."""
