"""Lottery tickets: sparse subnetworks, the weights that they start with, and their metrics after training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from ..model.parallel import unwrapped
from ..sparsifier.masking import masked_parameters, zero_weights
from ..support.checks import check_is_module
from ..support.figure import axes_or_new
from ..support.registry import close_matches
from ..support.table import Column, Table, percent
from .run_check import check_fits, check_tickets
from .saved_run import load_run, save_run

Metrics = dict[str, float]


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put the values of a model back if what is done to it fails or is interrupted."""
    before = deepcopy(model.state_dict())
    try:
        yield
    except BaseException:
        model.load_state_dict(before)
        raise


@dataclass(frozen=True, eq=False)
class Ticket:
    """A sparse subnetwork: its masks, the weights that it starts with, and its metrics after training.

    Attributes:
        masks: Parameter name -> bool tensor that is True at remaining weights, as `Sparsifier.masks`.
        sparsity: The fraction of zeros counted in the selected layers.
        metrics: Name -> value, for the trained net.
        controls: Name of the control -> its metrics.
        start: The state_dict to which the net is rewound, with all weights.

    Example:
        >>> learn = make_learner()
        >>> ticket = lottery_ticket(learn, 0.75, rounds=1, fit=1)[-1]
        >>> model = ticket.apply(net())  # sparse, with the weights that the ticket starts with
        >>> Sparsifier(model).sparsity
        0.75
    """

    masks: Mapping[str, Tensor]
    sparsity: float
    metrics: Metrics
    controls: dict[str, Metrics] = field(default_factory=dict)
    start: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """Load the weights that the ticket starts with into a model, with zeros at its pruned weights.

        Args:
            model: A model with the same names and shapes in its state_dict as the model of the ticket.

        Returns:
            The same model.

        Raises:
            TypeError: `model` is not a torch.nn.Module.
            ValueError: Names, shapes or dtypes differ, a mask is not bool, or a weight is inf or NaN. The model is not
                changed then.
        """
        check_is_module("Ticket.apply", "model", model)
        plain = unwrapped(model)
        try:
            check_fits(plain, self.start, "start", self.masks)
        except ValueError as error:
            raise ValueError(f"Ticket.apply: {error}") from None
        with unchanged_on_error(plain):
            plain.load_state_dict(self.start)
            zero_weights(masked_parameters(plain, dict(self.masks)))
        return model


