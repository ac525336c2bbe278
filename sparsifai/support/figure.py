"""What the pictures of the library have in common. matplotlib is imported only when one is drawn, and never shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .folding import LONGEST, block_of
from .printable import printable

# Longer names, and longer remarks beside bars, are shortened in their middle.
_LONGEST_NAME, _LONGEST_REMARK = 40, 60


def axes_or_new(ax: Any, width: float = 6.4, height: float = 4.8) -> Any:
    """The given axes, or those of a new figure.

    Args:
        ax: matplotlib axes, or None.
        width: Width of the new figure in inches. Default 6.4.
        height: Its height in inches. Default 4.8.
    """
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def in_percent(axis: Any) -> None:
    """Label the fractions of a matplotlib axis as percentages."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, decimals=None))


def in_whole_numbers(axis: Any) -> None:
    """Label a matplotlib axis, such as that of the epochs, at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def legend_beside(ax: Any) -> None:
    """Put the legend to the right of the axes, where it covers no data."""
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


@dataclass(frozen=True)
class Bar:
    """A bar of a picture of sparsities.

    Attributes:
        name: What it is called.
        fraction: Its length, from 0 to 1.
        remark: What is written in it or beside it.
        colour: A colour of matplotlib.
    """

    name: str
    fraction: float
    remark: str = ""
    colour: str = "tab:blue"


def draw_bars(bars: Sequence[Bar], ax: Any, level: float, xlabel: str) -> Any:
    """Draw sparsities as horizontal bars, the first one at the top, and one level as a line.

    Args:
        bars: The bars.
        ax: matplotlib axes, or None for new ones.
        level: A fraction, where a dashed line is drawn.
        xlabel: What the axis of the sparsities is called.
    """
    ax = axes_or_new(ax, 7.5, 1.2 + 0.24 * len(bars))
    places = range(len(bars))
    ax.barh(places, [bar.fraction for bar in bars], color=[bar.colour for bar in bars])
    ax.axvline(level, color="0.3", linewidth=1, linestyle="--", zorder=0)
    for place, bar in enumerate(bars):
        is_inside = bar.fraction > 0.5
        offset, side = (-0.01, "right") if is_inside else (0.01, "left")
        colour = "white" if is_inside and bar.colour != DENSE else "black"
        remark = printable(bar.remark, _LONGEST_REMARK)
        ax.text(bar.fraction + offset, place, remark, va="center", ha=side, color=colour, fontsize="small")
    ax.set(xlim=(0, 1), xlabel=xlabel)
    in_percent(ax.xaxis)
    ax.set_yticks(places, [printable(bar.name, _LONGEST_NAME) for bar in bars], fontsize="small")
    ax.set_ylim(len(bars) - 0.4, -0.6)
    return ax


DENSE = "0.75"  # the colour of layers that stay dense


def label_rows(ax: Any, names: Sequence[str]) -> None:
    """Label the rows of an image: each with its name, or if there are more than 40, each block at its first row.

    Args:
        ax: The matplotlib axes; the middle of row i is at i.
        names: The names of the rows.
    """
    places, labels = list(range(len(names))), list(names)
    if len(names) > LONGEST:
        first: dict[str, int] = {}
        for place, name in enumerate(names):
            first.setdefault(block_of(name), place)
        least = len(names) / 45  # rows between two labels, which overlap otherwise
        places, labels = [], []
        for block, place in first.items():
            if not places or place - places[-1] >= least:
                places.append(place)
                labels.append(block)
    ax.set_yticks(places, [printable(label, _LONGEST_NAME) for label in labels], fontsize="small")
