"""Lottery tickets: sparse subnetworks, where they start, and how well they do when trained from there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from ..model.layers import parameter_of
from ..model.parallel import unwrapped
from ..sparsifier.masking import zero_weights
from ..support.registry import close_matches
from ..support.table import Cells, Table, percent

Metrics = dict[str, float]


@dataclass(frozen=True, eq=False)
class Ticket:
    """A subnetwork: which weights it has, where it starts, and what it reaches when it is trained from there.

    masks: parameter name -> bool tensor, as of a Sparsifier. sparsity: measured, of the layers that take part.
    metrics: of the trained net, by name. controls: the same of each control. start: the state_dict that it is rewound
    to, dense.
    """

    masks: Mapping[str, Tensor]
    sparsity: float
    metrics: Metrics
    controls: dict[str, Metrics] = field(default_factory=dict)
    start: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """Give a model the weights that the ticket starts with, those that it has not zero, and return it.

        ValueError, and nothing changed, if the model is another than that of the ticket.
        """
        plain = unwrapped(model)
        shapes = {name: value.shape for name, value in plain.state_dict().items()}
        if shapes != {name: value.shape for name, value in self.start.items()}:
            raise ValueError("Ticket.apply: the model is not that of the ticket; names or shapes of its state differ")
        plain.load_state_dict(self.start)
        pairs = [(parameter_of(plain, name, mask), mask) for name, mask in self.masks.items()]
        zero_weights([(parameter, mask.to(parameter.device)) for parameter, mask in pairs])
        return model


class LotteryTickets(Table, Sequence[Ticket]):
    """The tickets of a run, the dense net first; printed a table, in a notebook HTML; `.plot()` draws them.

    metric: what is shown, by default the first that is no loss.
    """

    def __init__(self, tickets: Sequence[Ticket], metric: str | None = None):
        self.tickets = tuple(tickets)
        names = list(self.tickets[0].metrics) if self.tickets else []
        self.metric = metric or next((name for name in names if name != "valid_loss"), "valid_loss")
        if names and self.metric not in names:
            raise ValueError(f"LotteryTickets: there is no metric {metric!r}; {close_matches(self.metric, names)}")

    @overload
    def __getitem__(self, index: int) -> Ticket: ...
    @overload
    def __getitem__(self, index: slice) -> LotteryTickets: ...
    def __getitem__(self, index):
        """A ticket by its round, or a part of them."""
        return LotteryTickets(self.tickets[index], self.metric) if isinstance(index, slice) else self.tickets[index]

    def __len__(self) -> int:
        return len(self.tickets)

    @property
    def kinds(self) -> list[str]:
        """'ticket', and the controls that were trained beside it."""
        return ["ticket", *dict.fromkeys(name for ticket in self for name in ticket.controls)]

    def values(self, kind: str = "ticket") -> list[float]:
        """The metric by round, of the tickets or of a control; NaN where it was not trained."""
        of_rounds = [ticket.metrics if kind == "ticket" else ticket.controls.get(kind, {}) for ticket in self]
        return [metrics.get(self.metric, float("nan")) for metrics in of_rounds]

    def _cells(self) -> Cells:
        header = ("round", "sparsity", *(kind if kind != "ticket" else self.metric for kind in self.kinds))
        rows = []
        for number, ticket in enumerate(self):
            values = (self.values(kind)[number] for kind in self.kinds)
            shown = ("" if np.isnan(value) else f"{value:.4f}" for value in values)
            rows.append((str(number), percent(ticket.sparsity), *shown))
        return Cells(header, rows, left=())

    def plot(self, *others: LotteryTickets, ax: Any = None) -> Any:
        """The metric against the share of weights that is left, of tickets and controls; returns the matplotlib axes.

        others: runs with other seeds; then the mean is drawn, with the standard deviation as error bars.
        """
        import matplotlib.pyplot as plt

        if any(len(run) != len(self) for run in others):
            raise ValueError("LotteryTickets.plot: runs that are drawn together have as many rounds each")
        if ax is None:
            _, ax = plt.subplots(figsize=(7, 4), layout="constrained")
        runs = (self, *others)
        left = 1 - np.mean([[ticket.sparsity for ticket in run] for run in runs], axis=0)
        for kind in self.kinds:
            values = np.array([run.values(kind) for run in runs])
            trained = ~np.isnan(values).any(0)
            error = values.std(0)[trained] if others else None
            ax.errorbar(100 * left[trained], values.mean(0)[trained], error, fmt="o-", capsize=3, label=kind)
        ax.axhline(np.mean([run.values()[0] for run in runs]), color="0.6", linestyle="--", linewidth=1, label="dense")
        ax.set(xscale="log", xlabel="weights that are left, in percent", ylabel=self.metric)
        ax.set_xticks(100 * left, [f"{100 * share:.3g}" for share in left], minor=False)
        ax.minorticks_off()
        ax.invert_xaxis()
        ax.legend()
        return ax

    def save(self, path: str | os.PathLike) -> None:
        """Write the tickets to a file, which `LotteryTickets.load` reads."""
        save_run(path, self.state())

    @classmethod
    def load(cls, path: str | os.PathLike) -> LotteryTickets:
        """Read the tickets of a file that `save` or `lottery_ticket(path=)` has written; no code in it is run."""
        return cls.from_state(load_run(path))

    def state(self) -> dict[str, Any]:
        """Everything, as what torch.save takes; the start, which all share, once."""
        tickets = [{**asdict(replace(ticket, start={}, masks={})), "masks": dict(ticket.masks)} for ticket in self]
        return {"tickets": tickets, "metric": self.metric, "start": dict(self[0].start) if len(self) else {}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LotteryTickets:
        """The inverse of `state`."""
        return cls([Ticket(**{**each, "start": state["start"]}) for each in state["tickets"]], state["metric"])


def save_run(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Write a file at once: interrupted, the earlier one is still there."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    part.replace(path)


def load_run(path: str | os.PathLike) -> dict[str, Any]:
    """What `write` has written; ValueError if it is no such file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path} is no file of lottery tickets ({error})") from error
    if not isinstance(state, dict) or not {"tickets", "metric", "start"} <= state.keys():
        raise ValueError(f"{path} is no file of lottery tickets: it has not the tickets, the metric and the start")
    return state
