"""RegularizeCallback: apply the penalty of a Regularizer, or its proximal step, in a fastai Learner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..callbacks.base import TrainingCallback
from ..support.arguments import checks_arguments
from .regularization import Regularization


class RegularizeCallback(TrainingCallback):
    """Drive groups of weights to zero with a penalty on the norms of the groups.

    The penalty that is added to the loss is

        weight * schedule(t) * sum over groups g of sqrt(|g|) ||s_g||_2

    with s the scores of the weights, |g| the number of weights in the group, and t the fraction of the fit that is
    done. With single weights and large_final it is the lasso, with filters the group lasso; both in one fit are the
    sparse group lasso. Training and validation losses in the table stay without it; `penalty` is its last value.
    Weights that are frozen get no penalty.

    Source: see `Regularizer.penalty` and `Regularizer.proximal_step`.

    Args:
        weight: Factor of the penalty, at least 0.
        granularity: Which weights form a group: a name of `granularities`, a tuple of axes such as ('out', 'h'), or a
            function. Default "weight".
        criteria: The scores whose norms are penalized: a name of `criteria`, or a function of `weight`, `init` and
            `previous` through which gradients reach `weight`. Default "large_final", so the norms of the weights.
        schedule: How the factor changes over each fit (so over both fits of fine_tune): a name of `schedules`, a
            function from [0, 1] to [0, 1], or a fastai annealer. Default "one_shot", which keeps it constant.
        layers: The layers to regularize: classes, modules, names, globs, functions of (name, module), or a list of
            them. Default all but embeddings.
        exclude: The layers to leave out, in the same form. Default none.
        proximal: Take a proximal step after each step of the optimizer, with the learning rate of each parameter
            group, instead of adding the penalty to the loss. Groups become exactly zero. The bias and the norm
            parameters of a zeroed filter stay. Only for large_final. Default False.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is unknown or out of range, the criterion cannot be a penalty, or proximal=True is used
            with a criterion other than large_final. At the first batch of a fit: a pattern matches no layer, or the
            optimizer trains none of the regularized weights.

    Example:
        >>> learn = make_learner()
        >>> learn.fit(1, cbs=RegularizeCallback(0.1, granularity='filter', proximal=True))
    """

    # Before GradientAccumulation (6) and MixedPrecision (10), so that they scale the penalty with the loss. Before
    # KeepSparsity (10.5), so that masks are updated after the proximal step.
    order, run_valid = 5, False

    regularizer: Any = None  # the Regularizer, from the first batch of a fit to its end
    _penalty: Tensor | None = None  # the last value
    _cancelled = False  # whether the present step of the optimizer was cancelled

    @checks_arguments
    def __init__(
        self,
        weight,  # Factor of the penalty
        granularity="weight",  # How: a name of `granularities`, a tuple of axes such as ('out', 'h'), or a function
        criteria="large_final",  # What: a name of `criteria`, or a function that passes gradients to `weight`
        schedule="one_shot",  # When: a name of `schedules`, a function of [0, 1], or a fastai annealer; over each fit
        *,
        layers=None,  # Layers to regularize: classes, modules, names, globs, functions of (name, module), or a list
        exclude=None,  # Layers to leave out, in the same form
        proximal=False,  # Take proximal steps, which make groups exactly zero, instead of adding to the loss
    ):
        super().__init__()
        arguments = (weight, granularity, criteria, schedule, layers, exclude, proximal)
        self.regularization = Regularization("RegularizeCallback", *arguments)

    def before_fit(self):
        "Forget earlier fits"
        self.regularizer, self._penalty, self._cancelled = None, None, False

    def before_batch(self):
        "Make the Regularizer at the first batch, which serves as its example input"
        if self.regularizer is None:
            self.regularizer = self.regularization.regularizer(self.learn.model, self.learn.xb, self._rates())

    def after_loss(self):
        "Add the penalty to the loss whose gradient is taken, not to the one that is shown"
        if not self.regularization.proximal:
            penalty = self._factor * self.regularizer.penalty()
            self.learn.loss_grad = self.learn.loss_grad + penalty.to(self.learn.loss_grad.device)
            self._penalty = penalty.detach()

    def after_cancel_step(self):
        "Take no proximal step after a cancelled step of the optimizer"
        self._cancelled = True

    def after_step(self):
        "Take the proximal step, with the learning rate of each parameter group"
        if self.regularization.proximal and not self._cancelled:
            self.regularization.proximal_step(self.regularizer, self._rates(), self._start)
        self._cancelled = False

    def after_fit(self):
        "Release the model, keep the last penalty"
        self._penalty, self.regularizer = self.penalty, None

    @property
    def penalty(self):
        "The last penalty as a scalar tensor; with proximal=True the present one, computed on access; None before a fit"
        if self.regularization.proximal and self.regularizer is not None:
            with torch.no_grad():
                return self._factor * self.regularizer.penalty()
        return self._penalty

    @property
    def _factor(self) -> float:
        """Factor of the penalty in the present batch."""
        return self.regularization.factor(self._start)

    def _rates(self) -> dict[int, float]:
        """Learning rates of the parameters of the optimizer: id of the parameter -> rate."""
        opt = self.learn.opt
        groups = zip(opt.param_lists, opt.hypers, strict=True)
        return {id(parameter): hyper["lr"] for parameters, hyper in groups for parameter in parameters}
