"""Exact ranking over a scope: which groups are kept when a given fraction of the weights is pruned.

The definition, which the tests check against a slow and plain implementation:

1. The groups of all layers in the scope are put in one list, by score, equal scores in index order.
2. The best group of every layer is taken out of the list: a layer is never emptied, unless `may_empty` allows it.
3. Groups that are masked already are moved to the head of the list, so that a rising sparsity only adds zeros.
4. Groups are pruned from the head of the list, as many as bring the sum of their weights nearest to
   sparsity x weights of the scope; of two sums that are equally near, the larger (round half up).

There is no threshold: of groups with equal scores exactly as many are pruned as are needed.

The fast implementation needs about one pass over the scores. It looks for the last score to be pruned. A sample of the
scores gives a bracket, which is two scores between which the last one lies. All groups are compared with the bracket,
and only the few groups within it are ranked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .device_layer import DeviceLayer
from .on_device import select_on_device
from .order_statistic import nth_lowest, stride
from .scored_layer import Divided, ScoredLayer

# Half the width of the bracket, in standard deviations. The score is mostly in the first, nearly always in the second.
WIDTHS = (2.5, 6.0, math.inf)


def select_groups(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Rank the groups of some layers together, and prune those with the lowest scores.

    Contexts call it: 'global' is select_groups(layers, sparsity), and 'local' calls it once per layer.

    The number of weights pruned is as near to sparsity x weights of all layers as the group sizes allow. Groups with
    equal scores are pruned in index order. Every layer keeps its best group, unless it has `may_empty`. Masked groups
    stay masked, unless the sparsity is lower than that of the masks: then the best masked groups of the layers
    with `revives` are revived.

    Args:
        layers: The layers to rank together, in the form in which a context gets them.
        sparsity: Fraction of the weights of all these layers to prune, from 0 to 1.

    Returns:
        For each layer a bool array with one entry per group, in index order: True where the group is kept.

    Raises:
        ValueError: The score of a group that is ranked is NaN. The message names the layer.

    Example:
        >>> def spare_the_first(layers, sparsity):
        ...     return [*select_groups(layers[:1], sparsity / 2), *select_groups(layers[1:], sparsity)]
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 8))
        >>> sparsifier = Sparsifier(model, context=spare_the_first)
        >>> sparsifier.sparsify(0.5)
        >>> [int((~mask).sum()) for mask in sparsifier.masks.values()]  # of 20 and 40 weights
        [5, 20]
    """
    # Layers on a GPU are `DeviceLayer`s and their arrays tensors. The host does not read them.
    if not layers:
        return []
    if isinstance(layers[0], DeviceLayer):
        return select_on_device([layers], sparsity)
    if len(layers) == 1:
        layers = [layers[0].alone]
    total = sum(layer.total for layer in layers)
    alive = sum(layer.weights(layer.alive) for layer in layers)
    wanted, masked = sparsity * total, total - alive
    size = _equal_size(layers)
    if size is not None and math.floor(wanted / size + 0.5) == masked // size:
        return [layer.alive for layer in layers]
    if wanted < masked:
        return _revive(layers, wanted)
    candidates = [layer.alive for layer in layers]
    all_kept, far = _all_but_lowest(layers, candidates, alive, wanted - masked)
    # The best group of a layer is the last of it to be pruned, so it is searched for only where pruning comes near it.
    # With groups of one size it matters only in a layer that would be emptied, with unequal sizes in every layer.
    at_once = size is None or all(layer.whole for layer in layers)
    if far or layers[0].may_empty or (size is not None and not _empties(layers, all_kept)):
        return all_kept
    best: dict[int, np.ndarray] = {}
    while emptied := [n for n, kept in enumerate(all_kept) if n not in best and (at_once or not kept.any())]:
        best.update(zip(emptied, _best([layers[number] for number in emptied]), strict=True))
        for number in emptied:
            candidates[number] = layers[number].alive.copy()
            candidates[number][best[number]] = False
        available = sum(map(ScoredLayer.weights, layers, candidates))
        all_kept, _ = _all_but_lowest(layers, candidates, available, wanted - masked)
        for number, index in best.items():
            all_kept[number][index] = True
    return all_kept


