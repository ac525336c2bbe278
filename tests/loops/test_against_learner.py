"""A plain loop with a TrainingManager gives the masks and weights that SparsifyCallback gives in a Learner."""

from functools import partial

import pytest
import torch
from conftest import has_ties, misses_sparsity, small_learner, small_net
from torch import nn

from sparsifai import Distil, Freeze, Keep, Regularize, Sparsify, TrainingManager

pytest.importorskip("fastai", reason="compares with a Learner")
from fastai.callback.core import Callback  # noqa: E402
from fastai.callback.training import GradientClip  # noqa: E402
from fastai.optimizer import OptimWrapper  # noqa: E402

from sparsifai import (  # noqa: E402
    DistillCallback,
    FreezeCallback,
    KeepSparsity,
    RegularizeCallback,
    SparsifyCallback,
)

pytestmark = [
    pytest.mark.fastai,
    misses_sparsity,
    has_ties,
    pytest.mark.filterwarnings("ignore:(?s).*straight_through. no gradient reaches whole outputs"),
]

CALLBACKS = {
    Sparsify: SparsifyCallback, Keep: KeepSparsity, Regularize: RegularizeCallback, Freeze: FreezeCallback,
    Distil: DistillCallback,
}  # fmt: skip
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.01),
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.1),
}


def net():
    torch.manual_seed(0)
    return small_net()


def snapshot(model, masks):
    """Weights, and what is pruned of them: a mask that keeps everything is as none."""
    kept = {name: mask.clone() for name, mask in masks.items() if not mask.all()}
    return {name: each.detach().clone() for name, each in model.named_parameters()}, kept


def in_a_learner(model, parts, optimizer, clip, epochs):
    seen = []

    def note(self):
        if self.training:
            seen.append(snapshot(self.learn.model, self.learn.keep_sparsity.masks))

    learn = small_learner(model, opt_func=partial(OptimWrapper, opt=OPTIMIZERS[optimizer]))
    callbacks = [CALLBACKS[kind](*arguments, **options) for kind, arguments, options in parts]
    clips = [GradientClip(0.1)] if clip else []
    with learn.no_bar():
        learn.fit(epochs, 0.05, cbs=[*callbacks, *clips, Callback(after_batch=note)])
    return seen, learn


def in_a_loop(model, parts, optimizer, clip, epochs, learn):
    seen, batches = [], list(learn.dls.train)
    optimizer = OPTIMIZERS[optimizer](model.parameters(), lr=0.05)
    made = [kind(*arguments, **options) for kind, arguments, options in parts]
    manager = TrainingManager(model, optimizer, *made, epochs=epochs, steps_per_epoch=len(batches),
                              loss_func=lambda output, target: nn.functional.cross_entropy(output, target))  # fmt: skip
    model.train()
    for _ in range(epochs):
        for inputs, targets in batches:
            optimizer.zero_grad()
            output = model(inputs)
            manager.loss(nn.functional.cross_entropy(output, targets), output, inputs).backward()
            if clip:
                manager.before_step()
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            manager.step()
            seen.append(snapshot(model, manager.masks))
    return seen, manager


def sparsify(*arguments, **options):
    return (Sparsify, arguments, options)


GIVEN = [(torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 3)]

