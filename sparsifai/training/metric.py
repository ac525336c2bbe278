"""Measuring a metric of a model or of a fastai Learner, without changing either."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..callbacks.learner import is_learner, metric_names, unchanged
from ..model.running import as_it_was, evaluating, in_modes, not_drawn_from
from ..support.printable import message_of, printable
from ..support.registry import close_matches, name_of

# A metric with one of these words in its name is lower for a better model: fastai's own metrics, and the usual ones.
ERRORS = ("loss", "error", "mse", "mae", "msle", "rmspe", "perplexity", "brier", "hamming")


@dataclass(frozen=True)
class Metric:
    """Measures a metric of a model when it is called, and returns it as a float.

    Args:
        model: The model whose metric it is.
        name: The name of the metric.
        compute: Returns the present value of the metric.
        lower_is_better: Whether a better model has a lower value.
        learn: The Learner of the model, or None.
    """

    model: nn.Module
    name: str
    compute: Callable[[], Any]
    lower_is_better: bool
    learn: Any = None

    @classmethod
    def of(cls, learn_or_model: Any, metric: Any, lower_is_better: bool | None) -> Metric:
        """Find how to measure what a user asks for.

        Args:
            learn_or_model: A fastai Learner or a torch.nn.Module.
            metric: For a Learner the name of one of its metrics, the metric that it was given, or None for its
                validation loss. For either, a function of the model that returns a number.
            lower_is_better: The direction; None to tell it by the name of the metric.

        Raises:
            TypeError: There is no model, or the metric is neither a name nor a function of the model alone.
            ValueError: The Learner has no metric of that name.
        """
        learn = learn_or_model if is_learner(learn_or_model) else None
        model = learn_or_model if learn is None else learn.model
        if not isinstance(model, nn.Module):
            raise TypeError(f"pass a fastai Learner or a torch.nn.Module, not {type(learn_or_model).__name__}")
        position = None if learn is None else _position_of(metric, learn)
        if position is not None:
            name, compute = metric_names(learn)[position], lambda: _validate(learn, position)
        elif callable(metric):
            _check_takes_a_model(metric)
            name, compute = name_of(metric), lambda: _evaluate(metric, model)
        else:
            raise TypeError(
                f"metric must be a function of the model that returns a number, not {metric!r}; for a fastai Learner "
                "it may also be the name of one of its metrics, or None for its validation loss"
            )
        lower = any(word in name.lower() for word in ERRORS) if lower_is_better is None else bool(lower_is_better)
        return cls(model, name, compute, lower, learn)

    def __call__(self) -> float:
        with ExitStack() as loaders:
            for loader in [] if self.learn is None else self.learn.dls.loaders:
                loaders.enter_context(not_drawn_from(loader))
            value = self.compute()
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metric {printable(self.name)} must return a number, but it returned {value!r}") from error

    def baseline(self) -> float:
        """The metric of the model before pruning.

        Raises:
            ValueError: It is not finite.
        """
        with as_it_was(self.model):
            value = self()
        if not math.isfinite(value):
            raise ValueError(
                f"metric {printable(self.name)} is {value} before pruning, so nothing can be compared with it; check "
                "the model and its data"
            )
        return value

    @contextmanager
    def learner_unchanged(self) -> Iterator[None]:
        """Leave the Learner unchanged, if there is one; its model moves to the device of its data, as in a fit."""
        if self.learn is None:
            yield
            return
        if (device := getattr(self.learn.dls, "device", None)) is not None:
            self.model.to(device)
        with unchanged(self.learn):
            yield


def _position_of(metric: Any, learn: Any) -> int | None:
    """The position of a metric in what `learn.validate()` returns; None for a function that is not one of them."""
    if metric is None:
        return 0
    names = metric_names(learn)
    if isinstance(metric, str):
        if metric not in names:
            raise ValueError(f"the Learner has no metric {metric!r}; {close_matches(metric, names)}")
        return names.index(metric)
    # Metrics of a Learner are functions of predictions and targets, not of the model.
    own = [place for place, each in enumerate(learn.metrics, 1) if metric in (each, getattr(each, "func", None))]
    return own[0] if own else None


def _check_takes_a_model(metric: Callable) -> None:
    try:
        signature = inspect.signature(metric)
    except ValueError:  # a function that is not written in Python
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(
            f"metric {name_of(metric)} must be a function of the model alone ({message_of(error)}); add a metric of "
            "predictions and targets to the metrics of the Learner, and pass its name"
        ) from None


def _validate(learn: Any, position: int) -> Any:
    values = learn.validate() if len(learn.dls.loaders) > 1 else None
    if values is None or len(values) <= position or values[position] is None:
        raise ValueError(
            f"learn.validate() returns no {printable(metric_names(learn)[position])}, because the Learner has no "
            "validation data or no Recorder; add them, or pass a function of the model as metric"
        )
    return values[position]


def _evaluate(metric: Callable, model: nn.Module) -> Any:
    with in_modes(torch.no_grad()), evaluating(model):
        return metric(model)
