"""Applying masks: what is set to zero, to what else, and where it need not be."""

import pytest
import torch
from conftest import small_net
from torch import nn

from sparsifai import Sparsifier, masking
from sparsifai.sparsifier.masking import (
    NEXT_TO_ZERO,
    holds_zeros,
    newly_masked,
    zero_gradients,
    zero_masked,
    zero_moments,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize("part", [16, 131072])
def test_masked_values_are_zero_and_others_as_they_were(dtype, memory, places, part, monkeypatch):
    monkeypatch.setattr(masking, "PART", part)
    torch.manual_seed(0)
    before = torch.randn(4, 3, 5, 5, dtype=dtype).to(memory_format=memory)
    before[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -1.0], dtype=dtype)
    mask = torch.rand(4, 3, 5, 5) < 0.7
    mask[0, 0, 0] = torch.tensor([False, False, True, True, True])
    tensor = before.clone()
    version = tensor._version
    where = (~mask).flatten().nonzero().flatten() if places else mask
    zero_masked(tensor, where)
    assert torch.equal(tensor, torch.where(mask, before, torch.zeros((), dtype=dtype)))
    assert tensor._version > version  # autograd sees it


def test_newly_masked_are_places_if_few_and_the_mask_otherwise():
    weight, before = nn.Parameter(torch.ones(10, 10)), torch.ones(10, 10, dtype=torch.bool)
    before[0, 0] = False
    mask = before.clone()
    mask[3, 4] = False
    assert newly_masked(weight, before, mask).tolist() == [34]
    mask[3:8] = False
    assert newly_masked(weight, before, mask) is mask
    few = torch.tensor([[True]] * 9 + [[False]])
    assert newly_masked(weight, torch.ones(10, 1, dtype=torch.bool), few) is few


def test_newly_masked_are_found_in_all_parts(monkeypatch):
    monkeypatch.setattr(masking, "PART", 7)
    weight, before = nn.Parameter(torch.ones(20, 20)), torch.rand(20, 20) < 0.9
    mask = before.clone()
    mask.view(-1)[[0, 6, 7, 200, 398, 399]] = False
    expected = (before & ~mask).flatten().nonzero().flatten()
    assert torch.equal(newly_masked(weight, before, mask), expected)


@pytest.mark.parametrize(("granularity", "level_before"), [("weight", 0.7), ("filter", 0.3)])
def test_update_masks_does_for_less_what_sparsify_and_mask_moments_do(granularity, level_before):
    made = []
    for cheaply in (False, True):
        torch.manual_seed(0)
        model = small_net()
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        sparsifier = Sparsifier(model, granularity)
        for level in (0.2, 0.205, level_before, 0.5, 0.9):
            optimizer.zero_grad()
            model(torch.randn(4, 2, 8, 8)).square().sum().backward()
            sparsifier.mask_gradients()
            optimizer.step()
            if cheaply:
                sparsifier.update_masks(level, optimizer)
            else:
                sparsifier.sparsify(level)
                zero_moments(sparsifier.masked_parameters(), optimizer, squares=NEXT_TO_ZERO)
        moments = [optimizer.state[each] for each in model.parameters()]
        made.append((list(sparsifier.masks.values()), list(model.parameters()), moments))
    (masks, weights, moments), others = made[0], made[1]
    assert all(map(torch.equal, masks, others[0]))
    assert all(map(torch.equal, weights, others[1]))
    for one, other in zip(moments, others[2], strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
        assert torch.allclose(one["exp_avg_sq"], other["exp_avg_sq"], rtol=1e-2, atol=0)  # of masked ones, decayed


KNOWN = {
    "Adam": lambda parameters: torch.optim.Adam(parameters),
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "a subclass": lambda parameters: type("Mine", (torch.optim.Adam,), {})(parameters),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters),
}


@pytest.mark.parametrize(("kind", "holds"), [("Adam", True), ("SGD", True), ("a subclass", False), ("LBFGS", False)])
def test_only_optimizers_that_are_known_to_are_trusted_to_hold_zeros(kind, holds):
    optimizer = KNOWN[kind](nn.Linear(2, 2).parameters())
    assert holds_zeros(optimizer) is holds
    assert holds_zeros(type("Wrapper", (), {"__init__": lambda self: setattr(self, "optimizer", optimizer)})()) is False


def test_a_sparse_gradient_is_left_and_told():
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 2))
    sparsifier = Sparsifier(model, layers=["0", "1"])
    sparsifier.sparsify(0.5)
    model(torch.tensor([1, 2])).sum().backward()
    assert zero_gradients(sparsifier.masked_parameters()) is False
    assert (model[1].weight.grad[~sparsifier.masks["1.weight"]] == 0).all()
    model[0].weight.grad = None
    assert zero_gradients(sparsifier.masked_parameters()) is True


def test_means_of_squares_are_next_to_zero_where_asked_for_and_move_nothing():
    torch.manual_seed(0)
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 2, 8, 8)).square().sum().backward()
        sparsifier.mask_gradients()
        optimizer.step()

    sparsifier = Sparsifier(model)
    step()
    sparsifier.sparsify(0.5)
    zero_moments(sparsifier.masked_parameters(), optimizer, squares=NEXT_TO_ZERO)
    step()
    for parameter, mask in sparsifier.masked_parameters():
        state = optimizer.state[parameter]
        assert (parameter[~mask] == 0).all()
        assert (state["exp_avg"][~mask] == 0).all()
        assert torch.allclose(state["exp_avg_sq"][~mask], torch.tensor(0.999 * NEXT_TO_ZERO), atol=0, rtol=1e-5)
    sparsifier.mask_moments(optimizer)  # without it, they are zero
    assert all((optimizer.state[each]["exp_avg_sq"][~mask] == 0).all() for each, mask in sparsifier.masked_parameters())


@pytest.mark.fastai
def test_a_keeper_masks_after_the_step_of_an_optimizer_that_it_does_not_know(make_learner, monkeypatch):
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

    from sparsifai import KeepSparsity, keep

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


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_an_optimizer_with_hooks_is_not_trusted(register):
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters())
    handle = getattr(optimizer, register)(lambda *_: None)
    assert holds_zeros(optimizer) is False
    handle.remove()
    assert holds_zeros(optimizer) is True


@pytest.mark.fastai
@pytest.mark.parametrize("given", ["a class", "an attribute"])
@pytest.mark.parametrize(
    ("event", "order"), [("after_step", 0), ("after_step", 99), ("before_step", 20), ("after_batch", 99)]
)
def test_callbacks_that_change_weights_or_gradients_around_the_step_revive_nothing(make_learner, event, order, given):
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


@pytest.mark.fastai
def test_weights_and_moments_that_are_loaded_within_a_fit_are_masked_before_the_first_forward(make_learner, tmp_path):
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


@pytest.mark.fastai
def test_a_keeper_keeps_means_of_squares_from_decaying(make_learner, monkeypatch):
    from fastai.optimizer import Adam

    from sparsifai import KeepSparsity, keep

    monkeypatch.setattr(keep, "REFRESH", 8)
    model = small_net()
    Sparsifier(model).sparsify(0.5)
    learn = make_learner(model, opt_func=Adam, steps=8)
    learn.fit(2, 0.01, cbs=KeepSparsity())
    dead = model[3].weight == 0
    assert torch.allclose(
        learn.opt.state[model[3].weight]["sqr_avg"][dead], torch.tensor(NEXT_TO_ZERO), atol=0, rtol=1e-5
    )
