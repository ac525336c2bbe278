"""How sparse a model can be before a metric suffers, in one shot: layer by layer, or as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from ..axes.quantity import AVERAGED
from ..callbacks.learner import calibrate_with, first_batch
from ..callbacks.plan import compares_with_itself
from ..model.running import as_it_was
from ..sparsifier.arguments import Sparsity
from ..sparsifier.sparsifier import Sparsifier
from ..support.checks import check_fraction, check_number
from ..support.registry import name_of
from .metric import Metric
from .sensitivity_table import Sensitivity

LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


def sensitivity(
    learn_or_model: Any,
    metric: str | Callable | None = None,
    levels: Iterable[float] = LEVELS,
    *,
    lower_is_better: bool | None = None,
    calibration: Iterable | None = None,
    loss_func: Callable | None = None,
    progress: bool = True,
    **options: Any,
) -> Sensitivity:
    """Measure a metric with one layer sparse at a time, at each level, in one shot and without training.

    learn_or_model: a fastai Learner, or any torch.nn.Module.
    metric: of a Learner the name of one of its metrics, None for its validation loss. Or a function of the model that
        returns a number; it is called in evaluation mode, without gradients.
    levels: fractions between 0 and 1 of the weights of a layer.
    lower_is_better: by default, whether the name of the metric tells that it is one of errors: 'loss', 'error', 'mse',
        'perplexity' and the like.
    calibration, loss_func: for criteria that look at data, as of Sparsifier.calibrate. By default the first batch of
        the Learner's training data, and its loss.
    progress: show a bar, if fastprogress is installed; not where a Learner shows none.
    options: of Sparsifier, such as granularity, criteria, layers and exclude; not coupled.

    Model and Learner are afterwards what they were before, also if the metric fails: weights bit by bit, buffers,
    gradients, modes, random generators. Each measurement begins from there. TypeError and ValueError, before anything
    is measured, where the arguments cannot work.

    Li et al., 2017, "Pruning Filters for Efficient ConvNets" (arXiv:1608.08710), section 3.2; Han et al., 2015,
    "Learning both Weights and Connections for Efficient Neural Networks" (arXiv:1506.02626), figure 6.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> def smallest_layer(model): return min(int(layer.weight.count_nonzero()) for layer in (model[0], model[2]))
    >>> measured = sensitivity(model, smallest_layer, levels=(0.5, 0.75), progress=False)
    >>> print(measured)
    smallest_layer is 16 as it is, higher is better; with one layer sparse at a time:
    layer     weights  50%  75%
    ---------------------------
    0.weight       32   16    8
    2.weight       16    8    4
    """
    levels = _check_levels(levels)
    if options.get("coupled"):
        raise ValueError(
            "sensitivity: coupled filters fall together, but one layer is measured at a time; leave coupled=True out"
        )
    meter = Metric.of(learn_or_model, metric, lower_is_better)
    shows = progress and (meter.learn is None or hasattr(learn_or_model, "progress"))
    with meter.held():
        one_shot = OneShot(meter, calibration, loss_func, options)
        names = list(one_shot.sizes)
        for name in names:
            one_shot.sparsifier.check({name: levels[-1]})
        baseline = meter.baseline()
        values: dict[str, list[float]] = {name: [] for name in names}
        for name, level in _shown([(name, level) for name in names for level in levels], shows):
            values[name].append(one_shot.measure({name: level}))
    table, sizes = tuple(map(tuple, values.values())), tuple(one_shot.sizes.values())
    return Sensitivity(tuple(names), sizes, levels, table, baseline, meter.name, meter.lower_is_better)


def highest_sparsity(
    learn_or_model: Any,
    tolerance: float,
    metric: str | Callable | None = None,
    *,
    precision: float = 0.005,
    lower_is_better: bool | None = None,
    calibration: Iterable | None = None,
    loss_func: Callable | None = None,
    **options: Any,
) -> float:
    """The highest sparsity, in one shot and without training, at which a metric is at most `tolerance` worse.

    tolerance: in units of the metric, to within float rounding (a millionth of the metric). precision: of the levels
    that are tried. All else as of `sensitivity`; of the options of Sparsifier, the context matters here.

    By bisection, which takes the metric to become only worse as sparsity rises; where it does not, there can be higher
    ones. What is returned are the zeros counted at the highest level that is good enough, over the weights that take
    part; those of the model as it is, if none is.

    >>> from torch import nn
    >>> model = nn.Linear(10, 10)
    >>> def weights_left(model): return int(model.weight.count_nonzero())
    >>> highest_sparsity(model, 30, weights_left)
    0.3
    """
    tolerance, precision = check_number("tolerance", tolerance), check_number("precision", precision, 0, 1)
    if not precision:
        raise ValueError("precision is 0; give the distance of the sparsities to be told apart, such as 0.005")
    meter = Metric.of(learn_or_model, metric, lower_is_better)
    with meter.held():
        one_shot, baseline = OneShot(meter, calibration, loss_func, options), meter.baseline()
        sign, good, bad = (1 if meter.lower_is_better else -1), 0, math.floor(1 / precision + 1e-9) + 1
        reached = one_shot.sparsifier.sparsity
        while bad - good > 1:
            middle = (good + bad) // 2
            level = min(middle * precision, 1.0)
            value = one_shot.measure(level) if one_shot.can_reach(level) else math.nan
            slack = 1e-6 * max(abs(baseline), abs(value))
            within = math.isfinite(value) and sign * (value - baseline) <= tolerance + slack
            good, bad = (middle, bad) if within else (good, middle)
            reached = one_shot.reached if within else reached
    return reached


class OneShot:
    """Makes a model sparse, measures it, and leaves it as it was.

    sizes: parameter name -> number of weights. reached: the sparsity that was counted in the last measurement.
    """

    def __init__(
        self, meter: Metric, calibration: Iterable | None, loss_func: Callable | None, options: dict[str, Any]
    ):
        self.meter, self.reached = meter, 0.0
        try:
            self.sparsifier = Sparsifier(meter.model, **options)
        except ValueError:  # it may need an example input, and data are looked at only for that
            if meter.learn is None or "example_input" in options:
                raise
            self.sparsifier = Sparsifier(meter.model, **{**options, "example_input": first_batch(meter.learn)[:-1]})
        if self.sparsifier.collected.at(*AVERAGED):
            _calibrate(self.sparsifier, meter, calibration, loss_func)
        _check_comparisons(self.sparsifier)
        self.dense = self.sparsifier.state_dict()
        self.sizes = {name: target.parameter.numel() for name, target in self.sparsifier.targets.items()}

    def can_reach(self, sparsity: Sparsity) -> bool:
        """Whether the context allows for so many zeros."""
        try:
            self.sparsifier.check(sparsity)
        except ValueError:
            return False
        return True

    def measure(self, sparsity: Sparsity) -> float:
        """The metric at a sparsity, of the model or by layer."""
        with as_it_was(self.meter.model):
            self.sparsifier.sparsify(sparsity)
            self.reached = self.sparsifier.sparsity
            value = self.meter()
        self.sparsifier.load_state_dict(self.dense)
        return value


def _check_comparisons(sparsifier: Sparsifier) -> None:
    """ValueError for a criterion that compares with an earlier value, and so gives equal scores now."""
    if compares_with_itself(sparsifier):
        raise ValueError(
            f"criterion {name_of(sparsifier.criteria)} compares with an earlier value, and here nothing is "
            "earlier; choose one of the weights as they are, such as large_final, or of data, such as snip"
        )


def _calibrate(sparsifier: Sparsifier, meter: Metric, calibration: Iterable | None, loss_func: Callable | None) -> None:
    """Show a criterion that looks at data what was given, or what the Learner has."""
    if calibration is None and meter.learn is None:
        raise TypeError(
            f"criterion {name_of(sparsifier.criteria)} looks at data; give calibration= a list of batches, and "
            "loss_func= if it is of gradients"
        )
    if meter.learn is None or loss_func is not None:
        if calibration is None:
            *inputs, targets = first_batch(meter.learn)
            calibration = [(*inputs, *targets)]
        sparsifier.calibrate(calibration, loss_func)
    else:
        calibrate_with(meter.learn, sparsifier, calibration)


def _check_levels(levels: Any) -> tuple[float, ...]:
    if isinstance(levels, (str, Mapping, Real)) or not isinstance(levels, Iterable):
        raise TypeError(f"levels are several fractions, such as {LEVELS}, not {levels!r}")
    checked = sorted({check_fraction(level, "a level") for level in levels})
    if not checked or checked[0] == 0 or checked[-1] == 1:
        raise ValueError(
            f"levels are fractions between 0 and 1, which are left out, such as {LEVELS}; not {tuple(checked)}"
        )
    return tuple(checked)


def _shown(steps: list[tuple[str, float]], shows: bool) -> Iterable[tuple[str, float]]:
    """The steps, with a progress bar that tells the layer, if one can be had."""
    try:
        if not shows:
            return steps
        from fastprogress.fastprogress import progress_bar
    except ImportError:
        return steps
    return _told(progress_bar(steps, leave=False))


def _told(bar: Any) -> Iterable[tuple[str, float]]:
    for step in bar:
        bar.comment = step[0]
        yield step
