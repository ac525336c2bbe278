"""Warnings that name the line of the user's code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

from .printable import LONGEST_MESSAGE, printable

# Code between the user's line and the place that warns: ours, and what calls it.
_BETWEEN = ("sparsifai", "fastai", "fastcore", "torch", "contextlib")


def warn(message: str) -> None:
    """Warn with the line that called the library, directly or through fastai.

    Args:
        message: What happened, how much of it, and what to do.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(message, LONGEST_MESSAGE), stacklevel=level)


def warn_each(messages: Iterable[str]) -> None:
    """Warn of each message."""
    for message in messages:
        warn(message)
