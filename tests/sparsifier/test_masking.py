"""Applying masks to tensors, gradients and moments."""

import pytest
import torch
from conftest import masked_of, small_net
from torch import nn

from sparsifai import Sparsifier
from sparsifai.sparsifier.masking import (
    NEXT_TO_ZERO,
    holds_zeros,
    is_masked_zero,
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
def test_masked_values_become_zero_and_others_do_not_change(dtype, memory, places, part, monkeypatch):
    monkeypatch.setattr("sparsifai.sparsifier.masking.CHUNK", part)
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


def test_newly_masked_gives_indices_if_they_are_few_and_the_mask_otherwise():
    weight, before = nn.Parameter(torch.ones(10, 10)), torch.ones(10, 10, dtype=torch.bool)
    before[0, 0] = False
    mask = before.clone()
    mask[3, 4] = False
    assert newly_masked(weight, before, mask).tolist() == [34]
    mask[3:8] = False
    assert newly_masked(weight, before, mask) is mask
    few = torch.tensor([[True]] * 9 + [[False]])
    assert newly_masked(weight, torch.ones(10, 1, dtype=torch.bool), few) is few


def test_newly_masked_finds_weights_in_all_chunks(monkeypatch):
    monkeypatch.setattr("sparsifai.sparsifier.masking.CHUNK", 7)
    weight, before = nn.Parameter(torch.ones(20, 20)), torch.rand(20, 20) < 0.9
    mask = before.clone()
    mask.view(-1)[[0, 6, 7, 200, 398, 399]] = False
    expected = (before & ~mask).flatten().nonzero().flatten()
    assert torch.equal(newly_masked(weight, before, mask), expected)


KNOWN = {
    "Adam": lambda parameters: torch.optim.Adam(parameters),
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "a subclass": lambda parameters: type("Mine", (torch.optim.Adam,), {})(parameters),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters),
}


@pytest.mark.parametrize(("kind", "holds"), [("Adam", True), ("SGD", True), ("a subclass", False), ("LBFGS", False)])
def test_only_known_optimizers_hold_zeros(kind, holds):
    optimizer = KNOWN[kind](nn.Linear(2, 2).parameters())
    assert holds_zeros(optimizer) is holds
    assert holds_zeros(type("Wrapper", (), {"__init__": lambda self: setattr(self, "optimizer", optimizer)})()) is False


def test_a_sparse_gradient_is_not_changed_and_reported():
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 2))
    sparsifier = Sparsifier(model, layers=["0", "1"])
    sparsifier.sparsify(0.5)
    model(torch.tensor([1, 2])).sum().backward()
    assert zero_gradients(masked_of(sparsifier)) is False
    assert (model[1].weight.grad[~sparsifier.masks["1.weight"]] == 0).all()
    model[0].weight.grad = None
    assert zero_gradients(masked_of(sparsifier)) is True


def test_mean_squares_next_to_zero_move_no_weight():
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
    zero_moments(masked_of(sparsifier), optimizer, squares=NEXT_TO_ZERO)
    step()
    for parameter, mask in masked_of(sparsifier):
        state = optimizer.state[parameter]
        assert (parameter[~mask] == 0).all()
        assert (state["exp_avg"][~mask] == 0).all()
        assert torch.allclose(state["exp_avg_sq"][~mask], torch.tensor(0.999 * NEXT_TO_ZERO), atol=0, rtol=1e-5)
    sparsifier.mask_moments(optimizer)  # without it, they are zero
    assert all((optimizer.state[each]["exp_avg_sq"][~mask] == 0).all() for each, mask in masked_of(sparsifier))


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_an_optimizer_with_hooks_is_not_known_to_hold_zeros(register):
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters())
    handle = getattr(optimizer, register)(lambda *_: None)
    assert holds_zeros(optimizer) is False
    handle.remove()
    assert holds_zeros(optimizer) is True


def test_is_masked_zero_reads_masked_values_only():
    weight, mask = nn.Parameter(torch.tensor([[1.0, 2.0], [0.0, 3.0]])), torch.tensor([[True, False]])
    assert not is_masked_zero([(weight, mask)])
    with torch.no_grad():
        weight[:, 1] = 0
    assert is_masked_zero([(weight, mask)])
    with torch.no_grad():
        weight[1, 1] = float("nan")
    assert not is_masked_zero([(weight, mask)])
