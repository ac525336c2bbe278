"""What shrinking takes from each layer, and what of its zeros it leaves, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from ..sparsifier.report import Count, percent
from ..support.table import as_html, as_text

_HEADER = ("layer", "kind", "outputs", "zero filters", "removed", "zero filters left", "why")


_LEFT = (0, 1, 6)


@dataclass(frozen=True)
class ShrinkableLayer:
    """One layer. zeros: outputs whose weights are all zero. removed: outputs that go, not only such of zeros.

    why: of the zeros that are left, how many for what reason.
    """

    name: str
    kind: str
    outputs: int
    zeros: int
    removed: int
    zeros_left: int
    why: str = ""


@dataclass(frozen=True)
class Shrinkage:
    """What shrink removes: printed, a table; in a notebook, HTML.

    parameters, parameters_left: of the whole model, before and after.
    """

    layers: tuple[ShrinkableLayer, ...]
    parameters: int
    parameters_left: int

    @property
    def zeros(self) -> int:
        """Outputs whose weights are all zero."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def removed(self) -> int:
        """Outputs that go."""
        return sum(layer.removed for layer in self.layers)

    @property
    def zeros_left(self) -> int:
        """Outputs whose weights are all zero, but that have to stay."""
        return sum(layer.zeros_left for layer in self.layers)

    @property
    def reasons(self) -> str:
        """The layers of which zeros stay, with why; the first three."""
        left = [f"{layer.name}: {layer.why}" for layer in self.layers if layer.zeros_left]
        return "; ".join(left[:3]) + (f"; and {len(left) - 3} more layers" if len(left) > 3 else "")

    @property
    def _lines(self) -> list[tuple[str, ...]]:
        cells = [
            (layer.name, layer.kind, *_figures(layer.outputs, layer.zeros, layer.removed, layer.zeros_left), layer.why)
            for layer in self.layers
        ]
        outputs = sum(layer.outputs for layer in self.layers)
        return [
            _HEADER,
            *cells,
            ("all layers", "", *_figures(outputs, self.zeros, self.removed, self.zeros_left), ""),
        ]

    @property
    def _caption(self) -> str:
        share = Count(self.parameters, self.parameters - self.parameters_left).sparsity
        return f"{self.parameters:,} parameters, {self.parameters_left:,} after: {percent(share)} removed"

    def __str__(self) -> str:
        return as_text(self._lines, left=_LEFT, totals=1, caption=self._caption)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(self._lines, left=_LEFT, totals=1, caption=self._caption)


def _figures(*numbers: int) -> tuple[str, ...]:
    return tuple(f"{number:,}" for number in numbers)
