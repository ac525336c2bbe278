"""What SparsifyCallback shows in a Learner: a column of the training table, curves, notices; and pausing trackers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import SaveModelCallback, TrackerCallback
from fastai.learner import Learner, Recorder, ValueMetric, noop
from fastai.torch_core import rank_distrib
from fastcore.basics import patch

from ..support.figure import axes_or_new, in_percent, in_whole_numbers
from ..support.warning import warn


def notify(learn: Learner, message: str, matters: bool = False) -> None:
    """Print one line in the first process, unless the Learner shows no training table.

    Args:
        learn: The Learner.
        message: The line.
        matters: Whether to warn instead, if the Learner shows no training table. Default False.
    """
    if rank_distrib() != 0:
        return
    if learn.logger is not noop:
        bar = getattr(getattr(learn, "progress", None), "pbar", None)
        # In a terminal, fastai's bar of the present epoch is in this line, and is written again at the next batch.
        width = getattr(bar, "max_len", 0) if getattr(bar, "last_v", None) is not None else 0
        print("\r" + " " * width + "\r" + message if width else message)
    elif matters:
        warn(message)


class Column:
    """The column `sparsity` in the training table: a metric, on the Learner while a fit trains.

    Args:
        learn: The Learner.
        measure: Returns the measured sparsity.
    """

    def __init__(self, learn: Learner, measure: Callable[[], float]):
        self.learn, self.metric = learn, _Measured(measure, "sparsity")

    def show(self) -> None:
        """Add the column to the metrics, if it is not among them."""
        if self.metric not in self.learn.metrics:
            self.learn.metrics = [*self.learn.metrics, self.metric]

    def hide(self) -> None:
        """Remove the column from the metrics, if it is among them."""
        self.learn.metrics = [metric for metric in self.learn.metrics if metric is not self.metric]


class _Measured(ValueMetric):
    """The metric. In a pickled Learner it is a fixed number, which loads where sparsifai is not installed."""

    def __reduce__(self):
        return ValueMetric, (partial(float, self.value), self.name)


class Curves:
    """The curves of a fit, for the plots of the Recorder.

    Attributes:
        by_batch: The level after every batch.
        by_epoch: (epoch, level, measured sparsity) after every epoch.
    """

    def __init__(self) -> None:
        self.by_batch: list[float] = []
        self.by_epoch: list[tuple[int, float, float]] = []

    def hand_over(self, learn: Learner) -> None:
        """Store the curves in the Recorder, beside the hyper-parameters that ParamScheduler stores there."""
        recorder = getattr(learn, "recorder", None)
        if recorder is not None:
            recorder.sparsity_by_epoch = self.by_epoch
            schedulers = learn._grab_cbs(ParamScheduler)
            for scheduler in schedulers:  # stores its own after this
                scheduler.hps["sparsity"] = self.by_batch
            if not schedulers:
                recorder.hps = {"sparsity": self.by_batch}


class Trackers:
    """Pauses SaveModelCallback, EarlyStoppingCallback and ReduceLROnPlateau before the target sparsity is reached.

    Attributes:
        paused: The trackers that are switched off at present.
    """

    def __init__(self) -> None:
        self.paused: list[TrackerCallback] = []

    def names(self, learn: Learner) -> list[str]:
        """Class names of the trackers that are paused in epochs before the target sparsity."""
        return list(dict.fromkeys(type(each).__name__ for each in self._of(learn) if each.run))

    def forget(self, learn: Learner) -> None:
        """Make all trackers forget their best value, which belongs to other masks."""
        for tracker in learn._grab_cbs(TrackerCallback):
            tracker.best = np.inf if tracker.comp == np.less else -np.inf

    def pause(self, learn: Learner) -> None:
        """Switch off all trackers for this epoch."""
        for tracker in self._of(learn):
            self._stop(tracker)

    def pause_loading(self, learn: Learner, short: bool) -> None:
        """Keep SaveModelCallback from loading a best epoch if there is none.

        Args:
            learn: The Learner.
            short: Whether the fit has ended before the target sparsity was reached.
        """
        for saver in learn._grab_cbs(SaveModelCallback):
            if not saver.every_epoch and not saver.at_end and (short or np.isinf(saver.best)):
                self._stop(saver)

    @staticmethod
    def _of(learn: Learner) -> list[TrackerCallback]:
        """The trackers that compare epochs; one of SaveModelCallback that saves every epoch compares none."""
        return [each for each in learn._grab_cbs(TrackerCallback) if not getattr(each, "every_epoch", False)]

    def _stop(self, tracker: TrackerCallback) -> None:
        if tracker.run:  # or the user has switched it off
            tracker.run = False
            self.paused.append(tracker)

    def resume(self) -> None:
        """Switch the trackers on again."""
        for tracker in self.paused:
            tracker.run = True
        self.paused = []


@patch
def plot_sparsity(
    self: Recorder,
    ax=None,  # Matplotlib axes to draw on
):
    """Plot the level that was asked for and the measured sparsity by epoch, of the last fit with SparsifyCallback.

    Args:
        ax: Matplotlib axes to draw on. Default: new ones.

    Returns:
        The matplotlib axes.

    Raises:
        ValueError: No fit with a SparsifyCallback was recorded.

    Example:
        >>> learn = make_learner()
        >>> _ = learn.sparsify(0.75, 2)
        >>> axes = learn.recorder.plot_sparsity()
    """
    if not getattr(self, "sparsity_by_epoch", None):
        raise ValueError("plot_sparsity: no fit with a SparsifyCallback is recorded; fit with one first")
    epochs, levels, measured = zip(*self.sparsity_by_epoch, strict=True)
    ax = axes_or_new(ax, 6.4, 3.6)
    ax.plot(epochs, levels, "--", label="level asked for")
    ax.plot(epochs, measured, "o", label="measured")
    ax.set(xlabel="epoch", ylabel="sparsity")
    in_percent(ax.yaxis)
    in_whole_numbers(ax.xaxis)
    ax.legend()
    return ax
