"""Masks applied on a GPU: one launch for many tensors, which reads and writes as fast as a copy.

torch's product of numbers and bools takes twice as long, and one launch for each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..model.tensors import sent

# Numbers that a program looks at, so many at a time.
BLOCK, STEPS, WARPS = 2048, 4, 8
# Lengths are multiples of it: a GPU reads and writes words of several numbers, and none may be half a tensor's.
WORD = 8

_INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@triton.jit
def set_masked(table, tensor_of, zero, wide: tl.constexpr, block: tl.constexpr, steps: tl.constexpr):
    """Set what is masked to the bits `zero`.

    table: of every tensor, where it and its mask are, its length, and its first program. tensor_of: of every program.
    Each number is read and written by one thread.
    """
    row = table + tl.load(tensor_of + tl.program_id(0)) * 4
    number: tl.constexpr = tl.int32 if wide else tl.int16
    values = tl.multiple_of(tl.load(row).to(tl.pointer_type(number)), 16)
    mask = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.int8)), 16)
    count = tl.load(row + 2).to(tl.int32) // 8 * 8
    start = (tl.program_id(0) - tl.load(row + 3).to(tl.int32)) * (block * steps)
    for step in range(steps):
        place = start + step * block + tl.arange(0, block)
        there = place < count
        kept = tl.load(mask + place, mask=there, other=0) != 0
        bits = tl.load(values + place, mask=there, other=0)
        tl.store(values + place, tl.where(kept, bits, zero.to(number)), mask=there)


def fits(tensor: Tensor, mask: Tensor) -> bool:
    """Whether a tensor and its mask are in the same order of memory, in whole words, and of a type that is handled."""
    if mask.dtype != torch.bool or tensor.shape != mask.shape:
        return False
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    same = tensor.stride() == mask.stride() or _strides(tensor) == _strides(mask)
    aligned = tensor.data_ptr() % 16 == mask.data_ptr() % 16 == 0 and tensor.numel() % WORD == 0
    return tensor.dtype in _INTEGER and same and dense and aligned and 0 < tensor.numel() < 2**30


def _strides(tensor: Tensor) -> list[int]:
    """Strides of the axes along which they matter."""
    return [stride for stride, side in zip(tensor.stride(), tensor.shape, strict=True) if side > 1]


def zero_masked_at_once(tensors: Sequence[Tensor], masks: Sequence[Tensor], zero: float = 0.0) -> None:
    """Set each tensor, all of one type and each another one, to `zero` where its mask is false."""
    device, dtype = tensors[0].device, tensors[0].dtype
    lengths = tuple(tensor.numel() for tensor in tensors)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    firsts, tensor_of = _programs(lengths, device, stream)
    addresses = [[each.data_ptr() for each in several] for several in (tensors, masks)]
    table = sent(np.stack([*addresses, lengths, firsts], 1), device)
    bits = int(torch.tensor(zero, dtype=dtype).view(_INTEGER[dtype]))
    with torch.cuda.device_of(tensors[0]):
        set_masked[(len(tensor_of),)](table, tensor_of, bits, dtype.itemsize == 4, BLOCK, STEPS, num_warps=WARPS)


@lru_cache(maxsize=64)
def _programs(lengths: tuple[int, ...], device: torch.device, stream: int) -> tuple[list[int], Tensor]:
    """Of each tensor its first program, of each program its tensor; the same at every step of a model.

    stream: on which it is used; on another one, what was sent to the GPU might not be there yet.
    """
    programs = [-(-length // (BLOCK * STEPS)) for length in lengths]
    return [0, *accumulate(programs)][:-1], sent(np.repeat(np.arange(len(lengths), dtype=np.int32), programs), device)
