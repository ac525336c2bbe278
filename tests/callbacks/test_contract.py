"""The contract of the callbacks as tables: what is called or what happens, and what must hold after it."""

import copy
import pickle
import pickletools
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

fastai = pytest.importorskip("fastai.vision.all", reason="the callbacks are fastai's")
pytestmark = [
    pytest.mark.fastai,
    pytest.mark.filterwarnings("ignore:(?s).*straight_through. no gradient reaches whole outputs"),
]

import forked  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import new_process  # noqa: E402
from conftest import CRITERIA, masked_of, picture, picture_learner, small_net  # noqa: E402
from fastai.callback import core  # noqa: E402
from fastai.callback.fp16 import MixedPrecision  # noqa: E402
from fastai.callback.training import GradientAccumulation, GradientClip  # noqa: E402
from fastai.learner import Callback  # noqa: E402
from soundness import assert_sound, counted, share  # noqa: E402
from watch import EVENTS, At, raises  # noqa: E402

from sparsifai.all import KeepSparsity, Sparsifier, SparsifyCallback, schedules  # noqa: E402
from sparsifai.sparsifier import masking  # noqa: E402


def known(order=99, **events):
    """A callback that counts as fastai's own: beside others masks are applied more often, which hides breaches."""
    return type("Known", (Callback,), {**events, "order": order, "__module__": "fastai.known"})()


# How masks change: they only grow, or change their mind.
CHANGES = {"growing": {}, "straight-through": {"straight_through": True}}
changing = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def at_moments(*moments, changing_at):
    """Masks that only grow, at each of these moments; and those that change their mind, at one moment."""
    cases = [*((moment, "growing") for moment in moments), (changing_at, "straight-through")]
    return pytest.mark.parametrize(
        ("moment", "change"), [(moment, CHANGES[change]) for moment, change in cases], ids=map(", ".join, cases)
    )


def two_groups(model):
    return fastai.L(list(model[:6].parameters()), list(model[6:].parameters()))


# --- What asks a Learner something, and must change nothing --------------------------------------------------------

