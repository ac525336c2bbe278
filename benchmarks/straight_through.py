"""Section `straight`: what dense weights beside the sparse ones cost in a step, in copies of the weights."""

import torch

from benchmarks.models import random_model, weights_of
from benchmarks.peers import kinds_of
from benchmarks.report import Table
from benchmarks.timing import copying, interleaved, milliseconds, seconds_of, threads
from sparsifai import Sparsifier

# Options of the Sparsifier by the name of the row.
WAYS = {
    "masks only grow": {},
    "straight-through": {"straight_through": True},
    "straight-through, decay 0": {"straight_through": True, "decay": 0.0},
}
PARTS = ("mask_gradients", "step", "update_masks")


def straight(quick):
    "Each part of a step, for masks that only grow and for masks that change their mind"
    rows = []
    rounds = 7 if quick else 15
    with threads(1):
        for name in ("resnet18",) if quick else ("resnet18", "resnet50", "vit_b_16"):
            for context in ("global", "local"):
                rows += _rows(name, context, rounds)
    return Table(
        "straight",
        "what a training step with SGD does beside forward and backward, one thread, magnitudes near 0.5",
        rows,
        "Copies of the weights: gradients masked or pulled, the optimizer's step, an update of the masks; and their "
        "sum beyond that of masks that only grow.",
    )


def _rows(name, context, rounds):
    "The rows of a model"
    levels = [0.45 + 0.1 * number / rounds for number in range(rounds + 1)]
    cases = {}
    for way, options in WAYS.items():
        model = random_model(name)
        sparsifier = Sparsifier(model, context=context, layers=kinds_of(model), **options)
        sparsifier.sparsify(levels[0])
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        cases |= {(way, part): case for part, case in _cases(sparsifier, optimizer, levels).items()}
        cases.setdefault("copy", copying(weights_of(model)))
    seconds = interleaved(cases, rounds)
    sums = {way: sum(seconds[way, part] for part in PARTS) for way in WAYS}
    return [
        {
            "model": name,
            "context": context,
            "way": way,
            "copy ms": milliseconds(seconds["copy"]),
            **{f"{part} / copy": seconds[way, part] / seconds["copy"] for part in PARTS},
            "more / copy": (sums[way] - sums["masks only grow"]) / seconds["copy"],
        }
        for way in WAYS
    ]


def _cases(sparsifier, optimizer, levels):
    "The parts of a step, in their order"

    def step():
        with sparsifier.dense_weights():
            optimizer.step()

    return {
        "mask_gradients": lambda number: seconds_of(sparsifier.mask_gradients),
        "step": lambda number: seconds_of(step),
        "update_masks": lambda number: seconds_of(sparsifier.update_masks, levels[number + 1]),
    }
