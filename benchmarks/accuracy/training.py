"""Training a net with a setting, and what is measured of it."""

import time
from contextlib import nullcontext, redirect_stdout
from datetime import datetime, timezone
from io import StringIO

import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import nn
from torch.nn import functional

from benchmarks.accuracy.pictures import Batches
from benchmarks.accuracy.settings import FasterAI
from sparsifai.all import SparsifyCallback

KINDS = (nn.Conv2d, nn.Linear)


def reproducible(seed):
    "Draw everything from `seed` from here on"
    set_seed(seed, reproducible=True)


def fit(net, batches, epochs, rate, setting, sparsity, kinds=KINDS, bfloat16=False):
    """Train a net by one cycle, to a sparsity.

    rate: the highest learning rate. setting: as in `settings`. kinds: of the layers that are pruned. bfloat16: whether
    the net computes in it; its weights are in float32.
    """
    nothing = Batches(batches.images[:0], batches.labels[:0], 1)  # what epochs are validated on: that takes time
    learn = Learner(DataLoaders(batches, nothing), net, loss_func=_loss)
    # FasterAI prints.
    with redirect_stdout(StringIO()), learn.no_bar(), learn.no_logging(), computing(bfloat16):
        learn.fit_one_cycle(epochs, rate, cbs=callbacks_of(setting, sparsity, kinds))
    return net


def _loss(outputs, labels):
    return functional.cross_entropy(outputs.float(), labels)


def computing(bfloat16):
    "bfloat16 where a net computes. Its casts of weights are not kept: weights change"
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if bfloat16 else nullcontext()


def callbacks_of(setting, sparsity, kinds):
    "The callbacks of a setting"
    if setting is None:
        return []
    if isinstance(setting, FasterAI):
        return [_fasterai(sparsity, setting, kinds)]
    return [SparsifyCallback(sparsity, **{"layers": list(kinds), **setting})]


def _fasterai(sparsity, setting, kinds):
    from fasterai.core import criteria, schedule
    from fasterai.sparse.sparsify_callback import SparsifyCallback as Other

    # A new one: theirs keep what they have come to.
    functions = {"agp": (schedule.sched_agp, 0.2), "one_cycle": (schedule.sched_onecycle, 0.0)}
    function, start = functions[setting.schedule]
    when = schedule.Schedule(function, start_pct=start)
    criterion = getattr(criteria, setting.criteria)
    return Other(sparsity, "weight", setting.context, criterion, when, layer_type=tuple(kinds))


def accuracy_of(net, images, labels, size=250, bfloat16=False):
    "Fraction of pictures that a net classifies right"
    net.eval()
    right = 0
    with torch.no_grad(), computing(bfloat16):
        for pictures, wanted in zip(images.split(size), labels.split(size), strict=True):
            right += int((net(pictures).argmax(1) == wanted).sum())
    return right / len(labels)


def zeros_of(net, kinds=KINDS):
    "Fraction of the weights of layers of these kinds that are zero"
    weights = [layer.weight for layer in net.modules() if isinstance(layer, tuple(kinds))]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


class Measured:
    "What is stored of a run beside its cell: measured when it ends"

    def __init__(self):
        self.start = time.perf_counter()

    def of(self, value, zeros, name="accuracy"):
        "The record: accuracy or what else is named, zeros (a fraction), seconds of the run, the day, version of torch"
        return {
            name: round(value, 6),
            "zeros": round(zeros, 6),
            "seconds": round(time.perf_counter() - self.start, 1),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "torch": torch.__version__,
        }