def select_each(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """As select_groups, each layer ranked by itself; on a GPU all of them at once."""
    if layers and isinstance(layers[0], DeviceLayer):
        return select_on_device([[layer] for layer in layers], sparsity)
    return [stays for layer in layers for stays in select_groups([layer], sparsity)]


def _revive(layers: Sequence[ScoredLayer], wanted: float) -> list[np.ndarray]:
    """Lower the sparsity: revive the best masked groups that may be revived, until `wanted` weights are masked."""
    reviving = [layer for layer in layers if layer.revives]
    for layer in reviving:
        layer.check(layer.score, layer.alive)  # groups that are not masked are not ranked, so NaN would not be found
    others = sum(layer.weights(layer.masked) for layer in layers if not layer.revives)
    candidates = [layer.masked for layer in reviving]
    available = sum(map(ScoredLayer.weights, reviving, candidates))
    revived: list[np.ndarray] = []
    if reviving:
        revived, _ = _all_but_lowest(reviving, candidates, available, max(wanted - others, 0.0))
    of_layer = iter(revived)
    return [layer.alive | next(of_layer) if layer.revives else layer.alive for layer in layers]


def _all_but_lowest(
    layers: Sequence[ScoredLayer], candidates: list[np.ndarray], available: int, amount: float
) -> tuple[list[np.ndarray], bool]:
    """Keep all candidates but those of lowest score, whose sizes add up to the value nearest to `amount`.

    Args:
        layers: The layers to rank together.
        candidates: For each layer, True where a group may be pruned.
        available: Number of weights in all candidates.
        amount: Number of weights to prune.

    Returns:
        For each layer, True at the candidates that are kept; and whether every layer has candidates far above the last
        score that is pruned. A bracket that misses this score, or holds many equal scores, only costs time.
    """
    share = min(amount / max(available, 1), 1.0)
    sample, middle = _sample(layers, candidates, share)
    for width in WIDTHS:
        low, high = _bracket(sample, middle, share, width)
        divided = _divide(layers, candidates, low, high)
        below = available - sum(each.weights for each in divided)
        ahead = below + sum(map(_weights_within, layers, divided))
        if below <= amount and (amount < ahead or high == np.inf):
            break
    stays, start = ~_first(layers, divided, amount - below), 0
    for each in divided:
        each.kept[each.places] = stays[start : start + len(each.places)]
        start += len(each.places)
    return [each.kept for each in divided], all(each.has_above for each in divided)


def _sample(layers: Sequence[ScoredLayer], candidates: list[np.ndarray], share: float) -> tuple[np.ndarray, float]:
    """Scores of some candidates, none if the groups are few; and where among them the last to be pruned is expected.

    share: Fraction of the candidates' weights to prune.
    """
    count = sum(map(len, layers))
    if count < 10_000:
        return np.empty(0), 0.0
    # To read a group of the sample, which are far apart in memory, costs about as much as to rank one within the
    # bracket. Of so many groups, both together cost least; a small share has a narrow bracket and needs fewer.
    step = stride(round(0.4 * (count / max(share * (1 - share), 1e-4)) ** (1 / 3)))
    drawn = [layer.sample(step, candidate) for layer, candidate in zip(layers, candidates, strict=True)]
    sample = np.concatenate(drawn)
    if not len(sample) or _equal_size(layers) is not None:
        return sample, share * len(sample)
    of_layer = [layer.size for layer in layers]
    sizes = [
        np.full(len(scores), size) if isinstance(size, int) else size[::step][candidate[::step]]
        for scores, size, candidate in zip(drawn, of_layer, candidates, strict=True)
    ]
    order = np.argsort(sample)
    upto = np.cumsum(np.concatenate(sizes)[order])
    return sample[order], float(np.searchsorted(upto, share * upto[-1]))


def _bracket(sample: np.ndarray, middle: float, share: float, width: float) -> tuple[float, float]:
    """Two scores between which the last score to be pruned probably lies; infinities if nothing is known.

    sample and middle: As of `_sample`; the sample is reordered. width: In standard deviations.
    """
    if not len(sample) or width == math.inf:
        return -np.inf, np.inf
    spread = width * (math.sqrt(len(sample) * share * (1 - share)) + 1)
    first, end = math.floor(middle - spread), math.ceil(middle + spread)
    if places := [place for place in (first, end) if 0 <= place < len(sample)]:
        sample.partition(places)
    return (
        float(sample[first]) if first >= 0 else -np.inf,
        float(sample[end]) if end < len(sample) else np.inf,
    )


def _divide(layers: Sequence[ScoredLayer], candidates: list[np.ndarray], low: float, high: float) -> list[Divided]:
    """Compare the candidates of all layers with the bracket."""
    return [layer.divide(candidate, low, high) for layer, candidate in zip(layers, candidates, strict=True)]


def _weights_within(layer: ScoredLayer, divided: Divided) -> int:
    """Number of weights in the groups of a layer that are within the bracket."""
    return layer.size * len(divided.places) if isinstance(layer.size, int) else int(layer.size[divided.places].sum())


def _first(layers: Sequence[ScoredLayer], divided: list[Divided], amount: float) -> np.ndarray:
    """Which groups within the bracket are pruned: the lowest, ties in index order, whose sizes add up to `amount`."""
    score = np.concatenate([each.scores for each in divided])
    size = _equal_size(layers)
    if size is None:
        size_of = np.concatenate(
            [np.broadcast_to(layer.size, len(layer))[each.places] for layer, each in zip(layers, divided, strict=True)]
        )
        order = np.argsort(score, kind="stable")
        # Group i is pruned if the sum with it is at least as near to the amount as the sum without it.
        count = int(np.searchsorted(np.cumsum(size_of[order]) - size_of[order] / 2, amount, side="right"))
        pruned = np.zeros(len(score), bool)
        pruned[order[:count]] = True
        return pruned
    # With groups of one size no order is needed, only the last score to be pruned.
    count = min(max(math.floor(amount / size + 0.5), 0), len(score))
    if count == 0:
        return np.zeros(len(score), bool)
    last = nth_lowest(score, count)
    pruned = score < last
    pruned[np.flatnonzero(score == last)[: count - np.count_nonzero(pruned)]] = True
    return pruned


def _equal_size(layers: Sequence[ScoredLayer]) -> int | None:
    """The size of all groups, if all groups of all layers have the same; else None."""
    sizes = {layer.size if isinstance(layer.size, int) else None for layer in layers}
    return sizes.pop() if len(sizes) == 1 else None


def _empties(layers: Sequence[ScoredLayer], all_kept: list[np.ndarray]) -> bool:
    """Whether a layer keeps no group; if groups are whole layers, whether no layer is kept."""
    empty = [not kept.any() for kept in all_kept]
    return all(empty) if all(layer.whole for layer in layers) else any(empty)


def _best(layers: Sequence[ScoredLayer]) -> list[np.ndarray]:
    """Index of the best group of every layer: the highest score, the last of equal ones. Empty if all are masked.

    If groups are whole layers, only the best of all layers has an index.
    """
    best = [layer.best() for layer in layers]
    if all(layer.whole for layer in layers):
        scores = [float(layer.score[0]) if len(index) else -np.inf for layer, index in zip(layers, best, strict=True)]
        last = max(number for number, index in enumerate(best) if len(index) and scores[number] == max(scores))
        best = [index if number == last else index[:0] for number, index in enumerate(best)]
    return best


def keep_all_but_lowest(layer: ScoredLayer, candidate: np.ndarray, count: int) -> np.ndarray:
    """Of the candidates of one layer, keep all but the `count` lowest; ties in index order. Groups have one size."""
    size = layer.size if isinstance(layer.size, int) else 1
    (kept,), _ = _all_but_lowest([layer], [candidate], layer.weights(candidate), count * size)
    return kept
