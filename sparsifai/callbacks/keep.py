"""KeepSparsity: the fastai callback that keeps zeros, in the fit that made them and in later ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..axes.granularity import granularities
from ..model.layers import find_weights, parameter_of
from ..model.parallel import unwrapped, whole
from ..sparsifier.followers import masks_of_followers
from ..sparsifier.layer_selection import find_layers
from ..sparsifier.masking import (
    NEXT_TO_ZERO,
    holds_zeros,
    is_masked_zero,
    parameters_of,
    zero_gradients,
    zero_moments,
    zero_weights,
)
from ..sparsifier.report import Report
from ..sparsifier.sparsifier import Sparsifier
from .base import TrainingCallback

# A few of ten million weights that are drawn at random are exactly zero. Up to this fraction, zeros are no sparsity.
CHANCE = 1e-5

# Every so many steps, means of squares are set to NEXT_TO_ZERO again, before they decay to denormal numbers, which are
# slow: with a decay of 0.9 that takes 480 steps.
REFRESH = 300

# The events in which a callback can change weights within an epoch's training.
_OF_TRAINING = (
    *("before_train", "before_batch", "after_pred", "after_loss", "before_backward", "after_cancel_backward"),
    *("after_backward", "before_step", "after_cancel_step", "after_step", "after_cancel_batch", "after_batch"),
)


class KeepSparsity(TrainingCallback):
    """Keep the zeros of a sparse model zero while it trains. SparsifyCallback leaves one on the Learner.

    In every step it sets the gradients of masked weights to zero, before they are clipped, so that momentum and weight
    decay leave the zeros alone. Where it does not know the optimizer or a callback, it also sets the weights to zero
    after the step.

    Attributes:
        masks: Parameter name -> bool tensor that broadcasts to the parameter, False where it is kept at zero.

    Args:
        sparsifier: The Sparsifier whose masks are kept, as they are now: after another `sparsify`, make a new
            KeepSparsity. By default, the zeros that the model has when a fit begins.

    Raises:
        TypeError: `sparsifier` is no Sparsifier.
    """

    # After MixedPrecision (10) has unscaled the gradients, before GradientClip (11) takes their norm.
    order = 10.5
    run_valid = False

    def __init__(
        self,
        sparsifier=None,  # Whose present masks to keep; by default, the zeros that the model has when a fit begins
    ):
        super().__init__()
        if sparsifier is not None and not isinstance(sparsifier, Sparsifier):
            raise TypeError(f"KeepSparsity: sparsifier is a Sparsifier whose masks are kept, not {sparsifier!r}")
        self.masks: dict[str, Tensor] = {}
        self.held_model: Any = None  # the model of the masks
        self.recovers = sparsifier is None  # whether each fit begins with the zeros of the model
        self.left_by_fit = False  # whether SparsifyCallback has put it on the Learner
        self.announced = False  # whether SparsifyCallback has said so
        self.is_second = False  # whether SparsifyCallback has put another one on the Learner beside it
        self._recovered = False  # whether this fit has begun with the zeros of the model
        self._steps = 0
        self._gradients_zeroed = False  # in this step, for all masked weights
        if sparsifier is not None:
            self.masks, self.held_model = {**sparsifier.masks, **sparsifier.follower_masks}, sparsifier.model

    @property
    def name(self):
        "The name under which the Learner has it. Beside another one it is a second name, which is removed with it."
        return "second_keep_sparsity" if self.is_second else super().name

    def before_fit(self):
        "Zero the masked weights and their moments, which may have been loaded or changed since the last fit"
        self._recovered = False
        if self.held_model is not None and self.held_model is not unwrapped(self.learn.model):
            raise ValueError(
                "KeepSparsity keeps the zeros of another model than the Learner's; take it off with "
                "learn.remove_cb(KeepSparsity), or use KeepSparsity() to keep the zeros of this model"
            )
        if not is_masked_zero(self._masked()):
            warnings.warn(
                "KeepSparsity: masked weights were changed or loaded since they were zero, and are set to zero again; "
                "to keep the new values, call learn.remove_cb(KeepSparsity) before the fit",
                stacklevel=2,
            )
        self.enforce()

    def before_batch(self):
        "When the fit begins, take the masks from the zeros of the model; later, zero what a callback may have moved"
        if not self.recover() and not self._is_alone():
            zero_weights(self._masked())

    def before_step(self):
        "Zero the gradients of masked weights"
        self._gradients_zeroed = zero_gradients(self._masked())

    def after_step(self):
        "Zero the masked weights, if the optimizer may have moved them"
        masked = self._masked()
        if not (self._gradients_zeroed and self._is_alone() and self._steps_hold(masked)):
            zero_weights(masked)
        self._gradients_zeroed = False
        self._steps += 1
        if self._steps % REFRESH == 0:
            zero_moments(masked, self.learn.opt, squares=NEXT_TO_ZERO)

    def _steps_hold(self, masked: list[tuple[nn.Parameter, Tensor]]) -> bool:
        """Whether the optimizer is known to leave zeros alone, and steps the weights themselves, not copies of them."""
        stepped = {id(parameter) for parameter in parameters_of(self.learn.opt)}
        return holds_zeros(self.learn.opt) and all(id(parameter) in stepped for parameter, _ in masked)

    def _is_alone(self) -> bool:
        """Whether all callbacks that see training are fastai's or sparsifai's own, which change no weights."""
        return not any(
            event in vars(callback) or (hasattr(type(callback), event) and not _is_known(type(callback)))
            for callback in self.learn.cbs
            for event in _OF_TRAINING
        )

    def before_train(self):
        "Zero the masked weights and their moments, which a callback may have loaded"
        self.enforce()

    def after_train(self):
        "Zero the masked weights, which a callback may have moved"
        zero_weights(self._masked())

    def apply_masks(
        self,
        model,  # A copy of the model, such as its torch.optim.swa_utils.AveragedModel
    ):
        "Zero the masked weights of a copy of the model"
        zero_weights(self._masked(model))

    def report(self):
        "Measured zeros of the layers that have masks, and of the whole model: a `Report`"
        return Report.of(unwrapped(self.learn.model), self.masks)

    def enforce(self) -> None:
        "Zero the masked weights, and what the optimizer keeps of them"
        masked = self._masked()
        zero_weights(masked)
        if self.learn.opt is not None:
            zero_moments(masked, self.learn.opt, squares=NEXT_TO_ZERO)

    def begin(self) -> None:
        "Keep the masks that are given from now on, and not the zeros that the model has when the fit begins"
        self._recovered, self.held_model = True, unwrapped(self.learn.model)

    def recover(self, force: bool = False) -> bool:
        "Take the masks from the zeros of the model, once in a fit; whether it did. With `force`, in any case."
        if not force and (self._recovered or not self.recovers):
            return False
        self.begin()
        masks, zeros, weights = {}, 0, 0
        for name, weight in find_weights(self.held_model).items():
            kept = whole(weight.parameter.detach()) != 0
            # A layer of zeros only, as some are initialized, is not a sparse one.
            if kept.any() and not weight.sources:
                kept = kept | ~self.masks[name] if name in self.masks else kept
                zeros, weights = zeros + int((~kept).sum()), weights + kept.numel()
                if not kept.all():
                    masks[name] = kept
        with_filters = any(map(_has_zero_filters, masks.values()))
        if zeros > CHANCE * weights or with_filters:
            self.masks = merged(self.masks, masks)
        if with_filters:  # of filters that were masked before, the followers are masked, too
            self._recover_followers()
        self.enforce()
        return True

    def _recover_followers(self) -> None:
        """Where whole filters are zero, keep the zeros in their biases and norm layers, too."""
        model = unwrapped(self.learn.model)
        computed = [name for name, weight in find_weights(model).items() if weight.sources]
        layers, followers, _ = find_layers(
            model, granularities["filter"], layers=lambda name, module: True, exclude=computed or None,
            example_input=self.learn.xb,
        )  # fmt: skip
        zeros = {
            name: layer.with_mask(layer.mask_of_zeros(), 0.0) for name, layer in layers.items() if layer.is_selected
        }
        for name, mask in masks_of_followers(followers, zeros).items():
            kept = mask | (parameter_of(model, name, mask).detach() != 0)
            self.masks = merged(self.masks, {name: kept})

    def keeps(self, masks: Mapping[str, Tensor]) -> bool:
        "Whether all that these masks prune is kept at zero"
        return all(
            name in self.masks and not (self.masks[name].to(mask.device) & ~mask).any() for name, mask in masks.items()
        )

    @property
    def masks_something(self) -> bool:
        "Whether there is any zero to keep"
        return not all(mask.all() for mask in self.masks.values())

    def _masked(self, model: nn.Module | None = None) -> list[tuple[nn.Parameter, Tensor]]:
        masked = []
        for name, mask in self.masks.items():
            parameter = parameter_of(self.learn.model if model is None else model, name, mask)
            if mask.device != parameter.device:
                mask = mask.to(parameter.device)
                if model is None:
                    self.masks[name] = mask
            masked.append((parameter, mask))
        return masked


def merged(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that prune what either prunes: {name: mask & other}."""
    both = {name: masks[name] & mask.to(masks[name].device) for name, mask in others.items() if name in masks}
    return {**masks, **others, **both}


def _is_known(kind: type) -> bool:
    return kind.__module__.split(".")[0] in ("fastai", "sparsifai")


def _has_zero_filters(kept: Tensor) -> bool:
    """Whether a whole row of the first axis is zero."""
    return not bool(kept.flatten(1).any(1).all())
