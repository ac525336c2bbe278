"""Cutting channels out of layers: their entries in weights, biases and statistics, and constants put into biases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import CHANNEL_LAYERS, is_depthwise, outputs_of
from .coupling import ChannelSet


@torch.no_grad()
def cut(model: nn.Module, channels: Iterable[ChannelSet], constants: Mapping[str, Tensor]) -> None:
    """Remove channels from the layers of a model. constants: of the inputs of layers, what they always are."""
    channels = list(channels)
    removed = {side: places_of(channels, side) for side in ("outputs", "through", "inputs")}
    for name, module in model.named_modules():
        inputs = removed["inputs"].get(name, set())
        values = {place: float(constants[name][place]) for place in inputs if name in constants}
        # What depends on the input, and is removed all the same, is not read.
        if constant := {place: value for place, value in values.items() if value and not math.isnan(value)}:
            _fold(module, constant)
        _keep(module, removed["outputs"].get(name, set()) | removed["through"].get(name, set()), inputs)


def places_of(channels: Iterable[ChannelSet], side: str) -> dict[str, set[int]]:
    """Layer -> places of the channels on a side of it: 'outputs', 'through' or 'inputs'."""
    places: dict[str, set[int]] = {}
    for channel in channels:
        for name, place in getattr(channel, side):
            places.setdefault(name, set()).add(place)
    return places


def _fold(module: Any, constant: Mapping[int, float]) -> None:
    """Put into the bias of a layer what constant inputs add to its outputs."""
    places = torch.tensor(list(constant), device=module.weight.device)
    weight = module.weight.index_select(1, places).double()
    values = torch.tensor(list(constant.values()), dtype=torch.float64, device=weight.device)
    added = weight.flatten(2).sum(2) @ values if weight.dim() > 2 else weight @ values
    if module.bias is None:
        module.bias = nn.Parameter(module.weight.new_zeros(outputs_of(module)), module.weight.requires_grad)
    module.bias.copy_(module.bias + added)


def _keep(module: Any, outputs: set[int], inputs: set[int]) -> None:
    """Cut outputs and inputs out of the parameters of a layer."""
    if not (outputs or inputs):
        return

    def narrow(name: str, axis: int, gone: set[int]) -> None:
        tensor = getattr(module, name, None)
        if tensor is None or not gone:
            return
        left = [place for place in range(tensor.shape[axis]) if place not in gone]
        narrower = tensor.detach().index_select(axis, torch.tensor(left, dtype=torch.long, device=tensor.device))
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(module, name, nn.Parameter(narrower, tensor.requires_grad) if is_parameter else narrower)

    into = 0 if getattr(module, "transposed", False) else 1
    out = 0 if is_depthwise(module) or not isinstance(module, CHANNEL_LAYERS) else 1 - into
    narrow("weight", out, outputs)
    narrow("weight", into, inputs)
    for name in ("bias", "running_mean", "running_var"):
        narrow(name, 0, outputs)
    if is_depthwise(module):
        module.groups -= len(outputs)
        inputs = outputs
    for size, gone in _SIZES.items():
        if hasattr(module, size):
            setattr(module, size, getattr(module, size) - len(outputs if gone == "outputs" else inputs))


# The attributes in which layers say how many outputs and inputs they have.
_SIZES = {
    **dict.fromkeys(("out_channels", "out_features", "num_features", "num_parameters"), "outputs"),
    **dict.fromkeys(("in_channels", "in_features"), "inputs"),
}
