"""Triton kernels that rank the groups of many layers, of all scopes at once; on_device_triton.py launches them.

`table` has a row of COLUMNS numbers for each layer: the addresses of its scores and of its mask, the place of its first
group in what is written, its number of groups, its scope, its first program, and whether groups that are zero may come
back. `layer_of` says of every program which layer it looks at. A state has a row of FIELDS numbers for each scope. All
else is one number for each scope, but for `best`, the highest key of every layer with its place behind it, and
`is_nan`.

No program writes what a program of the same launch reads, itself included: each of its warps loads a number for itself,
and a fast one would write before a slow one has read. So a state is read, and another one is written. Sums and maxima
of many programs are added up by atomics, and are read by later launches only.
"""

from __future__ import annotations

import triton
import triton.language as tl

COLUMNS = tl.constexpr(7)

# A state: keys from LOW to HIGH are looked at, in bins of 2^SHIFT keys, and the lowest NUMBER candidates of these are
# pruned. Once a scope is DONE, LOW is the only key, and TIES candidates have it.
FIELDS = tl.constexpr(8)
LOW, HIGH, SHIFT, DONE, NUMBER, TIES = map(tl.constexpr, range(6))

# A sample has this key where it drew no candidate.
NO_KEY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _part(table, layer_of, block: tl.constexpr, steps: tl.constexpr):
    """Of a program: its layer, the row of it, its number of groups, and the place of the first that is looked at."""
    layer = tl.load(layer_of + tl.program_id(0))
    row = table + layer * COLUMNS
    count = tl.load(row + 3).to(tl.int32)
    first_program = tl.load(row + 5).to(tl.int32)
    return layer, row, count, (tl.program_id(0) - first_program) * (block * steps)


@triton.jit
def _mask_of(row):
    """Where the mask of a layer is."""
    return tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.int8)), 16)


@triton.jit
def _scores_of(row, unsigned: tl.constexpr):
    """Where the scores of a layer are."""
    if unsigned > 0xFFFF:
        return tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.int32)), 16)
    else:  # noqa: RET505  (of the two only one is compiled)
        return tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.int16)), 16)


@triton.jit
def _whole_words(place, count, width: tl.constexpr):
    """Places of which some may be loaded: a GPU reads words of 16 bytes, of which the last may end behind the layer.

    Such a word begins within the layer, at a multiple of 16 bytes, so it is within the memory that there is.
    """
    return place < (count + (width - 1)) // width * width


@triton.jit
def _key(bits, unsigned: tl.constexpr, magnitude: tl.constexpr):
    """Bits without the sign, and the key, which orders like the score."""
    size = bits.to(tl.int32) & unsigned
    key = size
    if not magnitude:
        key = tl.where(bits < 0, -size, size)  # of -0.0 and 0.0 neither is lower
    return size, key


@triton.jit
def _load(scores, mask, place, count, unsigned: tl.constexpr, magnitude: tl.constexpr):
    """Of groups of a layer: whether they are alive, bits without the sign, and keys; not alive behind its end."""
    width: tl.constexpr = 4 if unsigned > 0xFFFF else 8
    read = _whole_words(place, count, width)
    alive = (tl.load(mask + place, mask=read, other=0) != 0) & (place < count)
    size, key = _key(tl.load(scores + place, mask=read, other=0), unsigned, magnitude)
    return alive, size, key


@triton.jit
def count_alive(table, layer_of, alive_of, block: tl.constexpr, steps: tl.constexpr):
    """Count the groups of every layer that are not zero already."""
    layer, row, count, start = _part(table, layer_of, block, steps)
    mask = _mask_of(row)
    alive = tl.zeros([block], tl.int32)
    for step in range(steps):
        place = start + step * block + tl.arange(0, block)
        stays = tl.load(mask + place, mask=_whole_words(place, count, 16), other=0) != 0
        alive += (stays & (place < count)).to(tl.int32)
    tl.atomic_add(alive_of + layer, tl.sum(alive, 0).to(tl.int64), sem="relaxed")


