"""Sensitivity: a metric measured with one layer pruned at a time, as a table, and a sparsity for each layer from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..support.checks import check_fraction
from ..support.figure import axes_or_new, in_percent, label_rows, legend_beside
from ..support.printable import printable
from ..support.table import Column, Table

MOST_CURVES = 10  # curves in one picture whose colours can be told apart


@dataclass(frozen=True, repr=False)
class Sensitivity(Table):
    """A metric with one layer pruned at a time, as `sensitivity` returns it.

    Printed it is a table, in a notebook HTML; `plot` draws it.

    Attributes:
        layers: Parameter names of the weights; with granularity 'head' or 'neuron' the names of attentions or MLPs.
        sizes: Number of weights of each layer.
        levels: The sparsities that were measured, rising, each above 0 and below 1.
        values: For each layer, the metric at each level.
        baseline: The metric before pruning.
        metric: The name of the metric.
        lower_is_better: Whether a better model has a lower metric.
        members: With granularity 'head' or 'neuron', for each of the attentions or MLPs in `layers` the parameter names
            of its weights; else empty.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> def size(model):
        ...     return sum(weight.norm() for weight in model.parameters())
        >>> measured = sensitivity(model, size, levels=(0.5,), progress=False)
        >>> measured.layers
        ('0.weight', '1.weight')
    """

    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    levels: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    baseline: float
    metric: str
    lower_is_better: bool
    members: tuple[tuple[str, ...], ...] = ()

    def budget(self, sparsity: float) -> dict[str, float]:
        """A sparsity for each layer that together make `sparsity`, at the same loss of the metric per weight.

        Let D_l(s) be how much worse the metric is with layer l pruned to s. A tolerance t allows layer l the sparsity

            s_l(t) = max {s : D_l(s) <= t size_l}

        and the budget is s_l(t) at the t for which sum_l size_l s_l(t) = sparsity sum_l size_l. The allowed loss is
        proportional to the size of the layer, because small layers save few weights: with the same loss for all, they
        would become the sparsest. A higher sparsity never lowers that of any layer.

        D_l goes through the measured values. It is made monotone by a running maximum from D_l(0) = 0, and is linear
        between the levels. NaN and inf count as the worst value measured for any layer. Where D_l is flat, s_l jumps;
        if `sparsity` lies within a jump, all layers go the same fraction of the way across it.

        If pruning a single layer once loses most of the metric, these measurements say little about what training can
        regain. Compare with the same sparsity in all layers then.

        Args:
            sparsity: Target sparsity of all layers together, from 0 to the highest level that was measured.

        Returns:
            {parameter name: sparsity}, to pass to `SparsifyCallback(budget, context='local')` or to
            `Sparsifier.sparsify` with the context 'local', and with the granularity and criteria that were measured.

        Raises:
            TypeError: The sparsity is not a number.
            ValueError: The sparsity is above the highest level, or not a fraction.

        Example:
            >>> layers, sizes, values = ('first', 'second'), (100, 300), ((0.1, 0.5), (0.1, 0.2))
            >>> measured = Sensitivity(layers, sizes, (0.5, 0.9), values, 0.0, 'valid_loss', True)
            >>> {name: round(level, 3) for name, level in measured.budget(0.8).items()}
            {'first': 0.5, 'second': 0.9}
        """
        wanted = check_fraction(sparsity, "sparsity")
        if wanted > self.levels[-1]:
            raise ValueError(
                f"budget: sparsity {wanted:g} is above {self.levels[-1]:g}, the highest level that was measured; "
                f"measure higher levels: sensitivity(..., levels=(..., {wanted:g}))"
            )
        sizes = np.array(self.sizes, dtype=float)
        corners = self._corners(sizes)
        totals = corners @ (sizes / sizes.sum())
        place = min(max(int(np.searchsorted(totals, wanted)), 1), len(totals) - 1)
        below, above = totals[place - 1], totals[place]
        share = min(max((wanted - below) / (above - below), 0.0), 1.0) if above > below else 0.0
        levels = corners[place - 1] + share * (corners[place] - corners[place - 1])
        clipped = np.clip(levels, 0.0, self.levels[-1]).tolist()
        members = self.members or [(name,) for name in self.layers]
        return {name: level for names, level in zip(members, clipped, strict=True) for name in names}

    def _corners(self, sizes: np.ndarray) -> np.ndarray:
        """Sparsities of all layers, before and after each jump, as the tolerance rises; linear between two of them."""
        costs, levels = self._loss() / sizes[:, None], np.array([0.0, *self.levels])
        sides = [(tolerance, side) for tolerance in np.unique(costs) for side in ("left", "right")]
        return np.array([[_level_at(curve, levels, *where) for curve in costs] for where in sides])

    def _loss(self) -> np.ndarray:
        """D: how much worse the metric is, of shape (layers, 1 + levels), with level 0 first."""
        sign = 1 if self.lower_is_better else -1
        loss = sign * (np.array(self.values, dtype=float) - self.baseline)
        finite = np.isfinite(loss)
        worst = max(loss[finite], default=0.0)
        loss = np.where(finite, loss, worst if worst > 0 else 1.0)
        return np.maximum.accumulate(np.pad(loss, ((0, 0), (1, 0))), axis=1)

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"layer": name, "weights": size, "baseline": self.baseline}
            | dict(zip(map(self._key, self.levels), values, strict=True))
            for name, size, values in zip(self.layers, self.sizes, self.values, strict=True)
        ]

    def _key(self, level: float) -> str:
        """The key in the records of the metric at a level, such as 'accuracy_at_0.5'."""
        return f"{self.metric}_at_{level:g}"

    def _columns(self) -> tuple[Column, ...]:
        levels = [
            Column(self._key(level), f"{100 * level:g}%", total=partial(self._worst, self._key(level)))
            for level in self.levels
        ]
        return (Column("layer", left=True), Column("weights"), *levels)

    def _worst(self, key: str, records: Sequence[Mapping[str, Any]]) -> float:
        """The worst value of several layers; NaN is worse than any."""
        values = [record[key] for record in records]
        if any(np.isnan(values)):
            return float("nan")
        return max(values) if self.lower_is_better else min(values)

    def _caption(self) -> str:
        better = "lower" if self.lower_is_better else "higher"
        worst = "" if self._folded() is None else ", and of several layers in one line the worst is"
        return (
            f"{self.metric} is {self.baseline:.4g} before pruning ({better} is better); with one layer pruned at a "
            f"time it is{worst}:"
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw how the metric changes as each layer is pruned: as curves of up to ten layers, as a heat map of more.

        Args:
            ax: The matplotlib axes to draw on; by default new ones.

        Returns:
            The matplotlib axes.
        """
        return self.plot_curves(ax) if len(self.layers) <= MOST_CURVES else self.plot_heat_map(ax)

    def plot_curves(self, ax: Any = None) -> Any:
        """Draw the metric of each layer against its sparsity, with the baseline as a dashed line.

        Args:
            ax: The matplotlib axes to draw on; by default new ones.

        Returns:
            The matplotlib axes.
        """
        ax = axes_or_new(ax, 7.5, 4)
        for name, row in zip(self.layers, self.values, strict=True):
            ax.plot(self.levels, row, "o-", label=printable(name, 40))
        ax.axhline(self.baseline, color="0.5", linestyle="--", label="before pruning")
        ax.set(xlabel="sparsity of the one pruned layer", ylabel=self.metric)
        in_percent(ax.xaxis)
        legend_beside(ax)
        return ax

    def plot_heat_map(self, ax: Any = None) -> Any:
        """Draw a row per layer and a column per sparsity; the colour is how much worse the metric is than before.

        Of more than 40 layers, blocks are labelled at their first layer. A metric that is NaN or infinite is grey.

        Args:
            ax: The matplotlib axes to draw on; by default new ones.

        Returns:
            The matplotlib axes.
        """
        records = self.records()
        values = np.array([[record[self._key(level)] for level in self.levels] for record in records], dtype=float)
        loss = values - self.baseline if self.lower_is_better else self.baseline - values
        finite = np.isfinite(loss)
        ax = axes_or_new(ax, 3.5 + 0.6 * len(self.levels), max(1.5 + min(0.25 * len(records), 9), 3.2))
        ax.set_facecolor("0.6")
        highest = loss[finite].max(initial=0.0)
        image = ax.imshow(
            np.ma.masked_array(loss, ~finite), aspect="auto", interpolation="nearest", cmap="magma_r", vmin=0,
            vmax=highest if highest > 0 else 1,
        )  # fmt: skip
        grey = "\ngrey: not finite" if not finite.all() else ""
        ax.set_xlabel(f"sparsity of the one pruned layer{grey}")
        ax.set_xticks(range(len(self.levels)), [f"{100 * level:g}%" for level in self.levels])
        label_rows(ax, [record["layer"] for record in records])
        change = "more" if self.lower_is_better else "less"
        ax.figure.colorbar(image, ax=ax, label=f"{self.metric}: {change} than {self.baseline:.4g}")
        return ax


def _level_at(curve: np.ndarray, levels: np.ndarray, tolerance: float, side: Any) -> float:
    """The first ('left') or the last ('right') level at which a rising curve is at the tolerance."""
    place = int(np.searchsorted(curve, tolerance, side=side))
    if place in (0, len(curve)):
        return levels[min(place, len(curve) - 1)]
    (low, high), (start, end) = curve[place - 1 : place + 1], levels[place - 1 : place + 1]
    return start + (end - start) * ((tolerance - low) / (high - low))
