"""Which input channels of layers are constant."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsifai.model.channels.constants import constant_inputs, has_other_path


def constants_of(model, example):
    return {name: value.tolist() for name, value in constant_inputs(model.eval(), example).items()}


class Dropping(nn.Module):
    """A function of the input before a layer; NaN may get lost in it."""

    def __init__(self, function):
        super().__init__()
        self.function, self.last = function, nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.function(x))


def test_values_that_do_not_depend_on_the_input_are_constant():
    model = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 2.0
    found = constants_of(model, torch.randn(5, 3))
    assert all(map(math.isnan, found["0"]))
    assert [math.isnan(value) for value in found["2"]] == [True, False, True, True]
    assert found["2"][1] == pytest.approx(math.log1p(math.exp(2)))


def written_by_mask(x):
    y = torch.zeros(4, 3)
    y[x > 0] = 5.0
    return y


def written_to_a_view(x):
    y = torch.zeros(4, 3, dtype=torch.bool)
    y[0].copy_(x[0] > 10)
    return y


@pytest.mark.parametrize(
    "function",
    [
        written_by_mask,
        lambda x: torch.where(x > 0, 1.0, 2.0).expand_as(x),
        lambda x: (x > 10).float(),
        lambda x: torch.nan_to_num(x),
        lambda x: x.clone().nan_to_num_(),
        lambda x: torch.fmax(x, torch.zeros(())),
        lambda x: x.clone().masked_fill_(x.isnan(), 0.0),
        lambda x: torch.zeros_like(x).index_add_(0, torch.arange(4), x),
        lambda x: torch.heaviside(x, torch.zeros(())),
        lambda x: x**0 + x.sign(),
        lambda x: F.one_hot(x.argmax(1), 3).float(),
        lambda x: x.clamp(0, 1),
        lambda x: F.hardswish(x) * 2,
        lambda x: ((x > 10).long() + 1).expand_as(x) * 1.0,
        lambda x: torch.ones(2, 3)[(x[:, 0] > 10).int()],
        lambda x: torch.ones(2, 3)[x[:, 0].to(torch.long)],
        lambda x: torch.ones(4, 3).masked_fill(written_to_a_view(x), 0.0),
        lambda x: (x.isnan() | (x > 10)).logical_not().double().float(),
        lambda x: torch.bucketize(x, torch.arange(3.0)).float(),
    ],
)
def test_operations_that_drop_nan_still_depend_on_the_input(function):
    torch.manual_seed(0)
    # With this example all values are constant, so only NaN can show that they depend on the input.
    found = constants_of(Dropping(function), torch.zeros(4, 3))
    assert all(map(math.isnan, found["last"]))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.zeros_like(x),
        lambda x: x.new_ones(4, 3) * torch.arange(4)[:, None],
        lambda x: torch.arange(x.shape[0])[:, None].expand_as(x).float(),
        lambda x: torch.ones_like(x, dtype=torch.bool).float(),
    ],
)
def test_functions_of_the_shape_of_the_input_do_not_depend_on_its_values(function):
    taken = []

    class Taking(Dropping):
        def forward(self, x):
            taken.append(self.function(x))
            return self.last(taken[-1])

    constants_of(Taking(function), torch.ones(4, 3))
    assert not any(value.isnan().any() for value in taken)


def test_a_row_of_an_embedding_depends_on_the_input():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    assert all(map(math.isnan, constants_of(model, torch.zeros(2, 5, dtype=torch.long))["1"]))


def test_a_product_with_zero_is_constant():
    found = constants_of(Dropping(lambda x: x * torch.tensor([0.0, 1.0, 0.0])), torch.randn(4, 3))
    assert found["last"][0] == found["last"][2] == 0
    assert math.isnan(found["last"][1])


@pytest.mark.parametrize(
    ("function", "depends"),
    [
        (lambda x: x.flip(1), [False, False, True]),
        (lambda x: x.roll(1, 1), [False, True, False]),
        (lambda x: x[:, [1, 2, 0]], [False, False, True]),
        (lambda x: x.index_select(1, torch.tensor([2, 0, 1])), [False, True, False]),
        (lambda x: x.gather(1, torch.tensor([[2, 0, 1]]).expand_as(x)), [False, True, False]),
        (lambda x: x[:3].T, [True, True, True]),
        (lambda x: x[:3].T.contiguous().mT, [True, False, False]),
    ],
)
def test_functions_that_move_numbers_move_what_depends_on_the_input(function, depends):
    found = constants_of(Dropping(lambda x: function(x * torch.tensor([1.0, 0.0, 0.0]))), torch.randn(3, 3))
    assert [math.isnan(value) for value in found["last"]] == depends


def test_a_value_that_only_nan_as_input_gives_is_not_constant():
    found = constants_of(
        Dropping(lambda x: torch.full((4, 3), 7.0 if bool(x.isnan().any()) else 5.0)), torch.ones(4, 3)
    )
    assert all(map(math.isnan, found["last"]))


def test_a_value_that_depends_on_the_size_of_the_input_is_not_constant():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)
    )
    with torch.no_grad():
        model[0].weight[1] = 0  # constant, but the next layer pads it with zeros
        model[1].weight[2] = 0
        model[1].weight[2, 1] = 1.0  # reads only that channel, so the mean over positions depends on their number
    found = constants_of(model, torch.randn(2, 3, 8, 8))
    assert all(map(math.isnan, found["4"]))


@pytest.mark.parametrize(("other_path", "expected"), [(False, False), (True, True)])
def test_outputs_that_affect_the_model_on_another_path_are_found(other_path, expected):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(x)
            return self.second(x - x.mean(1, keepdim=True) if other_path else x)

    model, example = Net(), torch.randn(2, 3)
    assert has_other_path(model, example, {"first": {1}}, {"second": {1}}) == expected
    assert has_other_path(model, example, {"first": {1}}, {"second": {2}})
    assert not has_other_path(model, example, {}, {})
