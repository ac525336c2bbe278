"""The version of this library, here so that files can name it without importing the whole."""

__version__ = "0.1.0"
