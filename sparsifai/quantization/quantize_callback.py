"""QuantizeCallback: the fastai callback that trains a model for int8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..callbacks.base import TrainingCallback
from ..callbacks.display import Trackers, notify
from ..callbacks.learner import is_search
from ..callbacks.reporting import sparsity_not_kept
from ..callbacks.sparsify import SparsifyCallback
from ..support.arguments import checks_arguments
from ..support.at_end import AtEnd
from ..support.table import percent
from .fake_quantization import FakeQuantization
from .layers import START, check_patterns
from .preparing import check_start, fake_quantization_of


class QuantizeCallback(TrainingCallback):
    """Train with the rounding of int8, from `start` of a fit on, so that the model loses less when it is quantized.

    In each batch, the weights and inputs of linear layers, convolutions and torch's attention are rounded by torch's
    fake quantization. Zeros stay zeros. Between batches and after the fit the model is the float model: the same
    parameters under the same names. `quantize` makes the int8 model of it.

    The training table shows the loss and the metrics of the rounded model from `start` on; `learn.validate()` always
    measures the float model, and inside `with callback.fake_quantized():` the rounded one. SaveModelCallback,
    EarlyStoppingCallback and ReduceLROnPlateau ignore epochs before `start`, because these measure the float model.

    Args:
        start: Fraction of the fit that is done when rounding begins, from 0 to below 1. Default 0.75, where the default
            schedule of SparsifyCallback ends.
        layers: Names or globs of the layers to quantize, or a list of them. A container stands for everything within
            it. Default: all.
        exclude: Names or globs of layers that stay float, in the same form. Default: none.

    Raises:
        TypeError: `layers` or `exclude` are no names.
        ValueError: `start` is out of range. When a fit begins: a name matches no layer, or the model cannot be trained
            with fake quantization, or is quantized already.

    Example:
        >>> learn = make_learner()
        >>> learn.fit(1, cbs=[SparsifyCallback(0.75), QuantizeCallback()])
    """

    # After SparsifyCallback, which may run the model before the first batch to rank its weights.
    order = SparsifyCallback.order + 0.2

    # Without values here, fastai would look these names up in the Learner.
    _fake: FakeQuantization | None = None  # of the latest fit
    _left = ""  # a message of weights that stay float
    _begun = False  # whether rounding has begun in this fit
    _held = False  # whether `fake_quantized` keeps the hooks on the model

    @checks_arguments
    def __init__(
        self,
        start=START,  # Fraction of the fit that is done when rounding begins
        layers=None,  # Names or globs of layers to quantize, or a list of them; by default all
        exclude=None,  # Names or globs of layers that stay float, or a list of them
    ):
        super().__init__()
        self.start = check_start("QuantizeCallback", start)
        self.layers = check_patterns("QuantizeCallback", "layers", layers)
        self.exclude = check_patterns("QuantizeCallback", "exclude", exclude)
        self._trackers = Trackers()

    @property
    def ranges(self):
        "Name of a layer -> (low, high), the running range of its input in the latest fit"
        return {} if self._fake is None else self._fake.ranges

    @contextmanager
    def fake_quantized(self) -> Iterator[None]:
        """Have the model of the latest fit round as in training, inside a `with` block: for validate() and the like.

        Raises:
            ValueError: No fit has rounded yet.
        """
        if self._fake is None or not self._begun:
            raise ValueError("QuantizeCallback: no fit has reached start=, so no ranges are known; fit first")
        at_end = AtEnd(self._release)
        with at_end, at_end:
            self._held = True
            self._fake.put()
            yield

    def _release(self) -> None:
        self._held = False
        self._restore()

    def _restore(self) -> None:
        if self._fake is not None and not self._held:
            self._fake.remove()

    def _taken_off(self) -> None:
        self._trackers.resume()
        self._restore()

    def _before_question(self) -> None:
        self._restore()  # after a fit that was interrupted

    def _model_replaced(self, example_input: Any) -> None:
        self._restore()
        self._fake, self._begun = None, False

    def before_fit(self):
        "Check that the model can be trained with fake quantization, and find its layers"
        learn = self.learn
        self._restore()
        self._fake, self._begun = None, False
        if len(learn._grab_cbs(QuantizeCallback)) > 1:
            raise ValueError(
                "two QuantizeCallbacks in one fit would round twice; use one, with layers= or exclude=, or remove the "
                "other with learn.remove_cb(QuantizeCallback)"
            )
        if is_search(learn):
            return
        made = fake_quantization_of("QuantizeCallback", learn.model, self.layers, self.exclude)
        self._fake, self._left = made
        if sparsity := sparsity_not_kept(learn):
            message = (
                f"QuantizeCallback: nothing keeps the {percent(sparsity)} of zeros that the model has, so this fit "
                "changes them; add KeepSparsity() to its callbacks"
            )
            notify(learn, message, matters=True)

    def before_epoch(self):
        "Switch the trackers on again"
        self._trackers.resume()

    def before_batch(self):
        "From `start` on, let the layers round"
        if self._fake is None:
            return
        if not self._begun and self.learn.training and self._start >= self.start:
            self._begin()
        if self._begun:
            self._fake.put()

    def before_step(self):
        "Let the layers be as they were, as a criterion may run the model to rank its weights after the step"
        self._restore()

    def after_batch(self):
        "Let the layers be as they were"
        self._restore()

    def after_cancel_batch(self):
        "Let the layers be as they were"
        self._restore()

    def after_epoch(self):
        "Switch the trackers off, if the epoch measures the float model"
        self._restore()
        if self._fake is not None and not self._begun:
            self._trackers.pause(self.learn)

    def after_fit(self):
        "Tell the user if the fit has ended before `start`"
        self._restore()
        self._trackers.resume()
        if self._fake is None:
            return
        self._trackers.pause_loading(self.learn, not self._begun)
        self._trackers.paused = []  # fastai switches all callbacks on again at the end of a fit
        if not self._begun:
            message = f"QuantizeCallback: the fit has ended before start={self.start:.4g}, so nothing was quantized"
            notify(self.learn, message, matters=True)

    def _begin(self) -> None:
        self._begun = True
        self._trackers.forget(self.learn)  # their best epoch is one of the float model
        if self._left:
            notify(self.learn, self._left, matters=True)

    def __getstate__(self) -> dict[str, Any]:
        "Copy and pickle without what belongs to the model of the latest fit"
        return {name: value for name, value in vars(self).items() if name not in ("_fake", "_begun", "_held")}