# Each gives what must be the same as of a Learner without the callback: the number or form of what it returns.
QUESTIONS = {
    "lr_find": lambda learn: len(learn.lr_find(num_it=6, show_plot=False)),
    "validate": lambda learn: len(learn.validate()),
    "get_preds": lambda learn: len(learn.get_preds()),
    "predict": lambda learn: len(learn.predict(picture(0))),
    "show_results": lambda learn: learn.show_results(max_n=2),
    "interpretation": lambda learn: fastai.ClassificationInterpretation.from_learner(learn).confusion_matrix().shape,
    "summary": lambda learn: learn.summary().split("Optimizer")[0],
    "tta": lambda learn: len(learn.tta(n=1)),
}
INTERRUPTED = "after an interrupted fit"
MOMENTS = {
    "before any fit": lambda learn, callbacks: None,
    "between two fits": lambda learn, callbacks: learn.fit(2, cbs=callbacks),
    INTERRUPTED: lambda learn, callbacks: pytest.raises(
        KeyboardInterrupt, learn.fit, 3, cbs=[At("after_step", raises(KeyboardInterrupt)), *callbacks]
    ),
    "after an interrupted validation": lambda learn, callbacks: pytest.raises(
        KeyboardInterrupt, learn.fit, 3, cbs=[At("before_validate", raises(KeyboardInterrupt)), *callbacks]
    ),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # fastai's, in show_results
@pytest.mark.parametrize("given", ["to the fit", "to the Learner"])
@at_moments(*MOMENTS, changing_at=INTERRUPTED)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_prints_nothing_and_changes_nothing(question, moment, given, capsys, tmp_path, change):
    callback = SparsifyCallback(0.6, schedule="lin", **change)
    learn = picture_learner([callback] if given == "to the Learner" else None, path=tmp_path)
    plain = picture_learner(path=tmp_path)
    with learn.no_bar(), plain.no_bar():
        MOMENTS[moment](learn, [callback] if given == "to the fit" else [])
        before = copy.deepcopy(learn.model.state_dict())
        level = callback.sparsifier and callback.sparsifier.level
        expected = QUESTIONS[question](plain)
        capsys.readouterr()
        assert QUESTIONS[question](learn) == expected
        assert "parsi" not in capsys.readouterr().out
        after = learn.model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert (callback.sparsifier and callback.sparsifier.level) == level
        plt.close("all")
        learn.fit(1, cbs=[] if given == "to the Learner" else [callback])  # and training can go on
        assert counted(learn.model) == share(0.6, learn.model)
        assert_sound(learn, callback)


# --- Ways to fit ---------------------------------------------------------------------------------------------------

FITS = {
    "fit": lambda learn, callbacks: learn.fit(3, cbs=callbacks),
    "fit then fit": lambda learn, callbacks: (learn.fit(2, cbs=callbacks), learn.fit(2, 0.1)),
    "fit_one_cycle": lambda learn, callbacks: learn.fit_one_cycle(3, 0.1, cbs=callbacks),
    "fit_flat_cos": lambda learn, callbacks: learn.fit_flat_cos(3, 0.1, cbs=callbacks),
    "fit_sgdr": lambda learn, callbacks: learn.fit_sgdr(2, 1, 0.1, cbs=callbacks),
    "fine_tune": lambda learn, callbacks: learn.fine_tune(2, 0.1, cbs=callbacks),
    "freeze, fit, unfreeze, fit": lambda learn, callbacks: (
        learn.freeze(), learn.fit(1, cbs=callbacks), learn.unfreeze(), learn.fit(2, cbs=callbacks),
    ),
    "sparse, then frozen": lambda learn, callbacks: (
        learn.fit(2, cbs=callbacks), learn.freeze(), learn.fit(1, 0.1, cbs=callbacks), learn.unfreeze(), learn.fit(1),
    ),
    "reset_opt": lambda learn, callbacks: (learn.fit(2, cbs=callbacks), learn.fit(2, 0.1, reset_opt=True)),
    "start_epoch": lambda learn, callbacks: learn.fit(4, start_epoch=2, cbs=callbacks),
    "lr_find between": lambda learn, callbacks: (
        learn.fit(2, cbs=callbacks), learn.lr_find(num_it=6, show_plot=False), learn.fit(2, 0.1),
    ),
    "accumulation": lambda learn, callbacks: learn.fit(3, cbs=[*callbacks, GradientAccumulation(4)]),
    "clipping": lambda learn, callbacks: learn.fit(3, cbs=[*callbacks, GradientClip(0.1)]),
    "mixup": lambda learn, callbacks: learn.fit(3, cbs=[*callbacks, fastai.MixUp()]),
    "no_bar, no_logging": lambda learn, callbacks: _silent(learn, callbacks),
    "channels_last": lambda learn, callbacks: (
        learn.model.to(memory_format=torch.channels_last), learn.fit(3, cbs=callbacks),
    ),
}  # fmt: skip


def _silent(learn, callbacks):
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, cbs=callbacks)


@changing
@pytest.mark.parametrize("given", ["to the fit", "to the Learner"])
@pytest.mark.parametrize("way", FITS)
def test_every_way_to_fit_ends_at_the_target_and_keeps_it(make_learner, way, given, tmp_path, change):
    callback = SparsifyCallback(0.8, schedule="lin", **change)
    learn = make_learner(
        opt_func=fastai.Adam, splitter=two_groups, path=tmp_path, cbs=callback if given == "to the Learner" else None
    )
    learn.loss_func = fastai.CrossEntropyLossFlat()
    FITS[way](learn, [callback] if given == "to the fit" else [])
    assert_sound(learn, callback, level=0.8)
    learn.remove_cbs([callback] if given == "to the Learner" else [])
    learn.fit(1, 0.1)
    assert_sound(learn, level=0.8)
    learn.remove_cb(KeepSparsity)
    learn.fit(1, 0.1)
    assert counted(learn.model) < share(0.8, learn.model)


# --- Optimizers: zeros hold by construction ------------------------------------------------------------------------

