"""lottery_ticket: iterative magnitude pruning with rewinding, and the controls that make it evidence.

Frankle and Carbin, 2019, "The Lottery Ticket Hypothesis" (arXiv:1803.03635); rewinding to a point in training:
Frankle et al., 2019, "Stabilizing the Lottery Ticket Hypothesis" (arXiv:1903.01611).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from fastai.learner import Learner
from torch import Tensor, nn

from .argument import check_count, check_seed, check_sparsity, mapped
from .callback import SparsifyCallback
from .keep import KeepSparsity
from .learner import notify, show_data
from .measuring import first_batch, metric_names
from .parallel import unwrapped
from .registry import close_matches, name_of
from .report import percent
from .rewind import FromBatch, Moment, copied_to, random_states, restore_random
from .sparsifier import Sparsifier
from .steps import exponential
from .ticket import LotteryTickets, Metrics, Ticket, read, write

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
    same weights and its mask in another order. Metrics are those of learn.validate() after a fit.
    """
    asked = {"granularity": granularity, "context": context, "criteria": criteria, "seed": check_seed(seed), **options}
    run = _Run(learn, check_sparsity(sparsity), check_count("rounds", rounds), fit, rewind_to, controls, asked)
    run.controls_every = check_count("controls_every", controls_every)
    run.reinitialize, run.calibration = reinitialize, calibration
    begun = path is not None and Path(path).exists()
    tickets = run.take_up(read(path), path) if begun else [run.train_dense()]
    while True:
        if path is not None:
            run.save(path, tickets)
        if len(tickets) > run.rounds:
            break
        tickets.append(run.next_ticket(len(tickets)))
    run.keep_zeros()
    return LotteryTickets(tickets)


