"""Section `memory`: the peak of one way to update masks, counted by the system in a process of its own.

    python -m benchmarks.memory sparsifai resnet18 --context global --criteria large_final --granularity weight

Prints two numbers, bytes per weight beyond the dense model: at the peak of an update, and kept after it.
"""

import argparse
import gc
import os
import subprocess
import sys
from pathlib import Path

import torch
import torchvision

from benchmarks.models import MISSING
from benchmarks.peers import FasterAI, TorchPrune, fasterai_is_installed, kinds_of, layers_of
from benchmarks.report import Table
from sparsifai import Sparsifier

STRAIGHT_THROUGH = "global magnitude, straight-through"
LIBRARIES = ("sparsifai", "FasterAI", "torch prune")


def memory(quick):
    "Bytes per weight beyond those of the dense model"
    if not Path("/proc/self/clear_refs").exists():
        return Table("memory", "needs Linux, which counts the peak")
    cases = {
        "global magnitude": ("global", "large_final", "weight"),
        "local magnitude": ("local", "large_final", "weight"),
        "global movement": ("global", "movement", "weight"),
        "global filter": ("global", "large_final", "filter"),
        STRAIGHT_THROUGH: ("global", "large_final", "weight"),
    }
    if quick:
        cases = {"global magnitude": cases["global magnitude"]}
    rows = []
    for model in ("resnet18",) if quick else ("resnet18", "resnet50"):
        for case, (context, criteria, granularity) in cases.items():
            columns = {}
            for library in LIBRARIES:
                dense, is_own = case == STRAIGHT_THROUGH, library == "sparsifai"
                magnitudes = (criteria, granularity) == ("large_final", "weight")
                if (library == "torch prune" and not magnitudes) or (dense and not is_own):
                    peak, kept = None, None
                elif library == "FasterAI" and not fasterai_is_installed():
                    peak, kept = MISSING, MISSING
                else:
                    peak, kept = bytes_per_weight(library, model, context, criteria, granularity, dense)
                columns |= {f"{library} peak": peak, f"{library} kept": kept}
            rows.append({"model": model, "case": case, **columns})
    return Table(
        "memory",
        "bytes per weight beyond the dense model, at the peak of an update near 0.5 and after it",
        rows,
        "Counted by the system, each in a fresh process. What movement compares with, 4 bytes, is among them, and so "
        "are the 4 bytes of dense weights in straight-through training.",
    )


def bytes_per_weight(library, model, context, criteria="large_final", granularity="weight", straight_through=False):
    "Peak and kept bytes per weight, measured in a fresh process"
    axes = ["--context", context, "--criteria", criteria, "--granularity", granularity]
    axes += ["--straight-through"] if straight_through else []
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", library, model, *axes],
        cwd=Path(__file__).parents[1],
        # Large pieces that are freed go back to the system at once, so that they are not counted as held.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(f"memory of {library} could not be measured: {result.stderr}")
    peak, kept = map(float, result.stdout.split()[-2:])
    return peak, kept


def _updater(library, model, granularity, context, criteria, straight_through):
    if library == "sparsifai":
        options = {"layers": kinds_of(model), "straight_through": straight_through}
        return Sparsifier(model, granularity, context, criteria, **options).sparsify
    if library == "FasterAI":
        return FasterAI(model, granularity, context, criteria).update
    return TorchPrune(model, context).update


def _resident(kind):
    "Bytes of memory of this process: VmRSS now, VmHWM at most since it was last set back"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024


def _move(model):
    "Change the weights a little, as training does; in place, so that nothing is allocated"
    with torch.no_grad():
        for layer in layers_of(model):
            layer.weight.mul_(1.01).add_(1e-4)


def main(library, name, *axes):
    "Measure it here"
    # What the first use of anything loads is not counted.
    small = torchvision.models.resnet18(num_classes=2)
    update = _updater(library, small, *axes)
    _move(small)
    update(0.5)
    del update, small
    gc.collect()  # models stand in cycles
    model = getattr(torchvision.models, name)()
    weights = sum(layer.weight.numel() for layer in layers_of(model))
    before = _resident("VmRSS")
    update = _updater(library, model, *axes)
    _move(model)
    if library != "torch prune":  # a second update of which adds to the first
        update(0.45)
        _move(model)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
    update(0.5)
    print((_resident("VmHWM") - before) / weights, (_resident("VmRSS") - before) / weights)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("model")
    parser.add_argument("--context", default="global")
    parser.add_argument("--criteria", default="large_final")
    parser.add_argument("--granularity", default="weight")
    parser.add_argument("--straight-through", action="store_true")
    arguments = parser.parse_args()
    axes = arguments.granularity, arguments.context, arguments.criteria
    main(arguments.library, arguments.model, *axes, arguments.straight_through)
