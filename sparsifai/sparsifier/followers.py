"""What dies with a zeroed filter: the layer's bias, and the affine parameters of the norm layer behind it.

A filter of zeros whose bias or norm layer still shifts its channel is not dead. The parameters that have to be zero
with it are its followers; data flow says which they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..axes.grouping import Grouping
from ..model.flow import NORMS_OVER_CHANNELS, NORMS_OVER_LAST_AXIS, Flow
from ..model.layers import NamedWeight, parameter_name


def find_followers(
    model: nn.Module, targets: Mapping[str, NamedWeight], groupings: Mapping[str, Grouping], flow: Callable[[], Flow]
) -> dict[str, tuple[str, ...]]:
    """Parameter -> the targets whose outputs it acts on, by name. flow: the data flow, asked for only if needed."""
    dropping = {name: target for name, target in targets.items() if groupings[name].drops_outputs}
    if not dropping:
        return {}
    followers: dict[str, tuple[str, ...]] = {}
    for name, target in dropping.items():
        for bias in _biases(target):
            followers[bias] = (*followers.get(bias, ()), name)
    for (norm, moved), producers in flow().norms_behind(model, dropping).items():
        module = model.get_submodule(norm)
        if all(_normalizes_outputs(module, dropping[name], moved) for name in producers):
            for attribute, _ in module.named_parameters(recurse=False):
                followers[parameter_name(norm, attribute)] = tuple(sorted(producers))
    return followers


def masks_of_followers(
    followers: Mapping[str, tuple[str, ...]],
    masks: Mapping[str, Tensor],
    targets: Mapping[str, NamedWeight],
    groupings: Mapping[str, Grouping],
) -> dict[str, Tensor]:
    """Masks of the followers: a channel is dead where every output that it acts on is."""
    producers = {name for names in followers.values() for name in names}
    alive = {
        name: groupings[name].outputs(groupings[name].gather(masks[name]), targets[name].out) for name in producers
    }
    return {follower: torch.stack([alive[name] for name in names]).any(0) for follower, names in followers.items()}


def _biases(target: NamedWeight) -> list[str]:
    """Names of the biases that are added to what a target puts out; weight_ih_l0 has bias_ih_l0."""
    names: dict[int, str] = {}
    for owner, module in target.owners:
        for attribute in (target.attribute.replace("weight", "bias"), "bias"):
            bias = getattr(module, attribute, None)
            if isinstance(bias, nn.Parameter) and bias.shape == (target.out,):
                names.setdefault(id(bias), parameter_name(owner, attribute))
                break
    return list(names.values())


def _normalizes_outputs(norm: nn.Module, target: NamedWeight, moved: bool) -> bool:
    """Whether the affine parameters of `norm` have one entry per output of the target.

    moved: whether the outputs were moved to the last axis on the way.
    """
    # The outputs of a matrix are the last axis; those of a convolution the second, unless they were moved.
    last = moved or "w" not in target.axes
    if isinstance(norm, NORMS_OVER_LAST_AXIS) and not last or isinstance(norm, NORMS_OVER_CHANNELS) and moved:
        return False
    return all(parameter.shape == (target.out,) for parameter in norm.parameters(recurse=False))
