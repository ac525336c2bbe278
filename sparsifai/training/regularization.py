"""What RegularizeCallback and Regularize do alike: a penalty, or proximal steps, over one training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..axes.schedule import Schedule, progress, schedules
from ..model.parallel import unwrapped
from ..model.patterns import as_patterns
from ..sparsifier.options import resolve_axes
from ..support.checks import check_number
from ..support.printable import quoted
from ..support.registry import name_of
from .regularizer import Regularizer, check_differentiable, check_proximal


class Regularization:
    """A penalty whose factor follows a schedule, or proximal steps instead.

    Args:
        caller: Name of what is used, for messages.
        weight: As of RegularizeCallback, and so the others.
        granularity: As of RegularizeCallback.
        criteria: As of RegularizeCallback.
        schedule: As of RegularizeCallback.
        layers: As of RegularizeCallback.
        exclude: As of RegularizeCallback.
        proximal: As of RegularizeCallback.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is unknown or out of range, or the criterion cannot be a penalty.
    """

    def __init__(
        self, caller: str, weight: float, granularity: Any, criteria: Any, schedule: Any, layers: Any, exclude: Any,
        proximal: bool,
    ):  # fmt: skip
        self.caller = caller
        if isinstance(weight, str) or callable(weight):
            given = weight if isinstance(weight, str) else name_of(weight)
            raise ValueError(
                f"{caller}: weight, the factor of the penalty, comes first, not {quoted(given)}; write "
                f"{caller}(1e-3, 'filter', 'large_final')"
            )
        self.weight = check_number(f"{caller}: weight, the factor of the penalty,", weight)
        self.proximal = bool(proximal)
        self.granularity, _, self.criteria, _ = resolve_axes(granularity, "local", criteria)
        check_differentiable(self.criteria)
        if self.proximal:
            check_proximal(self.criteria)
        self.schedule: Schedule = schedules.resolve(schedule)
        self.layers = None if layers is None else as_patterns(layers)
        self.exclude = None if exclude is None else as_patterns(exclude)

    def regularizer(self, model: nn.Module, example_input: Any, rates: Mapping[int, float]) -> Regularizer:
        """Make the Regularizer of a model.

        Args:
            model: The model, in its wrappers.
            example_input: A batch, for models that torch.fx cannot trace, or None.
            rates: The learning rates of the parameters of the optimizer: id of the parameter -> rate.

        Raises:
            ValueError: A pattern matches no layer, or a proximal step has no learning rate.
        """
        made = Regularizer(
            unwrapped(model), self.granularity, self.criteria,
            layers=self.layers, exclude=self.exclude, example_input=example_input,
        )  # fmt: skip
        if self.proximal and not any(id(weight.parameter) in rates for weight in made.weights.values()):
            raise ValueError(
                f"{self.caller}: the optimizer trains none of the regularized weights, so a proximal step has no "
                "learning rate; leave out proximal=True"
            )
        return made

    def factor(self, t: float) -> float:
        """The factor of the penalty. t: the fraction of the training that is done."""
        return self.weight * progress(self.schedule, t)

    def proximal_step(self, regularizer: Regularizer, rates: Mapping[int, float], t: float) -> None:
        """Take a proximal step, with the learning rate of each weight.

        Args:
            regularizer: What `regularizer` has made.
            rates: As of `regularizer`.
            t: The fraction of the training that is done.
        """
        regularizer.proximal_step(
            {
                name: self.factor(t) * rates[id(weight.parameter)]
                for name, weight in regularizer.weights.items()
                if id(weight.parameter) in rates
            }
        )
