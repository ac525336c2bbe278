"""The table of a comparison: the forms of a model, their sizes and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..support.table import Cells, Table

# Columns -> attributes of a Form.
_COLUMNS = {
    "file bytes": "bytes",
    "parameters": "parameters",
    "non-zeros": "nonzeros",
    "FLOPs": "flops",
    "ms": "milliseconds",
}


# Those that a plot shows.
_DRAWN = {
    "file bytes": "bytes",
    "parameters": "parameters",
    "non-zeros": "nonzeros",
    "FLOPs": "flops",
    "latency": "milliseconds",
}


@dataclass(frozen=True)
class Form:
    """One form of a model. None stands for what could not be had; the note says why, and what else is to be said.

    bytes: of its file. parameters, nonzeros: that it stores. flops: 2 x multiply-adds with weights that it executes
    for the example. milliseconds: that it takes for it, in the median. is_noise: whether that differs from the dense
    one's by no more than the noise.
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
    """Forms of a model beside the dense one: printed, a table; in a notebook, HTML; `.plot()` draws it.

    forms: the dense one first. caption: how times were taken.
    """

    forms: tuple[Form, ...]
    caption: str

    def __getitem__(self, name: str) -> Form:
        for form in self.forms:
            if form.name == name:
                return form
        raise KeyError(f"no form is called {name!r}; there are {', '.join(form.name for form in self.forms)}")

    def relative(self, name: str, quantity: str) -> float | None:
        """A quantity of a form over that of the dense model, None if one of them could not be had.

        quantity: 'bytes', 'parameters', 'nonzeros', 'flops' or 'milliseconds'.
        """
        value, dense = getattr(self[name], quantity), getattr(self.forms[0], quantity)
        return None if value is None or not dense else value / dense

    def _cells(self) -> Cells:
        header = ["form"] + [title for column in _COLUMNS for title in (column, "ratio")]
        rows = [
            [form.name]
            + [
                cell
                for quantity in _COLUMNS.values()
                for cell in (_cell(getattr(form, quantity)), self._ratio(form, quantity))
            ]
            for form in self.forms
        ]
        return Cells(header, rows, caption=self.caption, notes=[form.note for form in self.forms])

    def _ratio(self, form: Form, quantity: str) -> str:
        """A cell with what is relative to the dense model; of a time within the noise it is no more than about so."""
        about = "~" if quantity == "milliseconds" and form.is_noise else ""
        return about + _cell(self.relative(form.name, quantity))

    def plot(self, ax: Any = None) -> Any:
        """The figures of each form over those of the dense one, `~` within the noise, as bars; the matplotlib axes."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(7, 1 + 0.9 * len(self.forms)), layout="constrained")
        height = 0.8 / len(_DRAWN)
        for number, (label, quantity) in enumerate(_DRAWN.items()):
            ratios = [self.relative(form.name, quantity) for form in self.forms]
            places = [place + (number - (len(_DRAWN) - 1) / 2) * height for place in range(len(ratios))]
            bars = ax.barh(places, [ratio or 0 for ratio in ratios], height, label=label)
            labels = [
                "" if ratio is None else self._ratio(form, quantity)
                for form, ratio in zip(self.forms, ratios, strict=True)
            ]
            ax.bar_label(bars, labels, padding=2, fontsize="x-small")
        for place, form in enumerate(self.forms):
            if form.milliseconds is None:
                ax.text(0.01, place, "not to be had: the note says why", va="center", fontsize="small", color="0.4")
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set(xlabel="relative to the dense model")
        ax.set_yticks(range(len(self.forms)), [form.name for form in self.forms])
        ax.margins(x=0.1)
        ax.invert_yaxis()
        ax.legend(fontsize="small")
        return ax


def caption(seconds: Mapping[str, Sequence[float]], dense: nn.Module) -> str:
    """How the times were measured, in a line."""
    device = next((parameter.device for parameter in dense.parameters()), torch.device("cpu"))
    threads = torch.get_num_threads()
    where = f"cpu with {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else str(device)
    return (
        f"Median latency of {len(seconds['dense'])} runs in turn on {where}, ~: within the noise; FLOPs with weights; "
        "ratio: to dense."
    )


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.3g}"
