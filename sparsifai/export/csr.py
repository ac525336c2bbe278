"""CSR on a CPU: Linear weights that are mostly zeros, of which only the others are stored and multiplied with."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model.layers import NamedWeight, find_weights
from ..model.linear import why_not_linear
from ..model.parallel import unwrapped
from ..model.zeros import Count
from ..support.checks import check_fraction
from ..support.table import percent
from .conversion import check_alike, check_converts, dtype_name, listed

# As measured by `python -m benchmarks --section layouts`: with fewer weights little or nothing is gained.
WEIGHTS = 2**20


class CSRLinear(nn.Module):
    """y = x W^T + b with the non-zeros of W as CSR (compressed sparse rows), for inference.

    weight: (out, in), bias: (out) or None, as of nn.Linear.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            sparse = weight.to_sparse_csr()
        # Three tensors, as one in this layout cannot be copied or moved with its module. Indices of 32 bits are read
        # in half the time.
        self.register_buffer("rows", sparse.crow_indices().int())
        self.register_buffer("columns", sparse.col_indices().int())
        self.register_buffer("values", sparse.values())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """As a sparse tensor, for code that asks a layer for the dtype or the device of its weight."""
        shape = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(self.rows, self.columns, self.values, shape, check_invariants=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """As nn.Linear."""
        weight = self.weight
        several = inputs.reshape(-1, self.in_features)
        bias = several.new_zeros(self.out_features) if self.bias is None else self.bias
        if len(several) == 1:
            outputs = torch.addmv(bias, weight, several[0])
        else:
            # The other way round, F.linear takes up to four times as long.
            outputs = torch.addmm(bias[:, None], weight, several.t()).t().contiguous()
        return outputs.reshape(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As of nn.Linear, with the weights that are stored."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, stored={len(self.values)}"


def to_sparse_layout(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    """A copy for the CPU whose Linear layers with at least so many zeros are stored and multiplied as CSR.

    Zeros need no structure. Measured on one thread with batches of 1 to 64, a layer of 2048 x 2048 takes 0.35 to 0.7
    of the time of the dense one at 80 % zeros, 0.25 to 0.45 at 90 %, 0.15 to 0.35 at 95 %, but 0.9 to 1.5 at 50 %; one
    of 1024 x 1024 0.5 to 0.95 at 80 %, 0.4 to 0.8 at 90 %; a batch of one gains least.
    Only for inference: the model is in evaluation mode, its weights in float32; of a wrapper (compiled, data parallel)
    what is in it is copied. Layers of fewer than 1024 x 1024 weights, convolutions, and weights that others read too
    stay dense. Every converted layer is run on a random input beside the dense one.
    ValueError in training mode and if no layer can be converted, RuntimeError on a GPU, without MKL, and if a converted
    layer gives something else.
    """
    check_converts("to_sparse_layout", model)
    inner, least = unwrapped(model), check_fraction(sparsity)
    targets = find_weights(inner)
    why_dense = {name: _why_dense(inner, target, least) for name, target in targets.items()}
    chosen = [target for name, target in targets.items() if not why_dense[name]]
    if not chosen:
        raise ValueError(f"to_sparse_layout: no layer of {type(inner).__name__} can be converted: {listed(why_dense)}")
    _check_kernels(chosen)
    converted = copy.deepcopy(inner).requires_grad_(False)
    converted.zero_grad()
    for target in chosen:
        weight, bias = target.parameter.detach(), target.module.bias
        layer = CSRLinear(weight, bias).train(False)  # type: ignore[arg-type]
        check_alike("to_sparse_layout", target.name, weight, bias, layer)  # type: ignore[arg-type]
        for name, _ in target.owners:
            converted = _put(converted, name, layer)
    return converted


def _why_dense(model: nn.Module, target: NamedWeight, least: float) -> str:
    """Why a weight stays dense, empty if it does not."""
    if reason := why_not_linear(model, target):
        return reason
    if target.module._forward_hooks or target.module._forward_pre_hooks:
        return "has hooks"
    weight = target.parameter
    if weight.dtype != torch.float32:
        return f"{dtype_name(weight.dtype)}: float32 is needed"
    if weight.numel() < WEIGHTS:
        return f"fewer than {WEIGHTS:,} weights"
    found = Count.of(weight)
    # Of N weights, s x N is rounded when they are made sparse.
    return f"{percent(found.sparsity)} zeros" if found.zeros < math.floor(least * found.weights) else ""


def _check_kernels(targets: Sequence[NamedWeight]) -> None:
    """RuntimeError if torch does not multiply with CSR where the weights are."""
    if devices := {target.parameter.device.type for target in targets} - {"cpu"}:
        raise RuntimeError(f"to_sparse_layout: weights are on {', '.join(sorted(devices))}; move the model to the CPU")
    if not torch.backends.mkl.is_available():
        raise RuntimeError("to_sparse_layout: this torch is built without MKL, which multiplies with CSR")


def _put(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """The model with another layer in the place of a name."""
    if not name:
        return layer
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
    return model
