"""Which groups stay on a GPU: kernels are launched for all layers and scopes at once.

The bits of a float, with those below zero counted downwards, order like its value: they are the keys. In each scope, a
sample brackets the key at which pruning ends. One pass over the scores counts what lies below the bracket, and what
lies in it, in bins. In half precision such a bin is mostly one key, and the pass is the only one; of float32, a second
one counts the keys of the bin that was hit. The passes that follow have nothing left to do unless the sample was
unlucky. Then the last tie that is pruned is found, and the masks are written. Counts are integers, so that the order in
which programs add to them changes nothing. The host reads none of them: a program that finds its scope done ends at
once.

The best group of a layer stays. Usually it is far from where pruning ends; where it is not, all passes run once more,
without the best groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...model.tensors import sent
from .on_device_kernels import COLUMNS, FIELDS, ask, bracket, count_alive, count_in_bins, draw_sample, narrow
from .on_device_writing import count_ties, find_best, find_last, keep_best, protect, write_masks

if TYPE_CHECKING:
    from .device_layer import DeviceLayer

# Groups that a program looks at, so many at a time; more steps where there are programs enough for any GPU.
BLOCK, STEPS, WARPS = 2048, (4, 32), 8
MANY = 2**27
# Groups that are sampled in each scope, and layers of a scope that are looked at together.
SAMPLE, LAYERS = 16384, 128
# Bins of each pass. In the first, every program has its own, so that they are few.
BINS = (256, 8192, 8192, 8192)
# Standard deviations of the sample's order statistics between its bracket and where pruning is expected to end.
SPREAD = 4
# What is written begins at multiples of so many bytes for every layer, as tensors of their own do.
ALIGNED = 128


class Keys(NamedTuple):
    """How keys are made of a type of float: bits of a value without its sign, and bits of infinity."""

    unsigned: int
    infinity: int


KEYS = {
    torch.float32: Keys(0x7FFFFFFF, 0x7F800000),
    torch.bfloat16: Keys(0x7FFF, 0x7F80),
    torch.float16: Keys(0x7FFF, 0x7C00),
}


class Programs(NamedTuple):
    """What each program of a launch looks at, and the places of layers; the same in every update of a model."""

    steps: int
    grid: tuple[int]
    spaces: list[int]
    # Of every layer: where its first group is written, its number of groups, its scope, its first program.
    rows: np.ndarray
    layer_of: Tensor
    scope_of: Tensor
    first_of_scope: Tensor
    first_layer: Tensor
    last_layer: Tensor
    starts: Tensor


def select(scopes: Sequence[Sequence[DeviceLayer]], sparsity: float) -> list[Tensor]:
    """For every layer, in order, True at the groups that stay; each scope is ranked by itself.

    The groups of a scope have one size. Scores are contiguous and of one type of KEYS in all layers; so are masks.
    Whether a score is NaN is left in `nan` of each layer.
    """
    with torch.cuda.device_of(scopes[0][0].alive):
        return _Selection(scopes, sparsity).run()


@lru_cache(maxsize=16)
def _programs(lengths: tuple[int, ...], of_scopes: tuple[int, ...], device: torch.device, stream: int) -> Programs:
    """For layers of these lengths, so many in each scope.

    stream: on which it is used; on another one, what was sent to the GPU might not be there yet.
    """
    steps = STEPS[sum(lengths) > MANY]
    programs = [-(-length // (BLOCK * steps)) for length in lengths]
    spaces = [-(-length // ALIGNED) * ALIGNED for length in lengths]
    first_programs, first_layers = _before(programs), _before(of_scopes)
    scope_of = np.repeat(np.arange(len(of_scopes)), of_scopes)
    rows = np.stack([_before(spaces), lengths, scope_of, first_programs], 1)
    values = (
        np.repeat(np.arange(len(lengths), dtype=np.int32), programs),
        np.repeat(scope_of, programs),
        np.array([first_programs[layer] for layer in first_layers]),
        np.array(first_layers),
        np.array(first_layers) + of_scopes - 1,
        np.array([*_before(lengths), sum(lengths)]),
    )
    return Programs(steps, (sum(programs),), spaces, rows, *(sent(each, device) for each in values))


class _Selection:
    """The tensors that the kernels share: one entry for each scope, but for those whose names say otherwise."""

    def __init__(self, scopes: Sequence[Sequence[DeviceLayer]], sparsity: float):
        self.layers = layers = [layer for scope in scopes for layer in scope]
        self.device, self.count = layers[0].alive.device, len(scopes)
        keys, magnitude = KEYS[layers[0].score.dtype], layers[0].magnitude
        self.infinity = keys.infinity
        self.kind = {"unsigned": keys.unsigned, "magnitude": magnitude}
        self.revives = {"revives": any(layer.revives for layer in layers)}
        self.ends = {"lowest": 0 if magnitude else -keys.unsigned, "highest": keys.unsigned}
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        self.programs = programs = _programs(tuple(map(len, layers)), tuple(map(len, scopes)), self.device, stream)
        self.grid, self.layer_of = programs.grid, programs.layer_of
        self.of_programs = {"block": BLOCK, "steps": programs.steps, "num_warps": WARPS}
        self.of_scope = (programs.first_layer, programs.last_layer)

        table = np.empty((len(layers), COLUMNS.value), np.int64)
        table[:, 2:6] = programs.rows
        table[:, 0] = [layer.score.data_ptr() for layer in layers]
        table[:, 1] = [layer.alive.data_ptr() for layer in layers]
        table[:, 6] = [layer.revives for layer in layers]
        asked = [(sparsity * sum(layer.weights for layer in scope), scope[0].size) for scope in scopes]
        asked_bits = np.array(asked, np.float64).view(np.int64)
        # The table comes last: what a kernel is given begins at a multiple of 16 bytes, else it is compiled anew.
        numbers = sent(np.concatenate([asked_bits.ravel(), table.ravel()]), self.device)
        self.asked, self.table = numbers[: 2 * self.count].view(torch.float64), numbers[2 * self.count :]

        self.bins = BINS if keys.unsigned > 0xFFFF else BINS[:3]
        launches = 2 * (len(self.bins) + 1) + 1  # of `bracket`, `narrow` and `protect`
        self.nan_of, *undone = self._filled(0, torch.int32, len(layers), *[1] * launches)
        self.undone = iter(undone)
        (self.best,) = self._filled(-(2**63), torch.int64, len(layers))
        self.alive_of, self.above_of, self.ties, *of_scopes = self._filled(
            0, torch.int64, len(layers), len(layers), *self.grid, *[self.count] * 8
        )
        self.above, self.above_others, self.last, self.falling, self.protected, *of_scopes = of_scopes
        self.candidates, self.others, self.fewest = of_scopes
        self.state = self._state()

    def run(self) -> list[Tensor]:
        """Find where pruning ends in every scope, and write the masks."""
        count_alive[self.grid](self.table, self.layer_of, self.alive_of, **self.of_programs)
        ask[(self.count,)](
            *(self.table, *self.of_scope, self.alive_of, self.asked, self.state, self.falling, self.candidates),
            *(self.fewest,), lowest=self.ends["lowest"], block=LAYERS,
        )  # fmt: skip
        sample = self._drawn()
        self._find(sample, self.bins, self.candidates, self.above, protects=False)
        for layer, nan in zip(self.layers, (self.nan_of != 0).unbind(), strict=True):
            layer.nan = nan
        if not self.layers[0].may_empty:
            undone = self._go_on(
                protect, *self.of_scope, self.alive_of, self.above_of, block=LAYERS,
                others=(self.falling, self.candidates, self.fewest, self.others, self.protected),
            )  # fmt: skip
            where = (self.table, self.layer_of, self.protected, undone, self.best)
            find_best[self.grid](*where, **self.kind, **self.of_programs)
            self._find(sample, (self.bins[1], *self.bins[1:]), self.others, self.above_others, protects=True)
        return self._write()

    def _drawn(self) -> Tensor:
        """Keys of candidates of each scope; NO_KEY where none was drawn."""
        sample = torch.empty((self.count, SAMPLE), dtype=torch.int32, device=self.device)
        draw_sample[(self.count, SAMPLE // 128)](
            *(self.table, *self.of_scope, self.programs.starts, self.falling, sample),
            **self.kind, **self.revives, sample=SAMPLE, block=128,
        )  # fmt: skip
        return sample

    def _find(self, sample: Tensor, all_bins: Sequence[int], candidates: Tensor, above: Tensor, protects: bool) -> None:
        """Narrow down, in every scope that is not done, the keys among which pruning ends, until it is one."""
        sampled = {"spread": SPREAD, "sample": SAMPLE, "bins": all_bins[0], "in_rows": not protects}
        undone = self._go_on(bracket, others=(sample, candidates), **self.ends, **sampled, num_warps=WARPS * 2)
        sizes = [self.count * bins for bins in all_bins]
        if not protects:
            sizes[0] = self.grid[0] * all_bins[0]
        counted = self._filled(0, torch.int32, *sizes)
        for each, (bins, counts) in enumerate(zip(all_bins, counted, strict=True)):
            surveys = each == 0 and not protects
            count_in_bins[self.grid](
                *(self.table, self.layer_of, self.state, self.falling, undone),
                *(self.best, self.above_of, self.nan_of, above, counts),
                **self.kind, **self.revives, first=each == 0, surveys=surveys, protects=protects,
                infinity=self.infinity, bins=bins, **self.of_programs,
            )  # fmt: skip
            if surveys:
                self.rows = counts
                rows = counts.view(*self.grid, bins)
                counts = torch.zeros((self.count, bins), dtype=torch.int32, device=self.device)
                counts.index_add_(0, self.programs.scope_of, rows)
            following = {"bins": bins, "next_bins": all_bins[min(each + 1, len(all_bins) - 1)]}
            undone = self._go_on(
                narrow,
                others=(candidates, above, counts),
                **self.ends,
                first=each == 0,
                **following,
                num_warps=WARPS * 2,
            )

    def _go_on(self, kernel: Any, *before: Tensor, others: Sequence[Tensor], **constants: int) -> Tensor:
        """From a state to the next one; it is another tensor, for a kernel does not write what it reads.

        Returns the number of scopes that are not done.
        """
        after, undone = self._state(), next(self.undone)
        kernel[(self.count,)](*before, self.state, after, *others, undone, **constants)
        self.state = after
        return undone

    def _write(self) -> list[Tensor]:
        where = (self.table, self.layer_of, self.state, self.falling)
        how = {**self.kind, **self.revives, **self.of_programs}
        ranked = (*where, self.protected, self.best)
        count_ties[self.grid](*ranked, self.rows, self.ties, **how, bins=self.bins[0])
        upto = self.ties.cumsum(0)
        find_last[self.grid](*ranked, self.programs.first_of_scope, self.ties, upto, self.last, **how)
        out = torch.empty(sum(self.programs.spaces), dtype=torch.bool, device=self.device)
        written = out.view(torch.int8)
        write_masks[self.grid](*where, self.last, written, **how)
        keep_best[(len(self.layers),)](self.table, self.alive_of, self.protected, self.best, written)
        pieces = out.split(self.programs.spaces)
        return [piece[: len(layer)] for piece, layer in zip(pieces, self.layers, strict=True)]

    def _state(self) -> Tensor:
        return torch.empty((self.count, FIELDS.value), dtype=torch.int64, device=self.device)

    def _filled(self, value: int, dtype: torch.dtype, *sizes: int) -> tuple[Tensor, ...]:
        """Tensors of these sizes in one piece of memory, each at a multiple of 16 bytes; see ALIGNED."""
        words = 16 // dtype.itemsize
        spaces = [-(-size // words) * words for size in sizes]
        pieces = torch.full((sum(spaces),), value, dtype=dtype, device=self.device).split(spaces)
        return tuple(piece[:size] for piece, size in zip(pieces, sizes, strict=True))


def _before(counts: Iterable[int]) -> list[int]:
    """Of each number, the sum of those before it."""
    return [0, *accumulate(counts)][:-1]
