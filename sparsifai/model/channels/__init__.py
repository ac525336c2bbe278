"""Channels across layers: which are coupled, which are constant, and how they are cut out of a model."""
