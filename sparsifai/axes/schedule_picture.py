"""A picture of schedules."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..support.arguments import checks_arguments
from ..support.checks import check_fraction
from ..support.figure import axes_or_new, in_percent, legend_beside
from ..support.registry import name_of
from .schedule import Schedule, progress, schedules

_POINTS = 1001


@checks_arguments
def plot_schedule(*several: str | Schedule, sparsity: float = 1.0, ax: Any = None) -> Any:
    """Draw how the sparsity grows during training by one or several schedules.

    Args:
        *several: Names of schedules, or functions of t, the progress of training from 0 to 1. Functions without a name
            of their own are called 'schedule 2' in the legend, by their place.
        sparsity: The target sparsity. Default 1: the share of the target is drawn.
        ax: The matplotlib axes to draw on; by default new ones.

    Returns:
        The matplotlib axes.

    Raises:
        TypeError: The sparsity is not a number.
        ValueError: There is no schedule, one is unknown or fails, or the sparsity is not a fraction.

    Example:
        >>> from sparsifai import between, plot_schedule
        >>> ax = plot_schedule('agp', between('cos', 0.25, 0.75), sparsity=0.9)
        >>> ax.get_ylabel()
        'sparsity'
    """
    target = check_fraction(sparsity, "sparsity")
    if not several:
        raise ValueError(f"plot_schedule: give at least one schedule; choose from {', '.join(schedules)}")
    resolved = [schedules.resolve(schedule) for schedule in several]
    times = np.linspace(0, 1, _POINTS)
    curves = [[target * progress(schedule, float(t)) for t in times] for schedule in resolved]
    ax = axes_or_new(ax, 6.4, 3.6)
    for number, (schedule, curve) in enumerate(zip(resolved, curves, strict=True), 1):
        name = name_of(schedule)  # of fastai's annealers and of lambdas it says nothing
        ax.plot(times, curve, label=name if name[:1].isalpha() else f"schedule {number}")
    ax.set(xlabel="progress of training", ylabel="share of the target sparsity" if target == 1 else "sparsity")
    ax.set(xlim=(0, 1), ylim=(0, 1.02 * (target or 1)))
    in_percent(ax.xaxis)
    in_percent(ax.yaxis)
    legend_beside(ax)
    return ax
