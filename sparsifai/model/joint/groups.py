"""What joint groups are: a record of which entries of which parameters belong to which group.

The weights of an attention head are rows of the query, key and value projections and columns of the output projection.
They are one group: it is ranked, pruned and removed as one. `JointGroups` says this for all heads of one attention, or
for all neurons of one MLP, by parts of parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...support.printable import printable
from ..layers import CONVOLUTIONS, axes_of, parameter_name

# What becomes of the entries of a part. Those of a weight are scored, counted and pruned; a reader is the weight that
# reads what the group computes: where it is zero, the group has no effect. Those of a follower, such as a bias, are
# pruned with their group. Those of a table are only removed with it: zeros in them would mean something.
WEIGHT, READER, FOLLOWER, TABLE = "weight", "reader", "follower", "table"

# The number of entries that belong to no group.
NO_GROUP = -1


@dataclass(frozen=True, eq=False)
class Part:
    """The entries of one parameter that belong to joint groups.

    Attributes:
        name: Name of the parameter in the model.
        axis: The axis of the parameter along which entries belong to groups; None if the parameter is a part of one
            group as a whole.
        groups: For each place along the axis, the number of the group that it belongs to, or NO_GROUP. Without an axis
            it has one entry.
        role: WEIGHT, READER, FOLLOWER or TABLE.
    """

    name: str
    axis: int | None
    groups: np.ndarray
    role: str = WEIGHT

    @property
    def extent(self) -> int:
        """How many neighbours along the axis make up a group or a piece of one, also of those that belong to none."""
        ends = np.flatnonzero(np.diff(self.groups)) + 1
        return int(np.gcd.reduce(np.diff([0, *ends, len(self.groups)])))

    def is_like(self, other: Part) -> bool:
        """Whether the entries of another part belong to the same groups, in the same order."""
        return (self.axis is None) == (other.axis is None) and np.array_equal(self.groups, other.groups)


@dataclass(frozen=True)
class Size:
    """A number that a module keeps of its sizes: it is proportional to the number of groups.

    Attributes:
        module: Name of the module.
        attribute: Name of the attribute, such as 'num_heads'.
        per_group: By how much the attribute falls with each group that is removed.
    """

    module: str
    attribute: str
    per_group: int


@dataclass(frozen=True, eq=False)
class Entries:
    """A list of modules, some of which are the groups: they are removed from it as a whole.

    Attributes:
        name: Name of the ModuleList, Sequential or ModuleDict.
        groups: For each entry, the number of the group that it is, or NO_GROUP.
        are_layers: Whether the entries are the layers of the model, whose number and positions it keeps.
    """

    name: str
    groups: np.ndarray
    are_layers: bool = False


@dataclass(frozen=True, eq=False)
class JointGroups:
    """All joint groups of one attention or MLP, or of one list of blocks.

    Attributes:
        name: Name of the module.
        what: What a group is, such as 'head'.
        count: Number of groups.
        parts: The entries that belong to them.
        sizes: The sizes that modules keep.
        why_kept: Why its groups can be neither pruned nor removed. Mostly empty.
        entries: The list of modules whose entries are the groups; None if groups are parts of layers.
        apart: Whether each group is ranked as granularity 'layer' ranks layers: all may be pruned but the best of those
            that are ranked together. Else the best group is kept.
        cells: For each group, the number of the cell that it is in, such as the layer of a unit, if as many groups must
            be pruned from each cell.
    """

    name: str
    what: str
    count: int
    parts: tuple[Part, ...]
    sizes: tuple[Size, ...] = ()
    why_kept: str = ""
    entries: Entries | None = None
    apart: bool = False
    cells: np.ndarray | None = None

    def parts_in(self, *roles: str) -> list[Part]:
        """The parts that have one of some roles."""
        return [part for part in self.parts if part.role in roles]


class Place:
    """A layer, or a parameter that stands by itself, at a path from a module: the weight that is there, and its bias.

    Args:
        module: The module.
        module_name: Its name in the model.
        path: Path from the module to a layer, such as 'self.query', or to a parameter, such as 'in_proj_weight'.
    """

    def __init__(self, module: nn.Module, module_name: str, path: str):
        found = attrgetter(path)(module)
        self.path = path
        if isinstance(found, nn.Module):
            self.layer, self.attribute, name = found, "weight", parameter_name(module_name, path)
        else:
            *inside, self.attribute = path.split(".")
            self.layer = attrgetter(".".join(inside))(module) if inside else module
            name = ".".join(filter(None, (module_name, *inside)))
        self.layer_name = name

    @classmethod
    def found(cls, module: nn.Module, module_name: str, path: str) -> Place | None:
        """The place, None if there is no weight with an output and an input axis that every output has to itself."""
        try:
            place = cls(module, module_name, path)
        except AttributeError:
            return None
        fits = isinstance(place.weight, Tensor) and {"out", "in"} <= set(place.axes) and len(place.axes) == place.dim
        return None if not fits or isinstance(place.layer, CONVOLUTIONS) and place.layer.groups > 1 else place

    @property
    def dim(self) -> int:
        """Number of axes that the weight has."""
        return self.weight.dim()

    @property
    def weight(self) -> Any:
        """The weight."""
        return getattr(self.layer, self.attribute, None)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of the weight."""
        return axes_of(self.layer, self.attribute) or ()

    def size(self, axis: str) -> int:
        """Number of outputs or inputs."""
        return self.weight.shape[self.axes.index(axis)]

    def _part(self, axis: str, groups: np.ndarray, role: str) -> Part:
        return Part(parameter_name(self.layer_name, self.attribute), self.axes.index(axis), groups, role)

    def inputs(self, groups: np.ndarray) -> Part:
        """The part of the weight whose inputs belong to groups."""
        return self._part("in", groups, READER)

    def _bias(self, groups: np.ndarray) -> list[Part]:
        """The part of the bias, if there is one with an entry for each output."""
        for attribute in (self.attribute.replace("weight", "bias"), "bias"):
            bias = getattr(self.layer, attribute, None)
            if attribute != self.attribute and isinstance(bias, Tensor) and bias.shape == (self.size("out"),):
                return [Part(parameter_name(self.layer_name, attribute), 0, groups, FOLLOWER)]
        return []

    def outputs(self, groups: np.ndarray) -> list[Part]:
        """The parts of the weight and its bias whose outputs belong to groups."""
        return [self._part("out", groups, WEIGHT), *self._bias(groups)]