@triton.jit
def draw_sample(
    table, first_of, last_of, starts, falling, keys, unsigned: tl.constexpr, magnitude: tl.constexpr,
    sample: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Draw keys of candidates of a scope from places that are spread like random ones."""
    scope = tl.program_id(0)
    number = tl.program_id(1) * block + tl.arange(0, block)
    first, last = tl.load(first_of + scope), tl.load(last_of + scope)
    origin = tl.load(starts + first)
    count = tl.load(starts + last + 1) - origin
    place = origin + (((number.to(tl.int64) + 1) * 2654435761 & 0xFFFFFFFF) * count >> 32)
    # The last layer that begins at the place or before it: of the layers from `first` to `last`, by halves.
    low = tl.zeros([block], tl.int64) + first
    high = tl.zeros([block], tl.int64) + last + 1
    for _ in range(20):
        middle = (low + high) // 2
        later = tl.load(starts + middle) <= place
        low = tl.where(later, middle, low)
        high = tl.where(later, high, middle)
    row = table + low * COLUMNS
    place -= tl.load(starts + low)
    alive = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.int8)) + place) != 0
    if unsigned > 0xFFFF:
        bits = tl.load(tl.load(row).to(tl.pointer_type(tl.int32)) + place)
    else:
        bits = tl.load(tl.load(row).to(tl.pointer_type(tl.int16)) + place)
    _, key = _key(bits, unsigned, magnitude)
    candidate = alive
    if tl.load(falling + scope) != 0:
        candidate = (alive == 0) & (tl.load(row + 6) != 0)
    tl.store(keys + scope * sample + number, tl.where(candidate, key, NO_KEY))


@triton.jit
def _store(state, low, high, done, number, ties, bins: tl.constexpr):
    """Write the state of a scope; its keys are to be counted in so many bins."""
    tl.store(state + LOW, low)
    tl.store(state + HIGH, high)
    tl.store(state + SHIFT, tl.sum((((high - low) >> tl.arange(0, 32)) >= bins).to(tl.int64), 0))
    tl.store(state + DONE, done.to(tl.int64))
    tl.store(state + NUMBER, number)
    tl.store(state + TIES, ties)


@triton.jit
def bracket(
    before, after, keys, candidates, lowest: tl.constexpr, highest: tl.constexpr, spread: tl.constexpr,
    sample: tl.constexpr, bins: tl.constexpr,
):  # fmt: skip
    """Of a scope whose sample is sorted, the keys between which pruning ends; if nothing is pruned, the end itself."""
    scope = tl.program_id(0)
    before += scope * FIELDS
    wanted, of = tl.load(before + NUMBER), tl.load(candidates + scope)
    every = tl.load(keys + scope * sample + tl.arange(0, sample))
    drawn = tl.sum((every != NO_KEY).to(tl.int32), 0)
    share = wanted.to(tl.float32) / tl.maximum(of, 1).to(tl.float32)
    middle = share * drawn
    margin = spread * tl.sqrt(tl.maximum(drawn * share * (1 - share), 0.0)) + 4
    first, last = (middle - margin).to(tl.int32), (middle + margin).to(tl.int32) + 1
    inside = (first > 0) & (first < drawn)
    begin = tl.load(keys + scope * sample + tl.where(inside, first, 0)).to(tl.int64)
    end = tl.load(keys + scope * sample + tl.where(last < drawn, last, 0)).to(tl.int64)
    begin = tl.where(inside, begin, lowest)
    end = tl.where(last < drawn, end, highest)
    begin = tl.where(wanted == 0, lowest, tl.minimum(begin, end))
    end = tl.where(wanted == 0, lowest, end)
    was_done = tl.load(before + DONE) != 0
    begin = tl.where(was_done, tl.load(before + LOW), begin)
    end = tl.where(was_done, tl.load(before + HIGH), end)
    _store(after + scope * FIELDS, begin, end, was_done | (wanted == 0), wanted, tl.load(before + TIES), bins)


@triton.jit
def count_in_bins(
    table, layer_of, state, falling, best, is_nan, below, counts, unsigned: tl.constexpr,
    infinity: tl.constexpr, magnitude: tl.constexpr, first: tl.constexpr, surveys: tl.constexpr,
    protects: tl.constexpr, bins: tl.constexpr, block: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """Count the candidates from LOW to HIGH in bins, in the first pass also those below.

    surveys: find the best group of every layer, and NaN, too; then no scope is passed over. protects: the best groups
    are no candidates.
    """
    layer, row, count, start = _part(table, layer_of, block, steps)
    scope = tl.load(row + 4)
    state += scope * FIELDS
    if surveys or tl.load(state + DONE) == 0:
        revives = tl.load(row + 6) != 0
        begin, end = tl.load(state + LOW).to(tl.int32), tl.load(state + HIGH).to(tl.int32)
        shift = tl.load(state + SHIFT).to(tl.uint32)
        falls = tl.load(falling + scope) != 0
        best_place = -1
        if protects:
            best_place = (tl.load(best + layer) & 0xFFFFFFFF).to(tl.int32)
        scores, mask = _scores_of(row, unsigned), _mask_of(row)
        lower = tl.zeros([block], tl.int32)
        within_any = tl.zeros([block], tl.int32)
        inside = tl.zeros([bins if first else 16], tl.int32)
        highest = tl.full([block], -2147483648, tl.int32)
        highest_place = tl.zeros([block], tl.int32)
        nan = tl.zeros([block], tl.int32)
        for step in range(steps):
            place = start + step * block + tl.arange(0, block)
            there = place < count
            alive, size, key = _load(scores, mask, place, count, unsigned, magnitude)
            candidate = tl.where(falls, there & (alive == 0) & revives, alive)
            if protects:
                candidate = candidate & (place != best_place)
            if surveys:
                better = alive & (key >= highest)  # of equals the last
                highest = tl.where(better, key, highest)
                highest_place = tl.where(better, place, highest_place)
                nan = nan | (there & (alive | revives) & (size > infinity)).to(tl.int32)
            within = candidate & (key >= begin) & (key <= end)
            # Between two keys there may be more than an int32 holds, but no more than its bits without a sign.
            bin_of_key = ((tl.where(within, key, begin) - begin).to(tl.uint32, bitcast=True) >> shift).to(tl.int32)
            if first:
                lower += (candidate & (key < begin)).to(tl.int32)
                within_any += within.to(tl.int32)
                inside += tl.histogram(bin_of_key, bins)
            else:
                one = tl.full([block], 1, tl.int32)
                tl.atomic_add(counts + scope * bins + bin_of_key, one, mask=within, sem="relaxed")
        if first:
            tl.atomic_add(below + scope, tl.sum(lower, 0).to(tl.int64), sem="relaxed")
            # What is not within was counted in the first bin.
            bin_of_key = tl.arange(0, bins)
            inside -= tl.where(bin_of_key == 0, block * steps - tl.sum(within_any, 0), 0)
            tl.atomic_add(counts + scope * bins + bin_of_key, inside, mask=inside > 0, sem="relaxed")
        if surveys:
            packed = (highest.to(tl.int64) << 32) + highest_place
            tl.atomic_max(best + layer, tl.max(packed, 0), sem="relaxed")
            tl.atomic_max(is_nan + layer, tl.max(nan, 0), sem="relaxed")


@triton.jit
def narrow(
    before, after, below, counts, lowest: tl.constexpr, highest: tl.constexpr, first: tl.constexpr,
    bins: tl.constexpr, next_bins: tl.constexpr,
):  # fmt: skip
    """Go on to the bin in which pruning ends, with what of it is pruned; beyond the bracket, to all on that side."""
    scope = tl.program_id(0)
    before += scope * FIELDS
    after += scope * FIELDS
    begin, end, shift = tl.load(before + LOW), tl.load(before + HIGH), tl.load(before + SHIFT)
    wanted, ties = tl.load(before + NUMBER), tl.load(before + TIES)
    was_done = tl.load(before + DONE) != 0
    if was_done:
        _store(after, begin, end, was_done, wanted, ties, next_bins)
    else:
        lower = tl.zeros((), tl.int64)
        if first:  # of what is left after it, nothing is below
            lower += tl.load(below + scope)
        place = tl.arange(0, bins)
        own = tl.load(counts + scope * bins + place).to(tl.int64)
        upto = tl.cumsum(own, 0) + lower
        hit = tl.minimum(tl.sum((upto < wanted).to(tl.int32), 0), bins - 1)
        found = tl.sum(tl.where(place == hit, own, 0), 0)
        upto_hit = tl.sum(tl.where(place == hit, upto, 0), 0)
        all_found = tl.sum(own, 0)
        is_below, is_above = wanted <= lower, wanted > all_found + lower
        new_begin = begin + (hit.to(tl.int64) << shift)
        new_end = tl.minimum(new_begin + (tl.full((), 1, tl.int64) << shift) - 1, end)
        new_begin = tl.where(is_below, lowest, tl.where(is_above, end + 1, new_begin))
        new_end = tl.where(is_below, begin - 1, tl.where(is_above, highest, new_end))
        needed = wanted - (upto_hit - found)
        needed = tl.where(is_below, wanted, tl.where(is_above, wanted - all_found - lower, needed))
        done = (new_begin == new_end) & (is_below == 0) & (is_above == 0)
        _store(after, new_begin, new_end, done, needed, found, next_bins)


@triton.jit
def _ranked(layer, row, state, falling, protected, best, unsigned: tl.constexpr):
    """What _ties asks of a layer, whose place in memory, and of its scope."""
    scope = tl.load(row + 4)
    last, revives, falls = tl.load(state + LOW).to(tl.int32), tl.load(row + 6) != 0, tl.load(falling + scope) != 0
    best_place = tl.where(tl.load(protected + scope) != 0, tl.load(best + layer) & 0xFFFFFFFF, -1).to(tl.int32)
    return _scores_of(row, unsigned), _mask_of(row), last, revives, falls, best_place


@triton.jit
def _ties(
    scores, mask, last, revives, falls, best_place, place, count, unsigned: tl.constexpr, magnitude: tl.constexpr
):  # fmt: skip
    """Of groups of a layer, whether alive and no candidates, whether candidates above `last`, and whether at it."""
    alive, _, key = _load(scores, mask, place, count, unsigned, magnitude)
    candidate = tl.where(falls, (place < count) & (alive == 0) & revives, alive) & (place != best_place)
    return alive & (candidate == 0), candidate & (key > last), candidate & (key == last)


@triton.jit
def count_ties(
    table, layer_of, state, falling, protected, best, ties_of, unsigned: tl.constexpr, magnitude: tl.constexpr,
    block: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """Count the ties that each program looks at, in scopes in which some of them stay."""
    layer, row, count, start = _part(table, layer_of, block, steps)
    scope = tl.load(row + 4)
    state += scope * FIELDS
    ties = tl.zeros([block], tl.int32)
    if tl.load(state + NUMBER) < tl.load(state + TIES):
        scores, mask, last, revives, falls, best_place = _ranked(layer, row, state, falling, protected, best, unsigned)
        for step in range(steps):
            place = start + step * block + tl.arange(0, block)
            _, _, tie = _ties(scores, mask, last, revives, falls, best_place, place, count, unsigned, magnitude)
            ties += tie.to(tl.int32)
    tl.store(ties_of + tl.program_id(0), tl.sum(ties, 0).to(tl.int64))


@triton.jit
def find_last(
    table, layer_of, state, falling, protected, best, first_of, ties_of, upto, last_of, unsigned: tl.constexpr,
    magnitude: tl.constexpr, block: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """Find the last tie that is pruned, in scopes in which some stay: its layer, and behind it its place.

    upto: of `ties_of`, the sums up to each program. Of each scope one program goes on, and it writes.
    """
    layer, row, count, start = _part(table, layer_of, block, steps)
    scope = tl.load(row + 4)
    state += scope * FIELDS
    needed, first = tl.load(state + NUMBER), tl.load(first_of + scope)
    own = tl.load(ties_of + tl.program_id(0))
    earlier = tl.load(upto + tl.program_id(0)) - own - tl.load(upto + first) + tl.load(ties_of + first)
    if (needed < tl.load(state + TIES)) & (earlier < needed) & (needed <= earlier + own):
        scores, mask, last, revives, falls, best_place = _ranked(layer, row, state, falling, protected, best, unsigned)
        left = (needed - earlier).to(tl.int32)
        found = tl.zeros([block], tl.int32)
        for step in range(steps):
            place = start + step * block + tl.arange(0, block)
            _, _, tie = _ties(scores, mask, last, revives, falls, best_place, place, count, unsigned, magnitude)
            ties = tie.to(tl.int32)
            found = tl.where(tie & (tl.cumsum(ties, 0) == left), place, found)
            left -= tl.sum(ties, 0)
        tl.store(last_of + scope, (layer.to(tl.int64) << 32) + tl.max(found, 0))


@triton.jit
def write_masks(
    table, layer_of, state, falling, protected, best, last_of, out, unsigned: tl.constexpr, magnitude: tl.constexpr,
    block: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """Write which groups stay: not the candidates below the key at which pruning ends, nor its ties up to the last."""
    layer, row, count, start = _part(table, layer_of, block, steps)
    scope = tl.load(row + 4)
    state += scope * FIELDS
    needed, ties = tl.load(state + NUMBER), tl.load(state + TIES)
    scores, mask, last, revives, falls, best_place = _ranked(layer, row, state, falling, protected, best, unsigned)
    # Of this layer, the place up to which ties are pruned: all, none, or what find_last has found.
    last_place = tl.where(needed > 0, 0x7FFFFFFF, -1).to(tl.int32)
    if (needed > 0) & (needed < ties):
        found = tl.load(last_of + scope)
        last_layer, last_place = (found >> 32).to(tl.int32), (found & 0xFFFFFFFF).to(tl.int32)
        last_place = tl.where(layer < last_layer, 0x7FFFFFFF, tl.where(layer == last_layer, last_place, -1))
        last_place = last_place.to(tl.int32)
    into = out + tl.multiple_of(tl.load(row + 2), 16)
    for step in range(steps):
        place = start + step * block + tl.arange(0, block)
        stays, above, tie = _ties(scores, mask, last, revives, falls, best_place, place, count, unsigned, magnitude)
        stays = stays | above | (tie & (place > last_place))
        # The space of a layer ends at a multiple of 128 bytes.
        tl.store(into + place, stays.to(tl.int8), mask=_whole_words(place, count, 16))
