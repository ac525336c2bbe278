"""The quantities that a criterion may name, each one function, collected only when a criterion names it.

A quantity is a function of the Sparsifier and the name of a parameter. `taken` says at which moments it is called:

- 'score': each time that scores are computed; nothing is stored.
- 'start': when the Sparsifier is made; a copy of what it returns is stored.
- 'update': after each mask update; a copy of what it returns is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .parallel import whole
from .registry import Registry
from .target import Target


class Source(Protocol):
    """What a quantity may read of the Sparsifier."""

    targets: dict[str, Target]
    rng: torch.Generator


MOMENTS = ("score", "start", "update")


def taken(*moments: str) -> Callable[[Callable], Callable]:
    """Mark a quantity with the moments at which it is taken: 'score', 'start', 'update'."""
    if not moments or not set(moments) <= set(MOMENTS):
        raise ValueError(f"taken: a quantity is taken at one or more of {', '.join(MOMENTS)}, not {moments!r}")

    def mark(quantity: Callable) -> Callable:
        quantity.moments = moments  # type: ignore[attr-defined]
        return quantity

    return mark


def _check(quantity: Callable) -> None:
    if not getattr(quantity, "moments", ()):
        raise ValueError(
            f"quantity {quantity.__name__}: mark it with @taken(...) and one or more of {', '.join(MOMENTS)}"
        )


quantities = Registry("quantity", check=_check)


@quantities.register
@taken("score")
def weight(sparsifier: Source, name: str) -> Tensor:
    """The weight as it is."""
    return whole(sparsifier.targets[name].parameter.detach())


@quantities.register
@taken("start")
def init(sparsifier: Source, name: str) -> Tensor:
    """The weight as it was when the Sparsifier was made."""
    return whole(sparsifier.targets[name].parameter.detach())


@quantities.register
@taken("start", "update")
def previous(sparsifier: Source, name: str) -> Tensor:
    """The weight as it was at the last mask update."""
    return whole(sparsifier.targets[name].parameter.detach())


@quantities.register
@taken("score")
def rng(sparsifier: Source, name: str) -> torch.Generator:
    """The Sparsifier's own random generator, on the CPU; torch's global one is left alone."""
    return sparsifier.rng
