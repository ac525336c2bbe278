"""Uses hostile files under limits of time and memory: python tests/hostile_use.py KIND FOLDER.

Prints the name of each file and how it ended. A file that takes more than the limits ends the process, or is a
MemoryError.
"""

import contextlib
import io
import os
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from sparsifai import SparseFile, load_sparse
from sparsifai.__main__ import main

import hostile  # isort: skip

SECONDS = 60  # for all files of one kind
MEMORY = 1200 * 2**20  # beyond what the process has at the begin
MODEL = nn.Linear(3, 3)


def limit():
    """Set the limits of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for what, most in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY),
        (resource.RLIMIT_CPU, int(sum(os.times()[:2])) + SECONDS),
    ):
        resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


def report(path):
    """sparsifai report, whose output is looked at by nobody."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main(["report", str(path)])
    return f"status {status}" + " and the path" * (str(path) in errors.getvalue())


def load_tickets(path):
    """Load tickets and apply them."""
    from sparsifai import LotteryTickets

    for ticket in LotteryTickets.load(path):
        ticket.apply(MODEL)


USES = {
    "checkpoints": ({**hostile.CHECKPOINTS, **hostile.DEEP}, [load_tickets, report]),
    "sparse files": (
        hostile.SPARSE_FILES, [lambda path: load_sparse(path, MODEL), lambda path: str(SparseFile.read(path)), report],
    ),
}  # fmt: skip


def outcome(use, path):
    """How the use of a file ended."""
    try:
        found = use(path)
    except Exception as error:
        return type(error).__name__
    return found if isinstance(found, str) and found.startswith("status") else "used"


if __name__ == "__main__":
    files, uses = USES[sys.argv[1]]
    path = Path(sys.argv[2]) / "file"
    made = {}
    for name, make in files.items():  # before the limits, as the makers need more
        made[name] = path.with_name(f"file {len(made)}")
        made[name].write_bytes(make())
    hostile.BOMB = b""
    before = torch.random.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype()
    limit()
    for name, file in made.items():
        sys.stdout.write(f"{name}: {', '.join(outcome(use, file) for use in uses)}\n")
        sys.stdout.flush()
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == before[1:]
