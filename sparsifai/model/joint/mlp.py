"""Neurons of MLPs as joint groups: the inner width, with all that belongs to it.

Neuron i is output i of the layers that come first (the up projection, and the gate if there is one), with their biases,
and input i of the layer that comes last (the down projection).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from torch import nn

from ...support.arguments import checks_arguments
from ...support.warning import warn_each
from .groups import JointGroups, Place, merged, sizes_in
from .kinds import Declared, Kind, checked_paths

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


_MLPS: Declared[Mlp] = Declared("register_mlp", "MLPs")


@checks_arguments
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
        ValueError: A path is empty or no path.

    Example:
        >>> class FeedForward(nn.Module): ...
        >>> register_mlp(FeedForward, up='w3', gate='w1', down='w2')
    """
    checked_paths("register_mlp", up=up, down=down, **({} if gate is None else {"gate": gate}))
    _MLPS.add(kind, Mlp(up, down, gate))


# A record of a kind that is declared later is tried first.
for _kind in ("transformers.models.*", "timm.*", "torchvision.*"):
    for _names in (
        "w12 w3", "0 3", "linear1 linear2", "linear_1 linear_2", "linear_fc1 linear_fc2", "dense1 dense2",
        "layer_1 layer_2", "input_linear output_linear", "ffn ffn_output", "lin1 lin2", "wi wo", "Wi Wo",
        "intermediate.dense output.dense", "fc_in fc_out", "intermediate_dense output_dense",
        "dense_h_to_4h dense_4h_to_h", "c_fc c_proj", "up_proj down_proj", "gate_up_proj down_proj", "w1 w2", "fc1 fc2",
        "w2 w3 w1", "w3 w2 w1", "wi_1 wo wi_0", "fc1_x fc2 fc1_g", "up_proj down_proj gate_proj",
    ):  # fmt: skip
        _up, _down, *_gate = _names.split()
        register_mlp(_kind, up=_up, down=_down, gate=_gate[0] if _gate else None)
register_mlp(nn.TransformerEncoderLayer, up="linear1", down="linear2")
register_mlp(nn.TransformerDecoderLayer, up="linear1", down="linear2")


def find_neurons(model: nn.Module, warns: bool = False) -> list[JointGroups]:
    """The neurons of all MLPs of a model, in the order of its modules.

    Experts whose matrices are stored in one parameter have the same width, so neuron i of all of them is one group.

    Args:
        model: The model, without wrappers. Modules of classes that are not declared are taken for MLPs if they have
            layers with names that a declared class has, unless these names are numbers.
        warns: Whether to warn of classes that were taken for MLPs, and of MLPs that are left out.
    """
    matches = _MLPS.matching(model, _why_unfit, lambda module: True, _looks_like_mlp)
    if warns:
        warn_each(_MLPS.notices(model, matches))
    return merged([_neurons_of(module, name, record) for name, module, record in matches.found], model)


def _looks_like_mlp(module: nn.Module) -> bool:
    """Whether a module should be named if its neurons are not found."""
    weights = sum(Place.found(module, "", name) is not None for name, _ in module.named_children())
    return weights > 1 and re.search(r"MLP|Mlp|Feed_?[Ff]orward|FFN", type(module).__name__) is not None


def _why_unfit(module: nn.Module, name: str, record: Mlp) -> str:
    """Why a module does not have the layers of a record, with sizes that fit; empty if it has."""
    places = {path: Place.found(module, name, path) for path in record.paths}
    if missing := [path for path, place in places.items() if place is None]:
        return f"it has no layer {missing[0]!r} whose weight has the axes out and in"
    *first, last = (place for place in places.values() if place)
    width = last.size("in")
    if [each.size("out") / width for each in first] in ([1] * len(first), [2]):
        return ""
    outputs = ", ".join(f"{each.path}: {each.size('out')}" for each in first)
    return f"the outputs of its first layers ({outputs}) do not fit the {width} inputs of {last.path}"


def _neurons_of(module: nn.Module, name: str, record: Mlp) -> JointGroups:
    """The neurons of one MLP, which fits the record."""
    *first, last = (Place(module, name, path) for path in record.paths)
    neurons = np.arange(last.size("in"))
    parts = [part for each in first for part in each.outputs(np.tile(neurons, each.size("out") // len(neurons)))]
    parts.append(last.inputs(neurons))
    sizes = sizes_in([(name, module)], dict.fromkeys(_WIDTHS, 1), len(neurons))
    return JointGroups(name, "neuron", len(neurons), tuple(parts), sizes, _why_kept(module, record, last))


def _why_kept(module: nn.Module, record: Mlp, last: Place) -> str:
    """Why the neurons of an MLP have to stay: a layer over all of them, such as a norm, before the one that reads them.

    Such a layer is found beside the others by its size, so it is not if the MLP has as many outputs as neurons.
    """
    width = last.size("in")
    if width == last.size("out"):
        return ""
    for inside in dict.fromkeys(path.rpartition(".")[0] for path in record.paths):
        for child, layer in module.get_submodule(inside).named_children():
            path = f"{inside}.{child}" if inside else child
            tensors = dict(layer.named_parameters())
            holds_others = any(layer.children()) and any(Place.found(layer, "", name) for name in tensors)
            if path not in record.paths and not holds_others and any(width in each.shape for each in tensors.values()):
                return f"its layer {path} ({type(layer).__name__}) is over all neurons, so it would have to change, too"
    return ""
