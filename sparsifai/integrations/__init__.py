"""Sparse training in the loops of other libraries: transformers' Trainer, Lightning, accelerate.

Each file imports its library, so it is imported only by those who use it.
"""
