"""The table of `compare`: the forms of a model with their sizes and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..support.figure import axes_or_new, legend_beside
from ..support.table import Column, Table

# Title of a column of the table -> attribute of a Form.
_COLUMNS = {
    "file bytes": "bytes",
    "parameters": "parameters",
    "non-zeros": "nonzeros",
    "FLOPs": "flops",
    "ms": "milliseconds",
}


# Label in the plot -> attribute of a Form.
_DRAWN = {
    "file bytes": "bytes",
    "parameters": "parameters",
    "non-zeros": "nonzeros",
    "FLOPs": "flops",
    "latency": "milliseconds",
}


@dataclass(frozen=True)
class Form:
    """One form of a model. A number that is not available is None, and the note says why.

    Attributes:
        name: 'dense', 'masked', 'shrunk', 'semi-structured' or 'CSR'.
        bytes: Size of its file.
        parameters: Number of parameters that it stores.
        nonzeros: Number of these that are not zero.
        flops: FLOPs with weights that it executes for the example, two for each multiply-add.
        milliseconds: Median time of a forward pass of the example.
        note: Remarks, and why something is not available.
        is_noise: Whether its time differs from that of the dense model by no more than the noise.
    """

    name: str
    bytes: int | None = None
    parameters: int | None = None
    nonzeros: int | None = None
    flops: int | None = None
    milliseconds: float | None = None
    note: str = ""
    is_noise: bool = False


@dataclass(frozen=True, repr=False)
class Comparison(Table):
    """The forms of a model beside the dense model. Prints as a table; in a notebook it is HTML. `.plot()` draws it.

    Attributes:
        forms: The forms, the dense model first.
        caption: How the times were measured.

    Example:
        >>> dense, masked = nn.Linear(64, 64), nn.Linear(64, 64)
        >>> Sparsifier(masked).sparsify(0.9)
        >>> comparison = compare(dense, masked, torch.randn(1, 64))
        >>> [form.name for form in comparison.forms][:2]
        ['dense', 'masked']
    """

    forms: tuple[Form, ...]
    caption: str

    def __getitem__(self, name: str) -> Form:
        for form in self.forms:
            if form.name == name:
                return form
        raise KeyError(f"no form is named {name!r}; choose from {', '.join(form.name for form in self.forms)}")

    def relative(self, name: str, quantity: str) -> float | None:
        """A number of a form divided by that of the dense model.

        Args:
            name: Name of the form.
            quantity: 'bytes', 'parameters', 'nonzeros', 'flops' or 'milliseconds'.

        Returns:
            The ratio, None if one of the numbers is not available.

        Raises:
            KeyError: No form has this name.
        """
        value, dense = getattr(self[name], quantity), getattr(self.forms[0], quantity)
        return None if value is None or not dense else value / dense

    def in_words(self, name: str) -> str:
        """What a form gains beside the dense model, such as '4x smaller, 2.8x faster'.

        Args:
            name: Name of the form.

        Returns:
            Its file and its time in words, each if it was measured; empty for the dense model itself.

        Raises:
            KeyError: No form has this name.

        Example:
            >>> forms = Form('dense', bytes=400, milliseconds=2.8), Form('shrunk', bytes=100, milliseconds=1.0)
            >>> Comparison(forms, '').in_words('shrunk')
            '4x smaller, 2.8x faster'
        """
        form = self[name]
        if form is self.forms[0]:
            return ""
        size, time = self.relative(name, "bytes"), self.relative(name, "milliseconds")
        noise = "as fast within the noise" if form.is_noise else _factor(time, "faster", "slower", "as fast")
        return ", ".join(filter(None, (_factor(size, "smaller", "larger", "as large"), noise if time else "")))

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"form": form.name}
            | {
                name: value
                for quantity in _COLUMNS.values()
                for name, value in (
                    (quantity, getattr(form, quantity)),
                    (f"{quantity}_ratio", self.relative(form.name, quantity)),
                )
            }
            | {"is_noise": form.is_noise, "in_words": self.in_words(form.name), "note": form.note}
            for form in self.forms
        ]

    def _columns(self) -> tuple[Column, ...]:
        numbers = [Column(quantity, title, show=_cell) for title, quantity in _COLUMNS.items()]
        words = (Column("in_words", "to dense", left=True, remark=True), Column("note", left=True, below=True))
        return (Column("form", left=True), *numbers, *words)

    def _caption(self) -> str:
        return self.caption

    def _ratio(self, form: Form, quantity: str) -> str:
        """The ratio to the dense model, with `~` before a time whose difference is within the noise."""
        ratio = self.relative(form.name, quantity)
        about = "~" if quantity == "milliseconds" and form.is_noise else ""
        return "" if ratio is None else about + _cell(ratio)

    def plot(self, ax: Any = None) -> Any:
        """Draw the numbers of each form relative to the dense model as bars, with what the form gains in words.

        Times that differ from the dense model by no more than the noise are marked with `~`. Forms that are not
        available are named below the bars; the notes of the table say why.

        Args:
            ax: The matplotlib axes to draw into; new ones by default.

        Returns:
            The matplotlib axes.
        """
        forms = [form for form in self.forms if form.milliseconds is not None]
        missing = [form.name for form in self.forms if form.milliseconds is None]
        ax = axes_or_new(ax, 8, 1.2 + 0.9 * len(forms))
        height = 0.8 / len(_DRAWN)
        for number, (label, quantity) in enumerate(_DRAWN.items()):
            ratios = [self.relative(form.name, quantity) for form in forms]
            places = [place + (number - (len(_DRAWN) - 1) / 2) * height for place in range(len(ratios))]
            bars = ax.barh(places, [ratio or 0 for ratio in ratios], height, label=label)
            ax.bar_label(bars, [self._ratio(form, quantity) for form in forms], padding=2, fontsize="x-small")
        ax.axvline(1, color="black", linewidth=0.8)
        not_available = f"\nnot available (see the notes): {', '.join(missing)}" if missing else ""
        ax.set(xlabel=f"ratio to the dense model (shorter is better){not_available}")
        labels = ["\n".join([form.name, *self.in_words(form.name).split(", ")]).strip() for form in forms]
        ax.set_yticks(range(len(forms)), labels)
        ax.margins(x=0.1)
        ax.invert_yaxis()
        legend_beside(ax)
        return ax


def caption(seconds: Mapping[str, Sequence[float]], dense: nn.Module) -> str:
    """How the times were measured, in one line.

    Args:
        seconds: Name of a form -> the times of its runs.
        dense: The dense model, whose device is named.
    """
    device = next((parameter.device for parameter in dense.parameters()), torch.device("cpu"))
    threads = torch.get_num_threads()
    where = f"cpu with {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else str(device)
    return f"Median latency of {len(seconds['dense'])} runs in turn on {where}. FLOPs: with weights."


def _factor(ratio: float | None, less: str, more: str, same: str) -> str:
    """A ratio in words: how many times less or more; empty if it is not available."""
    if not ratio:
        return ""
    factor = max(ratio, 1 / ratio)
    if factor < 1.005:
        return same
    digits = f"{factor:.2f}" if factor < 1.05 else f"{factor:.1f}" if factor < 10 else f"{factor:,.0f}"
    return f"{digits.removesuffix('.0')}x {less if ratio < 1 else more}"


def _cell(value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.3g}"
