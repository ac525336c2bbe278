"""`shrink` removes what the zeros of a model make unnecessary: channels, attention heads and neurons.

`shrinkage` is the table of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..model.channels.connections import zero_outputs
from ..model.channels.removal import Removal
from ..model.channels.smaller_copy import SmallerCopy, named_tensors
from ..model.joint.attention import find_heads
from ..model.joint.joint_removal import JointRemoval
from ..model.joint.mlp import find_neurons
from ..model.layers import outputs_of
from ..model.norms import check_fused_norms
from ..model.parallel import unwrapped
from ..model.tensors import check_values, with_autograd
from ..model.zeros import Count, has_zero_slices
from ..support.checks import check_is_module
from ..support.table import Cells, Table, percent
from ..support.warning import warn


def shrink(model: nn.Module, example_input: Any) -> nn.Module:
    """Remove filters, heads and neurons of a model that are zero: returns a smaller dense copy with the same outputs.

    Attention heads and neurons of MLPs, as of granularity 'head' and 'neuron', are removed if the weights that read
    them are zero: with their rows of all projections, their biases and their entries in tables of positions. The sizes
    that modules keep, such as num_heads, are updated. One head or neuron of each module is kept.

    A filter is removed with all that belongs to its channel: its bias, its entries in norm layers, and the weights of
    the next layers that read it. If a zero filter leaves a constant channel, the constant is added to the biases of the
    next layers. Channels that no layer reads are removed too. The copy trains like any other model, with a new
    optimizer: in a Learner, `learn.shrink()` replaces the model and makes one.

    The outputs in evaluation mode are checked: on the example, on random inputs like it, and on an input of another
    size, they differ by at most 1e-5 of the largest output (in float32). Branches of the forward that these inputs do
    not take are not checked.

    For filters, torch-pruning's dependency graph shows which channels belong together (Fang et al., 2023, "DepGraph",
    arXiv:2301.12900). Install it with `pip install 'sparsifai[shrink]'`.

    Args:
        model: Any torch model, which is not changed. Of a wrapper (compiled, data parallel) the model inside is copied.
        example_input: A batch that the model accepts, a tuple of several positional inputs, or a dictionary of named
            ones.

    Returns:
        The smaller copy, in the same mode and dtype as the model. A UserWarning says how many zero filters, heads and
        neurons could not be removed, and whether filters could not be looked for; `shrinkage` lists why.

    Raises:
        ImportError: torch-pruning is not installed, and there are no heads and neurons to remove.
        TypeError: `model` is not a torch.nn.Module.
        ValueError: The model does not run on the example, has different outputs for the same input, or torch-pruning
            cannot follow its computation, and there are no heads and neurons to remove.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from sparsifai import Sparsifier, shrink
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> _ = Sparsifier(model, 'filter', coupled=True, example_input=torch.rand(2, 3, 16, 16)).sparsify(0.5)
        >>> shrink(model, torch.rand(2, 3, 16, 16))[0]
        Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    small, table = shrunk(model, example_input)
    warn_of_zeros_left(table)
    return small


