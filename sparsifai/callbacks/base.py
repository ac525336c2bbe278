"""What all callbacks of this library share: the place in a fit, and what happens when one is taken off the Learner."""

from __future__ import annotations

from fastai.callback.core import Callback


class TrainingCallback(Callback):
    """A callback for fits alone: nothing that `validate`, `get_preds` and the like do reaches it.

    An exported Learner has a plain `Callback` in its place, so that it loads where sparsifai is not installed.
    """

    def __call__(self, event_name):
        "Call the event, unless it comes from `validate`, `get_preds` and the like, which hold the Learner's lock"
        learn = self.learn
        if learn is None:  # taken off in this event, by a callback before it
            return None
        if not learn.lock.locked():
            return super().__call__(event_name)
        if event_name == "before_fit":
            self._before_question()
        return None

    def _before_question(self) -> None:
        """Called when `validate`, `get_preds` and the like begin, in a fit or outside of one."""

    @property
    def _batches_of_fit(self) -> int:
        return self.learn.n_epoch * self.learn.n_iter

    def _batches(self, done: int) -> int:
        """Batches of the fit that are over, with `done` (0 or 1) for the present one."""
        return self.learn.epoch * self.learn.n_iter + self.learn.iter + done

    @property
    def _start(self) -> float:
        """Fraction of the fit that is over at the present batch."""
        return self._batches(0) / self._batches_of_fit

    def __setattr__(self, name, value):
        # fastai has no event for this. It sets `learn` to None when a callback is taken off, and `fit` takes off the
        # callbacks that it was given even if it is interrupted, when no event comes any more.
        if name == "learn" and value is None and self.learn is not None:
            self._taken_off()
        super().__setattr__(name, value)

    def _taken_off(self) -> None:
        """Undo what holds as long as the callback is on the Learner."""

    def __reduce_ex__(self, protocol):
        learn = self.learn
        if learn is not None and learn.opt is None and len(learn.dls.train_ds) == 0:  # as `learn.export` makes it
            return Callback, ()
        return super().__reduce_ex__(protocol)
