"""The base class of the fastai callbacks of this library."""

from __future__ import annotations

from typing import Any

from fastai.callback.core import Callback

from ..support.at_end import AtEnd
from ..support.warning import warn
from .learner import is_search


class TrainingCallback(Callback):
    """A callback that runs in fits only: it ignores the events of `validate`, `get_preds`, `predict` and the like.

    An exported Learner has a plain `Callback` in its place, so it loads where sparsifai is not installed.
    """

    # Without a value here, fastai would look the name up in the Learner.
    recipe_epochs: Any = None  # epochs of the recipe that has made it; None if no recipe has, or one without epochs

    @property
    def name(self):
        "The name of the attribute of the Learner"
        # When fastai has removed a callback, it deletes the attribute of this name, which may be another's.
        return f"removed_{super().name}" if self.learn is None else super().name

    def __call__(self, event_name):
        "Call the method of the event, unless it comes from `validate` and the like, which hold the Learner's lock"
        learn = self.learn
        if learn is None:  # another callback has just removed this one, in the same event
            return None
        if not learn.lock.locked():
            if event_name == "before_fit":
                self._warn_of_other_epochs()
            return super().__call__(event_name)
        if event_name == "before_fit":
            self._before_question()
        return None

    def _warn_of_other_epochs(self) -> None:
        """Warn once if the recipe says another number of epochs than the fit has. A frozen fit comes before it."""
        learn, epochs = self.learn, self.recipe_epochs
        first = next((each for each in learn.cbs if getattr(each, "recipe_epochs", None)), None)
        is_frozen = getattr(learn.opt, "frozen_idx", 0) > 0
        if first is not self or epochs == learn.n_epoch or is_frozen or is_search(learn):
            return
        warn(
            f"the recipe is for {epochs} epochs and this fit has {learn.n_epoch}, so that all times of the recipe are "
            f"multiplied by {learn.n_epoch / epochs:.3g}; fit recipe.epochs, or change epochs: in the recipe"
        )

    def _before_question(self) -> None:
        """Called when `validate`, `get_preds` or the like begins, within a fit or outside of one."""

    @property
    def _batches_of_fit(self) -> int:
        """How many batches the fit has."""
        return self.learn.n_epoch * self.learn.n_iter

    def _batches(self, done: int) -> int:
        """How many batches of the fit are done. done: 1 to count the present one, else 0."""
        return self.learn.epoch * self.learn.n_iter + self.learn.iter + done

    @property
    def _start(self) -> float:
        """The fraction of the fit that was done before the present batch."""
        return self._batches(0) / self._batches_of_fit

    def __setattr__(self, name, value):
        # fastai has no event for the removal of a callback, but it sets `learn` to None then. An interrupted fit calls
        # no more events, but it removes the callbacks that were passed to it.
        if name == "learn" and value is None and self.learn is not None:
            self._leave(self.learn)
        super().__setattr__(name, value)

    def _leave(self, learn) -> None:
        def taken_off():
            if self.learn is not None:
                self._taken_off()
                self._give_up_name(learn)
                super(TrainingCallback, self).__setattr__("learn", None)

        try:
            at_end = AtEnd(taken_off)
            with at_end, at_end:
                pass
        except BaseException:  # fastai stops here, and would leave it on the Learner
            vars(learn).pop(self.name, None)
            if self in learn.cbs:
                learn.cbs.remove(self)
            raise

    def _give_up_name(self, learn) -> None:
        """Leave the name of the attribute of the Learner to another callback that has it."""
        others = [each for each in learn.cbs if each is not self and each.name == self.name]
        if others:
            setattr(learn, self.name, others[-1])
        else:
            vars(learn).pop(self.name, None)

    def _taken_off(self) -> None:
        """Called before the callback is removed from the Learner, and again if it was interrupted."""

    def _model_replaced(self, example_input: Any) -> None:
        """Called when `learn.shrink` has replaced the model of the Learner by a smaller one.

        Args:
            example_input: A batch that both models accept.
        """

    def __reduce_ex__(self, protocol):
        learn = self.learn
        if learn is not None and learn.opt is None and len(learn.dls.train_ds) == 0:  # in `learn.export`
            return Callback, ()
        return super().__reduce_ex__(protocol)
