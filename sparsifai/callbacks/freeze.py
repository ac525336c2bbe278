"""FreezeCallback: freeze some layers for a part of training."""

from __future__ import annotations

from torch import nn

from ..model.parallel import unwrapped
from ..model.patterns import Places, name_matcher
from ..support.printable import quoted
from ..support.registry import close_matches
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
        learn.fit(10, cbs=FreezeCallback("0.*", end=0.5))
    """

    # After SparsifyCallback, which leaves out frozen layers when it makes its Sparsifier, at the first batch: layers
    # that are frozen for a part of the fit are pruned, too.
    order = SparsifyCallback.order + 0.1
    run_valid = False

    name = "freeze_layers"  # `freeze` is a method of the Learner

    _frozen: tuple[nn.Parameter, ...] = ()  # what this callback has frozen and not yet unfrozen

    def __init__(
        self,
        layers,  # Names or globs of layers or parameters, or a list of them; a container means all within it
        start=0.0,  # Fraction of the fit that is done when the layers are frozen
        end=1.0,  # Fraction of the fit that is done when they are trained again
    ):
        super().__init__()
        self.layers = [layers] if isinstance(layers, str) else list(layers)
        if not self.layers or not all(isinstance(each, str) for each in self.layers):
            raise TypeError(f"FreezeCallback: layers must be names or globs of layers, or a list, not {layers!r}")
        if not 0 <= start < end <= 1:
            raise ValueError(f"FreezeCallback: 0 <= start < end <= 1 must hold, not start={start!r}, end={end!r}")
        for pattern in self.layers:
            name_matcher(pattern)  # raises if a regular expression is malformed
        self.start, self.end = start, end

    def _taken_off(self) -> None:
        self._unfreeze()

    def before_fit(self):
        "Check that every name matches a layer"
        self._unfreeze()  # after a fit that was interrupted
        self._parameters()

    def before_batch(self):
        "Freeze the layers at `start`, and unfreeze them at `end`"
        if not self.start <= self._start < self.end:
            self._unfreeze()
        elif not self._frozen:
            self._frozen = tuple(each for each in self._parameters() if each.requires_grad)
            for parameter in self._frozen:
                parameter.requires_grad_(False)
                parameter.grad = None  # or the optimizer would still step it

    def after_fit(self):
        "Unfreeze the layers"
        self._unfreeze()

    def _unfreeze(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = ()

    def _parameters(self) -> list[nn.Parameter]:
        """The parameters whose names match, or lie in a layer whose name matches."""
        chosen: dict[int, nn.Parameter] = {}
        named = dict(unwrapped(self.learn.model).named_parameters())
        places = Places({name: [name] for name in named})
        for pattern in self.layers:
            matched = places.matching(pattern)
            if not matched:
                hint = close_matches(pattern, places.known)
                raise ValueError(f"FreezeCallback: no layer matches {quoted(pattern)}; {hint}")
            chosen |= {id(each): each for name, each in named.items() if name in matched}
        return list(chosen.values())
