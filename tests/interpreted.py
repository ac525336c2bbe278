"""What test_on_device.py runs in a process of its own, where Triton's kernels are interpreted on the CPU.

On a GPU, the programs of a launch run at once and in any order, and so do the warps of a program; memory holds what was
there before. Here programs run in random order, new memory holds random numbers, and every launch is looked through for
numbers that it both reads and writes.
"""

import itertools
import sys
import warnings

import numpy as np
import torch
from conftest import as_on_device, small_net
from triton.runtime.interpreter import interpreter_builder

from sparsifai import Sparsifier, blocks
from sparsifai.axes import pooling_triton
from sparsifai.axes.grouping import grouping_of, mean, sides_of, total
from sparsifai.axes.ranking import on_device, on_device_triton, rows_on_device, rows_triton
from sparsifai.axes.ranking.device_layer import DeviceLayer, Rows
from sparsifai.axes.ranking.rows_on_device import kept_in_rows
from sparsifai.axes.ranking.scored_layer import ScoredLayer
from sparsifai.axes.ranking.selection import select_groups
from sparsifai.sparsifier import masking_triton

# Small, so that layers have several programs, scopes more groups than are sampled, and bins are narrowed down in steps.
on_device_triton.BLOCK, on_device_triton.STEPS, on_device_triton.SAMPLE = 256, (2, 3), 128
on_device_triton.MANY, on_device_triton.SUMMED = 1000, 3
on_device_triton.BINS = (16, 2048, 2048, 2048)
on_device_triton.SPREAD = 0  # so that what is looked for is often beside the bracket


class Launches:
    """In place of what the interpreter calls: what each launch reads and writes, and its programs in random order."""

    def __init__(self, builder):
        self.loaded, self.stored, self.added = [], [], []
        self.checked, self.order, self.rng, self.reads_own = 0, [], np.random.default_rng(0), False
        self.builder, self.set_grid_dim, self.set_grid_idx = builder, builder.set_grid_dim, builder.set_grid_idx
        builder.set_grid_dim, builder.set_grid_idx = self.begin, self.go_on
        for name, places in (("masked_load", self.loaded), ("masked_store", self.stored), ("atomic_rmw", self.added)):
            setattr(builder, f"create_{name}", self.noting(getattr(builder, f"create_{name}"), name, places))

    def noting(self, function, name, places):
        """The function, which notes addresses where its mask is true."""
        pointer, mask = {"masked_load": (0, 1), "masked_store": (0, 2), "atomic_rmw": (1, 3)}[name]

        def noted(*given):
            there = np.broadcast_to(given[mask].data, given[pointer].data.shape).astype(bool)
            places.append(given[pointer].data[there].ravel())
            return function(*given)

        return noted

    def begin(self, *grid):
        """A launch begins, so the one before has ended."""
        self.check()
        self.order = self.rng.permutation(grid[0])
        self.set_grid_dim(*grid)

    def go_on(self, first, *others):
        """The next program."""
        self.set_grid_idx(int(self.order[first]), *others)

    def check(self):
        """No launch reads what it writes, or stores a number twice."""
        loaded, stored, added = (
            np.concatenate([np.empty(0, np.uint64), *places]) for places in (self.loaded, self.stored, self.added)
        )
        for places in (self.loaded, self.stored, self.added):
            places.clear()
        assert len(np.unique(stored)) == len(stored), "a number is stored by two programs"
        # Masks are applied in place, each number by the program that has read it.
        assert self.reads_own or not len(np.intersect1d(loaded, np.concatenate([stored, added]))), (
            "a launch reads what it writes"
        )
        self.checked += len(stored) > 0


class Memory:
    """In place of torch in on_device_triton: new memory holds random numbers."""

    def __getattr__(self, name):
        function = getattr(torch, name)
        if name not in ("empty", "empty_like"):
            return function

        def filled(*given, **options):
            found = function(*given, **options)
            found.view(torch.int8).random_()
            return found

        return filled


