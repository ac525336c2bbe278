"""Which tensors share memory, with themselves or with each other, beside an oracle that lists all addresses."""

from itertools import product

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsifai.model.prunable import shared_memory, unprunable, why_not_prunable

VIEWS = st.tuples(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=3),
    st.integers(0, 12),
    st.sampled_from([torch.float32, torch.float64, torch.float16]),
)


def view(buffer, axes, start, dtype):
    whole = buffer.view(dtype)
    return whole.as_strided([size for size, _ in axes], [stride for _, stride in axes], start)


def addresses(tensor):
    """Every byte of every element."""
    places = (
        tensor.data_ptr() + tensor.element_size() * sum(np.multiply(index, tensor.stride()))
        for index in product(*map(range, tensor.shape))
    )
    return [[int(place) + byte for byte in range(tensor.element_size())] for place in places]


@settings(max_examples=400, deadline=None)
@given(st.lists(VIEWS, min_size=1, max_size=4))
def test_shared_memory_is_found_and_nothing_else(views):
    buffer = torch.zeros(200, dtype=torch.float64)
    tensors = {str(number): view(buffer, *each) for number, each in enumerate(views)}
    bytes_of = {name: {byte for element in addresses(each) for byte in element} for name, each in tensors.items()}
    shared = shared_memory(tensors)
    assert set(shared) == {
        name for name in tensors if any(bytes_of[name] & bytes_of[other] for other in tensors if other != name)
    }
    assert all(bytes_of[name] & bytes_of[other] for name, other in shared.items())
    for tensor in tensors.values():
        places = [element[0] for element in addresses(tensor)]
        assert bool(why_not_prunable(tensor)) == (len(set(places)) < len(places))


def test_memory_that_numpy_and_torch_share_is_found():
    numbers = np.zeros((4, 4), np.float32)
    assert shared_memory({"a": torch.from_numpy(numbers), "b": torch.from_numpy(numbers[1:])}) == {"a": "b", "b": "a"}


def test_a_tied_parameter_shares_memory_with_no_other():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert unprunable(model) == {}
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert {name: why.split(",")[0] for name, why in unprunable(model).items()} == {
        "0.weight": "in the same memory as 1.weight", "1.weight": "in the same memory as 0.weight",
    }  # fmt: skip
