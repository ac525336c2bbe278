"""Measured sparsity: the zeros that are in the weights now, and not the sparsity that a schedule asks for."""

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
    """One layer of a report.

    Attributes:
        name: Name of the parameter, such as 'layer1.0.conv1.weight'.
        kind: Class of the layer.
        shape: Shape of the weight.
        count: Its weights and its zeros.
        why_dense: Why the layer stays dense. Empty if it is pruned.
        note: What the context or regrowth notes about a pruned layer. Often empty.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    count: Count
    why_dense: str = ""
    note: str = ""


@dataclass(frozen=True, repr=False)
class Report(Table):
    """Zeros per layer, of the selected layers, and of the whole model with its biases and norm layers.

    It is printed as a table, shown as HTML in a notebook, and drawn by `plot`.

    Attributes:
        rows: One `Row` per layer, in the order of the model.
        selected: Weights and zeros of the layers that are pruned.
        model: Weights and zeros of all parameters.
        explored: With regrow=, the fraction of the selected weights that were kept by any mask since the first update
            (Liu et al., 2021, arXiv:2102.02887); None without regrow=.

    Example:
        >>> import torch
        >>> model = nn.Linear(4, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0, 0, 2], [3, 0, 4, 5]]))
        >>> Report.of(model).selected.zeros
        3
    """

    rows: tuple[Row, ...]
    selected: Count
    model: Count
    explored: float | None = None

    @classmethod
    def of(cls, model: nn.Module, masks: Container[str] | None = None) -> Report:
        """Count the zeros of a model without a Sparsifier.

        Args:
            model: The model.
            masks: Names of the parameters that count as selected layers. Default: all weights with named axes.

        Returns:
            The report.
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
            regrowth: The regrowth, which knows which weights were ever active, or None.

        Returns:
            The report.
        """

        def row_of(name: str, layer: Layer) -> Row:
            shape = tuple(layer.parameter.shape)
            note = note_of(layer, context, regrowth)
            return Row(name, layer.weight.kind, shape, Count.of(layer.parameter), layer.why_dense, note)

        rows = tuple(row_of(name, layer) for name, layer in layers.items())
        # Parameters whose axes have no names cannot be pruned. They are listed, so that users see them.
        known = {name for layer in layers.values() for name in layer.weight.names}
        rows += tuple(
            Row(
                name, _holder(model, name), tuple(parameter.shape), Count.of(parameter), "no named axes: register_layer"
            )
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 and name not in known
        )
        pruned = selected(layers)
        explored = None if regrowth is None else regrowth.explored(pruned)
        zeros = Count.of(*(layer.parameter for layer in pruned.values()))
        return cls(rows, zeros, Count.of(*model.parameters()), explored)

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
        """Draw the sparsity of each layer as a bar. Layers that stay dense are grey.

        Args:
            ax: The matplotlib axes to draw on. Default: those of a new figure.

        Returns:
            The matplotlib axes.
        """
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
    """The class of the module that holds a parameter."""
    return kind_of(model.get_submodule(name.rpartition(".")[0]))


def note_of(layer: Layer, context: Any, regrowth: Regrowth | None = None) -> str:
    """The notes on a selected layer: that of its context, and which fraction of the layer was ever active."""
    if not layer.is_selected:
        return ""
    noted = context.note(layer.grouping.named_grid) if hasattr(context, "note") else ""
    return "; ".join(filter(None, (noted, regrowth.share(layer.name) if regrowth is not None else "")))
