"""Helpers that work on a fastai Learner without importing fastai: its data, its loss, its state before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..gradual.gradual_sparsifier import show_batches
from ..model.running import Split, check_no_batch, not_drawn_from, untraced
from ..sparsifier.masking import parameters_of
from ..sparsifier.notices import notice_of_unstepped
from ..sparsifier.sparsifier import Sparsifier
from ..support.at_end import AtEnd
from ..support.progress import bars
from ..support.warning import warn

if TYPE_CHECKING:
    from fastai.learner import Learner


def is_search(learn: Learner) -> bool:
    """Whether the present fit is that of lr_find, which restores the model afterwards."""
    return hasattr(learn, "lr_finder")


def show_data(learn: Learner, sparsifier: Sparsifier, batches: Iterable | None, anew: bool = False) -> None:
    """Calibrate what depends on data, unless the gradients of past steps are enough.

    Args:
        learn: The Learner.
        sparsifier: A Sparsifier of its model.
        batches: The batches. Default: in a fit the present batch, else the first one of the training data. That batch
            may skip layers: others will not, and the training goes on.
        anew: Whether gradients of past steps are not enough in any case, because layers have joined. Default False.
    """
    short = sparsifier.means_are_short(anew)
    if not (short or sparsifier.runs_batches):
        return
    sparsifier.collected.may_skip = batches is None
    if batches is None and learn.xb[0] is not None:
        show_batches(sparsifier, [(*learn.xb, learn.yb)], _loss_of(learn.loss_func), short)
    else:
        show_batches(sparsifier, *_batches_of(learn, batches), short)


def check_steps_model(learn: Any) -> None:
    """Check that the optimizer of a Learner steps its model.

    Raises:
        ValueError: The model has parameters, and the optimizer holds none of them.
    """
    if learn.opt is None or not list(learn.model.parameters()):
        return
    held = list(parameters_of(learn.opt))
    if not _any_of(held, learn.model) and not _are_copies(held, learn.model):
        raise ValueError(
            "the optimizer of the Learner holds no parameter of its model, so that nothing would be trained: the model "
            "was replaced after the optimizer was made. Set learn.opt = None, and the fit makes a new optimizer"
        )


def check_steps_weights(learn: Any) -> None:
    """Check that the optimizer of a Learner steps the weights of its model, not copies of them.

    Raises:
        ValueError: It steps copies, as with weights in half precision.
    """
    if not _any_of(list(parameters_of(learn.opt)), learn.model):
        raise ValueError(
            "straight_through: the optimizer steps copies of the weights, as with weights in half precision, so it "
            "would not move the dense weights; use to_fp16() or to_bf16(), which keep the weights, or train without "
            "straight_through="
        )


def _any_of(held: Sequence[Tensor], model: nn.Module) -> bool:
    """Whether any of these parameters is one of the model."""
    own = {id(parameter) for parameter in model.parameters()}
    return any(id(each) in own for each in held)


def _are_copies(held: Sequence[Tensor], model: nn.Module) -> bool:
    """Whether an optimizer steps copies of the weights of a model, as with half precision, or one copy of all."""
    weights = [each.detach() for each in model.parameters() if each.dim() > 1]
    total = sum(parameter.numel() for parameter in model.parameters())
    return any(each.dim() == 1 and each.numel() >= total for each in held) or any(
        torch.equal(copy.detach().to(weight), weight)
        for weight in weights[:1]
        for copy in held
        if copy.shape == weight.shape
    )


def warn_of_unstepped(learn: Learner, sparsifier: Sparsifier) -> None:
    """Warn if a large part of what is pruned is not in the optimizer, so that it is never trained.

    Args:
        learn: The Learner.
        sparsifier: A Sparsifier of its model.
    """
    held = list(parameters_of(learn.opt))
    if not _any_of(held, sparsifier.model):  # they are copies
        return
    if notice := notice_of_unstepped(sparsifier.layers, held):
        warn(
            f"SparsifyCallback: {notice}; give the Learner a splitter with all parameters, or name the layers to prune "
            "in layers="
        )


def is_learner(value: Any) -> bool:
    """Whether a value looks like a fastai Learner. fastai is not imported."""
    return not isinstance(value, (nn.Module, type)) and all(
        hasattr(value, name) for name in ("model", "dls", "validate", "metrics", "loss_func")
    )


def bars_of(learn: Any) -> AbstractContextManager[None]:
    """Show progress bars in a `with` block only if a Learner shows its own: `learn.no_bar()` switches off both.

    Args:
        learn: The Learner, or None for a model that is in none.
    """
    return bars(learn is None or hasattr(learn, "progress"))


def metric_names(learn: Any) -> list[str]:
    """The names of the numbers that `learn.validate()` returns."""
    return ["valid_loss", *(metric.name for metric in learn.metrics)]


@contextmanager
def unchanged(learn: Any) -> Iterator[None]:
    """Restore a Learner and its callbacks at the end. In between nothing is shown, saved, logged or tracked."""
    held = dict(vars(learn))
    # Metrics, and the running means of a Recorder, change in place.
    counted = [each for callback in learn.cbs for each in _means_of(callback)] + list(learn.metrics)
    of_callbacks = [(each, dict(vars(each))) for each in (*learn.cbs, *counted)]

    was_locked = learn.lock.locked()

    def undo() -> None:
        for holder, attributes in [(learn, held), *of_callbacks]:
            vars(holder).clear()
            vars(holder).update(attributes)
        if not was_locked and learn.lock.locked():  # an interrupted `validate` of fastai leaves it so
            learn.lock.release()

    at_end = AtEnd(undo)
    with at_end, at_end:
        learn.cbs = learn.cbs.filter(lambda callback: callback.name != "progress")
        vars(learn).pop("progress", None)
        # fastai's trackers, loggers and plots do nothing on a Learner that has these attributes.
        learn.gather_preds = learn.lr_finder = None
        with learn.no_logging():
            yield


def _means_of(callback: Any) -> list[Any]:
    """The attributes of a callback that accumulate over batches."""
    values = [each for value in vars(callback).values() for each in (value if isinstance(value, list) else [value])]
    return [each for each in values if hasattr(type(each), "accumulate")]


def first_batch(learn: Any) -> tuple:
    """The first batch of the training data of a Learner. No random number is drawn.

    Args:
        learn: The Learner.

    Returns:
        The inputs, and the tuple of targets.

    Raises:
        ValueError: The Learner has no training data.
    """
    loader = learn.dls.train
    if not len(loader):
        raise ValueError("the Learner has no data to train on, but an example is needed; pass example_input=")
    order: Any = getattr(getattr(loader, "items", None), "idxs", [])  # loaders of texts shuffle it in place
    before = list(order)

    def undo() -> None:
        if before:
            order[:] = before

    at_end = AtEnd(undo)
    with untraced(learn.model), not_drawn_from(loader), at_end, at_end:
        batch = loader.one_batch() if hasattr(loader, "one_batch") else next(iter(loader))  # fastai's, torch's
    return next(iter(Split([batch], getattr(learn.dls, "n_inp", None))))


def calibrate_with(learn: Any, sparsifier: Sparsifier, batches: Iterable | None) -> None:
    """Calibrate a Sparsifier with the loss of a Learner, by default on the first batch of its training data."""
    sparsifier.calibrate(*_batches_of(learn, batches))


def _batches_of(learn: Any, batches: Iterable | None) -> tuple[Iterable, Callable]:
    """Batches, by default the first one of the training data, and the loss of a Learner."""
    check_no_batch("calibration", batches)
    several = [first_batch(learn)] if batches is None else Split(batches, getattr(learn.dls, "n_inp", None))
    return several, loss_of(learn)


def loss_of(learn: Any) -> Callable:
    """The loss of a Learner as a function of (output, targets), for batches that no callback has changed.

    While it trains, MixUp and CutMix put a loss on the Learner that mixes the targets of the present batch. The loss of
    the user is the one that they keep. If the output is a tuple, as that of language models, the loss is that of its
    first element.
    """
    loss = learn.loss_func
    callback: Any = getattr(loss, "__self__", None)
    while hasattr(callback, "old_lf") and callback.old_lf is not loss:
        loss = callback.old_lf
        callback = getattr(loss, "__self__", None)
    if callback in learn.cbs:
        warn(
            f"{callback.name} has put its own loss on the Learner, which may mix the targets of the present batch; the "
            "batches of calibration= are scored by it. Let the callback keep the loss it replaces as `old_lf`"
        )
    return _loss_of(loss)


def _loss_of(loss: Callable) -> Callable:
    """A loss as a function of (output, tuple of targets) that takes the first output of several, and the mean."""

    def loss_func(output: Any, targets: tuple) -> Tensor:
        output = output[0] if isinstance(output, tuple) else output
        return loss(output, *targets).mean()

    return loss_func
