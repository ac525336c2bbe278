"""Reaching a sparsity in steps, with scores anew in each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..axes.quantity import AVERAGED
from ..model.patterns import matching
from ..support.registry import name_of
from .arguments import Sparsity


def sparsify_in_steps(sparsifier: Any, sparsity: Sparsity, steps: int) -> None:
    """Density d_i = d_0^(1 - i/n) d_n^(i/n); criteria that look at data see the batches of calibrate in each.

    If a step fails, nothing has changed.
    """
    state, looks = sparsifier.state_dict(), bool(sparsifier.collected.at(*AVERAGED))
    weights = [(parameter, parameter.detach().clone()) for parameter, _ in sparsifier.masked_parameters()]
    calibration = sparsifier._calibration
    if looks and (calibration is None or isinstance(calibration[0], Iterator)):
        raise ValueError(
            f"sparsify in steps: {name_of(sparsifier.criteria)} looks at data anew in each; call calibrate before, "
            "with batches that can be gone through again, such as a list"
        )
    try:
        for step in range(1, steps + 1):
            if looks and (step > 1 or sparsifier.collected.begins):
                sparsifier.calibrate(*calibration)
            sparsifier.sparsify(_on_the_way(sparsifier, sparsity, state["levels"], step / steps))
    except BaseException:
        sparsifier.load_state_dict(state)
        for parameter, weight in weights:
            parameter.copy_(weight)
        raise


def exponential(start: float, end: float, t: float) -> float:
    """The sparsity between two at t from 0 to 1, at which the density falls exponentially.

    >>> round(exponential(0, 0.75, 0.5), 6)
    0.5
    """
    return end if t == 1 else 1 - (1 - start) ** (1 - t) * (1 - end) ** t


def _on_the_way(sparsifier: Any, sparsity: Sparsity, levels: Mapping[str, float], t: float) -> Sparsity:
    """The sparsity of every scope at t."""
    if not isinstance(sparsity, Mapping):
        return exponential(min(levels.values()), sparsity, t)
    # The lowest of the layers, so that none is sparser on the way than at the end.
    starts = {
        pattern: min(
            levels[name] for name in matching(pattern, sparsifier.candidates, sparsifier.model) & levels.keys()
        )
        for pattern in sparsity
    }
    return {pattern: exponential(starts[pattern], end, t) for pattern, end in sparsity.items()}
