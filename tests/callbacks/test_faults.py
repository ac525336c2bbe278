"""Fits that are interrupted in a mask update: what is masked is zero, is kept, and the next fit goes on from there."""

import random

import pytest

pytest.importorskip("fastai", reason="fastai callbacks need fastai")

from conftest import levels_of, misses_sparsity  # noqa: E402
from fastai.optimizer import Adam  # noqa: E402
from faults import Fault, unzeroed  # noqa: E402

from sparsifai import KeepSparsity, SparsifyCallback  # noqa: E402

pytestmark = [
    pytest.mark.fastai,
    misses_sparsity,
    pytest.mark.filterwarnings("ignore:(?s).*straight_through. no gradient reaches whole outputs"),
]


class Interrupted(SparsifyCallback):
    """Raises an error at a line of one mask update, in the third batch of the first epoch."""

    fault = None

    def _at(self, event):
        if self.fault is not None and (self.epoch, self.iter) == (0, 2):
            fault, self.fault = self.fault, None
            fault(event)
        else:
            event()

    def before_step(self):
        self._at(super().before_step) if self.pruning.regrows else super().before_step()

    def after_step(self):
        super().after_step() if self.pruning.regrows else self._at(super().after_step)


CASES = {
    "weights": {},
    "filters": {"granularity": "filter", "context": "local"},
    "2:4": {"context": "2:4"},
    "gradients": {"criteria": "snip"},
    "regrowth": {"regrow": "grad", "every": 1},
    "dense weights": {"straight_through": True},
    "dense weights of which some are trained": {"straight_through": True, "gradient_sparsity": 0.3},
    "dense weights of filters": {"straight_through": True, "granularity": "filter", "context": "local"},
}


def prepared(make_learner, case, number, at_learner):
    """A Learner, the callback, and its fault at a line. at_learner: whether it is a callback of the Learner."""
    callback = Interrupted(0.5, schedule="lin", **CASES[case])
    fault = callback.fault = Fault(number)
    learn = make_learner(opt_func=Adam, cbs=callback if at_learner else None)
    return learn, callback, fault


def check(make_learner, case, number, at_learner, sparsity):
    learn, callback, fault = prepared(make_learner, case, number, at_learner)
    given = None if at_learner else callback
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, 0.01, cbs=given)
    sparsifier, place = callback.sparsifier, fault.place
    assert unzeroed(sparsifier) == [], place
    # A callback of the Learner gets no more events, but it ends its fit when the next one begins.
    assert at_learner or "step" not in vars(learn.opt), place
    levels = set(levels_of(sparsifier).values())
    assert levels in ({0.25}, {0.375}), place
    assert callback.pruned.reached == pytest.approx(2 * levels.pop()), place
    kept = learn.keep_sparsity.masks
    assert all(not (kept[name] & ~mask).any() for name, mask in sparsifier.all_masks.items()), place
    learn.fit(1, 0.01, cbs=given)
    assert callback.sparsifier.sparsity == pytest.approx(sparsity, abs=0.12 if "filters" in case else 0.001), place
    assert unzeroed(callback.sparsifier) == []
    assert not callback.sparsifier.is_straight_through
    assert "step" not in vars(learn.opt), place
    learn.remove_cbs([callback, *learn._grab_cbs(KeepSparsity)] if at_learner else learn._grab_cbs(KeepSparsity))


@pytest.mark.parametrize("at_learner", [False, True], ids=["in the fit", "on the Learner"])
@pytest.mark.parametrize("case", CASES)
def test_a_fit_that_is_interrupted_in_an_update_keeps_what_it_has_pruned(make_learner, case, at_learner):
    learn, callback, fault = prepared(make_learner, case, None, at_learner)
    learn.fit(1, 0.01, cbs=None if at_learner else callback)
    first = {place: number for number, place in reversed([*enumerate(fault.places, 1)])}
    last = {place: number for number, place in enumerate(fault.places, 1)}
    numbers = sorted({*first.values(), *last.values()})
    assert len(numbers) > 200
    for number in random.Random(0).sample(numbers, 16):
        check(make_learner, case, number, at_learner, callback.sparsifier.sparsity)
