"""The command line, `sparsifai`: a file for each command, and what they share. Libraries are imported when a command runs."""
