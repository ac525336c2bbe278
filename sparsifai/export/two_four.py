"""Linear layers on a GPU with 2:4 weights: two zeros in every four inputs, of which tensor cores skip the products."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..axes.n_of_m import is_nm
from ..model.layers import NamedWeight, find_weights
from ..model.linear import why_not_two_four
from ..model.parallel import is_sharded, kind_of, unwrapped
from ..model.running import copy_of
from ..model.tensors import check_values, shape_of
from ..model.zeros import is_nonzero, why_not_plain
from ..support.arguments import checks_arguments
from ..support.checks import check_is_module
from ..support.printable import printable
from ..support.table import Column, Table, percent
from ..support.warning import own_filters, warn
from .conversion import check_for_inference, check_same_outputs, dtype_name, list_reasons

# The dtypes that torch's 2:4 kernels multiply floats in.
DTYPES = (torch.float16, torch.bfloat16)


# The oldest compute capability that has 2:4 kernels.
CAPABILITY = (8, 0)


@dataclass(frozen=True)
class SemiStructuredLayer:
    """One weight, and whether `to_semi_structured` converts it.

    Attributes:
        name: Name of the weight.
        kind: Class name of the layer.
        shape: Shape of the weight.
        dtype: Dtype of the weight.
        is_two_four: Whether at most two of every four inputs have nonzero weights.
        why_not: Why the weight is not converted, empty if it is.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_two_four: bool
    why_not: str = ""


@dataclass(frozen=True, repr=False)
class SemiStructured(Table):
    """Which weights `to_semi_structured` converts. Prints as a table; in a notebook it is HTML.

    Attributes:
        layers: One row per matrix of the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(32, 64)).half()
        >>> Sparsifier(model, context='2:4').sparsify(0.5)
        >>> semi_structured_layers(model).convertible
        ('0.weight',)
    """

    layers: tuple[SemiStructuredLayer, ...]

    @property
    def convertible(self) -> tuple[str, ...]:
        """Names of the weights that can be converted on a GPU."""
        return tuple(layer.name for layer in self.layers if not layer.why_not)

    def _records(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": layer.name,
                "kind": layer.kind,
                "shape": layer.shape,
                "dtype": dtype_name(layer.dtype),
                "is_two_four": layer.is_two_four,
                "convertible": not layer.why_not,
                "why_not": layer.why_not,
            }
            for layer in self.layers
        ]

    def _columns(self) -> tuple[Column, ...]:
        texts = [Column(name, left=True) for name in ("layer", "kind", "shape", "dtype")]
        return (*texts, Column("convertible", "2:4 form", left=True), Column("why_not", left=True, remark=True))

    def _totals(self) -> list[dict[str, Any]]:
        return [{"layer": f"convertible of {len(self.layers):,}", "convertible": len(self.convertible)}]


@checks_arguments
def semi_structured_layers(model: nn.Module) -> SemiStructured:
    """List which weights of a model `to_semi_structured` converts, and why it does not convert the others.

    This needs no GPU: the weights are looked at in their present dtype, on any device.

    Args:
        model: Any torch model, also in a wrapper (compiled, data parallel).

    Returns:
        The table, one row per matrix.

    Raises:
        TypeError: `model` is not a torch.nn.Module.

    Example:
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> _ = Sparsifier(model, context='2:4').sparsify(0.5)
        >>> semi_structured_layers(model.half()).convertible
        ('0.weight',)
    """
    check_is_module("semi_structured_layers", "model", model)
    inner = unwrapped(model)
    check_values("semi_structured_layers", dict(inner.named_parameters()))
    weights = find_weights(inner)
    layers = [_layer(inner, name, weight) for name, weight in weights.items()]
    # Matrices of layers whose axes have no names are listed too.
    known = {name for weight in weights.values() for name in weight.names}
    layers += [
        SemiStructuredLayer(
            name, kind_of(inner.get_submodule(name.rpartition(".")[0])), shape_of(parameter), parameter.dtype, False,
            why_not_two_four(inner, None),
        )
        for name, parameter in inner.named_parameters()
        if parameter.dim() > 1 and name not in known
    ]  # fmt: skip
    return SemiStructured(tuple(layers))


