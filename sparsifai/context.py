"""Where: contexts, which say over what scope scores are ranked.

A context is a function of the scored layers and the sparsity asked for. It returns, for each layer, a bool array
over the groups: True where a group stays. `select_groups` of selection.py ranks any set of layers jointly, exactly.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from .registry import Registry, name_of
from .selection import ScoredLayer, select_groups

Context = Callable[[Sequence[ScoredLayer], float], "list[np.ndarray]"]


def _check(context: Context) -> None:
    try:
        inspect.signature(context).bind([], 0.5)
    except TypeError as error:
        raise ValueError(
            f"context {name_of(context)} is not a function of (layers, sparsity): {error}; criteria and schedules have "
            "arguments of their own"
        ) from None


contexts = Registry("context", check=_check)


@contexts.register
def local(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Every layer is ranked alone and reaches the target."""
    return [stays for layer in layers for stays in select_groups([layer], sparsity)]


@contexts.register(name="global")
def global_(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """All layers are ranked together and reach the target together."""
    return select_groups(layers, sparsity)


global_.__name__ = "global"  # as it is registered and shown; the keyword cannot be defined


def ask(context: Context, layers: Sequence[ScoredLayer], sparsity: float, granularity: str) -> list[np.ndarray]:
    """What `context` answers, checked. ValueError if it is not a bool array over the groups of each layer.

    Warns where a share is asked for of which nothing can fall. granularity: its name, for the warning.
    """
    answer = context(layers, sparsity)
    stays = [np.asarray(kept) for kept in answer] if isinstance(answer, (list, tuple)) else []
    if [(kept.dtype, kept.shape) for kept in stays] != [(np.dtype(bool), layer.alive.shape) for layer in layers]:
        raise ValueError(
            f"context {name_of(context)} must return a list with, for each layer, a bool array over its groups, True "
            f"where one stays; got {[(kept.dtype.name, kept.shape) for kept in stays] or type(answer).__name__}"
        )
    if context not in (local, global_):
        # An own context may keep what it returns, and let come back what must not.
        stays = [kept & (layer.alive | layer.revives) for layer, kept in zip(layers, stays, strict=True)]
    for layer, kept in zip(layers, stays, strict=True):
        if not kept.any() and not layer.whole:
            raise ValueError(f"context {name_of(context)} empties {layer.target.name}; a layer keeps its best group")
    if sparsity > 0 and all(kept.all() for kept in stays) and all(kept.all() for kept in context(layers, 1.0)):
        warnings.warn(
            f"sparsity {sparsity:g} was asked for, but with granularity {granularity} and context {name_of(context)} "
            "no group can fall, for the best of every scope stays; choose smaller groups, or context 'global'",
            stacklevel=8,  # the line that calls sparsify
        )
    return stays