def sizes_in(modules: Iterable[tuple[str, nn.Module]], per_group: dict[str, int], count: int) -> tuple[Size, ...]:
    """The sizes that some modules keep, of those that have one of the names and the value that it then has.

    Args:
        modules: Names and modules.
        per_group: Name of an attribute -> how much of it belongs to one group.
        count: Number of groups.
    """
    return tuple(
        Size(name, attribute, share)
        for name, module in dict(modules).items()
        for attribute, share in per_group.items()
        if getattr(module, attribute, None) == share * count
    )


def number_in(modules: Iterable[nn.Module], names: Iterable[str]) -> int | None:
    """The first of some attributes of some modules that is a positive whole number; None if none is."""
    values = (getattr(module, name, None) for module in modules for name in names)
    return next((each for each in values if type(each) is int and each > 0), None)


def merged(found: Sequence[JointGroups], model: nn.Module) -> list[JointGroups]:
    """Join the groups of modules that share a parameter: group i of all of them is one group.

    If a shared parameter does not belong to the same groups in both modules, the groups of neither can be pruned.

    Args:
        found: The joint groups of modules.
        model: The model.

    Returns:
        Joint groups that share no parameter, or that are kept.
    """
    # Tensors are held, since one that is computed at each access could have the id of an earlier one.
    tensors = {part.name: attrgetter(part.name)(model) for groups in found for part in groups.parts}
    cluster_of: dict[int, list[JointGroups]] = {}
    for groups in found:
        cluster = [groups]
        earlier = [cluster_of.get(id(tensors[part.name])) for part in groups.parts]
        for each in {id(known): known for known in earlier if known is not None}.values():
            cluster = each + cluster
        cluster_of |= {id(tensors[part.name]): cluster for each in cluster for part in each.parts}
    return [
        one
        for each in {id(each): each for each in cluster_of.values()}.values()
        for one in _sharing_as_one(each, tensors)
    ]


def _sharing_as_one(several: Sequence[JointGroups], tensors: dict[str, Any]) -> list[JointGroups]:
    """Joint groups that share parameters, as one; each by itself and kept if these belong to different groups."""
    first = several[0]
    parts: dict[int, Part] = {}
    for part in [part for each in several for part in each.parts]:
        known = parts.setdefault(id(tensors[part.name]), part)
        if known.axis != part.axis or not np.array_equal(known.groups, part.groups):
            why = f"{printable(part.name)} is shared by modules in which it belongs to different {first.what}s"
            return [replace(each, why_kept=each.why_kept or why) for each in several]
    return [as_one(several, parts.values())]


def as_one(several: Sequence[JointGroups], parts: Iterable[Part]) -> JointGroups:
    """Group i of several joint groups as one group, under the name of the first, with these parts."""
    sizes = dict.fromkeys(size for each in several for size in each.sizes)
    why_kept = next((each.why_kept for each in several if each.why_kept), "")
    return replace(several[0], parts=tuple(parts), sizes=tuple(sizes), why_kept=why_kept)
