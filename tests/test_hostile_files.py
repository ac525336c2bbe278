"""Hostile files are refused within limits of time and memory, whatever they are given to."""

import os
import threading
from pathlib import Path

import forked
import hostile
import pytest
from sparse_files import bits, example_model, other_model
from torch import nn

from sparsifai import SparseFile, load_sparse, save_sparse
from sparsifai.__main__ import main

TESTS = str(Path(__file__).parent)


def used(kind, folder):
    """Name of a file -> how each use of it ended, in a process with limits."""
    script = Path(TESTS) / "hostile_use.py"
    done = forked.run(script, kind, folder, folder=folder)
    assert done.returncode == 0, f"{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    return dict(line.split(": ") for line in done.stdout.splitlines())


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the memory of a process is read from /proc")
def test_hostile_checkpoints_take_little_time_and_memory(tmp_path):
    pytest.importorskip("fastai", reason="tickets are found with fastai")
    outcomes = used("checkpoints", tmp_path)
    assert outcomes.keys() == hostile.CHECKPOINTS.keys() | hostile.DEEP.keys()
    assert set(outcomes.values()) == {"ValueError, status 2 and the path"}


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the memory of a process is read from /proc")
def test_hostile_sparse_files_take_little_time_and_memory(tmp_path):
    outcomes = used("sparse files", tmp_path)
    claims = {name for name in outcomes if name.startswith("a tensor of")}  # a tensor without values takes no memory
    assert outcomes.keys() == hostile.SPARSE_FILES.keys()
    assert {outcomes[name] for name in claims} == {"ValueError, used, status 0"}
    assert {outcomes[name] for name in outcomes.keys() - claims} == {"ValueError, ValueError, status 2 and the path"}


READERS = {
    "load_sparse": lambda path: load_sparse(path, nn.Linear(3, 3)),
    "SparseFile.read": SparseFile.read,
    "LotteryTickets.load": lambda path: load_tickets(path),
}


def load_tickets(path):
    from sparsifai import LotteryTickets

    return LotteryTickets.load(path)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_devices_pipes_folders_and_loops_are_not_read(read, tmp_path):
    """A pipe nobody writes to would be waited for without end, and so would the end of /dev/zero."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for path, message in {
        tmp_path / "pipe": "a pipe", "/dev/zero": "a device", tmp_path / "link": "a device", tmp_path: "a folder",
        tmp_path / "loop": "loop", tmp_path / "none": "No such file",
    }.items():  # fmt: skip
        with pytest.raises(OSError, match=message):
            read(path)


def test_the_report_of_a_device_or_a_pipe_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path)):
        assert main(["report", path]) == 2
        error = capsys.readouterr().err
        assert path in error
        assert "pass the name of a regular file" in error or path == str(tmp_path)


def test_files_are_read_whole_while_they_are_replaced(tmp_path):
    """2,000 reads of sparse files and tickets, while a thread writes one model and the other."""
    path, models = tmp_path / "file", [example_model(), other_model()]
    save_sparse(models[0], path)
    done = threading.Event()

    def write():
        number = 0
        while not done.is_set():
            number += 1
            save_sparse(models[number % 2], path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [bits(load_sparse(path, example_model())) for _ in range(1000)]
        tables = [str(SparseFile.read(path)) for _ in range(1000)]
    finally:
        done.set()
        writer.join()
    known = [bits(model) for model in models]
    assert all(each in known for each in seen)
    assert len(set(tables)) <= 2
    assert os.listdir(tmp_path) == ["file"]
