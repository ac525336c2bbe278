"""KeepSparsity: the fastai callback that keeps pruned weights at zero, in the fit that prunes them and later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..model.norms import check_fused_norms
from ..model.parallel import unwrapped
from ..sparsifier.mask_picture import plot_masks
from ..sparsifier.masking import (
    NEXT_TO_ZERO,
    REFRESH,
    holds_zeros,
    is_masked_zero,
    masked_parameters,
    parameters_of,
    zero_gradients,
    zero_moments,
    zero_weights,
)
from ..sparsifier.recovery import recovered_masks
from ..sparsifier.report import Report
from ..sparsifier.sparsifier import Sparsifier
from ..support.arguments import checks_arguments
from ..support.warning import warn
from .base import TrainingCallback
from .learner import check_steps_model
from .others import are_all_known


class KeepSparsity(TrainingCallback):
    """Keep the zeros of a sparse model zero while it trains. SparsifyCallback leaves one on the Learner.

    In every step it sets the gradients of masked weights to zero, before gradients are clipped. Then neither momentum
    nor weight decay moves these weights. If the optimizer or a callback is neither fastai's nor torch's, it also sets
    the weights to zero after the step.

    Attributes:
        masks: Parameter name -> bool tensor that broadcasts to the parameter, False where it is kept at zero.

    Args:
        sparsifier: A Sparsifier of the model, whose masks are kept as they are at each step. Default: the zeros that
            the model has when a fit begins are kept.

    Raises:
        TypeError: `sparsifier` is no Sparsifier.
        ValueError: When a fit begins: the Learner has another model than the one whose zeros were kept.

    Example:
        >>> learn = make_learner()
        >>> Sparsifier(learn.model).sparsify(0.75)  # or learn.load of a sparse model
        >>> learn.fit(1, cbs=KeepSparsity())
        >>> Sparsifier(learn.model).sparsity
        0.75
    """

    # After MixedPrecision (10) has unscaled the gradients, before GradientClip (11) takes their norm.
    order = 10.5
    run_valid = False

    @checks_arguments
    def __init__(
        self,
        sparsifier=None,  # Whose masks to keep; by default, the zeros that the model has when a fit begins
    ):
        super().__init__()
        if sparsifier is not None and not isinstance(sparsifier, Sparsifier):
            raise TypeError(f"KeepSparsity: sparsifier must be a Sparsifier, whose masks are kept, not {sparsifier!r}")
        self.masks = {} if sparsifier is None else sparsifier.all_masks  # these change with the Sparsifier
        self.held_model: Any = None if sparsifier is None else sparsifier.model  # the model that the masks belong to
        # With straight_through, the masks of what no gradient and no moment may move; None if these are all masks.
        self.masks_of_gradients: Any = None
        self.recovers = sparsifier is None  # whether the zeros of the model are added to the masks in each fit
        self.left_by_fit = False  # whether SparsifyCallback has added it to the Learner
        self.announced = False  # whether SparsifyCallback has told the user of it
        self._recovered = False  # whether the zeros of the model were added in this fit
        self._steps = 0
        self._gradients_zeroed = False  # whether the gradients of all masked weights were zeroed in this step

    def _model_replaced(self, example_input: Any) -> None:
        smaller = unwrapped(self.learn.model)
        self.masks, self.held_model, self.recovers = recovered_masks(smaller, {}, example_input), smaller, True

    def before_fit(self):
        "Zero the masked weights and their moments, which may have been loaded or changed since the last fit"
        self._recovered = False
        check_fused_norms(self.learn.model)
        if self.held_model is not None and self.held_model is not unwrapped(self.learn.model):
            raise ValueError(
                "KeepSparsity keeps the zeros of another model than the Learner's; remove it with "
                "learn.remove_cb(KeepSparsity), or use KeepSparsity() to keep the zeros of this model"
            )
        check_steps_model(self.learn)
        if not is_masked_zero(self._masked()):
            warn(
                "KeepSparsity: pruned weights were changed or loaded and are not zero any more; they are set to zero "
                "again. To keep the new values, call learn.remove_cb(KeepSparsity) before the fit",
            )
        self.enforce()

    def before_batch(self):
        "At the first batch, add the zeros of the model to the masks; later, zero what a callback may have moved"
        if not self.recover() and not are_all_known(self.learn):
            zero_weights(self._masked())

    def before_step(self):
        "Zero the gradients of masked weights"
        self._gradients_zeroed = zero_gradients(self._unmoved())

    def after_step(self):
        "Zero the masked weights, if the optimizer or a callback may have moved them"
        masked = self._masked()
        if not (self._gradients_zeroed and are_all_known(self.learn) and self._steps_hold(masked)):
            zero_weights(masked)
        self._gradients_zeroed = False
        self._steps += 1
        if self._steps % REFRESH == 0:
            zero_moments(self._unmoved(), self.learn.opt, squares=NEXT_TO_ZERO)

    def _steps_hold(self, masked: list[tuple[nn.Parameter, Tensor]]) -> bool:
        """Whether the optimizer is known not to move zeros, and steps the weights themselves, not copies of them."""
        stepped = {id(parameter) for parameter in parameters_of(self.learn.opt)}
        return holds_zeros(self.learn.opt) and all(id(parameter) in stepped for parameter, _ in masked)

    def before_train(self):
        "Zero the masked weights and their moments, which a callback may have loaded"
        self.enforce()

    def after_train(self):
        "Zero the masked weights, which a callback may have moved after the last step"
        zero_weights(self._masked())

    def apply_masks(
        self,
        model,  # A copy of the model, such as its torch.optim.swa_utils.AveragedModel
    ):
        """Set the masked weights of a copy of the model to zero.

        Args:
            model: The copy, such as a torch.optim.swa_utils.AveragedModel of the model.
        """
        zero_weights(self._masked(model))

    def report(self):
        """Count the zeros of the model.

        Returns:
            A `Report`. The layers that have masks are the selected ones.
        """
        return Report.of(unwrapped(self.learn.model), self.masks)

    def plot_masks(
        self,
        layers=None,  # Patterns of the layers to draw; by default the first 16
        pixels=128,  # The most pixels of an image along each side
        ax=None,  # One matplotlib axes, or as many as there are layers
    ):
        """Draw the masks of layers as images, as `Sparsifier.plot_masks` does.

        Args:
            layers: Patterns of the layers to draw. Default: the first 16.
            pixels: The most pixels of an image along each side. Default 128.
            ax: One matplotlib axes, or as many as there are layers. Default: those of a new figure.

        Returns:
            The matplotlib axes, one for each layer.
        """
        return plot_masks(unwrapped(self.learn.model), self.masks, layers, pixels, ax)

    def enforce(self) -> None:
        "Zero the masked weights and their moments in the optimizer"
        zero_weights(self._masked())
        if self.learn.opt is not None:
            zero_moments(self._unmoved(), self.learn.opt, squares=NEXT_TO_ZERO)

    def restore(self) -> None:
        "Zero the masked weights, if any of them is not zero: else a forward that is under way would lose its gradients"
        if not is_masked_zero(self._masked()):
            self.enforce()

    def begin(self) -> None:
        "Do not add the zeros of the model to the masks in this fit: SparsifyCallback assigns the masks"
        self._recovered, self.held_model = True, unwrapped(self.learn.model)

    def recover(self, force: bool = False, known: Mapping[str, Tensor] | None = None) -> bool:
        """Add the zeros of the model to the masks, once in a fit, unless masks were given.

        Args:
            force: Whether to add them in any case. Default False.
            known: Parameter name -> mask, of layers in which a weight that has regrown may be zero still. Default none.

        Returns:
            Whether they were added.
        """
        if not force and (self._recovered or not self.recovers):
            return False
        self.masks = {**recovered_masks(unwrapped(self.learn.model), self.masks, self.learn.xb), **(known or {})}
        self.begin()
        self.enforce()
        return True

    def _unmoved(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters and masks of what neither a gradient nor a moment may move."""
        if self.masks_of_gradients is None:
            return self._masked()
        return masked_parameters(self.learn.model, self.masks_of_gradients, move=True)

    def _masked(self, model: nn.Module | None = None) -> list[tuple[nn.Parameter, Tensor]]:
        return masked_parameters(self.learn.model if model is None else model, self.masks, move=model is None)
