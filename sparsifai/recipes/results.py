"""The results of a fit, as a recipe records them: measured sparsity, metrics, versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from typing import Any

from ..callbacks.learner import metric_names, unchanged
from ..model.parallel import unwrapped
from ..sparsifier.report import Report
from ..sparsifier.sparsifier import Sparsifier


def results_of(learn: Any, sparsifier: Sparsifier | None = None) -> dict[str, Any]:
    """Measure the results of a fit.

    Args:
        learn: A Learner after its fit. Metrics are computed on its validation data.
        sparsifier: The Sparsifier of the fit, whose selected layers are listed. Default: the layers that a KeepSparsity
            of the Learner keeps sparse; without one, all weights with named axes.

    Returns:
        Plain values: sparsity of the selected layers and of the model, layers, metrics, versions.
    """
    holder = sparsifier or getattr(learn, "keep_sparsity", None)
    report = Report.of(unwrapped(learn.model)) if holder is None else holder.report()
    with unchanged(learn):
        values = learn.validate() or []
    metrics = dict(zip(metric_names(learn), values, strict=False))
    return {
        "sparsity": report.selected.sparsity,
        "sparsity_of_model": report.model.sparsity,
        "layers": {row.name: row.count.sparsity for row in report.rows if not row.why_dense},
        "metrics": {name: _finite(value) for name, value in metrics.items()},
        "versions": {name: _version(name) for name in ("sparsifai", "torch", "fastai")},
    }


def _finite(value: Any) -> float | None:
    """A metric as a file can hold it; None if it is not finite."""
    return float(value) if value is not None and isfinite(value) else None


def _version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
