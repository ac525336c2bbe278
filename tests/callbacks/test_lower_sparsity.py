"""Fits that ask for a lower sparsity than is there already."""

import copy
import re

import pytest
import torch

fastai = pytest.importorskip("fastai.vision.all", reason="fastai callbacks need fastai")

from conftest import small_net  # noqa: E402

from sparsifai.all import KeepSparsity, Sparsifier, SparsifyCallback  # noqa: E402

MORE = "of the weights are pruned, more than the 50.00% asked for, because zeros of earlier fits stay"


# Of 8 filters 3.6 are to be pruned, and 4 are.
FILTERS = {"sparsity": 0.45, "granularity": "filter", "context": "local", "layers": ["0", "3", "5"]}


def test_a_checkpoint_that_is_sparser_than_asked_for_stays_so_and_is_told(make_learner):
    model = small_net()
    Sparsifier(model).sparsify(0.8)
    learn = make_learner(model)
    with pytest.warns(UserWarning, match=MORE):
        learn.fit(1, cbs=SparsifyCallback(0.5))
    assert learn.keep_sparsity.report().selected.sparsity == pytest.approx(0.8, abs=0.005)


def test_zeros_that_a_keeper_of_the_user_keeps_are_told_too(make_learner):
    learn = make_learner()
    sparsifier = Sparsifier(learn.model)
    sparsifier.sparsify(0.8)
    with pytest.warns(UserWarning, match=MORE):
        learn.fit(1, cbs=[KeepSparsity(sparsifier), SparsifyCallback(0.5)])


def test_the_advice_lets_the_zeros_go(make_learner):
    learn = make_learner(steps=8, opt_func=fastai.Adam)
    learn.fit(1, 0.01, cbs=SparsifyCallback(0.8))
    learn.remove_cb(KeepSparsity)
    learn.fit(1, 0.01)
    callback = SparsifyCallback(0.5)
    learn.fit(2, 0.01, cbs=callback)
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize(("first", "second"), [
    ({"sparsity": 0.5}, {"sparsity": 0.5}),
    ({"sparsity": 0.5}, {"sparsity": 0.8}),
    ({"sparsity": 0.5, "granularity": "filter"}, {"sparsity": 0.5, "granularity": "filter"}),
    (FILTERS, FILTERS),
])  # fmt: skip
def test_a_sparsity_that_can_be_reached_is_not_warned_of(make_learner, first, second):
    learn = make_learner(steps=8)
    learn.fit(1, 0.01, cbs=SparsifyCallback(**first))
    learn.fit(1, 0.01, cbs=SparsifyCallback(**second))


def test_the_layers_of_each_pattern_are_compared_with_their_own_sparsity(make_learner):
    learn = make_learner()
    learn.fit(1, cbs=SparsifyCallback({"0": 0.8, "3": 0.3}))
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.warns(UserWarning, match=re.escape("more than the 60.00% asked for")):
        learn.fit(1, 0.0, cbs=SparsifyCallback({"0": 0.6, "3": 0.3}))
    assert torch.equal(learn.model.state_dict()["0.weight"] == 0, before["0.weight"] == 0)


def test_weights_that_regrow_reach_the_lower_sparsity(make_learner):
    learn = make_learner(steps=8, opt_func=fastai.Adam)
    learn.fit(1, 0.01, cbs=SparsifyCallback(0.8))
    callback = SparsifyCallback(0.5, regrow="random")
    learn.fit(2, 0.01, cbs=callback)
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("second", [{"context": "local"}, {"granularity": "filter", "context": "local"}])
def test_zeros_that_add_up_to_more_than_asked_for_are_told_at_the_end(make_learner, second):
    learn = make_learner(steps=8)
    learn.fit(1, 0.01, cbs=SparsifyCallback(0.5))
    with pytest.warns(UserWarning, match=MORE):
        learn.fit(1, 0.01, cbs=SparsifyCallback(0.5, **second))


def test_filters_are_not_said_to_come_back_by_training(make_learner):
    learn = make_learner(steps=8)
    learn.fit(1, 0.01, cbs=SparsifyCallback(0.8, "filter", "local"))
    with pytest.warns(UserWarning, match=MORE) as caught:
        learn.fit(1, 0.01, cbs=SparsifyCallback(0.5, "filter", "local"))
    assert "to let them go, load weights from before they were pruned" in str(caught[0].message)


def test_a_keeper_of_the_user_has_its_masks_again_after_the_fit(make_learner):
    learn = make_learner(steps=8)
    sparsifier = Sparsifier(learn.model)
    sparsifier.sparsify(0.3)
    keeper = KeepSparsity(sparsifier)
    learn.add_cb(keeper)
    learn.fit(1, 0.01, cbs=SparsifyCallback(0.5))
    learn.remove_cb(next(each for each in learn._grab_cbs(KeepSparsity) if each is not keeper))
    sparsifier.sparsify(0.9)
    learn.fit(1, 0.01)
    assert sparsifier.sparsity == pytest.approx(0.9, abs=0.005)


def test_a_fit_of_frozen_groups_asks_for_nothing(make_learner):
    learn = make_learner(splitter=lambda model: [list(each.parameters()) for each in (model[:5], model[5:])])
    learn.fit(1, cbs=SparsifyCallback(0.8))
    learn.freeze()
    learn.fit(1, cbs=SparsifyCallback(0.5))
    assert learn.keep_sparsity.report().selected.sparsity == pytest.approx(0.8, abs=0.005)
