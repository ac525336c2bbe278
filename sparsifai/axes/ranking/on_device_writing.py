"""Triton kernels that write masks, once the key is known at which pruning ends; on_device_kernels.py has the words."""

from __future__ import annotations

import triton
import triton.language as tl

from .on_device_kernels import (
    BASE,
    COLUMNS,
    FIELDS,
    LOW,
    NO_BASE,
    NO_GROUP,
    NUMBER,
    TIES,
    candidates_of,
    load_groups,
    mask_of,
    part_of,
    scores_of,
    store_state,
    whole_words,
)


@triton.jit
def protect(
    first_of, last_of, alive_of, above_of, before, after, falling, candidates, fewest, others, protected, undone,
    block: tl.constexpr,
):  # fmt: skip
    """Begin a scope anew if the best group of a layer may be pruned; its candidates are the `others` then."""
    scope = tl.program_id(0)
    before += scope * FIELDS
    after += scope * FIELDS
    low, number, ties = tl.load(before + LOW), tl.load(before + NUMBER), tl.load(before + TIES)
    last = tl.load(last_of + scope)
    layers = tl.zeros([block], tl.int64)
    reached = tl.zeros([block], tl.int32)
    for start in range(tl.load(first_of + scope).to(tl.int32), last.to(tl.int32) + 1, block):
        layer = start + tl.arange(0, block)
        has_groups = tl.load(alive_of + layer, mask=layer <= last, other=0) > 0
        above = tl.load(above_of + layer, mask=layer <= last, other=0)
        layers += has_groups.to(tl.int64)
        reached = reached | (has_groups & (above == 0)).to(tl.int32)
    begins = (tl.max(reached, 0) != 0) & (tl.load(falling + scope) == 0) & (number > 0)
    of = tl.load(candidates + scope) - tl.sum(layers, 0)
    fewer = tl.minimum(tl.load(fewest + scope), of)
    tl.store(others + scope, of)
    base = tl.where(begins, NO_BASE, tl.load(before + BASE))
    store_state(after, low, low, begins == 0, tl.where(begins, fewer, number), ties, base, 1)
    tl.store(protected + scope, begins.to(tl.int64))
    tl.atomic_add(undone, begins.to(tl.int32), sem="relaxed")


@triton.jit
def find_best(
    table, layer_of, protected, undone, best, unsigned: tl.constexpr, magnitude: tl.constexpr, block: tl.constexpr,
    steps: tl.constexpr,
):  # fmt: skip
    """Find the best group of every layer, the last of equals, in scopes in which they are protected."""
    if tl.load(undone) != 0:
        layer, row, count, start = part_of(table, layer_of, block, steps)
        if tl.load(protected + tl.load(row + 4)) != 0:
            scores, mask = scores_of(row, unsigned), mask_of(row)
            highest = tl.full([block], NO_GROUP, tl.int32)
            highest_place = tl.zeros([block], tl.int32)
            for step in range(steps):
                first = start + step * block
                place, alive, _, key = load_groups(scores, mask, first, count, unsigned, magnitude, block)
                better = alive & (key >= highest)
                highest = tl.where(better, key, highest)
                highest_place = tl.where(better, place, highest_place)
            tl.atomic_max(best + layer, tl.max((highest.to(tl.int64) << 32) + highest_place, 0), sem="relaxed")


