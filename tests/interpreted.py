"""What test_on_device.py runs in a process of its own, where Triton's kernels are interpreted on the CPU."""

import numpy as np
import torch
from conftest import small_net

from sparsifai import Sparsifier
from sparsifai.axes.ranking import on_device, on_device_triton
from sparsifai.sparsifier.mask_building import Ranking


class OnDevice(Ranking):
    def stays_on_device(self, layers):
        return True


def masks(context, on):
    """Through rising and falling levels, as on a GPU or as on the host."""
    torch.manual_seed(0)
    model = small_net()
    with torch.no_grad():
        model[3].weight.mul_(20).round_().div_(20)  # many ties
    sparsifier = Sparsifier(model, context=context)
    if on:
        sparsifier.ranking = OnDevice(**vars(sparsifier.ranking))
    found = []
    for level in (0.1, 0.5, 0.500001, 0.9, 0.4, 0.0):
        sparsifier.sparsify(level)
        found += [mask.clone() for mask in sparsifier.masks.values()]
    return found


calls = []
lowest = on_device_triton.lowest
on_device_triton.lowest = lambda *given: calls.append(1) or lowest(*given)
on_device.kernels_for = lambda score: on_device_triton
for context in ("global", "local"):
    assert all(torch.equal(one, other) for one, other in zip(masks(context, False), masks(context, True), strict=True))
assert calls

rng = np.random.default_rng(0)
VALUES = {
    "normal": lambda n: rng.standard_normal(n),
    "ties": lambda n: rng.integers(-2, 3, n) * 0.5,
    "zeros of two signs": lambda n: np.where(rng.random(n) < 0.5, -0.0, 0.0),
    "denormal": lambda n: rng.random(n) * 1e-40,
    "infinite": lambda n: np.where(rng.random(n) < 0.3, rng.choice([np.inf, -np.inf], n), rng.standard_normal(n)),
}
for n in (1, 5, on_device_triton.BLOCK, on_device_triton.BLOCK + 1, 20000):
    for draw in VALUES.values():
        score, candidate = draw(n).astype(np.float32), rng.random(n) < 0.7
        total = int(candidate.sum())
        for number in {0, min(1, total), total // 2, total}:
            order = np.flatnonzero(candidate)
            order = order[np.argsort(score[order], kind="stable")][:number]
            expected = np.zeros(n, bool)
            expected[order] = True
            falls = lowest(torch.from_numpy(score), torch.from_numpy(candidate), torch.tensor(number))
            assert (falls.numpy() == expected).all()
