"""Triton kernels that rank the groups of many layers, of all scopes at once; on_device_triton.py launches them.

`table` has a row of COLUMNS numbers for each layer: the addresses of its scores and of its mask, the place of its first
group in what is written, its number of groups, its scope, its first program, and whether groups that are zero may come
back. `layer_of` says of every program which layer it looks at. All else is one number for each scope, but for `best`,
the highest key of every layer with its place behind it, and `is_nan`.
"""

from __future__ import annotations

import triton
import triton.language as tl

COLUMNS = tl.constexpr(7)


@triton.jit
def _addresses(row, unsigned: tl.constexpr):
    """Of the layer of a row of the table, where scores and mask are."""
    mask = tl.load(row + 1).to(tl.pointer_type(tl.int8))
    if unsigned > 0xFFFF:
        return tl.load(row).to(tl.pointer_type(tl.int32)), mask
    else:  # noqa: RET505  (of the two only one is compiled)
        return tl.load(row).to(tl.pointer_type(tl.int16)), mask


@triton.jit
def _load(scores, mask, place, there, unsigned: tl.constexpr, magnitude: tl.constexpr):
    """Of groups of a layer: whether alive, bits without the sign, and the key, which orders like the score."""
    alive = tl.load(mask + place, mask=there, other=0) != 0
    bits = tl.load(scores + place, mask=there, other=0).to(tl.int32)
    size = bits & unsigned
    key = size
    if not magnitude:
        key = tl.where(bits < 0, -size, size)  # of -0.0 and 0.0 neither is lower
    return alive, size, key


@triton.jit
def count_alive(table, layer_of, alive_of, block: tl.constexpr, steps: tl.constexpr):
    """Count the groups of every layer that are not zero already."""
    layer = tl.load(layer_of + tl.program_id(0))
    row = table + layer * COLUMNS
    count = tl.load(row + 3)
    start = (tl.program_id(0) - tl.load(row + 5)) * (block * steps)
    mask = tl.load(row + 1).to(tl.pointer_type(tl.int8))
    alive = tl.zeros([block], tl.int32)
    for step in range(steps):
        place = start + step * block + tl.arange(0, block)
        alive += (tl.load(mask + place, mask=place < count, other=0) != 0).to(tl.int32)
    tl.atomic_add(alive_of + layer, tl.sum(alive, 0).to(tl.int64))


