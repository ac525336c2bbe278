from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsifai.model.tensors import all_finite, cloned, first_tensor, is_float, tensors_in, widened

ONE, TWO, THREE = torch.ones(1), torch.ones(2), torch.ones(3)


def test_the_first_output_of_a_model():
    for output in (ONE, (ONE, TWO), [[ONE], TWO], ((ONE, TWO), THREE)):
        assert first_tensor(output, "the model").data_ptr() == ONE.data_ptr()
    assert type(first_tensor(ONE.as_subclass(nn.Buffer), "the model")) is torch.Tensor


def test_tensors_are_found_in_containers_and_plain_objects():
    tree = {"a": [ONE, 3], "b": (SimpleNamespace(logits=TWO, past=[THREE], name="x"), None)}
    assert [len(tensor) for tensor in tensors_in(tree)] == [1, 2, 3]
    assert tensors_in([nn.Linear(2, 2), nn.Linear]) == []


def test_half_precision_is_widened_and_nothing_else():
    for dtype in (torch.float16, torch.bfloat16):
        assert widened(ONE.to(dtype)).dtype == torch.float32
    for tensor in (ONE, ONE.double(), ONE.to(torch.int8)):
        assert widened(tensor) is tensor


def test_copies_and_kinds_of_values():
    assert cloned(ONE) is not ONE
    assert cloned("word") == "word"
    assert [is_float(value) for value in (ONE, ONE.long(), 1.0)] == [True, False, False]


@pytest.mark.parametrize("wrong", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_one_number_that_is_not_finite_is_found(dtype, wrong):
    real = torch.ones((), dtype=dtype).real.dtype
    largest = torch.full((3, 4), torch.finfo(real).max, dtype=real)  # their sum is inf
    empty = torch.empty(0, dtype=dtype)
    assert bool(all_finite([largest.to(dtype), None, empty]))
    assert bool(all_finite([]))
    one = torch.ones(3, 4, dtype=dtype)
    one[1, 2] = wrong
    assert not all_finite([torch.ones(2), one])
    assert not all_finite([one.real.float().to_sparse()])
