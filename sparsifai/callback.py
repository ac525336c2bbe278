"""Fastai callbacks: when to call the Sparsifier, never how to sparsify.

SparsifyCallback moves the sparsity along the schedule. KeepSparsity holds the zeros, in this fit and in later ones.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from fastai.callback.core import Callback
from fastai.learner import ValueMetric, noop

from .argument import check_round_to, check_seed, check_sparsity, resolve_axes, scaled
from .masking import zero_gradients, zero_weights
from .report import Count, percent
from .schedule import between, progress, schedules
from .sparsifier import Sparsifier
from .target import as_patterns, find_targets, matching


class KeepSparsity(Callback):
    "Keep the zeros of a sparse model zero while it trains; SparsifyCallback leaves one on the Learner"

    # After MixedPrecision (10) has unscaled the gradients, before GradientClip (11) takes their norm.
    order = 10.5

    def __init__(
        self,
        sparsifier=None,  # Whose masks to keep; by default, the zeros that the model has at the first batch
    ):
        super().__init__()
        if sparsifier is not None and not isinstance(sparsifier, Sparsifier):
            raise TypeError(f"KeepSparsity keeps the masks of a Sparsifier, not {sparsifier!r}")
        self.sparsifier: Sparsifier | None = sparsifier
        self.held_model = None if sparsifier is None else sparsifier.model
        self.recovers = sparsifier is None
        self.earlier: dict[str, Any] = {}  # masks of earlier Sparsifiers, by parameter name

    def before_fit(self):
        "Zero the masked weights, which an interrupted step may have changed"
        if not self.recovers and self.held_model is not self.learn.model:
            raise ValueError(
                "KeepSparsity holds the zeros of another model than the Learner's; take it off with "
                "learn.remove_cb(KeepSparsity), or give it no Sparsifier to keep the zeros of this one"
            )
        zero_weights(self._masked())

    def before_batch(self):
        "Take the masks from the zeros of the model, if they were not given"
        if self.recovers and self.learn.training:
            self.recovers, self.held_model = False, self.learn.model
            for name, target in find_targets(self.learn.model).items():
                mask = target.parameter.detach() != 0
                # A layer of nothing but zeros, as some are initialized, is not a masked one.
                if mask.any() and not mask.all():
                    self.earlier[name] = mask
            self._recover_dead_filters()

    def before_step(self):
        "Zero the gradients of masked weights"
        zero_gradients(self._masked())

    def after_step(self):
        "Zero the masked weights"
        zero_weights(self._masked())

    def _recover_dead_filters(self) -> None:
        """Where whole filters are zero, what stands behind them and is zero too is kept so."""
        if any((mask.flatten(1).any(1) == 0).any() for mask in self.earlier.values()):
            model = self.learn.model
            filters = Sparsifier(model, "filter", layers=lambda name, module: True, example_input=self.learn.xb)
            filters.recover_masks()
            for name, mask in filters.follower_masks.items():
                self.earlier[name] = mask | (attrgetter(name)(model).detach() != 0)

    def hold(self, sparsifier: Sparsifier) -> None:
        "Keep the masks of `sparsifier` from now on, which starts with the zeros that were kept until now"
        if self.sparsifier is not None:
            for masks in (self.sparsifier.masks, self.sparsifier.follower_masks):
                for name, mask in masks.items():
                    self.earlier[name] = mask & self.earlier[name] if name in self.earlier else mask
        self.sparsifier, self.recovers, self.held_model = sparsifier, False, sparsifier.model
        sparsifier.adopt(self.earlier)

    def _masked(self) -> list:
        masked = [] if self.sparsifier is None else self.sparsifier.masked_parameters()
        for name, mask in self.earlier.items():
            parameter = attrgetter(name)(self.learn.model)
            masked.append((parameter, mask.to(parameter.device)))
        return masked


class SparsifyCallback(Callback):
    "Make the model sparse while it trains: `sparsity` of its weights are zero at the end of the schedule"

    # After KeepSparsity, which has zeroed what the step has changed.
    order = KeepSparsity.order + 0.1

    # Without values here, fastai would look names that are read before the first fit up in the Learner.
    sparsifier: Any = None  # the Sparsifier, from the first batch on
    _reached = 0.0  # what the schedule has reached, as a share of the target
    _floor = 0.0  # what earlier fits had reached
    _begun = False
    _advances = False
    _brought: KeepSparsity | None = None  # one that this callback has put on the Learner and not yet announced
    _column: ValueMetric | None = None

    def __init__(
        self,
        sparsity=None,  # Fraction of the weights to be zero, 0.5 for 50 %; or {pattern: fraction} by layer
        granularity="weight",  # How: a name of `granularities`, a tuple of axes such as ('out', 'h'), or a function
        context="global",  # Where: a name of `contexts` or a function
        criteria="large_final",  # What: a name of `criteria` or a function of named quantities
        # When: a name of `schedules`, a function from [0, 1] to [0, 1], or a fastai annealer. By default the last
        # quarter of training belongs to the weights that stay: worth much at high sparsity, little lost at low.
        schedule=between("agp", 0, 0.75),
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
        self.round_to, self.seed = check_round_to(round_to), check_seed(seed)

    def __setattr__(self, name, value):
        # Taken off the Learner, as fit does with its own callbacks even when it is interrupted.
        if name == "learn" and value is None and self.learn is not None:
            self._end()
        super().__setattr__(name, value)

    def before_fit(self):
        "Refuse a second SparsifyCallback; show the measured sparsity in the table of a fit"
        if len(self.learn._grab_cbs(SparsifyCallback)) > 1:
            raise ValueError(
                "two SparsifyCallbacks in one fit would undo each other; give one of them a dictionary of "
                "sparsities by layer, or take the other off with learn.remove_cb(SparsifyCallback)"
            )
        self._hide_column()  # from validate and get_preds, in a fit or after an interrupted one
        if self.learn.lock.locked():
            return
        self._column = None
        if hasattr(self.learn, "lr_finder"):
            self._advances = False
            return
        if self.sparsifier is not None and self.sparsifier.model is not self.learn.model:
            self.sparsifier, self._reached = None, 0.0
        self._floor, self._begun = self._reached, False
        self._advances = getattr(self.learn.opt, "frozen_idx", 0) == 0
        if not self._advances:
            held = percent(self._measured())
            self._notify(f"SparsifyCallback: some layers are frozen, so sparsity is held at {held} in this fit")
        self._column = ValueMetric(self._measured, "sparsity")
        self._show_column()

    def before_batch(self):
        "Make the Sparsifier when the fit begins, and take the sparsity to where the schedule begins"
        if self._advances and self.learn.training and not self._begun:
            if self.sparsifier is None:
                self._make_sparsifier()
            self._go_to(self._progress(0))
            self._begun = True

    def after_step(self):
        "Take the sparsity to where the schedule is after this step"
        if self._advances:
            self._go_to(self._progress(1))

    def after_train(self):
        "Close the schedule, if the last batch of the fit has made no step of its own"
        if self._advances and self._begun:
            learn = self.learn
            if learn.epoch == learn.n_epoch - 1 and learn.iter == learn.n_iter - 1:
                self._go_to(1.0)

    def after_fit(self):
        "Take the column off the table; say what keeps the zeros"
        if self.learn.lock.locked():
            self._show_column()
        else:
            self._end()

    def _progress(self, done: int) -> float:
        """Share of the fit that is over, with `done` (0 or 1) of the present batch."""
        learn = self.learn
        return (learn.epoch * learn.n_iter + learn.iter + done) / (learn.n_epoch * learn.n_iter)

    def _measured(self) -> float:
        if self.sparsifier is not None:
            return self.sparsifier.sparsity
        return Count.of(*(target.parameter for target in find_targets(self.learn.model).values())).sparsity

    def _go_to(self, t: float) -> None:
        """Sparsify to where the schedule is at t, but not below what earlier fits have reached."""
        reached = max(progress(self.schedule, t), self._floor)
        if reached != self._reached:
            self.sparsifier.sparsify(scaled(self.sparsity, reached))
            self._reached = reached

    def _make_sparsifier(self) -> None:
        """At the first batch, which the data flow of some models is read from; KeepSparsity holds it from here on."""
        exclude = list(self.exclude or [])
        if isinstance(self.sparsity, dict):  # a layer that no pattern matches takes no part
            targets = find_targets(self.learn.model)
            wanted = set().union(*(matching(pattern, targets, self.learn.model) for pattern in self.sparsity))
            exclude += [name for name in targets if name not in wanted]
        sparsifier = Sparsifier(
            self.learn.model, self.granularity, self.context, self.criteria,
            layers=self.layers, exclude=exclude or None, pool=self.pool, round_to=self.round_to, seed=self.seed,
            example_input=self.learn.xb,
        )  # fmt: skip
        sparsifier.check(self.sparsity)
        self.sparsifier = sparsifier
        keepers = self.learn._grab_cbs(KeepSparsity)
        self._brought = KeepSparsity(sparsifier) if not keepers else None
        if self._brought:
            self.learn.add_cb(self._brought)
        else:
            keepers[0].hold(sparsifier)

    def _end(self) -> None:
        """Leave the Learner as it was but for the zeros and what keeps them."""
        self._hide_column()
        self._column = None
        self._advances = False
        if self._brought is not None:
            zero_weights(self.sparsifier.masked_parameters())
            if all(mask.all() for mask in self.sparsifier.masks.values()):
                self.learn.remove_cb(self._brought)  # nothing to keep
            else:
                self._notify(
                    f"KeepSparsity holds the {percent(self._measured())} of zeros in later fits, too; "
                    "learn.remove_cb(KeepSparsity) lets them go"
                )
            self._brought = None

    def _show_column(self) -> None:
        if self._column is not None:
            self.learn.metrics = self.learn.metrics + [self._column]

    def _hide_column(self) -> None:
        if self._column is not None:
            self.learn.metrics = [metric for metric in self.learn.metrics if metric is not self._column]

    def _notify(self, message: str) -> None:
        """One line for the user, where the Learner's own table is shown."""
        if self.learn.logger is not noop:
            print(message)
