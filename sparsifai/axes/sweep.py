"""The sweep of SparseGPT through the columns of a weight, which chooses a mask and changes the weights that stay.

The columns are passed in order. What is pruned in a column is an error, and the columns behind it are changed so that
they make up for it: d = -w_j / U_jj * U_j, with C^-1 = U^T U. So the masks of later columns are chosen from the weights
as they are then. Frantar and Alistarh, 2023, "SparseGPT" (arXiv:2301.00774).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..support.capability import capability
from ..support.checks import check_count
from ..support.registry import name_of
from .curvature import Curvature
from .n_of_m import Blocks, check_reachable
from .ranking.scored_layer import nan_message


@dataclass(eq=False)
class ColumnMasks:
    """Chooses a mask for some columns of a layer after the other, so that the whole has the sparsity.

    Weights are ranked within these columns: all together for a context that ranks a layer, those of each row for one
    that ranks each output, and every M of a row for N:M. The counts of all columns add up to the exact count.

    Attributes:
        context: The context.
        sparsity: The sparsity of the layer.
        alive: Bool (groups, rows, columns): False where a weight is pruned already.
        inputs: Number of columns at one position of the kernel, at whose end blocks of N:M end.
        may_empty: Whether the layer may lose all its weights.
    """

    context: Any
    sparsity: float
    alive: Tensor
    inputs: int
    may_empty: bool = False
    _pruned: Any = field(init=False)  # so far: in each row, or in the layer

    def __post_init__(self) -> None:
        check_reachable(self.context, self.sparsity)
        self._pruned = 0 * self._count(self.alive)

    def slices(self, width: int) -> list[slice]:
        """The columns that are ranked together. width: how many, for contexts other than N:M."""
        columns = self.alive.shape[-1]
        if not isinstance(self.context, Blocks):
            return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]
        starts = [first + start for first in range(0, columns, self.inputs)
                  for start in range(0, self.inputs, self.context.size)]  # fmt: skip
        return [slice(*ends) for ends in zip(starts, [*starts[1:], columns], strict=True)]

    def keep(self, scores: Tensor, part: slice) -> Tensor:
        """Which weights of some columns are kept. scores: (groups, rows, columns of the part)."""
        alive = self.alive[..., part]
        scores = scores.masked_fill(~alive, -math.inf)
        if isinstance(self.context, Blocks):
            size, most = self.context.size, self.context.most_pruned
            kept = size - min(math.floor(self.sparsity * size + 0.5), most)
            return _without_lowest(scores, torch.tensor(max(scores.shape[-1] - kept, 0))) & alive
        units = scores if self._ranks_rows else scores.reshape(1, 1, -1)
        # What is pruned already cannot be undone, here or in later columns.
        here, later = self._count(~alive), self._count(~self.alive[..., part.stop :])
        count = (self._target(part.stop) - self._pruned).clamp(max=self._target(None) - self._pruned - later)
        count = torch.maximum(count, here)
        self._pruned = self._pruned + count
        return _without_lowest(units, count).view(scores.shape)

    @property
    def _ranks_rows(self) -> bool:
        return capability(self.context, "ranks_within") == "output"

    def _count(self, where: Tensor) -> Tensor:
        """How many are true: in each row, (groups, rows), or in all, (1, 1)."""
        return where.sum(-1) if self._ranks_rows else where.sum().view(1, 1)

    def _target(self, columns: int | None) -> int:
        """How many weights of the first columns, or of all, are to be pruned: of each row, or of the layer."""
        groups, rows, all_columns = self.alive.shape
        height = 1 if self._ranks_rows else groups * rows
        count = math.floor(self.sparsity * height * (all_columns if columns is None else columns) + 0.5)
        may_lose_all = self.may_empty and not self._ranks_rows
        return count if may_lose_all else min(count, height * all_columns - 1)


def _without_lowest(scores: Tensor, count: Tensor) -> Tensor:
    """Bool: all but the lowest scores along the last axis; of equal scores the first are pruned first."""
    ranks = scores.argsort(dim=-1, stable=True).argsort(-1)
    return ranks >= count.to(scores.device).unsqueeze(-1)


def swept(
    weight: Tensor, curvature: Curvature, criterion: Callable, masks: ColumnMasks, width: int
) -> tuple[Tensor, Tensor]:
    """Prune a layer, column by column.

    Args:
        weight: The weight before it is pruned.
        curvature: The curvature of its inputs.
        criterion: A function of `weight`, the weights as they are then, and `inverse_curvature`, which is U_jj^2.
        masks: Chooses the masks.
        width: Number of columns after which the columns behind are changed, and that are ranked together.

    Returns:
        The new values and the mask, in the shape of the weight.

    Raises:
        ValueError: A score is NaN.
    """
    factor, values = curvature.inverse_factor(), curvature.rows(weight).clone()
    diagonal = factor.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    kept = torch.empty_like(values, dtype=torch.bool)
    for several in _blocks_of(masks.slices(width), width):
        start, end = several[0].start, several[-1].stop
        block, errors = values[..., start:end], torch.empty_like(values[..., start:end])
        for part in several:
            own = slice(part.start - start, part.stop - start)
            scores = criterion(weight=block[..., own].clone(), inverse_curvature=diagonal[..., part].square())
            if scores.isnan().any():
                raise ValueError(nan_message(curvature.form.weight.name))
            scores = scores.masked_fill(curvature.dead[..., part].unsqueeze(-2), 0)
            kept[..., part] = masks.keep(scores, part)
            for place in range(own.start, own.stop):
                column = start + place
                pruned = block[..., place] * ~kept[..., column]
                errors[..., place] = pruned / diagonal[..., column]
                change = errors[..., place : place + 1] * factor[..., column : column + 1, column:end]
                block[..., place:] -= change
                block[..., place] *= kept[..., column]
        values[..., end:] -= errors @ factor[..., start:end, end:]
    return curvature.form.back(values).to(weight.dtype), curvature.form.back(kept)


def _blocks_of(slices: list[slice], width: int) -> list[list[slice]]:
    """Slices in blocks of at most so many columns, or of one slice."""
    blocks: list[list[slice]] = []
    for each in slices:
        if not blocks or each.stop - blocks[-1][0].start > width:
            blocks.append([])
        blocks[-1].append(each)
    return blocks


def width_of(criterion: Callable) -> int:
    """Number of columns for which a mask is chosen at once: the option `block_size` of a criterion, or 128."""
    option = inspect.signature(criterion).parameters.get("block_size")
    return check_count("block_size", 128 if option is None else option.default)


def check_sweeps_within(context: Any, criterion: Callable) -> None:
    """Refuse a context that does not rank the weights of a layer in the order of its columns.

    Raises:
        ValueError: It ranks other weights together.
    """
    if isinstance(context, Blocks) and context.axis == "in":
        return
    if not isinstance(context, Blocks) and capability(context, "ranks_within") in ("layer", "output"):
        return
    raise ValueError(
        f"criterion {name_of(criterion)} chooses the masks of a layer column by column, so it needs a context that "
        f"ranks within a layer and along its inputs, not {name_of(context)}; choose 'local', 'per_output' "
        "or N:M such as '2:4'"
    )
