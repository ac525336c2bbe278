"""Blocks of N:M: of every M consecutive weights along an axis, N stay.

Exactly N in every block, ties included, where M divides the axis. Where it does not, the last block is filled up with
zeros that count as fallen, as hardware pads it: of its r weights min(r, N) stay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..support.chunk import PART
from .ranking.selection import ScoredLayer

# Blocks of so many are ranked by comparing all pairs; larger ones are sorted.
PAIRS = 8


@dataclass(frozen=True)
class Blocks:
    """The context in which every `size` consecutive weights along `axis` are ranked alone.

    fall: of a block at most. exact: whether more than that is an error.
    """

    size: int
    axis: str
    fall: int
    exact: bool
    __name__: str

    def __call__(self, layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
        self.check(sparsity)
        count = math.floor(sparsity * self.size + 0.5)
        return [self._of_layer(layer, min(count, self.fall)) for layer in layers]

    def check(self, sparsity: float) -> None:
        """ValueError for more than N:M has; 0.67 is as good as 2/3."""
        most = self.fall / self.size
        if self.exact and sparsity > most + 0.005:
            raise ValueError(
                f"context {self.__name__} makes {most:g} of the weights zero at most; sparsity {sparsity:g} was asked "
                "for"
            )

    def note(self, grid: Mapping[str, int]) -> str:
        """What the report says of a layer whose groups the blocks do not divide."""
        length = grid.get(self.axis, 0)
        left = length % self.size
        return f"blocks of {self.size} leave {left} of {length} along '{self.axis}'" if left else ""

    def _of_layer(self, layer: ScoredLayer, count: int) -> np.ndarray:
        if not layer.grid:
            raise ValueError(f"context {self.__name__} does not go with round_to")
        if layer.whole or (layer.grid.get(self.axis, 1) == 1 and layer.target.axes.get(self.axis, 2) > 1):
            raise ValueError(
                f"context {self.__name__}: {layer.target.name} has no groups along {self.axis!r} to make blocks of; "
                "choose another granularity or axis, or leave the layer out with exclude="
            )
        shape, place = tuple(layer.grid.values()), list(layer.grid).index(self.axis)
        stays = np.empty(len(layer), bool)
        # In whole rows of the first axis, unless the blocks run along it.
        row = math.prod(shape[1:])
        rows = shape[0] if place == 0 else max(1, PART // row)
        for start in range(0, shape[0], rows):
            part = slice(start * row, min(start + rows, shape[0]) * row)
            form = (-1, *shape[1:])
            keys = ranking_keys(layer, part).reshape(form)
            _write_those_that_stay(stays[part].reshape(form), keys, place, self.size, count)
            if not layer.revives:
                stays[part] &= layer.alive[part]
        return stays


def blocks(size: int, axis: str = "in") -> Blocks:
    """Rank every `size` consecutive weights along `axis` alone: blocks(4) at sparsity 0.5 is 2:4.

    Levels between are reached in whole steps, the nearest; half a step is rounded up. Also written '2:4', which
    refuses more than 0.5.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise ValueError(f"blocks: a block has a whole number of weights from 2 on, not {size!r}")
    if not isinstance(axis, str):
        raise TypeError(f"blocks: axis is the name of one, such as 'in' or 'out', not {axis!r}")
    return Blocks(size, axis, size - 1, False, f"blocks({size})" if axis == "in" else f"blocks({size}, axis={axis!r})")


def parse_blocks(value: Any) -> Blocks | None:
    """'2:4' -> the context in which two of every four stay."""
    pattern = re.fullmatch(r"(\d+):(\d+)", value) if isinstance(value, str) else None
    if pattern is None:
        return None
    stay, size = int(pattern[1]), int(pattern[2])
    if not 0 < stay < size:
        raise ValueError(f"context {value!r}: of N:M, N are kept of every M, so N is from 1 to M - 1")
    return Blocks(size, "in", size - stay, True, value)


