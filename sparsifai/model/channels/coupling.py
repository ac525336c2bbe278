"""Coupled channels: outputs of layers that can only be removed together, and the inputs that read them.

A sum couples channel i of all its terms. Norm layers, depthwise convolutions and products pass channel i on;
concatenations and splits give it another index. torch-pruning's dependency graph finds all this in one forward pass.
Its groups become sets here, one for each channel: all outputs that produce it and all inputs that read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ...support.printable import printable
from ...support.progress import progress
from ..layers import CHANNEL_LAYERS
from ..parallel import unwrapped
from .dependency_graph import UNKNOWN, UNKNOWN_PATH, Group, Member, coupled_groups
from .equal_groups import (
    Cell,
    divisions_of_chunks,
    divisions_of_convolutions,
    find_places,
    is_grouped,
    join_whole_groups,
)
from .rewriting import ChannelOperation

LayerIndex = tuple[str, int]  # name of a layer, index of one of its outputs or inputs


@dataclass(frozen=True)
class ChannelSet:
    """A channel, with all outputs and inputs that have to be removed together with it.

    Attributes:
        outputs: Outputs of the layers that produce the channel; depthwise convolutions are among them.
        through: Indices in norm layers and the like, which handle the channel by itself.
        inputs: Inputs of the layers that read the channel.
        kept: Why the channel cannot be removed, empty if it can.
        cell: The groups of grouped convolutions that the channel is in. From each of them as many channels have to be
            removed; empty where there is no such condition.
        why_spared: The reason to keep the channel if its groups would become unequal.
    """

    outputs: tuple[LayerIndex, ...]
    through: tuple[LayerIndex, ...]
    inputs: tuple[LayerIndex, ...]
    kept: str
    cell: Cell = ()
    why_spared: str = ""


def find_channels(model: nn.Module, example_input: Any) -> list[ChannelSet]:
    """The channels of all convolutions and Linear layers of a model, in the order of the model's layers.

    Args:
        model: Any torch model, also in a wrapper.
        example_input: A batch, a tuple of positional inputs or a dictionary of named ones.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: The model does not run on the example, or torch-pruning cannot follow its computation.
    """
    why_kept = _layers_to_keep(unwrapped(model))
    groups, order, operations = coupled_groups(model, example_input, why_kept)
    return _channels(unwrapped(model), groups, why_kept, order, operations)


def _layers_to_keep(model: nn.Module) -> dict[str, str]:
    """Layers of which no channel can be removed, and why."""
    owners: dict[int, list[str]] = {}
    why_kept = {UNKNOWN: UNKNOWN_PATH}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
        if is_grouped(module) and module.groups == module.out_channels:
            why_kept[name] = f"coupled with {printable(name)}, which has several inputs for each output"
        elif is_parametrized(module) or isinstance(module, CHANNEL_LAYERS) and "weight" not in module._parameters:
            why_kept[name] = f"coupled with {printable(name)}, whose weight is computed from other parameters"
    for sharing in owners.values():
        if len(sharing) > 1:
            why_kept |= dict.fromkeys(sharing, f"coupled with {' and '.join(sharing)}, which share a parameter")
    return why_kept


def _channels(
    model: nn.Module,
    groups: Iterable[Group],
    why_kept: Mapping[str, str],
    order: Mapping[str, int],
    operations: Mapping[str, ChannelOperation],
) -> list[ChannelSet]:
    """One set for all members that are coupled in any of the groups: a union-find over them."""
    parent: dict[Any, Any] = {}

    def root(key: Any) -> Any:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    members: set[Member] = set()

    def join(together: list[Member]) -> None:
        unknown: Member = (UNKNOWN, "through", f"{together[0][0]} {together[0][2]}")
        if not members.issuperset(together):
            members.add(unknown)
            parent[root(unknown)] = root(together[0])
        for member in together:
            parent[root(member)] = root(together[0])

    for number, group in enumerate(progress(groups, "joining filters that go together")):
        for member, channel in group:
            members.add(member)
            parent[root(member)] = root((number, channel))
    for name, operation in operations.items():
        for together in (
            operation.joined if any((name, "through", index) in members for index in range(operation.channels)) else ()
        ):
            join([(name, "through", index) for index in together])
    whole = join_whole_groups(model, root, join)
    sets: dict[Any, list[Member]] = {}
    for member in sorted(members, key=lambda member: (order.get(member[0], len(order)), member)):
        sets.setdefault(root(member), []).append(member)
    divisions = divisions_of_convolutions(model, whole) | divisions_of_chunks(operations)
    places = find_places(divisions, list(sets.values()))
    return [
        ChannelSet(
            _on("outputs", each), _on("through", [member for member in each if member[0] not in operations]),
            _on("inputs", each),
            next((why_kept[name] for name, _, _ in each if name in why_kept), place.reason if place.is_stuck else ""),
            place.cell, place.reason,
        )
        for each, place in zip(sets.values(), places, strict=True)
    ]  # fmt: skip


def _on(side: str, members: list[Member]) -> tuple[LayerIndex, ...]:
    return tuple((name, index) for name, of, index in members if of == side)