TORCH = [
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}), (torch.optim.Adam, {"amsgrad": True}),
    *((kind, {}) for kind in (torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta)),
    *((kind, {}) for kind in (torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.ASGD)),
]  # fmt: skip
OPTIMIZERS = {
    "SGD": partial(fastai.SGD, mom=0.9),
    **{each.__name__: each for each in (fastai.Adam, fastai.RMSProp, fastai.RAdam, fastai.Lamb, fastai.Larc)},
    "QHAdam": fastai.QHAdam,
    "ranger": fastai.ranger,
    **{f"torch {kind.__name__}": partial(fastai.OptimWrapper, opt=kind, **options) for kind, options in TORCH},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_moves_a_masked_weight_even_if_nothing_is_zeroed_after_its_step(
    make_learner, optimizer, monkeypatch
):
    learn, callback, seen = make_learner(opt_func=OPTIMIZERS[optimizer]), SparsifyCallback(0.8, schedule="lin"), []
    learn.fit(2, 0.1, wd=0.1, cbs=SparsifyCallback(0.3, schedule="one_shot"))
    learn.fit(2, 0.1, wd=0.1, cbs=callback)
    monkeypatch.setattr(KeepSparsity, "after_step", lambda self: None)
    learn.fit(4, 0.1, wd=0.1, cbs=Callback(after_step=lambda self: seen.append(counted(self.model))))
    assert seen == [share(0.8, learn.model)] * 16
    assert_sound(learn, callback, level=0.8)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_weights_that_are_pruned_in_a_step_do_not_move_in_the_next(make_learner, granularity, memory, monkeypatch):
    monkeypatch.setattr(KeepSparsity, "after_step", lambda self: None)
    monkeypatch.setattr(KeepSparsity, "after_train", lambda self: None)
    learn, callback = make_learner(opt_func=fastai.Adam), SparsifyCallback(0.5, granularity, schedule="lin")
    learn.model.to(memory_format=memory)

    def look(self):
        for parameter, mask in masked_of(callback.sparsifier):
            assert (parameter[~mask.expand_as(parameter)] == 0).all()
            seen.append((~mask).sum())

    seen = []
    before_the_masks = known(10.1, after_step=look)
    learn.fit(3, 0.1, wd=0.1, cbs=[callback, before_the_masks])
    assert max(seen) > 0


def test_moments_of_weights_that_were_zeroed_between_fits_are_zeroed_too(make_learner, monkeypatch):
    learn, seen = make_learner(opt_func=fastai.Adam), []
    learn.fit(2, 0.1)
    Sparsifier(learn.model).sparsify(0.8)
    monkeypatch.setattr(KeepSparsity, "after_step", lambda self: None)
    look = known(after_step=lambda self: seen.append(counted(self.model)))
    learn.fit(2, 0.1, cbs=[KeepSparsity(), look])
    assert seen == [share(0.8, learn.model)] * 8


@changing
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_interrupt_inside_the_step_of_an_optimizer_keeps_every_zero(make_learner, optimizer, change):
    callback = SparsifyCallback(0.8, schedule="lin", **change)
    learn = make_learner(opt_func=OPTIMIZERS[optimizer], cbs=callback)
    step, found = [], []

    def interrupted(*arguments, **options):
        step[0](*arguments, **options)
        found.append(counted(learn.model))
        raise KeyboardInterrupt

    def patch():
        step.append(learn.opt.step)
        learn.opt.step = interrupted

    # The step is done, and nothing comes after it: no event, no end of the fit.
    with pytest.raises(KeyboardInterrupt):
        learn.fit(4, 0.1, wd=0.1, cbs=At("before_step", patch, epoch=2, batch=1))
    del learn.opt.step
    assert found == [share(0.8 * 9 / 16, learn.model)]
    assert_sound(learn, callback)
    learn.fit(2, 0.1)
    assert_sound(learn, callback, level=0.8)


# --- Whatever ends a fit -------------------------------------------------------------------------------------------

CANCELS = {
    "CancelBatch": ["before_batch", "after_pred", "after_loss", "before_step"],
    "CancelBackward": ["before_backward"],
    "CancelStep": ["before_step"],
    "CancelTrain": ["before_batch", "after_loss", "before_step", "after_step"],
    "CancelValid": ["before_validate"],
    "CancelEpoch": ["before_batch", "after_pred", "before_step", "after_step", "after_train"],
    "CancelFit": ["before_batch", "after_pred", "before_step", "after_step", "after_batch", "after_epoch"],
}


@changing
@pytest.mark.parametrize("order", [-5, 10.4, 99])  # before both callbacks, between them, after both
@pytest.mark.parametrize(("cancel", "event"), [(cancel, event) for cancel in CANCELS for event in CANCELS[cancel]])
def test_every_cancel_exception_in_every_place_leaves_masks_and_zeros_consistent(
    make_learner, cancel, event, order, change
):
    error = getattr(core, f"{cancel}Exception")()
    callback = SparsifyCallback(0.8, schedule="lin", **change)
    learn = make_learner(opt_func=fastai.Adam)
    with learn.no_bar():  # which does not expect every one of them
        learn.fit(3, 0.1, cbs=[callback, At(event, raises(error), order)])
    assert_sound(learn, callback)
    if cancel in ("CancelBatch", "CancelBackward", "CancelStep", "CancelTrain", "CancelValid", "CancelEpoch"):
        assert counted(learn.model) == share(0.8, learn.model)  # the fit went on to its end
    else:
        assert 0 < counted(learn.model) < share(0.8, learn.model)
    zeros = counted(learn.model)
    learn.fit(1, 0.1)
    assert_sound(learn, callback)
    assert counted(learn.model) == zeros


@changing
@pytest.mark.parametrize("given", ["to the fit", "to the Learner"])
@pytest.mark.parametrize("order", [-5, 99])
@pytest.mark.parametrize("error", [KeyboardInterrupt("now"), ZeroDivisionError("now")])
@pytest.mark.parametrize("event", EVENTS)
def test_a_fault_in_any_event_of_a_fit_leaves_masks_and_zeros_consistent(
    make_learner, event, error, order, given, capsys, change
):
    callback = SparsifyCallback(0.8, schedule="lin", **change)
    learn = make_learner(opt_func=fastai.Adam, cbs=callback if given == "to the Learner" else None)
    fault = At(event, raises(error), order)
    with pytest.raises(type(error)):
        learn.fit(3, 0.1, cbs=[fault] if given == "to the Learner" else [callback, fault])
    capsys.readouterr()
    before = counted(learn.model)
    assert (before > 0) == (event not in ("before_fit", "before_epoch", "before_train"))
    assert_sound(learn, callback)
    assert "parsi" not in capsys.readouterr().out
    learn.fit(1, 0.1)
    if given == "to the fit":
        assert counted(learn.model) == before
    assert_sound(learn, callback)
    learn.fit(1, 0.1, cbs=[] if given == "to the Learner" else [callback])
    assert_sound(learn, callback, level=0.8)


@changing
def test_a_step_that_a_gradient_scaler_skips_keeps_every_zero(make_learner, change):
    class OnCPU(MixedPrecision):
        def before_fit(self):
            self.autocast = torch.autocast("cpu", torch.bfloat16)
            self.learn.scaler, self.scales = torch.amp.GradScaler("cpu", init_scale=2.0**40), []

    skipped = []

    class Overflow(Callback):
        order = 9  # before the scaler looks

        def before_step(self):
            if self.iter % 2:
                next(self.model.parameters()).grad[0, 0, 0, 0] = float("inf")

    callback = SparsifyCallback(0.8, schedule="lin", **change)
    learn = make_learner(opt_func=fastai.Adam, cbs=OnCPU())
    learn.fit(3, 0.1, cbs=[callback, Overflow(), Callback(after_cancel_step=lambda self: skipped.append(self.iter))])
    assert set(skipped) == {1, 3}
    assert_sound(learn, callback, level=0.8)


# --- What is saved and taken up again ------------------------------------------------------------------------------


def in_new_process(task, folder):
    done = forked.run(new_process.__file__, task, folder, folder=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_training_is_resumed_in_a_new_process_bit_for_bit_with_every_criterion(tmp_path):
    ends = {}
    for criterion in CRITERIA:
        model, sparsifier, optimizer = new_process.plain(criterion)
        new_process.train(model, sparsifier, optimizer, range(new_process.STEPS))
        parts = {"model": model, "sparsifier": sparsifier, "optimizer": optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / f"{criterion}.half")
        new_process.train(model, sparsifier, optimizer, range(new_process.STEPS, 2 * new_process.STEPS))
        ends[criterion] = {"model": model.state_dict(), "masks": sparsifier.masks}
    in_new_process("go_on", tmp_path)
    for criterion, end in ends.items():
        resumed = torch.load(tmp_path / f"{criterion}.end")
        for part, values in end.items():
            assert resumed[part].keys() == values.keys()
            assert all(torch.equal(resumed[part][name], value) for name, value in values.items()), criterion


@pytest.mark.slow
def test_a_fit_is_resumed_in_a_new_process_from_learn_save_alone(make_learner, tmp_path):
    callback = SparsifyCallback(0.8, schedule="lin")
    learn = make_learner(path=tmp_path, opt_func=fastai.Adam)
    save = Callback(after_epoch=lambda self: self.learn.save("half") if self.epoch == 1 else None)
    learn.fit(4, 0.01, cbs=[callback, save])
    in_new_process("resume_fit", tmp_path)
    resumed = torch.load(tmp_path / "end")
    assert all(torch.equal(resumed["masks"][name], mask) for name, mask in callback.sparsifier.masks.items())
    assert all(torch.equal(resumed["model"][name], value) for name, value in learn.model.state_dict().items())


@pytest.mark.parametrize("schedule", schedules)
def test_a_fit_is_resumed_from_a_sparse_model_with_every_schedule(make_learner, schedule, tmp_path):
    learn, other = make_learner(path=tmp_path), make_learner(path=tmp_path)
    save = Callback(after_epoch=lambda self: self.learn.save("half") if self.epoch == 1 else None)
    learn.fit(4, cbs=[SparsifyCallback(0.8, schedule=schedule), save])
    other.load("half")
    other.fit(4, start_epoch=2, cbs=SparsifyCallback(0.8, schedule=schedule))
    ended = zip(learn.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in ended)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["to the fit", "to the Learner"])
def test_an_exported_learner_loads_where_sparsifai_is_not_installed(given, tmp_path):
    callback = SparsifyCallback(0.6, criteria=lambda weight: weight.abs())
    learn = picture_learner([callback] if given == "to the Learner" else None, path=tmp_path)
    with learn.no_bar():
        learn.fit(1, cbs=[] if given == "to the Learner" else [callback])
        learn.export()
        torch.save(picture(0), tmp_path / "picture")
        prediction = learn.predict(picture(0))[2]
        in_new_process("load_exported", tmp_path)
        loaded = torch.load(tmp_path / "loaded")
        assert torch.equal(loaded["prediction"], prediction)
        assert all(torch.equal(loaded["model"][name], value) for name, value in learn.model.state_dict().items())
        learn.fit(1)  # the one that was exported goes on
    assert_sound(learn, callback, level=0.6)


def modules_named_in(path):
    """Modules whose classes and functions a file of torch.save asks for; it holds paths of source files, too."""
    with zipfile.ZipFile(path) as file:
        pickled = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    return {argument.split()[0] for code, argument, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}


@pytest.mark.parametrize("given", ["to the fit", "to the Learner"])
@at_moments(*MOMENTS, changing_at=INTERRUPTED)
def test_an_exported_learner_answers_and_can_be_made_to_keep_its_zeros(moment, given, tmp_path, change):
    callback = SparsifyCallback(0.6, schedule="lin", **change)
    learn = picture_learner([callback] if given == "to the Learner" else None, path=tmp_path)
    with learn.no_bar():
        MOMENTS[moment](learn, [callback] if given == "to the fit" else [])
        learn.export()
        with pytest.warns(UserWarning, match="insecure pickle"):
            loaded = fastai.load_learner(tmp_path / "export.pkl")
        assert "sparsifai" not in {name.split(".")[0] for name in modules_named_in(tmp_path / "export.pkl")}
        assert torch.equal(loaded.predict(picture(0))[2], learn.predict(picture(0))[2])
        zeros = counted(learn.model)
        loaded.dls = learn.dls
        with loaded.no_bar():
            loaded.fit(1, cbs=KeepSparsity())
        assert counted(loaded.model) == zeros
        learn.fit(1, cbs=[] if given == "to the Learner" else [callback])
    assert_sound(learn, callback, level=0.6)


@pytest.mark.parametrize("given", ["to the fit", "to the Learner"])
@at_moments("before any fit", "between two fits", changing_at="between two fits")
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copied_learner_goes_on_like_the_first(way, moment, given, tmp_path, change):
    callback = SparsifyCallback(0.6, schedule="lin", **change)
    learn = picture_learner([callback] if given == "to the Learner" else None, path=tmp_path)
    with learn.no_bar():
        MOMENTS[moment](learn, [callback] if given == "to the fit" else [])
        copied = copy.deepcopy(learn) if way == "deepcopy" else pickle.loads(pickle.dumps(learn))
        callbacks = [], []
        if given == "to the fit":
            callbacks = [callback], [copy.deepcopy(callback)]
        for each, given_to_fit in zip((learn, copied), callbacks, strict=True):
            torch.manual_seed(0)
            with each.no_bar():
                each.fit(1, cbs=given_to_fit)
                each.fit(1)
    for each in (learn, copied):
        assert_sound(each, level=0.6)


def test_learn_save_and_load_between_fits_keep_the_zeros(make_learner, tmp_path):
    learn = make_learner(path=tmp_path, opt_func=fastai.Adam)
    learn.fit(1)
    learn.save("dense")
    learn.fit(2, cbs=SparsifyCallback(0.8))
    learn.save("sparse")
    learn.load("sparse")
    learn.fit(1, 0.1)
    assert_sound(learn, level=0.8)
    learn.load("dense")
    with pytest.warns(UserWarning, match="pruned weights were changed or loaded"):
        learn.fit(1, 0.1)
    assert_sound(learn, level=0.8)


def test_validate_after_load_uses_the_loaded_weights(make_learner, tmp_path):
    learn = make_learner(path=tmp_path)
    learn.fit(1)
    learn.save("dense")
    dense = learn.validate()
    learn.fit(2, cbs=SparsifyCallback(0.8))
    learn.load("dense")
    assert learn.validate() == dense
    assert counted(learn.model) == 0
    with pytest.warns(UserWarning, match="pruned weights were changed or loaded"):
        learn.fit(1, 0.1)
    assert_sound(learn, level=0.8)


def test_a_copy_of_the_model_can_be_validated_but_is_refused_by_the_next_fit(make_learner):
    learn = make_learner()
    learn.fit(1, cbs=SparsifyCallback(0.8))
    learn.model = copy.deepcopy(learn.model)
    assert len(learn.validate()) == 1
    with pytest.raises(ValueError, match="another model"):
        learn.fit(1)


@pytest.mark.filterwarnings("ignore:(?s).*of the weights are pruned, more than")
@pytest.mark.parametrize("first", [[], [SparsifyCallback(0.3)], [KeepSparsity()]])
def test_zeros_that_are_made_between_fits_are_kept(make_learner, first):
    learn = make_learner(cbs=None if first else KeepSparsity())
    learn.fit(1, 0.1, cbs=first)
    learn.lr_find(num_it=6, show_plot=False)
    Sparsifier(learn.model).sparsify(0.6)
    if not learn._grab_cbs(KeepSparsity):
        learn.add_cb(KeepSparsity())
    learn.fit(2, 0.1)
    assert_sound(learn, level=0.6)
    callback = SparsifyCallback(0.8, schedule="lin")
    learn.fit(1, 0.1, cbs=callback)
    Sparsifier(learn.model).sparsify(0.9)
    learn.fit(1, 0.1, cbs=callback)  # the zeros that it has not made itself are kept, too
    assert counted(learn.model) == share(0.9, learn.model)


def test_a_keeper_that_is_removed_during_a_fit_keeps_nothing(make_learner, capsys):
    learn, callback = make_learner(), SparsifyCallback(0.8, schedule="lin")
    learn.fit(3, 0.1, cbs=[callback, At("after_batch", lambda: learn.remove_cb(KeepSparsity))])
    assert not learn._grab_cbs(KeepSparsity)
    assert "KeepSparsity" not in capsys.readouterr().out
    learn.fit(1, 0.1)
    assert counted(learn.model) < share(0.8, learn.model)


def test_dense_sparse_dense_begins_dense_again_after_an_interrupt(make_learner):
    learn, callback, seen = make_learner(), SparsifyCallback(0.6, schedule="dsd"), []
    with pytest.raises(KeyboardInterrupt):
        learn.fit(4, 0.1, cbs=[callback, At("after_batch", raises(KeyboardInterrupt), epoch=1, batch=3)])
    assert counted(learn.model) == share(0.6, learn.model)
    look = Callback(after_batch=lambda self: seen.append(callback.sparsifier.level))
    look.order = 99
    learn.fit(2, 0.1, cbs=[callback, look])
    assert seen[-1] == 0
    assert counted(learn.model) < 0.2  # but for what came back in the last steps
    assert max(seen) > 0.5
    assert seen[0] < 0.2


def test_a_fit_that_ends_before_its_schedule_says_so(make_learner, capsys):
    learn = make_learner()
    learn.fit(2, cbs=[SparsifyCallback(0.8, schedule="lin"), fastai.ShortEpochCallback(0.5)])
    assert "SparsifyCallback: the fit has ended before its schedule did" in capsys.readouterr().out
    make_learner().fit(2, cbs=SparsifyCallback(0.8, schedule="lin"))
    assert "ended before" not in capsys.readouterr().out


def test_a_new_callback_on_a_sparse_model_goes_on_from_its_zeros_and_says_so(make_learner, capsys):
    model = small_net()
    Sparsifier(model).sparsify(0.5)
    zeros = {name: parameter == 0 for name, parameter in model.named_parameters() if parameter.dim() > 1}
    learn = make_learner(model)
    learn.fit(2, 0.1, cbs=SparsifyCallback(0.8, criteria="small_final"))
    assert "SparsifyCallback keeps the 50.00% of zeros that the model has" in capsys.readouterr().out
    assert all((dict(model.named_parameters())[name][zero] == 0).all() for name, zero in zeros.items())
    assert_sound(learn, level=0.8)


def test_zeros_of_layers_that_are_not_pruned_are_kept_and_told_without_a_share(make_learner, capsys):
    model = small_net()
    with torch.no_grad():
        model[0].weight[:4] = 0
    make_learner(model).fit(1, 0.1, cbs=SparsifyCallback(0.5, exclude="0"))
    assert "SparsifyCallback keeps the zeros of layers that stay dense" in capsys.readouterr().out
    assert (model[0].weight[:4] == 0).all()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_keeper_that_is_given_to_the_fit_does_not_take_the_zeros_with_it(make_learner, order):
    callbacks = [KeepSparsity(), SparsifyCallback(0.8)]
    learn = make_learner()
    learn.fit(2, cbs=[callbacks[place] for place in order])
    learn.fit(1, 0.1)
    assert_sound(learn, callbacks[1], level=0.8)


def test_zeros_whose_keeper_was_removed_are_not_kept_by_the_next_fit(make_learner):
    callback = SparsifyCallback(0.8, schedule="lin")
    learn = make_learner(cbs=callback)
    learn.fit(1)
    learn.remove_cb(KeepSparsity)
    with torch.no_grad():
        for parameter in learn.model.parameters():
            parameter.add_(0.1)
    seen = []
    learn.fit(1, cbs=Callback(after_loss=lambda self: seen.append(counted(self.model)) if self.training else None))
    assert seen == [share(level, learn.model) for level in (0, 0.2, 0.4, 0.6)]
    assert_sound(learn, callback, level=0.8)


def test_a_weight_that_is_zero_by_chance_is_not_kept(make_learner, capsys):
    def few_zeros(count):
        model = nn.Sequential(nn.Flatten(), nn.Linear(128, 1000), nn.Linear(1000, 3))
        nn.init.uniform_(model[1].weight, 0.1, 1)
        with torch.no_grad():
            model[1].weight[:count, 0] = 0
        make_learner(model).fit(1, 0.1, cbs=[KeepSparsity(), SparsifyCallback(0.0)])
        return counted(model) * (128 + 3) * 1000

    assert few_zeros(1) == 0
    assert few_zeros(2) == 2


# --- No sparsity is no callback -------------------------------------------------------------------------------------


@changing
@pytest.mark.parametrize("granularity", ["weight", "filter"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sparsity_zero_is_bit_for_bit_training_without_the_callback(make_learner, optimizer, granularity, change):
    def trained(callbacks):
        torch.manual_seed(0)
        model = nn.Sequential(*small_net()[:-1], nn.Dropout(0.5), nn.Linear(6, 3))
        learn = make_learner(model, opt_func=OPTIMIZERS[optimizer])
        torch.manual_seed(2)
        learn.fit(3, 1e-2, wd=0.1, cbs=callbacks)
        return learn, [torch.get_rng_state(), np.random.get_state()[1]]

    plain, random = trained([])
    sparse, same_random = trained([SparsifyCallback(0.0, granularity, criteria="random", **change), KeepSparsity()])
    assert_same(plain.model.state_dict(), sparse.model.state_dict())
    assert_same(plain.opt.state_dict(), sparse.opt.state_dict())
    assert_same(random, same_random)
    assert not sparse._grab_cbs(KeepSparsity)


def test_sparsity_zero_does_not_keep_the_zeros_of_an_initialization(make_learner):
    def trained(callbacks):
        torch.manual_seed(0)
        model = small_net()
        nn.init.dirac_(model[3].weight)
        learn = make_learner(model)
        torch.manual_seed(2)
        learn.fit(2, 1e-2, cbs=callbacks)
        return learn.model

    plain = trained([])
    for sparsity in (0.0, {"*": 0.0}):
        assert_same(plain.state_dict(), trained([SparsifyCallback(sparsity)]).state_dict())


def assert_same(one, two):
    """Trees of the same values, bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple, fastai.L)):
        assert len(one) == len(two)
        for each, other in zip(one, two, strict=True):
            assert_same(each, other)
    else:
        assert np.array_equal(one, two)


def masked_zeros(sparsifier):
    """What share is masked: as much as the level says, and all of it zero."""
    masked = sum(int((~mask).sum()) for mask in sparsifier.masks.values())
    for parameter, mask in masked_of(sparsifier):
        assert (parameter[~mask.expand_as(parameter)] == 0).all()
    total = sum(mask.numel() for mask in sparsifier.masks.values())
    assert masked / total == pytest.approx(share(sparsifier.level, sparsifier.model))
    return masked / total


@changing
@pytest.mark.parametrize("schedule", ["lin", "dsd", "one_shot"])
@pytest.mark.parametrize("few", [1, 32])
def test_long_fits_hold_every_zero_after_every_step(make_learner, schedule, few, monkeypatch, change):
    monkeypatch.setattr(masking, "FEW", few)
    learn, callback = make_learner(steps=30, opt_func=fastai.Adam), SparsifyCallback(0.8, schedule=schedule, **change)

    def look(self):
        seen.append(masked_zeros(callback.sparsifier))

    seen = []
    learn.fit(2, 0.1, wd=0.1, cbs=[callback, known(after_step=look)])
    assert len(seen) == 60
    assert max(seen) > 0.35


@pytest.mark.parametrize("schedule", ["lin", "dsd"])
@pytest.mark.parametrize(
    ("event", "order"),
    # After the step, before both callbacks and between them.
    [("before_train", 60), ("after_pred", 60), ("after_loss", 60), ("before_backward", 60)]
    + [("after_step", 10.1), ("after_step", 10.4)],
)
def test_no_callback_changes_masked_weights(make_learner, event, order, schedule):
    learn, callback = make_learner(steps=20, opt_func=fastai.Adam), SparsifyCallback(0.8, schedule=schedule)

    def write(self):
        for parameter in self.model.parameters():
            parameter.data += 0.1

    writes = type("Writes", (Callback,), {event: write, "order": order})
    seen = []
    look = known(after_step=lambda self: seen.append(masked_zeros(callback.sparsifier)))
    learn.fit(2, 0.1, cbs=[callback, writes(), look])
    assert len(seen) == 40
    assert max(seen) > 0.35


def test_an_optimizer_that_steps_copies_changes_no_masked_weight(make_learner):
    learn, callback = make_learner(steps=20), SparsifyCallback(0.8, schedule="lin")

    def copied(self):
        self.copies = [nn.Parameter(parameter.detach().clone()) for parameter in self.model.parameters()]
        self.learn.opt = fastai.SGD(self.copies, 0.1, mom=0.9)

    def give_gradients(self):
        for master, parameter in zip(self.copies, self.model.parameters(), strict=True):
            master.grad = parameter.grad.clone()

    def take_weights(self):
        for master, parameter in zip(self.copies, self.model.parameters(), strict=True):
            parameter.data.copy_(master.data)

    zeros = []
    look = known(before_backward=lambda self: zeros.append(counted(self.model)))
    masters = known(10, before_fit=copied, before_step=give_gradients, after_step=take_weights)
    learn.fit(2, 0.1, cbs=[callback, masters, look])
    assert zeros[-1] == pytest.approx(share(0.8 * 39 / 40, learn.model), abs=0.01)


def test_the_schedule_continues_if_its_keeper_is_removed(make_learner, monkeypatch):
    monkeypatch.setattr(masking, "FEW", 1)
    learn = make_learner(steps=20, opt_func=fastai.Adam)
    callback = SparsifyCallback(0.8, schedule="lin")
    learn.fit(2, 0.1, cbs=[callback, At("after_batch", lambda: learn.remove_cb(KeepSparsity), epoch=0, batch=10)])
    assert counted(learn.model) == share(0.8, learn.model)


def test_a_later_fit_that_is_interrupted_after_an_unknown_step_keeps_its_zeros(make_learner):
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data += 0.1

    opt_func = lambda parameters, **options: fastai.OptimWrapper(parameters, Noisy, **options)  # noqa: E731
    learn = make_learner(opt_func=opt_func)
    learn.fit(1, 0.1, cbs=SparsifyCallback(0.6, schedule="one_shot"))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, 0.1, cbs=[SparsifyCallback(0.6), At("after_step", raises(KeyboardInterrupt), order=-5)])
    assert counted(learn.model) == share(0.6, learn.model)
