"""Sections `build` and `scaling`: mask updates, beside a copy of the weights and beside other libraries."""

import math
from functools import partial

import torch
from torch import nn

from benchmarks.models import MISSING, move, random_model, weights_of
from benchmarks.peers import FasterAI, TorchPrune, fasterai_is_installed, kinds_of
from benchmarks.report import Table
from benchmarks.timing import copying, interleaved, milliseconds, ratio, seconds_of, threads
from sparsifai import Sparsifier, blocks


def update_seconds(make_model, granularity, context, criteria, rounds, slow_rounds, peers, round_to=None):
    """Median seconds of a copy, of building masks, of building and applying them, and of the peers' updates.

    make_model: gives a fresh model, of which each library gets one. peers: which of them can do the same.
    """
    levels = [0.45 + 0.1 * number / rounds for number in range(rounds + 1)]
    model = make_model()
    sparsifier = Sparsifier(model, granularity, context, criteria, layers=kinds_of(model), round_to=round_to)
    move(model)
    sparsifier.sparsify(levels[0])
    # In this order: `check` builds masks and drops them, so both start from the level of the round before.
    cases = {
        "copy": copying(weights_of(model)),
        "build": lambda number: seconds_of(sparsifier.check, levels[number + 1]),
        "update": lambda number: seconds_of(sparsifier.sparsify, levels[number + 1]),
    }
    if "FasterAI" in peers:
        cases["FasterAI"] = _fasterai_update(make_model(), granularity, context, criteria, levels)
    if "torch prune" in peers:
        cases["torch prune"] = _prune_update(make_model(), context, levels)
    return interleaved(cases, rounds, slow=("FasterAI", "torch prune"), slow_rounds=slow_rounds)


def _fasterai_update(model, granularity, context, criteria, levels):
    peer = FasterAI(model, granularity, context, criteria)
    move(model)
    peer.update(levels[0])
    return lambda number: seconds_of(peer.update, levels[number + 1])


def _prune_update(model, context, levels):
    move(model)
    peer = TorchPrune(model, context)

    def case(number):
        seconds = seconds_of(peer.update, levels[number + 1])
        peer.restore()
        return seconds

    return case


HEAD_OF_ZEROS = "global magnitude, head of zeros"
ROUNDED = "global magnitude, round_to=8"
# Contexts that the peers do not have.
OWN = {"2:4": blocks(4), "8:16": blocks(16), "per_output": "per_output", "lamp": "lamp"}


def build(quick):
    "Mask updates at a level that rises a little each time"
    axes = {
        "local magnitude": ("weight", "local", "large_final"),
        "global magnitude": ("weight", "global", "large_final"),
        HEAD_OF_ZEROS: ("weight", "global", "large_final"),
        "global movement": ("weight", "global", "movement"),
        "global filter": ("filter", "global", "large_final"),
        "global kernel": ("kernel", "global", "large_final"),
        "global channel": ("channel", "global", "large_final"),
        **{case: ("weight", context, "large_final") for case, context in OWN.items()},
        ROUNDED: ("weight", "global", "large_final"),
    }
    rows = []
    with threads(1):
        for name in ("resnet18",) if quick else ("resnet18", "resnet50", "vit_b_16"):
            local = None
            for case, (granularity, context, criteria) in axes.items():
                can = ["FasterAI"] if granularity == "weight" or "resnet" in name else []
                can += ["torch prune"] if (granularity, criteria) == ("weight", "large_final") else []
                can = [] if case in (HEAD_OF_ZEROS, ROUNDED, *OWN) else can  # alike to them, or not theirs
                peers = [peer for peer in can if peer != "FasterAI" or fasterai_is_installed()]
                seconds = update_seconds(
                    partial(random_model, name, zeros=case == HEAD_OF_ZEROS),
                    granularity,
                    context,
                    criteria,
                    rounds=7 if quick else 15,
                    slow_rounds=1 if quick else 3,
                    peers=peers,
                    round_to=8 if case == ROUNDED else None,
                )
                copies = seconds["update"] / seconds["copy"]
                local = copies if case == "local magnitude" else local
                of_local = {"update / local": ratio(copies, local)}
                rows.append({"model": name, "case": case, **_update_columns(seconds, can), **of_local})
    return Table(
        "build",
        "one mask update near 0.5, one thread",
        rows,
        "ms; `update` is build and apply; peers build and apply too. `update / local`: copies that updates take, over "
        "those of local magnitude. With filters, kernels and channels FasterAI masks convolutions only; "
        "sparsifai masks linear layers too, and with filters their biases and norm layers.",
    )


def _update_columns(seconds, can):
    columns = {"copy ms": milliseconds(seconds["copy"])}
    for name in ("build", "update"):
        columns |= {f"{name} ms": milliseconds(seconds[name]), f"{name} / copy": seconds[name] / seconds["copy"]}
    for peer in ("FasterAI", "torch prune"):
        taken = seconds.get(peer)
        columns[f"{peer} ms"] = MISSING if peer in can and taken is None else milliseconds(taken)
        columns[f"{peer} / copy"] = ratio(taken, seconds["copy"])
        columns[f"{peer} / update"] = ratio(taken, seconds["update"])
    return columns


SIZES = (2**20, 2**22, 2**24, 2**26, 250_000_000)


def side_of_layers(weights):
    "Of four square layers that have about so many weights"
    return round(math.sqrt(weights / 4))


def layers_with(weights):
    "A model of four linear layers with about so many weights"
    side = side_of_layers(weights)
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(4)))


def scaling(quick):
    "A global magnitude update of models from a million weights to 250 million"
    rows = []
    with threads(1):
        for asked_for in SIZES[:3] if quick else SIZES:
            # Peers take minutes on the largest ones.
            can = ["FasterAI", "torch prune"] if asked_for <= 2**24 else []
            peers = [peer for peer in can if peer != "FasterAI" or fasterai_is_installed()]
            seconds = update_seconds(
                partial(layers_with, asked_for),
                "weight",
                "global",
                "large_final",
                rounds=7 if quick or asked_for > 2**24 else 15,
                slow_rounds=1 if quick else 3,
                peers=peers,
            )
            weights = 4 * side_of_layers(asked_for) ** 2
            rows.append({"weights": weights, **_per_weight(seconds, weights, can)})
    return Table("scaling", "global magnitude update near 0.5, one thread", rows, "ns per weight.")


def _per_weight(seconds, weights, can):
    columns = {"copy ns": 1e9 * seconds["copy"] / weights}
    for name in ("build", "update"):
        columns |= {f"{name} ns": 1e9 * seconds[name] / weights, f"{name} / copy": seconds[name] / seconds["copy"]}
    for peer in ("FasterAI", "torch prune"):
        taken = seconds.get(peer)
        columns[f"{peer} ns"] = 1e9 * taken / weights if taken else MISSING if peer in can else None
    return columns
