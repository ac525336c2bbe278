"""The command line, `sparsifai`: a file for each command, and what they share.

Torch and other libraries are imported when a command runs, so that help is there at once.
"""
