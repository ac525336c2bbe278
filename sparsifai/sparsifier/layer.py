"""The record of one layer: its weight, how it is grouped, its mask and its level."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.layers import NamedWeight
from ..model.parallel import is_sharded
from ..model.tensors import check_values
from ..model.zeros import Count, is_nonzero

# Why a layer stays dense whose weight needs no gradient at present. It is selected once that has changed.
FROZEN = "frozen"

# Which filters are coupled is found once, so layers that are frozen then are never pruned. Nor are layers whose joint
# groups have weights in other layers that stay dense.
FROZEN_UNCOUPLED = "frozen when coupled filters or joint groups were found"


@dataclass(eq=False)
class Layer:
    """A weight with named axes, and what a Sparsifier knows of it.

    Attributes:
        weight: The named weight: its parameter, its axes, and the modules that hold it.
        grouping: How the granularity groups the weight. None if the layer cannot have the granularity.
        why_dense: Why the layer stays dense. Empty for a selected layer, which is pruned.
        mask: Bool tensor, False where a weight is pruned. It has the shape of the weight, but size 1 along axes that
            a group spans. A layer that stays dense keeps everything.
        level: The sparsity that the layer was last pruned to, as it was asked for.
    """

    weight: NamedWeight
    grouping: Any  # a Grouping for every selected layer
    why_dense: str
    mask: Tensor
    level: float = 0.0

    @classmethod
    def dense(cls, weight: NamedWeight, grouping: Any, why_dense: str) -> Layer:
        """A layer that keeps all its weights, because it stays dense or because nothing is pruned yet."""
        layer = cls(weight, grouping, why_dense, torch.ones([1] * weight.parameter.dim(), dtype=torch.bool))
        return layer.as_selected() if grouping is not None and not why_dense else layer

    @property
    def name(self) -> str:
        """Name of the parameter, such as 'layer1.0.conv1.weight'."""
        return self.weight.name

    @property
    def parameter(self) -> nn.Parameter:
        """The weight itself. It is looked up at each use."""
        return self.weight.parameter

    @property
    def is_selected(self) -> bool:
        """Whether the layer is pruned."""
        return not self.why_dense

    @property
    def kept(self) -> Tensor:
        """Bool per group: whether the mask keeps it."""
        return self.grouping.gather(self.mask)

    @property
    def kept_outputs(self) -> Tensor:
        """Bool per output of the layer, for groups that are made of whole outputs: whether the mask keeps it."""
        if not self.is_selected:
            return torch.ones(self.weight.out, dtype=torch.bool, device=self.parameter.device)
        return self.grouping.outputs(self.kept, self.weight.out)

    def mask_of(self, kept: Tensor) -> Tensor:
        """The mask that keeps these groups (bool per group), on the device and in the memory order of the weight."""
        parameter = self.parameter
        mask = self.grouping.spread(kept).to(parameter.device)
        if mask.shape == parameter.shape and not is_sharded(parameter) and mask.stride() != parameter.stride():
            # In another memory order than its weight, a mask is slow to apply.
            return torch.empty_like(parameter.detach().as_subclass(Tensor), dtype=torch.bool).copy_(mask)
        return mask

    def mask_of_zeros(self) -> Tensor:
        """The mask that prunes the groups whose weights are all zero; nothing in a layer that is zero as a whole."""
        check_values("recover_masks", {self.name: self.parameter})
        kept = self.grouping.any_of(is_nonzero(self.parameter))
        return self.mask_of(kept if kept.any() else torch.ones_like(kept))

    def as_selected(self) -> Layer:
        """The same layer, but pruned from now on."""
        return replace(self, why_dense="", mask=self.mask_of(self.grouping.all_kept()))

    def count(self, mask: Tensor | None = None) -> Count:
        """The zeros of a mask, by default its own, in the shape of the weight."""
        return Count.of((self.mask if mask is None else mask).expand_as(self.parameter))

    def with_mask(self, mask: Tensor, level: float) -> Layer:
        """The same layer with another mask and level."""
        return replace(self, mask=mask, level=level)


Layers = Mapping[str, Layer]


def selected(layers: Layers) -> dict[str, Layer]:
    """The layers that are pruned, in the order of the model."""
    return {name: layer for name, layer in layers.items() if layer.is_selected}


def unfrozen(layers: Layers) -> list[str]:
    """Names of the layers that were frozen when the layers were selected, and are trained now."""
    return [name for name, layer in layers.items() if layer.why_dense == FROZEN and not layer.weight.is_frozen]


def count_of(layers: Iterable[Layer]) -> Count:
    """The zeros of the masks of several layers."""
    counts = [layer.count() for layer in layers]
    return Count(sum(count.weights for count in counts), sum(count.zeros for count in counts))


def level_of(layers: Iterable[Layer]) -> float:
    """The mean of the levels of several layers, by the number of their weights."""
    sizes = [(layer.level, layer.parameter.numel()) for layer in layers]
    return sum(level * size for level, size in sizes) / sum(size for _, size in sizes)
