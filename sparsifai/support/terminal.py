"""What standard output is: a terminal, and of which width, or something else."""

from __future__ import annotations

import shutil
import sys


def in_terminal() -> bool:
    """Whether standard output is a terminal. It may be closed, or an object of the user's that only has `write`."""
    stdout = sys.stdout
    is_open = hasattr(stdout, "isatty") and not getattr(stdout, "closed", False)
    return is_open and stdout.isatty()


def terminal_width() -> int | None:
    """The number of characters in a line of the terminal; None if standard output is none."""
    return shutil.get_terminal_size().columns if in_terminal() else None
