"""What is pruned in training and when: the arguments of SparsifyCallback, checked, for any loop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import Any

from torch import nn

from ..axes.changed_schedule import between
from ..axes.n_of_m import check_reachable
from ..axes.schedule import Schedule, progress, schedules
from ..model.parallel import unwrapped
from ..model.running import check_no_batch
from ..sparsifier.options import Options, Sparsity, check_sparsity, highest, mapped
from ..sparsifier.regrowth import check_drop, sparsity_of_drop
from ..sparsifier.sparsifier import Sparsifier
from ..support.arguments import checks_arguments
from ..support.checks import check_count, check_fraction
from ..support.printable import quoted
from ..support.warning import warn_each
from .plan import every_of, plan_of
from .plan_table import Plan
from .ramp import Ramp, default_schedule, settle_of
from .unused import notices_of_unused


@dataclass(frozen=True)
class GradualPruning:
    """What is pruned in training, how, and when.

    Attributes:
        ramp: The sparsity at each point of training.
        options: The options of the Sparsifier.
        every: Batches from one mask update to the next; None for the usual.
        drop: With regrow=, the initial fraction of the remaining weights that is pruned and regrown per update.
        drop_schedule: The schedule along which that fraction goes to 0.
        settle: With straight_through, the fraction of training after which the masks are fixed; else None.
        calibration: Batches for criteria that need inputs or a loss; None for the batch that is being trained on.
        example_input: A batch, for models that torch.fx cannot trace, or None.
    """

    ramp: Ramp
    options: Options
    every: int | None
    drop: float
    drop_schedule: Schedule
    settle: float | None
    calibration: Any
    example_input: Any

    @classmethod
    @checks_arguments(of=Options.of)
    def of(
        cls,
        sparsity: Any = None,
        granularity: Any = "weight",
        context: Any = "global",
        criteria: Any = "large_final",
        schedule: Any = None,
        *,
        initial_sparsity: Any = 0.0,
        compression_ratio: Any = None,
        drop: Any = None,
        drop_schedule: Any = None,
        settle: Any = None,
        every: Any = None,
        calibration: Any = None,
        example_input: Any = None,
        **options: Any,
    ) -> GradualPruning:
        """Check the arguments of SparsifyCallback.

        Args:
            **options: The other arguments of `Options.of`; all others are those of SparsifyCallback.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument is unknown or out of range, or arguments exclude each other.
        """
        sparsity = check_sparsity(sparsity, compression_ratio)
        checked = Options.of(granularity, context, criteria, **options)
        check_reachable(checked.context, highest(sparsity))
        schedule = default_schedule(checked.straight_through) if schedule is None else schedules.resolve(schedule)
        ramp = Ramp(sparsity, schedule, check_fraction(initial_sparsity, "initial_sparsity"))
        _ = ramp.end  # raises now if the schedule or the initial sparsity cannot work
        every = None if every is None else check_count("every", every)
        fraction = check_drop(0.3 if drop is None else drop)
        shape = schedules.resolve(between("cos", 0, 0.75) if drop_schedule is None else drop_schedule)
        for name, value in {"drop": drop, "drop_schedule": drop_schedule}.items():
            if value is not None and checked.regrow is None:
                raise ValueError(
                    f"{name}={quoted(value)} needs regrow=: pass regrow='grad', 'random' or another criterion"
                )
        if settle is not None and not checked.straight_through:
            raise ValueError(f"settle={settle!r} needs straight_through=True: other masks do not change their mind")
        check_no_batch("calibration", calibration)
        settle = settle_of(ramp, settle) if checked.straight_through else None
        warn_each(notices_of_unused(ramp, checked, fraction, calibration))
        return cls(ramp, checked, every, fraction, shape, settle, calibration, example_input)

    @property
    def regrows(self) -> bool:
        """Whether pruned weights regrow."""
        return self.options.regrow is not None

    def sparsifier(self, model: nn.Module, example_input: Any = None) -> Sparsifier:
        """Make a Sparsifier with these options. With a dictionary of sparsities, only of the layers in it.

        Args:
            model: The model.
            example_input: A batch to use if none was given. Default none.
        """
        example_input = example_input if self.example_input is None else self.example_input
        only = vars(self.options.only(self.ramp.sparsity, unwrapped(model)))
        return Sparsifier(model, **only, example_input=example_input)

    def check(self, sparsifier: Sparsifier) -> None:
        """Raise now what a later mask update would raise.

        Args:
            sparsifier: What `sparsifier` returned.
        """
        sparsifier.check(self.ramp.sparsity)
        if self.regrows:  # an update prunes this much before weights regrow
            sparsifier.check(mapped(self.ramp.sparsity, partial(sparsity_of_drop, drop=self.drop)))

    def is_due(self, batches: int, updated: int, total: int) -> bool:
        """Whether the masks are updated with a batch.

        Args:
            batches: Batches that are done, this one too.
            updated: Batches that were done at the last mask update.
            total: Batches of the whole training.
        """
        every = every_of(self.every, self.options, total)
        return batches // every > updated // every

    def notice_of_every(self, total: int) -> str:
        """What the user should be told if mask updates are further apart than the training is long; else nothing.

        Args:
            total: Steps of the whole training.
        """
        if self.every is None or self.every <= total:
            return ""
        return (
            f"every={self.every} is more than the {total} batches of the training, so that masks are updated at its "
            "first and its last batch only; give a smaller number"
        )

    def drop_at(self, t: float) -> float:
        """The fraction of the remaining weights that is pruned and regrown after a fraction t of training."""
        return self.drop * (1 - progress(self.drop_schedule, t)) if self.regrows else 0.0

    def plan(self, model: nn.Module, n_epoch: int, n_iter: int, example_input: Any = None) -> Plan:
        """Plan the training of a model from its present weights. Nothing is trained or changed.

        Args:
            model: The model.
            n_epoch: Number of epochs.
            n_iter: Number of batches in an epoch.
            example_input: A batch, to count FLOPs with, and for models that torch.fx cannot trace. Default none.
        """
        example_input = self.example_input if example_input is None else example_input
        every = every_of(self.every, self.options, n_epoch * n_iter)
        return plan_of(
            self.sparsifier(unwrapped(model), example_input), self.ramp.sparsity, self.ramp.schedule, n_epoch, n_iter,
            every, example_input, self.ramp.initial,
        )  # fmt: skip

    @property
    def final_sparsity(self) -> Sparsity:
        """The sparsity at the end of the schedule, to which a model is pruned without training."""
        return mapped(self.ramp.sparsity, partial(mul, progress(self.ramp.schedule, 1.0)))

    def plan_at_once(self, model: nn.Module, example_input: Any = None) -> Plan:
        """Plan the pruning of a model to `final_sparsity` without training. Nothing is changed.

        Args:
            model: The model.
            example_input: A batch, as of `plan`. Default none.
        """
        example_input = self.example_input if example_input is None else example_input
        sparsifier = self.sparsifier(unwrapped(model), example_input)
        return plan_of(sparsifier, self.final_sparsity, None, example_input=example_input)
