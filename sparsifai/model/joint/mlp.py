"""Neurons of MLPs as joint groups: the inner width, with all that belongs to it.

Neuron i is output i of the layers that come first (the up projection, and the gate if there is one), with their biases,
and input i of the layer that comes last (the down projection).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from .groups import JointGroups, Place, sizes_in
from .kinds import Declared, Kind

# Attributes by which MLPs of different libraries keep their inner width.
_WIDTHS = ("intermediate_size", "intermediate_dim", "hidden_features", "ffn_dim", "dim_feedforward")


@dataclass(frozen=True)
class Mlp:
    """The names of the layers of an MLP, as paths from its module; arguments of `register_mlp`."""

    up: str
    down: str
    gate: str | None = None

    @property
    def last(self) -> str:
        """Path of the layer that reads the neurons."""
        return self.down

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the layers: the gate, if there is one, the up and the down projection."""
        return tuple(path for path in (self.gate, self.up, self.down) if path)


_MLPS: Declared[Mlp] = Declared("register_mlp")


def register_mlp(kind: Kind, *, up: str, down: str, gate: str | None = None) -> None:
    """Declare the layers of a kind of MLP, for granularity 'neuron' and for `shrink`.

    Args:
        kind: A module class, or its full name, such as 'package.module.Class', for a class that is not to be imported;
            the full name may be a glob. Subclasses have the same layers. A kind may be declared several times; the
            first declaration that fits is used, from the latest to the oldest.
        up: Path from the module to the layer whose outputs are the neurons. A layer with twice as many outputs holds
            the gate, too, in one half.
        down: Path to the layer whose inputs are the neurons.
        gate: Path to the layer of the gate, in a gated MLP with a layer for it.

    Raises:
        TypeError: `kind` is not a module class.

    Example:
        >>> class FeedForward(nn.Module): ...
        >>> register_mlp(FeedForward, up='w3', gate='w1', down='w2')
    """
    _MLPS.add(kind, Mlp(up, down, gate))


for _kind in ("transformers.models.*", "timm.*", "torchvision.*"):
    for _names in (
        "w12 w3", "0 3", "lin1 lin2", "wi wo", "intermediate.dense output.dense", "dense_h_to_4h dense_4h_to_h",
        "c_fc c_proj", "up_proj down_proj", "gate_up_proj down_proj", "fc1 fc2", "w3 w2 w1", "wi_1 wo wi_0",
        "fc1_x fc2 fc1_g", "up_proj down_proj gate_proj",
    ):  # fmt: skip
        _up, _down, *_gate = _names.split()
        register_mlp(_kind, up=_up, down=_down, gate=_gate[0] if _gate else None)
register_mlp(nn.TransformerEncoderLayer, up="linear1", down="linear2")
register_mlp(nn.TransformerDecoderLayer, up="linear1", down="linear2")


def find_neurons(model: nn.Module) -> list[JointGroups]:
    """The neurons of all MLPs of a model, in the order of its modules.

    Args:
        model: The model, without wrappers. Modules of classes that are not declared are taken for MLPs if they have
            layers with names that a declared class has; a UserWarning says so.
    """
    matching = _MLPS.matching(model, lambda module: True, "an MLP", _fits)
    return [_neurons_of(module, name, record) for name, module, record in matching]


def _fits(module: nn.Module, name: str, record: Mlp) -> bool:
    """Whether the layers of a record are in a module, with sizes that fit."""
    *first, last = (Place.found(module, name, path) for path in record.paths)
    if last is None or any(each is None for each in first):
        return False
    width = last.size("in")
    return [each.size("out") / width for each in first if each] in ([1] * len(first), [2])


def _neurons_of(module: nn.Module, name: str, record: Mlp) -> JointGroups:
    """The neurons of one MLP, which fits the record."""
    *first, last = (Place(module, name, path) for path in record.paths)
    neurons = np.arange(last.size("in"))
    parts = [part for each in first for part in each.outputs(np.tile(neurons, each.size("out") // len(neurons)))]
    parts.append(last.inputs(neurons))
    sizes = sizes_in([(name, module)], dict.fromkeys(_WIDTHS, 1), len(neurons))
    return JointGroups(name, "neuron", len(neurons), tuple(parts), sizes)
