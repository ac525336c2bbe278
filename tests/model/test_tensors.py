from types import SimpleNamespace

import torch
from torch import nn

from sparsifai.model.tensors import cloned, first_tensor, is_float, tensors_in, widened

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
