"""Channels of grouped convolutions and group norms, which can only be removed in equal numbers or by whole groups.

The groups of a convolution keep equal sizes if each of them loses the same number of channels, whichever these are. Or
a whole group is removed, with its inputs and its outputs. A group norm has the mean and variance of each group, and
zeros are part of them, so only its whole groups can be removed.

Two channels are in the same cell if they are in the same group of every grouped convolution that they meet. Where as
many channels are removed from one cell as from another, each group of each of these convolutions loses as many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import nn

from ...support.components import components
from ...support.printable import printable
from ..layers import CONVOLUTIONS, is_depthwise, size_of
from .rewriting import CHUNK, ChannelOperation

Side = tuple[str, str]  # name of a grouped convolution, 'outputs' or 'inputs'
Cell = tuple[tuple[str, str, int], ...]  # name, side, number of the group

SIDES = ("outputs", "inputs")


def is_grouped(module: Any) -> bool:
    """Whether a layer is a convolution with groups, and not a depthwise one."""
    return isinstance(module, CONVOLUTIONS) and module.groups > 1 and not is_depthwise(module)


def grouped_convolutions(model: nn.Module) -> dict[str, Any]:
    """The convolutions of a model that have groups, and are not depthwise, by name."""
    return {name: module for name, module in model.named_modules() if is_grouped(module)}


def groups_of(module: Any, side: str) -> list[range]:
    """The channels of each group of a grouped convolution, on one side of it."""
    share = (size_of(module, side) or 0) // module.groups
    return [range(start, start + share) for start in range(0, share * module.groups, share)]


def has_several_groups(module: nn.Module) -> TypeGuard[nn.GroupNorm]:
    """Whether a layer is a group norm with several groups. One that has all channels in one group mixes all of them."""
    return isinstance(module, nn.GroupNorm) and module.num_groups > 1


def groups_of_norm(norm: nn.GroupNorm) -> list[range]:
    """The channels of each group of a group norm."""
    share = norm.num_channels // norm.num_groups
    return [range(start, start + share) for start in range(0, norm.num_channels, share)]


@dataclass(frozen=True)
class Division:
    """A division of the channels on a side of something into parts of equal sizes.

    Attributes:
        count: Number of parts, such as the groups of a convolution.
        shares: Side -> number of its channels in one part.
        reason: The reason to keep a channel for the sake of equal sizes.
    """

    count: int
    shares: Mapping[str, int]
    reason: str


def divisions_of_convolutions(model: nn.Module, whole: Collection[str]) -> dict[str, Division]:
    """The divisions by grouped convolutions, by name, without those that only lose whole groups."""
    return {
        name: Division(
            module.groups,
            {side: len(groups_of(module, side)[0]) for side in SIDES},
            f"coupled with {printable(name)}, whose {module.groups} groups must keep equal sizes",
        )
        for name, module in grouped_convolutions(model).items()
        if name not in whole
    }


def divisions_of_chunks(operations: Mapping[str, ChannelOperation]) -> dict[str, Division]:
    """The divisions by chunks of channels, by name; shuffles divide nothing."""
    return {
        name: Division(
            each.parts,
            {"through": each.share},
            f"goes through a chunk of channels, whose {each.parts} parts must keep equal sizes",
        )
        for name, each in operations.items()
        if each.kind == CHUNK
    }


def join_whole_groups(model: nn.Module, set_of: Callable[[Any], Any], join: Callable[[list], None]) -> set[str]:
    """Join the channels that can only be removed with a whole group.

    They are those of a group of a group norm, and those of a group of a convolution where a group has one output or one
    input, or where its outputs or inputs are joined already.

    Args:
        model: The model.
        set_of: Gives the set that a member belongs to. A member is (name of a layer, side, index).
        join: Joins the sets of some members.

    Returns:
        Names of the grouped convolutions whose groups are only removed as a whole.
    """
    for name, module in model.named_modules():
        for group in groups_of_norm(module) if has_several_groups(module) else ():
            join([(name, "through", index) for index in group])
    grouped, whole = grouped_convolutions(model), set[str]()

    def is_joined(name: str, module: Any) -> bool:
        return any(
            len({set_of((name, side, index)) for index in group}) == 1
            for side in SIDES
            for group in groups_of(module, side)
        )

    while joined := [name for name, module in grouped.items() if name not in whole and is_joined(name, module)]:
        for name in joined:
            sides = [[[(name, side, index) for index in group] for group in groups_of(grouped[name], side)]
                     for side in SIDES]  # fmt: skip
            for outputs, inputs in zip(*sides, strict=True):
                join(outputs + inputs)
        whole.update(joined)
    return whole


@dataclass(frozen=True)
class Place:
    """Where a channel is in the divisions of a model.

    Attributes:
        cell: Its part of each division; empty if its removal takes as much from every part.
        reason: The reason to keep it, should parts become unequal.
        is_stuck: Whether parts would become unequal in any case.
    """

    cell: Cell
    reason: str
    is_stuck: bool


def find_places(divisions: Mapping[str, Division], sets: Sequence[Iterable[tuple[str, str, Any]]]) -> list[Place]:
    """Where each channel is in the divisions of a model.

    Args:
        divisions: The divisions, by the name of what divides.
        sets: For each channel its members: (name, side, index).
    """
    uneven: set[Side] = set()
    cells: list[Cell] = []
    of_side: dict[Side, dict[int, list[tuple[Cell, int]]]] = {}
    sides_of: list[list[Side]] = []
    for members in sets:
        counts: dict[Side, Counter] = {}
        for name, side, index in members:
            if name in divisions and side in divisions[name].shares:
                counts.setdefault((name, side), Counter())[index // divisions[name].shares[side]] += 1
        labels = {}
        for (name, side), count in counts.items():
            if len(count) == 1:
                labels[name, side] = next(iter(count))
            elif len(count) < divisions[name].count or len(set(count.values())) > 1:
                uneven.add((name, side))
        sides_of.append(list(counts))
        cells.append(tuple((*each, group) for each, group in sorted(labels.items())))
        for each, group in labels.items():
            of_side.setdefault(each, {}).setdefault(group, []).append((cells[-1], counts[each][group]))
    uneven |= {
        (name, side)
        for (name, side), groups in of_side.items()
        if not _is_even(groups, divisions[name].count, divisions[name].shares[side])
    }
    places = []
    for cell, sides in zip(cells, sides_of, strict=True):
        stuck = next((name for name, side in sides if (name, side) in uneven), "")
        name = stuck or (cell[0][0] if cell else "")
        places.append(Place(cell, divisions[name].reason if name else "", bool(stuck)))
    return places


def _is_even(of_group: Mapping[int, list[tuple[Cell, int]]], count: int, share: int) -> bool:
    """Whether the groups of one side of a convolution are made of equal numbers of cells of equal sizes.

    Args:
        of_group: Group -> for each channel in it, its cell, and how many outputs or inputs it has there.
        count: Number of groups.
        share: Number of outputs or inputs of a group.
    """
    sizes = [Counter(cell for cell, _ in channels) for channels in of_group.values()]
    covered = {sum(extent for _, extent in channels) for channels in of_group.values()}
    extents = {extent for channels in of_group.values() for _, extent in channels}
    same = len({len(each) for each in sizes}) == len({size for each in sizes for size in each.values()}) == 1
    return len(of_group) == count and covered == {share} and len(extents) == 1 and same


def connected(cells: Iterable[Cell]) -> dict[Cell, int]:
    """Number the cells so that those get one number that meet one side of a convolution, directly or by other cells."""
    cells = [cell for cell in dict.fromkeys(cells) if cell]
    numbers = components([(name, side) for name, side, _ in cell] for cell in cells)
    return dict(zip(cells, numbers, strict=True))


def balance(cells: Sequence[Cell], removable: Collection[int]) -> tuple[set[int], set[tuple[str, int]]]:
    """Choose channels so that all groups keep equal sizes, or are removed as a whole.

    Args:
        cells: The cell of each channel.
        removable: Numbers of the channels that could be removed.

    Returns:
        Numbers of those of them that have to stay, and the groups that are removed as a whole: (name, group).
    """
    members: dict[tuple[str, str, int], list[int]] = {}
    for number, cell in enumerate(cells):
        for label in cell:
            members.setdefault(label, []).append(number)
    sides = {(name, group) for name, _, group in members}
    whole = {
        (name, group)
        for name, group in sides
        if all(number in removable for side in SIDES for number in members.get((name, side, group), ()))
        and all((name, side, group) in members for side in SIDES)
    }
    while broken := {
        (name, group)
        for name, group in whole
        for side in SIDES
        for number in members[name, side, group]
        if any((other, of) not in whole for other, _, of in cells[number])
    }:
        whole -= broken
    by_cell: dict[Cell, list[int]] = {}
    for number, cell in enumerate(cells):
        if cell and not any((name, group) in whole for name, _, group in cell):
            by_cell.setdefault(cell, []).append(number)
    of_component: dict[int, list[list[int]]] = {}
    components = connected(by_cell)
    for cell, numbers in by_cell.items():
        of_component.setdefault(components[cell], []).append(numbers)
    kept: set[int] = set()
    for several in of_component.values():
        # One channel of each group is kept at least: a group without channels is no group.
        going = [[number for number in numbers if number in removable] for numbers in several]
        fewest = min(min(len(each), len(numbers) - 1) for each, numbers in zip(going, several, strict=True))
        kept.update(number for each in going for number in each[fewest:])
    return kept, whole
