"""Pruned weights stay zero in a fastai Learner, whatever optimizers and other callbacks do."""

import pytest
import torch
from conftest import small_net
from torch import nn

from sparsifai import Sparsifier
from sparsifai.sparsifier.masking import (
    NEXT_TO_ZERO,
    holds_zeros,
)

pytestmark = pytest.mark.fastai


def test_keep_sparsity_masks_after_the_step_of_an_unknown_optimizer(make_learner, monkeypatch):
    from fastai.callback.core import Callback
    from fastai.optimizer import (
        SGD,
        Adam,
        Lamb,
        Larc,
        Lookahead,
        Optimizer,
        OptimWrapper,
        QHAdam,
        RAdam,
        RMSProp,
        ranger,
    )

    from sparsifai import KeepSparsity
    from sparsifai.callbacks import keep

    class Mixing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.01)

    def zeros_after_steps(optimizer, looks=True):
        model, seen = small_net(), []
        Sparsifier(model).sparsify(0.5)
        learn = make_learner(model, opt_func=optimizer)
        look = Callback(after_step=lambda self: seen.append(float((model[3].weight == 0).float().mean())))
        look.order = 99
        learn.fit(1, 0.1, cbs=[KeepSparsity(), look] if looks else KeepSparsity())
        return seen

    seen = zeros_after_steps(lambda parameters, lr, **_: OptimWrapper(parameters, Mixing, lr=lr))
    assert len(set(seen)) == 1
    assert seen[0] > 0.1
    # Where the optimizer and all callbacks are known, nothing needs to be set to zero after the steps.
    calls = []
    monkeypatch.setattr(keep, "zero_weights", lambda masked: calls.append(1))
    zeros_after_steps(SGD, looks=False)
    around = len(calls)
    zeros_after_steps(SGD)
    assert len(calls) == 2 * around + 4 + 3  # after four steps, and before all batches but the first

    steppers = (lambda p, **_: p.data.add_(1),)
    own = Optimizer(list(nn.Linear(2, 2).parameters()), steppers)
    assert holds_zeros(own) is False
    assert holds_zeros(Lookahead(own)) is False
    for known in (SGD, Adam, RMSProp, RAdam, Lamb, Larc, QHAdam, ranger):
        assert holds_zeros(known(list(nn.Linear(2, 2).parameters()), 0.1)) is True


@pytest.mark.parametrize("given", ["a class", "an attribute"])
@pytest.mark.parametrize(
    ("event", "order"), [("after_step", 0), ("after_step", 99), ("before_step", 20), ("after_batch", 99)]
)
def test_callbacks_that_change_weights_or_gradients_revive_nothing(make_learner, event, order, given):
    from fastai.callback.core import Callback

    from sparsifai import SparsifyCallback

    def disturb(self):
        with torch.no_grad():
            for parameter in self.learn.model.parameters():
                (parameter.grad if event == "before_step" else parameter).add_(0.1)

    disturbing = (
        type("Disturbing", (Callback,), {event: disturb})() if given == "a class" else Callback(**{event: disturb})
    )
    disturbing.order = order
    model, seen = small_net(), []
    learn = make_learner(model)
    learn.fit(1, 0.1, cbs=SparsifyCallback(0.7))
    zeros = {name: parameter == 0 for name, parameter in model.named_parameters() if parameter.dim() > 1}

    def look(module, inputs):
        if module.training:
            seen.extend(bool((model.get_parameter(name)[zero] == 0).all()) for name, zero in zeros.items())

    model.register_forward_pre_hook(look)
    learn.fit(2, 0.1, cbs=disturbing)
    assert len(seen) == 8 * len(zeros)
    assert all(seen)


def test_weights_and_moments_loaded_within_a_fit_are_masked_before_the_next_forward(make_learner, tmp_path):
    from fastai.callback.core import Callback
    from fastai.optimizer import Adam

    from sparsifai import SparsifyCallback

    model, seen = small_net(), []
    learn = make_learner(model, opt_func=Adam, path=tmp_path)
    learn.fit(1, 0.1)
    learn.save("dense", with_opt=True)
    learn.fit(1, 0.1, cbs=SparsifyCallback(0.7))
    zero = model[3].weight == 0

    class Loads(Callback):
        def before_epoch(self):
            self.learn.load("dense", with_opt=True)

        def before_batch(self):
            seen.append(bool((model[3].weight[zero] == 0).all()))

    learn.fit(2, 0.1, cbs=Loads())
    assert len(seen) >= 8
    assert all(seen)


def test_keep_sparsity_keeps_mean_squares_from_decaying(make_learner, monkeypatch):
    from fastai.optimizer import Adam

    from sparsifai import KeepSparsity
    from sparsifai.callbacks import keep

    monkeypatch.setattr(keep, "REFRESH", 8)
    model = small_net()
    Sparsifier(model).sparsify(0.5)
    learn = make_learner(model, opt_func=Adam, steps=8)
    learn.fit(2, 0.01, cbs=KeepSparsity())
    dead = model[3].weight == 0
    assert torch.allclose(
        learn.opt.state[model[3].weight]["sqr_avg"][dead], torch.tensor(NEXT_TO_ZERO), atol=0, rtol=1e-5
    )
