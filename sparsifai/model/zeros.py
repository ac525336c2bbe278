"""Counting zeros in weights. Reports use these counts, never the sparsity that a schedule asked for.

0.0 and -0.0 are both zero, in every type of number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..support.printable import printable
from ..support.table import Column, percent, ratio
from .parallel import whole
from .tensors import check_values, computable, is_made_of_others

# Types in which a byte holds several numbers; and the names of such weights of GPTQ, AWQ and compressed-tensors.
_PACKED_TYPES = (torch.quint4x2, torch.quint2x4)
_PACKED_NAMES = ("qweight", "weight_packed")


@dataclass(frozen=True)
class Count:
    """The number of zeros among some weights.

    Args:
        weights: Number of weights.
        zeros: How many of them are zero.

    Example:
        >>> Count.of(torch.tensor([0.0, 1.0, -0.0, 2.0])).sparsity
        0.5
    """

    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """zeros / weights, from 0 to 1; 0 if there are no weights."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def density(self) -> float:
        """The remaining fraction, 1 - sparsity."""
        return 1 - self.sparsity

    @classmethod
    def of(cls, *tensors: Tensor) -> Count:
        """Count the zeros of tensors; sharded ones are gathered, so every process of the mesh must call this.

        Raises:
            ValueError: The zeros of a tensor cannot be counted; see `why_not_counted`.
        """
        for tensor in tensors:
            if why := why_not_counted(tensor):
                raise ValueError(f"zeros cannot be counted: a tensor is {why}")
        weights = sum(tensor.numel() for tensor in tensors)
        return cls(weights, weights - sum(int(torch.count_nonzero(_values(tensor))) for tensor in tensors))


def check_counted(caller: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that the zeros of tensors can be counted.

    Args:
        caller: Name of the function that was called, for the message.
        tensors: The parameters of a model by name.

    Raises:
        ValueError: Those of one of them cannot be counted.
    """
    check_values(caller, tensors)
    for name, tensor in tensors.items():
        if why := why_not_counted(tensor, name):
            raise ValueError(f"{caller}: the zeros of {printable(name)} cannot be counted, because it is {why}")


def is_nonzero(tensor: Tensor) -> Tensor:
    """Which elements of a tensor, gathered if it is sharded, are not zero: bool in its shape."""
    return _values(tensor) != 0


def _values(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return computable(whole(tensor.dequantize() if _is_coded(tensor) else tensor))


def _is_coded(tensor: Tensor) -> bool:
    """Whether a tensor holds integers or the like that stand for its values: quantized by torch or torchao.

    A value is zero if its integer is the zero point.
    """
    own = type(tensor).dequantize is not Tensor.dequantize if is_made_of_others(tensor) else tensor.is_quantized
    return own and tensor.dtype not in _PACKED_TYPES


def why_not_counted(tensor: Tensor, name: str = "") -> str:
    """Why the zeros of a tensor cannot be counted, and what to do, as the end of 'it is ...'; empty if they can.

    Args:
        tensor: A tensor of any kind.
        name: Its name in the model, by which packed weights are known.
    """
    if name.rpartition(".")[2] in _PACKED_NAMES and not tensor.dtype.is_floating_point:
        return "packed (GPTQ and the like): each number holds several weights; count them before they are packed"
    if hasattr(tensor, "quant_state"):
        return f"a {type(tensor).__name__} of bitsandbytes, which packs several weights; count them before that"
    return "" if not is_lazy(tensor) and not tensor.is_meta and _is_coded(tensor) else why_not_plain(tensor)


def why_not_plain(tensor: Tensor) -> str:
    """Why a tensor is not one of plain numbers, and what to do, as the end of 'it is ...'; empty if it is."""
    if is_lazy(tensor):
        return "lazy and has no shape yet; run one batch through the model first"
    if tensor.is_nested:
        return "a nested tensor; count its parts, which unbind() gives"
    if tensor.is_quantized:
        return f"quantized ({_short(tensor.dtype)}); dequantize() makes it plain"
    if tensor.layout != torch.strided:
        return f"in the layout {_short(tensor.layout)}; to_dense() makes it countable"
    if tensor.is_meta:
        return "on the meta device, without values; load the model into memory first"
    if is_made_of_others(tensor):
        return f"a {type(tensor).__name__}, which holds its values in other tensors; count those, or make it dense"
    if not has_zero(tensor.dtype):
        return f"of {_short(tensor.dtype)}, which torch cannot compare with zero; float() makes it countable"
    return ""


@cache
def has_zero(dtype: torch.dtype) -> bool:
    """Tell whether zero bits are a zero of a type, and torch can compare its numbers with zero.

    Those of float8_e8m0fnu are powers of two, so none is zero.
    """
    try:
        bits = torch.zeros(dtype.itemsize, dtype=torch.uint8).view(dtype)
        return not torch.count_nonzero(computable(bits))
    except RuntimeError:
        return False


def _short(value: torch.dtype | torch.layout) -> str:
    return str(value).removeprefix("torch.")


def measured(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model whose zeros are counted, by name: parameters, and what quantized layers have instead.

    Layers of torch.ao give their weight and bias by methods; layers of GPTQ and AWQ have packed weights in buffers.
    """
    found: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn."):
            for kind in ("weight", "bias"):
                method = getattr(module, kind, None)
                value = method() if callable(method) and not isinstance(method, (Tensor, nn.Module)) else None
                found |= {f"{name}.{kind}".lstrip("."): value} if isinstance(value, Tensor) else {}
    packed = (name for name, _ in model.named_buffers() if name.rpartition(".")[2] in _PACKED_NAMES)
    return found | {name: model.get_buffer(name) for name in packed}


def ties(model: nn.Module) -> dict[str, str]:
    """Name of a parameter that is the same as an earlier one -> the name of that one.

    They are tied weights, and those of a module that stands at several places.
    """
    first: dict[Tensor, str] = {}
    names = {name: first.setdefault(each, name) for name, each in model.named_parameters(remove_duplicate=False)}
    return {name: earlier for name, earlier in names.items() if name != earlier}


def has_zero_slices(model: nn.Module) -> bool:
    """Whether any output or input of a weight, or entry of a norm layer, is zero.

    Without one there is nothing to shrink, and the attempt could take minutes. Zero biases, and zero rows of an
    embedding, remove no channel.
    """
    tables = weights_of_embeddings(model)
    return any(
        not is_nonzero(parameter).unsqueeze(-1).movedim(axis, 0).flatten(1).any(1).all()
        for name, parameter in model.named_parameters()
        if "bias" not in name.rpartition(".")[2]
        for axis in range(parameter in tables, min(parameter.dim(), 2))
    )


def weights_of_embeddings(model: nn.Module) -> set[Tensor]:
    """The tables of the embeddings of a model; the layers that yield its output may share them."""
    return {part.weight for part in model.modules() if isinstance(part, (nn.Embedding, nn.EmbeddingBag))}


# The columns of a table for the values of `figures`.
COUNTED = (
    Column("weights"),
    Column("zeros"),
    Column("sparsity", show=percent, bar=True, total=ratio("zeros", "weights")),
)


def figures(count: Count | None) -> dict[str, Any]:
    """The values of a count in the records of a table; None for each if nothing could be counted.

    Args:
        count: The count, or None.
    """
    if count is None:
        return {"weights": None, "zeros": None, "sparsity": None}
    return {"weights": count.weights, "zeros": count.zeros, "sparsity": count.sparsity}
