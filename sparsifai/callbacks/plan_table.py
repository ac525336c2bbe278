"""What a plan is: layers with the sizes that they would have, and levels over the epochs, as tables and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..model.zeros import Count
from ..sparsifier.report import Report, Row
from ..support.table import Cells, Table, percent

_COLUMNS = ("layer", "kind", "shape", "weights", "left", "sparsity", "bytes", "bytes left")


@dataclass(frozen=True)
class Size:
    """What a layer or a model has, dense and of what is left.

    left: weights that are not masked. bytes_left: one bit per weight, and the element size per weight that is left, or
    as dense if that is less. flops: 2 x multiply-adds with the weights per example, None if they are not known.
    flops_left: flops x density.
    """

    weights: int
    left: int
    bytes: int
    bytes_left: int
    flops: int | None = None
    flops_left: int | None = None

    @property
    def sparsity(self) -> float:
        """1 - left / weights."""
        return Count(self.weights, self.weights - self.left).sparsity

    @classmethod
    def of(cls, weights: int, left: int, element: int, flops: int | None) -> Size:
        """Of one layer. element: bytes of a weight."""
        bitmap = math.ceil(weights / 8) + left * element
        flops_left = None if flops is None else flops * left // weights
        return cls(weights, left, weights * element, min(bitmap, weights * element), flops, flops_left)

    @classmethod
    def total(cls, sizes: Sequence[Size]) -> Size:
        """Of several layers; of FLOPs those that are known."""

        def known(values: list[int | None]) -> int | None:
            counted = [value for value in values if value is not None]
            return sum(counted) if counted else None

        return cls(
            sum(size.weights for size in sizes),
            sum(size.left for size in sizes),
            sum(size.bytes for size in sizes),
            sum(size.bytes_left for size in sizes),
            known([size.flops for size in sizes]),
            known([size.flops_left for size in sizes]),
        )


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a plan. why_dense: empty if it takes part; note: what is special about it then.

    why_not_two_four: empty if torch's kernels for 2:4 take a weight of this shape in half precision, on a GPU.
    near_collapse: whether less than 1 % of the weights is left, or fewer weights than the layer has outputs or inputs,
    so that some of these must be without any; of groups of whole outputs or inputs, the former only.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    size: Size
    why_dense: str = ""
    note: str = ""
    why_not_two_four: str = ""
    near_collapse: bool = False


@dataclass(frozen=True, repr=False)
class Plan(Table):
    """What a fit would do: printed, a table; in a notebook, HTML; `.plot()` and `.plot_schedule()` draw it.

    layers: at the target sparsity. selected, model: totals of the layers that take part and of all parameters.
    timeline: (epochs that are over, level asked for), from before the first batch to the end, at the ends of all epochs
    and at points between. notes: what holds of these numbers.
    """

    layers: tuple[PlannedLayer, ...]
    selected: Size
    model: Size
    timeline: tuple[tuple[float, float], ...]
    notes: tuple[str, ...] = ()

    @property
    def levels(self) -> tuple[float, ...]:
        """The level after each epoch."""
        return tuple(level for epoch, level in self.timeline if epoch and epoch == int(epoch))

    @property
    def collapsing(self) -> tuple[str, ...]:
        """Names of the layers that are near collapse."""
        return tuple(layer.name for layer in self.layers if layer.near_collapse)

    def _cells(self) -> Cells:
        counted = self.model.flops is not None
        rows = [
            (layer.name, layer.kind, "x".join(map(str, layer.shape)), *_figures(layer.size, counted),
             f"no: {layer.why_not_two_four}" if layer.why_not_two_four else "yes", _note(layer))
            for layer in self.layers
        ]  # fmt: skip
        return Cells(
            (*_COLUMNS, *(("FLOPs", "FLOPs left") if counted else ()), "2:4 in fp16", "note"),
            rows,
            totals=[
                ("selected layers", "", "", *_figures(self.selected, counted), "", ""),
                ("whole model", "", "", *_figures(self.model, counted), "", ""),
            ],
            left=(0, 1, 2, -2, -1),
            caption="\n".join(self.notes),
        )

    def plot(self, ax: Any = None) -> Any:
        """Sparsity of each layer as bars, dense layers in grey, those near collapse in red; the matplotlib axes."""
        rows = tuple(
            Row(layer.name, layer.kind, layer.shape, _count(layer.size), layer.why_dense) for layer in self.layers
        )
        ax = Report(rows, _count(self.selected), _count(self.model)).plot(ax)
        for bar, layer in zip(ax.patches[-len(rows) :], self.layers, strict=True):
            if layer.near_collapse:
                bar.set_color("tab:red")
        return ax

    def plot_schedule(self, ax: Any = None) -> Any:
        """The level over the epochs; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        epochs, levels = zip(*self.timeline, strict=True)
        ax.plot(epochs, levels, drawstyle="steps-post")
        ax.set(xlabel="epoch", ylabel="sparsity asked for", xlim=(0, epochs[-1]), ylim=(0, 1))
        return ax


def _note(layer: PlannedLayer) -> str:
    return layer.why_dense or "; ".join(filter(None, (layer.note, "near collapse" * layer.near_collapse)))


def _count(size: Size) -> Count:
    return Count(size.weights, size.weights - size.left)


def _figures(size: Size, counted: bool) -> tuple[str, ...]:
    known = ["" if each is None else f"{each:,}" for each in (size.flops, size.flops_left)]
    return (
        f"{size.weights:,}", f"{size.left:,}", percent(size.sparsity), f"{size.bytes:,}", f"{size.bytes_left:,}",
        *(known if counted else ()),
    )  # fmt: skip
