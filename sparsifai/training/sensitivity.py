"""How sparse a model can get before a metric drops: layer by layer, or as a whole. Pruned once, without training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from operator import itemgetter
from typing import Any

from ..callbacks.learner import bars_of, calibrate_with, first_batch
from ..model.running import as_it_was
from ..sparsifier.layer import selected
from ..sparsifier.mask_building import compares_with_itself
from ..sparsifier.options import Sparsity
from ..sparsifier.sparsifier import Sparsifier
from ..support.arguments import checks_arguments
from ..support.checks import check_fraction, check_number
from ..support.progress import bars
from ..support.progress import progress as with_bar
from ..support.registry import name_of
from ..support.warning import own_filters
from .metric import Metric
from .sensitivity_table import Sensitivity

LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


@checks_arguments(of=Sparsifier)
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
    """Measure a metric with one layer pruned at a time, once and without training.

    With granularity 'head' or 'neuron', one attention or MLP is pruned at a time.

    Model and Learner are not changed, even if the metric fails: weights stay the same bit by bit, and so do buffers,
    gradients, modes and random generators. Each measurement starts from the original weights.

    Source: Li et al., 2017, "Pruning Filters for Efficient ConvNets" (arXiv:1608.08710), section 3.2; Han et al., 2015,
    "Learning both Weights and Connections for Efficient Neural Networks" (arXiv:1506.02626), figure 6.

    Args:
        learn_or_model: A fastai Learner, or any torch.nn.Module.
        metric: For a Learner the name of one of its metrics, or None (the default) for its validation loss. For either,
            a function of the model that returns a number; it is called in evaluation mode without gradients.
        levels: The sparsities to measure at, each above 0 and below 1. Default (0.5, 0.7, 0.8, 0.9, 0.95, 0.98).
        lower_is_better: Whether a better model has a lower metric. By default the name of the metric tells: it is true
            for names with 'loss', 'error', 'mse', 'perplexity' and the like.
        calibration: Batches for criteria that look at data, as for Sparsifier.calibrate. Default the first batch of
            the Learner's training data.
        loss_func: Loss for criteria that need gradients, as for Sparsifier.calibrate. Default the Learner's.
        progress: Show a progress bar, if the Learner shows one and it takes more than a second. Default True.
        **options: Arguments of Sparsifier, such as granularity, criteria, layers and exclude. `coupled=True` is
            an error.

    Returns:
        The metric of each layer at each level, as a table. Its `budget` gives a sparsity for each layer.

    Raises:
        TypeError: An argument has the wrong type, or a criterion looks at data and there is none.
        ValueError: A level is not a fraction, the metric is unknown or not finite before pruning, the criterion
            compares with an earlier value, or what Sparsifier raises.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> def smallest_layer(model): return min(int(layer.weight.count_nonzero()) for layer in (model[0], model[2]))
        >>> measured = sensitivity(model, smallest_layer, levels=(0.5, 0.75), progress=False)
        >>> print(measured)
        smallest_layer is 16 before pruning (higher is better); with one layer pruned at a time it is:
        layer     weights  50%  75%
        ---------------------------
        0.weight       32   16    8
        2.weight       16    8    4
    """
    levels = _check_levels(levels)
    if options.get("coupled"):
        raise ValueError(
            "sensitivity prunes one layer at a time, but coupled filters are pruned together; leave out coupled=True"
        )
    measure = Metric.of(learn_or_model, metric, lower_is_better)
    with bars(progress), bars_of(measure.learn), measure.learner_unchanged():
        one_shot = OneShot(measure, calibration, loss_func, options)
        names = list(one_shot.units)
        for name in names:
            one_shot.sparsifier.check(one_shot.of_unit(name, levels[-1]))
        baseline = measure.baseline()
        values: dict[str, list[float]] = {name: [] for name in names}
        steps = [(name, level) for name in names for level in levels]
        for name, level in with_bar(steps, "sensitivity", name=itemgetter(0)):
            values[name].append(one_shot.metric_at(one_shot.of_unit(name, level)))
    table = tuple(map(tuple, values.values()))
    members = tuple(map(tuple, one_shot.units.values()))
    sizes = tuple(sum(one_shot.sizes[name] for name in unit) for unit in members)
    members = () if names == list(one_shot.sizes) else members
    return Sensitivity(tuple(names), sizes, levels, table, baseline, measure.name, measure.lower_is_better, members)


@checks_arguments(of=Sparsifier)
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
    """Find the highest sparsity at which a metric is at most `tolerance` worse, pruned once and without training.

    The search is a bisection. It assumes that the metric gets worse as the sparsity rises; where it does not, a higher
    sparsity may be possible. Model and Learner are not changed.

    Args:
        learn_or_model: A fastai Learner, or any torch.nn.Module.
        tolerance: How much worse the metric may get, in units of the metric, at least 0. Differences up to a millionth
            of the metric are taken for rounding.
        metric: The metric, as for `sensitivity`. Default the validation loss of a Learner.
        precision: Distance between the sparsities that are tried, above 0 and at most 1. Default 0.005.
        lower_is_better: Whether a better model has a lower metric, as for `sensitivity`. By default the name tells.
        calibration: Batches for criteria that look at data, as for `sensitivity`.
        loss_func: Loss for criteria that need gradients, as for `sensitivity`.
        **options: Arguments of Sparsifier. The context matters here.

    Returns:
        The fraction of zeros counted in the selected layers, at the highest sparsity that is good enough. If none is,
        the fraction of zeros before pruning.

    Raises:
        TypeError: An argument has the wrong type, or a criterion looks at data and there is none.
        ValueError: A number is out of range, the metric is unknown or not finite before pruning, the criterion
            compares with an earlier value, or what Sparsifier raises.

    Example:
        >>> model = nn.Linear(10, 10)
        >>> def remaining_weights(model): return int(model.weight.count_nonzero())
        >>> highest_sparsity(model, 30, remaining_weights)
        0.3
    """
    tolerance, precision = check_number("tolerance", tolerance), check_number("precision", precision, 0, 1)
    if not precision:
        raise ValueError(
            "precision must be above 0, not 0; it is the distance between the sparsities that are tried, such as 0.005"
        )
    measure = Metric.of(learn_or_model, metric, lower_is_better)
    with bars_of(measure.learn), measure.learner_unchanged():
        one_shot, baseline = OneShot(measure, calibration, loss_func, options), measure.baseline()
        sign, good, bad = (1 if measure.lower_is_better else -1), 0, math.floor(1 / precision + 1e-9) + 1
        highest = one_shot.sparsifier.sparsity
        for _ in with_bar(range((bad - 1).bit_length()), "highest sparsity"):  # as many steps as a bisection can take
            if bad - good == 1:
                break
            middle = (good + bad) // 2
            level = min(middle * precision, 1.0)
            value = one_shot.metric_at(level) if one_shot.can_reach(level) else math.nan
            rounding = 1e-6 * max(abs(baseline), abs(value))
            if math.isfinite(value) and sign * (value - baseline) <= tolerance + rounding:
                good, highest = middle, one_shot.measured_sparsity
            else:
                bad = middle
    return highest


class OneShot:
    """Prunes a model once, measures its metric, and restores the model.

    Args:
        measure: The metric and its model.
        calibration: Batches for a criterion that looks at data, or None.
        loss_func: The loss for a criterion that needs gradients, or None.
        options: Arguments of Sparsifier.

    Attributes:
        sizes: Number of weights of each selected layer, by parameter name.
        units: What is pruned by itself -> parameter names: each layer; with joint groups, each attention or MLP.
        measured_sparsity: The fraction of zeros counted in the last measurement.
    """

    def __init__(
        self, measure: Metric, calibration: Iterable | None, loss_func: Callable | None, options: dict[str, Any]
    ):
        self.measure, self.measured_sparsity = measure, 0.0
        try:
            self.sparsifier = Sparsifier(measure.model, **options)
        except ValueError:  # it may need an example input; a batch of the Learner is drawn only for that
            if measure.learn is None or "example_input" in options:
                raise
            example_input = first_batch(measure.learn)[:-1]
            self.sparsifier = Sparsifier(measure.model, **{**options, "example_input": example_input})
        if self.sparsifier.looks_at_data:
            _calibrate(self.sparsifier, measure, calibration, loss_func)
        _check_comparisons(self.sparsifier)
        self.dense = self.sparsifier.state_dict()
        self.sizes = {name: layer.parameter.numel() for name, layer in selected(self.sparsifier.layers).items()}
        coupling = self.sparsifier.ranking.coupling
        self.units = {name: [name] for name in self.sizes} if coupling is None else coupling.units(self.sizes)

    def of_unit(self, unit: str, level: float) -> Sparsity:
        """One level for all weights of a unit."""
        return dict.fromkeys(self.units[unit], level)

    def can_reach(self, sparsity: Sparsity) -> bool:
        """Whether the context can prune to this sparsity."""
        try:
            self.sparsifier.check(sparsity)
        except ValueError:
            return False
        return True

    def metric_at(self, sparsity: Sparsity) -> float:
        """The metric of the model pruned to a sparsity. sparsity: a fraction, or {parameter name: fraction}."""
        with as_it_was(self.measure.model):
            with own_filters():  # what was reached is in the table
                warnings.filterwarnings("ignore", "the sparsity that was asked for cannot be reached")
                self.sparsifier.sparsify(sparsity)
            self.measured_sparsity = self.sparsifier.sparsity
            value = self.measure()
        self.sparsifier.load_state_dict(self.dense)
        return value


def _check_comparisons(sparsifier: Sparsifier) -> None:
    """Refuse a criterion that compares with an earlier value: nothing has been trained, so all scores are equal."""
    criterion = sparsifier.collected.criterion
    if compares_with_itself(selected(sparsifier.layers), sparsifier.ranking, sparsifier.collected):
        raise ValueError(
            f"criterion {name_of(criterion)} compares the weights with earlier values, but nothing is "
            "trained here; choose a criterion of the present weights, such as large_final, or of data, such as snip"
        )


def _calibrate(
    sparsifier: Sparsifier, measure: Metric, calibration: Iterable | None, loss_func: Callable | None
) -> None:
    """Show a criterion that looks at data the user's batches and loss, or those of the Learner."""
    criterion = sparsifier.collected.criterion
    if calibration is None and measure.learn is None:
        raise TypeError(
            f"criterion {name_of(criterion)} looks at data; pass calibration= a list of batches, and "
            "loss_func= if it needs gradients"
        )
    if measure.learn is None or loss_func is not None:
        if calibration is None:
            *inputs, targets = first_batch(measure.learn)
            calibration = [(*inputs, *targets)]
        sparsifier.calibrate(calibration, loss_func)
    else:
        calibrate_with(measure.learn, sparsifier, calibration)


def _check_levels(levels: Any) -> tuple[float, ...]:
    if isinstance(levels, (str, Mapping, Real)) or not isinstance(levels, Iterable):
        raise TypeError(f"levels must be several fractions, such as {LEVELS}, not {levels!r}")
    checked = sorted({check_fraction(level, "a level") for level in levels})
    if not checked or checked[0] == 0 or checked[-1] == 1:
        raise ValueError(f"levels must be fractions above 0 and below 1, such as {LEVELS}, not {tuple(checked)}")
    return tuple(checked)
