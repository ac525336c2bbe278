"""The Sparsifier in a fastai Learner: SparsifyCallback, KeepSparsity, and what they show."""
