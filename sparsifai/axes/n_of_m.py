"""N:M sparsity: of every M consecutive weights along an axis, N are kept. The context '2:4' is the best known form.

Exactly N are kept in every block, also among equal scores, where M divides the length of the axis. Otherwise the last
block of r weights keeps min(r, N): hardware pads it with zeros, and these count as pruned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..model.zeros import is_nonzero, why_not_plain
from ..support.arguments import checks_arguments
from ..support.capability import capability
from ..support.chunk import CHUNK
from ..support.printable import printable
from ..support.registry import name_of
from .ranking.device_layer import DeviceLayer, Rows
from .ranking.rows_on_device import kept_in_rows
from .ranking.scored_layer import ScoredLayer
from .ranking.within_rows import BLOCKS, ranking_keys, write_kept


@dataclass(frozen=True)
class Blocks:
    """The context that ranks every `size` consecutive groups along `axis` alone; `blocks` and the name '2:4' make it.

    Attributes:
        size: Number of groups in a block; with granularity 'weight', number of weights.
        axis: Name of the axis along which the blocks run.
        most_pruned: Number of groups that are pruned in a block at most.
        exact: Whether a sparsity above most_pruned / size is an error.
    """

    size: int
    axis: str
    most_pruned: int
    exact: bool
    __name__: str

    fixes_counts = keeps_masked = on_device = True

    @property
    def highest_sparsity(self) -> float | None:
        """Highest sparsity of blocks that are exact, such as 0.5 of 2:4; None for others."""
        return self.most_pruned / self.size if self.exact else None

    @property
    def instead(self) -> str:
        """The context that reaches any sparsity, for errors."""
        return f"blocks({self.size})"

    def __call__(self, layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
        check_reachable(self, sparsity)
        count = math.floor(sparsity * self.size + 0.5)
        count = min(count, self.most_pruned)
        forms = [self._form(layer) for layer in layers]
        if layers and isinstance(layers[0], DeviceLayer):
            return kept_in_rows(layers, [Rows(*form, self.size, count) for form in forms])
        return [self._of_layer(layer, form, count) for layer, form in zip(layers, forms, strict=True)]

    def note(self, grid: Mapping[str, int]) -> str:
        """Remark for the report on a layer that is not divided into whole blocks; empty for other layers.

        Args:
            grid: Axis name -> number of groups along it.
        """
        length = grid.get(self.axis, 0)
        rest = length % self.size
        return f"{length} along '{self.axis}' is no multiple of {self.size}: the last block has {rest}" if rest else ""

    def _form(self, layer: Any) -> tuple[int, int, int]:
        """Number of groups along the axes before that of the blocks, along it, and along those behind it."""
        if not layer.grid:
            raise ValueError(f"context {self.__name__} cannot be combined with round_to=; leave one of them out")
        if layer.whole or (layer.grid.get(self.axis, 1) == 1 and layer.target.axes.get(self.axis, 2) > 1):
            raise ValueError(
                f"context {self.__name__}: {printable(layer.target.name)} has no groups along {self.axis!r} that could "
                "form blocks; choose another granularity or axis, or leave the layer out with exclude="
            )
        shape, place = tuple(layer.grid.values()), list(layer.grid).index(self.axis)
        return math.prod(shape[:place]), shape[place], math.prod(shape[place + 1 :])

    def _of_layer(self, layer: ScoredLayer, form: tuple[int, int, int], count: int) -> np.ndarray:
        """Which groups of a layer are kept, when `count` of every block are pruned."""
        outer, length, inner = form
        kept = np.empty(len(layer), bool)
        rows = max(1, max(CHUNK, self.size * BLOCKS) // (length * inner))
        for start in range(0, outer, rows):
            part = slice(start * length * inner, min(start + rows, outer) * length * inner)
            keys = ranking_keys(layer, part).reshape(-1, length, inner)
            write_kept(kept[part].reshape(-1, length, inner), keys, 1, self.size, count)
            if not layer.revives:
                kept[part] &= layer.alive[part]
        return kept


def check_reachable(context: Any, sparsity: float) -> None:
    """Refuse a sparsity above the highest of a context, with a tolerance of 0.005: for 1:3, 0.67 is as good as 2/3.

    Raises:
        ValueError: If the context cannot reach it.
    """
    most = capability(context, "highest_sparsity")
    if most is not None and sparsity > most + 0.005:
        instead = capability(context, "instead", "another context")
        raise ValueError(
            f"context {name_of(context)} prunes at most {most:g} of the weights, and sparsity {sparsity:g} was asked "
            f"for; ask for {most:g} or less, or use {instead}"
        )


@checks_arguments
def blocks(size: int, axis: str = "in") -> Blocks:
    """Make the context that ranks every `size` consecutive weights along an axis alone.

    In every block the same number of weights is pruned: sparsity x size, rounded to the nearest whole number, and half
    a weight is rounded up. One weight of a block is always kept. At sparsity 0.5, blocks(4) is 2:4. The name '2:4'
    gives the same masks, but a sparsity above 0.5 is an error.

    Args:
        size: Number of weights in a block, at least 2. With a larger granularity, number of groups.
        axis: Name of the axis along which the blocks run. Default 'in', along which hardware expects 2:4.

    Returns:
        The context, for `context=`.

    Raises:
        ValueError: `size` is not a whole number of at least 2.
        TypeError: `axis` is not a name.

    Example:
        >>> layer = nn.Linear(8, 3)
        >>> Sparsifier(layer, context=blocks(4)).sparsify(0.75)
        >>> is_nm(layer.weight, 1, 4)
        True
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise ValueError(f"blocks: size must be a whole number of at least 2, not {size!r}")
    if not isinstance(axis, str):
        raise TypeError(f"blocks: axis must be the name of an axis, such as 'in' or 'out', not {axis!r}")
    return Blocks(size, axis, size - 1, False, f"blocks({size})" if axis == "in" else f"blocks({size}, axis={axis!r})")


