"""Losses for the features of a student and its teacher, which may have different numbers of channels.

`relational` and `similarity` compare how the examples of a batch are related, `attention_transfer` compares where each
example has large features. With several processes each sees the examples of its own batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.tensors import widened
from ..support.warning import warn
from .distillation_loss import distillation_losses


@distillation_losses.register
def relational(student: Tensor, teacher: Tensor, distance_weight: float = 1.0, angle_weight: float = 2.0) -> Tensor:
    """Compare the distances and the angles between the examples of a batch (relational knowledge distillation).

    With h the Huber loss (delta = 1), x_i the features of example i in one of the nets, and s and t the two nets:

        distance: mean over the pairs i != j of h(d_ij(s), d_ij(t)),  d_ij = ||x_i - x_j|| / mean of all ||x_i - x_j||
        angle: mean over the triplets of different i, j, k of h(c_ijk(s), c_ijk(t)),  c_ijk = cos of the angle at x_j
        loss = distance_weight * distance + angle_weight * angle

    The cosine is 0 where two of the three examples are equal. It takes memory of batch^2 times the features of an
    example, so instead of large maps compare the layer that pools them.

    Source: Park et al., 2019, "Relational Knowledge Distillation" (arXiv:1904.05068). The default weights, 1 and 2, are
    those for metric learning; beside the cross entropy the paper has 25 and 50.

    Args:
        student: Features of the model that is trained, of shape (batch, ...).
        teacher: Features of the teacher, of shape (batch, ...). All axes but the first may differ.
        distance_weight: Weight of the distances. Default 1.
        angle_weight: Weight of the angles. Default 2.

    Returns:
        The loss, a scalar tensor, 0 for a single example. It is computed in float32 at least.

    Raises:
        ValueError: The two have different numbers of examples.

    Example:
        >>> features = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
        >>> relational(2 * features + 1, features).item()  # no distance and no angle is another, up to the scale
        0.0
    """
    with _no_autocast(student):
        ours, theirs = map(_Relations, _examples("relational", student, teacher))
        loss = distance_weight * ours.loss_of_distances(theirs)
        return loss + angle_weight * ours.loss_of_angles(theirs) if angle_weight else loss


class _Relations:
    """Distances and angles between the rows of a matrix."""

    def __init__(self, rows: Tensor):
        self.number = len(rows)
        self._differences = rows - rows[:, None]  # [j, i] is row i, seen from row j
        self._lengths = torch.linalg.vector_norm(self._differences, dim=-1)  # its gradient is 0 at length 0

    def loss_of_distances(self, other: _Relations) -> Tensor:
        pairs = max(self.number * (self.number - 1), 1)
        ours, theirs = (each._lengths / _divisor(each._lengths.sum() / pairs) for each in (self, other))
        return F.huber_loss(ours, theirs, reduction="sum") / pairs

    def loss_of_angles(self, other: _Relations) -> Tensor:
        triplets = max(self.number * (self.number - 1) * (self.number - 2), 1)
        each = F.huber_loss(self._cosines(), other._cosines(), reduction="none")
        # Entries of the anchor itself are 0 in both nets. The two ends of an angle are different, too.
        ends = ~torch.eye(self.number, dtype=torch.bool, device=each.device)
        return each.where(ends, 0.0).sum() / triplets

    def _cosines(self) -> Tensor:
        """[j, i, k] is the cosine of the angle at j between the directions to i and k."""
        directions = self._differences / _divisor(self._lengths)[..., None]
        return directions @ directions.mT


@distillation_losses.register
def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare which examples of a batch have similar features (similarity-preserving knowledge distillation).

        loss = ||G(student) - G(teacher)||_F^2 / batch^2,  G(x) = the rows of x x^T, each divided by its l2 norm

    where x has one row per example. A row of zeros stays as it is.

    Source: Tung and Mori, 2019, "Similarity-Preserving Knowledge Distillation" (arXiv:1907.09682). As the loss is
    small, the paper weights it by thousands: set feature_weight=.

    Args:
        student: Features of the model that is trained, of shape (batch, ...).
        teacher: Features of the teacher, of shape (batch, ...). All axes but the first may differ.

    Returns:
        The loss, a scalar tensor, 0 for a single example. It is computed in float32 at least.

    Raises:
        ValueError: The two have different numbers of examples.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> similarity(features, features.repeat(1, 3)).item()
        0.0
    """
    with _no_autocast(student):
        ours, theirs = (_unit(rows @ rows.mT) for rows in _examples("similarity", student, teacher))
        return (ours - theirs).square().sum() / len(ours) ** 2