launches = Launches(interpreter_builder)
on_device_triton.torch = pooling_triton.torch = rows_triton.torch = Memory()
calls = []
fits, select, rank = on_device.can_have_keys, on_device_triton.select, rows_triton.rank
on_device_triton.select = lambda *given: calls.append(1) or select(*given)
rows_triton.rank = lambda *given: calls.append(1) or rank(*given)


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says that it is on a GPU, where only that is asked."""

    is_cuda = True


def fits_as_on_gpu(layers):
    for layer in layers:
        layer.alive = layer.alive.as_subclass(OnGpu)
    found = fits(layers)
    for layer in layers:
        layer.alive = layer.alive.as_subclass(torch.Tensor)
    return found


on_device.can_have_keys = rows_on_device.can_have_keys = fits_as_on_gpu


def masks(context, dtype, granularity, on):
    """Through rising and falling levels, as on a GPU or as on the host."""
    torch.manual_seed(0)
    model = small_net().to(dtype)
    with torch.no_grad():
        model[3].weight.mul_(20).round_().div_(20)  # many ties
    sparsifier = Sparsifier(model, granularity, context)
    if on:
        as_on_device(sparsifier)
    found = []
    for level in (0.1, 0.5, 0.500001, 0.9, 0.4, 0.0) if context != "2:4" else (0.3, 0.5, 0.2):
        sparsifier.sparsify(level)
        found += [mask.clone() for mask in sparsifier.masks.values()]
    return found


def of_models():
    """Masks of a small model."""
    for context, dtype, granularity in (
        ("global", torch.float32, "weight"),
        ("local", torch.bfloat16, "weight"),
        ("local", torch.float32, "filter"),
        ("global", torch.float16, "weight"),
        ("2:4", torch.float32, "weight"),
        (blocks(5), torch.bfloat16, "kernel"),
        ("per_output", torch.float32, "weight"),
    ):
        before = len(calls)
        host, device = (masks(context, dtype, granularity, on) for on in (False, True))
        assert all(torch.equal(one, other) for one, other in zip(host, device, strict=True)), (context, dtype)
        assert len(calls) > before


VALUES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "ties": lambda rng, n: rng.integers(-2, 3, n) * 0.5,
    "nearly all alike": lambda rng, n: np.where(rng.random(n) < 0.95, 0.25, rng.standard_normal(n)),
    "zeros of two signs": lambda rng, n: np.where(rng.random(n) < 0.5, -0.0, 0.0),
    "denormal": lambda rng, n: rng.random(n) * 1e-40,
    "infinite": lambda rng, n: np.where(rng.random(n) < 0.3, rng.choice([np.inf, -np.inf], n), rng.standard_normal(n)),
    "in order": lambda rng, n: np.sort(rng.standard_normal(n)),
}
KINDS = ("normal", "ties", "zeros of two signs")
SIZES = ((1,), (5, 1), (300, 7, 256), (1700, 40), (513, 1))


class Weights:
    def __init__(self, count):
        self.parameter = torch.empty(count)


def of_scores(rng, kind, dtype, magnitude):
    """Masks of layers of random scores, two scopes at once, beside the ranking on the host."""
    host, device = [], []
    may_empty = rng.random() < 0.2
    for sizes in (SIZES[rng.integers(len(SIZES))], SIZES[rng.integers(len(SIZES))]):
        size, scope = int(rng.integers(1, 4)), ([], [])
        for n in sizes:
            score = torch.tensor(VALUES[kind](rng, n), dtype=torch.float32).to(dtype)
            alive = torch.tensor(rng.random(n) < rng.choice([0.3, 1.0]))
            alive[rng.integers(n)] = True  # no layer begins empty
            options = {"revives": bool(rng.random() < 0.5), "may_empty": may_empty}
            ranked = (score.abs() if magnitude else score).float().numpy()
            scope[0].append(ScoredLayer(None, ranked.__getitem__, alive.numpy(), size, **options))
            scope[1].append(DeviceLayer(Weights(size * n), score, alive, size, magnitude=magnitude, **options))
        host.append(scope[0])
        device.append(scope[1])
    for sparsity in (1.0, float(rng.random()), 0.5):
        expected = [stays for layers in host for stays in select_groups(layers, sparsity)]
        got = select(device, sparsity)
        same = [bool((one == other.numpy()).all()) for one, other in zip(expected, got, strict=True)]
        assert all(same), (kind, dtype, magnitude, sparsity, [len(each) for each in expected], same)
        assert not any(bool(layer.nan) for layers in device for layer in layers)


def of_rows(rng, dtype, size, magnitude, compared):
    """Masks within rows and blocks, side by side and not, beside those that are sorted."""
    rows_triton.PAIRS, rows_triton.TILE = ((16, 16), 64) if compared else ((1, 1), 512)
    for revives in ((False, False, False), (True, False, True)):
        layers, others, all_rows = [], [], []
        # Rows that fill a tile, that end short, and that do not lie side by side.
        forms = ((9, 2 * size, 1), (3, size + 3, 1), (2, 2 * size - 1, 3))
        for (outer, length, inner), kind in zip(forms, KINDS, strict=True):
            count = outer * length * inner
            score = torch.tensor(VALUES[kind](rng, count), dtype=torch.float32).to(dtype)
            alive = torch.tensor(rng.random(count) < 0.6)
            options = {"revives": revives[len(layers)], "magnitude": magnitude}
            layers.append(DeviceLayer(Weights(count), score.clone(), alive.clone(), 1, **options))
            others.append(DeviceLayer(Weights(count), score, alive, 1, **options))
            all_rows.append(Rows(outer, length, inner, size, int(rng.integers(0, size))))
        got = kept_in_rows(layers, all_rows)
        for mask, layer, other, rows in zip(got, layers, others, all_rows, strict=True):
            expected = rows_on_device._kept_in_rows(other, rows)
            assert torch.equal(mask, expected), (dtype, size, magnitude, compared, rows)
            assert not layer.nan


def of_nan():
    """NaN is noted where it matters, of the layer that has it."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layers = []
        for number in range(3):
            score, alive = torch.randn(300).to(dtype), torch.ones(300, dtype=torch.bool)
            if number > 0:
                score[299] = float("nan") * (-1) ** number
            alive[299] = number != 2
            layers.append(DeviceLayer(Weights(300), score, alive, 1, revives=False))
        for ranked in (select, within_rows):
            ranked([layers], 0.5)
            assert [bool(layer.nan) for layer in layers] == [False, True, False]


