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

from ..support.chunk import CHUNK
from .ranking.scored_layer import ScoredLayer
from .ranking.within_rows import ranking_keys, write_kept


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
        rows = shape[0] if place == 0 else max(1, CHUNK // row)
        for start in range(0, shape[0], rows):
            part = slice(start * row, min(start + rows, shape[0]) * row)
            form = (-1, *shape[1:])
            keys = ranking_keys(layer, part).reshape(form)
            write_kept(stays[part].reshape(form), keys, place, self.size, count)
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
