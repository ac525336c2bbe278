"""A Triton kernel that ranks groups within rows and blocks, of many layers in a few launches.

A program ranks a tile of rows, all members of a row at once, so that nothing is sorted. In short rows each member is
compared with all others. In longer ones, the key at which pruning ends is found by halves of all keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...model.tensors import sent
from .on_device_kernels import key_of, mask_of, scores_of
from .on_device_triton import ALIGNED, KEYS

if TYPE_CHECKING:
    from .device_layer import DeviceLayer, Rows

COLUMNS = tl.constexpr(11)
# Groups of a tile, and members of the longest rows that are ranked here.
TILE, LONGEST = 2048, 16384
# Members of the longest rows that are compared in pairs; where these need much of the registers, and where they do not.
PAIRS = (4, 16)


@triton.jit
def rank_rows(
    table, layer_of, is_nan, out, unsigned: tl.constexpr, infinity: tl.constexpr, magnitude: tl.constexpr,
    revives: tl.constexpr, exact: tl.constexpr, pairs: tl.constexpr, rows: tl.constexpr, members: tl.constexpr,
):  # fmt: skip
    """Write which groups of a tile of rows stay: all but the lowest, masked ones first, ties in index order.

    table: of every layer the addresses of its scores and of its mask, the place of its first group in `out`, its number
    of rows, rows along its length, length, groups side by side, members of a row, members that are pruned in a whole
    row, whether masked groups may come back, and its first program. exact: the groups of a row lie side by side, and
    `members` is their number, in every row.
    """
    layer = tl.load(layer_of + tl.program_id(0))
    row = table + layer * COLUMNS
    count, prune = tl.load(row + 3).to(tl.int32), tl.load(row + 8).to(tl.int32)
    member = tl.arange(0, members)[None, :]
    number = (tl.program_id(0) - tl.load(row + 10).to(tl.int32)) * rows + tl.arange(0, rows)
    there = (number < count)[:, None]
    pruned_of_row = tl.zeros([rows], tl.int32) + prune
    if exact:
        place = number[:, None] * members + member
    else:
        along, length = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
        inner, size = tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32)
        begin = number // inner % along * size
        own = tl.minimum(length - begin, size)  # a last row may be shorter; what it lacks counts as pruned
        begin += number // (inner * along) * length
        place = (begin[:, None] + member) * inner + (number % inner)[:, None]
        there = there & (member < own[:, None])
        pruned_of_row = tl.maximum(prune - (size - own), 0)
    alive = tl.load(mask_of(row) + place, mask=there, other=0) != 0
    size_bits, key = key_of(tl.load(scores_of(row, unsigned) + place, mask=there, other=0), unsigned, magnitude)
    may_stay = alive
    if revives:
        may_stay = alive | (there & (tl.load(row + 9) != 0))
    largest = tl.max(tl.max(tl.where(may_stay, size_bits, 0), 1), 0)
    if largest > infinity:
        tl.atomic_max(is_nan + layer, 1, sem="relaxed")

    # Masked ones are lower than all others. If they may come back, they are ranked among themselves, too.
    lowest: tl.constexpr = -4 * (unsigned + 1) if revives else -unsigned - 1
    if revives:
        if unsigned > 0xFFFF:
            key = key.to(tl.int64)
        key = tl.where(alive, key, key - 2 * (unsigned + 1))
    else:
        key = tl.where(alive, key, lowest)
    key = tl.where(there, key, unsigned)
    if pairs:
        rank = tl.zeros([rows, members], tl.int32)
        for other in tl.static_range(members):
            key_of_other = tl.sum(tl.where(member == other, key, 0), 1)
            rank += (key_of_other[:, None] < key + (member > other).to(key.dtype)).to(tl.int32)
        stays = rank >= pruned_of_row[:, None]
    else:
        # The lowest key up to which there are as many as are pruned.
        low = tl.zeros([rows], key.dtype) + lowest
        high = tl.zeros([rows], key.dtype) + unsigned
        for _ in range(34 if unsigned > 0xFFFF else 18):
            middle = (low & high) + ((low ^ high) >> 1)  # which does not overflow
            enough = tl.sum((key <= middle[:, None]).to(tl.int32), 1) >= pruned_of_row
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
        lower, tie = key < high[:, None], key == high[:, None]
        ties = pruned_of_row - tl.sum(lower.to(tl.int32), 1)
        stays = (lower == 0) & ((tie == 0) | (tl.cumsum(tie.to(tl.int32), 1) > ties[:, None]))
    into = out + tl.multiple_of(tl.load(row + 2), 16)
    tl.store(into + place, (stays & may_stay).to(tl.int8), mask=there)


class _Launch(NamedTuple):
    """Programs that rank rows of one form, of the layers that have such rows."""

    exact: bool
    members: int
    layer_of: Tensor


class _Plan(NamedTuple):
    """Launches and places; the same in every update of a model."""

    launches: list[_Launch]
    spaces: list[int]
    columns: np.ndarray


def rank(layers: Sequence[DeviceLayer], all_rows: Sequence[Rows]) -> list[Tensor]:
    """For every layer, True at the groups that stay. Whether a score is NaN is left in `nan` of each layer.

    Scores are contiguous and of one type of KEYS in all layers; so are masks. No row is longer than LONGEST.
    """
    device, keys = layers[0].alive.device, KEYS[layers[0].score.dtype]
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    plan = _plan(tuple(all_rows), device, stream)
    table = np.empty((len(layers), COLUMNS.value), np.int64)
    table[:, 0] = [layer.score.data_ptr() for layer in layers]
    table[:, 1] = [layer.alive.data_ptr() for layer in layers]
    table[:, 2:9], table[:, 10] = plan.columns[:, :7], plan.columns[:, 7]
    table[:, 9] = [layer.revives for layer in layers]
    given = sent(table, device)
    is_nan = torch.zeros(len(layers), dtype=torch.int32, device=device)
    out = torch.empty(sum(plan.spaces), dtype=torch.bool, device=device)
    kind = {"unsigned": keys.unsigned, "infinity": keys.infinity, "magnitude": layers[0].magnitude}
    kind["revives"] = any(layer.revives for layer in layers)
    with torch.cuda.device_of(layers[0].alive):
        for exact, members, layer_of in plan.launches:
            rank_rows[(len(layer_of),)](
                *(given, layer_of, is_nan, out.view(torch.int8)),
                **kind, exact=exact, pairs=members <= PAIRS[exact and not kind["revives"]],
                rows=_rows_of_tile(members), members=members,
                num_warps=16 if members == LONGEST else 8,
            )  # fmt: skip
    for layer, nan in zip(layers, (is_nan != 0).unbind(), strict=True):
        layer.nan = nan
    return [piece[: len(layer)] for piece, layer in zip(out.split(plan.spaces), layers, strict=True)]


@lru_cache(maxsize=16)
def _plan(all_rows: tuple[Rows, ...], device: torch.device, stream: int) -> _Plan:
    """For layers with these rows. stream: on which it is used, for another one might come before what was sent."""
    forms = [_form(rows) for rows in all_rows]
    lengths = [rows.outer * rows.length * rows.inner for rows in all_rows]
    spaces = [-(-length // ALIGNED) * ALIGNED for length in lengths]
    programs = np.array([-(-rows.number // _rows_of_tile(form[1])) for rows, form in zip(all_rows, forms, strict=True)])
    firsts, launches = np.zeros(len(forms), np.int64), []
    for form in sorted(set(forms)):
        own = np.where([each == form for each in forms], programs, 0)
        firsts += np.where(own > 0, np.cumsum(own) - own, 0)
        launches.append(_Launch(*form, sent(np.repeat(np.arange(len(forms), dtype=np.int32), own), device)))
    columns = [
        (place, rows.number, rows.along, rows.length, rows.inner, rows.size, rows.pruned, first)
        for place, rows, first in zip(np.cumsum(spaces) - spaces, all_rows, firsts, strict=True)
    ]
    return _Plan(launches, spaces, np.array(columns, np.int64))


def _form(rows: Rows) -> tuple[bool, int]:
    """Whether a row fills the tile, and members of the tile: few numbers, for each is compiled."""
    size = min(rows.size, rows.length)
    members = next(each for each in (2, 4, 8, 16, 32, 64, 256, 1024, 4096, LONGEST) if size <= each)
    return rows.inner == 1 and rows.length % members == 0 and rows.size == members, members


def _rows_of_tile(members: int) -> int:
    return max(TILE // members, 1)
