"""Curvature: how the error of a layer grows when its weights change, as the second-order methods estimate it.

The weight of a layer is written as rows w. A change d of a row has the error d C d^T, and C is the curvature. It says
which weight costs least to prune, and how the others make up for it:

- Of one weight, the least error is w_i^2 / (2 [C^-1]_ii), if all others adapt (LeCun et al., 1989; Hassibi and Stork,
  1992, "optimal brain surgeon").
- For a given mask, the weights that are kept have least error where they solve C_KK d_K = C_KP w_P; K are those that
  are kept, and P those that are pruned.

There are two kinds: that of a layer's inputs, and the empirical Fisher matrix in blocks. A criterion declares its kind
with `curvature=`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.input_columns import WeightRows
from ..model.layers import NamedWeight
from ..model.tensors import widened
from ..support.capability import capability
from ..support.checks import check_count, check_number
from ..support.printable import printable


@dataclass(frozen=True)
class BlockRows:
    """How a weight is written as blocks of consecutive weights, of the shape (blocks, 1, size).

    The last block is filled up with zeros.

    Attributes:
        weight: The weight.
        size: Number of weights in a block.
    """

    weight: NamedWeight
    size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, 1, size)."""
        return -(-self.weight.parameter.numel() // self.size), 1, self.size

    def rows(self, values: Tensor) -> Tensor:
        """A tensor in the shape of the weight, as blocks."""
        flat = values.reshape(-1)
        return F.pad(flat, (0, -len(flat) % self.size)).view(self.shape)

    def back(self, rows: Tensor) -> Tensor:
        """Blocks in the shape of the weight: the inverse of `rows`."""
        parameter = self.weight.parameter
        return rows.reshape(-1)[: parameter.numel()].view(parameter.shape)


@dataclass(frozen=True, eq=False)
class Curvature:
    """The curvature of a layer.

    Attributes:
        form: How its weight is written as rows.
        matrices: Positive definite matrices, (n, columns, columns): one for each group of rows.
        dead: Bool (n, columns): the columns that nothing is known of, because their input was always zero.
    """

    form: Any
    matrices: Tensor
    dead: Tensor

    def rows(self, values: Tensor) -> Tensor:
        """A tensor in the shape of the weight, as rows in the type of the matrices."""
        return self.form.rows(values.detach()).to(self.matrices)

    def error(self, change: Tensor) -> Tensor:
        """d C d^T of each row of a change, (n, rows)."""
        return ((change @ self.matrices) * change).sum(-1)

    def inverse_diagonal(self) -> Tensor:
        """[C^-1]_ii for each weight, in the shape of the weight, or with size 1 along its outputs."""
        diagonal = self._inverse().diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        return self.form.back(diagonal.expand(self.form.shape))

    def inverse_factor(self) -> Tensor:
        """The upper triangular U with C^-1 = U^T U. U_jj^2 is [C^-1]_jj of the columns from j on alone."""
        return _cholesky(self._inverse(), self.form.weight.name).mT

    def _inverse(self) -> Tensor:
        return torch.cholesky_inverse(_cholesky(self.matrices, self.form.weight.name))

    def fitted(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The weights with the least error among those that are zero where a mask prunes.

        All rows are solved together by conjugate gradients, from the masked weights on. A row whose error is not lower
        in the end, as it is rounded to the type of the weight, stays as the mask leaves it.

        Args:
            weight: The weight before it is pruned.
            mask: Bool tensor that broadcasts to it, False where it is pruned.

        Returns:
            The new values, in the shape and type of the weight.
        """
        dense, kept = self.rows(weight), self.form.rows(mask.expand_as(weight)).to(self.matrices)
        masked = dense * kept
        solved = _solved(self.matrices, self._inverse(), dense, kept)
        rounded = solved.to(weight.dtype).to(solved)
        better = self.error(rounded - dense) < self.error(masked - dense)
        values = torch.where(better.unsqueeze(-1), rounded, masked)
        return self.form.back(values).to(weight.dtype)


def _solved(matrices: Tensor, inverse: Tensor, dense: Tensor, kept: Tensor) -> Tensor:
    """Conjugate gradients on the kept weights of each row: C_KK x = (C w)_K, preconditioned by (C^-1)_KK.

    With this preconditioner some 20 to 60 steps are enough; with the diagonal of C they are four times as many.
    """
    values = dense * kept
    residual = ((dense - values) @ matrices) * kept
    direction = scaled = (residual @ inverse) * kept
    size = (residual * scaled).sum(-1, keepdim=True)
    enough = size * torch.finfo(size.dtype).eps / 10
    for _ in range(2 * matrices.shape[-1]):
        unfinished = size > enough
        if not unfinished.any():
            break
        product = (direction @ matrices) * kept
        step = torch.where(unfinished, size / (direction * product).sum(-1, keepdim=True), 0)
        values, residual = values + step * direction, residual - step * product
        scaled = (residual @ inverse) * kept
        new_size = (residual * scaled).sum(-1, keepdim=True)
        direction = scaled + torch.where(unfinished, new_size / size, 0) * direction
        size = new_size
    return values


def _cholesky(matrices: Tensor, name: str) -> Tensor:
    """The lower Cholesky factor.

    Raises:
        ValueError: A matrix is not positive definite in the precision of its type.
    """
    factor, failed = torch.linalg.cholesky_ex(matrices)
    if failed.any():
        raise ValueError(
            f"the curvature of {printable(name)} is not positive definite, because its damping is too small for these "
            "batches; give the criterion a larger damping=, by functools.partial, or more batches"
        )
    return factor


# --- Kinds ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputCurvature:
    """C = 2 / n X X^T + damping * mean of its diagonal: half of d C d^T is the squared error of an output.

    X are the inputs of the layer, of a convolution the unfolded ones, n of them. A layer's inputs are those that the
    layers before it give after they were pruned. Frantar and Alistarh, 2023, "SparseGPT" (arXiv:2301.00774).

    Attributes:
        damping: What is added to the diagonal, as a fraction of its mean. Default 0.01, as published.
    """

    damping: float = 0.01

    needs_loss: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("damping", self.damping)

    def form_of(self, weight: NamedWeight) -> WeightRows:
        """How a weight is written as rows."""
        return WeightRows(weight)

    def finished(self, form: WeightRows, total: Tensor, count: int) -> Curvature:
        """The curvature from the sum of X X^T. Where an input is always zero, the mean of the diagonal stands in it."""
        matrices = total * (2 / count)
        diagonal = matrices.diagonal(dim1=-2, dim2=-1)
        dead, mean = diagonal == 0, diagonal.mean(-1, keepdim=True)
        diagonal += (self.damping + dead.to(mean)) * torch.where(mean == 0, 1, mean)
        return Curvature(form, matrices, dead)


@dataclass(frozen=True)
class FisherCurvature:
    """C = damping * I + 1 / m sum of g g^T, in diagonal blocks: the empirical Fisher matrix of m batches.

    g is the gradient of the loss of a batch; with batches of one example it is that of published. Kurtic et al., 2022,
    "The Optimal BERT Surgeon" (arXiv:2203.07259); Singh and Alistarh, 2020, "WoodFisher" (arXiv:2004.14340).

    Attributes:
        block_size: Number of consecutive weights in a block. Default 50, as published.
        damping: What is added to the diagonal. Default 1e-7, as published.
    """

    block_size: int = 50
    damping: float = 1e-7

    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size)
        check_number("damping", self.damping)

    def form_of(self, weight: NamedWeight) -> BlockRows:
        """How a weight is written as blocks."""
        return BlockRows(weight, self.block_size)

    def finished(self, form: BlockRows, total: Tensor, count: int) -> Curvature:
        """The curvature from the sum of g g^T."""
        matrices = total / count
        matrices.diagonal(dim1=-2, dim2=-1).add_(self.damping)
        return Curvature(form, matrices, torch.zeros_like(matrices[:, 0], dtype=torch.bool))


def added(total: Tensor, columns: Tensor) -> Tensor:
    """The sum of X X^T with the products of more columns, in place. Columns: (n, columns, samples)."""
    return total.baddbmm_(columns.to(total), columns.to(total).mT)


def zeros_for(kind: Any, weight: NamedWeight) -> Tensor:
    """What the products of a layer are summed up in: float32, and float64 for float64 weights and Fisher blocks.

    Fisher blocks have a fixed small damping, which would be lost beside a large gradient in float32.
    """
    parameter = widened(weight.parameter.detach())
    matrices, _, columns = kind.form_of(weight).shape
    dtype = torch.float64 if kind.needs_loss else parameter.dtype
    return torch.zeros(matrices, columns, columns, dtype=dtype, device=parameter.device)


def curvature_of(criterion: Callable) -> Any:
    """The kind of curvature that a criterion declares, with the options of the criterion that the kind has.

    Args:
        criterion: A criterion, or a partial of one.

    Returns:
        An InputCurvature by default.
    """
    plain = criterion.func if isinstance(criterion, partial) else criterion
    kind = capability(plain, "curvature", InputCurvature)
    known = {field.name for field in fields(kind)}
    parameters = inspect.signature(criterion).parameters
    return kind(**{
        name: each.default for name, each in parameters.items() if name in known and each.default is not each.empty
    })  # fmt: skip
