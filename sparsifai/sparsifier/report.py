"""Measured sparsity: zeros counted in the weights as they are, never what a schedule says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from ..model.layers import NamedWeight
from ..model.parallel import kind_of
from ..model.zeros import Count, figures
from ..support.table import Cells, Table, percent


@dataclass(frozen=True)
class Row:
    """One layer: `why_dense` is empty if it takes part; `note` is what is special about it then."""

    name: str
    kind: str
    shape: tuple[int, ...]
    count: Count
    why_dense: str = ""
    note: str = ""


@dataclass(frozen=True, repr=False)
class Report(Table):
    """Zeros per layer, of the selected layers, and of the whole model with its biases and norm layers.

    Printed, it is a table; in a notebook, HTML; `.plot()` draws it.
    """

    rows: tuple[Row, ...]
    selected: Count
    model: Count

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        candidates: Mapping[str, NamedWeight],
        dense: Mapping[str, str],
        notes: Mapping[str, str] = MappingProxyType({}),
    ) -> Report:
        """Count the zeros of `model`; dense: why which candidates take no part, by name; notes: on those that do."""
        rows = tuple(
            Row(name, target.kind, tuple(target.parameter.shape), Count.of(target.parameter), dense.get(name, ""),
                notes.get(name, ""))
            for name, target in candidates.items()
        )  # fmt: skip
        # Matrices that no kind of layer names the axes of are told of too, so that no weights go missing unseen.
        known = {name for target in candidates.values() for name in target.names}
        rows += tuple(
            Row(
                name, _holder(model, name), tuple(parameter.shape), Count.of(parameter), "no named axes: register_layer"
            )
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 and name not in known
        )
        selected = Count.of(*(target.parameter for name, target in candidates.items() if name not in dense))
        return cls(rows, selected, Count.of(*model.parameters()))

    def _cells(self) -> Cells:
        last = "note" if any(row.note for row in self.rows) else "why dense"
        return Cells(
            ("layer", "kind", "shape", "weights", "zeros", "sparsity", last),
            [
                (row.name, row.kind, "x".join(map(str, row.shape)), *figures(row.count), row.why_dense or row.note)
                for row in self.rows
            ],
            totals=[
                ("selected layers", "", "", *figures(self.selected), ""),
                ("whole model", "", "", *figures(self.model), ""),
            ],
            left=(0, 1, 2, -1),
        )

    def plot(self, ax: Any = None) -> Any:
        """Sparsity of each layer as bars, layers that stay dense in grey; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(7, 1 + 0.25 * len(self.rows)), layout="constrained")
        colours = ["0.75" if row.why_dense else "tab:blue" for row in self.rows]
        places = range(len(self.rows))
        ax.barh(places, [row.count.sparsity for row in self.rows], color=colours)
        for place, row in enumerate(self.rows):
            label = row.why_dense or f"{row.count.weights - row.count.zeros:,} of {row.count.weights:,} left"
            inside = row.count.sparsity > 0.5
            offset, side, colour = (-0.01, "right", "white") if inside else (0.01, "left", "black")
            ax.text(row.count.sparsity + offset, place, label, va="center", ha=side, color=colour, fontsize="small")
        ax.axvline(self.selected.sparsity, color="tab:red", linewidth=1)
        selected, model = percent(self.selected.sparsity), percent(self.model.sparsity)
        ax.set(
            xlim=(0, 1), xlabel=f"sparsity (red line: {selected} of the selected layers, {model} of the whole model)"
        )
        ax.set_yticks(places, [row.name for row in self.rows])
        ax.invert_yaxis()
        return ax


def _holder(model: nn.Module, name: str) -> str:
    return kind_of(model.get_submodule(name.rpartition(".")[0]))
