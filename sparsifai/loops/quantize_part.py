"""The part of a TrainingManager that trains for int8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..quantization.fake_quantization import FakeQuantization
from ..quantization.layers import START, check_patterns
from ..quantization.preparing import check_start, fake_quantization_of
from ..support.arguments import checks_arguments
from ..support.at_end import AtEnd
from ..support.warning import warn
from .parts import Acting, Part


class Quantize(Part):
    """Train with the rounding of int8, from `start` of a training on, as QuantizeCallback does in a Learner.

    Layers round in forwards in training mode only (`model.train()`): in evaluation mode the model is the float model,
    and inside `with manager.fake_quantized():` the rounded one. Add `Keep` to keep the zeros of a model that is sparse.

    Args:
        start: Fraction of the training that is done when rounding begins, from 0 to below 1. Default 0.75, where the
            default schedule of `Sparsify` ends.
        layers: Names or globs of the layers to quantize, or a list of them. A container stands for everything within
            it. Default: all.
        exclude: Names or globs of layers that stay float, in the same form. Default: none.

    Raises:
        TypeError: `layers` or `exclude` are no names.
        ValueError: `start` is out of range. When a training begins: a name matches no layer, or the model cannot be
            trained with fake quantization, or is quantized already.

    Example:
        >>> Quantize(0.5, exclude="head").exclude
        ['head']
    """

    @checks_arguments
    def __init__(self, start: float = START, layers: Any = None, exclude: Any = None):
        self.start = check_start("Quantize", start)
        self.layers = check_patterns("Quantize", "layers", layers)
        self.exclude = check_patterns("Quantize", "exclude", exclude)

    def acting(self, model: nn.Module, optimizer: Any, loss_func: Any, example_input: Any) -> Acting:
        """Make what has the layers round; as of `Part`."""
        return Quantizing(self.start, *fake_quantization_of("Quantize", model, self.layers, self.exclude))


class Quantizing(Acting):
    """What has the layers of a model round.

    Args:
        start: As of `Quantize`.
        fake: The fake quantization of the layers.
        left: A message of weights that stay float, or "".
    """

    name = "quantize"

    def __init__(self, start: float, fake: FakeQuantization, left: str):
        self._start, self._fake, self._left = start, fake, left
        self._has_begun = self._has_stepped = False
        self._is_held = False  # whether `fake_quantized` keeps the hooks on the model

    @property
    def is_final(self) -> bool:
        """Whether a step was trained with rounding."""
        return self._has_stepped

    def before_forward(self, t: float) -> None:
        """From `start` on, let the layers round."""
        if t < self._start or self._is_held:
            return
        if self._left and not self._has_begun:
            warn(self._left)
        self._has_begun = True
        self._fake.put(in_evaluation=False)

    def before_step(self) -> None:
        """Raise a RuntimeError if the forward has not rounded, or, before `start`, will not."""
        if not self._fake.model.training:
            raise RuntimeError(
                "Quantize: the model is in evaluation mode, in which layers do not round; call model.train() before "
                "the forward of each step"
            )
        if self._has_begun and not self._fake.has_rounded:
            raise RuntimeError(
                "Quantize: no layer has rounded before this step; run the forward in training mode, and call "
                "manager.prepare() before it if manager.release() was called"
            )

    def after_step(self, t: float) -> None:
        """Note that a step was trained with rounding."""
        self._has_stepped |= self._has_begun
        self._fake.has_rounded = False

    def end(self) -> None:
        """Remove the hooks."""
        if not self._is_held:
            self._fake.remove()

    during_step = end

    def warn_at_the_end(self) -> None:
        """Warn if the training has ended before `start`."""
        if not self._has_stepped:
            warn(f"Quantize: the training has ended before start={self._start:.4g}, so nothing was quantized")

    @contextmanager
    def fake_quantized(self) -> Iterator[None]:
        """As of TrainingManager."""
        if not self._has_stepped:
            raise ValueError("fake_quantized: the training has not reached start=, so no ranges are known; train first")
        fake, was_held = self._fake, self._is_held
        was_put, in_evaluation = fake.is_put, fake.in_evaluation

        def undo() -> None:
            self._is_held = was_held
            if was_put:
                fake.put(in_evaluation)
            else:
                fake.remove()

        at_end = AtEnd(undo)
        with at_end, at_end:
            self._is_held = True
            fake.put()
            yield

    def state(self) -> dict[str, Any]:
        """The ranges of inputs, and whether there are any."""
        return {"has_stepped": self._has_stepped, "ranges": self._fake.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what `state` has returned."""
        self._fake.load(state["ranges"])
        self.end()  # the training that is resumed may not have begun to round
        self._has_begun = self._has_stepped = bool(state["has_stepped"])
