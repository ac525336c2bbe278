"""Measuring a metric of a model or of a fastai Learner, and leaving both as they were."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.layers import evaluating
from ..model.parallel import reshard
from ..sparsifier.collection import Split, not_drawn_from, untraced
from ..sparsifier.sparsifier import Sparsifier
from ..support.registry import close_matches, name_of

# Words in the names of metrics of which lower is better: fastai's own, and those that it knows.
ERRORS = ("loss", "error", "mse", "mae", "msle", "rmspe", "perplexity", "brier", "hamming")


@dataclass(frozen=True)
class Meter:
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
    def of(cls, learn_or_model: Any, metric: Any, lower_is_better: bool | None) -> Meter:
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


def is_learner(value: Any) -> bool:
    """Whether a value is a fastai Learner, which is not imported for that."""
    return not isinstance(value, (nn.Module, type)) and all(
        hasattr(value, name) for name in ("model", "dls", "validate", "metrics", "loss_func")
    )


def metric_names(learn: Any) -> list[str]:
    """Names of what `learn.validate()` returns."""
    return ["valid_loss", *(metric.name for metric in learn.metrics)]


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


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Leave a model as it was, bit by bit: parameters, buffers, gradients, modes, and also the random generators.

    Parameters stay the same objects, whatever is done to them meanwhile and however it ends.
    """
    reshard(model)
    parameters = {each: (each.data, each.detach().clone(), each.requires_grad) for each in model.parameters()}
    parts = [(part, part.training, dict(part._parameters)) for part in model.modules()]
    with untraced(model):
        try:
            yield
        finally:
            reshard(model)
            for part, training, named in parts:
                part.training = training
                part._parameters.clear()
                part._parameters.update(named)
            for parameter, saved in parameters.items():
                _put_back(parameter, *saved)


@torch.no_grad()
def _put_back(parameter: nn.Parameter, data: Tensor, copy: Tensor, requires_grad: bool) -> None:
    if (parameter.device, parameter.dtype, parameter.shape) != (data.device, data.dtype, data.shape):  # model.half()
        parameter.data = data
    parameter.copy_(copy)
    parameter.requires_grad_(requires_grad)


@contextmanager
def unchanged(learn: Any) -> Iterator[None]:
    """Leave a Learner and its callbacks as they were; show nothing, and have none of them save, log or judge."""
    held = dict(vars(learn))
    # Metrics, and the means that a Recorder keeps, change in place.
    counted = [each for callback in learn.cbs for each in _means_of(callback)] + list(learn.metrics)
    of_callbacks = [(each, dict(vars(each))) for each in (*learn.cbs, *counted)]
    learn.cbs = learn.cbs.filter(lambda callback: callback.name != "progress")
    vars(learn).pop("progress", None)
    # What trackers, loggers and plots look for, to keep out of what is no training.
    learn.gather_preds = learn.lr_finder = None
    try:
        with learn.no_logging():
            yield
    finally:
        for holder, attributes in [(learn, held), *of_callbacks]:
            vars(holder).clear()
            vars(holder).update(attributes)


def _means_of(callback: Any) -> list[Any]:
    """What a callback holds that accumulates over batches."""
    values = [each for value in vars(callback).values() for each in (value if isinstance(value, list) else [value])]
    return [each for each in values if hasattr(type(each), "accumulate")]


def first_batch(learn: Any) -> tuple:
    """The first batch of the training data of a Learner: its inputs, and the tuple of its targets; nothing is drawn."""
    loader = learn.dls.train
    if not len(loader):
        raise ValueError("the Learner has no data to train on, of which an example is needed; give example_input=")
    order: Any = getattr(getattr(loader, "items", None), "idxs", [])  # of texts, which are shuffled in place
    before = list(order)
    with untraced(learn.model), not_drawn_from(loader):
        batch = loader.one_batch() if hasattr(loader, "one_batch") else next(iter(loader))  # fastai's, torch's
    if before:
        order[:] = before
    return next(iter(Split([batch], getattr(learn.dls, "n_inp", None))))


def calibrate_with(learn: Any, sparsifier: Sparsifier, batches: Iterable | None) -> None:
    """Show a criterion batches, by default the first of the training data, with the loss of the Learner."""
    several = [first_batch(learn)] if batches is None else Split(batches, getattr(learn.dls, "n_inp", None))
    sparsifier.calibrate(several, loss_of(learn))


def loss_of(learn: Any) -> Callable:
    """The loss of a Learner, of (output, targets), as fastai's callbacks for language models take it."""

    def loss_func(output: Any, targets: tuple) -> Tensor:
        output = output[0] if isinstance(output, tuple) else output
        return learn.loss_func(output, *targets).mean()

    return loss_func
