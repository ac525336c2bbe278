"""How much work is done, which is the same on every machine: what must be refused at once is tested without a clock."""

import sys
from contextlib import contextmanager


@contextmanager
def at_most_calls(most):
    """AssertionError once more than `most` functions have been called, of Python or of C."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")
        if count > most:
            raise AssertionError(f"more than {most:,} calls")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)
