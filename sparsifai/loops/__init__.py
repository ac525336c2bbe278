"""Sparse training in a loop that is not fastai's: the manager, and the parts that it is made of."""
