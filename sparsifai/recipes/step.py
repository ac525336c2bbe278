"""The steps of a recipe: the options that each has, and what each option must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from ..axes.grouping import poolings
from ..model.patterns import as_patterns
from ..sparsifier.options import Options, check_sparsity
from ..sparsifier.regrowth import check_drop
from ..support.checks import check_count, check_fraction, check_number, check_round_to, check_seed

# When a step begins and ends: epochs, or shares of training.
TIMES = ("start", "end")

# The axes of `sparsify` -> their defaults.
AXES = {"granularity": "weight", "context": "global", "criteria": "large_final"}

# Options of `sparsify` that the Sparsifier has, beside the axes.
SPARSIFIER_OPTIONS = tuple(option.name for option in fields(Options) if option.name not in AXES)

# Kind of step -> its options: the arguments of its callback, and times.
OPTIONS: dict[str, tuple[str, ...]] = {
    "sparsify": (
        *("sparsity", "granularity", "context", "criteria", "schedule", *SPARSIFIER_OPTIONS, "drop", "drop_schedule"),
        *("settle", "every", "initial_sparsity", *TIMES, "update_every"),
    ),
    "keep": (),
    "regularize": ("weight", "granularity", "criteria", "schedule", "layers", "exclude", "proximal", *TIMES),
    "distil": (
        *("weight", "temperature", "loss", "features", "feature_weight", "feature_loss", "schedule", "axis", *TIMES),
    ),
    "freeze": ("layers", *TIMES),
    "quantize": ("layers", "exclude", "start"),
}

# Kinds of steps that a recipe without training may have.
APPLICABLE = ("sparsify", "keep", "quantize")

# Kind of step -> the option that it must have.
REQUIRED = {"sparsify": "sparsity", "regularize": "weight", "freeze": "layers"}


@dataclass(frozen=True)
class Step:
    """One step of a recipe.

    Args:
        kind: 'sparsify', 'keep', 'regularize', 'distil', 'freeze' or 'quantize'.
        options: Name -> value as in the recipe, with expressions replaced by their values.
        position: Position among the steps, from 0 on.
    """

    kind: str
    options: dict[str, Any]
    position: int


@dataclass(frozen=True)
class _OfClass:
    """A pattern that selects the layers whose class has a name."""

    name: str

    def __call__(self, name: str, module: Any) -> bool:
        return type(module).__name__ == self.name

    @property
    def __name__(self) -> str:
        return f"class:{self.name}"


def _patterns(layers: Any) -> Any:
    names = [layers] if isinstance(layers, str) else layers
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"layers must be names or globs of layers, in quotes if they are numbers, not {layers!r}")
    return as_patterns([_OfClass(name[len("class:") :]) if name.startswith("class:") else name for name in names])


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"it must be true or false, not {value!r}")
    return value


def _temperature(value: Any) -> float:
    if not (checked := check_number("temperature", value)):
        raise ValueError("temperature must be above 0, not 0")
    return checked


# Option -> a function that checks its value and returns what the callback is given.
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
    "decay": partial(check_number, "decay"),
    "gradient_sparsity": lambda value: check_fraction(value, "gradient_sparsity"),
    "settle": lambda value: check_fraction(value, "settle"),
    "straight_through": _flag,
    "compensate": _flag,
    "may_empty": _flag,
    "coupled": _flag,
    "proximal": _flag,
    "weight": partial(check_number, "weight"),
    "temperature": _temperature,
    "feature_weight": partial(check_number, "feature_weight"),
}