@triton.jit
def _ties(
    layer, row, state, falling, protected, best, first, count, unsigned: tl.constexpr, magnitude: tl.constexpr,
    revives: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Places of so many groups of a layer from `first`, and whether they are candidates of the key LOW."""
    scope = tl.load(row + 4)
    last, falls = tl.load(state + LOW).to(tl.int32), tl.load(falling + scope) != 0
    best_place = tl.where(tl.load(protected + scope) != 0, tl.load(best + layer) & 0xFFFFFFFF, -1).to(tl.int32)
    scores, mask = scores_of(row, unsigned), mask_of(row)
    place, alive, _, key = load_groups(scores, mask, first, count, unsigned, magnitude, block)
    candidate = candidates_of(alive, place, count, row, falls, revives)
    return place, candidate & (key == last) & (place != best_place)


@triton.jit
def count_ties(
    table, layer_of, state, falling, protected, best, rows, ties_of, unsigned: tl.constexpr, magnitude: tl.constexpr,
    revives: tl.constexpr, bins: tl.constexpr, block: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """Count the ties that each program looks at, in scopes in which some of them stay; `rows` may have it already."""
    layer, row, count, start = part_of(table, layer_of, block, steps)
    state += tl.load(row + 4) * FIELDS
    found = tl.zeros((), tl.int64)
    if tl.load(state + NUMBER) < tl.load(state + TIES):
        bin_of_key = tl.load(state + LOW) - tl.load(state + BASE)
        if (bin_of_key >= 0) & (bin_of_key < bins):
            found += tl.load(rows + tl.program_id(0).to(tl.int64) * bins + bin_of_key)
        else:
            ties = tl.zeros([block], tl.int32)
            for step in range(steps):
                _, tie = _ties(
                    layer, row, state, falling, protected, best, start + step * block, count, unsigned, magnitude,
                    revives, block,
                )  # fmt: skip
                ties += tie.to(tl.int32)
            found += tl.sum(ties, 0)
    tl.store(ties_of + tl.program_id(0), found)


@triton.jit
def find_last(
    table, layer_of, state, falling, protected, best, first_of, ties_of, upto, last_of, unsigned: tl.constexpr,
    magnitude: tl.constexpr, revives: tl.constexpr, block: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """Find the last tie that is pruned, in scopes in which some stay: its layer, and behind it its place.

    upto: of `ties_of`, the sums up to each program. Of each scope one program goes on, and it writes.
    """
    layer, row, count, start = part_of(table, layer_of, block, steps)
    scope = tl.load(row + 4)
    state += scope * FIELDS
    needed, first = tl.load(state + NUMBER), tl.load(first_of + scope)
    own = tl.load(ties_of + tl.program_id(0))
    earlier = tl.load(upto + tl.program_id(0)) - own - tl.load(upto + first) + tl.load(ties_of + first)
    if (needed < tl.load(state + TIES)) & (earlier < needed) & (needed <= earlier + own):
        left = (needed - earlier).to(tl.int32)
        found = tl.zeros([block], tl.int32)
        for step in range(steps):
            place, tie = _ties(
                layer, row, state, falling, protected, best, start + step * block, count, unsigned, magnitude, revives,
                block,
            )  # fmt: skip
            ties = tie.to(tl.int32)
            found = tl.where(tie & (tl.cumsum(ties, 0) == left), place, found)
            left -= tl.sum(ties, 0)
        tl.store(last_of + scope, (layer.to(tl.int64) << 32) + tl.max(found, 0))


@triton.jit
def write_masks(
    table, layer_of, state, falling, last_of, out, unsigned: tl.constexpr, magnitude: tl.constexpr,
    revives: tl.constexpr, block: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """Write which groups stay: not the candidates below the key at which pruning ends, nor its ties up to the last."""
    layer, row, count, start = part_of(table, layer_of, block, steps)
    scope = tl.load(row + 4)
    state += scope * FIELDS
    needed, ties, last = tl.load(state + NUMBER), tl.load(state + TIES), tl.load(state + LOW).to(tl.int32)
    falls = tl.load(falling + scope) != 0
    # Of this layer, the place up to which ties are pruned: all, none, or what find_last has found.
    last_place = tl.where(needed > 0, 0x7FFFFFFF, -1).to(tl.int32)
    if (needed > 0) & (needed < ties):
        found = tl.load(last_of + scope)
        last_layer, last_place = (found >> 32).to(tl.int32), (found & 0xFFFFFFFF).to(tl.int32)
        last_place = tl.where(layer < last_layer, 0x7FFFFFFF, tl.where(layer == last_layer, last_place, -1))
        last_place = last_place.to(tl.int32)
    scores, mask = scores_of(row, unsigned), mask_of(row)
    into = out + tl.multiple_of(tl.load(row + 2), 16)
    for step in range(steps):
        first = start + step * block
        place, alive, _, key = load_groups(scores, mask, first, count, unsigned, magnitude, block)
        above = key > tl.where(tl.arange(0, block) > last_place - first, last - 1, last)
        stays = candidates_of(alive, place, count, row, falls, revives) & above
        if revives:
            stays = stays | (alive & falls)
        # The space of a layer ends at a multiple of 128 bytes.
        tl.store(into + place, stays.to(tl.int8), mask=whole_words(place, count, 16))


@triton.jit
def keep_best(table, alive_of, protected, best, out):
    """Write that the best group of a layer stays, in scopes in which they are protected."""
    layer = tl.program_id(0)
    row = table + layer * COLUMNS
    if (tl.load(protected + tl.load(row + 4)) != 0) & (tl.load(alive_of + layer) > 0):
        tl.store(out + tl.load(row + 2) + (tl.load(best + layer) & 0xFFFFFFFF), tl.full((), 1, tl.int8))
