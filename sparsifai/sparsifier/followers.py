"""Followers: the parameters that are masked with a whole output, so that its channel is zero.

A filter of zeros still has an output if the layer's bias, or a norm layer behind it, shifts its channel. So the bias
and the affine parameters of the norm layer are masked with it. Data flow says which norm layer is behind which layer;
for filters that are coupled, the dependency graph says it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.flow import Flow
from ..model.layers import NamedWeight, parameter_name
from ..model.norms import NORMS_OVER_LAST_AXIS, affine_names
from .layer import Layer, Layers


@dataclass(frozen=True, eq=False)
class Follower:
    """A parameter with one entry per channel, and the layers that yield these channels.

    An entry is pruned where all outputs that yield its channel are.

    Attributes:
        name: Name of the parameter.
        size: Number of its entries.
        producers: Layer name -> which of its outputs act on which entries, two long tensors of the same length; None
            where output i acts on entry i. An entry that no output acts on is kept.
        experts: Number of experts in the layer. With several, the parameter has a row of entries for each.
    """

    name: str
    size: int
    producers: Mapping[str, tuple[Tensor, Tensor] | None]
    experts: int = 1

    def mask(self, kept_outputs: Mapping[str, Tensor]) -> Tensor:
        """The mask of the parameter. kept_outputs: layer name -> bool per output, False where it is pruned."""
        if all(pairs is None for pairs in self.producers.values()):
            return torch.stack([kept_outputs[name] for name in self.producers]).any(0)
        device = next(kept_outputs[name] for name in self.producers).device
        kept, produced = torch.zeros(self.size, device=device), torch.zeros(self.size, device=device)
        for name, pairs in self.producers.items():
            outputs, entries = (torch.arange(self.size),) * 2 if pairs is None else pairs
            values = kept_outputs[name].to(device, kept.dtype)[outputs.to(device)]
            kept.index_add_(0, entries.to(device), values)
            produced.index_add_(0, entries.to(device), torch.ones_like(values))
        return (kept > 0) | (produced == 0)


def masks_of_followers(followers: Iterable[Follower], layers: Layers) -> dict[str, Tensor]:
    """Follower name -> its mask, from the masks of the layers, if any layer that it follows is pruned."""
    following = [each for each in followers if any(layers[name].is_selected for name in each.producers)]
    kept_outputs = {name: layers[name].kept_outputs for each in following for name in each.producers}
    masks = {follower.name: follower.mask(kept_outputs) for follower in following}
    masks |= {each.name: masks[each.name].view(each.experts, -1) for each in following if each.experts > 1}
    # A bias whose axes have names can be pruned by itself, too.
    own = {name: layers[name].mask for name in masks if name in layers and layers[name].is_selected}
    return masks | {name: masks[name] & mask.to(masks[name].device) for name, mask in own.items()}


def find_followers(model: nn.Module, layers: Mapping[str, Layer], flow: Callable[[], Flow]) -> list[Follower]:
    """The followers of the layers of which whole outputs are pruned, by the data flow.

    Args:
        model: The model.
        layers: The selected layers.
        flow: Gives the data flow of the model. It is called only if it is needed.
    """
    dropping = {name: layer.weight for name, layer in layers.items() if layer.grouping.drops_outputs}
    if not dropping:
        return []
    producers: dict[str, dict[str, tuple[Tensor, Tensor] | None]] = {}
    for name, weight in dropping.items():
        for bias in _biases(weight):
            producers.setdefault(bias, {})[name] = None
    for (norm, moved), names in flow().norms_behind(model, dropping).items():
        module = model.get_submodule(norm)
        if all(_normalizes_outputs(module, dropping[name], moved) for name in names):
            for attribute in _affine_names(module):
                producers[parameter_name(norm, attribute)] = dict.fromkeys(sorted(names))
    first = {name: dropping[next(iter(those))] for name, those in producers.items()}
    return [
        Follower(name, first[name].out, those, first[name].axes.get("expert", 1)) for name, those in producers.items()
    ]


def _biases(weight: NamedWeight) -> list[str]:
    """Names of the biases that are added to the outputs of a layer; weight_ih_l0 has bias_ih_l0."""
    names: dict[int, str] = {}
    for owner, module in weight.owners:
        shape = (weight.axes["expert"], weight.axes["out"]) if "expert" in weight.axes else (weight.out,)
        for attribute in (weight.attribute.replace("weight", "bias"), f"{weight.attribute}_bias", "bias"):
            bias = getattr(module, attribute, None)
            if isinstance(bias, nn.Parameter) and bias.shape == shape:
                names.setdefault(id(bias), parameter_name(owner, attribute))
                break
    return list(names.values())


def _normalizes_outputs(norm: nn.Module, weight: NamedWeight, moved: bool) -> bool:
    """Whether the affine parameters of a norm layer have one entry per output of the layer before it.

    moved: whether the outputs were moved to the last axis on the way.
    """
    # The outputs of a matrix are the last axis; those of a convolution the second, unless they were moved.
    last = moved or "w" not in weight.axes
    is_over_last = isinstance(norm, NORMS_OVER_LAST_AXIS)
    if is_over_last and not last or not is_over_last and moved:
        return False
    return all(getattr(norm, name).shape == (weight.out,) for name in _affine_names(norm))


def _affine_names(norm: nn.Module) -> list[str]:
    if isinstance(norm, NORMS_OVER_LAST_AXIS):
        return [name for name, _ in norm.named_parameters(recurse=False)]
    return affine_names(norm)


def rescaled_layers(model: nn.Module, layers: Layers, followers: Iterable[Follower]) -> list[str]:
    """The layers whose whole outputs are pruned and go through a batch norm, which undoes their scale."""
    holders = {each: model.get_submodule(each.name.rpartition(".")[0]) for each in followers}
    norms = [each for each, module in holders.items() if isinstance(module, nn.modules.batchnorm._NormBase)]
    rescaled = {name for each in norms for name in each.producers}
    return [name for name in layers if name in rescaled]
