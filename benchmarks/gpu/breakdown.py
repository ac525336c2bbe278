"""What an update is made of: the kernels that the GPU runs, and the functions in which the host spends its time.

Section `tuning`, which runs only if it is asked for, times updates with other constants of the kernels.
"""

import cProfile
import pstats
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.running import measure, wait
from benchmarks.gpu.workloads import copying, models, rising
from benchmarks.models import weights_of
from benchmarks.peers import kinds_of
from benchmarks.timing import milliseconds
from sparsifai import Sparsifier

UPDATES = 5
LONGEST = 14
# Constants of on_device_triton.py, each beside those that stand there.
CONSTANTS = (
    {},
    {"SPREAD": 3},
    {"SAMPLE": 32768},
    {"WARPS": 4},
    {"BLOCK": 1024, "WARPS": 4, "STEPS": (8, 64)},
    {"STEPS": (8, 64)},
    {"STEPS": (2, 16)},
)


def parts_of_update(section, label, sparsifier, copy_seconds):
    "Device time by kernel and host time by function, of an update and apply, for a Sparsifier that has warmed up"
    levels = rising()
    on_gpu = section.on_gpu
    for _ in range(2):
        sparsifier.sparsify(next(levels))
    wait(section.device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        for _ in range(UPDATES):
            sparsifier.sparsify(next(levels))
        wait(section.device)
    spent = [
        (each.self_device_time_total if on_gpu else each.self_cpu_time_total, each.count, each.key)
        for each in profiled.key_averages()
    ]
    spent = sorted((each for each in spent if each[0] > 0), reverse=True)
    total = sum(microseconds for microseconds, _, _ in spent)
    others = (sum(each[0] for each in spent[LONGEST:]), sum(each[1] for each in spent[LONGEST:]), "all others")
    everything = (total, sum(count for _, count, _ in spent), "all")
    for microseconds, count, name in (*spent[:LONGEST], others, everything):
        section.row(
            "kernels of an update",
            of=label,
            kernel=name[:60],
            **{
                "launches": count / UPDATES,
                "us": microseconds / UPDATES,
                "/ copy": microseconds / UPDATES / 1e6 / copy_seconds,
            },
        )
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(UPDATES):
        sparsifier.sparsify(next(levels))
    profiler.disable()
    wait(section.device)
    functions = pstats.Stats(profiler).stats.items()
    by_own_time = sorted(functions, key=lambda each: -each[1][2])
    for (file, line, name), (_, calls, own, together, _) in by_own_time[:LONGEST]:
        section.row(
            "host functions of an update, slower by the profiler",
            of=label,
            function=f"{Path(file).name}:{line} {name}"[:60],
            **{"calls": calls / UPDATES, "own ms": 1000 * own / UPDATES, "with callees ms": 1000 * together / UPDATES},
        )


def tuning(section):
    "An update of each large model, with other constants of the kernels"
    for name, make in models(section).items():
        for constants in CONSTANTS:
            section.part(f"{name}, {constants}", _tuned, name, make, constants)


def _tuned(section, name, make, constants):
    model = make()
    sparsifier = Sparsifier(model, layers=kinds_of(model))
    levels = rising()
    with _constants(constants if section.on_gpu else {}):
        sparsifier.sparsify(0.4)
        cases = {
            "copy": copying(weights_of(model)),
            "update": lambda number: sparsifier.sparsify(next(levels)),
        }
        times = measure(section.device, cases, 3 if section.quick else 9)
    section.row(
        "an update with other constants",
        model=name,
        constants=str(constants) if constants else "as they are",
        **{
            "update and apply ms": milliseconds(times["update"].device),
            "/ copy": times["update"].device / times["copy"].device,
            "host ms": milliseconds(times["update"].host),
        },
    )


@contextmanager
def _constants(constants):
    "The kernels are launched with these, within"
    if not constants:
        yield
        return
    from sparsifai.axes.ranking import on_device_triton as launched

    before = {name: getattr(launched, name) for name in constants}
    try:
        vars(launched).update(constants)
        launched._programs.cache_clear()
        yield
    finally:
        vars(launched).update(before)
        launched._programs.cache_clear()
    torch.cuda.synchronize()
