"""Weights of every type and in every layout: nets whose first layer has such a weight."""

import warnings

import pytest
import torch
from torch import nn

OUT, IN = 16, 32


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about complex32
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


def bits_of(tensor):
    """The bytes of a tensor, in row-major order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def masked_bits(tensor, mask):
    """The bytes of the masked values of a tensor."""
    return bits_of(tensor)[~mask.expand(tensor.shape).reshape(-1).repeat_interleave(tensor.element_size())]


def same(tensor, other):
    if isinstance(tensor, Coded):
        return torch.equal(tensor.codes, other.codes)
    if tensor.layout != torch.strided:
        return torch.equal(tensor.to_dense(), other.to_dense())
    if tensor.is_quantized:
        return torch.equal(tensor.int_repr(), other.int_repr())
    tensor, other = (each.detach().resolve_conj().resolve_neg() for each in (tensor, other))
    return torch.equal(bits_of(tensor), bits_of(other))


# --- What stays dense -------------------------------------------------------------------------------------------------


class Coded(torch.Tensor):
    """A subclass without memory of its own, as libraries for quantization have them."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Coded(inner["codes"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].codes.clone())
        raise NotImplementedError(f"Coded: {function}")


def overlapping():
    """Two weights of which one begins where the other has not ended."""
    buffer, model = values(OUT * IN + 40), net(values())
    model[0].weight, model[2].weight = parameter(buffer[: OUT * IN].view(OUT, IN)), parameter(buffer[-64:].view(4, OUT))
    model.append(nn.Linear(4, 4))
    return model


def in_the_memory_of_another():
    model = net(values())
    model.append(nn.Linear(IN, OUT))
    model[3].weight = parameter(model[0].weight.detach())
    return model


def sparse(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return net(getattr(values(), layout)())


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return net(torch.quantize_per_tensor(values(), 0.1, 0, torch.qint8))


INTEGERS = ("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
NOT_PRUNED = "a type that is not pruned; cast it to float32, or to complex64 if it is complex"
# Kind -> a net whose first layer cannot be pruned, and the reason.
DENSE = {
    **{
        name: (lambda name=name: net((values() * 30).abs().to(getattr(torch, name))), f"of {name}, {NOT_PRUNED}")
        for name in INTEGERS
    },
    "complex32": (lambda: net(typed(torch.complex32)), f"of complex32, {NOT_PRUNED}"),
    "quantized": (quantized, "quantized (qint8); dequantize() makes it plain"),
    "COO": (lambda: sparse("to_sparse"), "in the layout sparse_coo; to_dense() makes it countable"),
    "CSR": (lambda: sparse("to_sparse_csr"), "in the layout sparse_csr; to_dense() makes it countable"),
    "MKLDNN": (lambda: net(values().to_mkldnn()), "in the layout _mkldnn; to_dense() makes it countable"),
    "wrapper": (
        lambda: net(Coded(torch.ones(OUT, IN, dtype=torch.int8))),
        "a Coded, which holds its values in other tensors; count those, or make it dense",
    ),
    "conjugate": (
        lambda: net(torch.complex(values(), values()).conj()),
        "a conjugate or negative view; copy it, as resolve_conj() or resolve_neg() does",
    ),
    "negative": (
        lambda: net(torch.complex(values(), values()).conj().imag),
        "a conjugate or negative view; copy it, as resolve_conj() or resolve_neg() does",
    ),
    "expanded": (
        lambda: net(values(1, IN).expand(OUT, IN)),
        "a view whose elements share memory with each other, as expand() gives; copy it with clone()",
    ),
    "sliding window": (
        lambda: net(values(OUT + IN).as_strided((OUT, IN), (1, 1))),
        "a view whose elements share memory with each other, as expand() gives; copy it with clone()",
    ),
    "overlapping": (
        overlapping, "in the same memory as 2.weight, which would be pruned with it; copy one of them with clone(), or "
        "tie them: let both layers hold one parameter",
    ),
    "in the memory of another": (
        in_the_memory_of_another, "in the same memory as 3.weight, which would be pruned with it; copy one of them "
        "with clone(), or tie them: let both layers hold one parameter",
    ),
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):
    DENSE["without a zero"] = (
        lambda: net((values().abs() + 1).to(torch.float8_e8m0fnu)),
        "of float8_e8m0fnu, which torch cannot compare with zero; float() makes it countable",
    )

# Those whose zeros cannot be counted either.
UNCOUNTED = [each for each in ("COO", "CSR", "MKLDNN", "wrapper", "without a zero") if each in DENSE]

pruned = pytest.mark.parametrize("make", PRUNED.values(), ids=PRUNED)
dense = pytest.mark.parametrize(("make", "why"), DENSE.values(), ids=DENSE)
uncounted = pytest.mark.parametrize(("make", "why"), [DENSE[name] for name in UNCOUNTED], ids=UNCOUNTED)