class LotteryTickets(Table, Sequence[Ticket]):
    """The tickets of a run, as `lottery_ticket` returns them: the dense net first, then one per round.

    Printed they are a table, in a notebook HTML; `plot` draws them. `tickets[2]` is the ticket of round 2, and
    `tickets[1:]` leaves out the dense net.

    Args:
        tickets: The tickets by round.
        metric: Name of the metric to show. Default the first that is not the validation loss.

    Raises:
        ValueError: The tickets have no metric of that name.

    Example:
        >>> learn = make_learner()
        >>> tickets = lottery_ticket(learn, 0.75, rounds=2, fit=1)
        >>> [ticket.sparsity for ticket in tickets]
        [0.0, 0.5, 0.75]
    """

    def __init__(self, tickets: Sequence[Ticket], metric: str | None = None):
        self.tickets = tuple(tickets)
        names = list(self.tickets[0].metrics) if self.tickets else []
        self.metric = metric or next((name for name in names if name != "valid_loss"), "valid_loss")
        if names and self.metric not in names:
            raise ValueError(
                f"LotteryTickets: the tickets have no metric {metric!r}; {close_matches(self.metric, names)}"
            )

    @overload
    def __getitem__(self, index: int) -> Ticket: ...
    @overload
    def __getitem__(self, index: slice) -> LotteryTickets: ...
    def __getitem__(self, index):
        """The ticket of a round, or LotteryTickets of several rounds for a slice."""
        return LotteryTickets(self.tickets[index], self.metric) if isinstance(index, slice) else self.tickets[index]

    def __len__(self) -> int:
        return len(self.tickets)

    @property
    def kinds(self) -> list[str]:
        """The kinds of nets that were trained: 'ticket', and the names of the controls."""
        return ["ticket", *dict.fromkeys(name for ticket in self for name in ticket.controls)]

    def values(self, kind: str = "ticket") -> list[float]:
        """The shown metric by round.

        Args:
            kind: 'ticket', or the name of a control. Default 'ticket'.

        Returns:
            One number per round, the dense net first; NaN where no such net was trained.
        """
        of_rounds = [ticket.metrics if kind == "ticket" else ticket.controls.get(kind, {}) for ticket in self]
        return [metrics.get(self.metric, float("nan")) for metrics in of_rounds]

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"round": number, "sparsity": ticket.sparsity}
            | {self._key(kind): None if np.isnan(value := self.values(kind)[number]) else value for kind in self.kinds}
            for number, ticket in enumerate(self)
        ]

    def _key(self, kind: str) -> str:
        """The key in the records of the metric of a kind of nets: the metric for tickets, else the kind."""
        return self.metric if kind == "ticket" else kind

    def _columns(self) -> tuple[Column, ...]:
        metrics = [Column(self._key(kind), self._key(kind), show=lambda value: f"{value:.4f}") for kind in self.kinds]
        return (Column("round"), Column("sparsity", show=percent, bar=True), *metrics)

    def plot(self, *others: LotteryTickets, ax: Any = None) -> Any:
        """Draw the metric of tickets and controls against the fraction of remaining weights.

        Args:
            *others: Runs with other seeds and the same rounds. With them the mean of all runs is drawn, with the
                standard deviation as error bars.
            ax: The matplotlib axes to draw on; by default new ones.

        Returns:
            The matplotlib axes.

        Raises:
            ValueError: The runs have different numbers of rounds.
        """
        if any(len(run) != len(self) for run in others):
            raise ValueError("LotteryTickets.plot: all runs must have the same number of rounds; slice the longer ones")
        ax = axes_or_new(ax, 7, 4)
        runs = (self, *others)
        remaining = 1 - np.mean([[ticket.sparsity for ticket in run] for run in runs], axis=0)
        for kind in self.kinds:
            values = np.array([run.values(kind) for run in runs])
            trained = ~np.isnan(values).any(0)
            error = values.std(0)[trained] if others else None
            ax.errorbar(100 * remaining[trained], values.mean(0)[trained], error, fmt="o-", capsize=3, label=kind)
        ax.axhline(np.mean([run.values()[0] for run in runs]), color="0.6", linestyle="--", linewidth=1, label="dense")
        ax.set(xscale="log", xlabel="remaining weights (%)", ylabel=self.metric)
        ax.set_xticks(100 * remaining, [f"{100 * fraction:.3g}" for fraction in remaining], minor=False)
        ax.minorticks_off()
        ax.invert_xaxis()
        ax.legend()
        return ax

    def save(self, path: str | os.PathLike) -> None:
        """Write the tickets to a file that `LotteryTickets.load` reads.

        Args:
            path: The file; an existing one is replaced at once.

        Raises:
            OSError: The file cannot be written. What was there is unchanged.
        """
        save_run(path, self.state())

    @classmethod
    def load(cls, path: str | os.PathLike) -> LotteryTickets:
        """Read the tickets of a file that `save` or `lottery_ticket(path=)` wrote, without running any code in it.

        Args:
            path: The file.

        Returns:
            The tickets.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file does not hold lottery tickets.
        """
        state = load_run(path)
        try:
            return cls.from_state(state)
        except ValueError as error:
            raise ValueError(f"{path} is not a file of lottery tickets: {error}") from None

    def state(self) -> dict[str, Any]:
        """All tickets as a dictionary for torch.save.

        Returns:
            A dictionary: "tickets" is a dictionary for each ticket, "metric" the name of the shown metric, and "start"
            the state_dict that all tickets start with.
        """
        tickets = [{**asdict(replace(ticket, start={}, masks={})), "masks": dict(ticket.masks)} for ticket in self]
        return {"tickets": tickets, "metric": self.metric, "start": dict(self[0].start) if len(self) else {}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LotteryTickets:
        """Make the tickets from what `state` returned.

        Args:
            state: The dictionary.

        Returns:
            The tickets.

        Raises:
            ValueError: The dictionary is something else. The message names the entry.
        """
        check_tickets(state)
        return cls([Ticket(**{**each, "start": state["start"]}) for each in state["tickets"]], state["metric"])
