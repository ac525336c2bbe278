"""Exact ranking over a scope: which groups fall so that a given share of the weights is zero.

The definition, which the tests check against a slow plain oracle:

1. The groups of all layers in the scope stand in one list, by score, ties in index order.
2. The best group of every layer is taken out: a layer is never emptied.
3. Groups that are masked already come first, so that a rising target only adds zeros.
4. The groups at the head of the list fall, as many as bring the sum of their weights nearest to
   sparsity x weights of the scope; of two equally near sums the larger (round half up).

No threshold decides: of equal scores exactly as many fall as are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .on_device import DeviceLayer, select_on_device

if TYPE_CHECKING:
    from .target import Target

# Groups that are looked at in one go: what is computed of so many stays in the cache.
PART = 131072


@dataclass
class ScoredLayer:
    """One layer as a context sees it; arrays have one entry per group, in index order.

    part: the scores of a slice of the groups, floats; called for one slice after the other, so that scores that are
    computed there need not be kept. alive: not zero already. size: weights in a group, one number where all groups
    are equal. whole: a group is the whole layer; then the scope, not every layer, keeps its best group.
    """

    target: Target
    part: Callable[[slice], np.ndarray]
    alive: np.ndarray
    size: int | np.ndarray = 1
    whole: bool = False

    def __len__(self) -> int:
        return len(self.alive)

    @cached_property
    def score(self) -> np.ndarray:
        """The scores of all groups."""
        score = self.part(slice(None))
        self.check(score)
        return score

    @property
    def masked(self) -> np.ndarray:
        """Groups that are zero already."""
        return ~self.alive

    def weights(self, chosen: np.ndarray, part: slice = slice(None)) -> int:
        """Number of weights in the chosen groups, of all or of those in a part."""
        if isinstance(self.size, int):
            return self.size * int(np.count_nonzero(chosen))
        return int(self.size[part][chosen].sum())

    def check(self, score: np.ndarray) -> None:
        """ValueError if there is NaN among scores of this layer."""
        if np.isnan(score).any():
            raise ValueError(nan_message(self.target.name))


def nan_message(name: str) -> str:
    """What is wrong with scores of a layer that are NaN."""
    return f"NaN scores for {name}: look for NaN or inf in its weights, or in what the criterion makes of them"


def select_groups(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Rank the groups of `layers` in one list; for each layer a bool array, True where a group falls.

    Of layers on a GPU, which the host does not look into, on_device.py does the same.
    """
    if isinstance(layers[0], DeviceLayer):
        return select_on_device(layers, sparsity)
    total = sum(layer.size * len(layer) if isinstance(layer.size, int) else int(layer.size.sum()) for layer in layers)
    alive = sum(layer.weights(layer.alive) for layer in layers)
    wanted, masked = sparsity * total, total - alive
    size = _equal_size(layers)
    if size is not None and math.floor(wanted / size + 0.5) == masked // size:
        return [layer.masked for layer in layers]
    if wanted < masked:
        # A falling target: the best of the masked groups come back, no other one falls.
        for layer in layers:
            layer.check(layer.score[layer.alive])  # which are not ranked
        fallen, _ = _lowest(layers, [layer.masked for layer in layers], masked, wanted)
        return [falls & layer.masked for falls, layer in zip(fallen, layers, strict=True)]
    candidates = [layer.alive for layer in layers]
    fallen, far = _lowest(layers, candidates, alive, wanted - masked)
    # The best group of a layer is the last of it to fall: while it is not near, it need not be looked for. With groups
    # of one size, only that of a layer that would be emptied counts; without, that of every layer may.
    at_once = size is None or all(layer.whole for layer in layers)
    if far or (size is not None and not _empties(layers, fallen)):
        return fallen
    best: dict[int, np.ndarray] = {}
    while emptied := [n for n, falls in enumerate(fallen) if n not in best and (at_once or falls.all())]:
        best.update(zip(emptied, _best([layers[number] for number in emptied]), strict=True))
        for number in emptied:
            candidates[number] = layers[number].alive.copy()
            candidates[number][best[number]] = False
        available = sum(map(ScoredLayer.weights, layers, candidates))
        fallen, _ = _lowest(layers, candidates, available, wanted - masked)
        for number, index in best.items():
            fallen[number][index] = False
    return fallen


