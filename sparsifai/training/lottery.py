"""lottery_ticket: iterative magnitude pruning with rewinding, and the controls that make it evidence.

Frankle and Carbin, 2019, "The Lottery Ticket Hypothesis" (arXiv:1803.03635); rewinding to a point in training:
Frankle et al., 2019, "Stabilizing the Lottery Ticket Hypothesis" (arXiv:1903.01611).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from math import inf
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import Tensor, nn

from ..callbacks.display import notify
from ..callbacks.keep import KeepSparsity
from ..callbacks.learner import first_batch, metric_names, show_data, unchanged
from ..callbacks.sparsify import SparsifyCallback
from ..model.parallel import unwrapped
from ..model.patterns import as_patterns
from ..sparsifier.arguments import Sparsity, check_sparsity, mapped, resolve_axes
from ..sparsifier.sparsifier import Sparsifier
from ..sparsifier.steps import exponential
from ..sparsifier.taking_part import scopes
from ..support.checks import check_count, check_seed
from ..support.registry import close_matches, name_of
from ..support.table import percent
from .rewind import AtBatch, Moment, Skip, copy_to_device, random_states, restore_random
from .ticket import LotteryTickets, Metrics, Ticket, load_run, save_run

CONTROLS = ("reinitialized", "shuffled")


def lottery_ticket(
    learn: Learner,  # Trained in every round; in the end it has the last ticket, trained, and keeps its zeros
    sparsity: Any,  # Of the last ticket: a fraction, or {pattern: fraction} by layer
    rounds: int = 5,  # In each of which the same share of what is left falls
    fit: int | Callable[[Learner], Any] = 1,  # How a net is trained: a function of the Learner, or epochs of learn.fit
    rewind_to: float = 0,  # Epoch that weights, buffers and optimizer are rewound to; 0.5 is in the middle of the first
    *,
    granularity: Any = "weight",  # As of Sparsifier
    context: Any = "global",  # As of Sparsifier
    criteria: Any = "large_final",  # As of Sparsifier
    controls: Sequence[str] = (),  # Nets that are trained beside each ticket: 'reinitialized', 'shuffled'
    controls_every: int = 1,  # Rounds from one training of the controls to the next, up to the last round
    # What gives a model new weights, for the control; by default those that it was initialized with are put in another
    # order, within every parameter, which is as good as drawing them anew.
    reinitialize: Callable[[nn.Module], Any] | None = None,
    calibration: Iterable | None = None,  # Batches for criteria that look at data; by default one to train on
    seed: int = 0,  # Of the orders of the controls, and of random criteria
    path: Any = None,  # File that is written after each round, and from which a run that was ended goes on
    **options: Any,  # More of Sparsifier: layers, exclude, pool, ...
) -> LotteryTickets:
    """Train, prune a share of what is left, rewind, train again, and so on: the tickets of the rounds, dense net first.

    s_r = 1 - (1 - s)^(r / n) in round r of n. A control has as many weights in every layer as the ticket:
    'reinitialized' has the same mask and other initial weights, and is trained from the beginning; 'shuffled' has the
    same weights and its mask in another order. Metrics are those of learn.validate() after a fit. A run that is ended
    leaves the Learner as it is at the moment; `path` is what to go on from.
    """
    if "regrow" in options:
        raise TypeError("lottery_ticket: masks of tickets do not move; regrow= is for SparsifyCallback")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    asked = {"granularity": granularity, "context": context, "criteria": criteria, "seed": check_seed(seed), **options}
    run = _Run(
        learn, check_sparsity(sparsity), check_count("rounds", rounds), fit, rewind_to,
        [controls] if isinstance(controls, str) else list(controls), check_count("controls_every", controls_every),
        reinitialize, calibration, asked,
    )  # fmt: skip
    begun = path is not None and Path(path).exists()
    tickets = run.take_up(load_run(path), path) if begun else [run.train_dense()]
    while True:
        if path is not None:
            run.save(path, tickets)
        if len(tickets) > run.rounds:
            break
        tickets.append(run.next_ticket(len(tickets)))
    run.keep_zeros()
    return LotteryTickets(tickets)


@dataclass
class _Run:
    """What the rounds have in common. ValueError or TypeError, before anything is trained, where that cannot work."""

    learn: Learner
    sparsity: Sparsity
    rounds: int
    fit: Any
    rewind_to: Any
    controls: list[str]
    controls_every: int
    reinitialize: Callable[[nn.Module], Any] | None
    calibration: Iterable | None
    asked: dict[str, Any]  # of Sparsifier

    sparsifier: Sparsifier = field(init=False)
    initial: Moment = field(init=False)  # before the first batch
    start: Moment = field(init=False)  # that is rewound to
    pruned: dict[str, Any] = field(init=False)  # the state of the Sparsifier after the last pruning

    def __post_init__(self) -> None:
        if not callable(self.fit):
            check_count("fit", self.fit)
        rewind_to, learn = self.rewind_to, self.learn
        if isinstance(rewind_to, bool) or not isinstance(rewind_to, Real) or not 0 <= float(rewind_to) < inf:
            raise ValueError(f"rewind_to is an epoch from 0 on, such as 0, 0.5 or 2, not {rewind_to!r}")
        for control in self.controls:
            if control not in CONTROLS:
                raise ValueError(
                    f"lottery_ticket: unknown control {control!r}; {close_matches(str(control), CONTROLS)}"
                )
        if not isinstance(self.calibration, (Iterable, NoneType)):
            raise TypeError(
                f"lottery_ticket: calibration is a list or a data loader of batches, not {self.calibration!r}"
            )
        for kind in (SparsifyCallback, KeepSparsity):
            if learn._grab_cbs(kind):
                raise ValueError(
                    f"lottery_ticket starts dense and prunes between fits itself; take the other off before with "
                    f"learn.remove_cb({kind.__name__})"
                )
        if len(learn.dls.loaders) < 2 or not len(learn.dls.valid) or not hasattr(learn, "recorder"):
            raise ValueError(
                "lottery_ticket measures each ticket: the Learner needs data to validate with and a Recorder"
            )
        probe = self._make_sparsifier()
        scopes(self.sparsity, probe.targets, probe.dense, probe.candidates, probe.model)
        if not probe.collected.at("forward", "loss", "backward"):
            probe.check(self.sparsity)

    # --- Rounds -------------------------------------------------------------------------------------------------

    def train_dense(self) -> Ticket:
        """The first round, in which the points are noted that later ones start from."""
        learn, moments = self.learn, {}

        def note(batch: int) -> Callable[[], None]:
            return lambda: moments.update({batch: Moment.of(learn)})

        metrics = self._fitted(AtBatch({batch: note(batch) for batch in {0, self._rewind_batch}}))
        self.initial, self.start = moments[0], moments[self._rewind_batch]
        self._begin()
        return Ticket(dict(self.sparsifier.masks), self.sparsifier.sparsity, metrics, {}, self.start.model)

    def _begin(self, **options: Any) -> None:
        """Make the Sparsifier at the point that is rewound to, which is what `init` means to a criterion."""
        trained = copy_to_device(self.model.state_dict(), "cpu")
        self.model.load_state_dict(self.start.model)
        self.sparsifier = self._make_sparsifier(**options)
        self.model.load_state_dict(trained)
        self.pruned = self.sparsifier.state_dict()

    def next_ticket(self, number: int) -> Ticket:
        """Prune what the last ticket has become, and train the controls and the ticket."""
        show_data(self.learn, self.sparsifier, self.calibration)
        self.sparsifier.sparsify(mapped(self.sparsity, lambda s: exponential(0.0, s, number / self.rounds)))
        self.pruned = self.sparsifier.state_dict()
        masks, generator = dict(self.sparsifier.masks), torch.Generator()
        random, of_controls = random_states(self.learn), {}
        for control in self.controls if (self.rounds - number) % self.controls_every == 0 else ():
            generator.manual_seed(self.asked["seed"] + number)
            if control == "shuffled":
                of_controls[control] = self._train(self._shuffled(masks, generator), self.start, self._rewind_batch)
            else:
                of_controls[control] = self._train(masks, self.initial, 0, lambda: self._reinitialize(generator))
        restore_random(self.learn, random)  # so that the ticket is the same without controls
        metrics = self._train(masks, self.start, self._rewind_batch)
        return Ticket(masks, self.sparsifier.sparsity, metrics, of_controls, self.start.model)

    def _train(
        self, masks: Mapping[str, Tensor], start: Moment, batch: int, change: Callable[[], Any] = lambda: None
    ) -> Metrics:
        """Take training up at a batch from `start`, with weights changed as `change` does, and masks."""
        self._set(masks)
        keeper = KeepSparsity(self.sparsifier)

        def begin() -> None:
            start.put(self.learn)
            change()
            keeper.enforce()

        return self._fitted(AtBatch({0: begin}), Skip(batch), keeper)

    def _fitted(self, at: AtBatch, *others: Callback) -> Metrics:
        """Metrics after a fit in which something is done at batches."""
        learn = self.learn
        if learn.opt is not None:
            learn.opt.clear_state()
        with learn.added_cbs([at, *others]):
            try:
                self.fit(learn) if callable(self.fit) else learn.fit(self.fit)
            finally:
                for other in others:
                    if isinstance(other, Skip):
                        other.resume()
            if at.at:
                raise ValueError(
                    f"lottery_ticket: rewind_to={self.rewind_to:g} is after the end of the fit, which had {at.over} "
                    f"batches, {len(learn.dls.train)} in an epoch"
                )
            with unchanged(learn):  # trackers and loggers would take it for a part of training
                values = learn.validate()
        return {name: float(value) for name, value in zip(metric_names(learn), values, strict=True)}

    def keep_zeros(self) -> None:
        """Leave what keeps the zeros of the last ticket on the Learner."""
        self._set(self.sparsifier.masks)
        self.learn.add_cb(KeepSparsity(self.sparsifier))
        notify(
            self.learn,
            f"KeepSparsity holds the {percent(self.sparsifier.sparsity)} of zeros of the last ticket in later fits; "
            "learn.remove_cb(KeepSparsity) lets them go",
        )

    # --- Helpers ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """Of the Learner."""
        return unwrapped(self.learn.model)

    @property
    def _rewind_batch(self) -> int:
        return round(self.rewind_to * len(self.learn.dls.train))

    def _make_sparsifier(self, **options: Any) -> Sparsifier:
        example_input = first_batch(self.learn)[:-1]
        return Sparsifier(self.learn.model, **{"example_input": example_input, **self.asked, **options})

    def _set(self, masks: Mapping[str, Tensor]) -> None:
        self.sparsifier.load_state_dict({**self.pruned, "masks": masks})

    def _shuffled(self, masks: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The groups of every mask in another order."""
        shuffled = {}
        for name, mask in masks.items():
            kept = self.sparsifier.groupings[name].gather(mask.cpu())
            shuffled[name] = self.sparsifier._mask_of(name, kept[torch.randperm(len(kept), generator=generator)])
        return shuffled

    @torch.no_grad()
    def _reinitialize(self, generator: torch.Generator) -> None:
        if self.reinitialize is not None:
            self.reinitialize(self.model)
            return
        for parameter in self.model.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))

    # --- State --------------------------------------------------------------------------------------------------

    @property
    def _settings(self) -> dict[str, str]:
        """What has to be the same when a run is taken up."""
        own = ("sparsity", "rounds", "rewind_to", "controls", "controls_every", "fit")
        given = {name: getattr(self, name) for name in own} | self.asked
        given["granularity"], given["context"], given["criteria"], _ = resolve_axes(
            *(given[axis] for axis in ("granularity", "context", "criteria"))
        )
        for patterns in ("layers", "exclude"):
            if given.get(patterns) is not None:
                given[patterns] = as_patterns(given[patterns])
        return {name: _told(value) for name, value in given.items() if value is not None}

    def save(self, path: Any, tickets: Sequence[Ticket]) -> None:
        """Write all that the next round needs."""
        state = {
            "settings": self._settings,
            "initial": vars(self.initial),
            "optimizer": self.start.optimizer,
            "trained": copy_to_device(self.model.state_dict(), "cpu"),
            "sparsifier": {**self.pruned, "masks": self.sparsifier.masks},
            "random": random_states(self.learn),
        }
        save_run(path, {**LotteryTickets(tickets).state(), "run": state})

    def take_up(self, saved: Mapping[str, Any], path: Any) -> list[Ticket]:
        """The tickets of a run that was saved after a round, which goes on as if it had not been ended."""
        tickets = LotteryTickets.from_state(saved)
        if "run" not in saved:
            raise ValueError(f"{path} has tickets, but no run to go on with; give another path=, or remove the file")
        state = saved["run"]
        saved_settings, settings = state["settings"], self._settings
        for name in saved_settings.keys() | settings.keys():
            if saved_settings.get(name) != settings.get(name):
                raise ValueError(
                    f"{path} was written with {name}={saved_settings.get(name)}, not {settings.get(name)}; give the "
                    "same arguments to go on with that run, or another path="
                )
        tickets[0].apply(self.model)  # raises if it is another model
        self.initial, self.start = Moment(**state["initial"]), Moment(saved["start"], state["optimizer"])
        # By name, for which layers take part by default depends on which are frozen at the moment.
        self._begin(layers=list(state["sparsifier"]["masks"]), exclude=None)
        self.pruned = state["sparsifier"]
        self._set(self.pruned["masks"])
        self.model.load_state_dict(state["trained"])
        restore_random(self.learn, state["random"])
        return list(tickets)


def _told(value: Any) -> str:
    """A setting in words that are the same in another process."""
    if is_dataclass(value) and not isinstance(value, type):  # such as bounded(...)
        return f"{name_of(value)}: {_told(vars(value))}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_told(key)}: {_told(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_told, value))
    if isinstance(value, nn.Module):
        return type(value).__name__
    return name_of(value) if callable(value) else str(value)
