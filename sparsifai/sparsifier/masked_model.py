"""A model and the masks of its weights: applied, recovered from zeros, and measured. `Sparsifier` also builds masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.parallel import reshard
from ..model.zeros import Count
from .followers import Follower, masks_of_followers
from .layer import Layer, count_of, selected
from .mask_building import check_nan
from .masking import with_parameters, zero_gradients, zero_moments, zero_weights
from .optimizer_state import check_reachable


class MaskedModel:
    """A model with a mask for each selected layer, and for the followers of pruned whole outputs.

    Attributes:
        model: The model, without wrappers. None after `release`.
        layers: Parameter name -> `Layer`, for every weight with named axes.
        followers: The biases and norm parameters that are masked with whole outputs.
        follower_masks: Parameter name -> mask, for these.
    """

    def __init__(self, model: nn.Module, layers: dict[str, Layer], followers: Sequence[Follower]):
        self.model: Any = model
        self.layers, self.followers = layers, list(followers)
        self._nan: dict[str, Tensor] = {}  # layer name -> whether scores on a GPU were NaN, at the last update
        self._mask_followers()

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> mask of every selected layer: bool, False where a weight is pruned.

        A mask has the shape of its weight, but size 1 along axes that a group spans.
        """
        return {name: layer.mask for name, layer in self._selected.items()}

    def apply_masks(self, model: nn.Module | None = None) -> None:
        """Set the pruned weights to zero; with whole outputs, their bias and norm entries too. Call it after a step.

        Args:
            model: A copy of the model to apply the masks to instead, such as an AveragedModel.
        """
        self._check_held("apply_masks")
        zero_weights(self.masked_parameters(model))

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero. Call it after backward and before gradient clipping."""
        self._check_held("mask_gradients")
        zero_gradients(self.masked_parameters())

    def mask_moments(self, optimizer: Any) -> None:
        """Set the optimizer's moments of pruned weights to zero, so that these are not moved. Call it after sparsify.

        Args:
            optimizer: torch's or fastai's, or a wrapper that holds one.

        Raises:
            TypeError: It keeps moments where they are not found, or as codes that cannot be set to zero.
        """
        self._check_held("mask_moments")
        check_reachable((parameter for parameter, _ in self.masked_parameters()), optimizer)
        zero_moments(self.masked_parameters(), optimizer)

    @torch.no_grad()
    def recover_masks(self, masks: Mapping[str, Tensor] | None = None) -> None:
        """Take the masks from the zeros of the model, as after loading a bare checkpoint of a sparse model.

        A group is pruned if all its weights are zero. A layer of zeros only, as some are initialized, is not pruned.

        Args:
            masks: Parameter name -> bool tensor that broadcasts to the weight. Given, the groups that are False as a
                whole are pruned in addition to those that are pruned already, and levels stay as they are.
        """
        self._check_held("recover_masks")
        layers = self._selected
        if masks is not None:
            for name in layers.keys() & masks.keys():
                layer = layers[name]
                given = layer.grouping.any_of(masks[name].expand_as(layer.parameter))
                layer.mask = layer.mask_of(layer.kept & given)
        else:
            recovered = {name: layer.with_mask(layer.mask_of_zeros(), 0.0) for name, layer in layers.items()}
            # A layer that was ranked with others can have more or fewer zeros than the level that it was ranked for.
            joint = count_of(recovered.values()).sparsity
            for name, layer in layers.items():
                layer.mask, layer.level = recovered[name].mask, min(recovered[name].count().sparsity, joint)
        self._mask_followers()

    def masked_parameters(self, model: nn.Module | None = None) -> list[tuple[nn.Parameter, Tensor]]:
        """Every parameter with a mask, and the mask on its device.

        Args:
            model: A copy of the model, to return its parameters instead. Default: the model itself.

        Returns:
            Pairs of a parameter and its mask.
        """
        masked = with_parameters(self.model if model is None else model, {**self.masks, **self.follower_masks})
        if model is None:  # each mask is moved once to the device of its parameter
            for name, (_, mask) in masked.items():
                if name in self.follower_masks:
                    self.follower_masks[name] = mask
                else:
                    self.layers[name].mask = mask
        return list(masked.values())

    @property
    def sparsity(self) -> float:
        """Measured sparsity: zeros over weights of the selected layers."""
        self._check_held("sparsity")
        self._check_nan()
        return Count.of(*(layer.parameter for layer in self._selected.values())).sparsity

    def release(self) -> nn.Module:
        """Drop all references to the model. Its zeros stay until it is trained further.

        Returns:
            The model.
        """
        self._check_held("release")
        model = self.model
        self.model, self.layers, self.followers, self._nan = None, {}, [], {}
        self._mask_followers()
        return model

    @property
    def _selected(self) -> dict[str, Layer]:
        return selected(self.layers)

    def _mask_followers(self) -> None:
        self.follower_masks = masks_of_followers(self.followers, self.layers)

    def _check_held(self, operation: str) -> None:
        if self.model is None:
            raise RuntimeError(f"{operation}: this Sparsifier has released its model; make a new one")
        reshard(self.model)

    def _check_nan(self) -> None:
        flags, self._nan = self._nan, {}
        check_nan(flags)
