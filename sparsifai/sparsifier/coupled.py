"""Coupled filters: filters that can only be removed together are ranked and pruned together (`coupled=True`).

Where a sum adds the outputs of several layers, channel i of the sum is zero only if filter i of all of them is. Such
filters are one group: its size is the sum of their sizes, and its score is pooled over the weights of all of them.

The groups of a grouped convolution must keep equal sizes. So the channels with the same rank in their groups are one
group, too: each group loses its lowest channels, and all lose as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..axes.grouping import l2, largest, mean, squared_sum
from ..axes.grouping import total as sum_of_all
from ..axes.ranking.bundles import bundle
from ..axes.ranking.by_rank import join_by_rank
from ..axes.ranking.scored_layer import ScoredLayer
from ..model.joint.groups import NO_GROUP
from ..model.parallel import whole
from ..support.printable import printable
from .followers import Follower
from .layer import Layers

Asked = list[tuple[float, list[str]]]  # (sparsity, names of the layers that are ranked for it together)
Kept = Sequence[np.ndarray]  # for each layer, a bool per group


@dataclass(frozen=True, eq=False)
class CoupledLayers:
    """Layers whose filters yield the same channels, or whose groups are joint.

    Attributes:
        channels: Layer name -> for each of its groups, the number of the channel, or of the joint group, that it
            belongs to; negative where it belongs to none, and is kept.
        norms: Name of a parameter of a norm layer -> its entries, and the number of the channel of each of them.
        name: Name of the module whose groups are joint, such as that of an attention. Empty for coupled filters.
        cells: For each channel, the number of its cell, from which as many channels are pruned as from the others of
            its line, and the number of the line; negative for channels that are in none. None if all are in none.
    """

    channels: Mapping[str, np.ndarray]
    norms: Mapping[str, tuple[np.ndarray, np.ndarray]]
    name: str = ""
    cells: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def count(self) -> int:
        """Number of channels."""
        return 1 + max(int(channels.max()) for channels in self.channels.values())

    def kept_groups(self, name: str, kept: np.ndarray) -> np.ndarray:
        """For each group of a layer, whether it is kept. kept: bool per channel."""
        channels = self.channels[name]
        return (channels < 0) | kept[np.maximum(channels, 0)]

    def kept(self, layers: Layers) -> np.ndarray:
        """Bool per channel, or per joint group: whether the masks keep any of its weights."""
        return self._any({name: layers[name].kept for name in self.channels})

    def nonzero(self, layers: Layers) -> np.ndarray:
        """Bool per channel, or per joint group: whether any of its weights is not zero."""
        weights = {name: whole(layers[name].parameter.detach()) for name in self.channels}
        return self._any({name: layers[name].grouping.any_of(weight != 0) for name, weight in weights.items()})

    def _any(self, true: Mapping[str, Tensor]) -> np.ndarray:
        """Bool per channel, or per joint group: whether any of its parts is true. true: layer name -> bool per part."""
        result = np.zeros(self.count, bool)
        for name, channels in self.channels.items():
            result[channels[true[name].cpu().numpy() & (channels >= 0)]] = True
        return result

    def join(self, layers: Sequence[ScoredLayer], pool: Callable = mean) -> ScoredLayer:
        """Join layers to one layer, whose groups are the channels.

        Args:
            layers: The layers, with a score for every group of each.
            pool: How scores of weights were pooled to these scores; for squared_sum they are the sums. They are pooled
                to the score that the weights of all layers have together. A function of the user's own only sees
                one layer; its scores are pooled by the mean over weights.
        """

        def total(of_layer: Callable[[ScoredLayer], Any]) -> np.ndarray:
            result = np.zeros(self.count)
            for layer in layers:
                channels, values = self.channels[layer.target.name], np.broadcast_to(of_layer(layer), len(layer))
                result += np.bincount(channels[channels >= 0], values[channels >= 0], self.count)
            return result

        size = total(lambda layer: layer.size)
        if pool is largest:
            score = np.full(self.count, -np.inf)
            for layer in layers:
                channels = self.channels[layer.target.name]
                np.maximum.at(score, channels[channels >= 0], layer.score[channels >= 0])
        elif pool is l2:
            score = np.sqrt(total(lambda layer: layer.score.astype(np.float64) ** 2))
        elif pool in (sum_of_all, squared_sum):
            score = total(lambda layer: layer.score)
            score = score**2 if pool is squared_sum else score
        else:
            score = total(lambda layer: layer.score.astype(np.float64) * layer.size) / size
        first = layers[0]
        return ScoredLayer(
            first.target, score.__getitem__, total(lambda layer: layer.alive) > 0, size.astype(np.int64),
            self.count == 1 and all(layer.whole for layer in layers), revives=first.revives,
            may_empty=first.may_empty, grid={"out": self.count}, others=tuple(layer.target for layer in layers[1:]),
        )  # fmt: skip


class Coupling:
    """The layers of a model whose filters are coupled. The layers of one part are not coupled with those of another.

    Args:
        parts: The parts.
        what: What is pruned as one: 'filter', or the name of a joint granularity.
        joint: With a joint granularity, layer name -> (its `JointGroups`, its `Part` of them).
    """

    def __init__(self, parts: Sequence[CoupledLayers], what: str = "filter", joint: Mapping[str, Any] | None = None):
        self.what, self.joint = what, joint or {}
        self.part_of = {name: part for part in parts for name in part.channels}

    def together(self, asked: Asked) -> Asked:
        """Ask for coupled layers in one scope, that of the first of them, where they are asked for the same sparsity.

        Args:
            asked: Each sparsity that is asked for, with the names of the layers that are ranked for it together.

        Returns:
            The same, with some layers moved.
        """
        first_scope: dict[tuple[CoupledLayers, float], int] = {}
        moved: list[list[str]] = [[] for _ in asked]
        for number, (sparsity, names) in enumerate(asked):
            for name in names:
                moved[first_scope.setdefault((self.part_of[name], sparsity), number)].append(name)
        return [(sparsity, names) for (sparsity, _), names in zip(asked, moved, strict=True) if names]

    def join(
        self, layers: Sequence[ScoredLayer], pool: Callable = mean
    ) -> tuple[list[ScoredLayer], Callable[[Kept], Kept]]:
        """Join the layers that are coupled.

        Args:
            layers: The layers of one scope, with a score for every filter.
            pool: As of `CoupledLayers.join`.

        Returns:
            The joined layers, and a function from their kept groups to the kept filters of `layers`.

        Raises:
            ValueError: Some layers of a part are missing, because another sparsity is asked for them.
        """
        given = {layer.target.name: layer for layer in layers}
        parts = list(dict.fromkeys(map(self.part_of.__getitem__, given)))
        for part in parts:
            if missing := part.channels.keys() - given.keys():
                here = next(name for name in part.channels if name in given)
                raise ValueError(
                    f"{printable(here)} and {printable(min(missing))} are pruned together, because their "
                    f"{self.what}s are {'coupled' if self.what == 'filter' else 'made of weights of both'}, so both "
                    "need the same sparsity; give one fraction for both"
                )

        joined = [part.join([given[name] for name in part.channels], pool) for part in parts]
        spreads: list[Callable] = [lambda kept: kept] * len(parts)
        for number, part in enumerate(parts):
            if part.cells is not None:
                joined[number], spreads[number] = join_by_rank(joined[number], *part.cells)

        def split(kept: Kept) -> Kept:
            of_part = {part: spread(each) for part, spread, each in zip(parts, spreads, kept, strict=True)}
            channels_kept = {name: self.part_of[name].kept_groups(name, of_part[self.part_of[name]]) for name in given}
            # In a channel that is kept, filters that were pruned by themselves stay pruned.
            return [channels_kept[name] & (layer.alive | layer.revives) for name, layer in given.items()]

        return joined, split

    def pruned_groups(self, layers: Layers, by_masks: bool = False) -> dict[str, tuple[int, int]]:
        """How many joint groups of each module are zero, and how many it has; nothing for coupled filters.

        Args:
            layers: All layers.
            by_masks: Whether those are counted that the masks prune, also before they are applied.
        """
        count = CoupledLayers.kept if by_masks else CoupledLayers.nonzero
        parts = [part for part in dict.fromkeys(self.part_of.values()) if self.joint]
        parts = [part for part in parts if all(layers[name].is_selected for name in part.channels)]
        return {part.name: (part.count - int(count(part, layers).sum()), part.count) for part in parts}

    def notes(self, pruned: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """Layer name -> how many of its joint groups are pruned, and how many of its entries belong to none.

        pruned: As of `pruned_groups`.
        """
        notes = {}
        for name, part in self.part_of.items():
            if part.name in pruned:
                zero, count = pruned[part.name]
                others = self.joint[name][1].groups == NO_GROUP
                more = f"; {others.sum()} of its {len(others)} entries belong to no {self.what}" if others.any() else ""
                notes[name] = f"{zero} of {count} {self.what}s pruned{more}"
                if count == 1:
                    notes[name] = f"its {self.what} is {'pruned' if zero else 'kept'}"
        return notes

    def is_pruned_whole(self, name: str) -> bool:
        """Whether all of a layer belongs to one joint group, such as a residual block."""
        return name in self.joint and name in self.part_of and len(self.part_of[name].channels[name]) == 1

    def units(self, names: Iterable[str]) -> dict[str, list[str]]:
        """What is pruned as one -> the layers of it: the name of a module, or of its first layer -> layer names."""
        units: dict[str, list[str]] = {}
        unit_of: dict[CoupledLayers, str] = {}
        for name in names:
            part = self.part_of[name]
            units.setdefault(unit_of.setdefault(part, part.name or name), []).append(name)
        return units

    def rounding(self, names: Iterable[str], layers: Layers) -> float:
        """By how many weights the count can be off, because coupled groups are pruned as a whole in every part."""
        sizes = []
        for part in {self.part_of[name] for name in names}:
            total = np.zeros(part.count)
            for name, channels in part.channels.items():
                size = np.broadcast_to(np.asarray(layers[name].grouping.size), len(channels))
                total += np.bincount(channels[channels >= 0], size[channels >= 0], part.count)
            sizes.append(float(total.max()))
        return max(max(sizes), sum(sizes) / 2)

    def complete(self, names: Iterable[str], layers: Layers) -> list[str]:
        """Those of some layers that are frozen no more whose coupled layers are all pruned, now or with them."""
        able = {*names, *(name for name, layer in layers.items() if layer.is_selected)}
        return [name for name in names if name in self.part_of and self.part_of[name].channels.keys() <= able]

    def share(self, layers: Sequence[ScoredLayer], sparsity: float) -> float:
        """The fraction of the weights of groups to prune, so that `sparsity` is that of all weights.

        Entries that belong to no group stay, such as the rows of a key that all heads read.
        """
        fixed = sum(layer.weights(self.part_of[layer.target.name].channels[layer.target.name] < 0) for layer in layers)
        total = sum(layer.total for layer in layers)
        return min(sparsity * total / (total - fixed), 1.0) if fixed else sparsity

    def followers(self, model: nn.Module) -> list[Follower]:
        """The parameters of norm layers that the channels go through, also behind a sum or a concatenation."""
        producers: dict[str, dict[str, Any]] = {}  # several parts can go through one norm layer, side by side
        for part in dict.fromkeys(self.part_of.values()):
            for norm, (entries, numbers) in part.norms.items():
                for name, channels in part.channels.items():
                    outputs, places = np.nonzero(channels[:, None] == numbers[None, :])
                    pairs = torch.from_numpy(outputs), torch.from_numpy(entries[places])
                    producers.setdefault(norm, {})[name] = pairs
        return [Follower(norm, attrgetter(norm)(model).numel(), those) for norm, those in producers.items()]


def joint_layers(
    layers: Sequence[ScoredLayer], coupling: Coupling | None, round_to: int | None, pool: Callable = mean
) -> tuple[Sequence[ScoredLayer], Callable[[Kept], Kept]]:
    """Join the layers of one scope for the ranking, by coupling and by round_to.

    Args:
        layers: The layers of one scope, with a score for every group.
        coupling: The coupled filters, or None.
        round_to: Groups per bundle, or None. Each bundle is pruned or kept as a whole, so that a multiple of this
            number of groups is kept.
        pool: How scores of weights were pooled to those of groups, with a coupling; see `CoupledLayers.join`.

    Returns:
        The layers that the context ranks, and a function from their kept groups to the kept groups of `layers`.
    """
    split: Callable[[Kept], Kept] = list
    if coupling is not None:
        layers, split = coupling.join(layers, pool)
    if round_to is None:
        return layers, split
    bundles, spreads = zip(*(bundle(layer, round_to) for layer in layers), strict=True)
    return bundles, lambda kept: split([spread(each) for each, spread in zip(kept, spreads, strict=True)])
