"""Filters that are ranked and fall together, because they can only be removed together: `coupled=True`.

Where a sum adds the outputs of several layers, channel i of the sum is dead only if filter i of all of them is zero.
Such filters are one group: its size is the sum of theirs, its score their mean by weights. Norm layers that the channel
goes through are dead with it, behind a sum or a concatenation, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..axes.grouping import Grouping
from ..axes.ranking.scored_layer import ScoredLayer, bundle
from ..model.channels.coupling import ChannelSet, find_channels
from ..model.channels.removal import why_stuck
from ..model.flow import NORMS_OVER_CHANNELS
from ..model.layers import NamedWeight, parameter_name

Stays = Sequence[np.ndarray]


@dataclass(frozen=True, eq=False)
class Joined:
    """Layers of which filters are coupled. channels: layer -> the number of the channel that each filter yields.

    norms: parameter of a norm layer behind -> (places in it, channels that go through them).
    """

    channels: Mapping[str, np.ndarray]
    norms: Mapping[str, tuple[np.ndarray, np.ndarray]]

    @property
    def count(self) -> int:
        """Number of channels."""
        return 1 + max(int(channels.max()) for channels in self.channels.values())

    def join(self, layers: Sequence[ScoredLayer]) -> ScoredLayer:
        """The layers as one whose groups are the channels."""
        size, score, alive = np.zeros(self.count), np.zeros(self.count), np.zeros(self.count)
        for layer in layers:
            channels = self.channels[layer.target.name]
            weights = np.broadcast_to(layer.size, len(layer))
            size += np.bincount(channels, weights, self.count)
            score += np.bincount(channels, layer.score * weights, self.count)
            alive += np.bincount(channels, layer.alive, self.count)
        first = layers[0]
        score /= size
        return ScoredLayer(
            first.target, score.__getitem__, alive > 0, size.astype(np.int64), revives=first.revives,
            may_empty=first.may_empty, grid={"out": self.count}, others=tuple(layer.target for layer in layers[1:]),
        )  # fmt: skip


class Coupling:
    """The layers of a model whose filters are coupled, in parts that are not coupled with each other."""

    def __init__(self, parts: Sequence[Joined]):
        self.part_of = {name: part for part in parts for name in part.channels}

    def join(self, layers: Sequence[ScoredLayer]) -> tuple[list[ScoredLayer], Callable[[Stays], Stays]]:
        """Layers with the coupled ones as one, and how to tell from their groups which filters of each layer stay.

        ValueError if some layers of a part are missing, as they are if another sparsity is asked for them.
        """
        given = {layer.target.name: layer for layer in layers}
        parts = list(dict.fromkeys(map(self.part_of.__getitem__, given)))
        for part in parts:
            if missing := part.channels.keys() - given.keys():
                here = next(name for name in part.channels if name in given)
                raise ValueError(
                    f"coupled=True: the filters of {here} and {min(missing)} are coupled, so one sparsity has to be "
                    "asked for both"
                )

        def split(stays: Stays) -> Stays:
            of_part = dict(zip(parts, stays, strict=True))
            whole = {name: of_part[self.part_of[name]][self.part_of[name].channels[name]] for name in given}
            # Of a channel that stays, filters that were masked by themselves remain so.
            return [whole[name] & (layer.alive | layer.revives) for name, layer in given.items()]

        return [part.join([given[name] for name in part.channels]) for part in parts], split

    def masks_of_norms(self, alive: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Masks of the norm layers behind. alive: layer -> bool per filter."""
        masks: dict[str, Tensor] = {}
        for part in dict.fromkeys(self.part_of.values()):
            if not part.norms:
                continue
            lives = torch.zeros(part.count, dtype=torch.bool)
            for name, channels in part.channels.items():
                lives[torch.from_numpy(channels)[alive[name].cpu()]] = True
            for norm, (places, channels) in part.norms.items():
                parameter = model.get_parameter(norm)
                mask = masks.setdefault(norm, torch.ones_like(parameter, dtype=torch.bool))
                mask[torch.from_numpy(places).to(mask.device)] = lives[torch.from_numpy(channels)].to(mask.device)
        return masks


