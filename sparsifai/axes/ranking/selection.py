"""Exact ranking over a scope: which groups stay when a given share of the weights is to be zero.

The definition, which the tests check against a slow plain oracle:

1. The groups of all layers in the scope stand in one list, by score, ties in index order.
2. The best group of every layer is taken out: a layer is never emptied, unless it may be.
3. Groups that are masked already come first, so that a rising target only adds zeros.
4. The groups at the head of the list fall, as many as bring the sum of their weights nearest to
   sparsity x weights of the scope; of two equally near sums the larger (round half up).

No threshold decides: of equal scores exactly as many fall as are needed.

How it is reached in about one pass over the scores: the order statistics of a sample bracket the score at which the
falling ends. All groups are divided by the bracket, and only the few within it are ranked among themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...support.chunk import CHUNK
from .device_layer import DeviceLayer
from .on_device import select_on_device
from .scored_layer import ScoredLayer


def select_groups(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Rank the groups of `layers` in one list; for each layer a bool array, True where a group stays.

    Of layers on a GPU, which the host does not look into, on_device.py does the same.
    """
    if not layers:
        return []
    if isinstance(layers[0], DeviceLayer):
        return select_on_device([layers], sparsity)
    total = sum(layer.total for layer in layers)
    alive = sum(layer.weights(layer.alive) for layer in layers)
    wanted, masked = sparsity * total, total - alive
    size = _equal_size(layers)
    if size is not None and math.floor(wanted / size + 0.5) == masked // size:
        return [layer.alive for layer in layers]
    if wanted < masked:
        return _revive(layers, wanted)
    candidates = [layer.alive for layer in layers]
    stays, far = _all_but_lowest(layers, candidates, alive, wanted - masked)
    # The best group of a layer is the last of it to fall: while it is not near, it need not be looked for. With groups
    # of one size, only that of a layer that would be emptied counts; without, that of every layer may.
    at_once = size is None or all(layer.whole for layer in layers)
    if far or layers[0].may_empty or (size is not None and not _empties(layers, stays)):
        return stays
    best: dict[int, np.ndarray] = {}
    while emptied := [n for n, kept in enumerate(stays) if n not in best and (at_once or not kept.any())]:
        best.update(zip(emptied, _best([layers[number] for number in emptied]), strict=True))
        for number in emptied:
            candidates[number] = layers[number].alive.copy()
            candidates[number][best[number]] = False
        available = sum(map(ScoredLayer.weights, layers, candidates))
        stays, _ = _all_but_lowest(layers, candidates, available, wanted - masked)
        for number, index in best.items():
            stays[number][index] = True
    return stays