@distillation_losses.register
def attention_transfer(student: Tensor, teacher: Tensor, channels: int | None = None) -> Tensor:
    """Compare where in each example the features are large (activation-based attention transfer).

        loss = mean over examples and positions of (q(student) - q(teacher))^2
        q(x) = m / ||m||_2,  m = mean over the channels of x^2, one number per position of the example

    Maps of convolutions with different heights and widths are averaged over areas to the smaller ones. Features of
    three axes are taken as (batch, tokens, channels), as transformers have them: the positions are the tokens, with
    padding and the class token, and both nets need the same tokens.

    Source: Zagoruyko and Komodakis, 2017, "Paying More Attention to Attention" (arXiv:1612.03928). As the loss is
    small, the paper weights it by 1000 / 2 for each layer: set feature_weight=.

    Args:
        student: Features of the model that is trained, of shape (batch, channels, ...) or (batch, tokens, channels).
        teacher: Features of the teacher, with the same axes. Its number of channels may differ.
        channels: The axis of the channels. Default the last of three axes, else 1. For Conv1d pass 1.

    Returns:
        The loss, a scalar tensor. It is computed in float32 at least.

    Raises:
        ValueError: The two have different numbers of axes, of examples or of tokens, or no axis of positions.

    Example:
        >>> features = torch.rand(2, 3, 4, 4)
        >>> attention_transfer(2 * features, features).item() < 1e-12
        True
    """
    shapes = f"the shapes {tuple(student.shape)} and {tuple(teacher.shape)}"
    if student.dim() != teacher.dim() or student.dim() < 3:
        raise ValueError(
            f"attention_transfer compares maps, both of shape (batch, channels, ...) or both of shape (batch, tokens, "
            f"channels), not {shapes}"
        )
    axis = (2 if student.dim() == 3 else 1) if channels is None else channels % student.dim()
    with _no_autocast(student):
        ours, theirs = (widened(each).square().mean(axis) for each in (student, teacher))
        sizes = [min(pair) for pair in zip(ours.shape[1:], theirs.shape[1:], strict=True)]
        if len(ours) != len(theirs) or (ours.shape != theirs.shape and axis != 1):
            raise ValueError(
                f"attention_transfer compares the positions of the same examples, but {shapes} differ in examples or "
                "tokens; choose layers that agree in them, or pass channels=1 if the channels are axis 1"
            )
        if ours.shape != theirs.shape:
            ours, theirs = (F.interpolate(each[:, None], sizes, mode="area") for each in (ours, theirs))
        return (_unit(ours.flatten(1)) - _unit(theirs.flatten(1))).square().mean()


# --- What they share ----------------------------------------------------------------------------------------------


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """Products of features would be computed in half precision, in which distances of near examples are lost."""
    return torch.autocast(tensor.device.type, enabled=False)


def _examples(loss: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Features of both nets with one row per example, in float32 at least."""
    if not student.dim() or not teacher.dim() or len(student) != len(teacher):
        raise ValueError(
            f"{loss} compares the examples of one batch, which both nets must have along their first axis, but the "
            f"shapes are {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if len(student) == 1:
        warn(
            f"{loss}: a batch of one example has no relations between examples, so it adds nothing to the loss; use "
            "larger batches, or drop_last=True if only the last one is so small"
        )
    ours, theirs = (widened(each).reshape(len(each), -1) for each in (student, teacher))
    return ours, theirs


def _unit(rows: Tensor) -> Tensor:
    """Rows divided by their l2 norm; a row of zeros stays as it is."""
    return rows / _divisor(torch.linalg.vector_norm(rows, dim=-1, keepdim=True))


def _divisor(lengths: Tensor) -> Tensor:
    """Lengths to divide by. What has length 0 is divided by infinity: it stays 0, and so does its gradient."""
    return lengths.where(lengths > 0, torch.inf)
