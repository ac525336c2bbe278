"""What all callbacks of this library share: where in a fit they are, and what happens when one is taken off."""

from __future__ import annotations

from fastai.callback.core import Callback

TRAINING_EVENTS = (
    *("before_train", "before_batch", "after_pred", "after_loss", "before_backward", "after_cancel_backward"),
    *("after_backward", "before_step", "after_cancel_step", "after_step", "after_cancel_batch", "after_batch"),
)


class TrainingCallback(Callback):
    """Knows where in a fit it is. Goes nowhere with an exported Learner, which then loads where sparsifai is not."""

    @property
    def _batches_of_fit(self) -> int:
        return self.learn.n_epoch * self.learn.n_iter

    def _batches(self, done: int) -> int:
        """Batches of the fit that are over, with `done` (0 or 1) for the present one."""
        return self.learn.epoch * self.learn.n_iter + self.learn.iter + done

    @property
    def _start(self) -> float:
        """Share of the fit that is over at the present batch."""
        return self._batches(0) / self._batches_of_fit

    def __setattr__(self, name, value):
        # Taken off the Learner, as fit does with its own callbacks even when it is interrupted.
        if name == "learn" and value is None and self.learn is not None:
            self._taken_off()
        super().__setattr__(name, value)

    def _taken_off(self) -> None:
        """Undo what holds as long as it is on the Learner."""

    def __reduce_ex__(self, protocol):
        learn = self.learn
        if learn is not None and learn.opt is None and len(learn.dls.train_ds) == 0:  # as `learn.export` makes it
            return Callback, ()
        return super().__reduce_ex__(protocol)
