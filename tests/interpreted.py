"""What test_on_device.py runs in a process of its own, where Triton's kernels are interpreted on the CPU."""

import sys
import warnings

import numpy as np
import torch
from conftest import small_net

from sparsifai import Sparsifier
from sparsifai.axes.ranking import on_device, on_device_triton
from sparsifai.axes.ranking.device_layer import DeviceLayer
from sparsifai.axes.ranking.scored_layer import ScoredLayer
from sparsifai.axes.ranking.selection import select_groups

# Small, so that layers have several programs, scopes more groups than are sampled, and bins are narrowed down in steps.
on_device_triton.BLOCK, on_device_triton.STEPS, on_device_triton.SAMPLE = 256, (2, 3), 128
on_device_triton.MANY = 1000
on_device_triton.BINS = (16, 2048, 2048, 2048)
on_device_triton.SPREAD = 0  # so that what is looked for is often beside the bracket
calls = []
fits, select = on_device._is_for_kernels, on_device_triton.select
on_device_triton.select = lambda *given: calls.append(1) or select(*given)


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


on_device._is_for_kernels = fits_as_on_gpu


def masks(context, dtype, granularity, on):
    """Through rising and falling levels, as on a GPU or as on the host."""
    torch.manual_seed(0)
    model = small_net().to(dtype)
    with torch.no_grad():
        model[3].weight.mul_(20).round_().div_(20)  # many ties
    sparsifier = Sparsifier(model, granularity, context)
    if on:
        sparsifier.__class__ = type("OnDevice", (Sparsifier,), {"_on_device": True})
    found = []
    for level in (0.1, 0.5, 0.500001, 0.9, 0.4, 0.0):
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
        select([layers], 0.5)
        assert [bool(layer.nan) for layer in layers] == [False, True, False]


warnings.filterwarnings("ignore", "outputs that come back")
if sys.argv[1:] == ["models"]:
    of_models()
else:
    of_nan()
    rng = np.random.default_rng(0)
    for kind in VALUES:
        of_scores(rng, kind, torch.float32, magnitude=False)
        halves = (torch.bfloat16, torch.float16)
        of_scores(rng, kind, halves[rng.integers(2)], magnitude=bool(rng.random() < 0.5))
    of_scores(rng, "normal", torch.float32, magnitude=True)
