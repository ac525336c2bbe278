"""Fastai callbacks: when to call the Sparsifier, never how to sparsify."""

from __future__ import annotations

from typing import Any

from fastai.callback.core import Callback
from fastai.learner import ValueMetric, noop

from .level import check_sparsity, scaled
from .report import percent
from .schedule import progress, schedules
from .sparsifier import Sparsifier, check_round_to, resolve_axes
from .target import as_patterns


class _Masking(Callback):
    "Base of the callbacks that keep masked weights zero: gradients before they are clipped, weights after the step"

    # After MixedPrecision (10) has unscaled the gradients, before GradientClip (11) takes their norm.
    order = 10.5

    def _sparsifiers(self) -> list[Sparsifier]:
        raise NotImplementedError

    def _notify(self, message: str) -> None:
        """One line for the user, where the Learner's own table is shown."""
        if self.learn.logger is not noop:
            print(message)

    def before_step(self):
        "Zero the gradients of masked weights"
        for sparsifier in self._sparsifiers():
            sparsifier.mask_gradients()

    def after_step(self):
        "Zero the masked weights"
        for sparsifier in self._sparsifiers():
            sparsifier.apply_masks()


class SparsifyCallback(_Masking):
    "Make the model sparse while it trains: `sparsity` of its weights are zero at the end of the schedule"

    # Without values here, fastai would look names that are read before the first fit up in the Learner.
    sparsifier: Any = None  # the Sparsifier, from the first batch on
    _reached = 0.0
    _floor = 0.0
    _steps = 0
    _advances = False
    _metric: ValueMetric | None = None

    def __init__(
        self,
        sparsity=None,  # Fraction of the weights to be zero, 0.5 for 50 %; or {pattern: fraction} by layer
        granularity="weight",  # How: a name of `granularities`, a tuple of axes such as ('out', 'h'), or a function
        context="global",  # Where: a name of `contexts` or a function
        criteria="large_final",  # What: a name of `criteria` or a function of named quantities
        schedule="agp",  # When: a name of `schedules`, a function from [0, 1] to [0, 1], or a fastai annealer
        *,
        compression_ratio=None,  # Another name of `sparsity`, the same number
        layers=None,  # What takes part: classes, modules, names, globs, functions of (name, module), or a list of them
        exclude=None,  # What stays dense, in the same words
        pool="mean",  # How the scores of a group become one: 'mean', 'sum', 'max', 'l2' or a function
        round_to=None,  # Keep a multiple of this many groups in every layer
        seed=0,  # Of the generator that random criteria draw from
    ):
        super().__init__()
        self.sparsity = check_sparsity(sparsity, compression_ratio)
        self.granularity, self.context, self.criteria, self.pool = resolve_axes(granularity, context, criteria, pool)
        self.schedule = schedules.resolve(schedule)
        self.layers = None if layers is None else as_patterns(layers)
        self.exclude = None if exclude is None else as_patterns(exclude)
        self.round_to, self.seed = check_round_to(round_to), seed

    def __setattr__(self, name, value):
        # Taken off the Learner, as fit does with its own callbacks even when it is interrupted: leave no column there.
        if name == "learn" and value is None:
            self._remove_column()
        super().__setattr__(name, value)

    def _sparsifiers(self) -> list[Sparsifier]:
        return [] if self.sparsifier is None else [self.sparsifier]

    def before_fit(self):
        "Refuse a second SparsifyCallback; show the measured sparsity in the table"
        if len(self.learn._grab_cbs(SparsifyCallback)) > 1:
            raise ValueError(
                "two SparsifyCallbacks in one fit would undo each other; give one of them a dictionary of "
                "sparsities by layer, or take the other off with learn.remove_cb(SparsifyCallback)"
            )
        self._remove_column()  # left over from an interrupted fit
        if not self.learn.lock.locked() and not hasattr(self.learn, "lr_finder"):
            self._metric = ValueMetric(lambda: self.sparsifier.sparsity if self.sparsifier else 0.0, "sparsity")
            self.learn.metrics = self.learn.metrics + [self._metric]

    def before_train(self):
        "Decide whether the schedule advances: it does in a fit of all layers, not in lr_find or while some are frozen"
        frozen = getattr(self.learn.opt, "frozen_idx", 0) > 0
        self._advances = not frozen and not hasattr(self.learn, "lr_finder")
        if self.learn.epoch == 0:
            self._steps, self._floor = 0, self._reached
            if frozen and not hasattr(self.learn, "lr_finder"):
                level = self.sparsifier.sparsity if self.sparsifier else 0.0
                self._notify(
                    f"SparsifyCallback: some layers are frozen, so sparsity is held at {percent(level)} in this fit"
                )

    def before_batch(self):
        "Make the Sparsifier when the fit begins, and take the sparsity to where the schedule begins"
        if not (self._advances and self.learn.training):
            return
        if self.sparsifier is None or self.sparsifier.model is not self.learn.model:
            self._make_sparsifier()
        if self._steps == 0:
            self._go_to((self.learn.epoch * self.learn.n_iter + self.learn.iter) / self._total)

    def after_step(self):
        "Take the sparsity to where the schedule is after this step"
        if self._advances:
            self._steps += 1
            self._go_to((self.learn.epoch * self.learn.n_iter + self.learn.iter + 1) / self._total)
        else:
            super().after_step()

    def after_train(self):
        "Close the schedule, if the last batch of the fit has come and made no step of its own"
        finished = self.learn.epoch == self.learn.n_epoch - 1 and self.learn.iter == self.learn.n_iter - 1
        if self._advances and finished and self._steps:
            self._go_to(1.0)

    def after_fit(self):
        "Take the column off the table; leave what keeps the zeros in later fits"
        self._remove_column()
        if self._advances and self._steps and self.sparsifier is not None:
            self.sparsifier.apply_masks()
            self._leave_keeper()
        self._advances = False

    @property
    def _total(self) -> int:
        return self.learn.n_epoch * self.learn.n_iter

    def _go_to(self, t: float) -> None:
        """Sparsify to where the schedule is at t, but not below what earlier fits have reached."""
        reached = max(progress(self.schedule, t), self._floor)
        if reached == self._reached:
            self.sparsifier.apply_masks()
            return
        self.sparsifier.sparsify(scaled(self.sparsity, reached))
        self._reached = reached

    def _make_sparsifier(self) -> None:
        self.sparsifier = Sparsifier(
            self.learn.model, self.granularity, self.context, self.criteria, layers=self.layers, exclude=self.exclude,
            pool=self.pool, round_to=self.round_to, seed=self.seed, example_input=self.learn.xb,
        )  # fmt: skip
        self._reached = self._floor = 0.0
        for keeper in self.learn._grab_cbs(KeepSparsity):
            keeper.hand_over(self.sparsifier)

    def _leave_keeper(self) -> None:
        keepers = self.learn._grab_cbs(KeepSparsity)
        if keepers:
            keepers[0].take(self.sparsifier)
        elif self.sparsifier.has_masked:
            self.learn.add_cb(KeepSparsity(self.sparsifier))
            self._notify(
                f"KeepSparsity now holds the {percent(self.sparsifier.sparsity)} of zeros in later fits; "
                "learn.remove_cb(KeepSparsity) lets them go"
            )

    def _remove_column(self) -> None:
        if self._metric is not None:
            self.learn.metrics = [metric for metric in self.learn.metrics if metric is not self._metric]
            self._metric = None


