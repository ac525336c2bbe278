"""2:4 on a GPU: Linear weights with two zeros in every four inputs, in the form of which tensor cores skip half."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..axes.n_of_m import is_nm
from ..model.layers import NamedWeight, find_weights
from ..model.linear import why_not_two_four
from ..model.parallel import is_sharded, kind_of, unwrapped
from ..support.checks import check_is_module
from ..support.table import Cells, Table, percent
from .conversion import check_alike, check_converts, dtype_name, listed

DTYPES = (torch.float16, torch.bfloat16)


CAPABILITY = (8, 0)


@dataclass(frozen=True)
class SemiStructuredLayer:
    """One weight: is_two_four, whether of every four inputs at most two have a weight; why_not: empty if it can be
    converted."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_two_four: bool
    why_not: str = ""


@dataclass(frozen=True, repr=False)
class SemiStructured(Table):
    """Which weights of a model `to_semi_structured` converts, and why it does not convert the others.

    Printed, it is a table; in a notebook, HTML.
    """

    layers: tuple[SemiStructuredLayer, ...]

    @property
    def convertible(self) -> tuple[str, ...]:
        """Names of the weights that can be converted on a GPU."""
        return tuple(layer.name for layer in self.layers if not layer.why_not)

    def _cells(self) -> Cells:
        header = ("layer", "kind", "shape", "dtype", "2:4 form")
        rows = [
            (layer.name, layer.kind, "x".join(map(str, layer.shape)), dtype_name(layer.dtype),
             f"no: {layer.why_not}" if layer.why_not else "yes")
            for layer in self.layers
        ]  # fmt: skip
        total = ("convertible", "", "", "", f"{len(self.convertible)} of {len(self.layers)} layers")
        return Cells(header, rows, totals=[total], left=range(len(header)))


def semi_structured_layers(model: nn.Module) -> SemiStructured:
    """Which weights of a model `to_semi_structured` converts, and why it does not convert the others.

    The weights are looked at as they are, on any device; no GPU is needed to ask.
    """
    check_is_module("semi_structured_layers", "model", model)
    inner = unwrapped(model)
    targets = find_weights(inner)
    layers = [_layer(inner, name, target) for name, target in targets.items()]
    # Matrices that no kind of layer names the axes of are told of too.
    known = {name for target in targets.values() for name in target.names}
    layers += [
        SemiStructuredLayer(
            name, kind_of(inner.get_submodule(name.rpartition(".")[0])), tuple(parameter.shape), parameter.dtype, False,
            why_not_two_four(inner, None),
        )
        for name, parameter in inner.named_parameters()
        if parameter.dim() > 1 and name not in known
    ]  # fmt: skip
    return SemiStructured(tuple(layers))


def to_semi_structured(model: nn.Module) -> nn.Module:
    """A copy whose 2:4 Linear weights are in torch's semi-structured form, which tensor cores multiply at up to twice
    the speed; only for inference, and in torch a prototype.

    The model is in evaluation mode on a CUDA GPU of compute capability 8.0 or newer, its weights in float16 or
    bfloat16; of a wrapper (compiled, data parallel) what is in it is copied. `semi_structured_layers` tells which
    layers are converted; of those that are 2:4 and cannot be, a UserWarning tells. Every converted layer is run on a
    random input beside the dense one; code of a model that reads a weight itself, otherwise than by F.linear, is not.
    ValueError in training mode and if no layer can be converted, RuntimeError without such a GPU and if a converted
    layer gives something else.
    """
    check_converts("to_semi_structured", model)
    inner, found = unwrapped(model), semi_structured_layers(model)
    _check_convertible(inner, found)
    if missed := [layer for layer in found.layers if layer.is_two_four and layer.why_not]:
        warnings.warn(f"to_semi_structured: 2:4, but not converted: {_reasons(missed)}", stacklevel=2)
    converted = copy.deepcopy(inner).requires_grad_(False)
    converted.zero_grad()
    for name in found.convertible:
        place = name.rpartition(".")[0]
        _convert(name, inner.get_submodule(place), converted.get_submodule(place))
    return converted


def _layer(model: nn.Module, name: str, target: NamedWeight) -> SemiStructuredLayer:
    weight = target.parameter.detach()
    if isinstance(weight, torch.sparse.SparseSemiStructuredTensor):
        return SemiStructuredLayer(name, target.kind, tuple(weight.shape), weight.dtype, True, "converted already")
    # Of fewer than four inputs, nothing would have to fall.
    blocks = not is_sharded(weight) and target.axes.get("in", 0) >= 4
    axis = list(target.axes).index("in") if blocks else 0
    is_two_four = blocks and is_nm(weight, 2, 4, axis)
    reason = why_not_two_four(model, target)
    if not reason:
        dtype = "" if weight.dtype in DTYPES else f"{dtype_name(weight.dtype)}: half precision is needed"
        reason = "; ".join(filter(None, (dtype, "" if is_two_four else _why_not_two_of_four(weight))))
    return SemiStructuredLayer(name, target.kind, tuple(weight.shape), weight.dtype, is_two_four, reason)


def _why_not_two_of_four(weight: torch.Tensor) -> str:
    broken = (weight.unflatten(1, (-1, 4)) != 0).sum(2) > 2
    return f"not 2:4: {percent(broken.double().mean().item())} of the blocks hold more than two"


def _check_convertible(model: nn.Module, found: SemiStructured) -> None:
    """ValueError if no layer can be converted, RuntimeError if it cannot be where the weights are."""
    if not found.convertible:
        raise ValueError(
            f"to_semi_structured: no layer of {type(model).__name__} can be converted: {_reasons(found.layers)}"
        )
    for name in found.convertible:
        if reason := why_no_kernels(model.get_parameter(name).device):
            raise RuntimeError(
                f"to_semi_structured: {reason}; torch multiplies 2:4 weights on CUDA GPUs of compute capability 8.0 or "
                f"newer, so move the model to one; {len(found.convertible)} of its {len(found.layers)} layers could be "
                "converted there"
            )


def why_no_kernels(device: torch.device) -> str:
    """Why 2:4 weights cannot be multiplied on a device, empty if they can."""
    if device.type != "cuda":
        return f"the weights are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if (major, minor) >= CAPABILITY else f"{device} has compute capability {major}.{minor}"


def _convert(name: str, dense: Any, layer: Any) -> None:
    """Put a Linear of the copy into the 2:4 form, and compare it with the dense one."""
    weight = dense.weight.detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype")
        try:
            converted = torch.sparse.to_sparse_semi_structured(weight.contiguous())
        except RuntimeError as error:
            raise RuntimeError(f"to_semi_structured: torch does not convert {name}: {error}") from error
        layer.weight = nn.Parameter(converted, requires_grad=False)
        # Not called, so that no hook of the model sees this.
        check_alike("to_semi_structured", name, weight, dense.bias, layer.forward)


def _reasons(layers: tuple[SemiStructuredLayer, ...] | list[SemiStructuredLayer]) -> str:
    return listed({layer.name: layer.why_not for layer in layers})
