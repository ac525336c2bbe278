"""The version of this library, in a module of its own so that files can name it without importing everything."""

__version__ = "0.1.0"
