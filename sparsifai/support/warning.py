"""Warnings that name the line of the user's code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

from .printable import LONGEST_MESSAGE, printable

# Code between the user's line and the place that warns: ours, and what calls it.
_BETWEEN = (
    *("sparsifai", "fastai", "fastcore", "torch", "contextlib"),
    *("transformers", "lightning", "pytorch_lightning", "accelerate"),
)


def warn(message: str) -> None:
    """Warn with the line that called the library, directly or through fastai.

    Args:
        message: What happened, how much of it, and what to do.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(message, LONGEST_MESSAGE), stacklevel=level)


_FILTERS = RLock()


@contextmanager
def own_filters(record: bool = False) -> Iterator[Any]:
    """Do as `warnings.catch_warnings` does, in one thread after the other.

    The filters belong to the whole process. Threads that change them at once would not restore those of the user.

    Args:
        record: Whether warnings are collected in the list that the block gets. Default False.
    """
    with _FILTERS, warnings.catch_warnings(record=record) as caught:
        yield caught


def warn_each(messages: Iterable[str]) -> None:
    """Warn of each message."""
    for message in messages:
        warn(message)
