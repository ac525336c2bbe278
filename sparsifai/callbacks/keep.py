"""KeepSparsity: the fastai callback that holds zeros, in the fit that made them and in later ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor, nn

from ..model.layers import find_weights, parameter_of
from ..model.parallel import unwrapped, whole
from ..sparsifier.masking import (
    NEXT_TO_ZERO,
    holds_zeros,
    is_masked_zero,
    parameters_of,
    zero_gradients,
    zero_moments,
    zero_weights,
)
from ..sparsifier.sparsifier import Sparsifier
from .base import TRAINING_EVENTS, TrainingCallback

# Of ten million weights that are drawn at random a few are exactly zero. A share of zeros up to this is no sparsity.
CHANCE = 1e-5

# Steps in which means of squares do not decay from NEXT_TO_ZERO to denormal numbers, which would be slow: with a decay
# of 0.9 that takes 480 steps.
REFRESH = 300


class KeepSparsity(TrainingCallback):
    "Keep the zeros of a sparse model zero while it trains; SparsifyCallback leaves one on the Learner"

    # After MixedPrecision (10) has unscaled the gradients, before GradientClip (11) takes their norm.
    order = 10.5

    def __init__(
        self,
        sparsifier=None,  # Whose masks to keep; by default, the zeros that the model has when a fit begins
    ):
        super().__init__()
        if sparsifier is not None and not isinstance(sparsifier, Sparsifier):
            raise TypeError(f"KeepSparsity keeps the masks of a Sparsifier, not {sparsifier!r}")
        self.sparsifier: Sparsifier | None = sparsifier
        self.held_model = None if sparsifier is None else sparsifier.model
        self.recovers = sparsifier is None
        self.earlier: dict[str, Tensor] = {}  # masks of earlier Sparsifiers, by parameter name
        self.steps = 0
        self.gradients_zeroed = False  # those of masked weights, in this step
        self.begun = False  # whether the fit is past its first batch
        self.stays = False  # whether a fit has left it on the Learner
        self.looks: Callable[[], None] | None = None  # what is called in a step while its gradients are dense
        self.replaced = False  # whether another one on the Learner keeps what it has kept

    @property
    def name(self):
        "Under which the Learner has it; one that was replaced gives the name up"
        return "replaced_keep_sparsity" if self.replaced else super().name

    def before_fit(self):
        "Zero the masked weights and their moments, which may have been loaded or changed since the last fit"
        if self.learn.lock.locked():  # validate and the like change nothing
            return
        self.begun, self.looks = False, None
        if self.held_model is not None and self.held_model is not unwrapped(self.learn.model):
            raise ValueError(
                "KeepSparsity holds the zeros of another model than the Learner's; take it off with "
                "learn.remove_cb(KeepSparsity), or give it no Sparsifier to keep the zeros of this one"
            )
        if not is_masked_zero(self._masked()):
            warnings.warn(
                "KeepSparsity: masked weights were changed or loaded since they were zero, and are set to zero again; "
                "call learn.remove_cb(KeepSparsity) before, if they shall stay",
                stacklevel=2,
            )
        self.enforce()

    def before_batch(self):
        "When the fit begins, take the masks from the zeros of the model, if they were not given; keep to them later"
        if self.recovers and not self.begun and self.learn.training:
            self.recover()
        elif self.learn.training and not self.is_alone():
            zero_weights(self._masked())

    def before_step(self):
        "Zero the gradients of masked weights, once what looks at them has seen them"
        if self.looks is not None:
            self.looks()
        self.gradients_zeroed = zero_gradients(self._masked())

    def after_step(self):
        "Zero the masked weights, if the optimizer may have moved them"
        masked = self._masked()
        if not (self.gradients_zeroed and self.is_alone() and self._steps_hold(masked)):
            zero_weights(masked)
        self.gradients_zeroed = False
        self.steps += 1
        if self.steps % REFRESH == 0:
            zero_moments(masked, self.learn.opt, squares=NEXT_TO_ZERO)

    def _steps_hold(self, masked: list[tuple[nn.Parameter, Tensor]]) -> bool:
        """Whether the optimizer is known to leave zeros alone, and steps the weights themselves, not copies of them."""
        stepped = {id(parameter) for parameter in parameters_of(self.learn.opt)}
        return holds_zeros(self.learn.opt) and all(id(parameter) in stepped for parameter, _ in masked)

    def is_alone(self) -> bool:
        "Whether no callback may change weights within an epoch's training: all are fastai's and sparsifai's"
        return not any(
            event in vars(callback) or (hasattr(type(callback), event) and not _is_known(type(callback)))
            for callback in self.learn.cbs
            for event in TRAINING_EVENTS
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
        "Zero what is masked in a copy of the model"
        zero_weights(self._masked(model))

    def recover(self) -> None:
        """Take the zeros that the model has, and that no Sparsifier masks, for masked."""
        model = unwrapped(self.learn.model)
        self.begun, self.held_model = True, model
        held = {} if self.sparsifier is None else self.sparsifier.masks
        masks, zeros, weights = {}, 0, 0
        for name, target in find_weights(model).items():
            kept = whole(target.parameter.detach()) != 0
            # A layer of nothing but zeros, as some are initialized, is not a masked one.
            if kept.any() and not target.sources:
                kept = kept | ~held[name] if name in held else kept
                zeros, weights = zeros + int((~kept).sum()), weights + kept.numel()
                if not kept.all():
                    masks[name] = kept
        if zeros > CHANCE * weights or any(map(_has_dead_filters, masks.values())):
            self._merge(masks)
        if any(map(_has_dead_filters, self.earlier.values())):
            self._recover_dead_filters(model)
        self.enforce()

    def _recover_dead_filters(self, model: nn.Module) -> None:
        """Where whole filters are zero, what stands behind them and is zero too is kept so."""
        computed = [name for name, target in find_weights(model).items() if target.sources]
        filters = Sparsifier(
            model, "filter", layers=lambda name, module: True, exclude=computed or None, example_input=self.learn.xb
        )
        filters.recover_masks()
        for name, mask in filters.follower_masks.items():
            self.earlier[name] = mask | (parameter_of(model, name, mask).detach() != 0)

    def hold(self, sparsifier: Sparsifier) -> None:
        "Keep the masks of `sparsifier` from now on, which starts with the zeros that were kept until now"
        if self.sparsifier not in (None, sparsifier):
            self._merge(self.sparsifier.masks, self.sparsifier.follower_masks)
        self.sparsifier, self.held_model, self.begun = sparsifier, sparsifier.model, True
        sparsifier.adopt(self.earlier)
        if sparsifier.regrowth is not None:
            # What it has taken over is its own to move.
            for name in self.earlier.keys() & sparsifier.masks.keys():
                if not (sparsifier.masks[name] & ~self.earlier[name]).any():
                    del self.earlier[name]

    def replace(self, other: KeepSparsity) -> None:
        "Take over what another one keeps, and its place on the Learner"
        self._merge(other.earlier)
        if other.sparsifier is not None:
            self._merge(other.sparsifier.masks, other.sparsifier.follower_masks)
        self.recovers, self.held_model = other.recovers, other.held_model
        self.learn.remove_cb(other)
        other.replaced = True  # fit removes its own callbacks once more, by their names
        setattr(self.learn, self.name, self)

    def _merge(self, *several: dict[str, Tensor]) -> None:
        for masks in several:
            for name, mask in masks.items():
                self.earlier[name] = mask & self.earlier[name] if name in self.earlier else mask

    @property
    def masks_something(self) -> bool:
        "Whether there is any zero to keep"
        return not all(mask.all() for _, mask in self._masked())

    def _masked(self, model: nn.Module | None = None) -> list[tuple[nn.Parameter, Tensor]]:
        masked = [] if self.sparsifier is None else self.sparsifier.masked_parameters(model)
        for name, mask in self.earlier.items():
            parameter = parameter_of(self.learn.model if model is None else model, name, mask)
            masked.append((parameter, mask.to(parameter.device)))
        return masked

    def enforce(self) -> None:
        "Zero the masked weights, and what the optimizer keeps of them"
        masked = self._masked()
        zero_weights(masked)
        if self.learn.opt is not None:
            zero_moments(masked, self.learn.opt, squares=NEXT_TO_ZERO)


def _is_known(kind: type) -> bool:
    return kind.__module__.split(".")[0] in ("fastai", "sparsifai")


def _has_dead_filters(kept: Tensor) -> bool:
    """Whether a whole row of the first axis is zero."""
    return not bool(kept.flatten(1).any(1).all())
