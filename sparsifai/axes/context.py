"""Where: contexts, which say over what scope scores are ranked, and what share of the zeros each layer bears.

A context is a function of the scored layers and the sparsity asked for. It returns, for each layer, a bool array
over the groups: True where a group stays. `select_groups` of selection.py ranks any set of layers jointly, exactly.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from ..support.registry import Registry, name_of
from .n_of_m import Blocks, parse_blocks
from .ranking.scored_layer import ScoredLayer
from .ranking.selection import select_each, select_groups
from .ranking.within_rows import lowest_of_rows, ranking_keys

Context = Callable[[Sequence[ScoredLayer], float], "list[np.ndarray]"]


def _check(context: Context) -> None:
    if name_of(context) in ("blocks", "bounded") and context.__module__.startswith("sparsifai."):
        raise TypeError(f"context {name_of(context)} is to be called: blocks(4), bounded('global', {{'fc': 0.5}})")
    try:
        inspect.signature(context).bind([], 0.5)
    except TypeError as error:
        raise ValueError(
            f"context {name_of(context)} is not a function of (layers, sparsity): {error}; criteria and schedules have "
            "arguments of their own"
        ) from None


contexts = Registry("context", check=_check, parse=parse_blocks)


@contexts.register
def local(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Every layer is ranked alone and reaches the target."""
    return select_each(layers, sparsity)


@contexts.register(name="global")
def global_(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """All layers are ranked together and reach the target together."""
    return select_groups(layers, sparsity)


global_.__name__ = "global"  # as it is registered and shown; the keyword cannot be defined


@contexts.register
def per_output(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Every output of every layer is ranked alone, keeps its best group, and reaches the target.

    Sun et al., 2023, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv:2306.11695).
    """
    return [_per_output(layer, sparsity) for layer in layers]


def _per_output(layer: ScoredLayer, sparsity: float) -> np.ndarray:
    axes = list(layer.grid)
    if not axes:
        raise ValueError("context per_output does not go with round_to")
    if "out" not in axes or layer.grid["out"] == len(layer) or layer.whole:
        raise ValueError(
            f"context per_output: the groups of {layer.target.name} are not parts of outputs; choose another "
            "granularity, such as 'weight', or leave the layer out with exclude="
        )
    shape = tuple(layer.grid.values())
    outer = [axes.index(axis) for axis in ("groups", "out") if axis in axes]
    order = [*outer, *(place for place in range(len(axes)) if place not in outer)]
    keys = ranking_keys(layer).reshape(shape).transpose(order)
    rows = keys.reshape(math.prod(keys.shape[: len(outer)]), -1)
    count = min(math.floor(sparsity * rows.shape[1] + 0.5), rows.shape[1] - 1)
    falls = lowest_of_rows(rows, count).reshape(keys.shape).transpose(np.argsort(order))
    return np.logical_not(falls).reshape(-1)


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
    if not (isinstance(context, Blocks) or context in (local, global_)):
        # A context may keep what it returns, and let come back what must not.
        stays = [kept & (layer.alive | layer.revives) for layer, kept in zip(layers, stays, strict=True)]
    for layer, kept in zip(layers, stays, strict=True):
        if not kept.any() and not layer.whole and not layer.may_empty:
            raise ValueError(f"context {name_of(context)} empties {layer.target.name}; a layer keeps its best group")
    if sparsity > 0 and all(kept.all() for kept in stays) and _nothing_can_fall(context, layers):
        warnings.warn(
            f"sparsity {sparsity:g} was asked for, but with granularity {granularity} and context {name_of(context)} "
            "no group can fall, for the best of every scope stays; choose smaller groups, or context 'global'",
            stacklevel=9,  # the line that calls sparsify
        )
    return stays


def _nothing_can_fall(context: Context, layers: Sequence[ScoredLayer]) -> bool:
    try:
        return all(kept.all() for kept in context(layers, 1.0))
    except ValueError:  # of one that refuses so much
        return False
