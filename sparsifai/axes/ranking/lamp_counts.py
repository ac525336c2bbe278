"""How many weights of each layer a joint ranking of LAMP scores prunes, in a few passes over the weights.

The LAMP score of a weight is w^2 over the sum of v^2, v being all weights of the layer that rank no lower by magnitude.
Within a layer the score rises with the magnitude, so only a number is needed of each layer. A sample gives each layer a
bracket: two magnitudes between which its last pruned weight lies. Below the bracket weights are counted, above it their
squares are summed, and only the few weights within it are sorted and scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ...model.tensors import widened
from ...support.chunk import CHUNK
from .order_statistic import nth_lowest, stride
from .scored_layer import nan_message

# Weights of at most this number are sorted as a whole.
FEW = 10_000

# Divided by less, all scores are zero: of a layer of zeros.
SMALLEST = 1e-300


def lamp_counts(layers: Sequence[Sequence[tuple[str, Tensor]]], sparsity: float, may_empty: bool) -> list[int]:
    """Rank all weights of all layers by their LAMP scores, ties in index order, and count those that are pruned.

    Sums are in float64. Between scores of different layers that differ by less than their rounding, the order is
    open.

    Args:
        layers: The weights of each layer, more than one if layers are coupled: the name, and the values in one
            dimension on the CPU.
        sparsity: Fraction of all weights to prune.
        may_empty: Whether a layer may lose its best weight too.

    Returns:
        For each layer the number of weights that are pruned.

    Raises:
        ValueError: A score is NaN. The message names the weight.
    """
    sizes = [sum(len(values) for _, values in layer) for layer in layers]
    wanted = math.floor(sparsity * sum(sizes) + 0.5)
    if wanted == 0:
        return [0] * len(layers)
    counts = dict.fromkeys(range(len(layers)), 0)
    emptied: dict[int, int] = {}  # layers that keep only their best weight; the others make up for it
    while free := [number for number in counts if number not in emptied]:
        found = iter(_lowest([weight for number in free for weight in layers[number]], wanted - sum(emptied.values())))
        counts |= {number: sum(next(found) for _ in layers[number]) for number in free}
        more = {number: sizes[number] - 1 for number in free if counts[number] == sizes[number] and not may_empty}
        if not more:
            break
        emptied |= more
    return list((counts | emptied).values())


def _lowest(weights: Sequence[tuple[str, Tensor]], wanted: int) -> list[int]:
    """How many of each weight's values are among the `wanted` lowest of all."""
    brackets = _brackets([values for _, values in weights], wanted)
    stretches = [_stretch(*weight, *bracket) for weight, bracket in zip(weights, brackets, strict=True)]
    while True:
        counts = _count([stretch.scores for stretch in stretches], wanted - sum(stretch.below for stretch in stretches))
        missed = False
        for number, (stretch, count, bracket) in enumerate(zip(stretches, counts, brackets, strict=True)):
            low = -np.inf if count == 0 and stretch.below else bracket[0]
            high = np.inf if count == len(stretch.scores) and stretch.above else bracket[1]
            if (low, high) != bracket:
                missed = True
                brackets[number], stretches[number] = (low, high), _stretch(*weights[number], low, high)
        if not missed:
            return [stretch.below + count for stretch, count in zip(stretches, counts, strict=True)]


@dataclass
class _Stretch:
    """The values of a weight within its bracket. below and above: number of values outside. scores: in order."""

    below: int
    above: int
    scores: np.ndarray


def _stretch(name: str, values: Tensor, low: float, high: float) -> _Stretch:
    """Score the values whose magnitude is above `low` and not above `high`."""
    below, within, squares = 0, [], [0.0]
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
        for start in range(0, len(values), CHUNK):
            magnitude = np.abs(widened(values[start : start + CHUNK]).numpy())
            is_below, is_above = magnitude <= low, magnitude > high
            below += np.count_nonzero(is_below)
            # NaN is neither below nor above the bracket, so it is among these and found at no extra cost.
            within.append(magnitude[np.flatnonzero(is_below == is_above)])
            if high < np.inf:
                magnitude *= is_above
                squares.append(float(np.square(magnitude, dtype=np.float64).sum()))
        inside = np.sort(np.concatenate(within)).astype(np.float64)
        square, above = inside * inside, float(np.sum(squares))
        total = np.append(above, square[::-1]).cumsum()[:0:-1]
        scores = square / np.maximum(total, SMALLEST)
    if not math.isfinite(above) or np.isnan(scores).any():
        raise ValueError(nan_message(name))
    return _Stretch(below, len(values) - below - len(inside), scores)


def _count(scores: Sequence[np.ndarray], wanted: int) -> list[int]:
    """How many of each are among the `wanted` lowest of all, ties in index order. scores: each in rising order."""
    together = np.concatenate(scores)
    if not 0 < wanted < len(together):
        return [len(each) if wanted > 0 else 0 for each in scores]
    last = nth_lowest(together, wanted)
    counts = [int(np.searchsorted(each, last)) for each in scores]
    rest = wanted - sum(counts)
    for number, each in enumerate(scores):
        ties = min(int(np.searchsorted(each, last, side="right")) - counts[number], rest)
        counts[number], rest = counts[number] + ties, rest - ties
    return counts


def _brackets(weights: Sequence[Tensor], wanted: int) -> list[tuple[float, float]]:
    """For each weight two magnitudes between which its last pruned value lies, with near certainty."""
    steps = [stride(round(1.5 * len(values) ** (1 / 3))) for values in weights]
    samples, scores, errors = [], [], []
    with np.errstate(invalid="ignore", over="ignore"):
        for values, step in zip(weights, steps, strict=True):
            sample = np.sort(np.abs(widened(values[::step]).numpy())).astype(np.float64)
            square = sample * sample
            total = np.maximum(square[::-1].cumsum()[::-1], SMALLEST)
            samples.append(sample)
            scores.append(square / (step * total))
            variance = (square * square)[::-1].cumsum()[::-1] - total * total / len(sample)
            # Three and a half standard deviations of the sum, in proportion to it.
            errors.append(3.5 * np.sqrt(np.maximum(variance, 0)) / total)
        # The scores of each weight are in order, so every eighth, in the middle of its eight, tells nearly as much.
        thinned = [score[4::8] for score in scores]
        order = np.argsort(np.concatenate(thinned))
        ranked = np.concatenate(thinned)[order]
        upto = np.repeat(8 * np.array(steps), [len(score) for score in thinned])[order].cumsum()
        # Four standard deviations, or more, of a number of weights that the sample estimates.
        spread = 2 * math.sqrt(sum(step * len(values) for step, values in zip(steps, weights, strict=True)))
        first, end = np.searchsorted(upto, [wanted - spread, wanted + spread])
        lowest = ranked[first - 1] if first > 0 else -np.inf
        highest = ranked[end] if end < len(ranked) else np.inf
        brackets = []
        for values, sample, score, error in zip(weights, samples, scores, errors, strict=True):
            # Of the lowest itself all are taken to be pruned, as the zeros of masked weights are.
            highest_score = np.minimum.accumulate((score * (1 + error))[::-1])[::-1]
            under = np.searchsorted(highest_score, lowest, side="right")
            lowest_score = np.maximum.accumulate(score * (1 - error))
            over = np.searchsorted(lowest_score, highest, side="right")
            brackets.append(
                (
                    float(sample[under - 1]) if under > 0 and len(values) > FEW else -np.inf,
                    float(sample[over]) if over < len(sample) and len(values) > FEW else np.inf,
                )
            )
    return brackets
