"""A model and the masks of its weights: applied, recovered from zeros, and measured. `Sparsifier` also builds masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.parallel import reshard
from ..model.zeros import Count
from ..support.warning import warn
from .change import Change
from .dense_weights import SETTLED_UNPRUNED, DenseWeights
from .findings import Finding, check_found
from .followers import Follower
from .layer import Layer, count_of, selected
from .masking import (
    NEXT_TO_ZERO,
    masked_parameters,
    moments_to_zero,
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
        if model is None:
            self._dense.refresh(by_value=True)
        zero_weights(self._masked(model))
        if model is None:
            self._dense.note()

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero. Call it after backward and before gradient clipping.

        With straight_through the gradients of pruned weights stay, because they move the dense weights: decay times the
        dense weight is added to them, and gradient_sparsity sets the lowest ones to zero.

        Raises:
            ValueError: With straight_through and a decay, a gradient is a sparse tensor.
        """
        self._check_held("mask_gradients")
        if self.is_straight_through:
            self._take_up_recovered()
            self._dense.mask_gradients(self._selected)
        else:
            zero_gradients(self._masked())

    def mask_moments(self, optimizer: Any) -> None:
        """Set the optimizer's moments of pruned weights to zero, so that these are not moved. Call it after sparsify.

        With straight_through nothing is set until `settle`, because the moments move the dense weights.

        Args:
            optimizer: torch's or fastai's, or a wrapper that holds one.

        Raises:
            TypeError: It keeps moments where they are not found, or as codes that cannot be set to zero.
        """
        self._check_held("mask_moments")
        masked = self._masked()
        check_reachable((parameter for parameter, _ in masked), optimizer)
        if not self.is_straight_through:
            zero_moments(masked, optimizer)

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

    # --- Straight-through training ------------------------------------------------------------------------------

    @property
    def is_straight_through(self) -> bool:
        """Whether masks are ranked from dense weights, so that they can change their mind. Not after `settle`."""
        return self._dense.are_ranked

    def dense_weights(self) -> AbstractContextManager[None]:
        """Let the model have its dense weights in a `with` block. Put the optimizer's step into it, and nothing else.

        At the end of the block the model has the sparse weights again. The gradients, which were taken at the sparse
        weights, have moved the dense ones as if they had been taken there: a straight-through estimator (Bengio et al.,
        2013, arXiv:1308.3432). Without straight_through, and after `settle`, the block changes nothing.

        An optimizer that calls a closure in its step, such as LBFGS, cannot be used, because the closure would see the
        dense model. Remaining weights that are written through `.data`, as by `weight.data.clamp_`, keep the new values
        only if `apply_masks` or `sparsify` is called before the block: torch does not count these writes.

        Returns:
            A context manager, for `with`.

        Raises:
            RuntimeError: A backward pass is made in the block.

        Example:
            >>> from sparsifai import Sparsifier
            >>> model = nn.Linear(4, 2)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> sparsifier = Sparsifier(model, straight_through=True)
            >>> for sparsity in (0.25, 0.5):
            ...     model(torch.ones(3, 4)).sum().backward()
            ...     sparsifier.mask_gradients()
            ...     with sparsifier.dense_weights():
            ...         optimizer.step()
            ...     sparsifier.sparsify(sparsity)
            ...     optimizer.zero_grad()
            >>> sparsifier.settle(optimizer)
            >>> sparsifier.sparsity
            0.5
        """
        self._check_held("dense_weights")
        self._take_up_recovered()
        return self._dense.stepped()

    def _take_up_recovered(self) -> None:
        """Keep the weights as dense ones where masks were recovered, so that a step leaves the model sparse."""
        if self.is_straight_through and not self._dense.values and any(each.level for each in self._selected.values()):
            self.apply_masks()
            self._dense.take_up()

    def settle(self, optimizer: Any = None) -> None:
        """Fix the masks as they are, and drop the dense weights. From here on, training is that of a sparse model.

        Call it after the last mask update. The masks do not change their mind again, and the block of `dense_weights`
        changes nothing.

        Args:
            optimizer: torch's or fastai's, whose moments of pruned weights are set to zero; or None.

        Raises:
            TypeError: The optimizer keeps moments where they are not found, or as codes that cannot be set to zero.
            ValueError: The Sparsifier was made without straight_through.
        """
        self._check_held("settle")
        if self._dense.decay is None:
            raise ValueError("settle: this Sparsifier has no dense weights; make it with straight_through=True")
        if optimizer is not None:
            check_reachable((parameter for parameter, _ in self._masked()), optimizer)
        if self.is_straight_through and not self._dense.values:
            warn(SETTLED_UNPRUNED)
        self.apply_masks()
        moments = {} if optimizer is None else moments_to_zero(self._masked(), optimizer, squares=NEXT_TO_ZERO)
        self._take(Change(attributes=[(self._dense, self._dense.changed(settled=True))], moments=moments, zeroes=True))

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
