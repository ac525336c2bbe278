"""All zeros that a training keeps: those that its Sparsifiers have pruned, and those that the model had before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..gradual.gradual_sparsifier import GradualSparsifier, adopted
from ..model.parallel import unwrapped
from ..sparsifier.masking import (
    NEXT_TO_ZERO,
    masked_parameters,
    zero_gradients,
    zero_moments,
    zero_weights,
)
from ..sparsifier.model_masks import merged
from ..sparsifier.recovery import recovered_masks
from ..support.warning import warn


class KeptZeros:
    """Keeps all masked weights of a model at zero: their gradients, their moments, and the weights themselves.

    Attributes:
        model: The model.
        optimizer: The optimizer that steps it.
        gradual: The Sparsifiers of the training.
        others: Parameter name -> mask of the zeros that the model had before. They are never revived.
    """

    def __init__(self, model: nn.Module, optimizer: Any, gradual: Sequence[GradualSparsifier]):
        self.model, self.optimizer, self.gradual = model, optimizer, gradual
        self.others: dict[str, Tensor] = {}

    def recover(self, example_input: Any) -> None:
        """Keep the zeros of a model that is sparse already.

        Args:
            example_input: A batch, for models that torch.fx cannot trace, or None.
        """
        others = recovered_masks(unwrapped(self.model), {}, example_input)
        for each in self.gradual:
            if each.pruning.ramp.falls_after(0.0, 0.0):
                each.sparsifier.recover_masks()  # this schedule pruned them, and will revive them
                others = {name: mask for name, mask in others.items() if name not in each.sparsifier.all_masks}
        self.keep(others)
        for each in self.gradual:
            if each.pruning.regrows:
                regrowing = adopted(each.sparsifier, self.others)
                self.others = {name: mask for name, mask in self.others.items() if name not in regrowing}

    def keep(self, others: dict[str, Tensor]) -> None:
        """Keep these zeros, beside those of the Sparsifiers.

        Args:
            others: Parameter name -> mask.
        """
        self.others = others
        masked_parameters(self.model, others, move=True)  # moves them to where the model is
        for each in self.gradual:
            each.sparsifier.all_masks.fixed = {}
            each.sparsifier.all_masks.add(others)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> mask of everything that is kept at zero."""
        masks: dict[str, Tensor] = {}
        for each in self.gradual:
            masks = merged(masks, each.sparsifier.all_masks)
        return merged(masks, self.others)

    def warn_of_fixed(self) -> None:
        """Warn of zeros that straight-through training would let come back, but that were there before."""
        for each in self.gradual:
            layers = each.sparsifier.layers
            names = [name for name in self.others if name in each.sparsifier.masks]
            fixed = sum(layers[name].count(self.others[name]).zeros for name in names)
            if fixed and each.changes_its_mind:
                warn(
                    f"{fixed:,} weights were zero before this training and stay so, though straight_through= lets "
                    "others come back; to resume a training in which all can, load the state_dict of its manager"
                )

    def mask_gradients(self) -> None:
        """Set the gradients of masked weights to zero, but those that move dense weights."""
        zero_gradients(self._unmoved())

    def apply(self) -> None:
        """Set all masked weights to zero."""
        for each in self.gradual:
            each.sparsifier.apply_masks()
        zero_weights(masked_parameters(self.model, self.others, move=True))

    def mask_moments(self) -> None:
        """Set the moments of masked weights to zero, but those that move dense weights."""
        zero_moments(self._unmoved(), self.optimizer, squares=NEXT_TO_ZERO)

    def enforce(self) -> None:
        """Set masked weights and their moments to zero."""
        self.apply()
        self.mask_moments()

    def _unmoved(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters and masks of what neither a gradient nor a moment may move."""
        masks: list[Any] = [each.sparsifier.all_masks for each in self.gradual if not each.changes_its_mind]
        return [pair for each in (*masks, self.others) for pair in masked_parameters(self.model, each, move=True)]