@triton.jit
def draw_sample(
    table, first_of, last_of, starts, falling, keys, unsigned: tl.constexpr, magnitude: tl.constexpr,
    sample: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Draw keys of candidates of a scope from places that are spread like random ones; 2^31 - 1 for no candidate."""
    scope = tl.program_id(0)
    number = tl.program_id(1) * block + tl.arange(0, block)
    first, last = tl.load(first_of + scope), tl.load(last_of + scope)
    origin = tl.load(starts + first)
    count = tl.load(starts + last) - origin
    place = origin + (((number.to(tl.int64) + 1) * 2654435761 & 0xFFFFFFFF) * count >> 32)
    # The last layer that begins at the place or before it: of the layers from `first` to `last`, by halves.
    low = tl.zeros([block], tl.int64) + first
    high = tl.zeros([block], tl.int64) + last
    for _ in range(20):
        middle = (low + high) // 2
        later = tl.load(starts + middle) <= place
        low = tl.where(later, middle, low)
        high = tl.where(later, high, middle)
    there = number < sample
    row = table + low * COLUMNS
    scores, mask = _addresses(row, unsigned)
    alive, size, key = _load(scores, mask, place - tl.load(starts + low), there, unsigned, magnitude)
    candidate = alive
    if tl.load(falling + scope) != 0:
        candidate = (alive == 0) & (tl.load(row + 6) != 0)
    tl.store(keys + scope * sample + number, tl.where(candidate, key, 2147483647), mask=there)


@triton.jit
def bracket(
    keys, number, candidates, low, high, shift, done, lowest: tl.constexpr, highest: tl.constexpr, spread: tl.constexpr,
    sample: tl.constexpr, bins: tl.constexpr,
):  # fmt: skip
    """Of a scope whose sample is sorted, the keys between which pruning ends; if nothing is pruned, the end itself."""
    scope = tl.program_id(0)
    if tl.load(done + scope) == 0:
        wanted, of = tl.load(number + scope), tl.load(candidates + scope)
        every = tl.load(keys + scope * sample + tl.arange(0, sample))
        drawn = tl.sum((every != 2147483647).to(tl.int32), 0)
        share = wanted.to(tl.float32) / tl.maximum(of, 1).to(tl.float32)
        middle = share * drawn
        margin = spread * tl.sqrt(tl.maximum(drawn * share * (1 - share), 0.0)) + 4
        first, last = (middle - margin).to(tl.int32), (middle + margin).to(tl.int32) + 1
        inside = (first > 0) & (first < drawn)
        below = tl.load(keys + scope * sample + tl.where(inside, first, 0))
        above = tl.load(keys + scope * sample + tl.where(last < drawn, last, 0))
        begin = tl.where(inside, below, lowest).to(tl.int64)
        end = tl.where(last < drawn, above, highest).to(tl.int64)
        begin = tl.minimum(begin, end)
        begin = tl.where(wanted == 0, lowest, begin)
        end = tl.where(wanted == 0, lowest, end)
        tl.store(low + scope, begin)
        tl.store(high + scope, end)
        tl.store(shift + scope, tl.sum((((end - begin) >> tl.arange(0, 32)) >= bins).to(tl.int64), 0))
        tl.store(done + scope, (wanted == 0).to(tl.int32))


@triton.jit
def count_in_bins(
    table, layer_of, low, high, shift, done, falling, best, is_nan, below, counts, unsigned: tl.constexpr,
    infinity: tl.constexpr, magnitude: tl.constexpr, first: tl.constexpr, surveys: tl.constexpr,
    protects: tl.constexpr, bins: tl.constexpr, block: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """Count the candidates within `low` and `high` in bins, in the first pass also those below.

    surveys: find the best group of every layer, and NaN, too; then no scope is passed over. protects: the best groups
    are no candidates.
    """
    layer = tl.load(layer_of + tl.program_id(0))
    row = table + layer * COLUMNS
    scope = tl.load(row + 4)
    if surveys or tl.load(done + scope) == 0:
        count, revives = tl.load(row + 3), tl.load(row + 6) != 0
        start = (tl.program_id(0) - tl.load(row + 5)) * (block * steps)
        begin, end, by = tl.load(low + scope), tl.load(high + scope), tl.load(shift + scope)
        falls = tl.load(falling + scope) != 0
        best_place = tl.load(best + layer) & 0xFFFFFFFF
        scores, mask = _addresses(row, unsigned)
        lower = tl.zeros([block], tl.int32)
        inside = tl.zeros([2 * bins if first else 16], tl.int32)
        highest = tl.full([block], -9223372036854775808, tl.int64)
        nan = tl.zeros([block], tl.int32)
        for step in range(steps):
            place = start + step * block + tl.arange(0, block)
            there = place < count
            alive, size, key = _load(scores, mask, place, there, unsigned, magnitude)
            candidate = tl.where(falls, there & (alive == 0) & revives, alive)
            if protects:
                candidate = candidate & (place != best_place)
            if surveys:
                packed = (key.to(tl.int64) << 32) + place
                highest = tl.maximum(highest, tl.where(alive, packed, -9223372036854775808))
                nan = nan | (there & (alive | revives) & (size > infinity)).to(tl.int32)
            within = candidate & (key >= begin) & (key <= end)
            place_of_bin = ((tl.where(within, key.to(tl.int64), begin) - begin) >> by).to(tl.int32)
            if first:
                lower += (candidate & (key < begin)).to(tl.int32)
                # What is not within goes into bins behind those that count, into a different one for each neighbour.
                unused = bins + tl.arange(0, block) % bins
                inside += tl.histogram(tl.where(within, place_of_bin, unused), 2 * bins)
            else:
                one = tl.full([block], 1, tl.int32)
                tl.atomic_add(counts + scope * bins + place_of_bin, one, mask=within, sem="relaxed")
        if first:
            tl.atomic_add(below + scope, tl.sum(lower, 0).to(tl.int64))
            place_of_bin = tl.arange(0, 2 * bins)
            there = (inside > 0) & (place_of_bin < bins)
            tl.atomic_add(counts + scope * bins + place_of_bin, inside, mask=there, sem="relaxed")
        if surveys:
            tl.atomic_max(best + layer, tl.max(highest, 0))
            tl.atomic_max(is_nan + layer, tl.max(nan, 0))


@triton.jit
def narrow(
    low, high, shift, done, number, ties, below, counts, lowest: tl.constexpr, highest: tl.constexpr,
    bins: tl.constexpr, next_bins: tl.constexpr,
):  # fmt: skip
    """Go on to the bin in which pruning ends, with what of it is pruned; beyond the bracket, to all on that side."""
    scope = tl.program_id(0)
    if tl.load(done + scope) == 0:
        begin, end, by = tl.load(low + scope), tl.load(high + scope), tl.load(shift + scope)
        wanted, lower = tl.load(number + scope), tl.load(below + scope)
        tl.store(below + scope, 0)  # of what is left, nothing
        place = tl.arange(0, bins)
        own = tl.load(counts + scope * bins + place).to(tl.int64)
        upto = tl.cumsum(own, 0) + lower
        hit = tl.minimum(tl.sum((upto < wanted).to(tl.int32), 0), bins - 1)
        found = tl.sum(tl.where(place == hit, own, 0), 0)
        upto_hit = tl.sum(tl.where(place == hit, upto, 0), 0)
        is_below, is_above = wanted <= lower, wanted > tl.sum(own, 0) + lower
        new_begin = begin + (hit.to(tl.int64) << by)
        new_end = tl.minimum(new_begin + (tl.full((), 1, tl.int64) << by) - 1, end)
        needed = wanted - (upto_hit - found)
        new_begin = tl.where(is_below, lowest, tl.where(is_above, end + 1, new_begin))
        new_end = tl.where(is_below, begin - 1, tl.where(is_above, highest, new_end))
        needed = tl.where(is_below, wanted, tl.where(is_above, wanted - tl.sum(own, 0) - lower, needed))
        tl.store(low + scope, new_begin)
        tl.store(high + scope, new_end)
        tl.store(number + scope, needed)
        tl.store(ties + scope, found)
        tl.store(shift + scope, tl.sum((((new_end - new_begin) >> tl.arange(0, 32)) >= next_bins).to(tl.int64), 0))
        inside_bracket = (is_below == 0) & (is_above == 0)
        tl.store(done + scope, ((new_begin == new_end) & inside_bracket).to(tl.int32))


@triton.jit
def write_masks(
    table, layer_of, last_of, falling, protected, best, number, ties, first_of, ahead, out, unsigned: tl.constexpr,
    magnitude: tl.constexpr, writes: tl.constexpr, block: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """Write which groups stay: of the candidates those above the key `last_of`, and of its ties all but the first.

    With writes=False, only count the ties in front of other programs, in scopes in which some of them stay.
    """
    layer = tl.load(layer_of + tl.program_id(0))
    row = table + layer * COLUMNS
    scope = tl.load(row + 4)
    needed = tl.load(number + scope)
    some_stay = needed < tl.load(ties + scope)
    all_fall = (needed > 0) & (some_stay == 0)
    if writes or some_stay:
        count, revives = tl.load(row + 3), tl.load(row + 6) != 0
        start = (tl.program_id(0) - tl.load(row + 5)) * (block * steps)
        last, falls = tl.load(last_of + scope), tl.load(falling + scope) != 0
        best_place = tl.where(tl.load(protected + scope) != 0, tl.load(best + layer) & 0xFFFFFFFF, -1)
        scores, mask = _addresses(row, unsigned)
        earlier = tl.zeros((), tl.int64)
        if writes:
            earlier += tl.load(ahead + tl.program_id(0)) - tl.load(ahead + tl.load(first_of + scope))
        for step in range(steps):
            place = start + step * block + tl.arange(0, block)
            there = place < count
            alive, size, key = _load(scores, mask, place, there, unsigned, magnitude)
            candidate = tl.where(falls, there & (alive == 0) & revives, alive) & (place != best_place)
            tie = candidate & (key == last)
            if writes:
                rank = earlier + tl.cumsum(tie.to(tl.int32), 0)
                pruned = (candidate & (key < last)) | (tie & (all_fall | (rank <= needed)))
                stays = (alive | candidate) & (pruned == 0)
                tl.store(out + tl.load(row + 2) + place, stays.to(tl.int8), mask=there)
            earlier += tl.sum(tie.to(tl.int64), 0)
        if not writes:
            tl.store(ahead + tl.program_id(0), earlier)
