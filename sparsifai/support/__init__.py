"""What everything else uses and that knows nothing of models: the registry, tables, checks of arguments."""
