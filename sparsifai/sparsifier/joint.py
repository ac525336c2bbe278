"""Joint groups in a Sparsifier: weights of several layers that are ranked and pruned as one, such as attention heads.

A joint granularity says which entries of which weights belong to which group. Here these become the groupings of the
layers, and a `Coupling` that joins the groups of the layers of one attention before they are ranked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter

import numpy as np
from torch import nn

from ..axes.grouping import Grouping
from ..model.joint.groups import FOLLOWER, READER, WEIGHT, JointGroups, Part
from ..model.layers import NamedWeight
from ..support.capability import capability
from ..support.printable import printable
from ..support.registry import name_of
from .coupled import CoupledLayers, Coupling
from .followers import Follower
from .layer import Layers


def joint_granularity(granularity: Callable, model: nn.Module, weights: Mapping[str, NamedWeight]) -> Joint | None:
    """The joint groups of a model; None for a granularity that groups the weights of each layer by themselves.

    Raises:
        TypeError: The granularity does not return joint groups.
        ValueError: The model has no such groups.
    """
    if not capability(granularity, "joint", False):
        return None
    found = granularity(model)
    name = name_of(granularity)
    if not isinstance(found, list) or not all(isinstance(each, JointGroups) for each in found):
        raise TypeError(f"granularity {name} is registered with joint=True, so it must return a list of JointGroups")
    if not found:
        why = (
            "it has no LSTM, GRU or RNN of torch"
            if name == "unit"
            else "its classes are not known. Declare "
            "them: register_attention(kind, query=..., key=..., value=..., output=...) for heads, "
            "register_mlp(kind, up=..., down=...) for neurons"
        )
        raise ValueError(f"granularity {name!r}: no {name}s are found in {type(model).__name__}; {why}")
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
        self._found = found
        self._model = model
        self._weights = weights
        names = {id(weight.parameter): name for name, weight in weights.items()}
        # A tied weight has one name here and several in the model.
        self._parts: dict[str, tuple[JointGroups, Part]] = {}
        for each in found:
            for part in each.parts_in(WEIGHT, READER):
                name = names.get(id(attrgetter(part.name)(model)))
                if name is not None:
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
        if groups.count < 2 * fewest:
            return f"has {groups.count} {self.what}{'s' * (groups.count > 1)}, of which {fewest} must be kept"
        return Grouping.of(lambda axes: {list(weight.axes)[part.axis]: part.extent}, weight.axes)

    def couple(self, layers: Layers) -> tuple[Coupling, dict[str, str]]:
        """Join the groups of the layers that are selected.

        Args:
            layers: All layers.

        Returns:
            The coupling, and why further layers stay dense: layer name -> reason.

        Raises:
            ValueError: No groups are left.
        """
        more: dict[str, str] = {}
        members: dict[int, list[str]] = {}
        for name, (groups, _) in self._parts.items():
            members.setdefault(id(groups), []).append(name)
        coupled = []
        for names in members.values():
            dense = next((name for name in names if not layers[name].is_selected), None)
            if dense is None:
                cells = self._parts[names[0]][0].cells
                lines = None if cells is None else (cells, np.zeros_like(cells))
                coupled.append(CoupledLayers({name: self._numbers(name, layers) for name in names}, {}, cells=lines))
            else:
                why = f"its {self.what}s also need {printable(dense)}, which stays dense"
                more |= {name: why for name in names if layers[name].is_selected}
        if not coupled:
            listed = "; ".join(f"{printable(name)}: {why}" for name, why in list(more.items())[:3])
            raise ValueError(f"granularity {self.what!r}: no {self.what} is left to prune ({listed})")
        return Coupling(coupled, self.what), more

    def _numbers(self, name: str, layers: Layers) -> np.ndarray:
        """For each group of a layer, the number of the joint group that it is a part of."""
        part, grouping = self._parts[name][1], layers[name].grouping
        along = part.groups[:: part.extent]
        # Experts that share a weight have groups of their own, which are part of the same joint groups.
        shape = [1] * len(grouping.grid)
        shape[part.axis] = len(along)
        return np.broadcast_to(along.reshape(shape), grouping.grid).flatten()

    def followers(self, layers: Layers) -> list[Follower]:
        """The biases of the layers of which whole groups of outputs are pruned."""
        found = []
        for name, (groups, weight) in self._parts.items():
            inside = name.rpartition(".")[0]
            for part in groups.parts_in(FOLLOWER):
                of_layer = part.name.rpartition(".")[0] == inside and np.array_equal(part.groups, weight.groups)
                if of_layer and layers[name].grouping.drops_outputs:
                    found.append(Follower(part.name, len(part.groups), {name: None}))
        return found
