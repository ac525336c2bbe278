"""Helpers on a fastai Learner that need no import of fastai: its data, its loss, leaving it unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..model.running import Split, not_drawn_from, untraced
from ..sparsifier.sparsifier import Sparsifier

if TYPE_CHECKING:
    from fastai.learner import Learner


def is_search(learn: Learner) -> bool:
    """Whether a fit is lr_find's, which is undone."""
    return hasattr(learn, "lr_finder")


def show_data(learn: Learner, sparsifier: Sparsifier, batches: Iterable | None) -> None:
    """Show a criterion that looks at data what it needs, unless the gradients that have passed are all of it.

    batches: by default the one at hand, in a fit; else one to train on.
    """
    collected = sparsifier.collected
    if not collected.at("forward", "loss") and collected.missing(sparsifier.targets) is None:
        return

    if batches is None and learn.xb[0] is not None:
        sparsifier.calibrate([(*learn.xb, learn.yb)], loss_of(learn))
    else:
        calibrate_with(learn, sparsifier, batches)
    collected.begins.update(collected.at("backward"))  # of the batches that pass none is counted twice


def is_learner(value: Any) -> bool:
    """Whether a value is a fastai Learner, which is not imported for that."""
    return not isinstance(value, (nn.Module, type)) and all(
        hasattr(value, name) for name in ("model", "dls", "validate", "metrics", "loss_func")
    )


def metric_names(learn: Any) -> list[str]:
    """Names of what `learn.validate()` returns."""
    return ["valid_loss", *(metric.name for metric in learn.metrics)]


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
