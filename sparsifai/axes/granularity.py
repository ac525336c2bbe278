"""How: granularities. A granularity says which weights share one mask value, for example all weights of a filter.

A granularity is a function. It is given the axes of a layer's weight, a dictionary from name to size such as
{'out': 64, 'in': 3, 'h': 7, 'w': 7}, and returns the names of the axes that index the mask. The weights that share one
mask value are a group; a group spans all other axes. `filter` returns ('out',): one mask value per output filter.

A granularity may also return a dictionary from axis to the extent of a group, which is the number of places that a
group covers along this axis. {'out': 64} makes groups of 64 filters, and {'out': 4, 'in': 4} makes tiles of 4 x 4.

A granularity of your own is such a function. Pass the function itself:

>>> from torch import nn
>>> from sparsifai import Sparsifier
>>> def filter_pairs(axes):
...     return {'out': 2}
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
>>> sparsifier = Sparsifier(model, granularity=filter_pairs, layers='0')
>>> sparsifier.sparsify(0.5)
>>> int((~sparsifier.masks['0.weight']).sum())  # 2 of the 4 pairs are pruned
4

With `@granularities.register` above its `def`, granularity='filter_pairs' means the same. `Grouping` in grouping.py is
the result for one weight: it pools scores into groups and turns one bool per group into a mask.

A joint granularity makes groups of weights of several layers, such as all weights of an attention head. It is a
function of the model, without wrappers, that returns its `JointGroups`, and is registered with joint=True. If it has a
parameter example_input, it is given the batch that the Sparsifier was made with, or None.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..model.joint.attention import find_heads
from ..model.joint.blocks import find_blocks
from ..model.joint.experts import find_experts
from ..model.joint.groups import JointGroups
from ..model.joint.mlp import find_neurons
from ..model.joint.recurrent import find_units
from ..support.arguments import checks_arguments
from ..support.registry import Registry

# Axis name -> size, in the order of the weight's shape.
Axes = Mapping[str, int]

Granularity = Callable[[Axes], Iterable[str] | Mapping[str, int]]


def along(*axes: str) -> Granularity:
    """Make the granularity whose mask is indexed by `axes`; a group of weights spans all other axes.

    A tuple means the same: granularity=('out', 'h') is granularity=along('out', 'h').

    Args:
        *axes: Names of axes of a weight: 'out', 'in', 'd', 'h', 'w', or those that `register_layer` was given. No axis
            at all makes each layer one group.

    Returns:
        The granularity, a function of the axes of a weight.

    Raises:
        TypeError: The name of an axis is not a string.

    Example:
        >>> along('out', 'h')({'out': 8, 'in': 4, 'h': 3, 'w': 3})
        ('out', 'h')
    """
    if not all(isinstance(axis, str) for axis in axes):
        raise TypeError(f"granularity {axes!r}: name the axes, as in ('out', 'h')")
    return _Along(axes, f"({', '.join(axes)})")


@dataclass(frozen=True)
class _Along:
    # The granularity whose mask is indexed by some axes; a group spans all others. It is a class, because a function
    # that is defined within another cannot be pickled.
    indexed: tuple[str, ...]
    __name__: str

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        if not self.indexed:
            return "The whole layer is one group."
        return f"The mask is indexed by ({', '.join(self.indexed)})."

    def __call__(self, axes: Axes) -> tuple[str, ...]:
        return self.indexed


@checks_arguments
def block(rows: int, columns: int) -> Granularity:
    """Make the granularity of tiles: a group is `rows` outputs by `columns` inputs.

    The name '4x4' means block(4, 4). In a convolution every place of the kernel has tiles of its own. At the end of an
    axis that the tile does not divide, a tile is smaller.

    Args:
        rows: Number of outputs in a tile, at least 1.
        columns: Number of inputs in a tile, at least 1.

    Returns:
        The granularity, a function of the axes of a weight.

    Raises:
        ValueError: `rows` or `columns` is not a whole number of at least 1.

    Example:
        >>> block(4, 2)({'out': 8, 'in': 6})
        {'out': 4, 'in': 2}
    """
    for extent in (rows, columns):
        if isinstance(extent, bool) or not isinstance(extent, int) or extent < 1:
            raise ValueError(f"block: rows and columns must be whole numbers of at least 1, not {extent!r}")
    return _Block(rows, columns, f"{rows}x{columns}")


@dataclass(frozen=True)
class _Block:
    """The granularity of tiles; a class, so that it can be pickled."""

    rows: int
    columns: int
    __name__: str

    def __call__(self, axes: Axes) -> dict[str, int]:
        return {axis: {"out": self.rows, "in": self.columns}.get(axis, 1) for axis in {"out": 0, "in": 0, **axes}}


def _parse(value: Any) -> Granularity | None:
    """The granularity that '4x4' or a tuple of axes means; None for what is a name or a function.

    Raises:
        TypeError: It is a number.
    """
    if isinstance(value, (int, float)):
        raise TypeError(
            f"granularity {value} is a number; if it is the sparsity, pass it to sparsify: "
            f"Sparsifier(model).sparsify({value})"
        )
    if isinstance(value, str) and (tile := re.fullmatch(r"(\d+)x(\d+)", value)):
        return block(int(tile[1]), int(tile[2]))
    return along(*value) if isinstance(value, (tuple, list)) else None


granularities = Registry(
    "granularity",
    parse=_parse,
    forms=("tiles such as '4x4'", "a tuple of axes such as ('out', 'in')"),
    capabilities=("joint",),
)
"""The granularities by name. `granularities.register` adds a function of the axes of a weight.

