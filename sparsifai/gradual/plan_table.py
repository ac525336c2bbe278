"""The result of planning a fit: sizes of the layers after pruning and levels over the epochs, as a table and plots."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..model.zeros import Count
from ..sparsifier.report import label_of_sparsity
from ..support.figure import DENSE, Bar, axes_or_new, draw_bars, in_percent, in_whole_numbers
from ..support.listing import in_short
from ..support.table import Column, Table, percent, ratio


@dataclass(frozen=True)
class Size:
    """The size of a layer or of a model, when dense and when pruned.

    Attributes:
        weights: Number of weights.
        left: Number of remaining weights.
        bytes: Bytes of the dense weights.
        bytes_left: Bytes of the pruned weights: one bit per weight and the element size per remaining weight; or those
            of the dense weights, if that is less.
        flops: 2 x multiply-adds with the weights, per example. None if they are not known.
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
        """The size of one layer.

        Args:
            weights: Number of weights.
            left: Number of remaining weights.
            element: Bytes of one weight.
            flops: FLOPs of the dense layer, or None.
        """
        bitmap = math.ceil(weights / 8) + left * element
        flops_left = None if flops is None else flops * left // weights
        return cls(weights, left, weights * element, min(bitmap, weights * element), flops, flops_left)

    @classmethod
    def total(cls, sizes: Sequence[Size]) -> Size:
        """The size of several layers together. FLOPs that are not known are left out."""

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
    """One layer of a plan.

    Attributes:
        name: Name of the weight.
        kind: Class of the module.
        shape: Shape of the weight.
        size: Its size, when dense and when pruned.
        why_dense: Why it stays dense; empty if it is pruned.
        note: A remark on a pruned layer, such as the length of its last block.
        why_not_two_four: Why torch's kernels for 2:4 do not take a weight of this shape in half precision on a GPU;
            empty if they do.
        near_collapse: Whether less than 1 % of the weights remain, or fewer weights than the layer has outputs or
            inputs, so that some of these have no weight. The latter does not count with groups of whole outputs or
            inputs.
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
    """What a fit would do to a model: a table when printed, HTML in a notebook.

    Attributes:
        layers: The layers at the target sparsity.
        selected: Total of the layers that are pruned.
        model: Total of all parameters.
        timeline: (epochs that are done, level that is asked for) from before the first batch to the end of the fit: at
            the ends of all epochs and at points between.
        notes: Remarks on these numbers.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> plan = SparsifyCallback(0.75, layers='0').plan(model, 2, 10)  # epochs, batches of an epoch
        >>> plan.selected.sparsity
        0.75
    """

    layers: tuple[PlannedLayer, ...]
    selected: Size
    model: Size
    timeline: tuple[tuple[float, float], ...]
    notes: tuple[str, ...] = ()

    @property
    def levels(self) -> tuple[float, ...]:
        """The level that is asked for after each epoch."""
        return tuple(level for epoch, level in self.timeline if epoch and epoch == int(epoch))

    @property
    def collapsing(self) -> tuple[str, ...]:
        """Names of the layers that are near collapse."""
        return tuple(layer.name for layer in self.layers if layer.near_collapse)

    def _records(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": layer.name,
                "kind": layer.kind,
                "shape": layer.shape,
                **_figures(layer.size),
                "why_not_two_four": layer.why_not_two_four,
                "selected": not layer.why_dense,
                "near_collapse": layer.near_collapse,
                "note": _note(layer),
            }
            for layer in self.layers
        ]

    def _columns(self) -> tuple[Column, ...]:
        flops = (Column("flops", "FLOPs"), Column("flops_left", "FLOPs left"))
        return (
            Column("layer", left=True),
            Column("kind", left=True),
            Column("shape", left=True),
            Column("weights"),
            Column("weights_left", "left"),
            Column("sparsity", show=percent, bar=True, total=ratio("weights_left", "weights", complement=True)),
            Column("bytes"),
            Column("bytes_left"),
            *(flops if self.model.flops is not None else ()),
            Column("why_not_two_four", "2:4 in fp16", show=_two_four, left=True, remark=True),
            Column("note", left=True, remark=True),
        )

    def _totals(self) -> list[dict[str, Any]]:
        return [
            {"layer": "selected layers", **_figures(self.selected)},
            {"layer": "whole model", **_figures(self.model)},
        ]

    def _caption(self) -> str:
        return "\n".join(self.notes)

    def plot(self, ax: Any = None) -> Any:
        """Draw the sparsity of each layer as a bar: layers that stay dense in grey, layers near collapse in red.

        A plan that is printed with one line per block is drawn with one bar per block; `unfold()` draws all layers.

        Args:
            ax: Matplotlib axes to draw on. Default: new ones.

        Returns:
            The matplotlib axes.
        """
        bars = []
        for line in self._lines():
            weights, left = (sum(record[name] for record in line.records) for name in ("weights", "weights_left"))
            collapsing = [record for record in line.records if record["near_collapse"]]
            is_dense = not any(record["selected"] for record in line.records)
            remark = f"{left:,} of {weights:,} left"
            if is_dense:
                remark = self._column("note").of_several(line.records)
            elif collapsing and len(line.records) > 1:
                remark += f", {len(collapsing):,} of {len(line.records):,} near collapse"
            colour = DENSE if is_dense else "tab:red" if collapsing else "tab:blue"
            bars.append(Bar(line.label, Count(weights, weights - left).sparsity, remark, colour))
        label = label_of_sparsity(_count(self.selected), _count(self.model))
        red = "\nred: a layer is near collapse" if any(bar.colour == "tab:red" for bar in bars) else ""
        return draw_bars(bars, ax, self.selected.sparsity, label + red)

    def plot_schedule(self, ax: Any = None) -> Any:
        """Draw the level that is asked for over the epochs.

        Args:
            ax: Matplotlib axes to draw on. Default: new ones.

        Returns:
            The matplotlib axes.
        """
        ax = axes_or_new(ax, 6.4, 3.6)
        epochs, levels = zip(*self.timeline, strict=True)
        ax.plot(epochs, levels, drawstyle="steps-post")
        ax.set(xlabel="epochs", ylabel="sparsity asked for", xlim=(0, epochs[-1] or 1), ylim=(0, 1.02))
        in_percent(ax.yaxis)
        in_whole_numbers(ax.xaxis)
        return ax


def joined(plans: Sequence[Plan]) -> Plan:
    """One plan of several for the same fit of a model, each of which prunes layers of its own.

    Args:
        plans: The plans, at least one.

    Raises:
        ValueError: Two of them prune the same layer.
    """
    if len(plans) == 1:
        return plans[0]
    several = [layer for plan in plans for layer in plan.layers if not layer.why_dense]
    pruned = {layer.name: layer for layer in several}
    if both := [name for name, count in Counter(layer.name for layer in several).items() if count > 1]:
        raise ValueError(
            f"plan: two sparsify steps both prune {in_short(both)}; give each of them its own layers with layers= or "
            "exclude="
        )
    layers = tuple(pruned.get(layer.name, layer) for layer in plans[0].layers)
    dense, of_layers = plans[0].model, Size.total([layer.size for layer in layers])
    saved = of_layers.bytes - of_layers.bytes_left
    left = dense.weights - of_layers.weights + of_layers.left
    model = Size(dense.weights, left, dense.bytes, dense.bytes - saved, of_layers.flops, of_layers.flops_left)
    weights = [plan.selected.weights for plan in plans]
    timeline = tuple(
        (points[0][0], sum(level * each for (_, level), each in zip(points, weights, strict=True)) / sum(weights))
        for points in zip(*(plan.timeline for plan in plans), strict=True)
    )
    notes = [f"Plan for {percent(timeline[-1][1])} zeros by {len(plans)} sparsify steps.", note_of_levels(timeline)]
    common = [note for note in plans[0].notes[1:] if all(note in plan.notes for plan in plans)]
    for number, plan in enumerate(plans, 1):
        title, *others = plan.notes
        notes += [f"Step {number}: {title}", *(note for note in others if note not in common)]
    notes += [note for note in common if note not in notes]
    selected = Size.total([layer.size for layer in pruned.values()])
    return Plan(layers, selected, model, timeline, tuple(filter(None, notes)))


def note_of_levels(timeline: Sequence[tuple[float, float]]) -> str:
    """The level at the beginning and after about ten of the epochs; nothing if there are no epochs.

    Args:
        timeline: As of `Plan`.
    """
    after = [(epoch, level) for epoch, level in timeline if epoch == int(epoch)]
    step = math.ceil((len(after) - 1) / 10) or 1
    shown = ", ".join(f"{epoch:g}: {percent(level)}" for epoch, level in [*after[:-1:step], after[-1]])
    return f"Level after epoch {shown}." if len(after) > 1 else ""


def _note(layer: PlannedLayer) -> str:
    return layer.why_dense or "; ".join(filter(None, (layer.note, "near collapse" * layer.near_collapse)))


def _two_four(why_not: str) -> str:
    return f"no: {why_not}" if why_not else "yes"


def _count(size: Size) -> Count:
    return Count(size.weights, size.weights - size.left)


def _figures(size: Size) -> dict[str, Any]:
    return {
        "weights": size.weights,
        "weights_left": size.left,
        "sparsity": size.sparsity,
        "bytes": size.bytes,
        "bytes_left": size.bytes_left,
        "flops": size.flops,
        "flops_left": size.flops_left,
    }
