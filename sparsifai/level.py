"""How much: the sparsity that is asked for, and the layers that each part of it is for."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor, nn

from .target import Pattern, Target, matching

Sparsity = float | Mapping[Pattern, float]


def check_sparsity(sparsity: Any = None, compression_ratio: Any = None) -> Sparsity:
    """The target as a fraction, or a dictionary of fractions by pattern. `compression_ratio` is its other name."""
    if (sparsity is None) == (compression_ratio is None):
        given = "neither is given" if sparsity is None else "both are given"
        raise TypeError(f"sparsity= and compression_ratio= are two names of one number, pass one of them; {given}")
    sparsity = compression_ratio if sparsity is None else sparsity
    if isinstance(sparsity, Mapping):
        if not sparsity:
            raise ValueError("the dictionary of sparsities is empty; give it at least one pattern: {'layer1.*': 0.5}")
        return {pattern: _check_fraction(value) for pattern, value in sparsity.items()}
    return _check_fraction(sparsity)


def _check_fraction(value: Any) -> float:
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"sparsity is a number from 0 to 1, or a dictionary of them by layer, not {value!r}")
    value = float(value)
    if 1 < value <= 100:
        raise ValueError(f"sparsity {value:g} is a percentage, not a fraction; pass {value / 100:g} for {value:g} %")
    if not 0 <= value <= 1:
        raise ValueError(f"sparsity {value!r} is not a fraction from 0 to 1")
    return value


def scaled(sparsity: Sparsity, factor: float) -> Sparsity:
    """factor times the sparsity, of every layer if they differ."""
    if isinstance(sparsity, Mapping):
        return {pattern: factor * fraction for pattern, fraction in sparsity.items()}
    return factor * sparsity


def scopes(
    sparsity: Sparsity,
    targets: Mapping[str, Target],
    dense: Mapping[str, str],
    candidates: Mapping[str, Target],
    model: nn.Module,
) -> list[tuple[float, list[str]]]:
    """The layers of each fraction that is asked for; of several patterns that match a layer the last counts."""
    if not isinstance(sparsity, Mapping):
        return [(sparsity, list(targets))]
    of_layer: dict[str, int] = {}
    for position, pattern in enumerate(sparsity):
        matched = matching(pattern, candidates, model)
        if not matched & targets.keys():
            reasons = "; ".join(f"{name}: {dense[name]}" for name in sorted(matched)[:3])
            raise ValueError(f"sparsity: {pattern!r} matches only layers that stay dense ({reasons})")
        of_layer.update(dict.fromkeys(matched, position))
    parts = [[name for name in targets if of_layer.get(name) == position] for position in range(len(sparsity))]
    return [(fraction, names) for fraction, names in zip(sparsity.values(), parts, strict=True) if names]
