"""Linear layers on a CPU that store and multiply only the weights that are not zero, as CSR."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model.layers import NamedWeight, find_weights
from ..model.linear import why_not_linear
from ..model.parallel import unwrapped
from ..model.running import copy_of
from ..model.zeros import Count, why_not_plain
from ..support.arguments import checks_arguments
from ..support.checks import check_fraction
from ..support.table import percent
from ..support.warning import own_filters
from .conversion import check_for_inference, check_same_outputs, dtype_name, list_reasons

# Fewest weights of a layer that is converted: smaller layers gain little or nothing, as
# `python -m benchmarks --section layouts` measures.
WEIGHTS = 2**20


class CSRLinear(nn.Module):
    """A Linear layer, y = x W^T + b, that stores W as CSR (compressed sparse rows). For inference only.

    Args:
        weight: The dense weight (out, in).
        bias: The bias (out), or None.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        with own_filters():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            sparse = weight.to_sparse_csr()
        # Three buffers, because a module cannot be copied or moved with one CSR tensor. 32-bit indices take half the
        # time of 64-bit ones to read.
        self.register_buffer("rows", sparse.crow_indices().int())
        self.register_buffer("columns", sparse.col_indices().int())
        self.register_buffer("values", sparse.values())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight as a sparse tensor (out, in), for code that reads its dtype or device."""
        shape = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(self.rows, self.columns, self.values, shape, check_invariants=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs (..., out) for inputs (..., in)."""
        weight = self.weight
        several = inputs.reshape(-1, self.in_features)
        bias = several.new_zeros(self.out_features) if self.bias is None else self.bias
        if len(several) == 1:
            outputs = torch.addmv(bias, weight, several[0])
        else:
            # F.linear with this weight takes up to four times as long.
            outputs = torch.addmm(bias[:, None], weight, several.t()).t().contiguous()
        return outputs.reshape(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The arguments of nn.Linear, and the number of stored weights."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, stored={len(self.values)}"


@checks_arguments
def to_sparse_layout(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    """Copy a model for inference on a CPU, with its large sparse Linear layers stored and multiplied as CSR.

    The zeros may be anywhere in the weight. These layers stay dense: layers with fewer than 1024 x 1024 weights or too
    few zeros, convolutions, and layers that share their weight with another layer. Every converted layer is checked on
    a random input.

    The time of a converted layer relative to the dense one, measured on one thread with batches of 1 to 64 (a batch of
    one gains least):

    - 2048 x 2048: 0.9 to 1.5 at 50 % zeros, 0.35 to 0.7 at 80 %, 0.25 to 0.45 at 90 %, 0.15 to 0.35 at 95 %
    - 1024 x 1024: 0.5 to 0.95 at 80 % zeros, 0.4 to 0.8 at 90 %

    Args:
        model: A model in evaluation mode, on a CPU, with weights in float32. It is not changed. Of a wrapper (compiled,
            data parallel) the model inside is copied.
        sparsity: Smallest fraction of zeros, from 0 to 1, of a layer that is converted; default 0.8.

    Returns:
        The copy. It cannot be trained.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: The model is in training mode, or no layer can be converted.
        RuntimeError: The weights are not on a CPU, torch is built without MKL, or a converted layer has other outputs.

    Example:
        >>> model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)).eval()
        >>> _ = Sparsifier(model, context='local', layers='0').sparsify(0.9)
        >>> to_sparse_layout(model)[0]
        CSRLinear(in_features=1024, out_features=1024, bias=True, stored=104858)
    """
    check_for_inference("to_sparse_layout", model)
    inner, least = unwrapped(model), check_fraction(sparsity)
    weights = find_weights(inner)
    why_dense = {name: _why_dense(inner, weight, least) for name, weight in weights.items()}
    chosen = [weight for name, weight in weights.items() if not why_dense[name]]
    if not chosen:
        raise ValueError(
            f"to_sparse_layout: no layer of {type(inner).__name__} can be converted: {list_reasons(why_dense)}"
        )
    _check_device(chosen)
    converted = copy_of(inner).requires_grad_(False)
    converted.zero_grad()
    for named in chosen:
        weight, bias = named.parameter.detach(), named.module.bias
        layer = CSRLinear(weight, bias).train(False)  # type: ignore[arg-type]
        check_same_outputs("to_sparse_layout", named.name, weight, bias, layer)  # type: ignore[arg-type]
        for name, _ in named.owners:
            converted = _replace_layer(converted, name, layer)
    return converted


def _why_dense(model: nn.Module, named: NamedWeight, least: float) -> str:
    """Why a weight stays dense, empty if it is converted."""
    if reason := why_not_linear(model, named):
        return reason
    if named.module._forward_hooks or named.module._forward_pre_hooks:
        return "has hooks"
    weight = named.parameter
    if weight.dtype != torch.float32:
        return f"{dtype_name(weight.dtype)}: float32 is needed"
    if weight.numel() < WEIGHTS:
        return f"fewer than {WEIGHTS:,} weights"
    if not weight.is_meta and (why := why_not_plain(weight)):
        return why
    found = Count.of(weight)
    # A layer pruned to the sparsity s has s x N zeros rounded to a whole number, perhaps down.
    return f"{percent(found.sparsity)} zeros" if found.zeros < math.floor(least * found.weights) else ""


def _check_device(weights: Sequence[NamedWeight]) -> None:
    """Check that torch can multiply with CSR where the weights are."""
    if devices := {named.parameter.device.type for named in weights} - {"cpu"}:
        raise RuntimeError(
            f"to_sparse_layout: the weights are on {', '.join(sorted(devices))}; move the model to the CPU first"
        )
    if not torch.backends.mkl.is_available():
        raise RuntimeError("to_sparse_layout: this torch is built without MKL, which is needed to multiply with CSR")


def _replace_layer(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """The model with another layer under a name; for the empty name, the layer itself."""
    if not name:
        return layer
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
    return model
