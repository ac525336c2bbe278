"""Joint groups in a Sparsifier: weights of several layers that are ranked and pruned as one, such as attention heads.

A joint granularity says which entries of which weights belong to which group. Here these become the groupings of the
layers, and a `Coupling` that joins the groups of the layers of one attention before they are ranked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..axes.grouping import Grouping
from ..model.joint.groups import FOLLOWER, NO_GROUP, READER, WEIGHT, JointGroups, Part
from ..model.layers import NamedWeight, parameter_name
from ..support.capability import capability
from ..support.printable import printable
from ..support.registry import name_of
from .coupled import CoupledLayers, Coupling
from .followers import Follower
from .layer import FROZEN, FROZEN_UNCOUPLED, Layer, Layers

# Name of a granularity -> what to do if a model has no such groups.
_ADVICE = {
    "head": (
        "no class in it is a known attention. Declare it: register_attention(kind, query=..., key=..., value=..., "
        "output=...)"
    ),
    "neuron": "no class in it is a known MLP. Declare it: register_mlp(kind, up=..., down=...)",
    "expert": (
        "a mixture is a module with experts and a router or gate; name the axes of experts that share a parameter: "
        "register_layer(kind, name=('expert', 'out', 'in'))"
    ),
    "block": "blocks are modules of the same class in a ModuleList or Sequential",
    "unit": "it has no LSTM, GRU or RNN of torch",
}


def joint_granularity(
    granularity: Callable, model: nn.Module, weights: Mapping[str, NamedWeight], example_input: Any = None
) -> Joint | None:
    """The joint groups of a model; None for a granularity that groups the weights of each layer by themselves.

    Args:
        granularity: The granularity.
        model: The model, without wrappers.
        weights: All weights with named axes, by name.
        example_input: A batch, or None; for a granularity that has a parameter of this name.

    Raises:
        TypeError: The granularity does not return joint groups.
        ValueError: The model has no such groups.
    """
    if not capability(granularity, "joint", False):
        return None
    takes_example = "example_input" in inspect.signature(granularity).parameters
    found = granularity(model, example_input=example_input) if takes_example else granularity(model)
    name = name_of(granularity)
    if not isinstance(found, list) or not all(isinstance(each, JointGroups) for each in found):
        raise TypeError(
            f"granularity {name_of(granularity)} is registered with joint=True, so it must return a list of JointGroups"
        )
    if not found:
        advice = _ADVICE.get(name, "choose another granularity")
        what = printable(name)
        raise ValueError(f"granularity {what!r}: no {what}s are found in {type(model).__name__}; {advice}")
    return Joint(name, found, model, weights)


class Joint:
    """The joint groups of a model, as groups of its layers.

    Args:
        what: Name of the granularity.
        found: The joint groups.
        model: The model, without wrappers.
        weights: All weights with named axes, by name.
    """

    def __init__(self, what: str, found: Sequence[JointGroups], model: nn.Module, weights: Mapping[str, NamedWeight]):
        self.what = what
        self._model = model
        self._weights = weights
        # A weight that is tied has one name here and several in the model; one that is computed is no parameter.
        name_of = {(id(owner), each.attribute): name for name, each in weights.items() for _, owner in each.owners}
        self._parts: dict[str, tuple[JointGroups, Part]] = {}
        self._unnamed: dict[int, str] = {}
        for each in found:
            for part in each.parts_in(WEIGHT, READER):
                inside, _, attribute = part.name.rpartition(".")
                name = name_of.get((id(model.get_submodule(inside)), attribute))
                if name is None:
                    self._unnamed[id(each)] = part.name
                else:
                    self._parts[name] = each, part

    def groupings(self, fewest: int) -> dict[str, Grouping | str]:
        """The grouping of each weight of the model, or why it stays dense. fewest: groups that have to be kept."""
        return {name: self._grouping(weight, fewest) for name, weight in self._weights.items()}

    def _grouping(self, weight: NamedWeight, fewest: int) -> Grouping | str:
        if weight.unfit:
            return weight.unfit
        if weight.name not in self._parts:
            return f"belongs to no {self.what}"
        groups, part = self._parts[weight.name]
        if groups.why_kept:
            return groups.why_kept
        if id(groups) in self._unnamed:
            return f"its {self.what}s also need {self._unnamed[id(groups)]}, which has no named axes"
        if groups.apart and fewest > 1:
            return f"each {self.what} is ranked by itself, so round_to= cannot keep a multiple of them"
        if groups.count < 2 * fewest and not groups.apart:
            return f"has {groups.count} {self.what}{'s' * (groups.count > 1)}, of which {fewest} must be kept"
        if part.axis is None:
            return Grouping.of(lambda axes: (), weight.axes, weight.convolution_groups)
        extents = {list(weight.axes)[part.axis]: part.extent}
        return Grouping.of(lambda axes: extents, weight.axes)

    def couple(self, layers: Layers) -> tuple[Coupling, dict[str, str]]:
        """Join the groups of the layers that are selected, and of those that are frozen for the time being.

        Args:
            layers: All layers.

        Returns:
            The coupling, and why further layers stay dense: layer name -> reason.

        Raises:
            ValueError: No groups are left.
        """
        more: dict[str, str] = {}
        coupled = []
        for groups, names in self._members():
            dense = [name for name in names if not layers[name].is_selected]
            if not dense or all(layers[name].why_dense == FROZEN for name in names):
                channels = {name: self._numbers(name, layers) for name in names}
                lines = None if groups.cells is None else (groups.cells, np.zeros_like(groups.cells))
                coupled.append(CoupledLayers(channels, {}, self._name_of(groups, names[0]), lines))
            else:
                why = f"its {self.what}s also need {printable(dense[0])}, which stays dense"
                more |= {name: why for name in names if layers[name].is_selected}
                more |= {name: FROZEN_UNCOUPLED for name in dense if layers[name].why_dense == FROZEN}
        if not any(layer.is_selected and name not in more for name, layer in layers.items()):
            listed = "; ".join(f"{printable(name)}: {why}" for name, why in list(more.items())[:3])
            raise ValueError(
                f"granularity {self.what!r}: no {self.what} is left to prune ({listed}); name whole modules in layers= "
                "and exclude="
            )
        return Coupling(coupled, self.what, self._parts), more

    def _members(self) -> list[tuple[JointGroups, list[str]]]:
        """The joint groups of each module, or each group that is ranked apart, with the names of their weights."""
        members: dict[tuple[int, int], tuple[JointGroups, list[str]]] = {}
        for name, (groups, part) in self._parts.items():
            if not groups.why_kept:
                number = int(part.groups[0]) if groups.apart else 0
                members.setdefault((id(groups), number), (groups, []))[1].append(name)
        return list(members.values())

    def _name_of(self, groups: JointGroups, weight: str) -> str:
        """Name of the module that groups belong to; of groups that are ranked apart, that of the group itself."""
        if not groups.apart or groups.entries is None:
            return groups.name
        place = groups.entries.groups.tolist().index(self._parts[weight][1].groups[0])
        return parameter_name(groups.name, list(self._model.get_submodule(groups.name)._modules)[place])

    def _numbers(self, name: str, layers: Layers) -> np.ndarray:
        """For each group of a layer, the number of the joint group that it is a part of."""
        (groups, part), grouping = self._parts[name], layers[name].grouping
        if part.axis is None:
            return part.groups * (not groups.apart)
        along = part.groups[:: part.extent]
        # Experts that share a weight have groups of their own, which are part of the same joint groups.
        shape = [1] * len(grouping.grid)
        shape[part.axis] = len(along)
        return np.broadcast_to(along.reshape(shape), grouping.grid).flatten()

    def followers(self, layers: Layers) -> list[Follower]:
        """The biases of the layers of which whole groups of outputs are pruned, and what goes with whole groups.

        Args:
            layers: The layers that are pruned, now or when they are trained.
        """
        found = []
        for groups, names in self._members():
            producers = [name for name in names if name in layers and layers[name].grouping.drops_outputs]
            for part in groups.parts_in(FOLLOWER) if producers else ():
                alike = [name for name in producers if self._parts[name][1].is_like(part)]
                beside = [name for name in alike if name.rpartition(".")[0] == part.name.rpartition(".")[0]]
                if part.axis is None or "expert" in layers[producers[0]].weight.axes:
                    found += [self._whole_follower(part, layers[name]) for name in alike[:1]]
                elif beside:
                    found.append(Follower(part.name, len(part.groups), {beside[0]: None}))
                else:
                    pairs = _of_same_group(self._parts[producers[0]][1].groups, part.groups)
                    found.append(Follower(part.name, len(part.groups), {producers[0]: pairs}))
        return found

    def _whole_follower(self, part: Part, layer: Layer) -> Follower:
        """A parameter that is pruned with a layer or its experts: as a whole, or its row for each expert."""
        parameter = attrgetter(part.name)(self._model)
        rows = len(part.groups)
        entries = torch.arange(parameter.numel())
        first_outputs = torch.arange(rows) * (layer.weight.out // rows)
        producers = {layer.name: (first_outputs.repeat_interleave(len(entries) // rows), entries)}
        return Follower(part.name, len(entries), producers, len(parameter) if parameter.dim() > 1 else 1)


def _of_same_group(outputs: np.ndarray, entries: np.ndarray) -> tuple[Tensor, Tensor]:
    """For each entry that belongs to a group, an output of the same group: two long tensors.

    Args:
        outputs: For each output of a layer, its group.
        entries: For each entry of a parameter, its group.
    """
    numbers, first = np.unique(outputs, return_index=True)
    places = np.flatnonzero(np.isin(entries, numbers[numbers != NO_GROUP]))
    return torch.from_numpy(first[np.searchsorted(numbers, entries[places])]), torch.from_numpy(places)