@checks_arguments
def to_semi_structured(model: nn.Module) -> nn.Module:
    """Copy a model for inference on a GPU, with its 2:4 Linear weights in torch's semi-structured form.

    Tensor cores skip half of the products with these weights, which is at most twice as fast. The form is a prototype
    in torch. `semi_structured_layers` lists which layers are converted. Every converted layer is checked on a random
    input. Code of the model that reads a weight without calling its layer is not checked.

    Args:
        model: A model in evaluation mode, on a CUDA GPU of compute capability 8.0 or newer, with weights in float16 or
            bfloat16. It is not changed. Of a wrapper (compiled, data parallel) the model inside is copied.

    Returns:
        The copy. It cannot be trained. A UserWarning lists the layers that are 2:4 but cannot be converted.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: The model is in training mode, or no layer can be converted.
        RuntimeError: The model is not on such a GPU, or a converted layer has other outputs.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64)).half()
        >>> Sparsifier(model, context='2:4').sparsify(0.5)
        >>> if torch.cuda.is_available():
        ...     fast = to_semi_structured(model.cuda())
    """
    check_for_inference("to_semi_structured", model)
    inner, found = unwrapped(model), semi_structured_layers(model)
    _check_convertible(inner, found)
    if missed := [layer for layer in found.layers if layer.is_two_four and layer.why_not]:
        warn(f"to_semi_structured: these layers are 2:4, but cannot be converted: {_reasons(missed)}")
    converted = copy_of(inner).requires_grad_(False)
    converted.zero_grad()
    for name in found.convertible:
        layer_name = name.rpartition(".")[0]
        _convert(name, inner.get_submodule(layer_name), converted.get_submodule(layer_name))
    return converted


def _layer(model: nn.Module, name: str, named: NamedWeight) -> SemiStructuredLayer:
    weight = named.parameter.detach()
    if isinstance(weight, torch.sparse.SparseSemiStructuredTensor):
        return SemiStructuredLayer(name, named.kind, tuple(weight.shape), weight.dtype, True, "already converted")
    if why := why_not_plain(weight):
        return SemiStructuredLayer(name, named.kind, tuple(weight.shape), weight.dtype, False, why)
    # With fewer than four inputs every weight would count as 2:4.
    has_blocks = not is_sharded(weight) and named.axes.get("in", 0) >= 4
    axis = list(named.axes).index("in") if has_blocks else 0
    is_two_four = has_blocks and is_nm(weight, 2, 4, axis)
    reason = why_not_two_four(model, named)
    if not reason:
        dtype = "" if weight.dtype in DTYPES else f"{dtype_name(weight.dtype)}: half precision is needed"
        reason = "; ".join(filter(None, (dtype, "" if is_two_four else _share_of_other_blocks(weight))))
    return SemiStructuredLayer(name, named.kind, tuple(weight.shape), weight.dtype, is_two_four, reason)


def _share_of_other_blocks(weight: torch.Tensor) -> str:
    """The share of blocks that are not 2:4, as a reason."""
    has_more = is_nonzero(weight).unflatten(1, (-1, 4)).sum(2) > 2
    return f"not 2:4: {percent(has_more.double().mean().item())} of the blocks have more than two nonzero weights"


def _check_convertible(model: nn.Module, found: SemiStructured) -> None:
    """Check that there is a layer to convert, and that the GPU has kernels for it."""
    if not found.convertible:
        raise ValueError(
            f"to_semi_structured: no layer of {type(model).__name__} can be converted: {_reasons(found.layers)}"
        )
    for name in found.convertible:
        if reason := why_no_kernels(model.get_parameter(name).device):
            raise RuntimeError(
                f"to_semi_structured: {reason}, but torch multiplies 2:4 weights only on CUDA GPUs of compute "
                f"capability 8.0 or newer; move the model to one, where {len(found.convertible)} of its "
                f"{len(found.layers)} layers can be converted"
            )


def why_no_kernels(device: torch.device) -> str:
    """Why 2:4 weights cannot be multiplied on a device, empty if they can."""
    if device.type != "cuda":
        return f"the weights are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if (major, minor) >= CAPABILITY else f"{device} has compute capability {major}.{minor}"


def _convert(name: str, dense: Any, layer: Any) -> None:
    """Convert a Linear layer of the copy, and check it against the dense one."""
    weight = dense.weight.detach()
    with own_filters():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype")
        try:
            converted = torch.sparse.to_sparse_semi_structured(weight.contiguous())
        except RuntimeError as error:
            raise RuntimeError(
                f"to_semi_structured: torch cannot convert {printable(name)}: {printable(str(error))}"
            ) from error
        layer.weight = nn.Parameter(converted, requires_grad=False)
        # `forward` is used instead of a call, so that no hook of the model runs.
        check_same_outputs("to_semi_structured", name, weight, dense.bias, layer.forward)


def _reasons(layers: Iterable[SemiStructuredLayer]) -> str:
    return list_reasons({layer.name: layer.why_not for layer in layers})
