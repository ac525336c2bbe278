"""Section `step`: what a fastai Learner takes for a batch, dense and sparse."""

import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from statistics import median

import numpy as np
import torch
from torch import nn

from benchmarks.models import MISSING, random_model
from benchmarks.peers import fasterai_callback, fasterai_is_installed
from benchmarks.report import Table
from benchmarks.timing import milliseconds, ratio


class Batches(list):
    """A data set whose items are whole batches, and which notes when each is asked for.

    From one to the next is all of a training step, and no callback stands in it that sparsifai would not know.
    """

    def __init__(self, batches):
        super().__init__(batches)
        self.times = []

    def __getitem__(self, place):
        self.times.append(time.perf_counter())
        return super().__getitem__(place)


def learner(optimizer, batches):
    "A Learner on random images"
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner

    several = Batches((torch.randn(16, 3, 64, 64), torch.randint(1000, (16,))) for _ in range(batches))
    loaders = (DataLoader(each, bs=None, num_workers=0) for each in (several, several[:1]))
    dls = DataLoaders(*loaders, device=torch.device("cpu"))
    return Learner(dls, random_model("resnet18"), loss_func=nn.CrossEntropyLoss(), opt_func=optimizer)


def seconds_of_batches(learn, callbacks):
    "Seconds of the batches of one fit, without the first two, in which things are made"
    times = learn.dls.train_ds.times = []
    with learn.no_bar(), learn.no_logging(), redirect_stdout(StringIO()):
        learn.fit(1, cbs=callbacks, reset_opt=False)
    return list(np.diff(times)[2:])


def step(quick):
    "What sparsity costs in a Learner"
    from fastai.optimizer import SGD, OptimWrapper

    optimizers = {
        "SGD, fastai's": partial(SGD, mom=0.9),
        "AdamW, torch's": partial(OptimWrapper, opt=torch.optim.AdamW),
    }
    rounds, batches = (3, 6) if quick else (8, 12)
    rows = []
    for name, optimizer in optimizers.items():
        variants = _step_variants(rounds)
        learners = {variant: learner(optimizer, batches) for variant in variants}
        seconds = {variant: [] for variant in variants}
        for number in range(rounds):
            for variant, callbacks in variants.items():
                seconds[variant] += seconds_of_batches(learners[variant], callbacks(number))
        middle = {variant: median(several) for variant, several in seconds.items()}
        for target in ("moving", "straight-through", "fixed"):
            rows.append({"optimizer": name, "target": target, **_step_columns(middle, target)})
    return Table(
        "step",
        f"a fastai Learner on resnet18, batch 16 of 64 px, global magnitude, threads: {torch.get_num_threads()}",
        rows,
        "ms per batch. `moving`: the masks are updated in every batch, on the way from 0 to 0.9; `straight-through`: "
        "the same from dense weights that are kept beside; `fixed`: at 0.9.",
    )


def _step_variants(rounds):
    """From names to functions that give the callbacks for the fit of a round.

    The fits together are one linear schedule, and each moves the target through its part of it, for in a short fit
    from 0 to the target the updates would be far larger than in training.
    """
    from sparsifai.callbacks.sparsify import SparsifyCallback

    # One callback for all fits continues its schedule, as in one long fit.
    moving, fixed = SparsifyCallback(0.9, schedule="lin"), SparsifyCallback(0.9, schedule="one_shot")
    changing = SparsifyCallback(0.9, schedule="lin", straight_through=True)
    changing.pruning = replace(changing.pruning, settle=2.0)  # never: all fits are one

    def moved(callback, number):
        ramp = replace(callback.pruning.ramp, schedule=lambda t: (number + t) / rounds)
        callback.pruning = replace(callback.pruning, ramp=ramp)
        return [callback]

    variants = {
        "dense": lambda number: [],
        "sparsifai moving": partial(moved, moving),
        "sparsifai straight-through": partial(moved, changing),
        "sparsifai fixed": lambda number: [fixed],
    }
    if fasterai_is_installed():
        variants["FasterAI moving"] = lambda number: [fasterai_callback(0.9, number / rounds, (number + 1) / rounds)]
        variants["FasterAI fixed"] = lambda number: [fasterai_callback(0.9, 0, 1, one_shot=True)]
    return variants


def _step_columns(seconds, target):
    columns = {"dense ms": milliseconds(seconds["dense"])}
    for library in ("sparsifai", "FasterAI"):
        taken = seconds.get(f"{library} {target}")
        columns[f"{library} ms"] = MISSING if taken is None else milliseconds(taken)
        columns[f"{library} / dense"] = ratio(taken, seconds["dense"])
    return columns
