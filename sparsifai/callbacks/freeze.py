"""FreezeCallback: freeze some layers for a part of training."""

from __future__ import annotations

from ..model.frozen import FrozenLayers
from ..support.arguments import checks_arguments
from .base import TrainingCallback
from .sparsify import SparsifyCallback


class FreezeCallback(TrainingCallback):
    """Freeze some layers from `start` to `end` of a fit. Afterwards they are trained again.

    Beside SparsifyCallback they are pruned like the others. A frozen layer that lacks the gradients of a criterion, or
    those by which weights regrow, keeps its masks until it is trained; meanwhile the others reach the sparsity.

    Args:
        layers: Names or globs of layers or parameters, or a list of them. A container stands for everything within it.
        start: Fraction of the fit that is done when the layers are frozen, from 0 to 1. Default 0.
        end: Fraction of the fit that is done when they are trained again, from 0 to 1. Default 1.

    Raises:
        TypeError: `layers` is neither a name nor a list of names.
        ValueError: Not 0 <= start < end <= 1; or, when a fit begins, a name matches no layer.

    Example:
        >>> learn = make_learner()
        >>> learn.fit(2, cbs=FreezeCallback('0', end=0.5))
    """

    # After SparsifyCallback, which leaves out frozen layers when it makes its Sparsifier, at the first batch: layers
    # that are frozen for a part of the fit are pruned, too.
    order = SparsifyCallback.order + 0.1
    run_valid = False

    name = "freeze_layers"  # `freeze` is a method of the Learner

    @checks_arguments
    def __init__(
        self,
        layers,  # Names or globs of layers or parameters, or a list of them; a container means all within it
        start=0.0,  # Fraction of the fit that is done when the layers are frozen
        end=1.0,  # Fraction of the fit that is done when they are trained again
    ):
        super().__init__()
        self.frozen = FrozenLayers("FreezeCallback", layers, start, end)

    def _taken_off(self) -> None:
        self.frozen.unfreeze()

    def before_fit(self):
        "Check that every name matches a layer"
        self.frozen.unfreeze()  # after a fit that was interrupted
        self.frozen.parameters(self.learn.model)

    def before_batch(self):
        "Freeze the layers at `start`, and unfreeze them at `end`"
        self.frozen.at(self._start, self.learn.model)

    def after_fit(self):
        "Unfreeze the layers"
        self.frozen.unfreeze()
