"""A terminal for tests of what is shown in one."""

import os
import pty
import sys

from sparsifai.support import progress


class Terminal:
    """A pseudo-terminal that is stdout while it is open."""

    def __init__(self, monkeypatch):
        self.master, slave = pty.openpty()
        self.stdout = os.fdopen(slave, "w", encoding="utf-8")
        monkeypatch.setattr(sys, "stdout", self.stdout)
        monkeypatch.setattr(progress, "DELAY", -1.0)  # no test waits until a bar is due
        self.text = ""

    def read(self):
        """All that was written up to now."""
        self.stdout.write("\0")  # so that there is something to read
        self.stdout.flush()
        while not self.text.endswith("\0"):
            self.text += os.read(self.master, 1 << 16).decode(errors="ignore")
        self.text = self.text.replace("\0", "")
        return self.text

    def lines(self):
        """The lines as they are seen: a carriage return goes to the begin of a line, and what follows overwrites it."""
        shown = []
        for line in self.read().split("\r\n"):
            seen = ""
            for part in line.split("\r"):
                seen = part + seen[len(part) :]
            shown.append(seen.rstrip())
        return shown
