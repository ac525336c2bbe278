"""Undoing a change at the end of a `with` block, also when the undoing is interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import ref


class _Pending(threading.local):
    """What this thread has still to undo, the latest last. What nobody can undo any more is dropped."""

    def __init__(self) -> None:
        self._references: list[ref[AtEnd]] = []

    def each(self) -> list[AtEnd]:
        return [each for reference in self._references if (each := reference()) is not None]

    def add(self, at_end: AtEnd) -> None:
        self._references = [ref(each) for each in (*self.each(), at_end)]

    def remove(self, at_end: AtEnd) -> None:
        self._references = [ref(each) for each in self.each() if each is not at_end]


_PENDING = _Pending()


class AtEnd:
    """Calls a function at the end of a `with` block, until it has come to its end once.

    Enter it twice: if a KeyboardInterrupt comes while the inner block is left, leaving the outer one calls the function
    again. If it comes before the function is called at all, the block around does. What must be undone is known before
    anything is changed, since the interrupt can come at any line.

    Args:
        undo: Undoes the change. It must do no harm if it is called twice, or before the change.

    Example:
        >>> undone = []
        >>> at_end = AtEnd(lambda: undone.append(True))
        >>> with at_end, at_end:
        ...     print(undone)
        []
        >>> undone
        [True]
    """

    def __init__(self, undo: Callable[[], Any]):
        self._undo = undo

    def __enter__(self) -> AtEnd:
        if self not in _PENDING.each():
            _PENDING.add(self)
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        while self in (pending := _PENDING.each()):
            # Blocks inside come first, if they were left without undoing. The block of a generator that is dropped is
            # left late, and must not undo what was entered since.
            each = self if kind is GeneratorExit else pending[-1]
            each._undo()
            _PENDING.remove(each)
