"""Section `apply`: masks that are there already."""

import torch
from torch import nn

from benchmarks.models import MISSING, random_model, weights_of
from benchmarks.peers import FasterAI, TorchPrune, fasterai_is_installed, kinds_of
from benchmarks.report import Table
from benchmarks.timing import copying, interleaved, milliseconds, ratio, seconds_of
from sparsifai import Sparsifier


def apply(quick):
    "Masks that are there already, applied to weights and gradients"
    rounds = 10 if quick else 60
    model = random_model("resnet18")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(1000, (16,))
    sparsifier = Sparsifier(model, layers=kinds_of(model))
    sparsifier.sparsify(0.5)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    # The step comes first: gradients are there for what follows, and all weights have been touched.
    cases = {
        "step": lambda number: seconds_of(step),
        "copy": copying(weights_of(model)),
        "sparsifai apply_masks": lambda number: seconds_of(sparsifier.apply_masks),
        "sparsifai mask_gradients": lambda number: seconds_of(sparsifier.mask_gradients),
        "FasterAI _apply_masks": None,
    }
    if fasterai_is_installed():
        fasterai = FasterAI(random_model("resnet18"))
        fasterai.update(0.5)
        cases["FasterAI _apply_masks"] = lambda number: seconds_of(fasterai.apply)
    prune = TorchPrune(random_model("resnet18"))
    prune.update(0.5)
    cases["torch prune, hooks of a forward"] = lambda number: seconds_of(prune.apply)
    seconds = interleaved(cases, rounds)
    rows = [
        {
            "case": name,
            "ms": milliseconds(seconds[name]) if name in seconds else MISSING,
            "/ copy": ratio(seconds.get(name), seconds["copy"]),
            "/ step": ratio(seconds.get(name), seconds["step"]),
        }
        for name in cases
    ]
    return Table(
        "apply",
        f"resnet18 at 0.5, batch 16 of 64 px, SGD, threads: {torch.get_num_threads()}",
        rows,
        "`step` is dense.",
    )
