"""Triton kernels that find the key at which pruning ends, for many layers and all scopes at once.

`table` has a row of COLUMNS numbers for each layer: the addresses of its scores and of its mask, the place of its first
group in what is written, its number of groups, its scope, its first program, and whether groups that are zero may come
back. `layer_of` says of every program which layer it looks at. A state has a row of FIELDS numbers for each scope.
`alive_of`, `above_of` and `best` have a number for each layer: how many groups are not zero, how many of these at most
a program has found above the bracket, and the highest key with its last place behind it; `is_nan` has one, too. `rows`
has a row of bins for each program. `undone` is the number of scopes for which a launch has something to do. All else is
one number for each scope.

The constant `revives` is false where no layer has groups that may come back.

No program writes what a program of the same launch reads, itself included: each of its warps loads a number for itself,
and a fast one would write before a slow one has read. So a state is read, and another one is written. Sums and maxima
of many programs are added up by atomics, and are read by later launches only.
"""

from __future__ import annotations

import triton
import triton.language as tl

COLUMNS = tl.constexpr(7)

# A state: keys from LOW to HIGH are looked at, in bins of 2^SHIFT keys, and the lowest NUMBER candidates of these are
# pruned. Once a scope is DONE, LOW is the only key, and TIES candidates have it. BASE is the key of the first bin in
# `rows`, if each of these bins is one key; else NO_BASE.
FIELDS = tl.constexpr(8)
LOW, HIGH, SHIFT, DONE, NUMBER, TIES, BASE = map(tl.constexpr, range(7))

# A sample has this key where it drew no candidate.
NO_KEY = tl.constexpr(0x7FFFFFFF)
# Above all keys, by more than there are bins.
NO_BASE = tl.constexpr(0x7FFFFFFFFF)
# Below the keys of all groups.
NO_GROUP = tl.constexpr(-0x80000000)


@triton.jit
def part_of(table, layer_of, block: tl.constexpr, steps: tl.constexpr):
    """Of a program: its layer, the row of it, its number of groups, and the place of the first that is looked at."""
    layer = tl.load(layer_of + tl.program_id(0))
    row = table + layer * COLUMNS
    count = tl.load(row + 3).to(tl.int32)
    first_program = tl.load(row + 5).to(tl.int32)
    return layer, row, count, (tl.program_id(0) - first_program) * (block * steps)


@triton.jit
def mask_of(row):
    """Where the mask of a layer is."""
    return tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.int8)), 16)


@triton.jit
def scores_of(row, unsigned: tl.constexpr):
    """Where the scores of a layer are."""
    if unsigned > 0xFFFF:
        return tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.int32)), 16)
    else:  # noqa: RET505  (of the two only one is compiled)
        return tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.int16)), 16)


@triton.jit
def whole_words(place, count, width: tl.constexpr):
    """Places of which some may be loaded: a GPU reads words of 16 bytes, of which the last may end behind the layer.

    Such a word begins within the layer, at a multiple of 16 bytes, so it is within the memory that there is.
    """
    return place < (count + (width - 1)) // width * width


@triton.jit
def key_of(bits, unsigned: tl.constexpr, magnitude: tl.constexpr):
    """Bits without the sign, and the key, which orders like the score."""
    size = bits.to(tl.int32) & unsigned
    key = size
    if not magnitude:
        key = tl.where(bits < 0, -size, size)  # of -0.0 and 0.0 neither is lower
    return size, key


@triton.jit
def load_groups(scores, mask, first, count, unsigned: tl.constexpr, magnitude: tl.constexpr, block: tl.constexpr):
    """Of so many groups of a layer from `first`: places, whether they are alive, bits without the sign, and keys.

    Behind the end of the layer they are not alive.
    """
    place = first + tl.arange(0, block)
    if first + block <= count:  # without the comparisons that only the last block needs
        alive = tl.load(mask + place) != 0
        bits = tl.load(scores + place)
    else:
        width: tl.constexpr = 4 if unsigned > 0xFFFF else 8
        read = whole_words(place, count, width)
        alive = (tl.load(mask + place, mask=read, other=0) != 0) & (place < count)
        bits = tl.load(scores + place, mask=read, other=0)
    size, key = key_of(bits, unsigned, magnitude)
    return place, alive, size, key


