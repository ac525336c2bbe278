"""The definition of masks in slow and plain Python, one loop per sentence, to compare the library with."""

import math
from itertools import product

import numpy as np

# Axes of the weight -> axes that index the mask, written out by hand from the definition of each granularity.
CONVOLUTION = {
    "weight": ("out", "in", "h", "w"),
    "row": ("out", "in", "h"),
    "column": ("out", "in", "w"),
    "kernel": ("out", "in"),
    "channel": ("in",),
    "filter": ("out",),
    "layer": (),
    "vertical_slice": ("out", "w"),
    "horizontal_slice": ("out", "h"),
    "shared_weight": ("in", "h", "w"),
    "shared_row": ("in", "h"),
    "shared_column": ("in", "w"),
    "shared_channel": ("h", "w"),
    "shared_vertical_slice": ("w",),
    "shared_horizontal_slice": ("h",),
}
MATRIX = {"weight": ("out", "in"), "row": ("out",), "column": ("in",), "kernel": ("out", "in"), "channel": ("in",),
          "filter": ("out",), "layer": ()}  # fmt: skip


def groups_of(shape, axes, indexed, convolution_groups=1):
    """The groups of a weight, each a list of multi-indices, in the order in which they first appear.

    In a grouped convolution two weights belong to one channel or filter only if they are in one convolution group.
    """
    found = {}
    per_group = shape[0] // convolution_groups
    for index in product(*map(range, shape)):
        place = dict(zip(axes, index, strict=True))
        group, place[axes[0]] = divmod(index[0], per_group)
        key = tuple(place[axis] for axis in axes if axis in indexed)
        if {"out", "in"} & set(indexed):
            key = (group, *key)
        found.setdefault(key, []).append(index)
    return list(found.values())


def pooled(score, groups, dtype=np.float32):
    """Mean score of every group, summed exactly."""
    return [dtype(math.fsum(float(score[index]) for index in group) / len(group)) for group in groups]


def squared_sums(score, groups, dtype=np.float32):
    """Square of the sum over every group, summed exactly."""
    return [dtype(math.fsum(float(score[index]) for index in group) ** 2) for group in groups]


def fallen(layers, sparsity, whole=False):
    """Which groups are pruned of layers that are ranked together; layers: lists of (score, size, masked) per group.

    The groups are in one list by score, ties in index order; masked ones first. The best group of every layer is no
    candidate (only the best of all layers, if a group is a whole layer). Of the sums of sizes from the head of the
    list, the one nearest to sparsity x weights is taken, the larger of two equally near ones.
    """
    entries = [
        (masked, score, position, layer, size)
        for layer, groups in enumerate(layers)
        for position, (score, size, masked) in enumerate(groups)
    ]
    entries = [(*entry[:2], order, *entry[2:]) for order, entry in enumerate(entries)]
    kept = set()
    for scope in [range(len(layers))] if whole else [[layer] for layer in range(len(layers))]:
        own = [entry for entry in entries if entry[4] in scope]
        alive = [entry for entry in own if not entry[0]] or own
        kept.add(max(alive, key=lambda entry: (entry[1], entry[2]))[2])
    ranked = sorted(
        (entry for entry in entries if entry[2] not in kept), key=lambda entry: (not entry[0], entry[1], entry[2])
    )
    wanted = sparsity * sum(entry[5] for entry in entries)
    sums = [0]
    for entry in ranked:
        sums.append(sums[-1] + entry[5])
    count = min(range(len(sums)), key=lambda index: (abs(sums[index] - wanted), -sums[index]))
    pruned = {entry[2] for entry in ranked[:count]}
    order = iter(range(len(entries)))
    return [[next(order) in pruned for _ in groups] for groups in layers]


def mask_of(shape, groups, pruned):
    """A mask of the full shape of the weight: False where the group of a weight is pruned."""
    mask = np.ones(shape, bool)
    for group, is_pruned in zip(groups, pruned, strict=True):
        for index in group:
            mask[index] = not is_pruned
    return mask
