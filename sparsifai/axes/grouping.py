"""What a granularity makes of one weight: groups, scores pooled over them, masks spread over weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..support.chunk import CHUNK
from ..support.registry import Registry, name_of
from .granularity import Axes, Granularity


class UnavailableError(ValueError):
    """A granularity names axes that a layer does not have."""


@dataclass(frozen=True)
class Grouping:
    """How the weights of one layer fall into groups.

    indexed: axis -> extent of a group along it, of the axes that index the mask.
    shape: of the weight; the first axis of a grouped convolution is split into (groups, rest), so that channel and
        filter mean real ones.
    extents: of a group along every axis of `shape`. At the end of an axis a group may be smaller.
    names: of the axes of `shape`; that of the convolution groups is 'groups'.
    """

    indexed: Mapping[str, int]
    shape: tuple[int, ...]
    extents: tuple[int, ...]
    split: bool
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, granularity: Granularity, axes: Axes, convolution_groups: int = 1) -> Grouping:
        """Apply `granularity` to a weight with `axes`.

        sizes of `axes`: within one convolution group. UnavailableError if the layer lacks an axis.
        """
        try:
            answer = granularity(dict(axes))
        except Exception as error:
            raise ValueError(
                f"granularity {name_of(granularity)} fails on the axes {dict(axes)} ({error}); a granularity is a "
                "function of a layer's axes, which returns those that index the mask"
            ) from error
        if isinstance(answer, str) or not isinstance(answer, Iterable):
            raise TypeError(
                f"granularity {name_of(granularity)} must return the names of the axes that index the mask, such as "
                f"('out',), or a dictionary of extents; got {answer!r}"
            )
        indexed = dict(answer) if isinstance(answer, Mapping) else dict.fromkeys(answer, 1)
        missing = [axis for axis in indexed if axis not in axes]
        if missing:
            raise UnavailableError(f"{name_of(granularity)} needs axis {missing[0]!r}, has only ({', '.join(axes)})")
        for axis, extent in indexed.items():
            if isinstance(extent, bool) or not isinstance(extent, int) or extent < 1:
                raise ValueError(
                    f"granularity {name_of(granularity)}: the extent of a group along {axis!r} is a whole number "
                    f"from 1 on, not {extent!r}"
                )
        shape = list(axes.values())
        extents = [min(indexed.get(axis, size), size) for axis, size in axes.items()]
        split = convolution_groups > 1
        if split:
            # Real channels and filters belong to one convolution group; what names neither is shared by all of them.
            shape.insert(0, convolution_groups)
            extents.insert(0, 1 if {"out", "in"} & indexed.keys() else convolution_groups)
        return cls(indexed, tuple(shape), tuple(extents), split, ("groups",) * split + tuple(axes))

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Number of groups along every axis of `shape`."""
        return tuple(math.ceil(size / extent) for size, extent in zip(self.shape, self.extents, strict=True))

    @property
    def named_grid(self) -> dict[str, int]:
        """Number of groups along every axis, by its name."""
        return dict(zip(self.names, self.grid, strict=True))

    def members(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """(weights of the layer) -> (groups, weights of a group); short groups are filled up with `fill`."""
        padding = [
            (0, cells * extent - size) for size, extent, cells in zip(self.shape, self.extents, self.grid, strict=True)
        ]
        values = values.reshape(self.shape)
        if any(after for _, after in padding):
            values = F.pad(values, [edge for pair in reversed(padding) for edge in pair], value=fill)
        cells = [side for pair in zip(self.grid, self.extents, strict=True) for side in pair]
        axes = range(len(cells))
        return values.reshape(cells).permute(*axes[::2], *axes[1::2]).reshape(math.prod(self.grid), -1)

    @cached_property
    def size(self) -> int | Tensor:
        """Weights in a group; one number where all groups are equal."""
        if all(size % extent == 0 for size, extent in zip(self.shape, self.extents, strict=True)):
            return math.prod(self.extents)
        return self.members(torch.ones(self.shape)).sum(1).long()

    @property
    def single(self) -> bool:
        """Whether every weight is a group of its own."""
        return math.prod(self.extents) == 1

    def pool(
        self, part: Callable[[slice], Tensor], how: Callable[[Grouping, Tensor], Tensor], at_once: bool = False
    ) -> Tensor:
        """Scores of weights -> scores of groups, in index order.

        part: the scores of a slice of the weight's first axis. Where no group spans it, one slice after the other is
            pooled, each so short that its scores stay in the cache.
        at_once: all slices in one, for a GPU, which is faster with much to do.
        """
        length, extent = self.shape[0], self.extents[0]
        spanned = extent == length
        # An own pooling may look at the layer as a whole.
        if (
            at_once
            or self.split
            or how not in (mean, total, largest, l2, squared_sum)
            or (spanned and how not in (mean, total))
        ):
            return self._pool(part(slice(None)), how)
        rows = max(1, CHUNK // math.prod(self.shape[1:]))
        rows = rows if spanned else math.ceil(rows / extent) * extent

        @cache
        def shorter(count: int) -> Grouping:
            extents = (count if spanned else extent, *self.extents[1:])
            return replace(self, shape=(count, *self.shape[1:]), extents=extents)

        pooled = []
        for start in range(0, length, rows):
            scores = part(slice(start, start + rows))
            grouping = shorter(len(scores))
            pooled.append(grouping.sum(scores) if how is mean else how(grouping, scores))
        joined = torch.stack(pooled).sum(0) if spanned else torch.cat(pooled)
        return (joined / self.size_on(scores.device) if how is mean else joined).to(scores.dtype)

    def size_on(self, device: torch.device) -> int | Tensor:
        """`size` on a device; counted there, for numbers that are sent to a GPU are waited for."""
        if isinstance(self.size, int):
            return self.size
        sizes = torch.ones((), dtype=torch.long, device=device)
        for length, extent, cells in zip(self.shape, self.extents, self.grid, strict=True):
            along = (length - extent * torch.arange(cells, device=device)).clamp(max=extent)
            sizes = sizes.unsqueeze(-1) * along
        return sizes.flatten()

    def _pool(self, scores: Tensor, how: Callable[[Grouping, Tensor], Tensor]) -> Tensor:
        pooled = how(self, scores)
        if not isinstance(pooled, Tensor) or pooled.shape != (math.prod(self.grid),):
            raise ValueError(
                f"pooling {name_of(how)} must return one score per group, {math.prod(self.grid)} here; "
                f"got {tuple(pooled.shape) if isinstance(pooled, Tensor) else pooled!r}"
            )
        return pooled.to(scores.dtype)

    def sum(self, scores: Tensor) -> Tensor:
        """Sums over groups, in float64: rounded once, they are the same in whatever order, but for rare last bits."""
        if any(size % extent for size, extent in zip(self.shape, self.extents, strict=True)):
            return self.members(scores).sum(1, dtype=torch.float64)
        # Neighbouring axes that are all indexed, or all spanned, are one: a sum over fewer axes is faster.
        cells: list[int] = []  # of a grid and of its groups in turn
        for cell, extent in zip(self.grid, self.extents, strict=True):
            if cells and cells[-1] == 1:
                cells[-2:] = [cells[-2] * cell, extent]
            elif cells and cell == 1:
                cells[-1] *= extent
            else:
                cells += [cell, extent]
        spanned = tuple(axis for axis in range(1, len(cells), 2) if cells[axis] > 1)
        # The outermost axis first and alone: torch sums over axes that are apart much more slowly.
        sums = scores.reshape(cells)
        for axis in spanned:
            sums = sums.sum(axis, dtype=torch.float64, keepdim=True)
        return sums.flatten().to(torch.float64)

    def any_of(self, values: Tensor) -> Tensor:
        """Bool per weight -> bool per group: whether any weight of the group is true."""
        return self.members(values.float()).amax(1) > 0

    def all_kept(self) -> Tensor:
        """The bools per group of a dense layer."""
        return torch.ones(math.prod(self.grid), dtype=torch.bool)

    def _on_axes(self, kept: Tensor) -> Tensor:
        """Bool per group -> mask over `shape`, in which an axis that a group spans has size 1."""
        mask = kept.reshape(self.grid)
        for axis, (size, extent) in enumerate(zip(self.shape, self.extents, strict=True)):
            if 1 < extent < size:
                mask = mask.repeat_interleave(extent, axis).narrow(axis, 0, size)
        return mask

    def spread(self, kept: Tensor) -> Tensor:
        """Bool per group -> mask that broadcasts to the weight; axes that a group spans have size 1."""
        mask = self._on_axes(kept)
        if not self.split:
            return mask
        if mask.shape[:2] != (1, 1):
            mask = mask.expand(*self.shape[:2], *mask.shape[2:])
        return mask.flatten(0, 1)

    def gather(self, mask: Tensor) -> Tensor:
        """The inverse of spread: mask -> bool per group."""
        if self.split:
            mask = mask.unflatten(0, self.shape[:2] if mask.shape[0] > 1 else (1, 1))
        return mask[tuple(slice(None, None, extent) for extent in self.extents)].flatten()

    def outputs(self, kept: Tensor, out: int) -> Tensor:
        """Bool per group -> bool per output of the layer; for groups that are made of whole outputs."""
        alive = self._on_axes(kept).flatten()
        return alive.repeat_interleave(out // len(alive))

    @property
    def drops_outputs(self) -> bool:
        """Whether a group is made of whole outputs (filters) of the layer."""
        return set(self.indexed) <= {"out"}

    @property
    def drops_inputs(self) -> bool:
        """Whether a group is made of whole inputs (channels) of the layer."""
        return set(self.indexed) <= {"in"}


def grouping_of(granularity: Granularity, axes: Axes, convolution_groups: int, fewest: int) -> Grouping | str:
    """How the granularity groups the weights of a layer, or why it cannot. fewest: groups of it that have to stay."""
    try:
        grouping = Grouping.of(granularity, axes, convolution_groups)
    except UnavailableError as error:
        return str(error)
    groups = math.prod(grouping.grid)
    if grouping.indexed and groups < 2 * fewest:
        return f"has {groups} group{'s' * (groups > 1)}, of which {fewest} must stay"
    return grouping


poolings = Registry("pooling")


@poolings.register
def mean(grouping: Grouping, scores: Tensor) -> Tensor:
    """Sum over the group divided by its size."""
    return grouping.sum(scores) / grouping.size_on(scores.device)


@poolings.register(name="sum")
def total(grouping: Grouping, scores: Tensor) -> Tensor:
    """Sum over the group: larger groups score higher."""
    return grouping.sum(scores)


@poolings.register(name="max")
def largest(grouping: Grouping, scores: Tensor) -> Tensor:
    """The largest score of the group."""
    return grouping.members(scores, fill=-math.inf).amax(1)


@poolings.register
def l2(grouping: Grouping, scores: Tensor) -> Tensor:
    """Root of the sum of squares over the group."""
    return grouping.sum(scores.double().square()).sqrt()


@poolings.register
def squared_sum(grouping: Grouping, scores: Tensor) -> Tensor:
    """Square of the sum over the group; of single weights, too."""
    return grouping.sum(scores).square()
