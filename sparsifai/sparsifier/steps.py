"""The sparsities on the way to a target sparsity that is reached in steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from ..model.patterns import matching_each
from ..support.registry import name_of
from .collection import CollectedQuantities
from .layer import Layers
from .options import Sparsity


def exponential(start: float, end: float, t: float) -> float:
    """1 - (1 - start)^(1 - t) (1 - end)^t: the sparsity at t from 0 to 1 while the density falls exponentially.

    >>> round(exponential(0, 0.75, 0.5), 6)
    0.5
    """
    return end if t == 1 else 1 - (1 - start) ** (1 - t) * (1 - end) ** t


def sparsity_at(
    t: float, sparsity: Sparsity, levels: Mapping[str, float], layers: Layers, model: nn.Module
) -> Sparsity:
    """The sparsity that is asked for at t from 0 to 1 on the way to `sparsity`.

    Args:
        t: Part of the way, from 0 to 1.
        sparsity: The target sparsity, or one for each pattern.
        levels: Layer name -> the level at the beginning. A pattern begins at the lowest level of its layers, so that
            none is sparser on the way than at the end.
        layers: All layers.
        model: The model, for patterns that are modules.
    """
    if not isinstance(sparsity, Mapping):
        return exponential(min(levels.values()), sparsity, t)
    weights = {name: layer.weight for name, layer in layers.items()}
    matched = matching_each(sparsity, weights, model)
    starts = [min(levels[name] for name in names & levels.keys()) for names in matched]
    return {pattern: exponential(start, end, t) for (pattern, end), start in zip(sparsity.items(), starts, strict=True)}


def check_repeatable(collected: CollectedQuantities, calibration: tuple | None) -> None:
    """Check that a criterion that looks at data can do so in every step.

    Args:
        collected: The criterion and its quantities.
        calibration: The batches and the loss of the last `calibrate`, or None.

    Raises:
        ValueError: It cannot.
    """
    if collected.looks_at_data and (calibration is None or isinstance(calibration[0], Iterator)):
        raise ValueError(
            f"sparsify: with steps=, {name_of(collected.criterion)} looks at data in each step; call calibrate before, "
            "with batches that can be iterated over again, such as a list"
        )