def within_rows(scopes, sparsity):
    """In blocks of four, whatever the scope."""
    layers = [layer for scope in scopes for layer in scope]
    return kept_in_rows(layers, [Rows(1, len(layer), 1, 4, round(4 * sparsity)) for layer in layers])


def of_samples():
    """All layers of a scope are in its sample, as many of their groups as of others."""
    scopes = []
    for sizes in ((300,), (200, 100, 600)):
        scores = [torch.full((n,), float(1 + number)) for number, n in enumerate(sizes)]
        alive = [torch.arange(n) % 2 == 0 for n in sizes]
        layers = zip(scores, alive, strict=True)
        scopes.append([DeviceLayer(Weights(len(one)), one, stays, 1, magnitude=True) for one, stays in layers])
    selection = on_device_triton._Selection(scopes, 0.9)
    drawn = selection._drawn().view(torch.float32)
    assert (drawn[0] == 1).sum() == (drawn[0] <= 300).sum()
    for sample, parts in zip(drawn, ([1], [2, 1, 6]), strict=True):
        counts = torch.tensor([int((sample == 1 + number).sum()) for number in range(len(parts))])
        expected = torch.tensor(parts) / sum(parts) * on_device_triton.SAMPLE / 2
        assert (counts - expected).abs().max() < 0.15 * on_device_triton.SAMPLE


def of_pooling():
    """Magnitudes of groups of all forms are those that torch pools, to the last bit, of several layers at once."""
    shapes = {"conv": (12, 5, 3, 2), "wide": (3, 1100, 1, 1), "linear": (300, 70), "long": (2, 9000)}
    axes = ("out", "in", "h", "w")
    weights = [torch.randn(shape) for shape in shapes.values()]
    kinds = itertools.cycle(((mean, torch.float32), (total, torch.bfloat16), (mean, torch.float16)))
    for granularity in (("out",), ("in",), ("out", "in"), {"out": 2, "in": 5}, {"in": 10}, ("out", "w"), ()):
        (how, dtype), layers = next(kinds), []
        for weight in weights:
            sizes = dict(zip(axes, weight.shape, strict=False))
            grouping = grouping_of(lambda _, chosen=granularity: chosen, sizes, 1, 0)
            if not isinstance(grouping, str) and sides_of(grouping) is not None:
                layers.append((weight.to(dtype), grouping))
        given, groupings = zip(*layers, strict=True)
        pooled = pooling_triton.pool_at_once(given, list(map(sides_of, groupings)), how is mean)
        for score, weight, grouping in zip(pooled, given, groupings, strict=True):
            expected = grouping.pool(weight.float().abs().__getitem__, how)
            assert torch.equal(score, expected), (granularity, how, dtype, weight.shape)


def of_masking():
    """What is masked is zero, or what is asked for, in any order of memory; all else is as it was."""
    for dtype, zero in ((torch.float32, 0.0), (torch.bfloat16, 1e-16), (torch.float16, 0.0)):
        tensors = [torch.randn(shape).to(dtype) for shape in ((8,), (64, 3, 2, 2), (300, 40), (16, 4, 1, 1))]
        tensors[1] = tensors[1].to(memory_format=torch.channels_last)
        tensors[2][:9, 7] = float("inf")
        masks = [torch.empty_like(each, dtype=torch.bool).copy_(torch.rand(each.shape) < 0.5) for each in tensors]
        expected = [
            torch.where(mask, each, torch.tensor(zero, dtype=dtype)) for each, mask in zip(tensors, masks, strict=True)
        ]
        masks[3] = masks[3].to(memory_format=torch.channels_last)  # of which only the strides differ
        assert all(map(masking_triton.fits, tensors, masks))
        masking_triton.zero_masked_at_once(tensors, masks, zero)
        assert all(map(torch.equal, tensors, expected))
    assert not masking_triton.fits(tensors[1], masks[1].contiguous())
    assert not masking_triton.fits(torch.randn(9), torch.ones(9) > 0)


warnings.filterwarnings("ignore", "outputs that come back")
if sys.argv[1:] == ["models"]:
    of_models()
else:
    of_nan()
    of_samples()
    of_pooling()
    rng = np.random.default_rng(0)
    for kind in VALUES:
        of_scores(rng, kind, torch.float32, magnitude=False)
        halves = (torch.bfloat16, torch.float16)
        of_scores(rng, kind, halves[rng.integers(2)], magnitude=bool(rng.random() < 0.5))
    of_scores(rng, "normal", torch.float32, magnitude=True)
    for dtype, size in ((torch.float32, 2), (torch.float32, 5), (torch.float32, 16), (torch.bfloat16, 4)):
        of_rows(rng, dtype, size, magnitude=size > 4, compared=True)
    for dtype, size in ((torch.float32, 40), (torch.bfloat16, 20)):
        of_rows(rng, dtype, size, magnitude=size > 20, compared=False)
launches.check()
assert launches.checked > 50
launches.reads_own = True
of_masking()
