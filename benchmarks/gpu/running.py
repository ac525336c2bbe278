"""Parts of a section, each by itself: one that fails is noted with its traceback, and the next one runs."""

import json
import time
import traceback
from contextlib import contextmanager, nullcontext
from statistics import median

import torch

from benchmarks.timing import seconds_of
from sparsifai.support.files import write_text


class Section:
    """What one section is run with, and what it has found.

    device: 'cuda' or 'cpu'. quick: small models and few rounds, to rehearse without a GPU. seconds: that the section
    may take; a part that would begin later is left out, and noted. file: its results, written after each part.
    """

    def __init__(self, name, device, quick, seconds, file):
        self.name, self.device, self.quick, self.file = name, torch.device(device), quick, file
        self.start, self.seconds = time.perf_counter(), seconds
        self.tables, self.failures, self.left_out = {}, [], []

    @property
    def on_gpu(self):
        "Whether there is a GPU to wait for"
        return self.device.type == "cuda"

    @property
    def left(self):
        "Seconds until no further part begins"
        return self.seconds - (time.perf_counter() - self.start)

    def part(self, name, function, *arguments):
        "Run one part. It adds rows itself; whatever it raises is noted"
        if self.left <= 0:
            self.left_out.append(name)
        else:
            start = time.perf_counter()
            try:
                function(self, *arguments)
            except Exception as error:
                self.fail(name, f"{type(error).__name__}: {error}", traceback.format_exc())
            if self.on_gpu:
                torch.cuda.empty_cache()
            print(f"[{self.name}] {name}: {time.perf_counter() - start:.1f} s", flush=True)
        self.write()

    def fail(self, part, message, trace=""):
        "Note a failure"
        print(f"[{self.name}] {part} FAILED: {message[:600]}", flush=True)
        self.failures.append({"part": part, "error": message, "traceback": trace})

    def row(self, table, **columns):
        "Add a row to a table"
        self.tables.setdefault(table, []).append(columns)

    def write(self):
        "Write what there is so far"
        found = {"seconds": time.perf_counter() - self.start, "tables": self.tables}
        write_text(self.file, json.dumps({**found, "failures": self.failures, "left out": self.left_out}, indent=1))


@contextmanager
def no_waiting(device):
    "Within, whatever makes the host wait for the GPU is an error"
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def autocast(device):
    "bfloat16 where a model computes, as most training on a GPU does"
    return torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else nullcontext()


def wait(device):
    "Until the GPU has nothing left to do"
    if device.type == "cuda":
        torch.cuda.synchronize()


class Times:
    "Median seconds of a case: `device`, in which the GPU works on it, and `host`, in which it is handed over"

    def __init__(self, device, host):
        self.device, self.host = median(device), median(host)


def measure(device, cases, rounds, warm_up=2, host_rounds=3):
    """From names of cases to Times, all cases in turn, so that what slows the machine down slows all of them.

    cases: from names to functions of the number of the round, negative while things warm up and while the host is
    timed. On a GPU, this comes first. Then the GPU sleeps for as long as the host takes to hand a case over, so that
    `device` is the time of the kernels and not of launching them. A GPU holds about a thousand launches that wait: a
    case of more is timed with what the host takes for the others.
    """
    taken = {name: ([], []) for name in cases}
    for number in range(-warm_up - host_rounds, rounds):
        for name, case in cases.items():
            on_device, on_host = taken[name]
            if device.type != "cuda":
                seconds = seconds_of(case, number)
                if number >= 0:
                    on_device.append(seconds)
                    on_host.append(seconds)
            elif number < 0:
                torch.cuda.synchronize()
                seconds = seconds_of(case, number)
                if number >= -host_rounds:
                    on_host.append(seconds)
            else:
                on_device.append(_seconds_on_device(case, number, median(on_host) if on_host else 0.0))
    return {name: Times(on_device, on_host or [0.0]) for name, (on_device, on_host) in taken.items()}


def _seconds_on_device(case, number, ahead):
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(int((1.3 * ahead + 2e-4) * 1.9e9))  # in cycles, of which no GPU has more in a second
    first.record()
    case(number)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def memory_of(device, function):
    "Bytes that a call takes at its peak beyond what was there before; None on the CPU"
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
