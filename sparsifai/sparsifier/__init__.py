"""The Sparsifier: masks are built from scores and applied, on any torch model."""
