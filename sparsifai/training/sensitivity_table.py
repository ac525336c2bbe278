"""A metric measured with one layer sparse at a time, as a table, and a budget of zeros made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..support.checks import check_fraction
from ..support.table import Cells, Table


@dataclass(frozen=True, repr=False)
class Sensitivity(Table):
    """A metric with one layer sparse at a time: printed, a table; in a notebook, HTML; `.plot()` draws it.

    layers, sizes: names of the weights, and how many each has. levels: sparsities, rising. values: for each layer, the
    metric at each level. baseline: of the model as it was. metric: its name. lower_is_better: its direction.
    """

    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    levels: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    baseline: float
    metric: str
    lower_is_better: bool

    def budget(self, sparsity: float) -> dict[str, float]:
        """How sparse each layer is to be so that all together are, and the metric suffers by weight the same.

        D_l(s) is by how much the metric is worse with layer l at the level s, and level_l(t) = max {s : D_l(s) <= t
        size_l}. The budget is level_l(t) at the t at which sum_l size_l level_l(t) = sparsity sum_l size_l. A layer may
        cost in proportion to the zeros that it can give: were all allowed the same cost, small layers, which save next
        to nothing, would be the sparsest. For curves that rise steeply this is close to the least sum of D_l.

        D_l is what was measured, made monotone by its running maximum from D_l(0) = 0 on, and straight between the
        levels. NaN and inf count as the worst that was measured of any layer. Where D_l is flat the sum can jump over
        what is asked for: then all levels go the same share of the way from below the jump to above it.

        Where single layers lose most of the metric in one shot, it tells little of what training regains: then see
        whether the same sparsity in all layers is no better. A higher sparsity has no lower level in any layer.

        What is returned is for `SparsifyCallback(budget, context='local')` and `Sparsifier.sparsify(budget)`, with the
        granularity and criteria that were measured.
        ValueError above the highest level.
        """
        wanted = check_fraction(sparsity, "sparsity")
        if wanted > self.levels[-1]:
            raise ValueError(
                f"budget: a sparsity of {wanted:g} is above {self.levels[-1]:g}, the highest that was measured; "
                f"measure higher levels, as by sensitivity(..., levels=(..., {wanted:g}))"
            )
        sizes = np.array(self.sizes, dtype=float)
        corners = self._corners(sizes)
        totals = corners @ (sizes / sizes.sum())
        place = min(max(int(np.searchsorted(totals, wanted)), 1), len(totals) - 1)
        below, above = totals[place - 1], totals[place]
        share = min(max((wanted - below) / (above - below), 0.0), 1.0) if above > below else 0.0
        levels = corners[place - 1] + share * (corners[place] - corners[place - 1])
        return dict(zip(self.layers, np.clip(levels, 0.0, self.levels[-1]).tolist(), strict=True))

    def _corners(self, sizes: np.ndarray) -> np.ndarray:
        """Levels of all layers, before and after each jump, as the tolerance rises: between two, all are straight."""
        costs, levels = self._loss() / sizes[:, None], np.array([0.0, *self.levels])
        sides = [(tolerance, side) for tolerance in np.unique(costs) for side in ("left", "right")]
        return np.array([[_reached(curve, levels, *where) for curve in costs] for where in sides])

    def _loss(self) -> np.ndarray:
        """D: by how much the metric is worse, layer x (0, *levels)."""
        sign = 1 if self.lower_is_better else -1
        loss = sign * (np.array(self.values, dtype=float) - self.baseline)
        finite = np.isfinite(loss)
        worst = max(loss[finite], default=0.0)
        loss = np.where(finite, loss, worst if worst > 0 else 1.0)
        return np.maximum.accumulate(np.pad(loss, ((0, 0), (1, 0))), axis=1)

    def _cells(self) -> Cells:
        better = "lower" if self.lower_is_better else "higher"
        return Cells(
            ("layer", "weights", *(f"{100 * level:g}%" for level in self.levels)),
            [
                (name, f"{size:,}", *(f"{value:.4g}" for value in values))
                for name, size, values in zip(self.layers, self.sizes, self.values, strict=True)
            ],
            caption=f"{self.metric} is {self.baseline:.4g} as it is, {better} is better; with one layer sparse at a "
            "time:",
        )

    def plot(self, ax: Any = None) -> Any:
        """The metric of each layer against the level, the baseline dashed; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        for name, row in zip(self.layers, self.values, strict=True):
            ax.plot(self.levels, row, "o-", label=name)
        ax.axhline(self.baseline, color="0.5", linestyle="--", label="as it is")
        ax.set(xlabel="sparsity of this layer alone", ylabel=self.metric)
        ax.legend(fontsize="small")
        return ax


def _reached(curve: np.ndarray, levels: np.ndarray, tolerance: float, side: Any) -> float:
    """Where a rising curve comes to `tolerance` ('left'), or leaves it ('right')."""
    place = int(np.searchsorted(curve, tolerance, side=side))
    if place in (0, len(curve)):
        return levels[min(place, len(curve) - 1)]
    (low, high), (start, end) = curve[place - 1 : place + 1], levels[place - 1 : place + 1]
    return start + (end - start) * ((tolerance - low) / (high - low))
