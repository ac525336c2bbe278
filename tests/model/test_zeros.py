import warnings

import pytest
import torch

from sparsifai.model.zeros import Count, figures, why_not_counted


def test_zeros_of_several_tensors_are_counted():
    count = Count.of(torch.tensor([[0.0, -0.0], [1.0, float("nan")]]), torch.zeros(1000))
    assert (count.weights, count.zeros) == (1004, 1002)
    assert count.sparsity == pytest.approx(1002 / 1004)
    assert count.density == pytest.approx(2 / 1004)
    assert figures(count) == {"weights": 1004, "zeros": 1002, "sparsity": pytest.approx(1002 / 1004)}


def test_no_weights_are_not_sparse():
    assert (Count.of().weights, Count.of().sparsity) == (0, 0.0)


ALL_TYPES = [each for each in vars(torch).values() if isinstance(each, torch.dtype)]


@pytest.mark.parametrize("dtype", sorted({str(each): each for each in ALL_TYPES}.values(), key=str), ids=str)
def test_tensors_of_every_type_are_counted_or_refused(dtype):
    """Of a hundred elements all bits of eight are zero; those of no other are a zero."""
    bits = torch.ones(100, dtype.itemsize, dtype=torch.uint8)
    bits[::13] = 0
    tensor = bits.flatten().view(dtype) if not str(dtype).startswith("torch.q") else quantized(dtype)
    why = why_not_counted(tensor)
    if why:
        parts = [f"int{bits}" for bits in range(1, 8)]
        assert any(name in str(dtype) for name in ("e8m0", "float4", "bit", "torch.q", *parts))
        with pytest.raises(ValueError, match="zeros cannot be counted: a tensor is (of|quantized)"):
            Count.of(tensor)
    else:
        assert Count.of(tensor) == (Count(16, 12) if tensor.is_quantized else Count(100, 8))


def quantized(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dtype in (torch.quint4x2, torch.quint2x4):
            scales, zeros = torch.ones(4), torch.zeros(4)
            return torch.quantize_per_channel(torch.eye(4), scales, zeros, 0, dtype)
        return torch.quantize_per_tensor(torch.eye(4), 1.0, 0, dtype)
