"""`learn.sparsify()` and `learn.sparsity_report()`: what they train, return and refuse."""

import inspect

import pytest
import torch
from conftest import small_learner, small_net
from fastai.vision.all import Callback, L, Learner, params

from sparsifai import KeepSparsity, Sparsifier, SparsifyCallback


def quiet(learn, *arguments, **options):
    with learn.no_bar(), learn.no_logging():
        return learn.sparsify(*arguments, **options)


def state(learn):
    return [each.detach().clone() for each in learn.model.parameters()]


def test_it_does_what_fit_one_cycle_does_with_the_callback():
    axes = {"granularity": "filter", "context": "local", "criteria": "random", "schedule": "lin", "layers": "0"}
    fit = {"pct_start": 0.5, "div": 5.0, "div_final": 10.0, "wd": 0.1, "moms": (0.9, 0.8, 0.9), "start_epoch": 1}
    one, other = small_learner(), small_learner()
    other.model.load_state_dict(one.model.state_dict())
    expected = SparsifyCallback(0.5, **axes)
    with one.no_bar(), one.no_logging():
        torch.manual_seed(2)
        one.fit_one_cycle(3, 0.02, cbs=expected, **fit)
    torch.manual_seed(2)
    callback = quiet(other, 0.5, 3, 0.02, **fit, **axes)
    assert all(map(torch.equal, state(one), state(other)))
    assert callback.sparsifier.report().selected.zeros == expected.sparsifier.report().selected.zeros > 0
    assert callback.sparsifier.model is other.model


def test_other_callbacks_of_the_fit_are_passed_on_and_the_callback_has_a_name_of_its_own():
    learn, seen = small_learner(), []
    note = Callback(after_batch=lambda self: seen.append(self.learn.sparsify_callback))
    callback = quiet(learn, 0.5, 1, cbs=note)
    assert {*seen} == {callback}
    before = len(seen)
    assert not hasattr(learn, "sparsify_callback")
    assert callable(learn.sparsify)  # again: no callback has hidden it
    quiet(learn, 0.5, 1, cbs=L(note))
    assert len(seen) == 2 * before > 0
    assert quiet(learn, {"0": 0.75}, 1, cbs=[note]).sparsifier.sparsity > 0.5
    assert learn.keep_sparsity.masks


def test_its_help_lists_the_arguments_of_both():
    names = [*inspect.signature(Learner.sparsify).parameters]
    fit = [*inspect.signature(Learner.fit_one_cycle).parameters][1:]
    pruning = [*inspect.signature(SparsifyCallback).parameters]
    assert names[:4] == ["self", "sparsity", "n_epoch", "lr_max"]
    assert {*names} == {"self", *fit, *pruning}
    assert inspect.getdoc(Learner.sparsify).startswith("Train by `fit_one_cycle`")


def grouped_learner():
    return small_learner(splitter=lambda model: L(model[:3], model[3:]).map(params))


def test_frozen_layers_are_refused_and_nothing_changes():
    learn = grouped_learner()
    learn.freeze()
    before, optimizer = state(learn), learn.opt
    with pytest.raises(ValueError, match=r"learn\.unfreeze\(\) first; or learn\.fine_tune\(epochs, cbs=Sparsify"):
        learn.sparsify(0.5, 1)
    assert all(map(torch.equal, before, state(learn)))
    assert learn.opt is optimizer
    learn.unfreeze()
    assert quiet(learn, 0.5, 1).sparsifier.report().selected.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0.5, 0), {}, ValueError, "^learn.sparsify: n_epoch must be a whole number of at least 1, not 0"),
        ((5, 0.5), {}, ValueError, "^learn.sparsify: n_epoch must be a whole number of at least 1, not 0.5"),
        ((0.5, 1, "filter"), {}, TypeError, "^learn.sparsify: lr_max is .* not 'filter'; .* by name: granularity="),
        ((50, 5), {}, ValueError, "pass 0.5 for 50 %"),
        ((0.5, 5), {"context": "globl"}, ValueError, "did you mean 'global'"),
    ],
)
def test_wrong_arguments_change_nothing(arguments, options, error, message):
    learn = small_learner()
    before = state(learn)
    with pytest.raises(error, match=message):
        learn.sparsify(*arguments, **options)
    assert learn.opt is None
    assert all(map(torch.equal, before, state(learn)))
    assert not learn._grab_cbs(SparsifyCallback)


# --- learn.sparsity_report --------------------------------------------------------------------------------------------


def test_the_report_of_a_model_that_nothing_prunes_counts_all_weights():
    learn = small_learner()
    with torch.no_grad():
        learn.model[0].weight[:4] = 0
    before = state(learn)
    report = learn.sparsity_report()
    assert (report.selected.zeros, [row.why_dense for row in report.rows]) == (72, [""] * len(report.rows))
    assert all(map(torch.equal, before, state(learn)))
    assert learn.opt is None


def test_after_a_fit_the_report_is_that_of_the_layers_that_are_kept_sparse():
    learn = small_learner()
    callback = quiet(learn, 0.5, 1, layers="0")
    report = learn.sparsity_report()
    assert report.selected == callback.sparsifier.report().selected
    assert [row.name for row in report.rows if not row.why_dense] == ["0.weight"]
    learn.remove_cb(KeepSparsity)
    assert not any(row.why_dense for row in learn.sparsity_report().rows)


def test_in_a_fit_the_report_is_that_of_the_sparsifiers():
    learn, notes = small_learner(), []
    both = [SparsifyCallback(0.5, "filter", layers="0"), SparsifyCallback(0.75, layers="10")]
    note = Callback(after_train=lambda self: notes.append(self.learn.sparsity_report()))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=[both[0], note])
        learn.fit(1, cbs=[*both, note])
    selected = [[row.name for row in each.rows if not row.why_dense] for each in notes]
    assert selected == [["0.weight"], ["0.weight", "10.weight"]]
    assert notes[0].rows[-1].why_dense == both[0].sparsifier.report().rows[-1].why_dense != "not kept sparse"


def test_a_callback_whose_zeros_were_given_up_no_longer_reports():
    callback = SparsifyCallback(0.5, layers="0")
    learn = small_learner(cbs=callback)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert learn.sparsity_report().selected == callback.sparsifier.report().selected
    learn.remove_cb(KeepSparsity)
    assert learn.sparsity_report().selected != callback.sparsifier.report().selected


def test_masks_of_another_model_do_not_count():
    learn = small_learner(cbs=KeepSparsity(Sparsifier(small_net(), layers="0")))
    assert not any(row.why_dense for row in learn.sparsity_report().rows)
