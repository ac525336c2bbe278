"""Progress bars of long work: fastprogress's, as fastai shows them. Without a terminal or a notebook there are none."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed

from .at_end import AtEnd
from .printable import printable
from .terminal import in_terminal

Thing = TypeVar("Thing")

# Work that takes less than this many seconds shows no bar.
DELAY = 1.0

# Characters of a line in a terminal that are left for the bar and its numbers.
_NUMBERS = 45


class _Present(threading.local):
    """What this thread shows at present. is_full: whether a bar is shown, or none may be, so that no other one is."""

    is_full = False


_PRESENT = _Present()


def progress(
    things: Iterable[Thing],
    what: str,
    *,
    name: Callable[[Thing], str] | None = None,
    prints: bool = False,
) -> Iterable[Thing]:
    """Iterate over things, with a progress bar if that takes longer than about a second.

    There is no bar if stdout is no terminal and there is no notebook, in processes of a rank above 0, for a single
    step, inside of work that shows its bar already, where fastprogress is not installed, and where the user has
    switched bars off: with `learn.no_bar()` for the work of that Learner, and with fastprogress's own
    `fastprogress.fastprogress.NO_BAR = True` for all. Then the things themselves are returned.

    Args:
        things: What is iterated over; without a length there is no bar.
        what: What is done, in a few words.
        name: What a thing is called beside the bar. Default: only `what` is shown.
        prints: Whether each step prints lines, as a fit does. The bar is shown at once then, and in a terminal it is
            written again in a line of its own before each step. Default False.

    Returns:
        An iterable of the things.

    Example:
        >>> for number in progress(range(3), "counting"):
        ...     print(number)
        0
        1
        2
    """
    return _with_bar(things, what, name, prints) if _may_show(things) else things


@contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Show no progress bars in a `with` block.

    Args:
        shown: Whether they are shown after all.
    """
    before = _PRESENT.is_full
    at_end = AtEnd(lambda: setattr(_PRESENT, "is_full", before))
    with at_end, at_end:
        _PRESENT.is_full = before or not shown
        yield


def _may_show(things: Any) -> bool:
    if _PRESENT.is_full or not (_in_notebook() or in_terminal()) or _rank() or not isinstance(things, Sized):
        return False
    try:
        return len(things) > 1
    except TypeError:  # torch's loader of a data set without a length
        return False


def _in_notebook() -> bool:
    """Whether the code runs in the kernel of a notebook. IPython in a terminal has none."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _rank() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def _with_bar(things: Any, what: str, name: Callable[[Any], str] | None, prints: bool) -> Iterator[Any]:
    start, bar, before = time.time(), _Bar(len(things), what, prints), _PRESENT.is_full

    def close() -> None:
        _PRESENT.is_full = before
        bar.close()

    at_end = AtEnd(close)
    with at_end, at_end:
        for done, thing in enumerate(things):
            if bar.is_open or prints or time.time() - start > DELAY:
                _PRESENT.is_full = True
                bar.show(done, start, "" if name is None else name(thing))
            yield thing


class _Bar:
    """A bar of fastprogress, which is made when it is shown first.

    Args:
        total: Number of steps.
        what: What is done.
        prints: Whether each step prints lines.
    """

    def __init__(self, total: int, what: str, prints: bool):
        self.total, self.what, self.prints = total, what, prints
        self._bar: Any = None  # False if there is none
        self._is_begun = False
        self._width = 0

    @property
    def is_open(self) -> bool:
        """Whether it is shown, so that it has to be kept up to date."""
        return bool(self._bar)

    def show(self, done: int, start: float, name: str) -> None:
        """Show how many steps are done.

        Args:
            done: Their number.
            start: When the first one began, by time.time().
            name: What the present step is called; empty if it has no name.
        """
        if self._bar is None:
            self._bar = self._made()
        if not self._bar:
            return
        self._label(f"{self.what}: {name}" if name else self.what)
        if not self._is_begun:
            self._is_begun = True
            self._bar.update(0)
            self._bar.start_t = start
        if done:
            if self.prints:
                self._bar.wait_for = 1  # steps that are short count, too: each has its line
            self._bar.update(done)
        if self.prints and not _in_notebook():
            sys.stdout.write("\n")
            sys.stdout.flush()

    def _made(self) -> Any:
        try:
            from fastprogress import fastprogress
        except ImportError:
            return False
        if getattr(fastprogress, "NO_BAR", False):
            return False
        in_notebook = _in_notebook()
        kind = fastprogress.NBProgressBar if in_notebook else fastprogress.ConsoleProgressBar
        return kind(range(self.total), leave=self.prints and not in_notebook)

    def _label(self, text: str) -> None:
        if _in_notebook():
            self._bar.comment = printable(text)
            return
        # A line that is broken, or shorter than the last one, would leave parts of it on the screen.
        text = printable(text, max(shutil.get_terminal_size((100, 40)).columns - _NUMBERS, 10))
        self._width = max(self._width, len(text))
        self._bar.prefix = text.ljust(self._width)

    def close(self) -> None:
        """Take the bar away, if there is one. In a terminal, the lines between those that steps print stay."""
        bar, self._bar = self._bar, False
        if bar:
            bar.prefix = ""  # or it would stay in the line
            bar.on_iter_end()
