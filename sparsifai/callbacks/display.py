"""What SparsifyCallback does to the rest of a Learner: the column of the table, curves, trackers, one-line notices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import SaveModelCallback, TrackerCallback
from fastai.learner import Learner, Recorder, ValueMetric, noop
from fastai.torch_core import rank_distrib
from fastcore.basics import patch


def notify(learn: Learner, message: str) -> None:
    """One line for the user, where the Learner's own table is shown, from the first process."""
    if learn.logger is not noop and rank_distrib() == 0:
        print(message)


class Column:
    """The measured sparsity in the training table, which is made of the metrics."""

    def __init__(self, learn: Learner, measure: Callable[[], float]):
        self.learn, self.metric = learn, _Measured(measure, "sparsity")

    def show(self) -> None:
        """Append it to the metrics, if it is not there."""
        if self.metric not in self.learn.metrics:
            self.learn.metrics = [*self.learn.metrics, self.metric]

    def hide(self) -> None:
        """Take it from the metrics, where it may be."""
        self.learn.metrics = [metric for metric in self.learn.metrics if metric is not self.metric]


class _Measured(ValueMetric):
    """Pickled, as with a Learner whose fit was interrupted, it is a number, for which sparsifai need not be there."""

    def __reduce__(self):
        return ValueMetric, (partial(float, self.value), self.name)


class Curves:
    """The level after every batch; epoch, level and measured sparsity after every epoch. For the recorder's plots."""

    def __init__(self) -> None:
        self.by_batch: list[float] = []
        self.by_epoch: list[tuple[int, float, float]] = []

    def hand_over(self, learn: Learner) -> None:
        """Give them to the recorder, beside what ParamScheduler gives it."""
        recorder = getattr(learn, "recorder", None)
        if recorder is not None:
            recorder.sparsity_by_epoch = self.by_epoch
            schedulers = learn._grab_cbs(ParamScheduler)
            for scheduler in schedulers:  # which hands its own over after this
                scheduler.hps["sparsity"] = self.by_batch
            if not schedulers:
                recorder.hps = {"sparsity": self.by_batch}


class Trackers:
    """SaveModelCallback, EarlyStopping and the like: while an epoch is short of the target, they do not judge it."""

    def __init__(self) -> None:
        self.paused: list[TrackerCallback] = []

    def forget(self, learn: Learner) -> None:
        """Have all forget what they judged at another sparsity."""
        for tracker in learn._grab_cbs(TrackerCallback):
            tracker.best = np.inf if tracker.comp == np.less else -np.inf

    def pause(self, learn: Learner) -> None:
        """Let none judge this epoch."""
        for tracker in learn._grab_cbs(TrackerCallback):
            if not getattr(tracker, "every_epoch", False):  # which compares nothing
                self._stop(tracker)

    def pause_loading(self, learn: Learner, short: bool) -> None:
        """Let no best epoch be loaded if there is none. short: whether the fit has ended short of the target."""
        for saver in learn._grab_cbs(SaveModelCallback):
            if not saver.every_epoch and not saver.at_end and (short or np.isinf(saver.best)):
                self._stop(saver)

    def _stop(self, tracker: TrackerCallback) -> None:
        if tracker.run:  # which the user has not switched off
            tracker.run = False
            self.paused.append(tracker)

    def resume(self) -> None:
        """Let all judge again."""
        for tracker in self.paused:
            tracker.run = True
        self.paused = []


@patch
def plot_sparsity(
    self: Recorder,
    ax=None,  # Matplotlib axes to draw on
):
    "Plot the level that was asked for and the measured sparsity by epoch, of the last fit with SparsifyCallback"
    import matplotlib.pyplot as plt

    if not getattr(self, "sparsity_by_epoch", None):
        raise ValueError("plot_sparsity: no fit with a SparsifyCallback is recorded; fit with one first")
    epochs, levels, measured = zip(*self.sparsity_by_epoch, strict=True)
    if ax is None:
        _, ax = plt.subplots()
    ax.plot(epochs, levels, "--", label="level asked for")
    ax.plot(epochs, measured, "o-", label="measured")
    ax.set(xlabel="epoch", ylabel="sparsity")
    ax.legend()
    return ax
