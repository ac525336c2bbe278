"""Section `updates`: masks built and applied, as multiples of a copy of the weights, beside other libraries."""

from itertools import count

import torch
from torch import nn

from benchmarks.gpu.running import measure, memory_of, no_waiting
from benchmarks.gpu.workloads import models
from benchmarks.models import weights_of
from benchmarks.peers import FasterAI, TorchPrune, fasterai_is_installed, kinds_of
from benchmarks.timing import milliseconds
from sparsifai import Sparsifier

CONTEXTS = ("global", "local")
TABLE = "an update beside a copy of the weights"


def updates(section):
    "Each model in its usual type"
    for name, make in models(section).items():
        for context in CONTEXTS:
            section.part(f"{name}, {context}", _update, name, make, context)
        section.part(f"{name}, mask of moments and gradients", _gradients, name, make)
    for name, make in models(section).items():
        for context in CONTEXTS:
            section.part(f"{name}, {context}, torch prune", _peer, name, make, context, TorchPrune)
            if fasterai_is_installed():
                section.part(f"{name}, {context}, FasterAI", _peer, name, make, context, FasterAI)
    for name, make in models(section).items():
        _granularities(section, name, make)


def _rising():
    "Levels each a little higher than the one before, so that every update finds something to do"
    return (0.45 + number / 1000 for number in count())


def _copying(weights):
    weights = [weight.detach() for weight in weights]
    copies = [torch.empty_like(weight) for weight in weights]

    def copy(number):
        for into, weight in zip(copies, weights, strict=True):
            into.copy_(weight)

    return copy


def _update(section, name, make, context):
    model = make()
    weights = sum(weight.numel() for weight in weights_of(model))
    rounds = 5 if section.quick else 15
    sparsifier = Sparsifier(model, "weight", context, layers=kinds_of(model))
    rising = _rising()
    sparsifier.sparsify(0.4)
    cases = {
        "copy": _copying(weights_of(model)),
        "update": lambda number: sparsifier.sparsify(next(rising)),
        "update_masks": lambda number: sparsifier.update_masks(next(rising)),
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
        "copy": _copying(weights_of(model)),
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
    copy = _copying(weights_of(model))

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


def _granularities(section, name, make):
    "Groups of other shapes, and a criterion of gradients; ranked globally"
    for granularity, criterion in (
        *((each, "large_final") for each in ("kernel", "filter", "channel", "row", "4x4")),
        ("weight", "movement"),
        ("weight", "movement_pruning"),
    ):
        # Of a decoder, whose update takes long, only what others would hardly show.
        if not name.startswith("decoder") or granularity in ("filter", "4x4"):
            section.part(f"{name}, {granularity}, {criterion}", _granularity, name, make, granularity, criterion)


def _granularity(section, name, make, granularity, criterion):
    model = make()
    if granularity in ("kernel", "row") and not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return
    sparsifier = Sparsifier(model, granularity, "global", criterion, layers=kinds_of(model))
    with torch.no_grad():
        for weight in weights_of(model):
            weight.add_(torch.randn_like(weight), alpha=0.001)
            weight.grad = torch.randn_like(weight)
    if criterion == "movement_pruning":
        sparsifier.collect_gradients()
    rounds = 3 if section.quick else 5
    rising = _rising()
    sparsifier.sparsify(0.4)
    cases = {
        "copy": _copying(weights_of(model)),
        "update": lambda number: sparsifier.sparsify(next(rising)),
    }
    times = measure(section.device, cases, rounds)
    with no_waiting(section.device):
        sparsifier.sparsify(0.6)
    section.row(
        "other groups and criteria, global",
        model=name,
        granularity=granularity,
        criterion=criterion,
        **{
            "update and apply ms": milliseconds(times["update"].device),
            "/ copy": times["update"].device / times["copy"].device,
            "host ms": milliseconds(times["update"].host),
        },
    )
