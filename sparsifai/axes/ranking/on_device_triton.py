"""The lowest of many equal groups on a GPU, in five passes over the scores: Triton kernels for on_device.py.

The bits of a float, inverted for negative ones, order like its value: as an integer they are the key of a score. The
last key to be pruned is found in three passes, eleven, eleven and ten bits at a time. Each pass counts the keys that
agree with the bits found so far, by their next bits. A fourth pass counts, in every block, the keys that equal the last
one, and a fifth writes what is pruned. Counts are integers, so the order in which blocks add to them changes nothing.
The host reads none of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Scores that one program of a kernel handles.
BLOCK = 4096
# For each pass: the number of bits below those that it counts by, and how many it counts by.
DIGITS = ((21, 11), (10, 11), (0, 10))


@triton.jit
def _keys(score, place, count):
    """Whether there is a group at each place, and the key of its score, an integer of at least 0."""
    there = place < count
    value = tl.load(score + place, mask=there, other=0.0)
    value = tl.where(value == 0.0, 0.0, value)  # -0.0 and 0.0 are equal
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
    # A histogram of the block first, so that it adds to each count once, however many keys begin alike.
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
def _write(score, candidate, last, ahead, needed, pruned, count, block: tl.constexpr):
    """Write which candidates are pruned: those below `last`, and of those equal to it the first `needed`.

    ahead: for each block, how many candidates equal to `last` earlier blocks hold.
    """
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there, key = _keys(score, place, count)
    is_candidate = there & (tl.load(candidate + place, mask=there, other=0) != 0)
    tie = is_candidate & (key == tl.load(last))
    rank = tl.load(ahead + tl.program_id(0)) + tl.cumsum(tie.to(tl.int32), 0)
    is_pruned = (is_candidate & (key < tl.load(last))) | (tie & (rank <= tl.load(needed)))
    tl.store(pruned + place, is_pruned.to(tl.int8), mask=there)


def lowest(score: Tensor, candidate: Tensor, number: Tensor) -> Tensor:
    """True at the `number` candidates of lowest score, ties in index order.

    Args:
        score: float32 on a GPU, of shape (groups,).
        candidate: bool, of shape (groups,).
        number: int64 with one value, at most the number of candidates.

    Returns:
        A bool tensor of shape (groups,).
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
    pruned = torch.empty(count, dtype=torch.int8, device=score.device)
    _write[(blocks,)](score, candidate, found, ahead, needed, pruned, count, BLOCK)
    return pruned.view(torch.bool)
