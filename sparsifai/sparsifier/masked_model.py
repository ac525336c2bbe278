"""A model and the masks of its weights: applied, recovered from zeros, and measured. `Sparsifier` also builds masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.parallel import reshard
from ..model.zeros import Count
from .change import Change
from .dense_weights import DenseWeights
from .findings import Finding, check_found
from .followers import Follower
from .layer import Layer, count_of, selected
from .masking import (
    masked_parameters,
    zero_found,
    zero_gradients,
    zero_moments,
    zero_weights,
)
from .model_masks import ModelMasks
from .optimizer_state import check_reachable


class MaskedModel:
    """A model with a mask for each selected layer, and for the followers of pruned whole outputs.

    Attributes:
        model: The model, without wrappers. None after `release`.
        layers: Parameter name -> `Layer`, for every weight with named axes.
        all_masks: Parameter name -> mask, of the selected layers, and of the biases and norm parameters that are masked
            with whole outputs.
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, Layer], followers: Sequence[Follower], decay: float | None = None
    ):
        self.model: Any = model
        self.layers, self.all_masks = layers, ModelMasks(layers, followers)
        self._dense = DenseWeights(model, self.all_masks, decay)
        self._found: dict[Finding, Tensor] = {}  # what was found in scores on a GPU and is not read yet
        self._change: Change | None = None  # what an interrupted call has not finished

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
        masked = dict(zip(self.all_masks, self._masked(model), strict=True))
        if model is None:
            self._dense.refresh(by_value=True)  # sets pruned weights to zero that have dense ones
            for name in self._dense.values:
                del masked[name]
        zero_weights(masked.values())

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero. Call it after backward and before gradient clipping."""
        self._check_held("mask_gradients")
        zero_gradients(self._masked())

    def mask_moments(self, optimizer: Any) -> None:
        """Set the optimizer's moments of pruned weights to zero, so that these are not moved. Call it after sparsify.

        Args:
            optimizer: torch's or fastai's, or a wrapper that holds one.

        Raises:
            TypeError: It keeps moments where they are not found, or as codes that cannot be set to zero.
        """
        self._check_held("mask_moments")
        zero_moments(self._reachable(optimizer), optimizer)

    def _reachable(self, optimizer: Any) -> list[tuple[nn.Parameter, Tensor]]:
        """Every parameter with a mask, and its mask.

        Raises:
            TypeError: The optimizer keeps moments of one of them where they are not found, or as codes.
        """
        masked = self._masked()
        check_reachable((parameter for parameter, _ in masked), optimizer)
        return masked

    @torch.no_grad()
    def recover_masks(self) -> None:
        """Take the masks from the zeros of the model, as after loading a bare checkpoint of a sparse model.

        A group is pruned if all its weights are zero. A layer of zeros only, as some are initialized, is not pruned.
        """
        self._check_held("recover_masks")
        layers = self._with_masks({name: layer.mask_of_zeros() for name, layer in self._selected.items()})
        self._take(Change(layers, self.all_masks.followers_of(layers), [(self._dense, self._dense.changed())]))
        # Biases and norm layers stay as they are until apply_masks. Of weights, -0.0 becomes 0.0 as in all masks.
        zero_weights([(layer.parameter, layer.mask) for layer in layers.values()])

    def _with_masks(self, masks: Mapping[str, Tensor]) -> dict[str, Layer]:
        """Some layers with other masks, and with the sparsities that these have for levels."""
        layers = self._selected
        changed = {name: layers[name].with_mask(mask, 0.0) for name, mask in masks.items()}
        # A layer that was ranked with others can have more or fewer zeros than the level that it was ranked for.
        joint = count_of((layers | changed).values()).sparsity
        return {name: replace(layer, level=min(layer.count().sparsity, joint)) for name, layer in changed.items()}

    # --- Changes ------------------------------------------------------------------------------------------------

    def _take(self, change: Change, newly: Any = None) -> None:
        """Carry out a change.

        Args:
            change: The change.
            newly: The weights that it sets to zero, or takes from the dense weights, if it is known that it leaves the
                others as they are.
        """
        if change.from_dense:
            self._dense.take_up()
            newly = newly if self._dense.refresh(by_value=newly is None) else None
        self._change = change  # from here on it will be carried out, in the next call if this one is interrupted
        self._carry_out(change, newly)
        self._change = None

    def _finish(self) -> None:
        """Carry out a change that an interrupt or an error has left in the middle."""
        if self._change is not None:
            self._take(self._change)

    @torch.no_grad()
    def _carry_out(self, change: Change, newly: Any = None) -> None:
        """Change what a change says. If it was done before, in whole or in part, it is the same in the end."""
        if change.from_dense:
            self._dense.is_whole = True
        self.layers.update(change.layers)
        if change.followers is not None:
            self.all_masks.of_followers = dict(change.followers)
        for holder, attributes in change.attributes:
            vars(holder).update(attributes)
        for parameter, values in change.weights:
            parameter.copy_(values)
        if change.from_dense:
            self._dense.write(newly)
        elif change.zeroes:
            zero_weights(self._masked() if newly is None else newly)
        zero_found(change.moments)

    @property
    def sparsity(self) -> float:
        """Measured sparsity: zeros over weights of the selected layers."""
        self._check_held("sparsity")
        self._check_found()
        return Count.of(*(layer.parameter for layer in self._selected.values())).sparsity

    def release(self) -> nn.Module:
        """Drop all references to the model. Its zeros stay until it is trained further.

        Returns:
            The model.
        """
        self._check_held("release", finish=False)
        model = self.model
        self.model, self.layers, self._found, self._change = None, {}, {}, None
        self.all_masks = ModelMasks({}, [])
        self._dense = DenseWeights(None, self.all_masks)
        return model

    @property
    def _selected(self) -> dict[str, Layer]:
        return selected(self.layers)

    def _masked(self, model: nn.Module | None = None) -> list[tuple[nn.Parameter, Tensor]]:
        """Every parameter with a mask, and its mask. model: a copy of the model, to find its parameters instead."""
        return masked_parameters(self.model if model is None else model, self.all_masks, move=model is None)

    def _check_held(self, operation: str, finish: bool = True) -> None:
        """Check that there is a model. finish: whether to finish first what an interrupted call has begun."""
        if self.model is None:
            raise RuntimeError(f"{operation}: this Sparsifier has released its model; make a new one")
        self._check_sparse(operation)
        reshard(self.model)
        if finish:
            self._finish()

    def _check_sparse(self, operation: str) -> None:
        if self._dense.is_in_place:
            raise RuntimeError(
                f"{operation}: the model has its dense weights inside `with sparsifier.dense_weights():`; call it "
                "outside of this block"
            )

    def _check_found(self) -> None:
        found, self._found = self._found, {}
        check_found(found)
