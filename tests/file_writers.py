"""Processes that write one file again and again, with the writer alone: python tests/file_writers.py TASK PATH NUMBER.

They import no torch, so they start at once. What is written is one byte, repeated: a whole file has one kind of bytes,
and the length that belongs to it.
"""

import importlib.util
import os
import random
import resource
import signal
import sys
import threading
from pathlib import Path

FILES = Path(__file__).parents[1] / "sparsifai" / "support" / "files.py"


def content(number):
    """The content of the file that is written as the number-th: several buffers long, each of another length."""
    return bytes([number % 251]) * (50_000 + 1000 * (number % 251))


def is_whole(data):
    """Whether these bytes are one of the contents."""
    return len(data) > 0 and data == content(data[0])


def load_writer():
    """The module of the writer, without the package around it."""
    spec = importlib.util.spec_from_file_location("files", FILES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(files, path, number):
    """Write the content in pieces."""
    data = content(number)
    files.write_whole(
        path, lambda file: [file.write(data[start : start + 9000]) for start in range(0, len(data), 9000)]
    )


def write_often(files, path, times):
    """Write so many times; the first argument of two such processes may be the same file."""
    for number in range(times):
        write(files, path, number)


def killed(files, path, seed):
    """Write, and be killed at a line of the writer that the seed says."""
    left = random.Random(seed).randrange(1, 250)

    def at_line(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename in (str(FILES), __file__):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return at_line

    sys.settrace(at_line)
    while True:
        write(files, path, seed)


def kill_often(files, path, times):
    """Have so many processes killed while they write, look at the file after each, and print what was found."""
    whole = changed = abandoned = 0
    for seed in range(times):
        before = Path(path).read_bytes()
        child = os.fork()
        if not child:
            killed(files, path, seed)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        after = Path(path).read_bytes()
        whole += is_whole(after)
        changed += after != before
        abandoned += len(os.listdir(Path(path).parent)) > 1
    sys.stdout.write(f"{whole} {changed} {abandoned}")


def write_in_threads(files, path, times):
    """Write the same file in four threads at once."""
    threads = [threading.Thread(target=write_often, args=(files, path, times)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def write_over_limit(files, path, limit):
    """Write a file that is larger than the system allows this process, and print the error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        files.write_whole(path, lambda file: file.write(bytes(10 * limit)))
    except OSError as error:
        sys.stdout.write(f"{error.errno} {error}")


if __name__ == "__main__":
    task = {each.__name__: each for each in (write_often, kill_often, write_in_threads, write_over_limit)}[sys.argv[1]]
    task(load_writer(), sys.argv[2], int(sys.argv[3]))