class _Run:
    """What the rounds have in common. ValueError or TypeError, before anything is trained, where that cannot work."""

    sparsifier: Sparsifier
    initial: Moment  # before the first batch
    start: Moment  # that is rewound to

    def __init__(
        self, learn: Learner, sparsity: Any, rounds: int, fit: Any, rewind_to: Any, controls: Any, asked: dict
    ):
        self.learn, self.sparsity, self.rounds, self.asked = learn, sparsity, rounds, asked
        self.fit = _check_fit(fit)
        if isinstance(rewind_to, bool) or not isinstance(rewind_to, Real) or not float(rewind_to) >= 0:
            raise ValueError(f"rewind_to is an epoch from 0 on, such as 0, 0.5 or 2, not {rewind_to!r}")
        self.rewind_to = float(rewind_to)
        self.controls = [controls] if isinstance(controls, str) else list(controls)
        for control in self.controls:
            if control not in CONTROLS:
                raise ValueError(
                    f"lottery_ticket: unknown control {control!r}; {close_matches(str(control), CONTROLS)}"
                )
        for kind in (SparsifyCallback, KeepSparsity):
            if learn._grab_cbs(kind):
                raise ValueError(
                    f"lottery_ticket starts dense and prunes between fits itself; take the other off before with "
                    f"learn.remove_cb({kind.__name__})"
                )
        self.controls_every = 1
        self.reinitialize: Callable[[nn.Module], Any] | None = None
        self.calibration: Iterable | None = None
        probe = self._make_sparsifier()
        if not probe.collected.at("forward", "loss", "backward"):
            probe.check(sparsity)

    # --- Rounds -------------------------------------------------------------------------------------------------

    def train_dense(self) -> Ticket:
        """The first round, in which the points are noted that later ones start from."""
        learn, moments = self.learn, {}

        def note(batch: int) -> Callable[[], None]:
            return lambda: moments.update({batch: Moment.of(learn)})

        metrics = self._fitted([FromBatch({batch: note(batch) for batch in {0, self._rewind_batch}})])
        self.initial, self.start = moments[0], moments[self._rewind_batch]
        self._begin()
        return Ticket(dict(self.sparsifier.masks), self.sparsifier.sparsity, metrics, {}, self.start.model)

    def _begin(self) -> None:
        """Make the Sparsifier at the point that is rewound to, which is what `init` means to a criterion."""
        trained = copied_to(self.model.state_dict(), "cpu")
        self.model.load_state_dict(self.start.model)
        self.sparsifier = self._make_sparsifier()
        self.model.load_state_dict(trained)
        self.pruned = self.sparsifier.state_dict()

    def next_ticket(self, number: int) -> Ticket:
        """Prune what the last ticket has become, and train the controls and the ticket."""
        show_data(self.learn, self.sparsifier, self.calibration)
        self.sparsifier.sparsify(mapped(self.sparsity, lambda s: exponential(0.0, s, number / self.rounds)))
        self.pruned = self.sparsifier.state_dict()
        masks, generator = dict(self.sparsifier.masks), torch.Generator()
        of_controls = {}
        for control in self.controls if (self.rounds - number) % self.controls_every == 0 else ():
            generator.manual_seed(self.asked["seed"] + number)
            if control == "shuffled":
                of_controls[control] = self._train(self._shuffled(masks, generator), self.start, self._rewind_batch)
            else:
                of_controls[control] = self._train(masks, self.initial, 0, lambda: self._reinitialize(generator))
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

        return self._fitted([keeper, FromBatch({batch: begin}, skip=batch)])

    def _fitted(self, callbacks: list) -> Metrics:
        """Metrics after a fit with callbacks, the last of which counts batches."""
        learn, opt = self.learn, self.learn.opt
        if opt is not None:
            opt.clear_state()
        with learn.added_cbs(callbacks):
            self.fit(learn)
            if callbacks[-1].at:
                raise ValueError(
                    f"lottery_ticket: rewind_to={self.rewind_to:g} is after the end of the fit, which had "
                    f"{callbacks[-1].over} batches, {len(learn.dls.train)} in an epoch"
                )
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

    def _make_sparsifier(self) -> Sparsifier:
        example_input = first_batch(self.learn)[:-1]
        return Sparsifier(self.learn.model, **{"example_input": example_input, **self.asked})

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
    def _settings(self) -> dict[str, Any]:
        """What has to be the same when a run is taken up."""
        given = {
            "sparsity": self.sparsity,
            "rounds": self.rounds,
            "rewind_to": self.rewind_to,
            "controls": self.controls,
        }
        return {
            name: name_of(value) if callable(value) else repr(value) for name, value in (given | self.asked).items()
        }

    def save(self, path: Any, tickets: Sequence[Ticket]) -> None:
        """Write all that the next round needs."""
        state = {
            "settings": self._settings,
            "initial": vars(self.initial),
            "optimizer": self.start.optimizer,
            "trained": copied_to(self.model.state_dict(), "cpu"),
            "sparsifier": {**self.pruned, "masks": self.sparsifier.masks},
            "random": random_states(self.learn),
        }
        write(path, {**LotteryTickets(tickets).state(), "run": state})

    def take_up(self, saved: Mapping[str, Any], path: Any) -> list[Ticket]:
        """The tickets of a run that was saved after a round, which goes on as if it had not been ended."""
        tickets = LotteryTickets.from_state(saved)
        if "run" not in saved:
            raise ValueError(f"{path} has tickets, but no run to go on with; give another path=, or remove the file")
        state = saved["run"]
        for name, value in self._settings.items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"{path} was written with {name}={state['settings'].get(name)}, not {value}; give the same "
                    "arguments to go on with that run, or another path="
                )
        tickets[0].apply(self.model)  # raises if it is another model
        self.initial, self.start = Moment(**state["initial"]), Moment(saved["start"], state["optimizer"])
        self._begin()
        self.pruned = state["sparsifier"]
        self._set(self.pruned["masks"])
        self.model.load_state_dict(state["trained"])
        restore_random(self.learn, state["random"])
        return list(tickets)


def _check_fit(fit: Any) -> Callable[[Learner], Any]:
    if callable(fit):
        return fit
    epochs = check_count("fit", fit)
    return lambda learn: learn.fit(epochs)
