"""A masked model in straight-through training: what users call, and how masks and dense weights change together."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ..support.warning import warn
from .change import Change
from .dense_checks import SETTLED_UNPRUNED
from .masked_model import MaskedModel
from .masking import NEXT_TO_ZERO, moments_to_zero


class StraightThroughModel(MaskedModel):
    """A model with masks that can change their mind, as long as its dense weights are kept beside the sparse ones."""

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
            >>> import torch
            >>> from torch import nn
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
        masked = self._masked() if optimizer is None else self._reachable(optimizer)
        if self.is_straight_through and not self._dense.values:
            warn(SETTLED_UNPRUNED)
        self.apply_masks()
        moments = {} if optimizer is None else moments_to_zero(masked, optimizer, squares=NEXT_TO_ZERO)
        self._take(Change(attributes=[(self._dense, self._dense.changed(settled=True))], moments=moments, zeroes=True))

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero. Call it after backward and before gradient clipping.

        With straight_through the gradients of pruned weights stay, because they move the dense weights: decay times the
        dense weight is added to them, and gradient_sparsity sets the lowest ones to zero.

        Raises:
            ValueError: With straight_through and a decay, a gradient is a sparse tensor.
        """
        if not self.is_straight_through:
            super().mask_gradients()
            return
        self._check_held("mask_gradients")
        self._take_up_recovered()
        self._dense.mask_gradients(self._selected)

    def mask_moments(self, optimizer: Any) -> None:
        """Set the optimizer's moments of pruned weights to zero, so that these are not moved. Call it after sparsify.

        With straight_through nothing is set until `settle`, because the moments move the dense weights.

        Args:
            optimizer: torch's or fastai's, or a wrapper that holds one.

        Raises:
            TypeError: It keeps moments where they are not found, or as codes that cannot be set to zero.
        """
        if not self.is_straight_through:
            super().mask_moments(optimizer)
            return
        self._check_held("mask_moments")
        self._reachable(optimizer)  # `settle` will set them

    def _written(self, change: Change) -> Change:
        """A change of masks, which takes the weights that are kept next from the dense ones, if there are any."""
        kept = bool(self._dense.values) or any(layer.level for layer in change.layers.values())
        return replace(change, from_dense=self.is_straight_through and kept)
