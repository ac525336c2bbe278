"""RegularizeCallback: when a fastai Learner charges for the norms of groups of weights, never how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..axes.schedule import progress, schedules
from ..callbacks.base import TrainingCallback
from ..model.parallel import unwrapped
from ..model.patterns import as_patterns
from ..sparsifier.arguments import resolve_axes
from ..support.checks import check_number
from .regularizer import Regularizer, check_differentiable, check_proximal


class RegularizeCallback(TrainingCallback):
    "Drive groups of weights to zero while the model trains: weight * schedule * sum of sqrt(size) * norm of the scores"

    # Before GradientAccumulation (6) and MixedPrecision (10), which scale all that is in the loss by then, and before
    # KeepSparsity (10.5), so that masks are updated by what a proximal step has left.
    order, run_valid = 5, False

    regularizer: Any = None  # the Regularizer, from the first batch of a fit to its end
    _penalty: Tensor | None = None  # the last one
    _cancelled = False  # whether this step was

    def __init__(
        self,
        weight,  # Of the penalty in the loss
        granularity="weight",  # How: a name of `granularities`, a tuple of axes such as ('out', 'h'), or a function
        criteria="large_final",  # What: a name of `criteria`, or a function that can be differentiated by `weight`
        # When, over each fit, so twice with fine_tune: a name of `schedules`, a function from [0, 1] to [0, 1], or a
        # fastai annealer
        schedule="one_shot",
        *,
        layers=None,  # What takes part: classes, modules, names, globs, functions of (name, module), or a list of them
        exclude=None,  # What does not, in the same words
        # Whether to take a proximal step after each step of the optimizer, with its learning rate, in place of a term
        # in the loss: groups become exactly zero. Only weights do: filters that are zero keep bias and norm layer.
        proximal=False,
    ):
        super().__init__()
        self.weight = check_number("RegularizeCallback: weight, that of the penalty,", weight)
        self.proximal = bool(proximal)
        self.granularity, _, self.criteria, _ = resolve_axes(granularity, "local", criteria)
        check_differentiable(self.criteria)
        if self.proximal:
            check_proximal(self.criteria)
        self.schedule = schedules.resolve(schedule)
        self.layers = None if layers is None else as_patterns(layers)
        self.exclude = None if exclude is None else as_patterns(exclude)

    def before_fit(self):
        "Know nothing of earlier fits"
        if not self.learn.lock.locked():  # not in validate and the like, which a fit can call
            self.regularizer, self._penalty, self._cancelled = None, None, False

    def before_batch(self):
        "When the fit begins, find what takes part; the data flow of some models is read from the batch"
        if self.regularizer is None:
            self.regularizer = Regularizer(
                unwrapped(self.learn.model), self.granularity, self.criteria,
                layers=self.layers, exclude=self.exclude, example_input=self.learn.xb,
            )  # fmt: skip
            if self.proximal:
                self._check_optimizer()

    def after_loss(self):
        "Add the penalty to the loss that gradients are taken of, not to the one that is shown"
        if not self.proximal:
            penalty = self._factor * self.regularizer.penalty()
            self.learn.loss_grad = self.learn.loss_grad + penalty.to(self.learn.loss_grad.device)
            self._penalty = penalty.detach()

    def after_cancel_step(self):
        "Take no proximal step after one that was not taken"
        self._cancelled = True

    def after_step(self):
        "Take the proximal step, with the learning rate of each parameter group"
        if self.proximal and not self._cancelled:
            rates = self._rates()
            targets = self.regularizer.sparsifier.targets.items()
            known = {name: rates[id(each.parameter)] for name, each in targets if id(each.parameter) in rates}
            self.regularizer.proximal_step({name: self._factor * rate for name, rate in known.items()})
        self._cancelled = False

    def after_fit(self):
        "Let go of the model"
        if not self.learn.lock.locked():
            self._penalty, self.regularizer = self.penalty, None

    @property
    def penalty(self):
        "The last one, by which the loss was larger, or would be; with proximal=True computed when it is asked for"
        if self.proximal and self.regularizer is not None:
            with torch.no_grad():
                return self._factor * self.regularizer.penalty()
        return self._penalty

    @property
    def _factor(self) -> float:
        """Weight of the penalty in this batch."""
        return self.weight * progress(self.schedule, self._start)

    def _rates(self) -> dict[int, float]:
        """Learning rate of every parameter that the optimizer steps, by id."""
        opt = self.learn.opt
        groups = zip(opt.param_lists, opt.hypers, strict=True)
        return {id(parameter): hyper["lr"] for parameters, hyper in groups for parameter in parameters}

    def _check_optimizer(self) -> None:
        """ValueError if it steps copies of all weights, which a proximal step would not reach."""
        rates = self._rates()
        if not any(id(each.parameter) in rates for each in self.regularizer.sparsifier.targets.values()):
            raise ValueError(
                "RegularizeCallback: the optimizer steps none of the weights that take part, so a proximal step has no "
                "learning rate; leave proximal=True out"
            )
