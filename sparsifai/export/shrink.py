"""`shrink` removes what the zeros of a model make unnecessary: channels, attention heads and neurons.

`shrinkage` is the table of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.channels.connections import zero_outputs
from ..model.channels.removal import Removal
from ..model.channels.smaller_copy import SmallerCopy, named_tensors
from ..model.joint.attention import find_heads
from ..model.joint.experts import layers_of_zero_experts
from ..model.joint.joint_removal import JointRemoval, Removed
from ..model.joint.mlp import find_neurons
from ..model.joint.unit_removal import ZeroUnits, remove_all_units
from ..model.joint.wholes import without_wholes
from ..model.layers import outputs_of
from ..model.norms import check_fused_norms
from ..model.parallel import unwrapped
from ..model.tensors import check_values, with_autograd
from ..model.zeros import has_zero_slices, weights_of_embeddings
from ..support.arguments import checks_arguments
from ..support.checks import check_is_module
from ..support.warning import warn
from .pretrained_config import update_config
from .shrinkage_table import ShrinkableGroups, ShrinkableLayer, Shrinkage, first_reasons


@checks_arguments
def shrink(model: nn.Module, example_input: Any) -> nn.Module:
    """Remove filters, heads and neurons of a model that are zero: returns a smaller dense copy with the same outputs.

    Attention heads and neurons of MLPs, as of granularity 'head' and 'neuron', are removed if the weights that read
    them are zero: with their rows of all projections, their biases and their entries in tables of positions. The sizes
    that modules keep, such as num_heads, are updated. One head or neuron of each module is kept. Units of LSTM, GRU and
    RNN are removed if their weights and biases are zero, as many of each layer and direction, with the inputs of the
    layers that read them.

    A filter is removed with all that belongs to its channel: its bias, its entries in norm layers, and the weights of
    the next layers that read it. If a zero filter leaves a constant channel, the constant is added to the biases of the
    next layers. Channels that no layer reads are removed too. The copy trains like any other model, with a new
    optimizer: in a Learner, `learn.shrink()` replaces the model and makes one.

    The outputs in evaluation mode are checked: on the example, on random inputs like it, and on an input of another
    size, they differ by at most 1e-5 of the largest output (in float32, for which a model in half precision is copied
    as a whole; of other models only what is cut takes memory until the end). Branches of the forward that these inputs
    do not take are not checked.

    For filters, torch-pruning's dependency graph shows which channels belong together (Fang et al., 2023, "DepGraph",
    arXiv:2301.12900). Install it with `pip install 'sparsifai[shrink]'`.

    Args:
        model: Any torch model, which is not changed. Of a wrapper (compiled, data parallel) the model inside is copied.
        example_input: A batch that the model accepts, a tuple of several positional inputs, or a dictionary of named
            ones.

    Returns:
        The smaller copy, in the same mode and dtype as the model. A UserWarning says how many zero filters, heads and
        neurons could not be removed, whether none is zero, and whether filters could not be looked for; `shrinkage`
        lists why.

    Raises:
        ImportError: torch-pruning is not installed, and there are no heads and neurons to remove.
        TypeError: `model` is not a torch.nn.Module.
        ValueError: The model does not run on the example, has different outputs for the same input, or torch-pruning
            cannot follow its computation, and there are no heads and neurons to remove.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> _ = Sparsifier(model, 'filter', coupled=True, example_input=torch.rand(2, 3, 16, 16)).sparsify(0.5)
        >>> shrink(model, torch.rand(2, 3, 16, 16))[0]
        Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    small, table = shrunk(model, example_input)
    warn_of_zeros_left(table)
    return small


def warn_of_zeros_left(table: Shrinkage) -> None:
    """Warn of the zero filters, heads and neurons that could not be removed, if there are any, or if none is zero.

    Args:
        table: What was removed.
    """
    if table.parameters_left == table.parameters and not table.zeros and not any(row.zeros for row in table.groups):
        warn(
            "shrink: nothing is removed, because no whole filter, head, neuron, unit, block or expert is zero. Prune "
            "with such a granularity before, as Sparsifier(model, 'head') does; of single zeros, save_sparse makes "
            "smaller files"
        )
    if table.zeros_left:
        warn(
            f"shrink: {table.zeros_left} of {table.zeros} zero filters cannot be removed: {table.reasons}. "
            "shrinkage(model, example_input) lists all of them; to prune only filters that can be removed, use "
            "granularity 'filter' with coupled=True",
        )
    for what in dict.fromkeys(row.what for row in table.groups):
        rows = [row for row in table.groups if row.what == what]
        if left := sum(row.zeros_left for row in rows):
            warn(
                f"shrink: {left} of {sum(row.zeros for row in rows)} zero {what}s cannot be removed: "
                f"{first_reasons(rows)}. shrinkage(model, example_input) lists all of them"
            )
    if table.not_followed:
        warn(
            f"shrink: filters were not looked for, because {table.not_followed}; heads and neurons were removed. Zero "
            "filters remain, if there are any, and cost no more than before"
        )


