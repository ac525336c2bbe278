"""Channels across layers: which go together, which are constant, and how they are cut out."""