@triton.jit
def candidates_of(alive, place, count, row, falls, revives: tl.constexpr):
    """Which groups are ranked: those that are alive, or, where the sparsity falls, those that may come back."""
    candidate = alive
    if revives:
        candidate = tl.where(falls, (place < count) & (alive == 0) & (tl.load(row + 6) != 0), alive)
    return candidate


@triton.jit
def count_alive(table, layer_of, alive_of, block: tl.constexpr, steps: tl.constexpr):
    """Count the groups of every layer that are not zero already, four at a time."""
    layer, row, count, start = part_of(table, layer_of, block, steps)
    words = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.int32)), 16)
    quarter: tl.constexpr = block // 4
    alive = tl.zeros([quarter], tl.int32)
    for step in range(steps):
        word = start // 4 + step * quarter + tl.arange(0, quarter)
        four = tl.load(words + word, mask=whole_words(word, (count + 3) // 4, 4), other=0)
        left = tl.minimum(tl.maximum(count - word * 4, 0), 4)  # of the four, those before the end of the layer
        four = tl.where(left < 4, four & ((1 << (left * 8 % 32)) - 1), four)
        alive += (four * 0x01010101) >> 24  # their sum
    tl.atomic_add(alive_of + layer, tl.sum(alive, 0).to(tl.int64), sem="relaxed")


@triton.jit
def ask(
    table, first_of, last_of, alive_of, asked, state, falling, candidates, fewest, lowest: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """How many groups of a scope are pruned, and of which; on_device.py has the same in words.

    asked: of every scope, how many weights shall be zero, and the weights of a group, as float64. fewest: the number to
    prune before it is compared with that of the candidates.
    """
    scope = tl.program_id(0)
    last = tl.load(last_of + scope)
    alive = tl.zeros([block], tl.int64)
    masked = tl.zeros([block], tl.int64)
    stay_masked = tl.zeros([block], tl.int64)
    for start in range(tl.load(first_of + scope).to(tl.int32), last.to(tl.int32) + 1, block):
        layer = start + tl.arange(0, block)
        there = layer <= last
        row = table + layer * COLUMNS
        own = tl.load(alive_of + layer, mask=there, other=0)
        zero = tl.load(row + 3, mask=there, other=0) - own
        alive += own
        masked += zero
        stay_masked += tl.where(tl.load(row + 6, mask=there, other=1) != 0, 0, zero)
    of_alive, of_masked, of_staying = tl.sum(alive, 0), tl.sum(masked, 0), tl.sum(stay_masked, 0)
    wanted, size = tl.load(asked + scope * 2), tl.load(asked + scope * 2 + 1)
    falls = wanted < size * of_masked.to(tl.float64)
    back = tl.maximum(wanted - size * of_staying.to(tl.float64), 0.0)
    amount = tl.where(falls, back, wanted - size * of_masked.to(tl.float64))
    number = tl.maximum(tl.floor(amount / size + 0.5), 0.0).to(tl.int64)
    of = tl.where(falls, of_masked - of_staying, of_alive)
    tl.store(falling + scope, falls.to(tl.int64))
    tl.store(candidates + scope, of)
    tl.store(fewest + scope, number)
    low = of * 0 + lowest
    store_state(state + scope * FIELDS, low, low, False, tl.minimum(number, of), 0, NO_BASE, 1)


@triton.jit
def draw_sample(
    table, first_of, last_of, starts, falling, keys, unsigned: tl.constexpr, magnitude: tl.constexpr,
    revives: tl.constexpr, sample: tl.constexpr, block: tl.constexpr,
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
    _, key = key_of(bits, unsigned, magnitude)
    candidate = candidates_of(alive, 0, 1, row, tl.load(falling + scope) != 0, revives)
    tl.store(keys + scope * sample + number, tl.where(candidate, key, NO_KEY))


@triton.jit
def store_state(state, low, high, done, number, ties, base, bins: tl.constexpr):
    """Write the state of a scope; its keys are to be counted in so many bins."""
    tl.store(state + LOW, low)
    tl.store(state + HIGH, high)
    tl.store(state + SHIFT, tl.sum((((high - low) >> tl.arange(0, 32)) >= bins).to(tl.int64), 0))
    tl.store(state + DONE, done)
    tl.store(state + NUMBER, number)
    tl.store(state + TIES, ties)
    tl.store(state + BASE, base)


@triton.jit
def bracket(
    before, after, keys, candidates, undone, lowest: tl.constexpr, highest: tl.constexpr, spread: tl.constexpr,
    sample: tl.constexpr, bins: tl.constexpr, in_rows: tl.constexpr,
):  # fmt: skip
    """Of a scope that is not done, the keys between which pruning ends; if nothing is pruned, the end itself."""
    scope = tl.program_id(0)
    before += scope * FIELDS
    after += scope * FIELDS
    wanted, of = tl.load(before + NUMBER), tl.load(candidates + scope)
    if tl.load(before + DONE) != 0:
        low, ties = tl.load(before + LOW), tl.load(before + TIES)
        store_state(after, low, low, True, wanted, ties, tl.load(before + BASE), bins)
    elif wanted == 0:
        low = wanted + lowest
        store_state(after, low, low, True, wanted, wanted, NO_BASE, bins)
    else:
        every = tl.load(keys + scope * sample + tl.arange(0, sample))
        drawn = tl.sum((every != NO_KEY).to(tl.int32), 0)
        share = wanted.to(tl.float32) / tl.maximum(of, 1).to(tl.float32)
        middle = share * drawn
        margin = spread * tl.sqrt(tl.maximum(drawn * share * (1 - share), 0.0)) + 4
        first, last = (middle - margin).to(tl.int32), (middle + margin).to(tl.int32) + 1
        # The keys at these two places in the order of the sample, found by halves of all keys. Both are counted in one
        # number, of which each has 16 bits.
        begin, begin_end = first * 0 + lowest, first * 0 + highest
        end, end_end = first * 0 + lowest, first * 0 + highest
        for _ in range(32 if highest > 0xFFFF else 17):
            half = (begin & begin_end) + ((begin ^ begin_end) >> 1)  # which does not overflow
            end_half = (end & end_end) + ((end ^ end_end) >> 1)
            both = tl.sum((every <= half).to(tl.int32) + ((every <= end_half).to(tl.int32) << 16), 0)
            before_begin, before_end = (both & 0xFFFF) <= first, (both >> 16) <= last
            begin = tl.where(before_begin & (begin < begin_end), half + 1, begin)
            begin_end = tl.where(before_begin, begin_end, half)
            end = tl.where(before_end & (end < end_end), end_half + 1, end)
            end_end = tl.where(before_end, end_end, end_half)
        end = tl.where(last < drawn, end.to(tl.int64), highest)
        # If little more is pruned than before, pruning ends near the lowest key that was drawn. Few keys are below it,
        # for those are pruned already; so as far below it is looked as the bracket goes above it.
        lowest_drawn = tl.min(every, 0).to(tl.int64)
        far_below = tl.where(last < drawn, tl.maximum(2 * lowest_drawn - end, lowest), lowest)
        begin = tl.where(first > 0, begin.to(tl.int64), far_below)
        end = tl.maximum(begin, end)
        base = tl.where((end - begin < bins) & in_rows, begin, NO_BASE)
        store_state(after, begin, end, False, wanted, wanted * 0, base, bins)
        tl.atomic_add(undone, 1, sem="relaxed")


@triton.jit
def count_in_bins(
    table, layer_of, state, falling, undone, best, above_of, is_nan, above, counts, unsigned: tl.constexpr,
    infinity: tl.constexpr, magnitude: tl.constexpr, revives: tl.constexpr, first: tl.constexpr,
    surveys: tl.constexpr, protects: tl.constexpr, bins: tl.constexpr, block: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """Count the candidates from LOW to HIGH in bins, in the first pass also those above.

    surveys: count those above in every layer, and find NaN, too; then no scope is passed over, and every program counts
    in a row of its own, for many would wait for each other where few keys are counted often. protects: the best groups
    are no candidates.
    """
    if surveys or tl.load(undone) != 0:
        layer, row, count, start = part_of(table, layer_of, block, steps)
        scope = tl.load(row + 4)
        state += scope * FIELDS
        if surveys or tl.load(state + DONE) == 0:
            begin, end = tl.load(state + LOW).to(tl.int32), tl.load(state + HIGH).to(tl.int32)
            # Between two keys there may be more than an int32 holds, but no more than its bits without a sign.
            width, shift = (end - begin).to(tl.uint32, bitcast=True), tl.load(state + SHIFT).to(tl.uint32)
            falls = tl.load(falling + scope) != 0
            best_place = -1
            if protects:
                best_place = (tl.load(best + layer) & 0xFFFFFFFF).to(tl.int32)
            counts += (tl.program_id(0).to(tl.int64) if surveys else scope) * bins
            # Without their alignment, a thread loads single groups of which it adds to bins itself. Words of several
            # are handed from thread to thread first, for which all threads wait.
            scores = tl.load(row).to(tl.pointer_type(tl.int32 if unsigned > 0xFFFF else tl.int16))
            mask = tl.load(row + 1).to(tl.pointer_type(tl.int8))
            higher = tl.zeros([block], tl.int32)
            largest = tl.zeros([block], tl.int32)
            one = tl.full([block], 1, tl.int32)
            for step in range(steps):
                first_place = start + step * block
                place, alive, size, key = load_groups(scores, mask, first_place, count, unsigned, magnitude, block)
                candidate = candidates_of(alive, place, count, row, falls, revives)
                if protects:
                    candidate = candidate & (place != best_place)
                if surveys:
                    matters = alive
                    if revives:
                        matters = alive | ((place < count) & (tl.load(row + 6) != 0))
                    largest = tl.maximum(largest, tl.where(matters, size, 0))
                if first:
                    higher += (candidate & (key > end)).to(tl.int32)
                from_begin = (key - begin).to(tl.uint32, bitcast=True)
                bin_of_key = (from_begin >> shift).to(tl.int32)
                tl.atomic_add(counts + bin_of_key, one, mask=candidate & (from_begin <= width), sem="relaxed")
            if first:
                all_higher = tl.sum(higher, 0)
                tl.atomic_add(above + scope, all_higher.to(tl.int64), sem="relaxed")
            if surveys:
                tl.atomic_max(above_of + layer, all_higher.to(tl.int64), sem="relaxed")
                tl.atomic_max(is_nan + layer, (tl.max(largest, 0) > infinity).to(tl.int32), sem="relaxed")


@triton.jit
def sum_rows(rows, scope_of, programs, counts, bins: tl.constexpr, several: tl.constexpr):
    """Sum up the rows of bins of every scope; a program takes several rows, of which most are of one scope."""
    place = tl.arange(0, bins)
    first = tl.program_id(0) * several
    rows += tl.program_id(0).to(tl.int64) * (several * bins)
    scope = tl.load(scope_of + first)
    sums = tl.zeros([bins], tl.int32)
    for number in range(first, tl.minimum(first + several, programs)):
        own = tl.load(scope_of + number)
        if own != scope:
            tl.atomic_add(counts + scope * bins + place, sums, sem="relaxed")
            sums = tl.zeros([bins], tl.int32)
        scope = own
        sums += tl.load(rows + (number - first) * bins + place)
    tl.atomic_add(counts + scope * bins + place, sums, sem="relaxed")


@triton.jit
def narrow(
    before, after, candidates, above, counts, undone, lowest: tl.constexpr, highest: tl.constexpr,
    first: tl.constexpr, bins: tl.constexpr, next_bins: tl.constexpr,
):  # fmt: skip
    """Go on to the bin in which pruning ends, with what of it is pruned; beyond the bracket, to all on that side."""
    scope = tl.program_id(0)
    before += scope * FIELDS
    after += scope * FIELDS
    begin, end, shift = tl.load(before + LOW), tl.load(before + HIGH), tl.load(before + SHIFT)
    wanted, base = tl.load(before + NUMBER), tl.load(before + BASE)
    if tl.load(before + DONE) != 0:
        store_state(after, begin, end, True, wanted, tl.load(before + TIES), base, next_bins)
    else:
        place = tl.arange(0, bins)
        own = tl.load(counts + scope * bins + place).to(tl.int64)
        lower = tl.zeros((), tl.int64)
        if first:  # of what is left after it, nothing is below
            lower += tl.load(candidates + scope) - tl.load(above + scope) - tl.sum(own, 0)
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
        store_state(after, new_begin, new_end, done, needed, found, base, next_bins)
        tl.atomic_add(undone, (done == 0).to(tl.int32), sem="relaxed")
