"""Measured sparsity: the zeros that are in the weights now, and not the sparsity that a schedule asks for."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..model.layers import NamedWeight, find_weights
from ..model.parallel import kind_of
from ..model.tensors import shape_of, size_of
from ..model.zeros import COUNTED, Count, figures, measured, ties, why_not_counted, why_not_plain
from ..support.figure import DENSE, Bar, draw_bars
from ..support.listing import in_short
from ..support.printable import printable
from ..support.table import Column, Table, percent
from .coupled import Coupling
from .layer import Layer, Layers, selected
from .regrowth import Regrowth

# Why a parameter stays dense whose layer is of an unknown kind.
UNNAMED = "no named axes: register_layer"


@dataclass(frozen=True)
class Row:
    """One layer of a report.

    Attributes:
        name: Name of the parameter, such as 'layer1.0.conv1.weight'.
        kind: Class of the layer.
        shape: Shape of the weight.
        count: Its weights and its zeros. Count(0, 0) if its zeros cannot be counted, as `Report.not_counted` says, or
            if it is tied to another weight, which has them.
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
        not_counted: Name -> why, for parameters whose zeros cannot be counted, such as quantized ones. No other number
            includes them.
        left_out: Number of values of these parameters.
        joint: With a granularity of groups of several layers, such as 'head', name of an attention or another module
            -> (number of its groups whose weights are all zero, number of all).
        what: The name of that granularity; else empty.

    Example:
        >>> model = nn.Linear(4, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0, 0, 2], [3, 0, 4, 5]]))
        >>> Report.of(model).selected.zeros
        3
    """

    rows: tuple[Row, ...]
    selected: Count
    model: Count
    explored: float | None = None
    not_counted: Mapping[str, str] = field(default_factory=dict)
    left_out: int = 0
    joint: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    what: str = ""

    @classmethod
    def of(cls, model: nn.Module, masks: Container[str] | None = None) -> Report:
        """Count the zeros of a model without a Sparsifier.

        Args:
            model: The model.
            masks: Names of the parameters that count as selected layers. Default: all weights with named axes.

        Returns:
            The report.

        Raises:
            ValueError: The zeros of no parameter can be counted, or not those of a parameter in `masks`.
        """

        def why_dense(name: str, weight: NamedWeight) -> str:
            if masks is not None:
                return "" if name in masks else "not kept sparse"
            return "not counted" if why_not_counted(weight.parameter, name) else ""

        layers = {
            name: Layer.dense(weight, None, why_dense(name, weight)) for name, weight in find_weights(model).items()
        }
        return cls.measure(model, layers, None)

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        layers: Layers,
        context: Any,
        regrowth: Regrowth | None = None,
        coupling: Coupling | None = None,
        by_masks: bool = False,
    ) -> Report:
        """Count the zeros of a model.

        Args:
            model: The model.
            layers: Its layers.
            context: The context, which may have a note on a layer.
            regrowth: The regrowth, which knows which weights were ever active, or None.
            coupling: The joint groups of the layers, or None.
            by_masks: Whether joint groups count as pruned where the masks of the layers prune them, as in a plan.

        Returns:
            The report.

        Raises:
            ValueError: The zeros of no parameter, or of a selected layer, cannot be counted.
        """
        parameters = measured(model)
        not_counted = {name: why for name, each in parameters.items() if (why := why_not_counted(each, name))}
        if not_counted and len(not_counted) == len(parameters):
            name, why = next(iter(not_counted.items()))
            raise ValueError(
                f"zeros cannot be counted in any parameter of {type(model).__name__}: {printable(name)} is {why}"
            )

        def count_of(name: str, parameter: Tensor) -> Count:
            return Count(0, 0) if name in not_counted else Count.of(parameter)

        def why_dense(name: str, parameter: Tensor) -> str:
            if name in not_counted:
                return "not counted"
            return "no elements" if not size_of(parameter) else _short_reason(parameter) or UNNAMED

        joint = {} if coupling is None else coupling.pruned_groups(layers, by_masks)
        notes = {} if coupling is None else coupling.notes(joint)

        def row_of(name: str, layer: Layer) -> Row:
            shape = tuple(layer.parameter.shape)
            note = "; ".join(filter(None, (notes.get(name), note_of(layer, context, regrowth))))
            return Row(name, layer.weight.kind, shape, count_of(name, layer.parameter), layer.why_dense, note)

        rows = tuple(row_of(name, layer) for name, layer in layers.items())
        # Parameters whose axes have no names cannot be pruned. They are listed, so that users see them.
        known = {name for layer in layers.values() for name in layer.weight.names}
        rows += tuple(
            Row(name, _holder(model, name), shape_of(each), count_of(name, each), why_dense(name, each))
            for name, each in parameters.items()
            if name not in known and each.dim() > 1
        )
        rows += tuple(
            Row(name, _holder(model, name), shape_of(parameters[first]), Count(0, 0), f"tied to {first}")
            for name, first in ties(model).items()
            if parameters[first].dim() > 1
        )
        pruned = selected(layers)
        explored = None if regrowth is None else regrowth.explored(pruned)
        zeros = Count.of(*(layer.parameter for layer in pruned.values()))
        whole = Count.of(*(each for name, each in parameters.items() if name not in not_counted))
        left_out = sum(size_of(parameters[name]) for name in not_counted)
        what = coupling.what if coupling is not None and joint else ""
        return cls(rows, zeros, whole, explored, not_counted, left_out, joint, what)

    def _records(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": row.name,
                "kind": row.kind,
                "shape": row.shape,
                **figures(row.count if row.count.weights or 0 in row.shape else None),
                "selected": not row.why_dense,
                "note": row.why_dense or row.note,
            }
            for row in self.rows
        ]

    def _columns(self) -> tuple[Column, ...]:
        last = "note" if any(row.note for row in self.rows) else "why dense"
        names = (Column("layer", left=True), Column("kind", left=True), Column("shape", left=True))
        return (*names, *COUNTED, Column("note", last, left=True, remark=True))

    def _totals(self) -> list[dict[str, Any]]:
        return [{"layer": "selected layers", **figures(self.selected)}, {"layer": "whole model", **figures(self.model)}]

    def _caption(self) -> str:
        lines = []
        if self.joint:
            pruned, count = (sum(column) for column in zip(*self.joint.values(), strict=True))
            lines.append(f"{pruned:,} of {count:,} {self.what}s are pruned.")
        if self.not_counted:
            names = [f"{name} ({why})" for name, why in self.not_counted.items()]
            lines.append(f"Not counted: {self.left_out:,} values of {in_short(names)}.")
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Draw the sparsity of each layer as a bar. Layers that stay dense are grey.

        A report that is printed with one line per block is drawn with one bar per block; `unfold()` draws all layers.

        Args:
            ax: The matplotlib axes to draw on. Default: those of a new figure.

        Returns:
            The matplotlib axes.
        """
        bars = [
            Bar(label, sparsity, remark, DENSE if is_dense else "tab:blue")
            for label, sparsity, remark, is_dense in self._bars()
        ]
        return draw_bars(bars, ax, self.selected.sparsity, label_of_sparsity(self.selected, self.model))

    def _bars(self) -> Iterator[tuple[str, float, str, bool]]:
        """Of each line the name, the sparsity, what is written beside it, and whether it stays dense as a whole."""
        for line in self._lines():
            known = [record for record in line.records if record["weights"] is not None]
            count = Count(sum(each["weights"] for each in known), sum(each["zeros"] for each in known))
            is_dense = not any(record["selected"] for record in line.records)
            remark = f"{count.weights - count.zeros:,} of {count.weights:,} left"
            if is_dense:
                remark = self._column("note").of_several(line.records)
            if len(line.records) == 1:
                remark = self.not_counted.get(line.label, remark)
            yield line.label, count.sparsity, remark, is_dense


def label_of_sparsity(selected: Count, model: Count) -> str:
    """The label of an axis of sparsities, which also says what its line means."""
    return (
        f"sparsity\ndashed line: {percent(selected.sparsity)} of the selected layers; "
        f"whole model: {percent(model.sparsity)}"
    )


def _short_reason(parameter: Tensor) -> str:
    """Why a weight is none of plain numbers, without what to do; empty if it is one of them."""
    return why_not_plain(parameter).partition(";")[0].partition(",")[0]


def _holder(model: nn.Module, name: str) -> str:
    """The class of the module that holds a parameter."""
    return kind_of(model.get_submodule(name.rpartition(".")[0]))


def note_of(layer: Layer, context: Any, regrowth: Regrowth | None = None) -> str:
    """The notes on a selected layer: that of its context, and which fraction of the layer was ever active."""
    if not layer.is_selected:
        return ""
    noted = context.note(layer.grouping.named_grid) if hasattr(context, "note") else ""
    return "; ".join(filter(None, (noted, regrowth.share(layer.name) if regrowth is not None else "")))