class KeepSparsity(_Masking):
    "Keep the zeros of a sparse model zero while it trains on; SparsifyCallback leaves one on the Learner"

    def __init__(
        self,
        sparsifier=None,  # Whose masks to keep; by default, the zeros that the model has at the first batch
    ):
        super().__init__()
        self.kept = [] if sparsifier is None else [sparsifier]
        self.recovers = sparsifier is None

    def _sparsifiers(self) -> list[Sparsifier]:
        return [sparsifier for sparsifier in self.kept if sparsifier is not self._active]

    @property
    def _active(self) -> Sparsifier | None:
        """The Sparsifier of a SparsifyCallback in this fit, which keeps its own zeros."""
        callbacks = self.learn._grab_cbs(SparsifyCallback)
        return callbacks[0].sparsifier if callbacks else None

    def before_batch(self):
        "Recover the masks from the zeros of the model, if they were not given"
        if self.recovers and self.learn.training:
            sparsifier = Sparsifier(self.learn.model)
            sparsifier.recover_masks()
            self.kept, self.recovers = [*self.kept, sparsifier], False

    def take(self, sparsifier: Sparsifier) -> None:
        "Keep the masks of `sparsifier` from now on, too"
        if not any(held is sparsifier for held in self.kept):
            self.kept.append(sparsifier)

    def hand_over(self, sparsifier: Sparsifier) -> None:
        "Start a new Sparsifier with the zeros that are kept, and drop what it now keeps itself"
        self.kept = [held for held in self.kept if not sparsifier.adopt(held)]