CASES = {
    "wanda": ([sparsify(0.5, "weight", "per_output", "wanda", "lin", calibration=GIVEN)], "SGD", False),
    "snip": ([sparsify(0.5, criteria="snip", schedule="one_shot", calibration=GIVEN)], "SGD", False),
    "compensate": (
        [sparsify(0.5, "weight", "local", "sparsegpt", "lin", calibration=GIVEN, layers=["10", "12"], every=4)],
        "SGD", False,
    ),
    "defaults": ([sparsify(0.8)], "SGD", False),
    "filters, cos, AdamW": ([sparsify(0.5, "filter", "global", schedule="cos")], "AdamW", True),
    "kernels, movement": ([sparsify(0.5, "kernel", "local", "movement", "one_cycle")], "SGD", False),
    "2:4": ([sparsify(0.5, context="2:4", schedule="lin")], "AdamW", False),
    "erk, gradients": ([sparsify(0.6, context="erk", criteria="movement_pruning", schedule="lin")], "SGD", True),
    "by layer": ([sparsify({"0": 0.5, "10": 0.75}, context="local", schedule="agp")], "SGD", False),
    "falling": ([sparsify(0.6, schedule="dsd")], "SGD", False),
    "at once": ([sparsify(0.6, schedule="one_shot")], "AdamW", False),
    "random": ([sparsify(0.6, criteria="random", initial_sparsity=0.2, schedule="lin", seed=3)], "SGD", False),
    "every 3": ([sparsify(0.6, schedule="lin", every=3)], "SGD", False),
    "RigL": ([sparsify(0.6, regrow="grad", every=2, initial_sparsity=0.4)], "SGD", True),
    "SET": ([sparsify(0.6, "kernel", "local", regrow="random", every=2, schedule="one_shot")], "AdamW", False),
    "straight-through": ([sparsify(0.6, straight_through=True, decay=0.01)], "SGD", True),
    "straight-through, filters": (
        [sparsify(0.5, "filter", "local", straight_through=True, gradient_sparsity=0.3, settle=0.6)], "AdamW", False,
    ),
    "a penalty": ([(Regularize, (0.02,), {"granularity": "filter"}), sparsify(0.5)], "SGD", False),
    "proximal": ([(Regularize, (0.05,), {"granularity": "filter", "proximal": True}), sparsify(0.5)], "SGD", False),
    "several": (
        [
            sparsify(0.5, "filter", "local", layers="0", schedule="cos"),
            sparsify(0.6, layers="3", regrow="grad", every=2, initial_sparsity=0.3),
            sparsify(0.7, layers=["10", "12"], straight_through=True),
        ],
        "SGD", True,
    ),
    "a teacher and a penalty": (
        [
            (Distil, (net(),), {"weight": 0.7, "features": ["0"], "schedule": "lin"}), (Regularize, (0.01,), {}),
            sparsify(0.5),
        ],
        "AdamW", False,
    ),
    "frozen": ([sparsify(0.7), (Freeze, (["0", "3"],), {"end": 0.5})], "SGD", False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_step_is_that_of_a_learner(case):
    parts, optimizer, clip = CASES[case]
    expected, learn = in_a_learner(net(), parts, optimizer, clip, 3)
    seen, manager = in_a_loop(net(), parts, optimizer, clip, 3, learn)
    assert len(seen) == len(expected) == 12
    for step, ((weights, masks), (its_weights, its_masks)) in enumerate(zip(seen, expected, strict=True)):
        assert masks.keys() == its_masks.keys(), step
        assert all(torch.equal(masks[name], its_masks[name]) for name in masks), step
        assert all(torch.equal(weights[name], its_weights[name]) for name in weights), step
    assert manager.is_done
    assert manager.sparsity > 0.2 or case == "falling"


@pytest.mark.parametrize("kind", [Keep, Sparsify])
def test_zeros_of_a_sparse_model_are_kept(kind):
    def sparse():
        model = net()
        with torch.no_grad():
            model[10].weight[:, :4] = 0
            model[0].weight[2] = 0
            model[0].bias[2] = 0
        return model

    parts = [(kind, (), {})] if kind is Keep else [sparsify(0.6, schedule="lin")]
    expected, learn = in_a_learner(sparse(), parts, "AdamW", False, 2)
    seen, _ = in_a_loop(sparse(), parts, "AdamW", False, 2, learn)
    for (weights, _), (its_weights, _) in zip(seen, expected, strict=True):
        assert all(torch.equal(weights[name], its_weights[name]) for name in weights)
        assert not weights["10.weight"][:, :4].any()
        assert not weights["0.bias"][2]
