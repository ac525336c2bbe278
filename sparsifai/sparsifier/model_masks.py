"""All masks of a model by parameter name, and how two sets of masks are compared and joined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from .followers import Follower, masks_of_followers
from .layer import Layer, Layers, selected


class ModelMasks(MutableMapping[str, Tensor]):
    """Parameter name -> mask, of the selected layers and of the followers of their whole outputs.

    It shows the masks that the layers have at present. A mask can be replaced, but none can be added or removed.

    Args:
        layers: Parameter name -> `Layer`.
        followers: The biases and norm parameters that are masked with whole outputs.

    Attributes:
        of_followers: Parameter name -> mask, of the followers.
        fixed: Parameter name -> mask of what `add` has pruned, which is never kept again.
    """

    def __init__(self, layers: dict[str, Layer], followers: Sequence[Follower]):
        self.layers, self.followers = layers, followers
        self.fixed: dict[str, Tensor] = {}
        self.of_followers = self.followers_of({})

    def followers_of(self, changed: Layers) -> dict[str, Tensor]:
        """The masks of the followers if these layers replace those of the same names."""
        return masks_of_followers(self.followers, {**self.layers, **changed})

    def add(self, masks: Mapping[str, Tensor]) -> None:
        """Also prune the groups that other masks prune as a whole, in the layers that are pruned at all."""
        pruned = selected(self.layers)
        changed = {}
        for name in pruned.keys() & masks.keys():
            layer = pruned[name]
            kept = layer.kept & layer.grouping.any_of(masks[name].expand_as(layer.parameter))
            changed[name] = layer.with_mask(layer.mask_of(kept), layer.level)
        of_followers, fixed = self.followers_of(changed), merged(self.fixed, masks)
        self.layers.update(changed)
        self.of_followers, self.fixed = of_followers, fixed

    def widest(self, layer: Layer) -> Tensor:
        """The mask of a layer that keeps all groups but those that `add` has pruned."""
        if layer.name not in self.fixed:
            return torch.ones_like(layer.mask)
        return layer.mask_of(layer.grouping.any_of(self.fixed[layer.name].expand_as(layer.parameter)))

    def __getitem__(self, name: str) -> Tensor:
        if name in self.of_followers:
            return self.of_followers[name]
        if name in self.layers and self.layers[name].is_selected:
            return self.layers[name].mask
        raise KeyError(name)

    def __setitem__(self, name: str, mask: Tensor) -> None:
        if name in self.of_followers:
            self.of_followers[name] = mask
        else:
            self.layers[name].mask = mask

    def __delitem__(self, name: str) -> None:
        raise TypeError("the masks of a Sparsifier cannot be removed; make a Sparsifier with exclude=")

    def __iter__(self) -> Iterator[str]:
        yield from selected(self.layers)
        yield from self.of_followers

    def __len__(self) -> int:
        return len(selected(self.layers)) + len(self.of_followers)


def merged(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks that prune what either prunes: {name: mask & other}."""
    both = {name: masks[name] & mask.to(masks[name].device) for name, mask in others.items() if name in masks}
    return {**masks, **others, **both}


def prunes(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether `masks` prune all weights that `others` prune."""
    return all(name in masks and not (masks[name].to(mask.device) & ~mask).any() for name, mask in others.items())


def prune_any(masks: Mapping[str, Tensor]) -> bool:
    """Whether any weight is pruned."""
    return not all(mask.all() for mask in masks.values())
