"""Times of runs: in turn, as often as fits, and which differences are noise."""

import random

import pytest

from sparsifai.export import timing
from sparsifai.export.timing import ROUNDS, is_noise, median_milliseconds, time_in_turn


def test_runs_are_timed_forwards_and_backwards_in_turn():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    taken = time_in_turn(runs, 4, lambda: order.append("wait"))
    assert order[::3] == ["wait"] * 21
    assert order[2::3] == ["wait"] * 21
    assert "".join(order[1::3]) == "abcabcabc" + "cba" + "abc" + "cba" + "abc"
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 4, "b": 4, "c": 4}


def test_there_are_as_many_rounds_as_fit_the_time(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0)
    assert len(time_in_turn({"dense": lambda: None}, None, lambda: None)["dense"]) == 7
    monkeypatch.setattr(timing, "SECONDS", 1e9)
    assert len(time_in_turn({"dense": lambda: None}, None, lambda: None)["dense"]) == 200


def test_differences_within_the_noise():
    dense = [1.0, 1.2, 0.9, 1.0, 1.1, 1.0, 1.0]
    for factors, expected in (
        ([1, 0.9, 1.1, 1.2, 0.8, 1, 1], True),
        ([0.9] * 7, False),
        ([1.3, 1.1, 1.3, 1.2, 1.3, 1.4, 1.2], False),  # slower is not noise either
        ([0.7, 0.8, 0.8, 0.7, 0.8, 0.7, 1.1], True),
    ):
        masked = [second * factor for second, factor in zip(dense, factors, strict=True)]
        assert is_noise(masked, dense) == expected
        assert median_milliseconds(masked) == pytest.approx(1000 * sorted(masked)[3])


def test_few_of_identical_runs_are_called_different():
    draw = random.Random(0)

    def is_noise_of_identical_runs(rounds):
        return is_noise(*([draw.lognormvariate(0, 0.3) for _ in range(rounds)] for _ in range(2)))

    for rounds in (ROUNDS[0], 20):
        assert sum(is_noise_of_identical_runs(rounds) for _ in range(400)) > 0.95 * 400