@checks_arguments
def shrinkage(model: nn.Module, example_input: Any) -> Shrinkage:
    """What `shrink` would remove from each layer, and why other zero filters cannot be removed. Nothing is changed.

    Args:
        model: As for `shrink`.
        example_input: As for `shrink`.

    Returns:
        The table, one row per layer.

    Raises:
        ImportError: torch-pruning is not installed.
        TypeError: `model` is not a torch.nn.Module.
        ValueError: As for `shrink`.

    Example:
        >>> model, batch = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).eval(), torch.rand(4, 8)
        >>> Sparsifier(model, 'filter', coupled=True, example_input=batch).sparsify(0.5)
        >>> table = shrinkage(model, batch)
        >>> table.parameters, table.parameters_left
        (178, 90)
    """
    return shrunk(model, example_input)[1]


@torch.inference_mode(False)
def shrunk(model: nn.Module, example_input: Any) -> tuple[nn.Module, Shrinkage]:
    """The smaller copy of a model, as of `shrink`, and the table of what was removed."""
    check_is_module("shrink", "model", model)
    model = unwrapped(model)
    check_values("shrink", dict(model.named_parameters()))
    check_fused_norms(model)
    start, wholes = without_wholes(model, with_autograd(example_input))
    dtypes = {name: value.dtype for name, value in named_tensors(start)}
    copy = SmallerCopy(start, with_autograd(example_input))
    joint = JointRemoval(copy, (find_heads, find_neurons)).remove_all()
    rows: list[Removed | ZeroUnits] = [*wholes, *joint.rows, *remove_all_units(copy)]
    removal = Removal(copy, joint.remaining)
    not_followed = ""
    # Without zeros no channel of a transformer can be removed, and to follow it takes time.
    if not rows or has_zero_slices(copy.model):
        try:
            removal.remove_all()
        except (ImportError, ValueError) as error:
            if not any(row.removed for row in rows):
                raise
            not_followed = str(error)
    small = copy.model
    for (_, part), (_, original) in zip(small.named_modules(), start.named_modules(), strict=True):
        part.training = original.training
    shared = {_address(value) for _, value in named_tensors(model)} - {None}
    for name, value in named_tensors(small):
        # A bias that the model did not have gets the dtype of the weight beside it.
        value.data = value.data.to(dtypes.get(name, dtypes.get(f"{name.rpartition('.')[0]}.weight", value.dtype)))
        if _address(value) in shared:
            value.data = value.data.clone()
    table = _measured(removal, rows, model, start, not_followed)
    if table.parameters_left < table.parameters:
        update_config(small, [row.groups for row in joint.rows], model)
    return small, table


def _address(tensor: Tensor) -> int | None:
    """Where the values of a tensor begin; None if it has no memory of its own, as a sparse one."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided and not tensor.is_nested else None


def _measured(
    removal: Removal, rows: Sequence[Removed | ZeroUnits], model: nn.Module, start: nn.Module, not_followed: str
) -> Shrinkage:
    """The table of what has been removed from a model. start: the model without the blocks and experts removed."""
    before, after = (sum(parameter.numel() for parameter in each.parameters()) for each in (model, removal.model))
    groups = tuple(
        ShrinkableGroups(
            row.groups.name, _kind(row, model, start), row.groups.what, row.groups.count,
            len(row.zeros), len(row.removed), row.why_kept,
        )
        for row in rows
    )  # fmt: skip
    return Shrinkage(tuple(_layers(removal, start, not_followed)), before, after, groups, not_followed)


def _kind(row: Removed | ZeroUnits, model: nn.Module, start: nn.Module) -> str:
    """Class name of the module that has the groups of a row. Behind a removed block, modules have other numbers."""
    holder = model if row.groups.what in ("block", "expert") else start
    return type(holder.get_submodule(row.groups.name)).__name__


def _layers(removal: Removal, model: nn.Module, not_followed: str) -> Iterator[ShrinkableLayer]:
    """What has been removed from each layer."""
    default = "filters were not looked for" if not_followed else "layer never called, or not as a module"
    tables, experts = weights_of_embeddings(model), layers_of_zero_experts(model)
    for name, module in model.named_modules():
        if name not in removal.remaining:
            continue
        # A zero row of a table that an embedding shares, as of the token for padding, is no filter.
        is_zero = [] if module.weight in tables else zero_outputs(module)
        zeros = {output for output, is_zero in enumerate(is_zero) if is_zero}
        # Zero experts that stay are in the table as such.
        left = set() if name in experts else zeros.intersection(removal.remaining[name])
        reasons = Counter(removal.why_kept.get((name, output), default) for output in sorted(left))
        yield ShrinkableLayer(
            name,
            type(module).__name__,
            outputs_of(module),
            len(zeros),
            outputs_of(module) - len(removal.remaining[name]),
            len(left),
            "; ".join(f"{count}: {reason}" for reason, count in reasons.items()),
        )
