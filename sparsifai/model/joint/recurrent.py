"""Units of recurrent layers as joint groups: LSTM, GRU and RNN, and their cells.

Unit j of a layer is row j of each gate in weight_ih and weight_hh, with its biases. If all of them are zero and the
layer starts from a zero state, the unit stays zero: tanh(0) = 0 is all that its gates let through. So what reads it,
such as column j of weight_hh, has no effect; it need not be zero, and is removed with the unit.

torch has one hidden_size for all layers and directions of a module. So each of them has to lose as many units; which
ones is chosen in each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..layers import parameter_name
from .groups import FOLLOWER, READER, TABLE, WEIGHT, JointGroups, Part

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class Direction:
    """One direction of one layer of a recurrent module.

    Attributes:
        suffix: The end of the names of its parameters, such as '_l0_reverse'. Empty for a cell.
        number: Its position: layers in order, the reverse direction behind the forward one.
        first: Number of its first unit.
        read_by: The suffixes of the directions that read its units, those of the next layer.
    """

    suffix: str
    number: int
    first: int
    read_by: tuple[str, ...]

    def units(self, hidden_size: int, times: int = 1) -> np.ndarray:
        """The numbers of its units, as often as there are gates."""
        return np.tile(np.arange(self.first, self.first + hidden_size), times)


def directions(module: Any) -> list[Direction]:
    """The directions of all layers of a recurrent module."""
    if isinstance(module, nn.RNNCellBase):
        return [Direction("", 0, 0, ())]
    ends = ("", "_reverse") if module.bidirectional else ("",)
    each = [(layer, end) for layer in range(module.num_layers) for end in ends]
    return [
        Direction(
            f"_l{layer}{end}",
            number,
            number * module.hidden_size,
            tuple(f"_l{layer + 1}{other}" for other in ends) if layer + 1 < module.num_layers else (),
        )
        for number, (layer, end) in enumerate(each)
    ]


def find_units(model: nn.Module) -> list[JointGroups]:
    """The units of all recurrent layers of a model, in the order of its modules.

    Weights that fastai's WeightDropout holds, as in AWD_LSTM, are found there: its `weight_hh_l0_raw` is the parameter.
    Units of a module with other computed weights, as by weight_norm, are kept with that reason.

    Args:
        model: The model, without wrappers.
    """
    return [_units_of(model, name, module) for name, module in model.named_modules() if isinstance(module, RECURRENT)]


def _units_of(model: nn.Module, name: str, module: Any) -> JointGroups:
    """The units of one recurrent module."""
    hidden, own = module.hidden_size, directions(module)
    is_projected = bool(getattr(module, "proj_size", 0))
    parts: list[Part] = []
    why_kept = ""

    def add(attribute: str, axis: int, groups: np.ndarray, role: str) -> None:
        nonlocal why_kept
        full_name = _name_of_parameter(model, name, module, attribute)
        if full_name:
            parts.append(Part(full_name, axis, groups, role))
        else:
            why_kept = f"its {attribute} is computed from other parameters"

    pieces: dict[str, list[np.ndarray]] = {}  # suffix -> the units that the columns of its weight_ih read
    for each in own:
        for attribute in (f"weight_ih{each.suffix}", f"weight_hh{each.suffix}"):
            gates = getattr(module, attribute).shape[0] // hidden
            add(attribute, 0, each.units(hidden, gates), WEIGHT)
            bias = attribute.replace("weight", "bias")
            if isinstance(getattr(module, bias, None), Tensor):
                add(bias, 0, each.units(hidden, gates), FOLLOWER)
        if is_projected:
            add(f"weight_hr{each.suffix}", 1, each.units(hidden), READER)
            continue
        add(f"weight_hh{each.suffix}", 1, each.units(hidden), TABLE)
        for suffix in each.read_by:
            pieces.setdefault(suffix, []).append(each.units(hidden))
    for suffix, units in pieces.items():
        add(f"weight_ih{suffix}", 1, np.concatenate(units), TABLE)
    cells = np.repeat(np.arange(len(own)), hidden)
    return JointGroups(name, "unit", len(cells), tuple(parts), why_kept=why_kept, cells=cells)


def _name_of_parameter(model: nn.Module, name: str, module: nn.Module, attribute: str) -> str:
    """The name of the parameter that a weight of a recurrent module is; empty if it is computed from others."""
    if attribute in module._parameters:
        return parameter_name(name, attribute)
    for holder_name, holder in _holders(model, module):
        if f"{attribute}_raw" in holder._parameters:
            return parameter_name(holder_name, f"{attribute}_raw")
    return ""


def _holders(model: nn.Module, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold a module as a child, as WeightDropout does."""
    for name, holder in model.named_modules():
        if any(child is module for child in holder.children()):
            yield name, holder
