"""The table of what `shrink` removes from a model: filters, attention heads and neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..model.zeros import Count
from ..support.table import Column, Table, percent

_NUMBERS = ("number", "zero", "removed", "zero_left")


@dataclass(frozen=True)
class ShrinkableLayer:
    """What `shrink` removes from one layer.

    Attributes:
        name: Name of the layer.
        kind: Class name of the layer.
        outputs: Number of outputs in the given model.
        zeros: Outputs whose weights are all zero.
        removed: Outputs that are removed, whether their weights are zero or not.
        zeros_left: Outputs whose weights are all zero, but that cannot be removed.
        why: How many of these for which reason, such as '2: not constant where conv2 reads it'.
    """

    name: str
    kind: str
    outputs: int
    zeros: int
    removed: int
    zeros_left: int
    why: str = ""


@dataclass(frozen=True)
class ShrinkableGroups:
    """What `shrink` removes of the heads of an attention, the neurons of an MLP, the units of an LSTM, and the like.

    Attributes:
        name: Name of the module. If residual blocks are removed, those behind them in a list have lower numbers.
        kind: Class name of the module.
        what: 'head', 'neuron', 'unit' (of an LSTM, GRU or RNN), 'block' (of a list of residual blocks) or 'expert' (of
            a mixture).
        count: Number of them in the given model; of grouped queries, of key-value heads; of units, those of all layers
            and directions.
        zeros: Those without effect, because the weights that read them are zero.
        removed: Those that are removed.
        why: Why the others without effect cannot be removed.
    """

    name: str
    kind: str
    what: str
    count: int
    zeros: int
    removed: int
    why: str = ""

    @property
    def zeros_left(self) -> int:
        """Those without effect that cannot be removed."""
        return self.zeros - self.removed


@dataclass(frozen=True, repr=False)
class Shrinkage(Table):
    """What `shrink` removes from a model. Prints as a table; in a notebook it is HTML.

    Attributes:
        layers: One row per convolution or Linear layer, in the order of the model.
        parameters: Number of parameters of the whole model before.
        parameters_left: Number of parameters of the whole model after.
        groups: One row for the heads of each attention and the neurons of each MLP.
        not_followed: Why filters were not looked for; mostly empty.
        what_next: Of `learn.shrink()`, what later fits of the Learner do; else empty.

    Example:
        >>> model, batch = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).eval(), torch.rand(4, 8)
        >>> Sparsifier(model, 'filter', coupled=True, example_input=batch).sparsify(0.5)
        >>> table = shrinkage(model, batch)
        >>> table.parameters, table.parameters_left
        (178, 90)
    """

    layers: tuple[ShrinkableLayer, ...]
    parameters: int
    parameters_left: int
    groups: tuple[ShrinkableGroups, ...] = ()
    not_followed: str = ""
    what_next: str = ""

    @property
    def zeros(self) -> int:
        """Outputs of all layers whose weights are all zero."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def removed(self) -> int:
        """Outputs of all layers that are removed."""
        return sum(layer.removed for layer in self.layers)

    @property
    def zeros_left(self) -> int:
        """Outputs of all layers whose weights are all zero, but that cannot be removed."""
        return sum(layer.zeros_left for layer in self.layers)

    @property
    def reasons(self) -> str:
        """The first three layers with zero outputs that cannot be removed, each with the reasons."""
        return first_reasons(self.layers)

    def _records(self) -> list[dict[str, Any]]:
        rows: list[tuple[str, int, ShrinkableLayer | ShrinkableGroups]] = [
            *(("filter", layer.outputs, layer) for layer in self.layers),
            *((groups.what, groups.count, groups) for groups in self.groups),
        ]
        return [
            {
                "layer": row.name,
                "kind": row.kind,
                "what": what,
                "number": count,
                "zero": row.zeros,
                "removed": row.removed,
                "zero_left": row.zeros_left,
                "why": row.why,
            }
            for what, count, row in rows
        ]

    def _columns(self) -> tuple[Column, ...]:
        texts = [Column(name, left=True) for name in ("layer", "kind", "what")]
        return (*texts, *map(Column, _NUMBERS), Column("why", left=True, remark=True))

    def _totals(self) -> list[dict[str, Any]]:
        records = self._records()
        return [
            {"layer": f"all {what}s"}
            | {name: sum(record[name] for record in records if record["what"] == what) for name in _NUMBERS}
            for what in dict.fromkeys(record["what"] for record in records)
        ]

    def _caption(self) -> str:
        share = Count(self.parameters, self.parameters - self.parameters_left).sparsity
        caption = f"{self.parameters:,} parameters, {self.parameters_left:,} after: {percent(share)} removed"
        not_followed = f"filters were not looked for: {self.not_followed}" if self.not_followed else ""
        return "\n".join(filter(None, (caption, not_followed, self.what_next)))


def first_reasons(rows: Sequence[ShrinkableLayer | ShrinkableGroups]) -> str:
    """The first three rows with zeros that cannot be removed, each with the reasons."""
    left = [f"{row.name or 'the model itself'} ({row.why})" for row in rows if row.zeros_left]
    return "; ".join(left[:3]) + (f"; and {len(left) - 3} more layers" if len(left) > 3 else "")
