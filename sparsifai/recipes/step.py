"""The steps of a recipe: their words, and what each option has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..axes.grouping import poolings
from ..model.patterns import as_patterns
from ..sparsifier.arguments import check_sparsity
from ..sparsifier.regrowth import check_drop
from ..support.checks import check_count, check_fraction, check_number, check_round_to, check_seed

TIMES = ("start", "end")


OF_SPARSIFIER = ("layers", "exclude", "pool", "may_empty", "regrow", "round_to", "coupled", "seed")


# The words of each step: those of its callback, and when.
WORDS: dict[str, tuple[str, ...]] = {
    "sparsify": (
        *("sparsity", "granularity", "context", "criteria", "schedule", *OF_SPARSIFIER, "drop", "decay", "every"),
        *("initial_sparsity", *TIMES, "update_every"),
    ),
    "keep": (),
    "regularize": ("weight", "granularity", "criteria", "schedule", "layers", "exclude", "proximal", *TIMES),
    "distil": ("weight", "temperature", "features", "feature_weight", "schedule", "axis", *TIMES),
    "freeze": ("layers", *TIMES),
}


NEEDED = {"sparsify": "sparsity", "regularize": "weight", "freeze": "layers"}


@dataclass(frozen=True)
class Step:
    """kind: 'sparsify', 'keep', ... options: its words, expressions worked out. position: among the steps."""

    kind: str
    options: dict[str, Any]
    position: int


AXES = {"granularity": "weight", "context": "global", "criteria": "large_final"}


def _patterns(layers: Any) -> Any:
    names = [layers] if isinstance(layers, str) else layers
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"layers are names or globs of layers, in quotes if they are numbers, not {layers!r}")
    return as_patterns(names)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"it is true or false, not {value!r}")
    return value


def _temperature(value: Any) -> float:
    if not (checked := check_number("temperature", value)):
        raise ValueError("temperature is a number above 0, not 0")
    return checked


# What an option has to be, and is made into.
CHECKS: dict[str, Callable[[Any], Any]] = {
    "sparsity": check_sparsity,
    "initial_sparsity": lambda value: check_fraction(value, "initial_sparsity"),
    "layers": _patterns,
    "exclude": _patterns,
    "pool": poolings.resolve,
    "every": partial(check_count, "every"),
    "seed": check_seed,
    "round_to": check_round_to,
    "drop": check_drop,
    "may_empty": _flag,
    "coupled": _flag,
    "proximal": _flag,
    "weight": partial(check_number, "weight"),
    "temperature": _temperature,
    "feature_weight": partial(check_number, "feature_weight"),
}
