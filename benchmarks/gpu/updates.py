"""Section `updates`: masks built and applied, as multiples of a copy of the weights, beside other libraries."""

import torch
from torch import nn

from benchmarks.gpu.breakdown import parts_of_update
from benchmarks.gpu.running import measure, memory_of, no_waiting
from benchmarks.gpu.workloads import copying, models, rising
from benchmarks.models import weights_of
from benchmarks.peers import FasterAI, TorchPrune, fasterai_is_installed, kinds_of
from benchmarks.timing import milliseconds
from sparsifai import Sparsifier

CONTEXTS = ("global", "local")
# Granularity, context, criterion, and type where it is not the usual one.
OTHERS = (
    *((each, "global", "large_final") for each in ("filter", "kernel", "channel", "row", "4x4")),
    ("filter", "local", "large_final"),
    *(("weight", each, "large_final") for each in ("2:4", "2:16", "lamp", "per_output", "erk")),
    *(("weight", "global", each) for each in ("movement", "movement_pruning", "lamp", "random")),
    *(("weight", "global", "large_final", each) for each in (torch.float16, torch.bfloat16, torch.float64)),
    ("filter", "global", "movement_pruning"),
    ("3x5", "global", "large_final"),
)
# Contexts in which no update waits for the GPU.
STAY = (*CONTEXTS, "2:4", "2:16", "per_output")
OF_DECODERS = (OTHERS[0], OTHERS[4])
TABLE = "an update beside a copy of the weights"


def updates(section):
    "Each model in its usual type, then what else there is to rank, then other libraries"
    for name, make in models(section).items():
        for context in CONTEXTS:
            section.part(f"{name}, {context}", _update, name, make, context)
        section.part(f"{name}, mask of moments and gradients", _gradients, name, make)
    for case in OTHERS:
        for name, make in models(section).items():
            # Of a decoder, whose update takes long, only what others would hardly show.
            if not name.startswith("decoder") or case in OF_DECODERS:
                section.part(f"{name}, {', '.join(map(str, case))}", _other, name, make, *case)
    for name, make in models(section).items():
        for context in CONTEXTS:
            section.part(f"{name}, {context}, torch prune", _peer, name, make, context, TorchPrune)
            if fasterai_is_installed():
                section.part(f"{name}, {context}, FasterAI", _peer, name, make, context, FasterAI)


def _update(section, name, make, context):
    model = make()
    weights = sum(weight.numel() for weight in weights_of(model))
    rounds = 5 if section.quick else 15
    sparsifier = Sparsifier(model, "weight", context, layers=kinds_of(model))
    levels = rising()
    sparsifier.sparsify(0.4)
    cases = {
        "copy": copying(weights_of(model)),
        "update": lambda number: sparsifier.sparsify(next(levels)),
        "update_masks": lambda number: sparsifier.update_masks(next(levels)),
        "apply": lambda number: sparsifier.apply_masks(),
    }
    times = measure(section.device, cases, rounds)
    with no_waiting(section.device):
        sparsifier.sparsify(0.6)
    memory = memory_of(section.device, lambda: sparsifier.sparsify(0.61))
    copy = times["copy"].device
    section.row(
        TABLE,
        model=name,
        context=context,
        **{
            "copy ms": milliseconds(copy),
            "update and apply ms": milliseconds(times["update"].device),
            "update and apply / copy": times["update"].device / copy,
            "update_masks / copy": times["update_masks"].device / copy,
            "apply / copy": times["apply"].device / copy,
            "host ms of a copy": milliseconds(times["copy"].host),
            "host ms of an update": milliseconds(times["update"].host),
            "host ms of apply": milliseconds(times["apply"].host),
            "bytes a weight": None if memory is None else memory / weights,
        },
    )
    if context == "global":
        parts_of_update(section, name, sparsifier, copy)


def _gradients(section, name, make):
    "What a step needs beside an update: gradients masked, and moments"
    model = make()
    sparsifier = Sparsifier(model, layers=kinds_of(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    sparsifier.sparsify(0.5)
    cases = {
        "copy": copying(weights_of(model)),
        "mask_gradients": lambda number: sparsifier.mask_gradients(),
        "mask_moments": lambda number: sparsifier.mask_moments(optimizer),
    }
    times = measure(section.device, cases, 5 if section.quick else 15)
    ratios = {f"{case} / copy": times[case].device / times["copy"].device for case in list(cases)[1:]}
    hosts = {f"host ms of {case}": milliseconds(times[case].host) for case in list(cases)[1:]}
    section.row("what goes with an update in a step", model=name, **ratios, **hosts)


def _peer(section, name, make, context, kind):
    "One update, for these take long; the first one warms up"
    model = make()
    peer = kind(model, context=context)
    copy = copying(weights_of(model))

    def case(number):
        peer.update(0.5)

    rounds = 2 if name.startswith("decoder") else 3
    seconds = []
    for _ in range(rounds):
        seconds.append(measure(section.device, {"peer": case}, 1, warm_up=0)["peer"].device)
        if hasattr(peer, "restore"):
            peer.restore()
    copied = measure(section.device, {"copy": copy}, 5)["copy"].device
    section.row(
        "peers",
        model=name,
        context=context,
        library=kind.__name__,
        **{"update ms": milliseconds(min(seconds)), "/ copy": min(seconds) / copied},
    )


def _other(section, name, make, granularity, context, criterion, dtype=None):
    "Another granularity, context, criterion or type of the weights than those of the main table"
    model = make().to(dtype)
    if granularity in ("kernel", "row") and not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return
    sparsifier = Sparsifier(model, granularity, context, criterion, layers=kinds_of(model))
    with torch.no_grad():
        for weight in weights_of(model):
            weight.add_(torch.randn_like(weight), alpha=0.001)
            weight.grad = torch.randn_like(weight)
    if criterion == "movement_pruning":
        sparsifier.collect_gradients()
    rounds = 3 if section.quick else 5
    levels = rising()
    sparsifier.sparsify(0.4)
    cases = {
        "copy": copying(weights_of(model)),
        "update": lambda number: sparsifier.sparsify(next(levels)),
    }
    times = measure(section.device, cases, rounds)
    waits = False
    try:
        with no_waiting(section.device):
            sparsifier.sparsify(0.5)
    except RuntimeError:
        waits = True
    if waits and context in STAY and criterion != "random":
        section.fail(f"{name}, {granularity}, {context}, {criterion}", "the host waits for the GPU in an update")
    section.row(
        "other groups, contexts, criteria and types",
        model=name,
        granularity=granularity,
        context=context,
        criterion=criterion,
        weights=f"{next(model.parameters()).dtype}",
        waits=waits,
        **{
            "update and apply ms": milliseconds(times["update"].device),
            "/ copy": times["update"].device / times["copy"].device,
            "host ms": milliseconds(times["update"].host),
        },
    )
