"""The contract of the callbacks as tables: what is called or what happens, and what must hold after it."""

import copy
import itertools
import pickle
import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

fastai = pytest.importorskip("fastai.vision.all", reason="the callbacks are fastai's")
pytestmark = pytest.mark.fastai

from conftest import small_net  # noqa: E402
from fastai.callback import core  # noqa: E402
from fastai.callback.fp16 import MixedPrecision  # noqa: E402
from fastai.callback.tensorboard import TensorBoardCallback  # noqa: E402
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback  # noqa: E402
from fastai.callback.training import GradientAccumulation, GradientClip  # noqa: E402
from fastai.learner import Callback  # noqa: E402
from soundness import assert_sound, counted, share  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402

from sparsifai.all import KeepSparsity, Sparsifier, SparsifyCallback, between, criteria, schedules  # noqa: E402

EVENTS = [event for event in core._events if event != "after_create" and "cancel" not in event]
IN_STEP = EVENTS.index("before_batch"), EVENTS.index("after_batch") + 1


class At(Callback):
    """Does something in one event of a fit, once: in the given batch, or in the given epoch where there is none."""

    def __init__(self, event, action, order=99, epoch=1, batch=1):
        self.action, self.order, self.at = action, order, (epoch, batch)
        self.inner, self.done = event in EVENTS[slice(*IN_STEP)], False
        setattr(self, event, self._act)

    def _act(self):
        learn = self.learn
        here = not learn.lock.locked() and not hasattr(learn, "lr_finder")
        if self.inner:
            here = here and learn.training and (learn.epoch, learn.iter) == self.at
        if here and not self.done:
            self.done = True
            self.action()


def raises(error):
    def action():
        raise error

    return action


def two_groups(model):
    return fastai.L(list(model[:6].parameters()), list(model[6:].parameters()))


# --- What asks a Learner something, and must change nothing --------------------------------------------------------

pictures = np.random.default_rng(0).integers(0, 255, (24, 8, 8, 3), dtype=np.uint8)


def picture(number):
    return pictures[number]


def letter(number):
    return "abc"[number % 3]


def picture_learner(callbacks=None, **options):
    block = fastai.DataBlock(
        (fastai.ImageBlock, fastai.CategoryBlock),
        get_x=picture,
        get_y=letter,
        splitter=fastai.IndexSplitter(range(16, 24)),
    )
    torch.manual_seed(0)
    dls = block.dataloaders(range(24), bs=8, num_workers=0, device="cpu")
    model = nn.Sequential(nn.Conv2d(3, 2, 1), *small_net())
    learn = fastai.Learner(
        dls, model, loss_func=fastai.CrossEntropyLossFlat(), metrics=fastai.accuracy, cbs=callbacks, **options
    )
    learn.create_mbar = False
    return learn


# Each gives what must be the same as of a Learner without the callback: the number or form of what it returns.
QUESTIONS = {
    "lr_find": lambda learn: len(learn.lr_find(num_it=6, show_plot=False)),
    "validate": lambda learn: len(learn.validate()),
    "get_preds": lambda learn: len(learn.get_preds()),
    "predict": lambda learn: len(learn.predict(pictures[0])),
    "show_results": lambda learn: learn.show_results(max_n=2),
    "interpretation": lambda learn: fastai.ClassificationInterpretation.from_learner(learn).confusion_matrix().shape,
    "summary": lambda learn: learn.summary().split("Optimizer")[0],
    "tta": lambda learn: len(learn.tta(n=1)),
}
MOMENTS = {
    "before any fit": lambda learn, callbacks: None,
    "between two fits": lambda learn, callbacks: learn.fit(2, cbs=callbacks),
    "after an interrupted fit": lambda learn, callbacks: pytest.raises(
        KeyboardInterrupt, learn.fit, 3, cbs=[At("after_step", raises(KeyboardInterrupt)), *callbacks]
    ),
    "after an interrupted validation": lambda learn, callbacks: pytest.raises(
        KeyboardInterrupt, learn.fit, 3, cbs=[At("before_validate", raises(KeyboardInterrupt)), *callbacks]
    ),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # fastai's, in show_results
@pytest.mark.parametrize("given", ["to the fit", "to the Learner"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_prints_nothing_and_changes_nothing(question, moment, given, capsys, tmp_path):
    callback = SparsifyCallback(0.6, schedule="lin")
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
    "channels_last": lambda learn, callbacks: (learn.model.to(memory_format=torch.channels_last), learn.fit(3, cbs=callbacks)),
}  # fmt: skip


def _silent(learn, callbacks):
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, cbs=callbacks)


@pytest.mark.parametrize("given", ["to the fit", "to the Learner"])
@pytest.mark.parametrize("way", FITS)
def test_every_way_to_fit_ends_at_the_target_and_keeps_it(make_learner, way, given, tmp_path):
    callback = SparsifyCallback(0.8, schedule="lin")
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


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_interrupt_inside_the_step_of_an_optimizer_costs_no_zero(make_learner, optimizer):
    callback = SparsifyCallback(0.8, schedule="lin")
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
