"""SparsifyCallback: the fastai callback that prunes a model while it trains.

It decides when the Sparsifier updates its masks. A KeepSparsity on the Learner keeps the pruned weights at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..gradual.gradual_pruning import GradualPruning
from ..gradual.in_words import in_words
from ..model.parallel import unwrapped
from ..model.running import first_example
from ..sparsifier.sparsifier import Sparsifier
from ..support.arguments import checks_arguments
from ..support.checks import check_count, check_number
from ..support.table import percent
from .base import TrainingCallback
from .display import notify
from .fit import Fit
from .fit_part import FitPart
from .keep import KeepSparsity
from .learner import bars_of, check_steps_model, check_steps_weights, is_search, show_data, warn_of_unstepped
from .pruned import Pruned


# Large, because fastai wants a method for each event and a comment for each argument.
class SparsifyCallback(TrainingCallback):
    """Make the model sparse while it trains: `sparsity` of its weights are zero at the end of the schedule.

    The training table gets a column `sparsity` with the measured fraction of zeros. After the fit a KeepSparsity
    callback stays on the Learner and keeps the zeros in later fits; `learn.remove_cb(KeepSparsity)` removes it. While
    layers are frozen, as in the first fit of fine_tune, the sparsity does not change. SaveModelCallback,
    EarlyStoppingCallback and ReduceLROnPlateau ignore epochs before the target sparsity is reached, and epochs after
    which weights still regrow or masks have not settled.

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
            annealer. Default: agp over the first three quarters of the fit; with straight_through, over the first half.
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
        drop_schedule: Schedule by which `drop` goes to 0. Default: cos over the first three quarters of the fit.
        calibration: Batches for criteria that need inputs or a loss, and for compensate. Default: the batch that is
            being trained on.
        example_input: A batch, for models that torch.fx cannot trace, in the form that Sparsifier takes. Default: the
            first example of the batch that is being trained on.
        round_to: Keep a multiple of this many groups in every layer, or all of them. Default: any number.
        coupled: Whether filters that can only be removed together are pruned together, for `shrink`. Default False.
        seed: Seed of the generator that random criteria draw from. Default 0.
        straight_through: Whether dense weights are kept beside the sparse ones: the optimizer moves these, and masks
            are ranked anew from them at each update, until they settle. Costs 4 bytes a weight. Default False.
        decay: With straight_through, how strongly pruned weights are pulled towards zero. Default 2e-4, as in SR-STE.
        gradient_sparsity: With straight_through, the fraction of the weights whose gradients are zero (Top-KAST); 1: of
            all that are pruned. Default 0.
        settle: With straight_through, the fraction of the fit after which the masks are fixed. Default: where the
            schedule ends, but not before three quarters of the fit.
        compensate: Whether the weights that stay are changed at each update, so that the squared error of each layer's
            outputs on the calibration batches is smallest. The optimizer's moments stay. Default: what the method of
            the criterion does, which is True for obs and sparsegpt and False for others.
        every: Number of batches from one mask update to the next. The last batch of a fit always has an update.
            Default 1; with regrow=, a hundredth of the batches of the fit; with compensate, and for obs and sparsegpt,
            a tenth, because an update runs the calibration batches once for each layer.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is unknown or out of range, or arguments exclude each other. At the first batch of a
            fit: the arguments do not fit the model.

    Example:
        >>> learn = make_learner()
        >>> callback = SparsifyCallback(0.75)
        >>> learn.fit_one_cycle(2, cbs=callback)
        >>> callback.sparsifier.sparsity
        0.75
    """

    # After MixedPrecision (10), which unscales gradients, and before KeepSparsity (10.5), which zeroes the gradients of
    # masked weights: regrowth needs those, too.
    order = KeepSparsity.order - 0.25
    run_valid = False

    # Without values here, fastai would look these names up in the Learner.
    pruned: Pruned | None = None  # what it has pruned so far; it lasts over fits
    _fit: Any = None  # a Fit, during a fit, which all SparsifyCallbacks of a Learner share
    _loaded: Any = None  # what `load_state_dict` was given, until the Sparsifier is made

    @checks_arguments
    def __init__(
        self,
        sparsity=None,  # Fraction of the weights to be zero, 0.5 for 50 %; or {pattern: fraction} by layer
        granularity="weight",  # How: a name of `granularities`, a tuple of axes such as ('out', 'h'), or a function
        context="global",  # Where: a name of `contexts` or a function
        criteria="large_final",  # What: a name of `criteria` or a function of named quantities
        schedule=None,  # When: a name of `schedules`, a function from [0, 1] to [0, 1], or a fastai annealer
        *,
        initial_sparsity=0.0,  # The sparsity of all layers at which the schedule begins
        compression_ratio=None,  # Another name of `sparsity`, the same number
        layers=None,  # Which layers are pruned: classes, modules, names, globs, functions of (name, module), or a list
        exclude=None,  # Which layers stay dense, in the same words
        pool=None,  # How the scores of a group become one: 'mean', 'sum', 'max', 'l2' or a function; None for the usual
        may_empty=False,  # Whether a layer may lose its best group, too
        regrow=None,  # The criterion by which pruned weights regrow at an update: 'grad' (RigL), 'random' (SET), ...
        drop=None,  # Initial fraction of the remaining weights that is pruned and regrown per update; by default 0.3
        drop_schedule=None,  # The schedule along which that fraction goes to 0; by default cos over 3/4 of the fit
        calibration=None,  # Batches for criteria that look at data; by default the present batch of the training
        example_input=None,  # A batch for models that torch.fx cannot trace; by default from the present batch
        round_to=None,  # Keep a multiple of this many groups in every layer
        coupled=False,  # Whether filters that can only be removed together are pruned together
        seed=0,  # Seed of the generator that random criteria draw from
        straight_through=False,  # Whether dense weights are kept and trained beside the sparse ones, and ranked anew
        decay=None,  # With straight_through, the pull of pruned weights towards zero; by default 2e-4
        gradient_sparsity=None,  # With straight_through, the fraction of the weights that get no gradient; by default 0
        settle=None,  # With straight_through, the fraction of the fit after which the masks are fixed
        compensate=None,  # Whether weights that stay make up for pruned ones; by default for obs and sparsegpt
        every=None,  # Batches between mask updates; by default 1, with regrow= 1/100 of the fit, with compensate 1/10
    ):
        super().__init__()
        self.pruning = GradualPruning.of(
            sparsity, granularity, context, criteria, schedule, initial_sparsity=initial_sparsity,
            compression_ratio=compression_ratio, layers=layers, exclude=exclude, pool=pool, may_empty=may_empty,
            regrow=regrow, drop=drop, drop_schedule=drop_schedule, calibration=calibration,
            example_input=example_input, round_to=round_to, coupled=coupled, seed=seed,
            straight_through=straight_through, decay=decay, gradient_sparsity=gradient_sparsity, settle=settle,
            compensate=compensate, every=every,
        )  # fmt: skip

    @property
    def name(self):
        "The name of the attribute of the Learner; `sparsify` is a method of it"
        return f"{super().name}_callback"

    def __repr__(self):
        pruning = vars(self).get("pruning")  # none, if the arguments were refused
        return type(self).__name__ if pruning is None else f"{type(self).__name__}({in_words(pruning)})"

    @property
    def sparsifier(self):
        "The Sparsifier of the model, from the first batch on; None before"
        return None if self.pruned is None else self.pruned.sparsifier

    def __call__(self, event_name):
        "Call the method of the event, unless the fit began without this callback, or is that of lr_find"
        return super().__call__(event_name) if self._fit is not None or event_name == "before_fit" else None

    def _taken_off(self) -> None:
        self._end()

    def _before_question(self) -> None:
        if self._fit is not None:
            self._fit.column.hide()

    def before_fit(self):
        "Join the fit, which all SparsifyCallbacks have in common; show the measured sparsity in its table"
        learn = self.learn
        check_steps_model(learn)
        if self._fit is not None:  # the last fit was interrupted
            self._fit.undo()
            self._fit = None
        if is_search(learn):
            return
        if self.pruned is not None and not self.pruned.is_kept_on(learn):
            self.pruned = None
        first = min(learn._grab_cbs(SparsifyCallback), key=lambda callback: callback.order)
        self._fit = Fit(learn) if first is self else first._fit
        self._fit.callbacks.append(self)

    def before_epoch(self):
        "Switch the trackers on again"
        self._fit.trackers.resume()

    def before_train(self):
        "Show the column again, if a validation inside the fit has hidden it"
        self._fit.column.show()

    before_validate = before_train

    def before_batch(self):
        "At the first batch, make the Sparsifier; when all are made, prune to where the schedules begin"
        fit, learn = self._fit, self.learn
        is_frozen = getattr(learn.opt, "frozen_idx", 0) > 0
        if fit.begun and (fit.advances or is_frozen):
            return
        if not is_frozen:  # layers can be unfrozen in the middle of a fit
            if self.pruned is None:
                self.pruned = self._new_pruned()
            if self.sparsifier.is_straight_through:
                check_steps_weights(learn)
        if not fit.is_last(self):
            return
        fit.advances = not is_frozen
        fit.begin(self._start)
        if fit.advances:
            for part in fit.parts.values():
                part.begin(self._batches(0), self._start)
            fit.tell_of_trackers()
        else:
            held = percent(fit.measured())
            message = f"SparsifyCallback: some layers are frozen, so sparsity is held at {held} in this fit"
            notify(learn, message, matters=True)

    def before_step(self):
        "Collect the gradients, which are not masked yet, for the criterion; and regrow weights, or pull pruned ones"
        if self._fit.moves:
            self._part.before_step(self._batches(0), self._batches_of_fit)

    def after_step(self):
        "Prune to where the schedule is after this step"
        if self._fit.moves:
            self._part.after_step(self._batches(1), self._batches_of_fit)

    def after_batch(self):
        "Record the level for the recorder's curves"
        if self._fit.begun and self._fit.is_last(self):
            self._fit.curves.by_batch.append(self._fit.level)

    def after_train(self):
        "Go to the end of the schedule, if the last batch of the fit had no optimizer step"
        learn = self.learn
        if self._fit.moves and learn.epoch == learn.n_epoch - 1 and learn.iter == learn.n_iter - 1:
            self._part.go_to(1.0)

    def after_epoch(self):
        "Record level and sparsity; switch the trackers off if the epoch is short of the target sparsity"
        if self._fit.begun and self._fit.is_last(self):
            self._fit.end_epoch()

    def after_fit(self):
        "Remove the column from the table; tell the user what keeps the zeros"
        if self._fit.is_last(self):
            self._fit.record()
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
        return self.pruning.plan(model, n_epoch, n_iter, example_input)

    def state_dict(self):
        """Collect what another SparsifyCallback needs to resume a fit exactly; save it beside `learn.save`.

        Returns:
            The state of the Sparsifier, with dense weights if there are any, and the level; for torch.save.

        Raises:
            ValueError: Nothing was pruned yet.
        """
        if self.pruned is None:
            raise ValueError("state_dict: there is no Sparsifier before the first batch of a fit; call it later")
        return {"sparsifier": self.pruned.sparsifier.state_dict(), "reached": float(self.pruned.reached)}

    def load_state_dict(
        self,
        state,  # What `state_dict` returned, in a fit of the same model with the same arguments
    ):
        """Resume from what `state_dict` returned, in the next fit. Load the model, too, and pass `start_epoch`.

        Args:
            state: What `state_dict` returned, in a fit of the same model with the same arguments.

        Raises:
            ValueError: It is no such state, or this callback has pruned a model already. At the first batch of the fit:
                it does not fit the model or the arguments.
        """
        is_state = isinstance(state, Mapping) and state.keys() == {"sparsifier", "reached"}
        if not is_state or not isinstance(state["sparsifier"], Mapping):
            raise ValueError("load_state_dict: give what SparsifyCallback.state_dict() returned")
        reached = check_number("load_state_dict: reached", state["reached"], 0, 1)
        if self.pruned is not None:
            raise ValueError("load_state_dict: this callback has pruned a model already; make a new SparsifyCallback")
        self._loaded = {"sparsifier": state["sparsifier"], "reached": reached}

    @property
    def _part(self) -> FitPart:
        """What this callback does in the fit, from the first batch on."""
        return self._fit.parts[self]

    def _new_pruned(self) -> Pruned:
        """Make the Sparsifier at the first batch, with the state that was loaded."""
        with bars_of(self.learn):
            pruned = Pruned(self._new_sparsifier())
        if self._loaded is not None:
            pruned.sparsifier.load_state_dict(self._loaded["sparsifier"])
            pruned.reached, pruned.is_resumed, self._loaded = self._loaded["reached"], True, None
        return pruned

    def _new_sparsifier(self) -> Sparsifier:
        """Make the Sparsifier: the data flow of some models can only be found with an example."""
        sparsifier = self.pruning.sparsifier(unwrapped(self.learn.model), first_example(self.learn.xb))
        sparsifier.wait_for_frozen()
        show_data(self.learn, sparsifier, self.pruning.calibration)
        self.pruning.check(sparsifier)
        warn_of_unstepped(self.learn, sparsifier)
        return sparsifier

    def _end(self) -> None:
        if self._fit is not None:
            self._fit.leave(self)
            self._fit = None
