"""Coupled channels: which outputs of which layers can only be removed together, and what reads them.

A sum couples channel i of all that it adds; a norm layer, a depthwise convolution and a product pass channel i on; a
concatenation and a split move it. torch-pruning's dependency graph knows all this from one forward. Here its groups are
made into sets: one for each channel, of all outputs that yield it and all inputs that read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..layers import CHANNEL_LAYERS, CONVOLUTIONS, is_depthwise
from ..parallel import unwrapped
from .dependency_graph import LOST, Group, coupled_groups

Place = tuple[str, int]  # name of a layer, number of an output or input


@dataclass(frozen=True)
class ChannelSet:
    """A channel: all that has to go if it goes.

    outputs: of the layers that yield it; a depthwise convolution yields it, too. through: places in norm layers and
    the like, which treat it by itself. inputs: of the layers that read it. kept: why it cannot go, '' if it can.
    """

    outputs: tuple[Place, ...]
    through: tuple[Place, ...]
    inputs: tuple[Place, ...]
    kept: str


def find_channels(model: nn.Module, example_input: Any) -> list[ChannelSet]:
    """The channels of all convolutions and Linear layers of a model, in the order of the model's layers.

    ValueError if the model does not run on the example, or torch-pruning cannot follow it.
    """
    kept = _obstacles(unwrapped(model))
    groups, order = coupled_groups(model, example_input, kept)
    return _merged(groups, kept, order)


def _obstacles(model: nn.Module) -> dict[str, str]:
    """Layers of which no channel can be removed, and why."""
    owners: dict[int, list[str]] = {}
    obstacles = {LOST: LOST}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
        if isinstance(module, CONVOLUTIONS) and module.groups > 1 and not is_depthwise(module):
            obstacles[name] = f"coupled with {name}, whose {module.groups} groups have to stay equal"
        elif is_parametrized(module) or isinstance(module, CHANNEL_LAYERS) and "weight" not in module._parameters:
            obstacles[name] = f"coupled with {name}, whose weights are computed from others"
    for sharing in owners.values():
        if len(sharing) > 1:
            obstacles |= dict.fromkeys(sharing, f"coupled with {' and '.join(sharing)}, which share a parameter")
    return obstacles


def _merged(groups: Iterable[Group], kept: Mapping[str, str], order: Mapping[str, int]) -> list[ChannelSet]:
    """Sets of all places that are coupled in any group, which is to say, of the same channel of its layer."""
    parent: dict[Any, Any] = {}

    def root(key: Any) -> Any:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    places = set()
    for number, group in enumerate(groups):
        for place, channel in group:
            places.add(place)
            parent[root(place)] = root((number, channel))
    members: dict[Any, list[tuple[str, str, int]]] = {}
    for place in sorted(places, key=lambda place: (order.get(place[0], len(order)), place)):
        members.setdefault(root(place), []).append(place)
    return [
        ChannelSet(
            _on("outputs", each), _on("through", each), _on("inputs", each),
            next((kept[name] for name, _, _ in each if name in kept), ""),
        )
        for each in members.values()
    ]  # fmt: skip


def _on(side: str, places: list[tuple[str, str, int]]) -> tuple[Place, ...]:
    return tuple((name, place) for name, of, place in places if of == side)
