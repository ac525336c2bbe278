"""SparsifyCallback: the fastai callback that prunes a model while it trains.

It decides when the Sparsifier updates its masks. A KeepSparsity on the Learner keeps the pruned weights at zero.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..axes.changed_schedule import between
from ..axes.n_of_m import check_reachable
from ..axes.schedule import progress, schedules
from ..model.parallel import process_group_of, unwrapped
from ..model.running import first_example
from ..sparsifier.options import Options, check_sparsity, highest, mapped
from ..sparsifier.regrowth import check_drop, sparsity_of_drop
from ..sparsifier.report import Report
from ..sparsifier.sparsifier import Sparsifier
from ..support.checks import check_count, check_fraction
from ..support.table import percent
from .base import TrainingCallback
from .display import notify
from .fit import Fit
from .keep import KeepSparsity, merged, prunes
from .learner import is_search, show_data
from .plan import every_of, plan_of
from .ramp import Ramp


# Large, because fastai wants a method for each event and a comment for each argument.
class SparsifyCallback(TrainingCallback):
    """Make the model sparse while it trains: `sparsity` of its weights are zero at the end of the schedule.

    The training table gets a column `sparsity` with the measured fraction of zeros. After the fit a KeepSparsity
    callback stays on the Learner and keeps the zeros in later fits; `learn.remove_cb(KeepSparsity)` removes it. While
    layers are frozen, as in the first fit of fine_tune, the sparsity does not change. SaveModelCallback,
    EarlyStoppingCallback and ReduceLROnPlateau ignore epochs before the target sparsity is reached, and epochs after
    which weights still regrow.

    Attributes:
        sparsifier: The Sparsifier of the model, from the first batch on; None before.

    Args:
        sparsity: The target sparsity: fraction of the weights that are zero at the end, 0.5 for 50 %; or {pattern:
            fraction} by layer.
        granularity: How weights are grouped: a name of `granularities`, a tuple of axes such as ('out', 'h'), or a
            function. Default 'weight', every weight by itself.
        context: Where scores are ranked: a name of `contexts` or a function. Default 'global', all layers together.
        criteria: How weights are scored: a name of `criteria` or a function of named quantities. Default 'large_final',
            the magnitude.
        schedule: How sparsity grows in the fit: a name of `schedules`, a function from [0, 1] to [0, 1], or a fastai
            annealer. Default: agp over the first three quarters of the fit.
        initial_sparsity: Sparsity of all layers at which the schedule begins, a fraction. Default 0.
        compression_ratio: Another name for `sparsity`. Pass only one of them.
        layers: Which layers are pruned: module classes, modules, names, globs, functions of (name, module), or a list
            of these. Default: all weights with named axes, except frozen ones and embeddings.
        exclude: Which layers stay dense, in the same form. Default none.
        pool: How the scores of a group become one: 'mean', 'sum', 'max', 'l2', or a function. Default: 'mean', and for
            taylor the square of the sum.
        may_empty: Whether a layer may lose all its groups. Default False: it keeps its best one.
        regrow: The criterion by which pruned weights regrow at an update, highest scores first: 'grad' as in RigL,
            'random' as in SET, or another one. Default: none regrow.
        drop: With regrow=, the initial fraction of the remaining weights that is pruned per update and regrown
            elsewhere. Default 0.3.
        decay: Schedule by which `drop` goes to 0. Default: cos over the first three quarters of the fit.
        calibration: Batches for criteria that need inputs or a loss. Default: the batch that is being trained on.
        round_to: Keep a multiple of this many groups in every layer, or all of them. Default: any number.
        coupled: Whether filters that can only be removed together are pruned together, for `shrink`. Default False.
        seed: Seed of the generator that random criteria draw from. Default 0.
        every: Number of batches from one mask update to the next. The last batch of a fit always has an update.
            Default 1; with regrow=, a hundredth of the batches of the fit.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is unknown or out of range, or arguments exclude each other. At the first batch of a
            fit: the arguments do not fit the model.

    Example:
        learn.fit_one_cycle(5, cbs=SparsifyCallback(0.9, context="erk"))
    """

    # After MixedPrecision (10), which unscales gradients, and before KeepSparsity (10.5), which zeroes the gradients of
    # masked weights: regrowth needs those, too.
    order = KeepSparsity.order - 0.25
    run_valid = False

    # Without a value here, fastai would look these names up in the Learner.
    sparsifier: Any = None
    _reached = 0.0  # how far the sparsity is, as a fraction of the target sparsity
    _fit: Any = None  # a Fit, during a fit

    def __init__(
        self,
        sparsity=None,  # Fraction of the weights to be zero, 0.5 for 50 %; or {pattern: fraction} by layer
        granularity="weight",  # How: a name of `granularities`, a tuple of axes such as ('out', 'h'), or a function
        context="global",  # Where: a name of `contexts` or a function
        criteria="large_final",  # What: a name of `criteria` or a function of named quantities
        # When: a name of `schedules`, a function from [0, 1] to [0, 1], or a fastai annealer. By default the masks stay
        # the same in the last quarter of the fit: the remaining weights recover, which helps most at high sparsity.
        schedule=between("agp", 0, 0.75),
        *,
        initial_sparsity=0.0,  # The sparsity of all layers at which the schedule begins
        compression_ratio=None,  # Another name of `sparsity`, the same number
        layers=None,  # Which layers are pruned: classes, modules, names, globs, functions of (name, module), or a list
        exclude=None,  # Which layers stay dense, in the same words
        pool=None,  # How the scores of a group become one: 'mean', 'sum', 'max', 'l2' or a function; None for the usual
        may_empty=False,  # Whether a layer may lose its best group, too
        regrow=None,  # The criterion by which pruned weights regrow at an update: 'grad' (RigL), 'random' (SET), ...
        drop=None,  # Initial fraction of the remaining weights that is pruned and regrown per update; by default 0.3
        decay=between("cos", 0, 0.75),  # The schedule along which that fraction goes to 0
        calibration=None,  # Batches for criteria that look at data; by default the present batch of the training
        round_to=None,  # Keep a multiple of this many groups in every layer
        coupled=False,  # Whether filters that can only be removed together are pruned together
        seed=0,  # Seed of the generator that random criteria draw from
        every=None,  # Batches from one mask update to the next; by default 1, with regrow= a hundredth of the fit
    ):
        super().__init__()
        self.sparsity = check_sparsity(sparsity, compression_ratio)
        self.options = Options.of(
            granularity, context, criteria, layers=layers, exclude=exclude, pool=pool, may_empty=may_empty,
            regrow=regrow, round_to=round_to, coupled=coupled, seed=seed,
        )  # fmt: skip
        check_reachable(self.options.context, highest(self.sparsity))
        self.ramp = Ramp(
            self.sparsity, schedules.resolve(schedule), check_fraction(initial_sparsity, "initial_sparsity")
        )
        _ = self.ramp.end  # raises now if the schedule or the initial sparsity cannot work
        self.every = None if every is None else check_count("every", every)
        self.drop, self.decay = check_drop(0.3 if drop is None else drop), schedules.resolve(decay)
        if drop is not None and self.options.regrow is None:
            raise ValueError(f"drop={drop!r} needs regrow=: pass regrow='grad', 'random' or another criterion")
        self.calibration = calibration
        self._others: dict[str, Tensor] = {}  # masks of zeros that the Sparsifier did not prune, and never revives

    def _taken_off(self) -> None:
        self._end()

    def _before_question(self) -> None:
        if self._fit is not None:
            self._fit.column.hide()

    def before_fit(self):
        "Refuse a second SparsifyCallback; show the measured sparsity in the table of a fit"
        learn = self.learn
        if len(learn._grab_cbs(SparsifyCallback)) > 1:
            raise ValueError(
                "two SparsifyCallbacks in one fit would undo each other; use one with a dictionary of sparsities by "
                "layer, or remove the other with learn.remove_cb(SparsifyCallback)"
            )
        if self._fit is not None:  # the last fit was interrupted
            self._fit.undo()
            self._fit = None
        if is_search(learn):
            return
        if not self._is_kept():
            self.sparsifier, self._reached, self._others = None, 0.0, {}
        advances = getattr(learn.opt, "frozen_idx", 0) == 0
        self._fit = Fit(learn, self._measured, advances, self._reached)

    def before_epoch(self):
        "Switch the trackers on again"
        if self._fit is not None:
            self._fit.trackers.resume()

    def before_train(self):
        "Show the column again, if a validation inside the fit has hidden it"
        if self._fit is not None:
            self._fit.column.show()

    before_validate = before_train

    def before_batch(self):
        "At the first batch, make the Sparsifier and prune to where the schedule begins"
        fit = self._fit
        if fit is None or fit.begun:
            return
        if fit.advances and self.sparsifier is None:
            self._make_sparsifier()
        self._keep_zeros()
        if fit.advances:
            fit.updated = self._batches(0)
            self._go_to(self._start)
        else:
            held = percent(self._measured())
            notify(self.learn, f"SparsifyCallback: some layers are frozen, so sparsity is held at {held} in this fit")

    def before_step(self):
        "Collect the gradients, which are not masked yet, for the criterion; and regrow weights"
        # Weights regrow before the step, so that this step already moves them away from zero.
        if not self._moves:
            return
        sparsifier, reached = self.sparsifier, self._level_at(self._batches(1) / self._batches_of_fit)
        regrows = self.options.regrow is not None and self._is_due and reached > 0
        drop = self.drop * (1 - progress(self.decay, self._start)) if regrows else 0.0
        if drop:
            show_data(self.learn, sparsifier, self.calibration)
            sparsifier.collect_gradients()
            # A rising level is reached in the same update. A second update would prune the regrown weights at once,
            # because their scores are lowest.
            self._update(reached, drop)
        elif sparsifier.collected.at("backward"):
            sparsifier.collected.add("backward")

    def after_step(self):
        "Prune to where the schedule is after this step"
        if self._moves:
            batches = self._batches(1)
            if self._is_due or batches == self._batches_of_fit:
                self._fit.updated = batches
                self._go_to(batches / self._batches_of_fit)

    def after_batch(self):
        "Record the level for the recorder's curves"
        if self._fit is not None and self._fit.begun:
            self._fit.curves.by_batch.append(self._level)

    def after_train(self):
        "Go to the end of the schedule, if the last batch of the fit had no optimizer step"
        learn = self.learn
        if self._moves and learn.epoch == learn.n_epoch - 1 and learn.iter == learn.n_iter - 1:
            self._go_to(1.0)

    def after_epoch(self):
        "Record level and sparsity; switch the trackers off if the epoch is short of the target sparsity"
        if self._fit is not None and self._fit.begun:
            self._fit.end_epoch(self._level, self._is_short())

    def after_fit(self):
        "Remove the column from the table; tell the user what keeps the zeros"
        if self._fit is not None:
            self._fit.end(self._is_short())
        self._end()

    def plan(self, model, n_epoch, n_iter, example_input=None):
        """Plan a first fit of a model with this callback, from its present weights. Nothing is trained or changed.

        Args:
            model: The model, which is not changed.
            n_epoch: Number of epochs of the fit.
            n_iter: Number of batches in an epoch, `len(learn.dls.train)`.
            example_input: A batch, to count FLOPs with, and for models that torch.fx cannot trace. A tuple holds
                positional arguments. Default: FLOPs are not counted.

        Returns:
            A `Plan`: a table of the remaining weights of each layer, with plots.

        Raises:
            TypeError: `model` is no torch.nn.Module.
            ValueError: The arguments of the callback do not fit the model.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"plan: model must be a torch.nn.Module, such as learn.model, not {type(model).__name__}")
        n_epoch, n_iter = check_count("n_epoch", n_epoch), check_count("n_iter", n_iter)
        every, inner = self._every_of(n_epoch * n_iter), unwrapped(model)
        return plan_of(
            self._sparsifier_of(inner, example_input), self.sparsity, self.ramp.schedule, n_epoch, n_iter, every,
            example_input, self.ramp.initial, stacklevel=3,
        )  # fmt: skip

    # --- Moving the sparsity ------------------------------------------------------------------------------------

    @property
    def _moves(self) -> bool:
        """Whether the sparsity follows the schedule at present."""
        return self._fit is not None and self._fit.advances and self._fit.begun

    @property
    def _is_due(self) -> bool:
        """Whether the masks are updated in the step of the present batch."""
        every = self._every_of(self._batches_of_fit)
        return self._batches(1) // every > self._fit.updated // every

    def _every_of(self, batches: int) -> int:
        """Batches from one mask update to the next. batches: how many the fit has."""
        return every_of(self.every, self.options.regrow is not None, batches)

    def _level_at(self, t: float) -> float:
        """Where the schedule is at t, as a fraction of the target sparsity."""
        return self.ramp.at(t, self._fit.floor)

    def _go_to(self, t: float) -> None:
        """Update the masks, if the schedule has another value at t."""
        reached = self._level_at(t)
        if reached != self._reached:
            if self.sparsifier.collected.looks_at_data:
                self.sparsifier.apply_masks()  # the last step may have moved masked weights
            show_data(self.learn, self.sparsifier, self.calibration)
            self._update(reached)

    def _update(self, reached: float, drop: float = 0.0) -> None:
        """Update the masks. drop: fraction of the remaining weights that is pruned and regrown."""
        self.sparsifier.update_masks(self.ramp.sparsity_at(reached), self.learn.opt, drop=drop)
        self._fit.keep(self.sparsifier, self._others)
        # After regrowth, too, trackers must forget their best epoch: it has other masks than those that are kept.
        self._fit.moved |= bool(drop) or reached != self._reached
        self._reached = reached

    def _is_short(self) -> bool:
        """Whether the level is not yet that of the end of the fit."""
        return self._moves and self._reached != self._level_at(1.0)

    @property
    def _level(self) -> float:
        return 0.0 if self.sparsifier is None else self.sparsifier.level

    def _measured(self) -> float:
        if self.sparsifier is not None:
            return self.sparsifier.sparsity
        return Report.of(unwrapped(self.learn.model)).selected.sparsity

    # --- Beginning and end of a fit -----------------------------------------------------------------------------

    def _make_sparsifier(self) -> None:
        """Make the Sparsifier at the first batch: the data flow of some models can only be found with an example."""
        sparsifier = self._sparsifier_of(unwrapped(self.learn.model), first_example(self.learn.xb))
        show_data(self.learn, sparsifier, self.calibration)
        sparsifier.check(self.sparsity)
        if self.options.regrow is not None:  # an update prunes this much before weights regrow
            sparsifier.check(mapped(self.sparsity, partial(sparsity_of_drop, drop=self.drop)))
        self.sparsifier = sparsifier

    def _sparsifier_of(self, model: nn.Module, example_input: Any) -> Sparsifier:
        """A Sparsifier with the options of the callback. With a dictionary of sparsities, only of the layers in it."""
        return Sparsifier(model, **vars(self.options.only(self.sparsity, model)), example_input=example_input)

    def _is_kept(self) -> bool:
        """Whether the Sparsifier belongs to this Learner's model, and its zeros were kept since the last fit."""
        sparsifier = self.sparsifier
        if sparsifier is None or sparsifier.model is not unwrapped(self.learn.model):
            return False
        return any(keeper.keeps(sparsifier.masks) for keeper in self.learn._grab_cbs(KeepSparsity))

    def _keep_zeros(self) -> None:
        """Give the KeepSparsity of this fit all masks: of earlier fits, of the Sparsifier, of zeros of the model."""
        fit, sparsifier = self._fit, self.sparsifier
        if not fit.find_keeper():
            self._recover()
        if sparsifier is None:
            fit.keeper.masks = fit.kept_masks()
        else:
            sparsifier.apply_masks()  # this also moves its masks to where the model is
            own = {**sparsifier.masks, **sparsifier.follower_masks}
            others = {
                name: mask | ~own[name].to(mask.device) if name in own else mask
                for name, mask in fit.kept_masks().items()
            }
            self._others = merged(self._others, {name: mask for name, mask in others.items() if not mask.all()})
            sparsifier.ranking = replace(sparsifier.ranking, process_group=process_group_of(self.learn.model))
            sparsifier.recover_masks(self._others)
            if self.options.regrow is not None:
                self._adopt()
            fit.keep(sparsifier, self._others)
        fit.take_over()
        fit.keeper.enforce()

    def _adopt(self) -> None:
        """Let the Sparsifier regrow zeros of earlier fits, in the layers where its masks have all of them."""
        masks, followers, others = self.sparsifier.masks, self.sparsifier.follower_masks, self._others
        adopted = [name for name in others.keys() & masks.keys() if prunes(masks, {name: others[name]})]
        if others.keys() & masks.keys() <= set(adopted):  # if all filters can regrow, their biases can, too
            adopted += [name for name in others.keys() & followers.keys() if prunes(followers, {name: others[name]})]
        self._others = {name: mask for name, mask in others.items() if name not in adopted}

    def _recover(self) -> None:
        """Keep the zeros of a model that is sparse already, such as a checkpoint, unless the target sparsity is 0."""
        fit = self._fit
        if not highest(self.sparsity):
            return
        if fit.advances and self.ramp.falls_after(self._start, fit.floor):
            self.sparsifier.recover_masks()  # this schedule pruned them, and will revive them
            return
        fit.keeper.recover(force=True)
        if fit.advances and fit.keeper.masks_something:
            notify(self.learn, f"SparsifyCallback keeps the {percent(self._measured())} of zeros that the model has")

    def _end(self) -> None:
        """Restore the Learner, except for the zeros and the KeepSparsity."""
        fit = self._fit
        if fit is None:
            return
        if fit.begun:
            if self._is_short():
                notify(self.learn, "SparsifyCallback: the fit has ended before its schedule did")
            fit.announce_keeper()
        fit.undo()
        self._fit = None
