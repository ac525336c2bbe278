"""Magnitudes pooled over the groups of many layers on a GPU, in a few launches for all of them.

The weight of a layer is read as (cells, extent, cells, extent), of which cells index the groups and extents their
weights; every granularity of few axes is one of these. A program sums a tile of groups over a piece of their weights,
in float64. Another kernel sums up the pieces, in their order, so that the sums are the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..model.tensors import sent

COLUMNS = tl.constexpr(10)
# Groups that the second kernel sums up in a program, and the bytes at multiples of which scores begin.
SUMMED, ALIGNED = 256, 128
# Numbers of a tile, and tiles that follow each other in a program.
TILE, STEPS, WARPS = 2048, 8, 8


@triton.jit
def sum_pieces(
    table, layer_of, first_of, partial, wide: tl.constexpr, brain: tl.constexpr, groups: tl.constexpr,
    members: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """Sum the magnitudes of a tile of groups over a piece of their members.

    table: of every layer its address, number of groups, members of a group, second number of cells, both extents,
    number of tiles, pieces, place of its sums, and place of its scores. first_of: of every layer, its first program.
    """
    layer = tl.load(layer_of + tl.program_id(0))
    row = table + layer * COLUMNS
    count, length = tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32)
    cells = tl.load(row + 3).to(tl.int32)
    outer, inner = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    tiles = tl.load(row + 6).to(tl.int32)
    number = tl.program_id(0) - tl.load(first_of + layer).to(tl.int32)
    piece = number // tiles
    group = number % tiles * groups + tl.arange(0, groups)
    start = (group // cells * outer * cells + group % cells) * inner
    left = length - piece * (steps * members)
    sums = tl.zeros([groups, members], tl.float64)
    for step in range(tl.minimum((left + members - 1) // members, steps)):
        member = (piece * steps + step) * members + tl.arange(0, members)
        offset = start[:, None] + (member // inner * cells * inner + member % inner)[None, :]
        there = (group < count)[:, None] & (member < length)[None, :]
        if wide:
            value = tl.load(tl.load(row).to(tl.pointer_type(tl.float32)) + offset, mask=there, other=0.0)
        elif brain:
            value = tl.load(tl.load(row).to(tl.pointer_type(tl.bfloat16)) + offset, mask=there, other=0.0)
        else:
            value = tl.load(tl.load(row).to(tl.pointer_type(tl.float16)) + offset, mask=there, other=0.0)
        sums += tl.abs(value.to(tl.float32)).to(tl.float64)
    place = tl.load(row + 8) + piece.to(tl.int64) * count + group
    tl.store(partial + place, tl.sum(sums, 1), mask=group < count)


@triton.jit
def sum_up(table, layer_of, first_of, partial, out, mean: tl.constexpr, block: tl.constexpr):
    """Sum up the pieces of every group; its score is that sum, or the mean."""
    layer = tl.load(layer_of + tl.program_id(0))
    row = table + layer * COLUMNS
    count, length, pieces = tl.load(row + 1), tl.load(row + 2), tl.load(row + 7).to(tl.int32)
    group = (tl.program_id(0) - tl.load(first_of + layer)) * block + tl.arange(0, block)
    sums = tl.zeros([block], tl.float64)
    for piece in range(pieces):
        sums += tl.load(partial + tl.load(row + 8) + piece * count + group, mask=group < count, other=0.0)
    if mean:
        sums = sums / length.to(tl.float64)
    tl.store(out + tl.load(row + 9) + group, sums.to(tl.float32), mask=group < count)


class _Launch(NamedTuple):
    """Programs that sum tiles of one form, of the layers for which this form is fast."""

    groups: int
    members: int
    layer_of: Tensor
    first_of: Tensor


class _Plan(NamedTuple):
    """Launches and places; the same in every update of a model."""

    launches: list[_Launch]
    rows: np.ndarray
    partials: int
    spaces: list[int]
    layer_of: Tensor
    first_of: Tensor


def fits(weights: Sequence[Tensor], sides: Sequence[tuple[int, ...] | None]) -> bool:
    """Whether the kernels can pool layers: on CUDA, of one type, contiguous, groups of one size along few axes."""
    types = {weight.dtype for weight in weights}
    small = all(weight.is_cuda and weight.is_contiguous() and weight.numel() < 2**30 for weight in weights)
    few = all(each is not None and len(each) <= 4 for each in sides)
    return small and few and len(types) == 1 and types <= {torch.float32, torch.bfloat16, torch.float16}


def pool_at_once(weights: Sequence[Tensor], sides: Sequence[tuple[int, ...]], mean: bool) -> list[Tensor]:
    """For every layer the sums, or means, of its magnitudes over groups, as float32.

    Args:
        weights: Of a type that `fits`.
        sides: Of every layer, what `sides_of` a grouping says.
        mean: Whether to divide by the number of weights in a group.
    """
    device, dtype = weights[0].device, weights[0].dtype
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    plan = _plan(tuple(sides), device, stream)
    addresses = np.array([[weight.data_ptr()] for weight in weights])
    table = sent(np.concatenate([addresses, plan.rows], 1), device)
    partial = torch.empty(plan.partials, dtype=torch.float64, device=device)
    out = torch.empty(sum(plan.spaces), dtype=torch.float32, device=device)
    kind = {"wide": dtype == torch.float32, "brain": dtype == torch.bfloat16}
    with torch.cuda.device_of(weights[0]):
        for launch in plan.launches:
            sum_pieces[(len(launch.layer_of),)](
                *(table, launch.layer_of, launch.first_of, partial),
                **kind, groups=launch.groups, members=launch.members, steps=STEPS, num_warps=WARPS,
            )  # fmt: skip
        sum_up[(len(plan.layer_of),)](table, plan.layer_of, plan.first_of, partial, out, mean=mean, block=SUMMED)
    counts = plan.rows[:, 0].tolist()
    return [piece[:count] for piece, count in zip(out.split(plan.spaces), counts, strict=True)]


@lru_cache(maxsize=16)
def _plan(sides: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> _Plan:
    """For weights of these sides. stream: on which it is used, for another one might come before what was sent."""
    full = [(*each, *(1,) * (4 - len(each))) for each in sides]
    forms = [_form(each) for each in full]
    rows = np.empty((len(full), COLUMNS.value - 1), np.int64)
    for row, (first, outer, second, inner), (groups, members) in zip(rows, full, forms, strict=True):
        count, length = first * second, outer * inner
        row[:7] = count, length, second, outer, inner, -(-count // groups), -(-length // (members * STEPS))
    of_partials, spaces = rows[:, 0] * rows[:, 6], -(-rows[:, 0] * 4 // ALIGNED) * ALIGNED // 4
    rows[:, 7], rows[:, 8] = np.cumsum(of_partials) - of_partials, np.cumsum(spaces) - spaces
    launches = []
    for form in sorted(set(forms)):
        chosen = np.array([each == form for each in forms])
        launches.append(_Launch(*form, *_programs(np.where(chosen, rows[:, 5] * rows[:, 6], 0), device)))
    all_programs = _programs(-(-rows[:, 0] // SUMMED), device)
    return _Plan(launches, rows, int(of_partials.sum()), spaces.tolist(), *all_programs)


def _form(sides: tuple[int, ...]) -> tuple[int, int]:
    """Groups and members of a tile, so that what lies side by side in memory is read together."""
    first, outer, second, inner = sides
    # Members that lie side by side: all of a group, if it is the only one along its second axis.
    members = outer * inner if second == 1 else inner
    members = next((size for size in (4, 16, 64) if members <= size), 512)
    return TILE // members, members


def _programs(counts: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every program its layer, and for every layer its first program, if it has so many."""
    layer_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return sent(layer_of, device), sent(np.array([0, *accumulate(counts.tolist())][:-1]), device)
