"""Losses that compare a student with its teacher: soft targets, and checks of the losses that users pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..model.tensors import widened
from ..support.printable import printable
from ..support.registry import name_of

# Losses of regression and of multi-label classification: a softmax over their outputs means nothing.
_NOT_OF_CLASSES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)


def soft_targets(student: Tensor, teacher: Tensor, temperature: float, axis: int) -> Tensor:
    """Compare two nets' class probabilities, softened by a temperature.

    The loss is T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over all axes but that of the classes.
    The factor T^2 keeps the size of the gradients when T changes. It is computed in float32 at least.

    Source: Hinton et al., 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531).

    Args:
        student: Logits of the model that is trained, of any shape with the classes along `axis`.
        teacher: Logits of the teacher, of the same shape.
        temperature: T, a number above 0. The higher it is, the more the small probabilities count.
        axis: The axis of the classes, at least two of them.

    Returns:
        The loss, a scalar tensor.

    Raises:
        ValueError: The outputs have no such axis, or fewer than two classes along it.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> soft_targets(logits, logits, temperature=4.0, axis=1).item()
        0.0
    """
    if not -student.dim() <= axis < student.dim() or student.shape[axis] < 2:
        raise ValueError(
            f"soft_targets compares at least two classes, but outputs of shape {tuple(student.shape)} have none along "
            f"axis {axis}; pass axis=, or another loss= such as torch.nn.functional.mse_loss, to DistillCallback"
        )
    ours, theirs = (F.log_softmax(widened(logits) / temperature, axis) for logits in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(axis).mean()


def check_compares_classes(loss_func: Any) -> None:
    """Refuse soft_targets for a Learner whose loss is not one of classes.

    Args:
        loss_func: The loss of the Learner.

    Raises:
        ValueError: The loss is one of regression or of several labels at once.
    """
    loss = getattr(loss_func, "func", loss_func)  # fastai's flattened losses hold torch's
    if isinstance(loss, _NOT_OF_CLASSES):
        raise ValueError(
            f"DistillCallback: soft_targets compares classes, but the Learner's loss {type(loss).__name__} is not one "
            "of classes; pass another loss=, such as torch.nn.functional.mse_loss"
        )


def scalar_loss(
    loss: Callable, student: Tensor, teacher: Tensor, names: tuple[str, str], argument: str, options: dict
) -> Tensor:
    """The loss of two outputs as a scalar.

    Args:
        names: What gave the two outputs, for the message of an error.
        argument: The name of the argument of DistillCallback that is the loss.
        options: Further arguments of the loss.

    Raises:
        ValueError: The shapes differ and the loss compares number by number, or the loss returns no scalar.
    """
    if student.shape != teacher.shape and _compares_numbers(loss):
        raise ValueError(
            f"DistillCallback: {printable(names[0])} gives shape {tuple(student.shape)} and {printable(names[1])} "
            f"{tuple(teacher.shape)}, which {name_of(loss)} cannot compare; make the shapes equal, or pass your own "
            f"{argument}=, a function of (student, teacher)"
        )
    value = loss(widened(student), widened(teacher), **options)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"DistillCallback: {argument} {name_of(loss)} must return a tensor with one number, but it returned {got}"
        )
    return value.as_subclass(Tensor).reshape(())


def _compares_numbers(loss: Callable) -> bool:
    """Whether a loss needs two outputs of one shape: all of torch's do, and soft_targets."""
    while isinstance(loss, partial):
        loss = loss.func
    return loss is soft_targets or (getattr(loss, "__module__", None) or "").partition(".")[0] == "torch"
