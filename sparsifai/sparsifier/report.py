"""Measured sparsity: zeros counted in the weights as they are, never what a schedule says."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..model.layers import find_weights
from ..model.parallel import kind_of
from ..model.zeros import Count, figures
from ..support.table import Cells, Table, percent
from .layer import Layer, Layers, selected
from .regrowth import Regrowth


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
    def of(cls, model: nn.Module, masks: Container[str] | None = None) -> Report:
        """Count the zeros of a model without a Sparsifier.

        Args:
            model: The model.
            masks: Names of the parameters that count as selected layers. By default all weights with named axes.
        """
        layers = {
            name: Layer.dense(weight, None, "" if masks is None or name in masks else "not kept sparse")
            for name, weight in find_weights(model).items()
        }
        return cls.measure(model, layers, None)

    @classmethod
    def measure(cls, model: nn.Module, layers: Layers, context: Any, regrowth: Regrowth | None = None) -> Report:
        """Count the zeros of a model.

        Args:
            model: The model.
            layers: Its layers.
            context: The context, which may have a note on a layer.
            regrowth: Knows which weights were ever active, or None.
        """

        def row_of(name: str, layer: Layer) -> Row:
            shape = tuple(layer.parameter.shape)
            note = note_of(layer, context, regrowth)
            return Row(name, layer.weight.kind, shape, Count.of(layer.parameter), layer.why_dense, note)

        rows = tuple(row_of(name, layer) for name, layer in layers.items())
        # Matrices of kinds whose axes nobody has named are listed too, so that no weights are left out unseen.
        known = {name for layer in layers.values() for name in layer.weight.names}
        rows += tuple(
            Row(
                name, _holder(model, name), tuple(parameter.shape), Count.of(parameter), "no named axes: register_layer"
            )
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 and name not in known
        )
        pruned = Count.of(*(layer.parameter for layer in selected(layers).values()))
        return cls(rows, pruned, Count.of(*model.parameters()))

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


def note_of(layer: Layer, context: Any, regrowth: Regrowth | None = None) -> str:
    """What is special about a selected layer: what its context says of it, and how much of it was ever active."""
    if not layer.is_selected:
        return ""
    noted = context.note(layer.grouping.named_grid) if hasattr(context, "note") else ""
    return "; ".join(filter(None, (noted, regrowth.share(layer.name) if regrowth is not None else "")))
