"""Which groups stay on a GPU: the kernels of on_device_kernels.py are launched for all layers and scopes at once.

The bits of a float, with those below zero counted downwards, order like its value: they are the keys. In each scope, a
sample brackets the key at which pruning ends. One pass over the scores counts what lies below the bracket, and what
lies in it, in bins; a second one counts the keys of the bin that was hit. Two more follow, for which nothing is left to
do unless the sample was unlucky. Then the ties at that key are counted, the last one that is pruned is found, and the
masks are written. Counts are integers, so that the order in which programs add to them changes nothing. The host reads
none of them: a program that finds its scope done ends at once.

The best group of a layer stays. Usually it is far from where pruning ends; where it is not, all passes run once more,
without the best groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .on_device_kernels import (
    COLUMNS,
    DONE,
    FIELDS,
    LOW,
    NUMBER,
    bracket,
    count_alive,
    count_in_bins,
    count_ties,
    draw_sample,
    find_last,
    narrow,
    write_masks,
)

if TYPE_CHECKING:
    from .device_layer import DeviceLayer

# Groups that a program looks at, so many at a time; more steps where there are programs enough for any GPU.
BLOCK, STEPS, WARPS = 2048, (4, 16), 8
MANY = 2**27
# Groups that are sampled in each scope; torch sorts rows of so many in one kernel.
SAMPLE = 4096
# Bins of each pass. The first counts by a histogram of its own, for many groups are in the bracket: its time grows with
# its bins. The others add each group of the bin that was hit to a number in memory, for these are few.
BINS = (256, 8192, 4096, 4096)
# Standard deviations of the sample's order statistics between its bracket and where pruning is expected to end.
SPREAD = 5
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


def select(scopes: Sequence[Sequence[DeviceLayer]], sparsity: float) -> list[Tensor]:
    """For every layer, in order, True at the groups that stay; each scope is ranked by itself.

    The groups of a scope have one size. Scores are contiguous and of one type of KEYS in all layers; so are masks.
    Whether a score is NaN is left in `nan` of each layer.
    """
    with torch.cuda.device_of(scopes[0][0].alive):
        return _Selection(scopes, sparsity).run()


class _Selection:
    """The tensors that the kernels share: one entry for each scope, but for those whose names say otherwise."""

    def __init__(self, scopes: Sequence[Sequence[DeviceLayer]], sparsity: float):
        self.layers = layers = [layer for scope in scopes for layer in scope]
        self.device, self.count = layers[0].alive.device, len(scopes)
        keys, magnitude = KEYS[layers[0].score.dtype], layers[0].magnitude
        self.infinity = keys.infinity
        self.kind = {"unsigned": keys.unsigned, "magnitude": magnitude}
        self.ends = {"lowest": 0 if magnitude else -keys.unsigned, "highest": keys.unsigned}

        self.lengths = list(map(len, layers))
        self.spaces = [-(-length // ALIGNED) * ALIGNED for length in self.lengths]
        steps = STEPS[sum(self.lengths) > MANY]
        programs = [-(-length // (BLOCK * steps)) for length in self.lengths]
        self.of_programs = {"block": BLOCK, "steps": steps, "num_warps": WARPS}
        first_programs, first_layers = _before(programs), _before(map(len, scopes))
        last_layers = [end - 1 for end in accumulate(map(len, scopes))]
        scope_of = [number for number, scope in enumerate(scopes) for _ in scope]
        rows = [
            (layer.score.data_ptr(), layer.alive.data_ptr(), *others, int(layer.revives))
            for layer, *others in zip(layers, _before(self.spaces), self.lengths, scope_of, first_programs, strict=True)
        ]
        table, starts, self.first_layer, self.last_layer, self.first_program, repeats = self._sent(
            list(chain.from_iterable(rows)),
            [*_before(self.lengths), sum(self.lengths)],
            first_layers,
            last_layers,
            [first_programs[layer] for layer in first_layers],
            programs,
        )
        self.table, self.starts, self.grid = table.view(-1, COLUMNS.value), starts, (sum(programs),)
        number_of_layer = torch.arange(len(layers), device=self.device, dtype=torch.int32)
        self.layer_of_program = number_of_layer.repeat_interleave(repeats, output_size=sum(programs))
        self.scope_of_layer = self.table[:, 4].contiguous()

        self.state = self._zeros(self.count, FIELDS.value)
        self.protected = self._zeros(self.count, dtype=torch.int32)
        self.best_of_layer = torch.full((len(layers),), -(2**63), dtype=torch.int64, device=self.device)
        self.nan_of_layer = self._zeros(len(layers), dtype=torch.int32)
        self._ask(scopes, sparsity)

    def _ask(self, scopes: Sequence[Sequence[DeviceLayer]], sparsity: float) -> None:
        """How many groups are pruned, and of which; on_device.py has the same in words."""
        self.alive_of_layer = self._zeros(len(self.layers))
        count_alive[self.grid](self.table, self.layer_of_program, self.alive_of_layer, **self.of_programs)
        masked_of_layer, revives = self.table[:, 3] - self.alive_of_layer, self.table[:, 6]
        asked_for = [sparsity * sum(layer.weights for layer in scope) for scope in scopes]
        wanted, size = self._sent(asked_for, [float(scope[0].size) for scope in scopes], dtype=torch.float64)
        masked, stay_masked = self._of_scopes(masked_of_layer), self._of_scopes(masked_of_layer * (1 - revives))
        falling = wanted < size * masked
        amount = torch.where(falling, (wanted - size * stay_masked).clamp(min=0), wanted - size * masked)
        self.candidates = torch.where(falling, masked - stay_masked, self._of_scopes(self.alive_of_layer))
        self.asked_for = (amount / size + 0.5).floor().long().clamp(min=0)
        self._of_state(NUMBER).copy_(torch.minimum(self.asked_for, self.candidates))
        self.falling = falling.int()

    def run(self) -> list[Tensor]:
        """Find where pruning ends in every scope, and write the masks."""
        sample = self._drawn()
        self._find(sample, protects=False)
        for layer, nan in zip(self.layers, (self.nan_of_layer != 0).unbind(), strict=True):
            layer.nan = nan
        if not self.layers[0].may_empty:
            self._protect()
            self._find(sample, protects=True)
        return self._write()

    def _drawn(self) -> Tensor:
        """Keys of candidates of each scope, in order; NO_KEY behind them."""
        sample = torch.empty((self.count, SAMPLE), dtype=torch.int32, device=self.device)
        draw_sample[(self.count, SAMPLE // 128)](
            *(self.table, self.first_layer, self.last_layer, self.starts, self.falling, sample),
            **self.kind, sample=SAMPLE, block=128,
        )  # fmt: skip
        return sample.sort(1).values

    def _find(self, sample: Tensor, protects: bool) -> None:
        """Narrow down, in every scope that is not done, the keys among which pruning ends, until it is one."""
        self._go_on(bracket, sample, self.candidates, spread=SPREAD, sample=SAMPLE, bins=BINS[0])
        below = self._zeros(self.count)
        of_passes = self._zeros(self.count * sum(BINS), dtype=torch.int32).split([self.count * bins for bins in BINS])
        for each, (bins, counts) in enumerate(zip(BINS, of_passes, strict=True)):
            found = (self.best_of_layer, self.nan_of_layer, below, counts)
            # The best groups, and NaN, are looked for on the way.
            passes = {"first": each == 0, "surveys": each == 0 and not protects, "protects": protects}
            count_in_bins[self.grid](
                *(self.table, self.layer_of_program, self.state, self.falling, *found),
                **self.kind, **passes, infinity=self.infinity, bins=bins, **self.of_programs,
            )  # fmt: skip
            next_bins = BINS[min(each + 1, len(BINS) - 1)]
            self._go_on(narrow, below, counts, first=each == 0, bins=bins, next_bins=next_bins, num_warps=WARPS * 2)

    def _go_on(self, kernel: Any, *tensors: Tensor, **constants: int) -> None:
        """From a state to the next one; it is another tensor, for a kernel does not write what it reads."""
        after = torch.empty_like(self.state)
        kernel[(self.count,)](self.state, after, *tensors, **self.ends, **constants)
        self.state = after

    def _protect(self) -> None:
        """Begin anew, with fewer candidates, the scopes in which the best group of a layer may be pruned."""
        has_groups = self.alive_of_layer > 0
        may_be_pruned = has_groups & ((self.best_of_layer >> 32) <= self._of_state(LOW)[self.scope_of_layer])
        number = self._of_state(NUMBER)
        protected = (self._of_scopes(may_be_pruned) > 0) & (self.falling == 0) & (number > 0)
        fewer = torch.minimum(self.asked_for, self.candidates - self._of_scopes(has_groups))
        number.copy_(torch.where(protected, fewer, number))
        self._of_state(DONE).copy_(~protected)
        self.protected = protected.int()

    def _write(self) -> list[Tensor]:
        where = (self.table, self.layer_of_program, self.state, self.falling, self.protected, self.best_of_layer)
        ties, last = self._zeros(*self.grid), self._zeros(self.count)
        count_ties[self.grid](*where, ties, **self.kind, **self.of_programs)
        find_last[self.grid](*where, self.first_program, ties, ties.cumsum(0), last, **self.kind, **self.of_programs)
        out = torch.empty(sum(self.spaces), dtype=torch.bool, device=self.device)
        write_masks[self.grid](*where, last, out.view(torch.int8), **self.kind, **self.of_programs)
        return [piece[:length] for piece, length in zip(out.split(self.spaces), self.lengths, strict=True)]

    def _of_state(self, field: Any) -> Tensor:
        """One number of the state for each scope, as a view."""
        return self.state[:, field.value]

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _of_scopes(self, of_layers: Tensor) -> Tensor:
        """Sums over the layers of each scope."""
        return self._zeros(self.count).index_add_(0, self.scope_of_layer, of_layers.long())

    def _sent(self, *lists: Sequence[Any], dtype: torch.dtype = torch.int64) -> tuple[Tensor, ...]:
        """Lists of numbers as tensors on the GPU, in one transfer that nobody waits for."""
        # Triton compiles a kernel anew for pointers that are no multiples of 16 bytes.
        padded = [[*each, 0] if len(each) % 2 else each for each in lists]
        values = torch.tensor(list(chain.from_iterable(padded)), dtype=dtype)
        if self.device.type == "cuda":
            values = values.pin_memory().to(self.device, non_blocking=True)
        pieces = values.split(list(map(len, padded)))
        return tuple(piece[: len(each)] for piece, each in zip(pieces, lists, strict=True))


def _before(counts: Iterable[int]) -> list[int]:
    """Of each number, the sum of those before it."""
    return [0, *accumulate(counts)][:-1]
