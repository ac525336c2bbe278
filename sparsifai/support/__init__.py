"""Helpers that know nothing of models: registries of functions, tables, checks of arguments."""