def _lowest(
    layers: Sequence[ScoredLayer], candidates: list[np.ndarray], available: int, amount: float
) -> tuple[list[np.ndarray], bool]:
    """Which groups do not stay: those candidates of lowest score whose sizes add up to the nearest of `amount`, and
    all that are no candidates. And whether every layer has candidates far above where the falling ends.

    available: weights of all candidates.
    The order statistics of a sample bracket the score at which the falling ends. One pass, in parts that stay in the
    cache, divides all groups by the bracket and collects the few within, which alone are ranked. A bracket that
    misses, or holds heavy ties, costs time and nothing else.
    """
    low, high = _bracket(layers, candidates, min(amount / max(available, 1), 1.0))
    fallen, within, below, far = _divide(layers, candidates, low, high)
    ahead = below + sum(each.weights for each in within)
    if amount < below or (amount >= ahead and high < np.inf):
        low, high = (-np.inf, low) if amount < below else (high, np.inf)
        fallen, within, below, far = _divide(layers, candidates, low, high)
    falls = _first(within, amount - below, _equal_size(layers))
    for each, chosen in zip(
        within, np.split(falls, np.cumsum([len(each.places) for each in within])[:-1]), strict=True
    ):
        fallen[each.layer][each.places[chosen]] = True
    return fallen, far


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
    """For each layer, True where a group is no candidate or scores below `low`; what lies from `low` to `high`; the
    weights of the candidates below; and whether every layer has candidates above."""
    fallen, within, below, far = [], [], 0, True
    between = np.empty(PART, bool)
    for number, (layer, candidate) in enumerate(zip(layers, candidates, strict=True)):
        falls, above = np.empty(len(layer), bool), False
        for start in range(0, len(layer), PART):
            part = slice(start, start + PART)
            score, is_candidate, is_below = layer.part(part), candidate[part], falls[part]
            is_between = between[: len(score)]
            with np.errstate(over="ignore"):  # a bracket of float64 scores may be infinite as a float32
                np.less(score, low, out=is_below)
                np.greater(score, high, out=is_between)
            above = above or bool((is_between & is_candidate).any())
            # Neither below nor above; NaN is neither, and so is found at no cost.
            np.equal(is_below, is_between, out=is_between)
            is_between &= is_candidate
            is_below &= is_candidate
            places = np.flatnonzero(is_between)
            layer.check(score[places])
            size = layer.size if isinstance(layer.size, int) else layer.size[part][places]
            within.append(_Within(number, start + places, score[places], size))
            below += (
                layer.size * np.count_nonzero(is_below)
                if isinstance(layer.size, int)
                else int(layer.size[part][is_below].sum())
            )
            np.greater_equal(is_below, is_candidate, out=is_below)  # or no candidate
        fallen.append(falls)
        far = far and above
    return fallen, within, below, far


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


def _empties(layers: Sequence[ScoredLayer], fallen: list[np.ndarray]) -> bool:
    """Whether a layer has no group left; if groups are whole layers, whether none of the layers is left."""
    empty = [bool(falls.all()) for falls in fallen]
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


def bundle(layer: ScoredLayer, count: int) -> tuple[ScoredLayer, np.ndarray]:
    """Join groups that follow each other in rank into bundles of `count`, the lowest taking the remainder.

    Whole bundles fall, so the number of groups kept is a multiple of `count`, or all. A bundle ranks by the score in
    its middle. Also returns the bundle of every group.
    """
    order = np.lexsort((layer.score, ~layer.masked))
    remainder = len(order) % count
    of_rank = (np.arange(len(order)) + (count - remainder) % count) // count
    of_group = np.empty(len(order), int)
    of_group[order] = of_rank
    starts = np.flatnonzero(np.diff(of_rank, prepend=-1))
    lengths = np.diff(starts, append=len(order))
    joined = ScoredLayer(
        layer.target,
        layer.score[order][starts + lengths // 2].__getitem__,
        alive=np.bincount(of_group, weights=layer.masked) == 0,
        size=np.bincount(of_group, weights=np.broadcast_to(layer.size, len(order))).astype(np.int64),
        whole=layer.whole,
    )
    return joined, of_group


def survivors(alive: Any, falls: Any) -> Tensor:
    """Alive and not fallen; on the CPU, in the memory of `falls`."""
    if isinstance(falls, np.ndarray):
        return torch.from_numpy(np.greater(alive, falls, out=falls))
    return alive & ~falls


def all_equal(layers: Sequence[ScoredLayer]) -> bool:
    """Whether all groups of all layers have one score."""
    return len({float(edge) for layer in layers for edge in (layer.score.min(), layer.score.max())}) == 1