def is_nm(weight: Tensor, n: int, m: int, axis: int = 1) -> bool:
    """Whether of every `m` consecutive weights along an axis at most `n` are not zero; a last, shorter block too.

    axis: by default the inputs of a Linear or a convolution, whose weights are (out, in, ...).
    """
    if not 0 < n < m or not -weight.dim() <= axis < weight.dim():
        raise ValueError(f"is_nm: 0 < n < m and an axis of the weight, not {n}:{m} along {axis} of {weight.dim()} axes")
    counts = [(piece != 0).sum(axis) for piece in weight.detach().split(m, axis)]
    return all(bool((count <= n).all()) for count in counts)


def _write_those_that_stay(stays: np.ndarray, keys: np.ndarray, axis: int, size: int, count: int) -> None:
    """Of every `size` along an axis, False at the `count` lowest, ties in index order."""
    length = keys.shape[axis]
    whole = length // size * size
    for start, end, block in ((0, whole, size), (whole, length, length - whole)):
        if start == end:
            continue
        where = (slice(None),) * axis + (slice(start, end),)
        form = (*keys.shape[:axis], (end - start) // block, block, *keys.shape[axis + 1 :])
        # The places within a block come first: what is compared lies side by side in memory.
        by_place = np.moveaxis(keys[where].reshape(form), axis + 1, 0).copy()
        written = np.moveaxis(stays[where].reshape(form), axis + 1, 0)  # a view: the axis is only split
        for place, stay in enumerate(_all_but_lowest(by_place, max(count - (size - block), 0))):
            written[place] = stay


def _all_but_lowest(keys: np.ndarray, count: int) -> np.ndarray:
    """False at the `count` lowest along the first axis, ties in index order."""
    size = len(keys)
    if size > PAIRS:
        return np.moveaxis(~lowest_of_rows(np.moveaxis(keys, 0, -1), count), -1, 0)
    # How many of its block each is higher than: of all that follow it, at first.
    rank = np.empty(keys.shape, np.int8)
    rank[...] = np.arange(size - 1, -1, -1).reshape(-1, *[1] * (keys.ndim - 1))
    for first in range(size):
        for second in range(first + 1, size):
            is_no_higher = np.less_equal(keys[first], keys[second]).view(np.int8)
            rank[first] -= is_no_higher
            rank[second] += is_no_higher
    return rank >= count


def lowest_of_rows(keys: np.ndarray, count: int) -> np.ndarray:
    """True at the `count` lowest along the last axis, ties in index order."""
    if count == 0:
        return np.zeros(keys.shape, bool)
    last = np.partition(keys, count - 1, axis=-1)[..., count - 1 : count]
    falls, ties = keys < last, keys == last
    needed = count - falls.sum(-1, keepdims=True)
    return falls | (ties & (ties.cumsum(-1) <= needed))


def ranking_keys(layer: ScoredLayer, part: slice = slice(None)) -> np.ndarray:
    """Scores of a part of a layer, or ranks, those that are masked lower than all others. ValueError if one is NaN."""
    score, alive = layer.part(part), layer.alive[part]
    lowest = score.min()
    if np.isnan(lowest):
        layer.check(score, alive | layer.revives)
    if layer.revives and not alive.all():
        # Those that are masked have an order among themselves.
        ranks = np.empty(len(score), np.int64)
        ranks[np.lexsort((score, alive))] = np.arange(len(score))
        return ranks
    # Magnitudes of weights that are zero where they are masked, and nowhere else, are so already.
    if alive.all() or (lowest >= 0 and np.array_equal(score != 0, alive)):
        return score
    # The smaller of the score and of plus or minus infinity: many times faster than to choose by a random mask.
    limit = np.subtract(alive, 0.5, dtype=score.dtype)
    limit *= np.inf
    return np.fmin(np.maximum(score, np.finfo(score.dtype).min), limit, out=limit)
