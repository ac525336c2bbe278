"""What: criteria, functions that score every weight; the lowest scores fall.

A criterion is its formula. Its required parameters are quantities of `statistic.py`, asked for by name; its
defaulted parameters are options, set with functools.partial. It returns one score per weight, of any sign.

Sources: w is the weight, w0 its initial and w' its previous value. The forms with w0 are those of Zhou et al., 2019,
"Deconstructing Lottery Tickets" (arXiv:1905.01067); the updating forms compare with the last mask update instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .registry import Registry, name_of
from .statistic import quantities

Criterion = Callable[..., Tensor]


def quantities_of(criterion: Criterion) -> tuple[str, ...]:
    """Names of the quantities that a criterion asks for: its parameters without a default."""
    try:
        parameters = inspect.signature(criterion).parameters.values()
    except ValueError:
        raise ValueError(
            f"criterion {name_of(criterion)} does not show its parameters; write it out: "
            f"lambda weight: {name_of(criterion)}(weight)"
        ) from None
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [each for each in parameters if each.default is each.empty and each.kind not in optional]
    if any(each.kind is each.POSITIONAL_ONLY for each in required):
        raise ValueError(f"criterion {name_of(criterion)}: quantities are given by name, so leave out the '/'")
    return tuple(each.name for each in required)


def _check(criterion: Criterion) -> None:
    unknown = [name for name in quantities_of(criterion) if name not in quantities]
    if unknown:
        raise ValueError(
            f"criterion {name_of(criterion)} asks for the unknown quantity {unknown[0]!r}; known are "
            f"{', '.join(quantities)}. Give an option a default value, or register the quantity with "
            "@quantities.register"
        )


criteria = Registry("criterion", check=_check)


def elementwise(criterion: Criterion) -> Criterion:
    """Mark a criterion whose score of a weight is of the quantities of this weight alone, and which changes no tensor.

    It is called of parts of a layer, of any shape, with the weights themselves instead of copies, and what it returns
    is not checked: a mark for those of this file, not for users'.
    """
    criterion.elementwise = criterion  # type: ignore[attr-defined]
    return criterion


def is_elementwise(criterion: Criterion) -> bool:
    """Whether a criterion, or the one that a partial with other numbers is made of, is marked as elementwise."""
    if isinstance(criterion, partial):
        given = (*criterion.args, *criterion.keywords.values())
        return is_elementwise(criterion.func) and not any(isinstance(value, Tensor) for value in given)
    # One that wraps a marked criterion has its attributes, but is another function.
    return getattr(criterion, "elementwise", None) is criterion


@criteria.register
def random(weight: Tensor, rng: torch.Generator) -> Tensor:
    """Uniform in [0, 1), the same on every device."""
    return torch.rand(weight.shape, generator=rng)


@criteria.register
@elementwise
def large_final(weight: Tensor) -> Tensor:
    """|w|: large weights survive."""
    return weight.abs()


@criteria.register
@elementwise
def small_final(weight: Tensor) -> Tensor:
    """-|w|: small weights survive."""
    return -weight.abs()


@criteria.register
@elementwise
def squared_final(weight: Tensor) -> Tensor:
    """w^2."""
    return weight.square()


@criteria.register
@elementwise
def large_init(init: Tensor) -> Tensor:
    """|w0|."""
    return init.abs()


@criteria.register
@elementwise
def small_init(init: Tensor) -> Tensor:
    """-|w0|."""
    return -init.abs()


@criteria.register
@elementwise
def large_init_large_final(weight: Tensor, init: Tensor, alpha: float = 1.0) -> Tensor:
    """min(alpha |w|, |w0|): large at both ends survive."""
    return torch.minimum(alpha * weight.abs(), init.abs())


@criteria.register
@elementwise
def small_init_small_final(weight: Tensor, init: Tensor, alpha: float = 1.0) -> Tensor:
    """-max(alpha |w|, |w0|): small at both ends survive."""
    return -torch.maximum(alpha * weight.abs(), init.abs())


@criteria.register
@elementwise
def magnitude_increase(weight: Tensor, init: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha |w| - |w0|."""
    return alpha * weight.abs() - init.abs()


@criteria.register
@elementwise
def movement(weight: Tensor, init: Tensor) -> Tensor:
    """|w - w0|."""
    return (weight - init).abs()


@criteria.register
@elementwise
def movmag(weight: Tensor, init: Tensor) -> Tensor:
    """|w (w - w0)|: movement times magnitude."""
    return (weight * (weight - init)).abs()


@criteria.register
@elementwise
def updating_magnitude_increase(weight: Tensor, previous: Tensor) -> Tensor:
    """|w| - |w'|."""
    return weight.abs() - previous.abs()


@criteria.register
@elementwise
def updating_movement(weight: Tensor, previous: Tensor) -> Tensor:
    """|w - w'|."""
    return (weight - previous).abs()


@criteria.register
@elementwise
def updating_movmag(weight: Tensor, previous: Tensor) -> Tensor:
    """|w (w - w')|."""
    return (weight * (weight - previous)).abs()
