"""Times of several forms of a model, measured in turn, and which differences are larger than the noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles

import torch
from torch import nn

from ..support.progress import progress

# Seconds that all timed runs together take by default, about.
SECONDS = 1.0


# Fewest and most timed rounds by default.
ROUNDS = (7, 200)


# Rounds before the timed ones, in which memory is allocated and threads are started.
WARM_UP = 3


def time_in_turn(
    runs: Mapping[str, Callable[[], object]], repeats: int | None, wait: Callable[[], None]
) -> dict[str, list[float]]:
    """Time several runs in rounds, in an order that is reversed from round to round.

    The order is reversed because each run may leave caches and clocks in another state for the next one.

    Args:
        runs: Name -> what to time.
        repeats: Number of rounds, None for as many as take about `SECONDS`.
        wait: Called before and after each run, to wait for devices.

    Returns:
        Name -> the seconds of each round.
    """

    def seconds_of(name: str) -> float:
        wait()
        start = time.perf_counter()
        runs[name]()
        wait()
        return time.perf_counter() - start

    for _ in range(WARM_UP):
        round_takes = sum(map(seconds_of, runs))
    if repeats is None:
        fewest, most = ROUNDS
        repeats = min(max(int(SECONDS / round_takes), fewest), most)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in progress(range(repeats), "timing"):
        for name in runs if number % 2 else reversed(list(runs)):
            taken[name].append(seconds_of(name))
    return taken


def waiting_for(models: Sequence[nn.Module]) -> Callable[[], None]:
    """A function that waits until the devices of some models have finished."""
    devices = {parameter.device for model in models for parameter in model.parameters()} - {torch.device("cpu")}

    def wait() -> None:
        for device in devices:
            torch.accelerator.synchronize(device)

    return wait


def median_milliseconds(seconds: Sequence[float]) -> float:
    """The median of times in seconds, in milliseconds."""
    return 1000 * median(seconds)


def is_noise(seconds: Sequence[float], others: Sequence[float]) -> bool:
    """Whether two lists of times, measured in the same rounds, differ by no more than the noise.

    They do if 1 lies within the middle three quarters of the ratios of all rounds.
    """
    ratios = [own / other for own, other in zip(seconds, others, strict=True)]
    # Of 7 rounds of identical runs, quartiles would call 1 in 8 different; octiles call 1 in 64 different.
    lower, *_, upper = quantiles(ratios, n=8)
    return lower <= 1 <= upper