def parse_blocks(value: Any) -> Blocks | None:
    """The context that '2:4' means, which keeps two of every four weights. None for what is not of this form.

    Raises:
        ValueError: N of N:M is not from 1 to M - 1.
    """
    pattern = re.fullmatch(r"(\d+):(\d+)", value) if isinstance(value, str) else None
    if pattern is None:
        return None
    kept, size = int(pattern[1]), int(pattern[2])
    if not 0 < kept < size:
        raise ValueError(f"context {value!r}: N:M keeps N of every M weights, so N must be from 1 to M - 1")
    return Blocks(size, "in", size - kept, True, value)


@checks_arguments
def is_nm(weight: Tensor, n: int, m: int, axis: int = 1) -> bool:
    """Whether at most `n` of every `m` consecutive weights along an axis are not zero.

    A last block with fewer than `m` weights is checked too.

    Args:
        weight: The weight, of any shape.
        n: Number of weights in a block that may be nonzero, from 1 to m - 1.
        m: Number of weights in a block, at least 2.
        axis: Number of the axis of the tensor along which the blocks run. The default 1 is the inputs of a Linear or a
            convolution, whose weights are (out, in, ...).

    Returns:
        True if every block has at most `n` nonzero weights.

    Raises:
        ValueError: `n` is not from 1 to m - 1, the weight does not have the axis, or its zeros cannot be counted.

    Example:
        >>> is_nm(torch.tensor([[1., 0., 0., 2.], [0., 0., 0., 3.]]), 2, 4)
        True
    """
    if not 0 < n < m or not -weight.dim() <= axis < weight.dim():
        raise ValueError(
            f"is_nm: needs 0 < n < m and an axis of the weight, got {n}:{m} along axis {axis} of {weight.dim()} axes"
        )
    if why := why_not_plain(weight):
        raise ValueError(f"is_nm: zeros of the weight cannot be counted: it is {why}")
    counts = [piece.sum(axis) for piece in is_nonzero(weight).split(m, axis)]
    return all(bool((count <= n).all()) for count in counts)
