"""Losses that compare a student with its teacher: their registry, soft targets, and checks of a user's losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..model.tensors import widened
from ..support.capability import capability
from ..support.printable import printable
from ..support.registry import Registry, name_of

# Losses of regression and of multi-label classification: a softmax over their outputs means nothing.
_NOT_OF_CLASSES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)


def _check(loss: Callable) -> None:
    """Refuse a function that cannot be called with (student, teacher)."""
    try:
        signature = inspect.signature(loss)
    except ValueError:  # the function of another language hides its parameters, or a partial has an unknown option
        if not isinstance(loss, partial):
            return
        raise ValueError(
            f"distillation loss {name_of(loss)}: {name_of(loss.func)} has no such option; it has "
            f"{', '.join(list(inspect.signature(loss.func).parameters)[2:]) or 'none'}"
        ) from None
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"distillation loss {name_of(loss)} must be a function of (student, teacher) ({error}); give its options "
            "default values, or set them by functools.partial"
        ) from None


# What a loss can declare, as a keyword of `distillation_losses.register`:
#
# of_classes  It compares the probabilities of classes, of outputs of one shape. It is called with `temperature`, `axis`
#             and `mask`, too, and is refused where the loss of the labels is not one of classes.
distillation_losses = Registry("distillation loss", check=_check, capabilities=("of_classes",))
"""The losses of a teacher by name. `distillation_losses.register` adds a function of the outputs of both nets.

Example:
    >>> @distillation_losses.register
    ... def mean_absolute_error(student, teacher):
    ...     return (student - teacher).abs().mean()
    >>> distillation = Distillation(nn.Linear(8, 2), loss='mean_absolute_error')
"""
distillation_losses.register(F.mse_loss, name="mean_squared_error")


@distillation_losses.register(of_classes=True)
def soft_targets(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, axis: int = 1, mask: Tensor | None = None
) -> Tensor:
    """Compare two nets' class probabilities, softened by a temperature.

    The loss is T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over all axes but that of the classes.
    The factor T^2 keeps the size of the gradients when T changes. It is computed in float32 at least.

    Source: Hinton et al., 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531).

    Args:
        student: Logits of the model that is trained, of any shape with the classes along `axis`.
        teacher: Logits of the teacher, of the same shape.
        temperature: T, a number above 0. The higher it is, the more the small probabilities count. Default 4.
        axis: The axis of the classes, at least two of them. Default 1.
        mask: What counts, such as the tokens that are no padding: a tensor with the shape of the logits without the
            axis of the classes, and 0 where the loss is left out. Default all.

    Returns:
        The loss, a scalar tensor.

    Raises:
        ValueError: The outputs have no such axis, or fewer than two classes along it.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> soft_targets(logits, logits, temperature=4.0, axis=1).item()
        0.0
    """
    if not -student.dim() <= axis < student.dim() or student.shape[axis] < 2:
        raise ValueError(
            f"soft_targets compares at least two classes, but outputs of shape {tuple(student.shape)} have none along "
            f"axis {axis}; pass axis=, or another loss= such as 'mean_squared_error'"
        )
    ours, theirs = (F.log_softmax(widened(logits) / temperature, axis) for logits in (student, teacher))
    each = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(axis)
    if mask is None:
        return temperature**2 * each.mean()
    counted = mask != 0
    return temperature**2 * each.where(counted, 0.0).sum() / counted.sum().clamp(min=1)


# --- The losses that users pass -----------------------------------------------------------------------------------


def loss_function(argument: str, loss: Any) -> Callable:
    """Find the loss that a user means.

    Args:
        argument: 'loss' or 'feature_loss', for messages.
        loss: What the user passed: a name of `distillation_losses`, or a function.

    Raises:
        TypeError: It is neither a name nor a function.
        ValueError: No loss has that name, or the function cannot be called with (student, teacher).
    """
    if not isinstance(loss, str) and not callable(loss):
        raise TypeError(
            f"distillation: {argument} must be a name of distillation_losses or a function of (student, teacher), not "
            f"{loss!r}"
        )
    return distillation_losses.resolve(loss)


def is_of_classes(loss: Callable) -> bool:
    """Whether a loss, or the one that a partial calls, compares the probabilities of classes."""
    return bool(capability(_called(loss), "of_classes", False))


def options_of(loss: Callable, options: dict[str, Any]) -> dict[str, Any]:
    """The options that a loss of classes is called with, without those that a partial of it sets."""
    given = loss.keywords if isinstance(loss, partial) else {}
    return {name: value for name, value in options.items() if is_of_classes(loss) and name not in given}


def _called(loss: Callable) -> Callable:
    while isinstance(loss, partial):
        loss = loss.func
    return loss


def check_compares_classes(loss_func: Any) -> None:
    """Refuse soft_targets beside a loss of the labels that is not one of classes.

    Args:
        loss_func: The loss of the labels, or None if it is not known.

    Raises:
        ValueError: The loss is one of regression or of several labels at once.
    """
    loss = getattr(loss_func, "func", loss_func)  # fastai's flattened losses hold torch's
    if isinstance(loss, _NOT_OF_CLASSES):
        raise ValueError(
            f"distillation: soft_targets compares classes, but the loss of the labels, {type(loss).__name__}, is not "
            "one of classes; pass another loss=, such as 'mean_squared_error'"
        )


def scalar_loss(
    loss: Callable, student: Tensor, teacher: Tensor, names: tuple[str, str], argument: str, options: dict
) -> Tensor:
    """The loss of two outputs as a scalar.

    Args:
        names: What gave the two outputs, for the message of an error.
        argument: 'loss' or 'feature_loss', for the message.
        options: Further arguments of the loss.

    Raises:
        ValueError: The shapes differ and the loss compares number by number, or the loss returns no scalar.
    """
    if student.shape != teacher.shape and _compares_numbers(loss):
        raise ValueError(
            f"distillation: {printable(names[0])} gives shape {tuple(student.shape)} and {printable(names[1])} "
            f"{tuple(teacher.shape)}, which {name_of(loss)} cannot compare; make the shapes equal, or pass another "
            f"{argument}=, such as 'similarity', or a function of (student, teacher)"
        )
    value = loss(widened(student), widened(teacher), **options)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"distillation: {argument} {name_of(loss)} must return a tensor with one number, but it returned {got}"
        )
    return value.as_subclass(Tensor).reshape(())


def _compares_numbers(loss: Callable) -> bool:
    """Whether a loss needs two outputs of one shape: all of torch's do, and those of classes."""
    return is_of_classes(loss) or (getattr(_called(loss), "__module__", None) or "").partition(".")[0] == "torch"