def couple(
    model: nn.Module,
    example_input: Any,
    targets: Mapping[str, NamedWeight],
    groupings: Mapping[str, Grouping | str],
    dense: Mapping[str, str],
) -> tuple[Coupling, dict[str, str]]:
    """The coupling of the layers that take part, and why further ones have to stay dense.

    A layer stays dense if a channel of it cannot be removed, or is coupled with a layer that stays dense. ValueError if
    there is no example, if groups are not whole filters, or if no layer is left.
    """
    if example_input is None:
        raise ValueError("coupled=True: what is coupled is seen in a forward; give example_input=, a batch")
    for name, target in targets.items():
        grouping = groupings[name]
        if not isinstance(grouping, str) and not (grouping.drops_outputs and len(grouping.all_kept()) == target.out):
            raise ValueError("coupled=True joins whole filters; give granularity 'filter'")
    by_layer = {
        owner: name for name, target in targets.items() for owner, _ in target.owners if not target.is_embedding
    }
    channels = find_channels(model, example_input)
    reasons = dict(dense)
    known = {by_layer[layer] for channel in channels for layer, _ in channel.outputs if layer in by_layer}
    reasons |= {name: "its channels are not followed" for name in targets if name not in known and name not in reasons}
    changed = True
    while changed:
        changed = False
        for channel in channels:
            members = dict.fromkeys(by_layer.get(layer, layer) for layer, _ in channel.outputs)
            held = [each for each in members if each in reasons or each not in targets]
            why = channel.kept or (f"coupled with {held[0]}, which stays dense" if held else "")
            for name in members if why else ():
                if name not in reasons:
                    reasons[name], changed = why, True
    parts = _parts(channels, {layer: name for layer, name in by_layer.items() if name not in reasons})
    # What the graph says is tried: one channel of each kind.
    kinds = {tuple(dict.fromkeys(layer for layer, _ in each.outputs)): each for part in parts for each in part}
    for channel, why in why_stuck(model, example_input, kinds.values()).items():
        part = next(part for part in parts if channel in part)
        reasons |= {by_layer[layer]: why for each in part for layer, _ in each.outputs}
    followed = [part for part in parts if by_layer[part[0].outputs[0][0]] not in reasons]
    more = {name: why for name, why in reasons.items() if name not in dense}
    if not followed:
        listed = "; ".join(f"{name}: {why}" for name, why in list(more.items())[:3])
        raise ValueError(f"coupled=True: no layer is left whose filters can be removed ({listed})")
    return Coupling([_joined(model, part, by_layer) for part in followed]), more


def _parts(channels: Sequence[ChannelSet], taking_part: Mapping[str, str]) -> list[list[ChannelSet]]:
    """Channels of layers that take part, by which of these are coupled."""
    part_of: dict[str, list[ChannelSet]] = {}
    for channel in channels:
        names = dict.fromkeys(taking_part[layer] for layer, _ in channel.outputs if layer in taking_part)
        if not names:
            continue
        merged = [channel]
        for before in {id(part_of[name]): part_of[name] for name in names if name in part_of}.values():
            merged = before + merged
        touched = dict.fromkeys(taking_part[layer] for each in merged for layer, _ in each.outputs)
        part_of.update(dict.fromkeys(touched, merged))
    return list({id(part): part for part in part_of.values()}.values())


def _joined(model: nn.Module, part: Sequence[ChannelSet], names: Mapping[str, str]) -> Joined:
    places: dict[str, dict[int, int]] = {}
    norms: dict[str, dict[int, int]] = {}
    for number, channel in enumerate(part):
        for layer, place in channel.outputs:
            places.setdefault(names[layer], {})[place] = number
        for layer, place in channel.through:
            module = model.get_submodule(layer)
            if isinstance(module, NORMS_OVER_CHANNELS):
                for attribute, _ in module.named_parameters(recurse=False):
                    norms.setdefault(parameter_name(layer, attribute), {})[place] = number
    return Joined(
        {name: np.array([numbers[place] for place in range(len(numbers))]) for name, numbers in places.items()},
        {norm: (np.array(list(numbers)), np.array(list(numbers.values()))) for norm, numbers in norms.items()},
    )


def joint_layers(
    layers: Sequence[ScoredLayer], coupling: Coupling | None, round_to: int | None
) -> tuple[Sequence[ScoredLayer], Callable[[Stays], Stays]]:
    """What a context ranks, and how to tell from its answer which groups of the layers stay."""
    split: Callable[[Stays], Stays] = list
    if coupling is not None:
        layers, split = coupling.join(layers)
    if round_to is None:
        return layers, split
    bundles, of_groups = zip(*(bundle(layer, round_to) for layer in layers), strict=True)
    return bundles, lambda stays: split([kept[of] for kept, of in zip(stays, of_groups, strict=True)])
