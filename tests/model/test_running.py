import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from sparsifai.model.running import Split, as_it_was, copy_of, evaluating, not_drawn_from, run, untraced


def norm_net():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2))


def state_of(model):
    """All that a forward and a backward pass can change."""
    return copy.deepcopy([
        list(model.parameters()), [each.grad for each in model.parameters()], list(model.buffers()),
        [module.training for module in model.modules()],
    ])  # fmt: skip


def random_numbers():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_inputs_are_one_or_several_or_named():
    model = nn.Bilinear(2, 3, 1)
    first, second = torch.ones(5, 2), torch.ones(5, 3)
    expected = model(first, second)
    for inputs in ((first, second), [first, second], {"input1": first, "input2": second}):
        assert torch.equal(run(model, inputs), expected)
    assert run(nn.Linear(2, 1), first).shape == (5, 1)


def test_modes_are_restored_one_by_one_after_an_error():
    model, modes = norm_net(), []
    model[1].eval()
    model[0].register_forward_pre_hook(lambda *_: modes.extend(module.training for module in model.modules()))
    with pytest.raises(TypeError), evaluating(model):
        model(None)
    assert modes == [False] * 5
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_no_trace(fails):
    model = norm_net()
    model(torch.randn(5, 4)).sum().backward()
    gradients, before = [each.grad for each in model.parameters()], state_of(model)
    buffers = list(model.buffers())
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random_numbers()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    try:
        with untraced(model):
            assert all(each.grad is None for each in model.parameters())
            random_numbers()
            model(torch.randn(5, 4)).sum().backward()
            model[1].register_buffer("other", torch.ones(1))
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)
    assert all(each.grad is gradient for each, gradient in zip(model.parameters(), gradients, strict=True))
    assert all(each is buffer for each, buffer in zip(model.buffers(), buffers, strict=True))
    assert random_numbers() == expected


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_restored_bit_by_bit(fails):
    model = norm_net()
    model[3].requires_grad_(False)
    parameters, before = list(model.parameters()), state_of(model)
    trained = [each.requires_grad for each in model.parameters()]
    try:
        with as_it_was(model):
            model.eval().requires_grad_(True)
            with torch.no_grad():
                model[0].weight.zero_()
            model.double()
            model[3].weight = nn.Parameter(torch.zeros(2, 3))
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)
    assert all(each is parameter for each, parameter in zip(model.parameters(), parameters, strict=True))
    assert [each.requires_grad for each in model.parameters()] == trained


def test_a_copy_of_a_model_that_holds_what_it_has_computed():
    model = nn.Linear(4, 3)
    model.seen = model(torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    copied = copy_of(model)
    assert torch.equal(copied.seen, model.seen)
    assert copied.seen.is_leaf
    assert torch.equal(copied.weight, model.weight)
    assert copied.weight is not model.weight


@pytest.mark.parametrize("wrap", [lambda loader: loader, lambda loader: Split(loader, None)])
def test_reading_batches_does_not_advance_the_generator_of_a_loader(wrap):
    data = TensorDataset(torch.arange(8.0))
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(data, batch_size=8, sampler=sampler)
    batches = wrap(loader)
    with not_drawn_from(batches):
        first = next(iter(batches))
    assert torch.equal(next(iter(batches))[0], first[0])
    assert not torch.equal(next(iter(batches))[0], first[0])


@pytest.mark.parametrize(
    ("batch", "inputs", "expected"),
    [
        ((1, 2, 3), None, (1, 2, (3,))),
        ([1, 2, 3], 1, (1, (2, 3))),
        ((1,), None, (1, ())),
        (1, None, (1, ())),
        ((1, 2), 2, (1, 2, ())),
    ],
)
def test_batches_are_split_into_inputs_and_targets(batch, inputs, expected):
    assert list(Split([batch], inputs)) == [expected]
