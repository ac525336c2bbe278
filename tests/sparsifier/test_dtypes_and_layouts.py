"""Weights of every type and in every layout: pruned right, or left dense with the reason, or refused by name."""

import copy
import re
import warnings

import pytest
import torch
from conftest import as_on_device
from torch import nn

from sparsifai import (
    Regularizer,
    Sparsifier,
    compare,
    from_torch_prune,
    highest_sparsity,
    load_sparse,
    save_sparse,
    semi_structured_layers,
    sensitivity,
    shrink,
    to_sparse_layout,
)
from sparsifai.callbacks.plan import plan_of
from sparsifai.export.checkpoint import Checkpoint
from sparsifai.export.csr import CSRLinear
from sparsifai.sparsifier.recovery import recovered_masks
from sparsifai.sparsifier.report import Report

OUT, IN = 16, 32


@pytest.fixture(autouse=True)
def _unchanged_process():
    """Modules, grad mode, default dtype and random numbers are what they were."""

    def state():
        return dict(vars(nn.Module)), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()

    before = state()
    yield
    assert state() == before


def values(*shape, seed=0):
    """Numbers that stay apart in eight bits, some of them 0.0 and -0.0."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape or (OUT, IN), generator=generator)
    numbers.view(-1)[::9] = 0.0
    numbers.view(-1)[4::18] = -0.0
    return numbers


def net(weight):
    """A net whose first layer has this weight."""
    torch.manual_seed(1)
    convolves = len(weight.shape) == 4 if not weight.is_nested else False
    layers = [nn.Conv2d(8, OUT, 2), nn.ReLU(), nn.Flatten()] if convolves else [nn.Linear(IN, OUT), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(OUT, 4))
    model[0].weight = parameter(weight)
    with torch.no_grad():
        model[-1].weight.copy_(values(4, OUT, seed=3))
    return model


def parameter(weight):
    return nn.Parameter(weight, requires_grad=weight.is_floating_point() or weight.is_complex())


def wide(weight):
    """The same numbers in a type that computes everything, without views."""
    weight = weight.detach().as_subclass(torch.Tensor)
    return weight.to(torch.complex128) if weight.is_complex() else weight.float().double()


# --- What is pruned ---------------------------------------------------------------------------------------------------


class Marked(torch.Tensor):
    """A subclass with memory of its own."""


def in_a_flat_buffer():
    model = net(values())
    buffer, start = torch.cat([each.detach().reshape(-1) for each in model.parameters()]), 0
    for each in model.parameters():
        each.data = buffer[start : start + each.numel()].view(each.shape)
        start += each.numel()
    return model


def side_by_side():
    """Two weights whose rows take turns in one buffer."""
    buffer, model = values(OUT, IN + OUT), nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, OUT))
    model[0].weight, model[2].weight = parameter(buffer[:, :IN]), parameter(buffer[:, IN:])
    return model


def tied():
    model = nn.Sequential(nn.Linear(OUT, OUT), nn.ReLU(), nn.Linear(OUT, OUT))
    model[0].weight = model[2].weight = parameter(values(OUT, OUT))
    return model


def made_in_inference_mode():
    with torch.inference_mode():
        return net(values().clone())


def with_numbers():
    model = net(values())
    model.scale, model.none = nn.Parameter(torch.tensor(-0.0)), nn.Parameter(torch.zeros(0, 3))
    return model


def channels_last(dtype=torch.float32):
    return net(values(OUT, 8, 2, 2).to(dtype).contiguous(memory_format=torch.channels_last))


TYPES = [
    getattr(torch, name)
    for name in (
        "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    )
]  # fmt: skip


def typed(dtype, *shape):
    numbers = values(*shape)
    return torch.complex(numbers, numbers).to(dtype) if dtype.is_complex else numbers.to(dtype)


PRUNED = {
    **{str(dtype): lambda dtype=dtype: net(typed(dtype)) for dtype in TYPES},
    **{f"{dtype} transposed": lambda dtype=dtype: net(typed(dtype, IN, OUT).t()) for dtype in TYPES},
    "channels_last": channels_last,
    "bfloat16 channels_last": lambda: channels_last(torch.bfloat16),
    "every third column": lambda: net(values(OUT, 3 * IN)[:, ::3]),
    "large strides": lambda: net(torch.zeros(OUT * 40_000).as_strided((OUT, IN), (40_000, 1)).copy_(values())),
    "the real part of complex numbers": lambda: net(torch.complex(values(), values(seed=2)).real),
    "subclass": lambda: net(values().as_subclass(Marked)),
    "transposed subclass": lambda: net(values(IN, OUT).t().as_subclass(Marked)),
    "flat buffer": in_a_flat_buffer,
    "side by side": side_by_side,
    "tied": tied,
    "inference": made_in_inference_mode,
    "no axes and no elements": with_numbers,
}
pruned = pytest.mark.parametrize("make", PRUNED.values(), ids=PRUNED)
AXES = [
    ("weight", "global", "large_final"), ("weight", "local", "squared_final"), ("weight", "2:4", "large_final"),
    ("weight", "local", "magnitude_increase"), ("weight", "lamp", "large_final"), ("weight", "global", "random"),
    ("filter", "local", "large_final"), ("filter", "global", "normalized_final"), (("in",), "local", "large_final"),
]  # fmt: skip


def plain(model):
    """A copy in float64 and plain layouts, with magnitudes in place of complex numbers."""
    copies = [nn.ReLU() if isinstance(each, nn.ReLU) else nn.Flatten() for each in model]
    for place in (0, len(model) - 1):
        weight = wide(model[place].weight)
        convolves = weight.dim() == 4
        copies[place] = (nn.Conv2d(8, OUT, 2) if convolves else nn.Linear(*weight.shape[::-1])).double()
        copies[place].weight = nn.Parameter(weight.abs() if weight.is_complex() else weight)
    if model[0].weight is model[-1].weight:
        copies[-1].weight = copies[0].weight
    return nn.Sequential(*copies)


def check_zeros(sparsifier, before):
    """All bits of masked weights are zero, and no other bit has changed."""
    for name, own in sparsifier.model.named_parameters():
        mask = sparsifier.all_masks.get(name)
        kept = torch.ones(own.shape, dtype=torch.bool) if mask is None else mask.expand(own.shape)
        bits, earlier = (bits_of(each) for each in (own, before[name]))
        kept = kept.reshape(-1).repeat_interleave(len(bits) // max(own.numel(), 1))
        assert not bits[~kept].any(), name
        assert torch.equal(bits[kept], earlier[kept]), name


def bits_of(tensor):
    """The bytes of a tensor, in row-major order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@pruned
@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.filterwarnings("ignore:criterion .* compares with an earlier value", "ignore:the sparsity that was asked")
def test_masks_are_those_of_the_same_numbers_in_float64(make, axes):
    model = make()
    layers = None if axes[0] == "weight" else ["0"]
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    sparsifier, reference = (Sparsifier(each, *axes, layers=layers) for each in (model, plain(model)))
    for each in (sparsifier, reference):
        each.sparsify(0.4)
    assert sparsifier.masks.keys() == reference.masks.keys()
    assert all(torch.equal(sparsifier.masks[name], mask) for name, mask in reference.masks.items())
    assert all(type(mask) is torch.Tensor for mask in sparsifier.masks.values())
    check_zeros(sparsifier, before)
    report, expected = sparsifier.report(), reference.report()
    assert sparsifier.sparsity == reference.sparsity == report.selected.sparsity
    assert [row.count for row in report.rows if row.name in sparsifier.masks] == [
        row.count for row in expected.rows if row.name in reference.masks
    ]
    assert not report.not_counted