def warn_of_zeros_left(table: Shrinkage) -> None:
    """Warn of the zero filters, heads and neurons that could not be removed, if there are any.

    Args:
        table: What was removed.
    """
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
                f"{_reasons(rows)}. shrinkage(model, example_input) lists all of them"
            )
    if table.not_followed:
        warn(
            f"shrink: filters were not looked for, because {table.not_followed}; heads and neurons were removed. Zero "
            "filters remain, if there are any, and cost no more than before"
        )


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
    """
    return shrunk(model, example_input)[1]


@torch.inference_mode(False)
def shrunk(model: nn.Module, example_input: Any) -> tuple[nn.Module, Shrinkage]:
    """The smaller copy of a model, as of `shrink`, and the table of what was removed."""
    check_is_module("shrink", "model", model)
    model = unwrapped(model)
    check_values("shrink", dict(model.named_parameters()))
    check_fused_norms(model)
    dtypes = {name: value.dtype for name, value in named_tensors(model)}
    copy = SmallerCopy(model, with_autograd(example_input))
    joint = JointRemoval(copy, (find_heads, find_neurons)).remove_all()
    removal = Removal(copy, joint.remaining)
    not_followed = ""
    # Without zeros no channel of a transformer can be removed, and to follow it takes time.
    if not joint.rows or has_zero_slices(copy.model):
        try:
            removal.remove_all()
        except (ImportError, ValueError) as error:
            if not any(row.removed for row in joint.rows):
                raise
            not_followed = str(error)
    small = copy.model
    for (_, part), (_, original) in zip(small.named_modules(), model.named_modules(), strict=True):
        part.training = original.training
    shared = {value.untyped_storage().data_ptr() for _, value in named_tensors(model)}
    for name, value in named_tensors(small):
        # A bias that the model did not have gets the dtype of the weight beside it.
        value.data = value.data.to(dtypes.get(name, dtypes.get(f"{name.rpartition('.')[0]}.weight", value.dtype)))
        if value.untyped_storage().data_ptr() in shared:
            value.data = value.data.clone()
    return small, _measured(removal, joint, model, not_followed)


@dataclass(frozen=True)
class ShrinkableLayer:
    """What `shrink` removes from one layer.

    Attributes:
        name: Name of the layer.
        kind: Class name of the layer.
        outputs: Number of outputs in the given model.
        zeros: Outputs whose weights are all zero.
        removed: Outputs that are removed, whether their weights are zero or not.
        zeros_left: Outputs whose weights are all zero, but that cannot be removed.
        why: How many of these for which reason, such as '2: not constant where conv2 reads it'.
    """

    name: str
    kind: str
    outputs: int
    zeros: int
    removed: int
    zeros_left: int
    why: str = ""


@dataclass(frozen=True)
class ShrinkableGroups:
    """What `shrink` removes of the heads of one attention, or of the neurons of one MLP.

    Attributes:
        name: Name of the module.
        kind: Class name of the module.
        what: 'head' or 'neuron'.
        count: Number of heads or neurons in the given model; of grouped queries, of key-value heads.
        zeros: Those without effect, because the weights that read them are zero.
        removed: Those that are removed.
        why: Why the others without effect cannot be removed.
    """

    name: str
    kind: str
    what: str
    count: int
    zeros: int
    removed: int
    why: str = ""

    @property
    def zeros_left(self) -> int:
        """Those without effect that cannot be removed."""
        return self.zeros - self.removed


@dataclass(frozen=True, repr=False)
class Shrinkage(Table):
    """What `shrink` removes from a model. Prints as a table; in a notebook it is HTML.

    Attributes:
        layers: One row per convolution or Linear layer, in the order of the model.
        parameters: Number of parameters of the whole model before.
        parameters_left: Number of parameters of the whole model after.
        groups: One row for the heads of each attention and the neurons of each MLP.
        not_followed: Why filters were not looked for; mostly empty.
    """

    layers: tuple[ShrinkableLayer, ...]
    parameters: int
    parameters_left: int
    groups: tuple[ShrinkableGroups, ...] = ()
    not_followed: str = ""

    @property
    def zeros(self) -> int:
        """Outputs of all layers whose weights are all zero."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def removed(self) -> int:
        """Outputs of all layers that are removed."""
        return sum(layer.removed for layer in self.layers)

    @property
    def zeros_left(self) -> int:
        """Outputs of all layers whose weights are all zero, but that cannot be removed."""
        return sum(layer.zeros_left for layer in self.layers)

    @property
    def reasons(self) -> str:
        """The first three layers with zero outputs that cannot be removed, each with the reasons."""
        return _reasons(self.layers)

    def _cells(self) -> Cells:
        share = Count(self.parameters, self.parameters - self.parameters_left).sparsity
        rows = [("filter", layer.outputs, layer) for layer in self.layers]
        rows += [(groups.what, groups.count, groups) for groups in self.groups]
        totals = []
        for what in dict.fromkeys(what for what, _, _ in rows):
            of_kind = [(count, row.zeros, row.removed, row.zeros_left) for each, count, row in rows if each == what]
            totals.append((f"all {what}s", "", "", *_figures(*map(sum, zip(*of_kind, strict=True))), ""))
        caption = f"{self.parameters:,} parameters, {self.parameters_left:,} after: {percent(share)} removed"
        if self.not_followed:
            caption += f"\nfilters were not looked for: {self.not_followed}"
        return Cells(
            ("layer", "kind", "what", "number", "zero", "removed", "zero left", "why"),
            [
                (row.name, row.kind, what, *_figures(count, row.zeros, row.removed, row.zeros_left), row.why)
                for what, count, row in rows
            ],
            totals=totals,
            left=(0, 1, 2, 7),
            caption=caption,
        )


def _reasons(rows: Sequence[ShrinkableLayer | ShrinkableGroups]) -> str:
    """The first three rows with zeros that cannot be removed, each with the reasons."""
    left = [f"{row.name} ({row.why})" for row in rows if row.zeros_left]
    return "; ".join(left[:3]) + (f"; and {len(left) - 3} more layers" if len(left) > 3 else "")


def _figures(*numbers: int) -> tuple[str, ...]:
    return tuple(f"{number:,}" for number in numbers)


def _measured(removal: Removal, joint: JointRemoval, model: nn.Module, not_followed: str) -> Shrinkage:
    """The table of what has been removed from a model."""
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, removal.model)]
    groups = tuple(
        ShrinkableGroups(
            row.groups.name, type(model.get_submodule(row.groups.name)).__name__, row.groups.what, row.groups.count,
            len(row.zeros), len(row.removed), row.why_kept,
        )
        for row in joint.rows
    )  # fmt: skip
    return Shrinkage(tuple(_layers(removal, model)), *sizes, groups, not_followed)


def _layers(removal: Removal, model: nn.Module) -> Iterator[ShrinkableLayer]:
    """What has been removed from each layer."""
    for name, module in model.named_modules():
        if name not in removal.remaining:
            continue
        zeros = {output for output, is_zero in enumerate(zero_outputs(module)) if is_zero}
        left = zeros.intersection(removal.remaining[name])
        reasons = Counter(
            removal.why_kept.get((name, output), "layer never called, or not as a module") for output in sorted(left)
        )
        yield ShrinkableLayer(
            name,
            type(module).__name__,
            outputs_of(module),
            len(zeros),
            outputs_of(module) - len(removal.remaining[name]),
            len(left),
            "; ".join(f"{count}: {reason}" for reason, count in reasons.items()),
        )