Example:
    >>> @granularities.register
    ... def pairs_of_filters(axes):
    ...     return {'out': 2}
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    >>> sparsifier = Sparsifier(model, granularity='pairs_of_filters', layers='0')
"""


@granularities.register
def weight(axes: Axes) -> Iterable[str]:
    """Every weight is a group of its own. The mask is indexed by all axes."""
    return tuple(axes)


@granularities.register
def row(axes: Axes) -> Iterable[str]:
    """A row of a kernel, indexed by (out, in, h). In a matrix, all weights of one output, indexed by (out)."""
    return ("out",) if set(axes) == {"out", "in"} else ("out", "in", "h")


@granularities.register
def column(axes: Axes) -> Iterable[str]:
    """A column of a kernel, indexed by (out, in, w). In a matrix, all weights of one input, indexed by (in)."""
    return ("in",) if set(axes) == {"out", "in"} else ("out", "in", "w")


# Granularities whose mask has the same axes in every layer. With a 'shared_' one, all filters have the same mask.
_ALONG = {
    "kernel": ("out", "in"),
    "channel": ("in",),
    "filter": ("out",),
    "layer": (),
    "vertical_slice": ("out", "w"),
    "horizontal_slice": ("out", "h"),
    "shared_weight": ("in", "h", "w"),
    "shared_row": ("in", "h"),
    "shared_column": ("in", "w"),
    "shared_channel": ("h", "w"),
    "shared_vertical_slice": ("w",),
    "shared_horizontal_slice": ("h",),
}
for _name, _axes in _ALONG.items():
    granularities.register(_Along(_axes, _name))


@granularities.register(joint=True)
def head(model: nn.Module) -> list[JointGroups]:
    """All weights of an attention head: rows of the query, key and value projections, columns of the output projection.

    With grouped queries, a key-value head and the query heads that read it are one group; a query head of several is no
    group by itself, because groups of different sizes cannot be removed. Where all query heads read one key-value head,
    a group is a query head.
    """
    return find_heads(model, warns=True)


@granularities.register(joint=True)
def neuron(model: nn.Module) -> list[JointGroups]:
    """All weights of an inner neuron of an MLP: its rows in the up and gate projections, its column in the down one."""
    return find_neurons(model, warns=True)


@granularities.register(name="block", joint=True)
def residual_block(model: nn.Module, example_input: Any = None) -> list[JointGroups]:
    """All weights of a residual block, such as a layer of a transformer: without them it passes on what it is given.

    Blocks of which zeros make something else stay dense. An example input shows which these are.
    """
    return find_blocks(model, example_input)


residual_block.__name__ = "block"  # its registered name; the function `block` makes tiles


@granularities.register(joint=True)
def expert(model: nn.Module) -> list[JointGroups]:
    """All weights of an expert of a mixture. Its row of the router is removed with it, but not pruned."""
    return find_experts(model)


@granularities.register(joint=True)
def unit(model: nn.Module) -> list[JointGroups]:
    """All weights of a unit of an LSTM, GRU or RNN: its rows of all gates in weight_ih and weight_hh, and its biases.

    All layers and directions of a module lose as many units, since torch has one hidden_size for them.
    """
    return find_units(model)
