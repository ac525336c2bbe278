"""Damaged states of SparsifyCallback: an early error, or a ValueError of the fit in which nothing has changed."""

import random

import pytest

pytest.importorskip("fastai", reason="the callbacks are fastai's")
pytestmark = pytest.mark.fastai

import torch  # noqa: E402
from conftest import small_learner  # noqa: E402
from mutations import mutated  # noqa: E402
from soundness import assert_sound  # noqa: E402
from torch import nn  # noqa: E402

from sparsifai import KeepSparsity, SparsifyCallback  # noqa: E402

KINDS = {
    "dense weights": {"straight_through": True, "gradient_sparsity": 0.3},
    "settled": {"straight_through": True, "settle": 0.25},
}

# How the messages begin by which a state is refused before the fit.
EARLY = (
    "load_state_dict: give what SparsifyCallback.state_dict() returned",
    "load_state_dict: reached must be a number from 0 to 1, not ",
)


def learner():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 3))
    return small_learner(model, steps=2)


def made(kind):
    return SparsifyCallback(0.6, schedule="lin", **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:(?s)Sparse CSR", "ignore:(?s).*more than the 60.00% asked for")
def test_a_damaged_state_is_refused_early_or_by_the_fit_and_nothing_changes(kind):
    first, callback, states = learner(), made(kind), []
    callback.after_epoch = lambda: states.append(callback.state_dict())
    with first.no_bar():
        first.fit(2, 0.1, cbs=callback)
    state, chance, counts = states[0], random.Random(kind), {"early": 0, "late": 0, "used": 0}
    learn = learner()
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    for _ in range(60):
        damaged, place, what = mutated(state, chance)
        callback = made(kind)
        if message := refusal(lambda given=(callback, damaged): given[0].load_state_dict(given[1])):
            assert message.startswith(EARLY), (place, what)
            counts["early"] += 1
            continue
        if what == "another tensor" and "inf" in str(at(damaged, place)):
            continue  # weights of inf are loaded, and training diverges
        if fails(learn, callback):
            counts["late"] += 1
            assert fails(learn, callback)  # it does not go on without the state that it was given
            assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())
            assert callback.sparsifier is None
            assert not learn._grab_cbs(KeepSparsity)
            assert "step" not in vars(learn.opt)
            callback.load_state_dict(state)
            assert not fails(learn, callback), (place, what)
        counts["used"] += 1
        assert_sound(learn, callback, level=None if "masks" in place else 0.6, exact="masks" not in place)
        learn = learner()
    assert min(counts.values()) > 4, counts


def at(state, place):
    for key in place:
        state = state[key]
    return state


def fails(learn, callback):
    """Whether a fit is refused because of the state that the callback was given."""
    with learn.no_bar(), learn.no_logging():
        message = refusal(lambda: learn.fit(2, 0.1, start_epoch=1, cbs=callback))
    assert not message or "load_state_dict: " in message
    return bool(message)


def refusal(function):
    """The message of the ValueError that a function raises; empty if it raises none."""
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""
