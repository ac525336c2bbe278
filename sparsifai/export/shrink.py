"""`shrink` removes the channels of a model that its zeros make unnecessary; `shrinkage` is the table of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..model.channels.connections import zero_outputs
from ..model.channels.removal import Removal, named_tensors
from ..model.layers import outputs_of
from ..model.norms import check_fused_norms
from ..model.parallel import unwrapped
from ..model.tensors import check_values, with_autograd
from ..model.zeros import Count
from ..support.checks import check_is_module
from ..support.table import Cells, Table, percent
from ..support.warning import warn


def shrink(model: nn.Module, example_input: Any) -> nn.Module:
    """Remove the filters of a model that are zero: returns a smaller dense copy with the same outputs.

    A filter is removed with all that belongs to its channel: its bias, its entries in norm layers, and the weights of
    the next layers that read it. If a zero filter leaves a constant channel, the constant is added to the biases of the
    next layers. Channels that no layer reads are removed too. The copy trains like any other model, with a new
    optimizer: in a Learner, `learn.shrink()` replaces the model and makes one.

    The outputs in evaluation mode are checked: on the example, on random inputs like it, and on an input of another
    size, they differ by at most 1e-5 of the largest output (in float32). Branches of the forward that these inputs do
    not take are not checked.

    torch-pruning's dependency graph shows which channels belong together (Fang et al., 2023, "DepGraph",
    arXiv:2301.12900). Install it with `pip install 'sparsifai[shrink]'`.

    Args:
        model: Any torch model, which is not changed. Of a wrapper (compiled, data parallel) the model inside is copied.
        example_input: A batch that the model accepts, a tuple of several positional inputs, or a dictionary of named
            ones.

    Returns:
        The smaller copy, in the same mode and dtype as the model. A UserWarning says how many zero filters could not be
        removed; `shrinkage` lists why.

    Raises:
        ImportError: torch-pruning is not installed.
        TypeError: `model` is not a torch.nn.Module.
        ValueError: The model does not run on the example, has different outputs for the same input, or torch-pruning
            cannot follow its computation.

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
    """Warn of the zero filters that could not be removed, if there are any.

    Args:
        table: What was removed.
    """
    if table.zeros_left:
        warn(
            f"shrink: {table.zeros_left} of {table.zeros} zero filters cannot be removed: {table.reasons}. "
            "shrinkage(model, example_input) lists all of them; to prune only filters that can be removed, use "
            "granularity 'filter' with coupled=True",
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
    removal = Removal(model, with_autograd(example_input)).remove_all()
    small = removal.model
    for (_, part), (_, original) in zip(small.named_modules(), model.named_modules(), strict=True):
        part.training = original.training
    for name, value in named_tensors(small):
        # A bias that the model did not have gets the dtype of the weight beside it.
        value.data = value.data.to(dtypes.get(name, dtypes.get(f"{name.rpartition('.')[0]}.weight", value.dtype)))
    return small, _measured(removal, model)


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


@dataclass(frozen=True, repr=False)
class Shrinkage(Table):
    """What `shrink` removes from a model. Prints as a table; in a notebook it is HTML.

    Attributes:
        layers: One row per convolution or Linear layer, in the order of the model.
        parameters: Number of parameters of the whole model before.
        parameters_left: Number of parameters of the whole model after.
    """

    layers: tuple[ShrinkableLayer, ...]
    parameters: int
    parameters_left: int

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
        left = [f"{layer.name} ({layer.why})" for layer in self.layers if layer.zeros_left]
        return "; ".join(left[:3]) + (f"; and {len(left) - 3} more layers" if len(left) > 3 else "")

    def _cells(self) -> Cells:
        outputs = sum(layer.outputs for layer in self.layers)
        share = Count(self.parameters, self.parameters - self.parameters_left).sparsity
        return Cells(
            ("layer", "kind", "outputs", "zero filters", "removed", "zero filters left", "why"),
            [
                (layer.name, layer.kind,
                 *_figures(layer.outputs, layer.zeros, layer.removed, layer.zeros_left), layer.why)
                for layer in self.layers
            ],
            totals=[("all layers", "", *_figures(outputs, self.zeros, self.removed, self.zeros_left), "")],
            left=(0, 1, 6),
            caption=f"{self.parameters:,} parameters, {self.parameters_left:,} after: {percent(share)} removed",
        )  # fmt: skip


def _figures(*numbers: int) -> tuple[str, ...]:
    return tuple(f"{number:,}" for number in numbers)


def _measured(removal: Removal, model: nn.Module) -> Shrinkage:
    """The table of what has been removed from a model."""
    layers = []
    for name, module in model.named_modules():
        if name not in removal.remaining:
            continue
        zeros = {output for output, is_zero in enumerate(zero_outputs(module)) if is_zero}
        left = zeros.intersection(removal.remaining[name])
        reasons = Counter(
            removal.why_kept.get((name, output), "layer never called, or not as a module") for output in sorted(left)
        )
        layers.append(
            ShrinkableLayer(
                name,
                type(module).__name__,
                outputs_of(module),
                len(zeros),
                outputs_of(module) - len(removal.remaining[name]),
                len(left),
                "; ".join(f"{count}: {reason}" for reason, count in reasons.items()),
            )
        )
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, removal.model)]
    return Shrinkage(tuple(layers), *sizes)
