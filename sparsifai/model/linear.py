"""Which weights are the matrix of exactly one Linear layer, so that a sparse form of the matrix can replace them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .layers import NamedWeight
from .parallel import is_sharded


def why_not_linear(model: nn.Module, target: NamedWeight | None) -> str:
    """Return why a weight is not the matrix of exactly one Linear layer.

    Args:
        model: The model.
        target: The weight; None for a matrix without named axes.

    Returns:
        The reason, empty if the weight is the matrix of one Linear layer.
    """
    if target is None:
        return "not a Linear weight"
    name, module = target.owners[0]
    is_plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    # MultiheadAttention uses the weight of its output projection without calling that layer.
    if not is_plain or isinstance(module, NonDynamicallyQuantizableLinear):
        return "not a Linear weight"
    if len({id(owner) for _, owner in target.owners}) > 1:
        return "tied"
    if target.sources:
        return "computed in each forward"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
        return "used directly by TransformerEncoderLayer"
    return "sharded" if is_sharded(target.parameter) else ""


# torch.sparse.to_sparse_semi_structured uses cuSPARSELt by default on GPUs. From torch 2.6 to 2.15 it requires that
# both sides of a matrix in half precision are multiples of 16. The alternative, CUTLASS, requires 32 x 64.
SIDE = 16


def why_not_two_four(model: nn.Module, target: NamedWeight | None) -> str:
    """Return why a weight cannot have torch's 2:4 form in half precision, judged by its kind and shape.

    Args:
        model: The model.
        target: The weight; None for a matrix without named axes.

    Returns:
        The reason, empty if it can have that form.
    """
    if reason := why_not_linear(model, target):
        return reason
    return f"sides not multiples of {SIDE}" if target and any(side % SIDE for side in target.parameter.shape) else ""
