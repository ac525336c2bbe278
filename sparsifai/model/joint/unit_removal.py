"""Removing zero units from recurrent layers, and from all that reads them: hidden_size falls.

What reads the units of a module is found by one run of the model in which the units to remove are NaN: a layer reads
them in those of its inputs that are NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ...support.printable import printable
from ..channels.connections import channel_axis
from ..channels.nan_propagation import NAN, NanPropagation, replaced_at_layers
from ..channels.smaller_copy import SmallerCopy
from ..hooks import hooked
from ..layers import CHANNEL_LAYERS, CONVOLUTIONS
from ..running import in_modes, run, untraced
from ..tensors import tensors_in
from .groups import FOLLOWER, READER, TABLE, WEIGHT, JointGroups, Part
from .recurrent import RECURRENT, directions, find_units
from .removal import remove_groups, zero_groups


@dataclass(frozen=True, eq=False)
class ZeroUnits:
    """The zero units of one recurrent module, and what becomes of them.

    Attributes:
        groups: The units of the module.
        zeros: Numbers of those that are zero.
        removed: Numbers of those that can be removed: as many of each layer and direction.
        readers: Name of a layer behind the module -> its inputs that read units that can be removed.
        why_kept: Why the other zero units are kept; empty if there are none.
    """

    groups: JointGroups
    zeros: tuple[int, ...]
    removed: tuple[int, ...] = ()
    readers: dict[str, list[int]] = field(default_factory=dict)
    why_kept: str = ""


def remove_all_units(copy: SmallerCopy) -> list[ZeroUnits]:
    """Remove the zero units of all recurrent modules of a model, where the model keeps its outputs.

    Args:
        copy: A copy of the model, which gets smaller.

    Returns:
        The zero units of each module, numbered as in the model that was given.
    """
    rows = []
    for number in range(len(find_units(copy.model))):
        row = find_zero_units(copy.model, find_units(copy.model)[number], copy.example_input)
        if row.removed and (why := copy.try_change(partial(remove_units, units=row))):
            row = replace(row, removed=(), readers={}, why_kept=why)
        rows.append(row)
    return rows


@torch.no_grad()
def find_zero_units(model: nn.Module, groups: JointGroups, example_input: Any) -> ZeroUnits:
    """The zero units of a recurrent module, and what reads them.

    A unit is zero if its weights and its biases are. Whether the model keeps its outputs without it is still to be
    checked, since a size may be written in its forward.

    Args:
        model: A model in evaluation mode.
        groups: The units of the module, as of `find_units`.
        example_input: A batch, a tuple of positional inputs or a dictionary of named ones.
    """
    is_zero = zero_groups(model, groups, WEIGHT, FOLLOWER)
    if groups.parts_in(READER):  # a projection: what it does not read has no effect
        is_zero |= zero_groups(model, groups, READER)
    zeros = np.flatnonzero(is_zero)
    found = tuple(zeros.tolist())
    if groups.why_kept or not found:
        return ZeroUnits(groups, found, why_kept=groups.why_kept if found else "")
    assert groups.cells is not None
    module: Any = model.get_submodule(groups.name)
    in_cells = [zeros[groups.cells[zeros] == cell] for cell in range(groups.cells.max() + 1)]
    # torch makes no module whose projection is not smaller than its hidden size.
    least = 1 + getattr(module, "proj_size", 0)
    fewest = max(min(min(len(units) for units in in_cells), module.hidden_size - least), 0)
    removed = np.concatenate([units[:fewest] for units in in_cells])
    why_kept = "" if len(removed) == len(zeros) else _why_left(groups, len(in_cells), least)
    if not len(removed):
        return ZeroUnits(groups, found, why_kept=why_kept)
    readers, why = _readers(model, groups, removed, example_input)
    if why:
        return ZeroUnits(groups, found, why_kept=why)
    return ZeroUnits(groups, found, tuple(removed.tolist()), readers, why_kept)


def _why_left(groups: JointGroups, cells: int, least: int) -> str:
    """Why some zero units are not removed with the others."""
    kept = f"at least {least} unit{'s' * (least > 1)} must be kept"
    if cells == 1:
        return kept
    return f"all layers and directions of {printable(groups.name)} must keep equal numbers of units, and {kept}"


# --- What reads the units ---------------------------------------------------------------------------------------------


def _readers(
    model: nn.Module, groups: JointGroups, removed: np.ndarray, example_input: Any
) -> tuple[dict[str, list[int]], str]:
    """What reads some units of a module: layer name -> its inputs; and why they must stay, empty if they need not."""
    nan, readers = NanPropagation(), dict[str, set[int]]()
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, RECURRENT)
    }
    producer: Any = model.get_submodule(groups.name)
    others: list[str] = []

    def note(name: str, is_nan: Tensor) -> None:
        if is_nan.any():
            readers.setdefault(name, set()).update(is_nan.nonzero().flatten().tolist())

    def mark_input(name: str, layer: nn.Module, given: Tensor) -> Tensor:
        with nan.paused():
            is_nan = given.isnan().movedim(channel_axis(layer, given), 0).flatten(1).any(1)
            note(name, is_nan)
            return nan.enter_layer(layer, given, torch.zeros_like(is_nan))

    def mark_output(name: str, layer: nn.Module, output: Tensor) -> Tensor:
        return nan.leave_layer(layer, output)

    def before(module: nn.Module, positional: tuple, named: dict[str, Any]) -> Any:
        with nan.paused():
            given = positional[0] if positional else named["input"]
            data = given.data if isinstance(given, PackedSequence) else given
            note(names[module], data.isnan().reshape(-1, data.shape[-1]).any(0))
            state = named.get("hx", positional[1] if len(positional) > 1 else None)
            if state is not None and module is producer and isinstance(module, nn.RNNBase):
                others.append(f"{printable(groups.name)} is given an initial state, whose size is that of all units")
            elif module is not producer and any(bool(each.isnan().any()) for each in tensors_in(state)):
                others.append(f"read as the initial state of {printable(names[module])}")
            return tuple(map(_without_nan, positional)), {key: _without_nan(value) for key, value in named.items()}

    def after(module: nn.Module, positional: tuple, named: dict[str, Any], output: Any) -> Any:
        with nan.paused():
            return _marked(producer, output, removed)

    with (
        untraced(model),
        replaced_at_layers(model, mark_input, mark_output),
        hooked(after=[(producer, after)], before=[(module, before) for module in names]),
        in_modes(nan),
    ):
        outputs = tensors_in(run(model, example_input))
    if any(value.is_floating_point() and bool(value.isnan().any()) for value in outputs):
        others.append("yields the model's output, or goes where it is not followed")
    others += [why for name in readers if (why := _why_not_cut(model, name, readers[name]))]
    return {name: sorted(inputs) for name, inputs in readers.items()}, "; ".join(dict.fromkeys(others))


def _without_nan(value: Any) -> Any:
    """A tensor, or the tensors of an input of a recurrent layer, with zeros in place of NaN."""
    if isinstance(value, PackedSequence):
        return value._replace(data=_without_nan(value.data))
    if isinstance(value, tuple):
        return tuple(map(_without_nan, value))
    return value.nan_to_num(nan=0.0) if isinstance(value, Tensor) else value


def _marked(module: Any, output: Any, removed: np.ndarray) -> Any:
    """The output of a recurrent module with NaN in place of some units.

    It is the output of the last layer, with its directions side by side, and the last states, with all layers and
    directions one after the other; those of an LSTM have the hidden states first. A cell returns its states only.
    """
    size = module.hidden_size
    units = [torch.from_numpy(removed[removed // size == number] % size) for number in range(len(directions(module)))]

    def filled(state: Tensor) -> Tensor:
        state = state.clone()
        for number, indices in enumerate(units):
            each = state[number] if isinstance(module, nn.RNNBase) else state
            each.index_fill_(-1, indices.to(state.device), NAN)
        return state

    if isinstance(module, nn.RNNCellBase):
        return tuple(map(filled, output)) if isinstance(output, tuple) else filled(output)
    sequence, states = output
    if module.proj_size:  # the hidden states are those of the projection
        return sequence, (states[0], filled(states[1]))
    last = units[-2:] if module.bidirectional else units[-1:]
    behind = torch.cat([indices + number * size for number, indices in enumerate(last)])
    data = sequence.data if isinstance(sequence, PackedSequence) else sequence
    data = data.index_fill(-1, behind.to(data.device), NAN)
    sequence = sequence._replace(data=data) if isinstance(sequence, PackedSequence) else data
    return sequence, tuple(map(filled, states)) if isinstance(states, tuple) else filled(states)


def _why_not_cut(model: nn.Module, name: str, inputs: set[int]) -> str:
    """Why inputs cannot be cut out of a layer, empty if they can."""
    layer: Any = model.get_submodule(name)
    if not isinstance(layer, (*CHANNEL_LAYERS, *RECURRENT)):
        return f"goes through {printable(name)} ({type(layer).__name__})"
    if isinstance(layer, CONVOLUTIONS) and (layer.groups > 1 or layer.transposed):
        return f"read by {printable(name)}, a convolution with groups or a transposed one"
    weights = _weights_that_read(name, layer)
    if len(inputs) == attrgetter(weights[0])(model).shape[1]:
        return f"mixed with others before {printable(name)} reads them"
    if not all(each.rpartition(".")[2] in model.get_submodule(name)._parameters for each in weights):
        return f"read by {printable(name)}, whose weight is computed from other parameters"
    own = {id(attrgetter(weight)(model)) for weight in weights}
    holders = [each for module in model.modules() for each in module._parameters.values() if id(each) in own]
    if len(holders) > len(weights):
        return f"read by {printable(name)}, which shares its weight"
    return ""


# --- Removal ----------------------------------------------------------------------------------------------------------


def _weights_that_read(name: str, layer: Any) -> list[str]:
    """Names of the weights of a layer that read its input."""
    prefix = f"{name}." if name else ""
    if not isinstance(layer, RECURRENT):
        return [f"{prefix}weight"]
    if isinstance(layer, nn.RNNCellBase):
        return [f"{prefix}weight_ih"]
    return [f"{prefix}weight_ih{each.suffix}" for each in directions(layer)[: 1 + layer.bidirectional]]


def remove_units(model: nn.Module, units: ZeroUnits) -> None:
    """Remove zero units from a recurrent module of a model, and from the layers that read them, in place.

    Args:
        model: The model.
        units: What `find_zero_units` has found in it, or in a copy of it.
    """
    module: Any = model.get_submodule(units.groups.name)
    cells = len(directions(module))
    remove_groups(model, units.groups, units.removed)
    module.hidden_size -= len(units.removed) // cells
    for name, inputs in units.readers.items():
        layer: Any = model.get_submodule(name)
        size = getattr(layer, "input_size", None) or (
            layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        )
        belongs = np.isin(np.arange(size), inputs).astype(np.int64)  # group 1 is removed
        parts = tuple(Part(weight, 1, belongs, TABLE) for weight in _weights_that_read(name, layer))
        remove_groups(model, JointGroups(name, "input", 2, parts), [1])
        if isinstance(layer, RECURRENT):
            layer.input_size = size - len(inputs)
    for name in {units.groups.name, *units.readers}:
        _refresh(model.get_submodule(name))


def _refresh(module: nn.Module) -> None:
    """Have a recurrent module use its own parameters: it keeps a list of them besides."""
    if isinstance(module, nn.RNNBase):
        for attribute in module._flat_weights_names:
            setattr(module, attribute, getattr(module, attribute))
        module.flatten_parameters()
