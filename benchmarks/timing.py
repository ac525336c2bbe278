"""How times are taken: cases in turn, medians, and what they were taken on."""

import os
import platform
import time
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import numpy as np
import torch


def seconds_of(function, *arguments):
    "Seconds that one call takes"
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def interleaved(cases, rounds, slow=(), slow_rounds=3):
    """Median seconds of each case, all cases taken in turn so that what slows the machine down slows all of them.

    cases: from names to functions that take the number of the round and return seconds, or None for a case that
        cannot be had. slow: names of cases that are timed in `slow_rounds` of the rounds only.
    """
    seconds = {name: [] for name, case in cases.items() if case is not None}
    for number in range(rounds):
        for name in seconds:
            if name not in slow or number % max(rounds // slow_rounds, 1) == 0:
                seconds[name].append(cases[name](number))
    return {name: median(several) for name, several in seconds.items()}


def copying(weights):
    "A case: all weights copied into memory that is there already, which any mask update is compared with"
    weights = [weight.detach() for weight in weights]
    copies = [weight.clone() for weight in weights]

    def copy():
        for into, weight in zip(copies, weights, strict=True):
            into.copy_(weight)

    return lambda number: seconds_of(copy)


@contextmanager
def threads(count):
    "Let torch compute in `count` threads for a while"
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ratio(numerator, denominator):
    "A ratio of times, or None if one of them is missing"
    return None if numerator is None or denominator is None else numerator / denominator


def milliseconds(seconds):
    "From seconds, if there are any"
    return None if seconds is None else 1000 * seconds


def surroundings():
    "What the times were taken on"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": _name_of_cpu(),
        "cores": os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


class Others:
    """How busy other processes keep the machine from here on, which times should be read with."""

    def __init__(self):
        self.start, self.taken = time.perf_counter(), self._taken()

    def cores(self):
        "Cores that they took on average; None where the system does not say"
        taken = self._taken()
        return None if taken is None else max(taken - self.taken, 0.0) / (time.perf_counter() - self.start)

    @staticmethod
    def _taken():
        "CPU seconds of all processes but this one and its children that have ended"
        counters = Path("/proc/stat")
        if not counters.exists():
            return None
        user, nice, system = map(int, counters.read_text().split()[1:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def _name_of_cpu():
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
