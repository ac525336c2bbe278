"""The n-th lowest value, against a sort."""

import numpy as np
import pytest

from sparsifai.axes.ranking.order_statistic import nth_lowest

VALUES = {
    "normal": lambda rng, count: rng.standard_normal(count).astype(np.float32),
    "sorted": lambda rng, count: np.sort(rng.standard_normal(count)),
    "constant": lambda rng, count: np.full(count, 0.25, np.float32),
    "few values": lambda rng, count: rng.integers(0, 4, count).astype(np.float32),
    "half equal": lambda rng, count: np.maximum(rng.standard_normal(count), 0),
    "infinite": lambda rng, count: np.where(rng.random(count) < 0.4, np.inf, -rng.random(count)),
    "unlike its sample": lambda rng, count: np.where(np.arange(count) % (count // 256 or 1), 1, -1) * rng.random(count),
    "two far values": lambda rng, count: np.where(np.arange(count) < 2, 1e30, rng.random(count)),
}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("count", [1, 2, 300, 2048, 2049, 70_000])
def test_against_a_sort(values, count):
    drawn = VALUES[values](np.random.default_rng(0), count)
    ordered = np.sort(drawn)
    for place in {1, 2, count // 3, count // 2, count - 1, count} - {0, count + 1}:
        if 1 <= place <= count:
            assert nth_lowest(drawn, place) == ordered[place - 1]
