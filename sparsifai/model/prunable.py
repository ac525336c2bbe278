"""Which weights can be pruned: those whose zeros can be written where they are, and change nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .parallel import is_sharded
from .tensors import is_made_of_others
from .zeros import why_not_plain

# Integers are the codes of quantized weights, mostly, and of these zero need not stand for zero.
_FLOATS = {
    getattr(torch, name)
    for name in (
        "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    )
}  # fmt: skip


def why_not_prunable(tensor: Tensor) -> str:
    """Why a tensor cannot be pruned, and what to do, as the end of 'it is ...'; empty if it can.

    Args:
        tensor: A parameter. What it shares with others is found by `shared_memory`.
    """
    if why := why_not_plain(tensor):
        return why
    if tensor.dtype not in _FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        return f"of {kind}, a type that is not pruned; cast it to float32, or to complex64 if it is complex"
    if tensor.is_conj() or tensor.is_neg():
        return "a conjugate or negative view; copy it, as resolve_conj() or resolve_neg() does"
    if not is_sharded(tensor) and _overlaps_itself(tensor):
        return "a view whose elements share memory with each other, as expand() gives; copy it with clone()"
    return ""


def unprunable(model: nn.Module) -> dict[str, str]:
    """Find the parameters that cannot be pruned.

    Args:
        model: The model, without wrappers.

    Returns:
        Parameter name -> why, and what to do, as the end of 'it is ...'. A tied parameter occurs under its first name.
    """
    parameters = dict(model.named_parameters())
    reasons = {name: why for name, parameter in parameters.items() if (why := why_not_prunable(parameter))}
    for name, other in shared_memory(parameters).items():
        reasons.setdefault(
            name,
            f"in the same memory as {other}, which would be pruned with it; copy one of them with clone(), or tie "
            "them: let both layers hold one parameter",
        )
    return reasons


def shared_memory(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Find tensors that have elements in the memory of each other. Parts of one buffer that do not overlap are none.

    Args:
        parameters: Name -> tensor.

    Returns:
        Name of each such tensor -> name of another one.
    """
    spans = []
    for name, tensor in parameters.items():
        if _has_memory(tensor):
            spans.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name))
    shared: dict[str, str] = {}
    near: dict[str, Tensor] = {}  # tensors whose spans of memory overlap, one the next
    where, end = "", 0
    for device, first, last, name in sorted(spans):
        if device != where or first >= end:
            shared |= _meeting(near)
            near, where, end = {}, device, 0
        near[name], end = parameters[name], max(end, last)
    return shared | _meeting(near)


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has elements, and these are at strides from its address."""
    if is_lazy(tensor) or tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta:
        return False
    if is_sharded(tensor) or is_made_of_others(tensor) or tensor.device.type not in ("cpu", "cuda"):
        return False
    return bool(tensor.numel() and tensor.data_ptr())


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def _meeting(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name of each tensor that has an element in the memory of another -> name of the other."""
    if len(tensors) < 2:
        return {}
    names, first = list(tensors), min(map(Tensor.data_ptr, tensors.values()))
    ends = [tensor.data_ptr() + _extent(tensor) for tensor in tensors.values()]
    unit = math.gcd(*(n for each in tensors.values() for n in (each.element_size(), each.data_ptr() - first)))
    owners, shared = np.zeros((max(ends) - first) // unit, np.int32), {}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        own = _elements(owners[(tensor.data_ptr() - first) // unit :], tensor, tensor.element_size() // unit)
        if own.any():
            for earlier in np.unique(own[own > 0]):
                shared[name] = names[earlier - 1]
                shared.setdefault(names[earlier - 1], name)
        own[...] = number
    return shared


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor are at the same place."""
    axes = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    reached = 0
    for stride, size in sorted(axes) if tensor.numel() else ():
        if stride <= reached:  # what is along this axis may be at places along those of smaller strides
            places = np.zeros(_extent(tensor) // tensor.element_size(), np.bool_)
            _elements(places, tensor)[...] = True
            return int(np.count_nonzero(places)) < tensor.numel()
        reached += stride * (size - 1)
    return False


def _elements(places: np.ndarray, tensor: Tensor, width: int = 1) -> np.ndarray:
    """The entries of an array that are where the elements of a tensor are, each `width` entries wide."""
    strides = [stride * width * places.itemsize for stride in tensor.stride()]
    return np.lib.stride_tricks.as_strided(places, (*tensor.shape, width), (*strides, places.itemsize))
