"""The rounds of lottery_ticket: train the dense net, prune, rewind, train the controls and the ticket, save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from numbers import Real
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
from ..sparsifier.layer_selection import scopes
from ..sparsifier.options import Sparsity, mapped, resolve_axes
from ..sparsifier.sparsifier import Sparsifier
from ..sparsifier.steps import exponential
from ..support.at_end import AtEnd
from ..support.checks import check_count
from ..support.registry import close_matches
from ..support.table import percent
from .rewind import (
    CallBeforeBatch,
    Checkpoint,
    SkipBatches,
    check_optimizer,
    check_random_states,
    copy_to_device,
    random_states,
    restore_random_states,
)
from .run_check import check_fits, check_order, check_run
from .saved_run import check_same_settings, in_words, save_run
from .ticket import LotteryTickets, Metrics, Ticket, unchanged_on_error

CONTROLS = ("reinitialized", "shuffled")


@dataclass
class LotteryRun:
    """The rounds of one call of lottery_ticket. Arguments are checked before anything is trained."""

    learn: Learner
    sparsity: Sparsity
    rounds: int
    fit: Any
    rewind_to: Any
    controls: list[str]
    controls_every: int
    reinitialize: Callable[[nn.Module], Any] | None
    calibration: Iterable | None
    asked: dict[str, Any]  # arguments of Sparsifier

    sparsifier: Sparsifier = field(init=False)
    initial: Checkpoint = field(init=False)  # before the first batch
    start: Checkpoint = field(init=False)  # at `rewind_to`
    pruned: dict[str, Any] = field(init=False)  # the state of the Sparsifier after the last pruning

    def __post_init__(self) -> None:
        if not callable(self.fit):
            check_count("fit", self.fit)
        rewind_to, learn = self.rewind_to, self.learn
        if isinstance(rewind_to, bool) or not isinstance(rewind_to, Real) or not 0 <= float(rewind_to) < inf:
            raise ValueError(
                f"lottery_ticket: rewind_to must be an epoch of at least 0, such as 0, 0.5 or 2, not {rewind_to!r}"
            )
        for control in self.controls:
            if control not in CONTROLS:
                raise ValueError(
                    f"lottery_ticket: unknown control {control!r}; {close_matches(str(control), CONTROLS)}"
                )
        if not isinstance(self.calibration, (Iterable, NoneType)):
            raise TypeError(
                f"lottery_ticket: calibration must be a list or a data loader of batches, not {self.calibration!r}"
            )
        for kind in (SparsifyCallback, KeepSparsity):
            if learn._grab_cbs(kind):
                raise ValueError(
                    f"lottery_ticket begins with a dense net and prunes between its fits, so the Learner must not have "
                    f"a {kind.__name__}; call learn.remove_cb({kind.__name__})"
                )
        if len(learn.dls.loaders) < 2 or not len(learn.dls.valid) or not hasattr(learn, "recorder"):
            raise ValueError("lottery_ticket measures each ticket, so the Learner needs validation data and a Recorder")
        probe = self._make_sparsifier()
        scopes(self.sparsity, probe.layers, probe.model)
        if not probe.looks_at_data:
            probe.check(self.sparsity)

    # --- Rounds -------------------------------------------------------------------------------------------------

    def train_dense(self) -> Ticket:
        """Train the dense net, and store the checkpoints from which later rounds are trained."""
        learn, checkpoints = self.learn, {}

        def store(batch: int) -> Callable[[], None]:
            return lambda: checkpoints.update({batch: Checkpoint.of(learn)})

        metrics = self._fit_and_validate(CallBeforeBatch({batch: store(batch) for batch in {0, self._rewind_batch}}))
        self.initial, self.start = checkpoints[0], checkpoints[self._rewind_batch]
        self._place_sparsifier()
        return Ticket(dict(self.sparsifier.masks), self.sparsifier.sparsity, metrics, {}, self.start.model)

    def _place_sparsifier(self, **options: Any) -> None:
        """Make the Sparsifier on the weights at `rewind_to`, which a criterion sees as `init`."""
        trained = copy_to_device(self.model.state_dict(), "cpu")
        self.model.load_state_dict(self.start.model)
        self.sparsifier = self._make_sparsifier(**options)
        self.model.load_state_dict(trained)
        self.pruned = self.sparsifier.state_dict()

    def train_ticket(self, number: int) -> Ticket:
        """Prune the net that the last round has trained, then train the controls and the ticket of round `number`."""
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
        restore_random_states(self.learn, random)  # so that controls do not change the ticket
        metrics = self._train(masks, self.start, self._rewind_batch)
        return Ticket(masks, self.sparsifier.sparsity, metrics, of_controls, self.start.model)

    def _train(
        self, masks: Mapping[str, Tensor], start: Checkpoint, batch: int, change: Callable[[], Any] = lambda: None
    ) -> Metrics:
        """Train with masks from a checkpoint. batch: that of the checkpoint. change: called on the restored net."""
        self._set_masks(masks)
        keeper = KeepSparsity(self.sparsifier)

        def restore() -> None:
            start.restore(self.learn)
            change()
            keeper.enforce()

        return self._fit_and_validate(CallBeforeBatch({0: restore}), SkipBatches(batch), keeper)

    def _fit_and_validate(self, before_batch: CallBeforeBatch, *others: Callback) -> Metrics:
        """Run the user's fit with these callbacks, and return the metrics after it."""
        learn = self.learn
        if learn.opt is not None:
            learn.opt.clear_state()
        callbacks = [before_batch, *others]

        def undo() -> None:
            for each in callbacks:
                if isinstance(each, SkipBatches):
                    each.resume()
                learn.remove_cb(each)

        at_end = AtEnd(undo)
        with at_end, at_end:
            learn.add_cbs(callbacks)
            self.fit(learn) if callable(self.fit) else learn.fit(self.fit)
            if before_batch.waiting:
                raise ValueError(
                    f"lottery_ticket: rewind_to={self.rewind_to:g} is after the end of the fit, which had "
                    f"{before_batch.done} batches, {len(learn.dls.train)} in an epoch; pass a smaller rewind_to"
                )
            with unchanged(learn):  # trackers and loggers would take the validation for a part of training
                values = learn.validate()
        return {name: float(value) for name, value in zip(metric_names(learn), values, strict=True)}

    def keep_zeros(self) -> None:
        """Leave a KeepSparsity on the Learner that keeps the zeros of the last ticket."""
        self._set_masks(self.sparsifier.masks)
        self.learn.add_cb(KeepSparsity(self.sparsifier))
        notify(
            self.learn,
            f"KeepSparsity keeps the zeros of the last ticket ({percent(self.sparsifier.sparsity)}) in later fits; "
            "learn.remove_cb(KeepSparsity) stops that",
        )

    # --- Helpers ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model of the Learner, without wrappers."""
        return unwrapped(self.learn.model)

    @property
    def _rewind_batch(self) -> int:
        return round(self.rewind_to * len(self.learn.dls.train))

    def _make_sparsifier(self, **options: Any) -> Sparsifier:
        example_input = first_batch(self.learn)[:-1]
        return Sparsifier(self.learn.model, **{"example_input": example_input, **self.asked, **options})

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        self.sparsifier.load_state_dict({**self.pruned, "masks": masks})

    def _shuffled(self, masks: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        return _shuffled(self.sparsifier, masks, generator)

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
        """The arguments that must be the same when a run resumes, as texts."""
        own = ("sparsity", "rounds", "rewind_to", "controls", "controls_every", "fit")
        given = {name: getattr(self, name) for name in own} | self.asked
        given["granularity"], given["context"], given["criteria"], _ = resolve_axes(
            *(given[axis] for axis in ("granularity", "context", "criteria"))
        )
        for patterns in ("layers", "exclude"):
            if given.get(patterns) is not None:
                given[patterns] = as_patterns(given[patterns])
        return {name: in_words(value) for name, value in given.items() if value is not None}

    def save(self, path: Any, tickets: Sequence[Ticket]) -> None:
        """Write the tickets and all that the next round needs."""
        state = {
            "settings": self._settings,
            "initial": vars(self.initial),
            "optimizer": self.start.optimizer,
            "trained": copy_to_device(self.model.state_dict(), "cpu"),
            "sparsifier": {**self.pruned, "masks": self.sparsifier.masks},
            "random": random_states(self.learn),
        }
        save_run(path, {**LotteryTickets(tickets).state(), "run": state})

    def resume(self, saved: Mapping[str, Any], path: Any) -> list[Ticket]:
        """Restore the state after the last round that was saved, and return the tickets so far.

        Everything is checked first. If restoring fails nevertheless, the model and the random generators are put back.
        """
        if "run" not in saved:
            raise ValueError(
                f"{path} has tickets but no run that can be resumed; pass another path=, or remove the file"
            )
        state, random = saved["run"], random_states(self.learn)
        try:
            tickets = LotteryTickets.from_state(saved)
            check_run(state)
            check_same_settings(state["settings"], self._settings)
            self._check_fits(tickets, saved["start"], state)
            with unchanged_on_error(self.model):
                self._restore(saved["start"], state)
        except BaseException as error:
            restore_random_states(self.learn, random)
            if isinstance(error, Exception):
                raise ValueError(f"{path} cannot be resumed: {error}") from error
            raise
        return list(tickets)

    def _check_fits(self, tickets: LotteryTickets, start: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Check that a saved run fits the Learner, before anything is changed."""
        masks, initial = state["sparsifier"]["masks"], state["initial"]
        goes_on = len(tickets) <= self.rounds
        check_fits(self.model, start, "start", masks)
        check_fits(self.model, initial["model"], "run.initial.model")
        # A run that has ended in NaN is resumed like one that has not been interrupted, without training.
        check_fits(self.model, state["trained"], "run.trained", finite=goes_on)
        check_order(tickets, self.rounds, masks)
        for where, optimizer in (
            ("run.initial.optimizer", initial["optimizer"]),
            ("run.optimizer", state["optimizer"]),
        ):
            check_optimizer(self.learn, optimizer, where)
        check_random_states(state["random"])

    def _restore(self, start: dict[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore a run that has been checked."""
        self.initial, self.start = Checkpoint(**state["initial"]), Checkpoint(start, state["optimizer"])
        # By name, because the default selection depends on which layers are frozen at present.
        self._place_sparsifier(layers=list(state["sparsifier"]["masks"]), exclude=None)
        self.pruned = state["sparsifier"]
        self._set_masks(self.pruned["masks"])
        self.model.load_state_dict(state["trained"])
        restore_random_states(self.learn, state["random"])


def _shuffled(sparsifier: Sparsifier, masks: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Masks with as many remaining groups in each layer, at random places; whole joint groups, if there are any."""
    coupling, shuffled = sparsifier.ranking.coupling, {}
    layers = {name: sparsifier.layers[name].with_mask(mask, 0.0) for name, mask in masks.items()}
    if coupling is None or not coupling.joint:
        for name, layer in layers.items():
            kept = layer.kept.cpu()
            shuffled[name] = layer.mask_of(kept[torch.randperm(len(kept), generator=generator)])
        return shuffled
    for part in dict.fromkeys(coupling.part_of[name] for name in layers):
        kept_groups = part.kept(layers)[torch.randperm(part.count, generator=generator).numpy()]
        for name in part.channels:
            shuffled[name] = layers[name].mask_of(torch.from_numpy(part.kept_groups(name, kept_groups)))
    return shuffled
