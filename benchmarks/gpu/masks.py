"""Section `masks`: masks that are built on the GPU are those that are built on the CPU, bit for bit."""

import copy
import itertools
import warnings

import torch
from torch import nn

from benchmarks.gpu.running import no_waiting
from benchmarks.gpu.workloads import convolutional, copied
from sparsifai import Sparsifier, criteria

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GRANULARITIES = (
    *("weight", "row", "column", "kernel", "filter", "channel", "layer"),
    *("vertical_slice", "shared_weight", "2x2", "3x5"),
)
# The first four stay on the device; of the others, the host is given arrays.
CONTEXTS = ("local", "global", "per_output", "2:4", "lamp", "erk")
STAY = CONTEXTS[:4]
ON_DEVICE = ("local", "global")
LEVELS = (0.3, 0.5, 0.8, 0.4)  # the last one lets weights come back


def net():
    "Convolution, grouped convolution, norm and linear layers; sides that tiles do not divide"
    return nn.Sequential(
        nn.Conv2d(4, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, (3, 2), groups=2), nn.ReLU(),
        nn.Conv2d(16, 48, 1), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def masks(section):
    "All combinations that there are, and the weights of ResNet-50"
    # Short parts: one that takes longer than there is time for is stopped, and shows nothing.
    for dtype, context in itertools.product(DTYPES[:2], CONTEXTS):
        section.part(f"{dtype}, {context}", _axes, dtype, context)
    for criterion in [name for name in criteria if name != "gate_importance"]:  # which is for heads and neurons
        section.part(f"criterion {criterion}", _criterion, criterion)
    for dtype in (torch.float32, torch.bfloat16):
        section.part(f"large model, {dtype}", _large_model, dtype)
    for dtype, context in itertools.product(DTYPES[2:], CONTEXTS):
        section.part(f"{dtype}, {context}", _axes, dtype, context)


def _axes(section, dtype, context):
    for granularity, ties in itertools.product(GRANULARITIES, (False, True)):
        _compare(section, f"{dtype}", granularity, context, "large_final", dtype, ties)


def _criterion(section, criterion):
    for context, granularity, ties in itertools.product(ON_DEVICE, ("weight", "filter"), (False, True)):
        _compare(section, "criteria", granularity, context, criterion, torch.float32, ties)


def _compare(section, table, granularity, context, criterion, dtype, ties):
    "One row for a combination whose masks differ or that fails; of all, how many there were"
    counts = _counts(section, table)
    label = f"{granularity}, {context}, {criterion}, {dtype}{', ties' if ties else ''}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            host = _sparsifier("cpu", granularity, context, criterion, dtype, ties)
            if host is None:
                return
            device = _sparsifier(section.device, granularity, context, criterion, dtype, ties)
            # Quantities of data, whose sums a GPU adds up in another order, are those of the CPU.
            device.load_state_dict(host.state_dict())
            counts["combinations"] += 1
            differing, waits = _differing(host, device, section.device, context, criterion)
    except Exception as error:
        counts["failed"] += 1
        section.fail(label, f"{type(error).__name__}: {error}")
        return
    counts["equal"] += not differing
    counts["differ"] += bool(differing)
    counts["wait"] += bool(waits)
    if differing or (waits and context in STAY):
        section.row("differing or waiting", case=label, **{"weights that differ": differing, "waits": waits})


def _counts(section, table):
    rows = section.tables.setdefault("equal masks", [])
    found = next((row for row in rows if row["table"] == table), None)
    if found is None:
        found = {"table": table, "combinations": 0, "equal": 0, "differ": 0, "failed": 0, "wait": 0}
        rows.append(found)
    return found


def _sparsifier(device, granularity, context, criterion, dtype, ties):
    "One on the same weights each time, which have moved since; None for a combination that there is not"
    torch.manual_seed(0)
    model = net()
    if ties:
        _round(model)
    model = model.to(dtype)
    moved = [torch.randn_like(parameter) * 0.1 for parameter in model.parameters()]
    model.to(device)
    example = torch.zeros(2, 4, 12, 12, dtype=dtype, device=device)
    batch = torch.randn(8, 4, 12, 12).to(dtype), torch.randint(10, (8,))
    try:
        sparsifier = Sparsifier(model, granularity, context, criterion, example_input=example)
        if sparsifier.collected.at("forward", "loss", "backward"):
            sparsifier.calibrate([tuple(each.to(device) for each in batch)], nn.functional.cross_entropy)
        sparsifier.check(0.5)
    except (ValueError, TypeError):
        if str(device) == "cpu":
            return None
        raise
    with torch.no_grad():
        for parameter, change in zip(model.parameters(), moved, strict=True):
            parameter.add_(change.to(device))
    if ties:
        _round(model)
    return sparsifier


def _round(model):
    "Many equal weights, and zeros of both signs"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(16).round_().div_(16)


def _differing(host, device, where, context, criterion):
    "Weights whose masks differ, over all levels; what made the host wait, if anything"
    differing, waits = 0, ""
    for level in LEVELS:
        level = min(level, 0.5) if context == "2:4" else level
        host.sparsify(level)
        stays = context in STAY and criterion not in ("random", "synflow")
        try:
            with no_waiting(where) if stays else _nothing():
                device.sparsify(level)
        except RuntimeError as error:
            waits = str(error).splitlines()[0]
            device.sparsify(level)
        for name, mask in host.masks.items():
            differing += int((device.masks[name].cpu() != mask).sum())
    return differing, waits


def _nothing():
    return warnings.catch_warnings()


def _large_model(section, dtype):
    "Many blocks of a kernel, layers of very different sizes, with and without ties, in both orders of memory"
    name = convolutional(section)
    for ties, layout in itertools.product((False, True), (torch.contiguous_format, torch.channels_last)):
        models = []
        for device in ("cpu", section.device):
            model = copied(name)
            if ties:
                _round(model)
            dense = copy.deepcopy(model.to(dtype).state_dict())
            models.append(model.to(device, memory_format=layout))
        for context in ON_DEVICE:
            host, device = (Sparsifier(model, "weight", context) for model in models)
            differing = 0
            for level in (0.0003, 0.5, 0.5001, 0.95):
                host.sparsify(level)
                with no_waiting(section.device):
                    device.sparsify(level)
                differing += sum(int((device.masks[name].cpu() != mask).sum()) for name, mask in host.masks.items())
            same = all(
                torch.equal(one, other.cpu())
                for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True)
            )
            section.row(
                "weights of a large model",
                dtype=f"{dtype}",
                ties=ties,
                layout=f"{layout}",
                context=context,
                **{"weights that differ": differing, "same weights": same},
            )
            if differing or not same:
                section.fail(f"{name}, {dtype}, {context}, ties {ties}, {layout}", f"{differing} weights differ")
            for model in models:
                model.load_state_dict(dense)
