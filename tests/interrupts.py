"""Interrupts at chosen lines: KeyboardInterrupt is raised at the n-th line that runs in some files."""

import random
import sys
from pathlib import Path

import torch

import sparsifai

LIBRARY = (str(Path(sparsifai.__file__).parent),)
# torch's own managers of the gradient mode do not restore it if they are interrupted at their end; and what torch does
# when a weak reference ends can raise nothing.
NOT_OURS = tuple(str(Path(torch.__file__).parent / each) for each in ("autograd/grad_mode.py", "_dynamo"))
# With the managers of contexts, modes, hooks and random states that the library uses.
WITH_TORCH = (*LIBRARY, sys.modules["contextlib"].__file__, str(Path(torch.__file__).parent))


class Interrupted(KeyboardInterrupt):
    """It is not raised by anything else."""


class _Tracer:
    def __init__(self, folders, at):
        self.folders, self.at, self.lines = folders, at, 0
        self.where = None
        self._is_counted = {}

    def __call__(self, frame, event, argument):
        file = frame.f_code.co_filename
        if file not in self._is_counted:
            self._is_counted[file] = file.startswith(self.folders) and not file.startswith(NOT_OURS)
        return self._line if self._is_counted[file] else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
                sys.settrace(None)
                raise Interrupted
        return self._line


def interrupted(function, at=0, folders=LIBRARY):
    """Call a function; at the line that is number `at`, raise Interrupted. Returns the tracer: how many lines ran."""
    tracer, earlier = _Tracer(folders, at), sys.gettrace()
    sys.settrace(tracer)
    try:
        function()
    except Interrupted:
        pass
    finally:
        sys.settrace(earlier)
    return tracer


def places(lines, at_most, seed=0):
    """Numbers of lines at which to interrupt: all, or a sample that is the same at each run."""
    numbers = range(1, lines + 1)
    return numbers if lines <= at_most else sorted(random.Random(seed).sample(numbers, at_most))
