"""What sparsifai is compared with: objects that update the masks of convolutions and linear layers of a model.

FasterAI is optional: `pip install "sparsifai[bench]"`.
"""

from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import StringIO

import torch
from torch import nn
from torch.nn.utils import prune

KINDS = (nn.Conv2d, nn.Linear)

# What FasterAI calls the granularities of the benchmarks. It has the last three for convolutions only.
FASTERAI_GRANULARITIES = {"weight": "weight", "filter": "filter", "kernel": "kernel", "channel": "shared_kernel"}


def layers_of(model):
    "The layers that all benchmarks prune, with each of the compared libraries"
    return [module for module in model.modules() if isinstance(module, KINDS)]


def kinds_of(model):
    "Of KINDS, those that the model has"
    return [kind for kind in KINDS if any(isinstance(layer, kind) for layer in layers_of(model))]


def fasterai_is_installed():
    "Whether FasterAI can be compared with"
    return find_spec("fasterai") is not None


def version_of_fasterai():
    "As it is shown"
    try:
        return version("fasterai")
    except PackageNotFoundError:
        return "not installed"


class FasterAI:
    "FasterAI's Sparsifier"

    def __init__(self, model, granularity="weight", context="global", criteria="large_final"):
        from fasterai.core import criteria as fasterai_criteria
        from fasterai.sparse.sparsifier import Sparsifier

        kinds = KINDS if granularity == "weight" else nn.Conv2d
        self.sparsifier = Sparsifier(
            model,
            FASTERAI_GRANULARITIES[granularity],
            context,
            getattr(fasterai_criteria, criteria),
            layer_type=kinds,
        )
        self.layers = [layer for layer in layers_of(model) if isinstance(layer, kinds)]

    @torch.no_grad()
    def update(self, level):
        "Build the masks and apply them"
        self.sparsifier.sparsify_model(level)

    @torch.no_grad()
    def apply(self):
        "Apply the masks, as after a step"
        self.sparsifier._apply_masks()

    def count(self):
        "Weights that are masked"
        return sum(int((layer._mask == 0).sum()) for layer in self.layers)


class TorchPrune:
    "The functions of torch.nn.utils.prune that rank by magnitude"

    def __init__(self, model, context="global"):
        self.layers, self.context = layers_of(model), context
        self.weights = [layer.weight.detach().clone() for layer in self.layers]

    def update(self, level):
        "Build the masks and apply them"
        if self.context == "global":
            pairs = [(layer, "weight") for layer in self.layers]
            prune.global_unstructured(pairs, prune.L1Unstructured, amount=level)
        else:
            for layer in self.layers:
                prune.l1_unstructured(layer, "weight", amount=level)

    @torch.no_grad()
    def restore(self):
        "Make the layers dense again: a second update would add its amount to that of the first, and take longer"
        for layer, weight in zip(self.layers, self.weights, strict=True):
            if prune.is_pruned(layer):
                prune.remove(layer, "weight")
            layer.weight.copy_(weight)

    def apply(self):
        "What its hooks do before each forward"
        for layer in self.layers:
            for hook in layer._forward_pre_hooks.values():
                hook(layer, None)

    def count(self):
        "Weights that are masked"
        return sum(int((layer.weight_mask == 0).sum()) for layer in self.layers)


def fasterai_callback(sparsity, start, end, one_shot=False):
    "FasterAI's SparsifyCallback for the part of a linear schedule from `start` to `end`, or all at once"
    from fasterai.core.criteria import large_final
    from fasterai.core.schedule import Schedule, sched_lin, sched_oneshot
    from fasterai.sparse.sparsify_callback import SparsifyCallback

    schedule = Schedule(sched_oneshot) if one_shot else Schedule(sched_lin, start_val=start, end_val=end)
    with redirect_stdout(StringIO()):
        return SparsifyCallback(sparsity, "weight", "global", large_final, schedule, layer_type=KINDS)