def select_each(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """As select_groups, each layer ranked by itself; on a GPU all of them at once."""
    if layers and isinstance(layers[0], DeviceLayer):
        return select_on_device([[layer] for layer in layers], sparsity)
    return [stays for layer in layers for stays in select_groups([layer], sparsity)]


def _revive(layers: Sequence[ScoredLayer], wanted: float) -> list[np.ndarray]:
    """A falling target: the best of the masked groups that may come back do so, until `wanted` weights are masked."""
    back = [layer for layer in layers if layer.revives]
    for layer in back:
        layer.check(layer.score, layer.alive)  # which are not ranked
    others = sum(layer.weights(layer.masked) for layer in layers if not layer.revives)
    candidates = [layer.masked for layer in back]
    available = sum(map(ScoredLayer.weights, back, candidates))
    stays, _ = _all_but_lowest(back, candidates, available, max(wanted - others, 0.0)) if back else ([], False)
    of_layer = iter(stays)
    return [layer.alive | next(of_layer) if layer.revives else layer.alive for layer in layers]


def _all_but_lowest(
    layers: Sequence[ScoredLayer], candidates: list[np.ndarray], available: int, amount: float
) -> tuple[list[np.ndarray], bool]:
    """Which candidates stay: all but those of lowest score whose sizes add up to the nearest of `amount`.

    available: weights of all candidates. Also returns whether every layer has candidates far above where the falling
    ends. A bracket that misses, or holds heavy ties, costs time and nothing else.
    """
    low, high = _bracket(layers, candidates, min(amount / max(available, 1), 1.0))
    stays, within, weights, far = _divide(layers, candidates, low, high)
    below = available - weights
    ahead = below + sum(each.weights for each in within)
    if amount < below or (amount >= ahead and high < np.inf):
        low, high = (-np.inf, low) if amount < below else (high, np.inf)
        stays, within, weights, far = _divide(layers, candidates, low, high)
        below = available - weights
    falls = _first(within, amount - below, _equal_size(layers))
    ends = np.cumsum([len(each.places) for each in within])
    for each, fallen in zip(within, np.split(falls, ends[:-1]), strict=True):
        stays[each.layer][each.places[fallen]] = False
    return stays, far


def _bracket(layers: Sequence[ScoredLayer], candidates: list[np.ndarray], share: float) -> tuple[float, float]:
    """Two scores, between which the falling ends with near certainty; infinities, if the groups are few.

    share: of the candidates' weights that fall.
    """
    count = sum(map(len, layers))
    if count < 10_000:
        return -np.inf, np.inf
    # The sample's groups are far apart in memory, each read costs as much as ranking eight of those within the bracket.
    step = slice(None, None, round(2.5 * count ** (1 / 3)))
    drawn = [layer.part(step)[candidate[step]] for layer, candidate in zip(layers, candidates, strict=True)]
    sample = np.concatenate(drawn)
    if not len(sample):
        return -np.inf, np.inf
    middle = share * len(sample)
    if _equal_size(layers) is None:
        of_layer = [layer.size for layer in layers]
        sizes = [
            np.full(len(scores), size) if isinstance(size, int) else size[step][candidate[step]]
            for scores, size, candidate in zip(drawn, of_layer, candidates, strict=True)
        ]
        order = np.argsort(sample)
        sample, upto = sample[order], np.cumsum(np.concatenate(sizes)[order])
        middle = float(np.searchsorted(upto, share * upto[-1]))
    else:
        sample.sort()
    spread = 4 * math.sqrt(len(sample) * share * (1 - share)) + 4
    first, end = math.floor(middle - spread), math.ceil(middle + spread)
    return (
        float(sample[first]) if first >= 0 else -np.inf,
        float(sample[end]) if end < len(sample) else np.inf,
    )


@dataclass
class _Within:
    """What lies within the bracket in a part of a layer: number of the layer, places of groups, scores and sizes."""

    layer: int
    places: np.ndarray
    score: np.ndarray
    size: int | np.ndarray

    @property
    def weights(self) -> int:
        """Weights in these groups."""
        return int(np.sum(self.size) if isinstance(self.size, np.ndarray) else self.size * len(self.places))


def _divide(
    layers: Sequence[ScoredLayer], candidates: list[np.ndarray], low: float, high: float
) -> tuple[list[np.ndarray], list[_Within], int, bool]:
    """For each layer, True at the candidates that do not score below `low`, and the weights of all these; what of them
    lies no higher than `high`; and whether every layer has candidates above."""
    all_stay, within, weights, far = [], [], 0, True
    scratch = np.empty(CHUNK, bool)
    with np.errstate(over="ignore"):  # a bracket of float64 scores may be infinite as a float32
        for number, (layer, candidate) in enumerate(zip(layers, candidates, strict=True)):
            stays, has_above = np.empty(len(layer), bool), False
            for start in range(0, len(layer), CHUNK):
                part = slice(start, start + CHUNK)
                score, stay = layer.part(part), stays[part]
                flag = scratch[: len(score)]
                np.less(score, low, out=flag)
                np.greater(candidate[part], flag, out=stay)
                weights += layer.weights(stay, part)
                np.greater(score, high, out=flag)
                has_above = has_above or bool((stay & flag).any())
                np.greater(stay, flag, out=flag)
                # NaN, neither below nor above, is among these, and so is found at no cost.
                places = np.flatnonzero(flag)
                layer.check(score[places])
                size = layer.size if isinstance(layer.size, int) else layer.size[part][places]
                within.append(_Within(number, start + places, score[places], size))
            all_stay.append(stays)
            far = far and has_above
    return all_stay, within, weights, far


def _first(within: list[_Within], amount: float, size: int | None) -> np.ndarray:
    """Which of the groups in the bracket fall: the lowest, ties in index order, with sizes that add up to `amount`.

    size: of all groups, if it is one. Then they need no order, only the score at which the falling ends.
    """
    score = np.concatenate([each.score for each in within])
    if size is None:
        sizes = np.concatenate([np.broadcast_to(each.size, each.score.shape) for each in within])
        order = np.argsort(score, kind="stable")
        # Group i falls if the sum with it is at least as near to the amount as the sum without it.
        count = int(np.searchsorted(np.cumsum(sizes[order]) - sizes[order] / 2, amount, side="right"))
        falls = np.zeros(len(score), bool)
        falls[order[:count]] = True
        return falls
    count = min(max(math.floor(amount / size + 0.5), 0), len(score))
    if count == 0:
        return np.zeros(len(score), bool)
    last = np.partition(score, count - 1)[count - 1]
    falls = score < last
    falls[np.flatnonzero(score == last)[: count - np.count_nonzero(falls)]] = True
    return falls


def _equal_size(layers: Sequence[ScoredLayer]) -> int | None:
    """The size of all groups, if it is the same in all layers."""
    sizes = {layer.size if isinstance(layer.size, int) else None for layer in layers}
    return sizes.pop() if len(sizes) == 1 else None


def _empties(layers: Sequence[ScoredLayer], stays: list[np.ndarray]) -> bool:
    """Whether a layer has no group left; if groups are whole layers, whether none of the layers is left."""
    empty = [not kept.any() for kept in stays]
    return all(empty) if all(layer.whole for layer in layers) else any(empty)


def _best(layers: Sequence[ScoredLayer]) -> list[np.ndarray]:
    """The place of the best group of every layer: its highest score, the last of equals.

    If groups are whole layers, of the best of them all.
    """
    best = []
    for layer in layers:
        highest = layer.score[layer.alive].max(initial=-np.inf)
        best.append((highest, np.flatnonzero((layer.score == highest) & layer.alive)[-1:]))
    if all(layer.whole for layer in layers):
        highest = max(score for score, index in best if len(index))
        last = max(position for position, (score, index) in enumerate(best) if score == highest and len(index))
        best = [(score, index if position == last else index[:0]) for position, (score, index) in enumerate(best)]
    return [index for _, index in best]
