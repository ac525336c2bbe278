"""Weights that belong to one Linear layer alone, so that another form of the matrix can replace them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .layers import NamedWeight
from .parallel import is_sharded


def why_not_linear(model: nn.Module, target: NamedWeight | None) -> str:
    """Why a weight of `model` is not only that of one Linear layer, which multiplies with it; empty if it is.

    target: None for a matrix without named axes.
    """
    if target is None:
        return "not of a Linear"
    name, module = target.owners[0]
    # Attention reads the weight of its projection out itself.
    own = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if not own or isinstance(module, NonDynamicallyQuantizableLinear):
        return "not of a Linear"
    if len({id(owner) for _, owner in target.owners}) > 1:
        return "tied"
    if target.sources:
        return "computed in each forward"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
        return "read by TransformerEncoderLayer itself"
    return "sharded" if is_sharded(target.parameter) else ""


# What torch.sparse.to_sparse_semi_structured takes with cuSPARSELt, its default on GPUs, from torch 2.6 to 2.15: both
# sides of the matrix must be multiples of 16 in these types. CUTLASS, its other way, asks for 32 x 64; int8 is of no
# use for the weight of a Linear.
SIDE = 16


def why_not_two_four(model: nn.Module, target: NamedWeight | None) -> str:
    """Why torch's 2:4 form takes no weight of this kind and shape in half precision, empty if it does.

    target: None for a matrix without named axes.
    """
    if reason := why_not_linear(model, target):
        return reason
    return f"sides not in {SIDE}s" if target and any(side % SIDE for side in target.parameter.shape) else ""
