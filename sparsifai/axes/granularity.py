"""How: granularities, which say what weights share one mask value.

A granularity is a function from the axes of a weight (name -> size) to the axes that index its mask. A group of
weights spans every other axis. `filter` names ('out',): one mask value per output filter. A granularity may give the
extent of a group along an axis that it names, too: {'out': 64} makes groups of 64 filters, {'out': 4, 'in': 4} tiles.

`Grouping` is what a granularity makes of one weight: it pools scores into groups and spreads masks over weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..support.registry import Registry

Axes = Mapping[str, int]


Granularity = Callable[[Axes], Iterable[str] | Mapping[str, int]]


def along(*axes: str) -> Granularity:
    """The granularity whose mask is indexed by `axes`; a group spans all others.

    >>> along('out', 'h')({'out': 8, 'in': 4, 'h': 3, 'w': 3})
    ('out', 'h')
    """
    if not all(isinstance(axis, str) for axis in axes):
        raise TypeError(f"granularity {axes!r}: a tuple of axes holds their names, such as ('out', 'h')")
    return _Along(axes, f"({', '.join(axes)})")


@dataclass(frozen=True)
class _Along:
    """Groups that are indexed by some axes and span all others."""

    # A class, because a function made within another cannot be pickled.
    indexed: tuple[str, ...]
    __name__: str

    def __call__(self, axes: Axes) -> tuple[str, ...]:
        return self.indexed


def block(rows: int, columns: int) -> Granularity:
    """Tiles of `rows` outputs by `columns` inputs; of a kernel each place by itself. Also written '4x4'.

    At the end of an axis a tile may be smaller.
    """
    for extent in (rows, columns):
        if isinstance(extent, bool) or not isinstance(extent, int) or extent < 1:
            raise ValueError(f"block: the sides of a tile are whole numbers from 1 on, not {extent!r}")
    return _Block(rows, columns, f"{rows}x{columns}")


@dataclass(frozen=True)
class _Block:
    rows: int
    columns: int
    __name__: str

    def __call__(self, axes: Axes) -> dict[str, int]:
        return {axis: {"out": self.rows, "in": self.columns}.get(axis, 1) for axis in {"out": 0, "in": 0, **axes}}


def _parse(value: Any) -> Granularity | None:
    if isinstance(value, str) and (tile := re.fullmatch(r"(\d+)x(\d+)", value)):
        return block(int(tile[1]), int(tile[2]))
    return along(*value) if isinstance(value, (tuple, list)) else None


granularities = Registry("granularity", parse=_parse)


@granularities.register
def weight(axes: Axes) -> Iterable[str]:
    """Every weight alone."""
    return tuple(axes)


@granularities.register
def row(axes: Axes) -> Iterable[str]:
    """A row of a kernel: (out, in, h). In a matrix, the row of one output neuron: (out)."""
    return ("out",) if set(axes) == {"out", "in"} else ("out", "in", "h")


@granularities.register
def column(axes: Axes) -> Iterable[str]:
    """A column of a kernel: (out, in, w). In a matrix, the column of one input feature: (in)."""
    return ("in",) if set(axes) == {"out", "in"} else ("out", "in", "w")


# Those that name the same axes on every layer. 'shared_' ones are the same for all output filters.
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
