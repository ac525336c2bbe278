"""The groups of one weight, as a granularity defines them: their scores are pooled, and their mask is built.

A pooling turns the scores of the weights of a group into one score. Your own pooling is a function of the grouping and
the scores of a layer, which returns one score per group. Pass it as pool=:

>>> def smallest(grouping, scores):
...     return grouping.members(scores, fill=math.inf).amin(1)
>>> grouping = Grouping.of(lambda axes: ('out',), {'out': 2, 'in': 3})
>>> smallest(grouping, torch.tensor([[3., 1., 2.], [6., 5., 4.]]))
tensor([1., 4.])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..support.chunk import CHUNK
from ..support.printable import message_of
from ..support.registry import Registry, name_of
from .granularity import Axes, Granularity


class UnavailableError(ValueError):
    """A granularity names axes that a layer does not have."""


@dataclass(frozen=True)
class Grouping:
    """How the weights of one layer are divided into groups, each of which has one mask value.

    Attributes:
        indexed: Axis -> extent of a group along it, in places, for the axes that index the mask.
        shape: Shape of the weight. In a grouped convolution the first axis is split into (convolution groups, rest), so
            that channels and filters are counted within one convolution group.
        extents: Extent of a group along every axis of `shape`. At the end of an axis a group may be smaller.
        split: Whether the first axis is split.
        names: Names of the axes of `shape`; the axis of the convolution groups is called 'groups'.
    """

    indexed: Mapping[str, int]
    shape: tuple[int, ...]
    extents: tuple[int, ...]
    split: bool
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, granularity: Granularity, axes: Axes, convolution_groups: int = 1) -> Grouping:
        """Apply a granularity to a weight.

        Args:
            granularity: A function of the axes.
            axes: Axis name -> size, in the order of the weight's shape. In a grouped convolution the sizes are those
                within one convolution group. The granularity does not see an axis 'expert', but may name it.
            convolution_groups: `groups` of the convolution.

        Returns:
            The grouping of the weight.

        Raises:
            UnavailableError: The granularity names an axis that the weight does not have.
            TypeError: The granularity returns neither axis names nor a dictionary of extents.
            ValueError: The granularity fails, or an extent is not a whole number of at least 1.
        """
        of_one = {axis: size for axis, size in axes.items() if axis != "expert"}
        try:
            answer = granularity(of_one)
        except Exception as error:
            raise ValueError(
                f"granularity {name_of(granularity)} fails on the axes {of_one} ({message_of(error)}); a granularity "
                "is a function of a layer's axes that returns those that index the mask, such as ('out',)"
            ) from error
        if isinstance(answer, str) or not isinstance(answer, Iterable):
            raise TypeError(
                f"granularity {name_of(granularity)} must return the names of the axes that index the mask, such as "
                f"('out',), or the extents of a group, such as {{'out': 2}}; got {answer!r}"
            )
        indexed = dict(answer) if isinstance(answer, Mapping) else dict.fromkeys(answer, 1)
        missing = [axis for axis in indexed if axis not in axes]
        if missing:
            raise UnavailableError(
                f"{name_of(granularity)} needs axis {missing[0]!r}, but the layer has only ({', '.join(axes)})"
            )
        for axis, extent in indexed.items():
            if isinstance(extent, bool) or not isinstance(extent, int) or extent < 1:
                raise ValueError(
                    f"granularity {name_of(granularity)}: the extent of a group along {axis!r} must be a whole number "
                    f"of at least 1, not {extent!r}"
                )
        shape = list(axes.values())
        # A channel or filter belongs to one expert or convolution group. Without 'out' and 'in' it spans all of them.
        if {"out", "in"} & indexed.keys() and "expert" in axes:
            indexed.setdefault("expert", 1)
        extents = [min(indexed.get(axis, size), size) for axis, size in axes.items()]
        split = convolution_groups > 1
        if split:
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
        """Put the values of each group in a row of its own.

        Args:
            values: One value per weight, in the shape of the weight.
            fill: Value that fills up groups that are smaller than the others.

        Returns:
            The values in the shape (groups, weights of a group), groups in index order.
        """
        padding = [
            (0, cells * extent - size) for size, extent, cells in zip(self.shape, self.extents, self.grid, strict=True)
        ]
        values = values.reshape(self.shape)
        if any(after for _, after in padding):
            values = F.pad(values, [edge for pair in reversed(padding) for edge in pair], value=fill)
        sides = [side for pair in zip(self.grid, self.extents, strict=True) for side in pair]
        axes = range(len(sides))
        return values.reshape(sides).permute(*axes[::2], *axes[1::2]).reshape(math.prod(self.grid), -1)

    @cached_property
    def size(self) -> int | Tensor:
        """Number of weights in a group: one number if all groups are equal, else one per group."""
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
        """Pool the scores of the weights of each group into one score.

        Args:
            part: Gives the scores of a slice of the weight's first axis. Where no group spans this axis, one slice
                after the other is pooled, each so short that its scores stay in the cache.
            how: The pooling, a function of the grouping and the scores.
            at_once: Whether to pool the whole layer in one piece, which is faster on a GPU.

        Returns:
            One score per group, in index order.

        Raises:
            ValueError: The pooling does not return one score per group.
        """
        length, extent = self.shape[0], self.extents[0]
        spanned = extent == length
        # A pooling of the user's own may need the whole layer.
        built_in = how in (mean, total) or (how in (largest, l2, squared_sum) and not spanned)
        if at_once or self.split or not built_in:
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
        """`size` on a device. It is computed there, because sending numbers to a GPU would wait for it."""
        if isinstance(self.size, int):
            return self.size
        sizes = torch.ones((), dtype=torch.long, device=device)
        for length, extent, cells in zip(self.shape, self.extents, self.grid, strict=True):
            along = (length - extent * torch.arange(cells, device=device)).clamp(max=extent)
            sizes = sizes.unsqueeze(-1) * along
        return sizes.flatten()

    def _pool(self, scores: Tensor, how: Callable[[Grouping, Tensor], Tensor]) -> Tensor:
        """Pool the scores of a whole layer, and check the result."""
        pooled = how(self, scores)
        if not isinstance(pooled, Tensor) or pooled.shape != (math.prod(self.grid),):
            raise ValueError(
                f"pooling {name_of(how)} must return one score per group, a tensor of shape {(math.prod(self.grid),)}; "
                f"got {f'shape {tuple(pooled.shape)}' if isinstance(pooled, Tensor) else repr(pooled)}"
            )
        return pooled.to(scores.dtype)

    def sum(self, scores: Tensor) -> Tensor:
        """Sum the scores over each group, in float64.

        A float64 sum is rounded once to the dtype of the scores, so the order of summation changes only rare last bits.

        Args:
            scores: One score per weight, in the shape of the weight.

        Returns:
            One sum per group, float64, in index order.
        """
        sides = sides_of(self)
        if sides is None:
            return self.members(scores).sum(1, dtype=torch.float64)
        spanned = tuple(axis for axis in range(1, len(sides), 2) if sides[axis] > 1)
        # One axis at a time, the outermost first: torch sums over axes that are not neighbours much more slowly.
        sums = scores.reshape(sides)
        for axis in spanned:
            sums = sums.sum(axis, dtype=torch.float64, keepdim=True)
        return sums.flatten().to(torch.float64)

    def any_of(self, values: Tensor) -> Tensor:
        """Bool per weight -> bool per group: whether any weight of the group is true."""
        return self.members(values.float()).amax(1) > 0

    def all_kept(self) -> Tensor:
        """True for every group: a dense layer."""
        return torch.ones(math.prod(self.grid), dtype=torch.bool)

    def _on_axes(self, kept: Tensor) -> Tensor:
        """Bool per group -> mask over `shape`, in which an axis that a group spans has size 1."""
        mask = kept.reshape(self.grid)
        for axis, (size, extent) in enumerate(zip(self.shape, self.extents, strict=True)):
            if 1 < extent < size:
                mask = mask.repeat_interleave(extent, axis).narrow(axis, 0, size)
        return mask

    def spread(self, kept: Tensor) -> Tensor:
        """Bool per group -> mask that broadcasts to the weight; an axis that a group spans has size 1."""
        mask = self._on_axes(kept)
        if not self.split:
            return mask
        if mask.shape[:2] != (1, 1):
            mask = mask.expand(*self.shape[:2], *mask.shape[2:])
        return mask.flatten(0, 1)

    def gather(self, mask: Tensor) -> Tensor:
        """Mask -> bool per group, the inverse of `spread`."""
        if self.single:
            return mask.reshape(-1)
        if self.split:
            mask = mask.unflatten(0, self.shape[:2] if mask.shape[0] > 1 else (1, 1))
        return mask[tuple(slice(None, None, extent) for extent in self.extents)].flatten()

    def outputs(self, kept: Tensor, out: int) -> Tensor:
        """Bool per group -> bool per output of the layer, of which there are `out`; for groups of whole outputs."""
        kept_outputs = self._on_axes(kept).flatten()
        return kept_outputs.repeat_interleave(out // len(kept_outputs))

    @property
    def drops_outputs(self) -> bool:
        """Whether a group consists of whole outputs (filters) of the layer, or of an expert in it."""
        return _consists_of_whole("out", self)

    @property
    def drops_inputs(self) -> bool:
        """Whether a group consists of whole inputs (channels) of the layer, or of an expert in it."""
        return _consists_of_whole("in", self)


def _consists_of_whole(side: str, grouping: Grouping) -> bool:
    """Whether nothing but this axis indexes the mask. A vector, such as a bias, is no matrix with outputs."""
    sides = {side, "expert", "groups"}
    return set(grouping.indexed) <= sides and not set(grouping.names) <= sides


def sides_of(grouping: Grouping) -> tuple[int, ...] | None:
    """Number of groups and extent of a group, in turn, along as few axes as there can be; None of unequal groups.

    Neighbouring axes that are all indexed, or all spanned, are merged: a sum over fewer axes is faster.
    """
    if any(size % extent for size, extent in zip(grouping.shape, grouping.extents, strict=True)):
        return None
    sides: list[int] = []
    for cells, extent in zip(grouping.grid, grouping.extents, strict=True):
        if sides and sides[-1] == 1:
            sides[-2:] = [sides[-2] * cells, extent]
        elif sides and cells == 1:
            sides[-1] *= extent
        else:
            sides += [cells, extent]
    return tuple(sides)


def grouping_of(granularity: Granularity, axes: Axes, convolution_groups: int, fewest: int) -> Grouping | str:
    """Group the weights of a layer, or say why the layer has to stay dense.

    Args:
        granularity: A function of the axes.
        axes: Axis name -> size, within one convolution group.
        convolution_groups: `groups` of the convolution.
        fewest: Number of groups that have to be kept.

    Returns:
        The grouping; or the reason, a text for the report.
    """
    try:
        grouping = Grouping.of(granularity, axes, convolution_groups)
    except UnavailableError as error:
        return str(error)
    groups = math.prod(grouping.grid)
    if grouping.indexed and groups < 2 * fewest:
        return f"has {groups} group{'s' * (groups > 1)}, of which {fewest} must be kept"
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
    """Square root of the sum of squares over the group."""
    return grouping.sum(scores.double().square()).sqrt()


@poolings.register
def squared_sum(grouping: Grouping, scores: Tensor) -> Tensor:
    """Square of the sum over the group. It also squares the scores of single weights."""
    return grouping.sum(scores).square()
