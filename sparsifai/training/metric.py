"""Measuring a metric of a model or of a fastai Learner, and leaving both as they were."""

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
from ..model.running import as_it_was, evaluating, not_drawn_from
from ..support.registry import close_matches, name_of

# Words in the names of metrics of which lower is better: fastai's own, and those that it knows.
ERRORS = ("loss", "error", "mse", "mae", "msle", "rmspe", "perplexity", "brier", "hamming")


@dataclass(frozen=True)
class Metric:
    """Called, it measures the metric of a model as it is: a float.

    model: whose weights are measured. name: of the metric. read: what gives its value. lower_is_better: its direction.
    learn: the Learner that holds the model, or None.
    """

    model: nn.Module
    name: str
    read: Callable[[], Any]
    lower_is_better: bool
    learn: Any = None

    @classmethod
    def of(cls, learn_or_model: Any, metric: Any, lower_is_better: bool | None) -> Metric:
        """What measures `metric`: of a Learner a name, a function of the model, or None for the validation loss; of a
        module a function of it. TypeError and ValueError if it cannot be had.

        lower_is_better: None for whether the name of the metric has one of ERRORS in it.
        """
        learn = learn_or_model if is_learner(learn_or_model) else None
        model = learn_or_model if learn is None else learn.model
        if not isinstance(model, nn.Module):
            raise TypeError(f"give a fastai Learner or a torch.nn.Module, not {type(learn_or_model).__name__}")
        position = None if learn is None else _position_of(metric, learn)
        if position is not None:
            name, read = metric_names(learn)[position], lambda: _validated(learn, position)
        elif callable(metric):
            _check_takes_a_model(metric)
            name, read = name_of(metric), lambda: _evaluated(metric, model)
        else:
            raise TypeError(
                f"metric is a function of the model that returns a number, not {metric!r}; "
                "a fastai Learner measures its own: None for its validation loss, or the name of one of its metrics"
            )
        lower = any(word in name.lower() for word in ERRORS) if lower_is_better is None else bool(lower_is_better)
        return cls(model, name, read, lower, learn)

    def __call__(self) -> float:
        with ExitStack() as loaders:
            for loader in [] if self.learn is None else self.learn.dls.loaders:
                loaders.enter_context(not_drawn_from(loader))
            value = self.read()
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metric {self.name} gave {value!r}, which is not a number") from error

    def baseline(self) -> float:
        """Of the model as it is, which all else is compared with. ValueError if it is not finite."""
        with as_it_was(self.model):
            value = self()
        if not math.isfinite(value):
            raise ValueError(f"metric {self.name} of the model as it is is {value}, with which nothing can be compared")
        return value

    @contextmanager
    def held(self) -> Iterator[None]:
        """Leave the Learner, if there is one, as it was; its model moves to the device of its data, as in a fit."""
        if self.learn is None:
            yield
            return
        if (device := getattr(self.learn.dls, "device", None)) is not None:
            self.model.to(device)
        with unchanged(self.learn):
            yield


def _position_of(metric: Any, learn: Any) -> int | None:
    """Where it stands in what `learn.validate()` returns, None if it does not. ValueError for an unknown name."""
    if metric is None:
        return 0
    names = metric_names(learn)
    if isinstance(metric, str):
        if metric not in names:
            raise ValueError(f"the Learner has no metric {metric!r}; {close_matches(metric, names)}")
        return names.index(metric)
    # Those that the Learner was given are functions of predictions, not of the model.
    own = [place for place, each in enumerate(learn.metrics, 1) if metric in (each, getattr(each, "func", None))]
    return own[0] if own else None


def _check_takes_a_model(metric: Callable) -> None:
    try:
        signature = inspect.signature(metric)
    except ValueError:  # of one that is not written in Python
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(
            f"metric {name_of(metric)} is to be a function of the model alone ({error}); one of predictions and "
            "targets belongs into the metrics of the Learner, and is then given by its name"
        ) from None


def _validated(learn: Any, position: int) -> Any:
    values = learn.validate() if len(learn.dls.loaders) > 1 else None
    if values is None or len(values) <= position or values[position] is None:
        raise ValueError(
            f"learn.validate() gives no {metric_names(learn)[position]}: the Learner needs a Recorder and data to "
            "validate with; or give metric a function of the model"
        )
    return values[position]


def _evaluated(metric: Callable, model: nn.Module) -> Any:
    with evaluating(model), torch.no_grad():
        return metric(model)
