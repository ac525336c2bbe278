"""Fits that are interrupted at some line: what they put on a model or a Learner for a while is gone."""

import pytest
import torch
from conftest import changed_in_process, small_learner
from faults import unzeroed
from interrupts import LIBRARY, interrupted, places
from torch import nn

pytestmark = [pytest.mark.fastai, pytest.mark.filterwarnings("ignore")]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def learner():
    pytest.importorskip("fastai", reason="fastai callbacks need fastai")
    return small_learner(net(), steps=1)


def fitting(make):
    def prepare():
        learn, teacher = learner(), net()
        return learn, [learn.model, teacher], lambda: learn.fit(1, 0.1, cbs=make(teacher))

    return prepare


def sparsifying(teacher):
    from sparsifai.all import SparsifyCallback

    return SparsifyCallback(0.5, "filter", criteria="wanda", context="local")


def changing(teacher):
    from sparsifai.all import SparsifyCallback

    return SparsifyCallback(0.5, schedule="lin", straight_through=True)


def distilling(teacher):
    from sparsifai.all import DistillCallback

    return DistillCallback(teacher, features=["0", "5"], feature_weight=1.0)


def freezing(teacher):
    from sparsifai.all import FreezeCallback

    return FreezeCallback("0")


def quantizing(teacher):
    from sparsifai.all import QuantizeCallback

    return QuantizeCallback(0)


def tickets():
    from sparsifai.all import lottery_ticket

    learn = learner()
    return learn, [learn.model], lambda: lottery_ticket(learn, 0.5, rounds=1, fit=1, controls=("shuffled",))


def sensitivities():
    from sparsifai.all import sensitivity

    learn = learner()
    return learn, [learn.model], lambda: sensitivity(learn, levels=(0.5,))


def put_for_a_while(learn, models):
    modules = [module for model in models for module in model.modules()]
    others = [each for each in learn.cbs if type(each).__name__ != "KeepSparsity"]  # it stays, to keep the zeros
    return {
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
        "hidden parameters": [sorted(vars(module).keys() & module._parameters.keys()) for module in modules],
        "modes": [module.training for module in models[-1].modules()] if len(models) > 1 else [],
        "frozen": [each.requires_grad for model in models for each in model.parameters()],
        "callbacks": [(type(each).__name__, each.run) for each in others],
        "metrics": list(learn.metrics),
        "lock": learn.lock.locked(),
        "step": learn.opt is not None and "step" in vars(learn.opt),
    }


@pytest.mark.parametrize(
    "prepare",
    [
        *map(fitting, (sparsifying, changing, distilling, freezing, quantizing)),
        tickets,
        sensitivities,
    ],
    ids=[
        *("SparsifyCallback", "straight_through", "DistillCallback", "FreezeCallback", "QuantizeCallback"),
        "lottery_ticket",
        "sensitivity",
    ],
)
def test_an_interrupt_at_any_line_of_the_library_leaves_nothing_behind(prepare):
    lines = interrupted(prepare()[2]).lines
    left = {}
    for at in places(lines, 40):
        learn, models, function = prepare()
        before = put_for_a_while(learn, models)
        tracer = interrupted(function, at, LIBRARY)
        now = put_for_a_while(learn, models)
        changed = [part for part in before if now[part] != before[part]] + changed_in_process()
        if changed:
            left[tracer.where] = changed
    # Between fastai's setting `learn` to None and our first line that can undo anything, a callback can stay.
    assert {where: changed for where, changed in left.items() if not where.startswith("base.py")} == {}


@pytest.mark.parametrize("options", [{}, {"gradient_sparsity": 0.3}, {"granularity": "filter", "context": "local"}])
def test_an_interrupted_straight_through_fit_leaves_a_sparse_model_and_the_next_one_ends_at_its_target(options):
    from sparsifai.all import SparsifyCallback

    def prepare():
        callback = SparsifyCallback(0.5, schedule="lin", initial_sparsity=0.2, straight_through=True, **options)
        learn = small_learner(net(), steps=3)
        return learn, callback, lambda: learn.fit(1, 0.1, cbs=callback)

    for _ in range(2):  # what the first call of all keeps for later ones is not done again
        _, whole, function = prepare()
        lines = interrupted(function).lines
    begun = 0
    for at in places(lines, 20):
        learn, callback, function = prepare()
        where = interrupted(function, at, LIBRARY).where
        assert where is not None
        assert learn.opt is None or "step" not in vars(learn.opt), where
        if callback.sparsifier is not None:
            begun += not all(mask.all() for mask in callback.sparsifier.masks.values())
            assert unzeroed(callback.sparsifier) == [], where
        learn.remove_cb(callback)  # see above
        learn.fit(1, 0.1, cbs=callback)
        assert callback.sparsifier.sparsity == whole.sparsifier.sparsity, where
        assert unzeroed(callback.sparsifier) == [], where
        assert not callback.sparsifier.is_straight_through, where
    assert begun > 2
