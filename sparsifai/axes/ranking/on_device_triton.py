"""The lowest of many equal groups on a GPU, in five passes over the scores: Triton kernels for on_device.py.

The bits of a float, with the negative ones turned round, order like its value. Three passes find the key at which the
falling ends, eleven, eleven and ten bits at a time: each counts, by the next bits, the keys that agree with the bits
found so far. A fourth counts its ties in every block, a fifth writes what falls. Counts are integers, so that the order
in which blocks add to them changes nothing; the host reads none of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


# Bits that are left below those that a pass looks at, and how many it looks at.
DIGITS = ((21, 11), (10, 11), (0, 10))


@triton.jit
def _keys(score, place, count):
    """Whether there is a group, and its score as an integer from 0 on that orders alike."""
    there = place < count
    value = tl.load(score + place, mask=there, other=0.0)
    value = tl.where(value == 0.0, 0.0, value)  # of -0.0 and 0.0 neither is lower
    bits = value.to(tl.int32, bitcast=True)
    return there, (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _count_digits(
    score, candidate, found, counts, count, below: tl.constexpr, digit: tl.constexpr, block: tl.constexpr
):
    """Count the candidates whose key begins with the bits `found`, by the `digit` bits that follow."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there, key = _keys(score, place, count)
    agrees = there & (tl.load(candidate + place, mask=there, other=0) != 0)
    agrees &= (key >> (below + digit)) == tl.load(found)
    # Of all places where many keys begin alike, a block adds to each once.
    bins = tl.arange(0, 1 << digit)
    own = tl.histogram(tl.where(agrees, (key >> below) & ((1 << digit) - 1), 0).to(tl.int32), 1 << digit)
    own -= tl.where(bins == 0, block - tl.sum(agrees.to(tl.int32), 0), 0)
    tl.atomic_add(counts + bins, own, mask=own > 0)


@triton.jit
def _count_ties(score, candidate, last, ties, count, block: tl.constexpr):
    """Count, in every block, the candidates whose key is `last`."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there, key = _keys(score, place, count)
    tie = there & (tl.load(candidate + place, mask=there, other=0) != 0) & (key == tl.load(last))
    tl.store(ties + tl.program_id(0), tl.sum(tie.to(tl.int32), 0))


@triton.jit
def _write(score, candidate, last, ahead, needed, falls, count, block: tl.constexpr):
    """Write whether a candidate falls: below `last`, or at it and among the first `needed`, of which `ahead` of the
    block are in earlier ones."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there, key = _keys(score, place, count)
    is_candidate = there & (tl.load(candidate + place, mask=there, other=0) != 0)
    tie = is_candidate & (key == tl.load(last))
    rank = tl.load(ahead + tl.program_id(0)) + tl.cumsum(tie.to(tl.int32), 0)
    fall = (is_candidate & (key < tl.load(last))) | (tie & (rank <= tl.load(needed)))
    tl.store(falls + place, fall.to(tl.int8), mask=there)


def lowest(score: Tensor, candidate: Tensor, number: Tensor) -> Tensor:
    """True at the `number` candidates of lowest score, ties in index order.

    score: float32, on a GPU. candidate: bool. number: int64, of at most all candidates; both shapes (groups).
    """
    count, blocks = len(score), triton.cdiv(len(score), BLOCK)
    candidate = candidate.view(torch.int8)
    found, needed = torch.zeros_like(number), number
    for below, digit in DIGITS:
        counts = torch.zeros(1 << digit, dtype=torch.int32, device=score.device)
        _count_digits[(blocks,)](score, candidate, found, counts, count, below, digit, BLOCK)
        upto = counts.cumsum(0)
        place = torch.searchsorted(upto, needed.reshape(1)).clamp(max=len(counts) - 1)
        needed = needed - (upto - counts).gather(0, place).squeeze(0)
        found = (found << digit) | place.squeeze(0)
    ties = torch.empty(blocks, dtype=torch.int32, device=score.device)
    _count_ties[(blocks,)](score, candidate, found, ties, count, BLOCK)
    ahead = ties.cumsum(0) - ties
    falls = torch.empty(count, dtype=torch.int8, device=score.device)
    _write[(blocks,)](score, candidate, found, ahead, needed, falls, count, BLOCK)
    return falls.view(torch.bool)
