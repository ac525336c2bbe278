"""Cutting channels out of layers: out of weights, biases and statistics. Constants are added to biases first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import CHANNEL_LAYERS, is_depthwise, outputs_of
from .connections import keeps_constants
from .coupling import ChannelSet
from .equal_groups import groups_of, is_grouped

# The attributes in which layers store how many outputs and inputs they have.
_SIZES = {
    **dict.fromkeys(("out_channels", "out_features", "num_features", "num_channels", "num_parameters"), "outputs"),
    **dict.fromkeys(("in_channels", "in_features"), "inputs"),
}


@torch.no_grad()
def cut(model: nn.Module, channels: Iterable[ChannelSet], constants: Mapping[str, Tensor]) -> None:
    """Remove channels from the layers of a model, in place.

    Args:
        model: The model to change.
        channels: The channels to remove.
        constants: Layer name -> the constant value of each of its inputs, NaN where there is none.
    """
    channels = list(channels)
    removed = {side: indices_of(channels, side) for side in ("outputs", "through", "inputs")}
    for name, module in model.named_modules():
        inputs = removed["inputs"].get(name, set())
        values = {index: float(constants[name][index]) for index in inputs if name in constants}
        # An input that is removed without being constant is read by zeros only and adds nothing.
        constant = {index: value for index, value in values.items() if value and not math.isnan(value)}
        if constant and keeps_constants(module):
            _add_to_bias(module, constant)
        _cut_layer(module, removed["outputs"].get(name, set()) | removed["through"].get(name, set()), inputs)


def indices_of(channels: Iterable[ChannelSet], side: str) -> dict[str, set[int]]:
    """Layer name -> indices of the channels on one side of it.

    Args:
        channels: The channels.
        side: 'outputs', 'through' or 'inputs', as in `ChannelSet`.
    """
    indices: dict[str, set[int]] = {}
    for channel in channels:
        for name, index in getattr(channel, side):
            indices.setdefault(name, set()).add(index)
    return indices


def _add_to_bias(module: Any, constant: Mapping[int, float]) -> None:
    """Add to the bias of a layer what its constant inputs add to its outputs."""
    groups = getattr(module, "groups", 1)
    weight = module.weight.detach().double().unflatten(0, (groups, -1))  # (groups, outputs, inputs, ...)
    values = weight.new_zeros(groups * weight.shape[2])
    values[list(constant)] = weight.new_tensor(list(constant.values()))
    summed = weight.flatten(3).sum(3) if weight.dim() > 3 else weight
    added = (summed @ values.reshape(groups, -1, 1)).flatten()
    bias = module.bias if module.bias is not None else module.weight.new_zeros(outputs_of(module))
    trained = (module.weight if module.bias is None else module.bias).requires_grad
    module.bias = nn.Parameter((bias.detach() + added).to(bias.dtype), trained)


def _cut_layer(module: Any, outputs: set[int], inputs: set[int]) -> None:
    """Cut outputs and inputs out of the parameters and buffers of a layer."""
    if not (outputs or inputs):
        return

    def narrow(name: str, axis: int, removed: set[int]) -> None:
        tensor = getattr(module, name, None)
        if tensor is None or not removed:
            return
        kept = [index for index in range(tensor.shape[axis]) if index not in removed]
        narrower = tensor.detach().index_select(axis, torch.tensor(kept, dtype=torch.long, device=tensor.device))
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(module, name, nn.Parameter(narrower, tensor.requires_grad) if is_parameter else narrower)

    in_axis = 0 if getattr(module, "transposed", False) else 1
    out_axis = 0 if is_depthwise(module) or not isinstance(module, CHANNEL_LAYERS) else 1 - in_axis
    if is_grouped(module):
        _cut_groups(module, outputs, inputs)
    else:
        narrow("weight", out_axis, outputs)
        narrow("weight", in_axis, inputs)
    # A norm layer has any number of vectors with an entry per channel: statistics, and what it scales and shifts by.
    own = {**module._parameters, **module._buffers}
    vectors = {name for name, value in own.items() if value is not None and value.dim() == 1} - {"weight"}
    for name in ["bias"] if isinstance(module, CHANNEL_LAYERS) else sorted(vectors):
        narrow(name, 0, outputs)
    if isinstance(module, nn.GroupNorm):
        module.num_groups -= len(outputs) * module.num_groups // module.num_channels
    if is_depthwise(module):
        module.groups -= len(outputs)
        inputs = outputs
    for size, side in _SIZES.items():
        if hasattr(module, size):
            setattr(module, size, getattr(module, size) - len(outputs if side == "outputs" else inputs))


def _cut_groups(module: Any, outputs: set[int], inputs: set[int]) -> None:
    """Cut the weight of a grouped convolution: as much out of every group, or groups as a whole."""
    sides = [
        [[index - group.start for index in group if index not in removed] for group in groups_of(module, side)]
        for side, removed in (("outputs", outputs), ("inputs", inputs))
    ]
    if module.transposed:
        sides.reverse()
    kept = [(group, *pair) for group, pair in enumerate(zip(*sides, strict=True)) if all(pair)]
    weight = module.weight.detach().unflatten(0, (module.groups, -1))
    cut = torch.cat([weight[group][first][:, second] for group, first, second in kept])
    module.weight = nn.Parameter(cut, module.weight.requires_grad)
    module.groups = len(kept)
