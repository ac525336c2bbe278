"""SparsifyCallback: when a fastai Learner calls the Sparsifier, never how to sparsify.

It moves the sparsity along the schedule, and nothing else: KeepSparsity holds the zeros, from the first batch on.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map

from ..axes.criterion import criteria as criteria_registry
from ..axes.n_of_m import Blocks
from ..axes.schedule import between, falls, progress, raised, schedules
from ..model.layers import find_weights
from ..model.parallel import process_group_of, unwrapped
from ..model.patterns import as_patterns
from ..model.zeros import Count
from ..sparsifier.arguments import check_sparsity, mapped, resolve_axes, share_of_initial
from ..sparsifier.masking import NEXT_TO_ZERO, zero_moments
from ..sparsifier.regrowth import Regrowth, check_drop, sparsity_of_drop
from ..sparsifier.sparsifier import Sparsifier, first_example
from ..support.checks import check_count, check_fraction, check_round_to, check_seed
from ..support.table import percent
from .base import TrainingCallback
from .display import Column, Curves, Trackers, notify
from .keep import KeepSparsity
from .learner import is_search, show_data
from .plan import every_of, plan_of, sparsifier_for


class SparsifyCallback(TrainingCallback):
    "Make the model sparse while it trains: `sparsity` of its weights are zero at the end of the schedule"

    # After KeepSparsity, which has zeroed what the step has changed.
    order = KeepSparsity.order + 0.1

    # Without values here, fastai would look names that are read before the first fit up in the Learner.
    sparsifier: Any = None  # the Sparsifier, from the first batch on
    _reached = 0.0  # what the schedule has reached, as a share of the target
    _floor = 0.0  # what earlier fits had reached
    _fits = False  # in a fit, not in lr_find
    _advances = False  # in a fit of all layers
    _begun = False  # past the first batch of a fit
    _updated = 0  # batches of the fit that were over at the last update
    _moved = False  # whether the sparsity is another than the trackers have judged
    _brought: KeepSparsity | None = None  # one that this callback has put on the Learner and not yet announced
    _column: Column | None = None

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
        initial_sparsity=0.0,  # Of all that takes part, where the schedule begins; it goes on from there
        compression_ratio=None,  # Another name of `sparsity`, the same number
        layers=None,  # What takes part: classes, modules, names, globs, functions of (name, module), or a list of them
        exclude=None,  # What stays dense, in the same words
        pool=None,  # How the scores of a group become one: 'mean', 'sum', 'max', 'l2' or a function; None for the usual
        may_empty=False,  # Whether a layer may lose its best group, too
        regrow=None,  # What comes back at an update for as much that falls: 'grad' (RigL), 'random' (SET), a criterion
        drop=None,  # Share of what is left that falls for it, at first; by default 0.3
        decay=between("cos", 0, 0.75),  # The schedule by which that share goes to nothing
        calibration=None,  # Batches for criteria that look at data; by default the one that is being trained on
        round_to=None,  # Keep a multiple of this many groups in every layer
        coupled=False,  # Whether filters that can only be removed together fall together
        seed=0,  # Of the generator that random criteria draw from
        # Batches from one mask update to the next; the last batch of a fit has one in any case. By default 1, and with
        # regrow= a hundredth of the fit.
        every=None,
    ):
        super().__init__()
        self.sparsity = check_sparsity(sparsity, compression_ratio)
        self.may_empty, self.calibration = may_empty, calibration
        self.granularity, self.context, self.criteria, self.pool = resolve_axes(granularity, context, criteria, pool)
        if isinstance(self.context, Blocks):
            self.context.check(max(self.sparsity.values()) if isinstance(self.sparsity, Mapping) else self.sparsity)
        self.schedule = self._given_schedule = schedules.resolve(schedule)
        self.initial_sparsity = check_fraction(initial_sparsity, "initial_sparsity")
        if self.initial_sparsity:
            self.schedule = raised(self.schedule, share_of_initial(self.initial_sparsity, self.sparsity))
        self._falls = falls(self.schedule)
        self.layers = None if layers is None else as_patterns(layers)
        self.exclude = None if exclude is None else as_patterns(exclude)
        self.round_to, self.coupled, self.seed = check_round_to(round_to), bool(coupled), check_seed(seed)
        self.every = None if every is None else check_count("every", every)
        self.regrow = None if regrow is None else criteria_registry.resolve(regrow)
        self.drop, self.decay = check_drop(0.3 if drop is None else drop), schedules.resolve(decay)
        if self.regrow is None and drop is not None:
            raise ValueError(
                f"drop={drop!r}: nothing says what comes back; give regrow='grad', 'random' or a criterion"
            )
        if self.regrow is not None:
            Regrowth(self.regrow).check(self.context, drops_outputs=False)
        self._trackers, self._curves = Trackers(), Curves()

    def _taken_off(self) -> None:
        self._trackers.resume()
        self._end()

    def before_fit(self):
        "Refuse a second SparsifyCallback; show the measured sparsity in the table of a fit"
        if len(self.learn._grab_cbs(SparsifyCallback)) > 1:
            raise ValueError(
                "two SparsifyCallbacks in one fit would undo each other; give one of them a dictionary of "
                "sparsities by layer, or take the other off with learn.remove_cb(SparsifyCallback)"
            )
        if self._column is not None:
            self._column.hide()  # from validate and get_preds, in a fit or after an interrupted one
        if self.learn.lock.locked():
            return
        self._trackers.resume()
        self._column, self._begun, self._advances = None, False, False
        self._fits = not is_search(self.learn)
        if not self._fits:
            return
        if not any(keeper.sparsifier is self.sparsifier for keeper in self.learn._grab_cbs(KeepSparsity)):
            self.sparsifier, self._reached = None, 0.0  # another Learner, or the zeros have been let go
        self._floor, self._curves = self._reached, Curves()
        self._advances = getattr(self.learn.opt, "frozen_idx", 0) == 0
        self._column = Column(self.learn, self._measured)
        self._column.show()

    def before_epoch(self):
        "Let trackers judge again"
        if not self.learn.lock.locked():
            self._trackers.resume()

    def before_train(self):
        "Show the column again, if a validation inside the fit has hidden it"
        if self._column is not None and not self.learn.lock.locked():
            self._column.show()

    before_validate = before_train

    def before_batch(self):
        "When the fit begins, make the Sparsifier and take the sparsity to where the schedule begins"
        if self._fits and self.learn.training and not self._begun:
            if self._advances and self.sparsifier is None:
                self._make_sparsifier()
            self._find_keeper()
            self._begun = True
            if not self._advances:
                held = percent(self._measured())
                notify(
                    self.learn, f"SparsifyCallback: some layers are frozen, so sparsity is held at {held} in this fit"
                )
            else:
                self.sparsifier.group = process_group_of(self.learn.model)
                self._updated = self._batches(0)
                self._go_to(self._start)

    def after_step(self):
        "Take the sparsity to where the schedule is after this step"
        if self._advances and self._begun:
            batches = self._batches(1)
            if self._is_due or batches == self._batches_of_fit:
                self._updated = batches
                self._go_to(batches / self._batches_of_fit)

    def after_batch(self):
        "Record the level for the recorder's curves"
        if self._begun and self.learn.training:
            self._curves.by_batch.append(self._level)

    def after_train(self):
        "Close the schedule, if the last batch of the fit has made no step of its own"
        if self._advances and self._begun:
            learn = self.learn
            if learn.epoch == learn.n_epoch - 1 and learn.iter == learn.n_iter - 1:
                self._go_to(1.0)

    def after_epoch(self):
        "Record level and sparsity; keep trackers from judging an epoch that is short of the target"
        if self._begun and not self.learn.lock.locked():
            self._curves.by_epoch.append((self.learn.epoch, self._level, self._measured()))
            if self._moved:
                self._trackers.forget(self.learn)
                self._moved = False
            if self._is_short():
                self._trackers.pause(self.learn)

    def after_fit(self):
        "Take the column off the table; say what keeps the zeros"
        if self.learn.lock.locked():
            return
        self._trackers.resume()
        if self._begun:
            self._curves.hand_over(self.learn)
            if self._advances:
                self._trackers.pause_loading(self.learn, short=self._is_short())
        self._end()

    def plan(self, model, n_epoch, n_iter, example_input=None):
        """What a fit of `model` with this callback would do: a `Plan`; nothing is trained or changed.

        n_epoch, n_iter: of the fit, and batches in each of them, `len(learn.dls.train)`. example_input: a batch, to
        count FLOPs with, and for models that torch.fx cannot trace; a tuple holds positional arguments.
        The fit is one from the model's present weights with nothing held sparse before, as the first is.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"plan: model is a torch.nn.Module, such as learn.model, not {type(model).__name__}")
        n_epoch, n_iter = check_count("n_epoch", n_epoch), check_count("n_iter", n_iter)
        every = self._every_of(n_epoch * n_iter)
        sparsifier = self._sparsifier_for(unwrapped(model), example_input)
        return plan_of(
            sparsifier,
            self.sparsity,
            self._given_schedule,
            n_epoch,
            n_iter,
            every,
            example_input,
            self.initial_sparsity,
        )

    # --- Moving the sparsity ------------------------------------------------------------------------------------

    @property
    def _is_due(self) -> bool:
        """Whether the masks are updated in the step of the present batch."""
        every = self._every_of(self._batches_of_fit)
        return self._batches(1) // every > self._updated // every

    def _every_of(self, batches: int) -> int:
        """Batches from one mask update to the next, in a fit of so many."""
        return every_of(self.every, self.regrow is not None, batches)

    def _level_at(self, t: float) -> float:
        """Where the schedule is at t, as a share of the target, but not below what earlier fits have reached.

        Unless the schedule itself gives back what it has reached, as dsd and ac_dc do.
        """
        level = progress(self.schedule, t)
        return level if self._falls else max(level, min(self._floor, progress(self.schedule, 1.0)))

    def _go_to(self, t: float) -> None:
        reached = self._level_at(t)
        if reached != self._reached:
            show_data(self.learn, self.sparsifier, self.calibration)
            self._update(reached)
            self._reached, self._moved = reached, True

    def _update(self, reached: float, drop: float = 0.0) -> None:
        wanted, opt = self._wanted(reached), self.learn.opt
        keepers = [each for each in self.learn._grab_cbs(KeepSparsity) if each.sparsifier is self.sparsifier]
        if keepers and keepers[0].is_alone():  # which has just seen to it that all that is masked is zero
            self.sparsifier.update_masks(wanted, opt, drop=drop)
        else:
            self.sparsifier.sparsify(wanted, drop=drop)
            zero_moments(self.sparsifier.masked_parameters(), opt, squares=NEXT_TO_ZERO)

    def _wanted(self, reached: float) -> Any:
        """The sparsity at a share of the target; of layers with different targets, all begin with the same."""
        if not self.initial_sparsity or reached in (0, 1):
            return mapped(self.sparsity, lambda fraction: reached * fraction)
        share, initial = share_of_initial(self.initial_sparsity, self.sparsity), self.initial_sparsity
        done = (reached - share) / (1 - share) if share < 1 else 1.0
        return mapped(self.sparsity, lambda fraction: initial + (fraction - initial) * done)

    def _look_at_gradients(self) -> None:
        """In a step, while gradients are dense: have the criterion see them, and what has fallen come back.

        Before the step, so that what comes back is moved off zero at once.
        """
        sparsifier, reached = self.sparsifier, self._level_at(self._batches(1) / self._batches_of_fit)
        drops = self.regrow is not None and self._is_due and reached > 0
        drop = self.drop * (1 - progress(self.decay, self._start)) if drops else 0.0
        if not drop:
            sparsifier.collected.add("backward", sparsifier, sparsifier.targets)
            return
        show_data(self.learn, sparsifier, self.calibration)
        sparsifier.collect_gradients()
        # A level that rises does so in the same update, or what comes back, the lowest of all, would fall at once.
        self._update(reached, drop)
        if reached != self._reached:
            self._reached, self._moved = reached, True

    def _is_short(self) -> bool:
        """Whether the level is another than the fit shall end at."""
        return self._advances and self._reached != self._level_at(1.0)

    @property
    def _level(self) -> float:
        return 0.0 if self.sparsifier is None else self.sparsifier.level

    def _measured(self) -> float:
        if self.sparsifier is not None:
            return self.sparsifier.sparsity
        return Count.of(*(target.parameter for target in find_weights(unwrapped(self.learn.model)).values())).sparsity

    def _make_sparsifier(self) -> None:
        """At the first batch, which the data flow of some models is read from."""
        sparsifier = self._sparsifier_for(unwrapped(self.learn.model), tree_map(first_example, self.learn.xb))
        show_data(self.learn, sparsifier, self.calibration)
        sparsifier.check(self.sparsity)
        if self.regrow is not None:  # at most so much has to fall for as much to come back
            sparsifier.check(mapped(self.sparsity, partial(sparsity_of_drop, drop=self.drop)))
        self.sparsifier = sparsifier

    def _sparsifier_for(self, model: nn.Module, example_input: Any) -> Sparsifier:
        """A Sparsifier with the options of the callback."""
        return sparsifier_for(
            model, self.sparsity, self.exclude, example_input,
            granularity=self.granularity, context=self.context, criteria=self.criteria, layers=self.layers,
            pool=self.pool, may_empty=self.may_empty, regrow=self.regrow, round_to=self.round_to, coupled=self.coupled,
            seed=self.seed,
        )  # fmt: skip

    def _find_keeper(self) -> None:
        """Have one KeepSparsity that stays on the Learner, with all zeros that were kept or are there already."""
        learn = self.learn
        keepers = learn._grab_cbs(KeepSparsity)
        keeper = next((each for each in keepers if each.stays), None)
        if keeper is None:
            keeper = self._brought = KeepSparsity()
            keeper.stays = True
            learn.add_cb(keeper)
            for other in keepers:
                keeper.replace(other)
            if not keepers:
                self._recover(keeper)
        if self.sparsifier is not None:
            keeper.hold(self.sparsifier)
            looks = self._advances and (self.regrow is not None or self.sparsifier.collected.at("backward"))
            keeper.looks = self._look_at_gradients if looks else None
            keeper.enforce()

    def _recover(self, keeper: KeepSparsity) -> None:
        """Keep the zeros of a model that comes sparse, as from a checkpoint, unless no sparsity is asked for."""
        keeper.begun = True
        if not any(self.sparsity.values() if isinstance(self.sparsity, dict) else [self.sparsity]):
            return
        start = self._start
        later = (self._level_at(start + (1 - start) * step / 1000) for step in range(1001))
        if self._advances and min(later) < self._level_at(start):
            self.sparsifier.recover_masks()  # the schedule has made them and will give them back
            return
        keeper.recover()
        if self._advances and keeper.masks_something:
            notify(self.learn, f"SparsifyCallback keeps the {percent(self._measured())} of zeros that the model has")

    def _end(self) -> None:
        """Leave the Learner as it was but for the zeros and what keeps them."""
        if self._column is not None:
            self._column.hide()
        for keeper in self.learn._grab_cbs(KeepSparsity):
            keeper.looks = None
        if self._begun:
            if self._is_short():
                notify(self.learn, "SparsifyCallback: the fit has ended before its schedule did")
            self._announce_keeper()
        self._column, self._begun, self._advances = None, False, False

    def _announce_keeper(self) -> None:
        """Say what keeps the zeros in later fits, or take it off if there are none."""
        for keeper in self.learn._grab_cbs(KeepSparsity):
            keeper.enforce()  # a fit can be interrupted between a step and what comes after it
        keeper, self._brought = self._brought, None
        if keeper is None or keeper.learn is None:  # said before, or taken off in the fit
            return
        if keeper.masks_something:
            notify(
                self.learn,
                f"KeepSparsity holds the {percent(self._measured())} of zeros in later fits, too; "
                "learn.remove_cb(KeepSparsity) lets them go",
            )
        else:
            self.learn.remove_cb(keeper)
