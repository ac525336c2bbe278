"""Finding coupled filters: which filters of a model yield the same channels, and which of these can be removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..model.channels.coupling import ChannelSet, find_channels
from ..model.channels.equal_groups import Side, connected
from ..model.channels.removal import LAST_OUTPUT, why_stuck
from ..model.layers import parameter_name
from ..model.norms import affine_names
from ..model.tensors import with_autograd
from ..support.printable import printable
from .coupled import CoupledLayers, Coupling
from .layer import Layers


@torch.inference_mode(False)
def couple(
    model: nn.Module, example_input: Any, layers: Layers, may_empty: bool = False
) -> tuple[Coupling, dict[str, str]]:
    """Find which filters of the selected layers are coupled.

    A layer stays dense if one of its channels cannot be removed, or is coupled with a layer that stays dense.

    Args:
        model: The model, without wrappers.
        example_input: A batch, which is run through the model once.
        layers: All layers.
        may_empty: Whether a layer may lose its last filter, too.

    Returns:
        The coupling, and why further layers stay dense: layer name -> reason.

    Raises:
        ValueError: There is no example input, groups are not whole filters, or no layer is left.
    """
    if example_input is None:
        raise ValueError(
            "coupled=True: coupled filters are found by running the model once; give example_input=, a batch"
        )
    for layer in layers.values():
        grouping, out = layer.grouping, layer.weight.out
        if grouping is not None and not (grouping.drops_outputs and len(grouping.all_kept()) == out):
            raise ValueError("coupled=True couples whole filters; give granularity 'filter'")
    example_input = with_autograd(example_input)
    name_of_module = {
        module: name
        for name, layer in layers.items()
        for module, _ in layer.weight.owners
        if not layer.weight.is_embedding
    }
    channels = find_channels(model, example_input)
    dense = {name: layer.why_dense for name, layer in layers.items() if not layer.is_selected}
    reasons = dict(dense)
    known = {name_of_module[module] for each in channels for module, _ in each.outputs if module in name_of_module}
    reasons |= {name: "its channels are not followed" for name in layers if name not in known and name not in reasons}
    held_sides: dict[Side, str] = {}  # of grouped convolutions -> why no channel there can be removed
    changed = True
    while changed:
        changed = False
        for channel in channels:
            members = dict.fromkeys(name_of_module.get(module, module) for module, _ in channel.outputs)
            held = [each for each in members if each in reasons or each not in layers]
            sides = [(grouped, side) for grouped, side, _ in channel.cell]
            why = channel.kept or (f"coupled with {printable(held[0])}, which stays dense" if held else "")
            why = why or next((held_sides[side] for side in sides if side in held_sides), "")
            for name in members if why else ():
                if name not in reasons:
                    reasons[name], changed = why, True
            for side in sides if why else ():
                if side not in held_sides:
                    held_sides[side], changed = channel.why_spared, True
    parts = _parts(channels, {module: name for module, name in name_of_module.items() if name not in reasons})
    # The dependency graph can be wrong, so one channel of each kind is removed from a copy of the model,
    # and one from each group of a grouped convolution.
    kinds: dict[Any, ChannelSet] = {
        each.cell or tuple(dict.fromkeys(module for module, _ in each.outputs)): each for part in parts for each in part
    }
    for channel, why in why_stuck(model, example_input, kinds.values()).items():
        if why == LAST_OUTPUT and may_empty:
            continue
        part = next(part for part in parts if channel in part)
        reasons |= {name_of_module[module]: why for each in part for module, _ in each.outputs}
    removable = [part for part in parts if name_of_module[part[0].outputs[0][0]] not in reasons]
    more = {name: why for name, why in reasons.items() if name not in dense}
    if not removable:
        listed = "; ".join(f"{printable(name)}: {why}" for name, why in list(more.items())[:3])
        raise ValueError(f"coupled=True: no layer is left whose filters can be removed ({listed})")
    return Coupling([_coupled_layers(model, part, name_of_module) for part in removable]), more


def _parts(channels: Sequence[ChannelSet], names: Mapping[str, str]) -> list[list[ChannelSet]]:
    """Split the channels into parts whose layers are not coupled. names: module of a selected layer -> layer name."""
    part_of: dict[Any, tuple[list[ChannelSet], dict[Any, None]]] = {}  # layer, or side of a grouped convolution
    for channel in channels:
        keys: dict[Any, None] = dict.fromkeys(names[module] for module, _ in channel.outputs if module in names)
        if not keys:
            continue
        keys |= dict.fromkeys((name, side) for name, side, _ in channel.cell)
        merged = [channel]
        before = {id(part_of[key][0]): part_of[key] for key in keys if key in part_of}
        for those, more in before.values():
            merged = those + merged
            keys |= more
        part_of.update(dict.fromkeys(keys, (merged, keys)))
    return list({id(part): part for part, _ in part_of.values()}.values())


def _coupled_layers(model: nn.Module, part: Sequence[ChannelSet], names: Mapping[str, str]) -> CoupledLayers:
    """The layers and norm layers of one part. names: module -> layer name."""
    filters: dict[str, dict[int, int]] = {}
    norms: dict[str, dict[int, int]] = {}
    affine: dict[str, list[str]] = {}
    for number, channel in enumerate(part):
        for module_name, place in channel.outputs:
            filters.setdefault(names[module_name], {})[place] = number
        for module_name, place in channel.through:
            if module_name not in affine:
                affine[module_name] = affine_names(model.get_submodule(module_name))
            for attribute in affine[module_name]:
                norms.setdefault(parameter_name(module_name, attribute), {})[place] = number
    lines = connected(each.cell for each in part)
    number_of = {cell: number for number, cell in enumerate(lines)}
    cells = np.array([[number_of.get(each.cell, -1), lines.get(each.cell, -1)] for each in part])
    return CoupledLayers(
        {name: np.array([numbers[place] for place in range(len(numbers))]) for name, numbers in filters.items()},
        {norm: (np.array(list(numbers)), np.array(list(numbers.values()))) for norm, numbers in norms.items()},
        cells=(cells[:, 0], cells[:, 1]) if lines else None,
    )
