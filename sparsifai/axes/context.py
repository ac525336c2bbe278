"""Where: contexts. A context says which scores are ranked together, and so how many zeros each layer gets.

A context is a function of the scored layers and the sparsity asked for. It returns, for each layer, a numpy array with
one bool per group: True where the group is kept. `select_groups` ranks the groups of any layers together, so most
contexts are a few calls of it.

A context of your own is such a function. This one prunes the first layer half as much as the others:

>>> from torch import nn
>>> from sparsifai import Sparsifier
>>> def spare_the_first(layers, sparsity):
...     return [*select_groups(layers[:1], sparsity / 2), *select_groups(layers[1:], sparsity)]
>>> sparsifier = Sparsifier(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 8)), context=spare_the_first)
>>> sparsifier.sparsify(0.5)
>>> [int((~mask).sum()) for mask in sparsifier.masks.values()]  # of 20 and 40 weights
[5, 20]

With `@contexts.register` above its `def`, context='spare_the_first' means the same. What a context can read of a layer
is in the docstring of `ScoredLayer` (ranking/scored_layer.py).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..support.capability import capability
from ..support.chunk import CHUNK
from ..support.printable import printable
from ..support.registry import Registry, name_of
from ..support.table import percent
from .n_of_m import parse_blocks
from .ranking.device_layer import DeviceLayer, Rows
from .ranking.rows_on_device import kept_in_rows
from .ranking.scored_layer import ScoredLayer
from .ranking.selection import select_each, select_groups
from .ranking.within_rows import ranking_keys, write_kept

Context = Callable[[Sequence[ScoredLayer], float], "list[np.ndarray]"]


def _check(context: Context) -> None:
    """Refuse functions that are not contexts: criteria, schedules, and `blocks` or `bounded` that were not called."""
    if name_of(context) in ("blocks", "bounded") and context.__module__.startswith("sparsifai."):
        raise TypeError(
            f"context {name_of(context)}: call it first, as in blocks(4) or bounded('global', {{'fc': 0.5}})"
        )
    try:
        inspect.signature(context).bind([], 0.5)
    except TypeError as error:
        raise ValueError(
            f"context {name_of(context)} is not a function of (layers, sparsity): {error}; pass a criterion as "
            "criteria=, and a schedule as schedule="
        ) from None


# What a context can declare, as a keyword of `contexts.register` or as an attribute of the function:
#
# on_device         It ranks layers on a GPU there, as `select_groups` does: scores are tensors, and so is the answer.
# highest_sparsity  The highest sparsity that it can reach, if that is less than 1.
# fixes_counts      Shapes alone say how many groups of each layer are pruned; "together" if they say it of all layers
#                   that are ranked together.
# keeps_masked      It never revives a group that must stay masked, and does not change its answer later.
# ranks_within      It prunes the lowest groups of each "layer" or of each "output", so that a sweep can do the same for
#                   some columns after the other.
CAPABILITIES = ("on_device", "highest_sparsity", "fixes_counts", "keeps_masked", "ranks_within")

contexts = Registry(
    "context",
    check=_check,
    parse=parse_blocks,
    forms=("any N:M such as '2:4'",),
    capabilities=CAPABILITIES,
)
"""The contexts by name. `contexts.register` adds a function of the scored layers and the sparsity.

Example:
    >>> @contexts.register
    ... def spare_the_first(layers, sparsity):
    ...     return [*select_groups(layers[:1], sparsity / 2), *select_groups(layers[1:], sparsity)]
    >>> model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 8))
    >>> sparsifier = Sparsifier(model, context='spare_the_first')
"""


@contexts.register(on_device=True, fixes_counts=True, keeps_masked=True, ranks_within="layer")
def local(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Rank each layer alone; each layer reaches the target sparsity.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> sparsifier = Sparsifier(model, context='local')
        >>> sparsifier.sparsify(0.5)
        >>> [mask.float().mean().item() for mask in sparsifier.masks.values()]
        [0.5, 0.5]
    """
    return select_each(layers, sparsity)


@contexts.register(name="global", on_device=True, fixes_counts="together", keeps_masked=True)
def global_(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Rank the groups of all layers together; only all layers together reach the target sparsity.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> sparsifier = Sparsifier(model, context='global')
        >>> sparsifier.sparsify(0.5)
        >>> sum(int(mask.sum()) for mask in sparsifier.masks.values())  # of 80 weights
        40
    """
    return select_groups(layers, sparsity)


global_.__name__ = "global"  # its registered name, which is a keyword and so cannot name a function


@contexts.register(on_device=True, fixes_counts=True, keeps_masked=True, ranks_within="output")
def per_output(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Rank the groups within each output of a layer alone; each output reaches the target and keeps its best group.

    Sun et al., 2023, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv:2306.11695).
    """
    forms = [_outputs_first(layer) for layer in layers]
    counts = [min(math.floor(sparsity * length + 0.5), length - 1) for *_, length in forms]
    if layers and isinstance(layers[0], DeviceLayer):
        return _per_output_on_device(layers, forms, counts)
    return [_per_output(*each) for each in zip(layers, forms, counts, strict=True)]


def _outputs_first(layer: Any) -> tuple[tuple[int, ...], list[int], int]:
    """Number of groups along each axis, the axes with those first that index outputs, and groups of an output."""
    axes = list(layer.grid)
    if not axes:
        raise ValueError("context per_output cannot be combined with round_to=; leave one of them out")
    if "out" not in axes or layer.grid["out"] == len(layer) or layer.whole:
        raise ValueError(
            f"context per_output ranks the groups within one output, and the groups of {printable(layer.target.name)} "
            "are not parts of outputs; choose another granularity, such as 'weight', or leave the layer out with "
            "exclude="
        )
    shape = tuple(layer.grid.values())
    outer = [axes.index(axis) for axis in ("groups", "expert", "out") if axis in axes]
    order = [*outer, *(place for place in range(len(axes)) if place not in outer)]
    return shape, order, math.prod(shape[place] for place in order[len(outer) :])


def _per_output(layer: ScoredLayer, form: tuple[tuple[int, ...], list[int], int], count: int) -> np.ndarray:
    """Which groups of one layer are kept."""
    shape, order, row = form
    keys_of: Callable[[slice], np.ndarray] = partial(ranking_keys, layer)
    if order != sorted(order):
        keys_of = ranking_keys(layer).reshape(shape).transpose(order).reshape(-1).__getitem__
    kept = np.empty(len(layer), bool)
    many = max(CHUNK // row, 1) * row
    for part in (slice(start, start + many) for start in range(0, len(layer), many)):
        write_kept(kept[part].reshape(-1, row), keys_of(part).reshape(-1, row), 1, row, count)
    in_order = kept.reshape([shape[place] for place in order])
    kept = in_order.transpose(np.argsort(order)).reshape(-1)
    if not layer.revives:
        kept &= layer.alive
    return kept


def _per_output_on_device(
    layers: Sequence[DeviceLayer], forms: Sequence[tuple[tuple[int, ...], list[int], int]], counts: Sequence[int]
) -> list[Tensor]:
    """Which groups of all layers are kept."""
    in_order = []  # others, for these belong to the caller
    for layer, (shape, order, _) in zip(layers, forms, strict=True):
        score, alive = layer.score, layer.alive
        if order != sorted(order):
            score, alive = (values.reshape(shape).permute(order).reshape(-1) for values in (score, alive))
        in_order.append(replace(layer, score=score, alive=alive))
    rows = [
        Rows(len(layer) // length, length, 1, length, count)
        for layer, (*_, length), count in zip(layers, forms, counts, strict=True)
    ]
    all_kept = kept_in_rows(in_order, rows)
    for layer, ranked in zip(layers, in_order, strict=True):
        layer.nan = ranked.nan
    return [
        kept.reshape([shape[axis] for axis in order])
        .permute([order.index(axis) for axis in range(len(order))])
        .reshape(-1)
        for kept, (shape, order, _) in zip(all_kept, forms, strict=True)
    ]


def ask(
    context: Context, layers: Sequence[ScoredLayer], sparsity: float, granularity: str, notices: list[str]
) -> list[np.ndarray]:
    """Call a context and check what it returns.

    Args:
        context: A function of the layers and the sparsity.
        layers: The layers to rank.
        sparsity: Fraction of the weights of `layers` to prune, from 0 to 1.
        granularity: Name of the granularity, for the notice.
        notices: A list, to which a notice is added if the context cannot prune as much as was asked for.

    Returns:
        For each layer a bool array with one entry per group, True where the group is kept.

    Raises:
        ValueError: The context returns anything else, or prunes a whole layer that may not be emptied.
    """
    answer = context(layers, sparsity)
    all_kept = [np.asarray(kept) for kept in answer] if isinstance(answer, (list, tuple)) else []
    if [(kept.dtype, kept.shape) for kept in all_kept] != [(np.dtype(bool), layer.alive.shape) for layer in layers]:
        raise ValueError(
            f"context {name_of(context)} must return a list with, for each layer, a bool array over its groups, True "
            "where a group is kept; got "
            f"{[(kept.dtype.name, kept.shape) for kept in all_kept] or type(answer).__name__}"
        )
    if not capability(context, "keeps_masked", False):
        # Other contexts may change the returned array later, or revive groups that must stay masked.
        all_kept = [
            kept.copy() if layer.revives else kept & layer.alive for layer, kept in zip(layers, all_kept, strict=True)
        ]
    for layer, kept in zip(layers, all_kept, strict=True):
        if not kept.any() and not layer.whole and not layer.may_empty:
            raise ValueError(
                f"context {name_of(context)} prunes all of {printable(layer.target.name)}; every layer must keep at "
                "least one group, unless may_empty=True is given"
            )
    if sparsity > 0:
        notices += notices_of_limits(context, layers, sparsity, granularity, all_kept)
    return all_kept


def ask_on_device(
    context: Any, layers: Sequence[DeviceLayer], sparsity: float, granularity: str, notices: list[str]
) -> list[Tensor]:
    """Call a context that ranks on a GPU, and check what can be checked without waiting for it.

    Args:
        context: A context that declares on_device.
        layers: The layers to rank, with tensors.
        sparsity: Fraction of the weights of `layers` to prune, from 0 to 1.
        granularity: Name of the granularity, for the notice.
        notices: A list, to which a notice is added if shapes show that not as much can be pruned as was asked for.

    Raises:
        ValueError: If it does not return a bool tensor over the groups of each layer.
    """
    notices += _notices_of_limits_on_device(context, layers, sparsity, granularity)
    all_kept = context(layers, sparsity)
    forms = [(kept.dtype, kept.shape) if isinstance(kept, Tensor) else type(kept).__name__ for kept in all_kept]
    if forms != [(torch.bool, layer.alive.shape) for layer in layers]:
        raise ValueError(
            f"context {name_of(context)} declares on_device, so it must return a list with, for each layer, a bool "
            f"tensor over its groups; got {forms}"
        )
    if capability(context, "keeps_masked", False):
        return list(all_kept)
    return [kept & (layer.alive | layer.revives) for layer, kept in zip(layers, all_kept, strict=True)]


# Fraction of the weights by which a sparsity may be missed before there is a notice.
MISSED = 0.01


def notices_of_limits(
    context: Context, layers: Sequence[ScoredLayer], sparsity: float, granularity: str, all_kept: list[np.ndarray]
) -> list[str]:
    """Notice that no group can be pruned, or that layers in which no more can be pruned miss the sparsity.

    The text is the same at all sparsities of a schedule, so that a warning is shown once.

    Args:
        context: The context.
        layers: The layers that were ranked.
        sparsity: Fraction of their weights that was to be pruned.
        granularity: Name of the granularity.
        all_kept: For each layer, a bool array: which groups are kept.
    """
    total = sum(layer.total for layer in layers)
    pruned = [layer.total - layer.weights(kept) for layer, kept in zip(layers, all_kept, strict=True)]
    if sparsity * total - sum(pruned) <= MISSED * total and any(pruned):
        return []
    try:
        most = context(layers, capability(context, "highest_sparsity") or 1.0)
    except ValueError:  # some contexts refuse so high a sparsity
        return []
    how = f"with granularity {granularity} and context {name_of(context)}"
    limits = [layer.weights(~np.asarray(kept)) for layer, kept in zip(layers, most, strict=True)]
    if not any(limits):
        advice = "choose smaller groups, or context 'global'"
        return [f"sparsity {sparsity:g} was asked for, but {how} no group can be pruned, {_why_not(context, advice)}"]
    # Weights that are missing in layers of which no more can be pruned, and the fraction that can be.
    missing = {
        layer.target.name: (sparsity * layer.total - now, limit / layer.total)
        for layer, now, limit in zip(layers, pruned, limits, strict=True)
        if now == limit < sparsity * layer.total
    }
    each_alone = capability(context, "fixes_counts") is True
    if pruned != limits and not (each_alone and sum(weights for weights, _ in missing.values()) > MISSED * total):
        return []
    return [_cannot_be_reached(how, {name: share for name, (_, share) in missing.items()}, context)]


def _notices_of_limits_on_device(
    context: Context, layers: Sequence[DeviceLayer], sparsity: float, granularity: str
) -> list[str]:
    """As `notices_of_limits`, for layers on a GPU with groups of equal size, by shapes alone."""
    rule, sizes = capability(context, "fixes_counts"), [layer.size for layer in layers]
    if not rule or any(layer.may_empty or layer.whole for layer in layers):
        return []
    weights = [layer.weights for layer in layers]
    limits = [total - size if isinstance(size, int) else total for total, size in zip(weights, sizes, strict=True)]
    missing = [max(sparsity * total - limit, 0.0) for total, limit in zip(weights, limits, strict=True)]
    missed = sum(missing) if rule is True else sparsity * sum(weights) - sum(limits)
    if missed <= MISSED * sum(weights):
        return []
    shares = {
        layer.target.name: limit / total
        for layer, limit, total, weights_missing in zip(layers, limits, weights, missing, strict=True)
        if weights_missing > 0
    }
    return [_cannot_be_reached(f"with granularity {granularity} and context {name_of(context)}", shares, context)]


def _cannot_be_reached(how: str, shares: Mapping[str, float], context: Context) -> str:
    """The notice that layers limit the sparsity. shares: layer name -> the fraction of it that can be pruned."""
    name = min(shares, key=lambda each: shares[each])
    advice = "choose smaller groups, another context, may_empty=True, or leave such layers out with exclude="
    return (
        f"the sparsity that was asked for cannot be reached: {how} at most {percent(shares[name])} of "
        f"{printable(name)} can be pruned, {_why_not(context, advice)}"
    )


def _why_not(context: Context, advice: str) -> str:
    """Why a context prunes no more, and what to do. advice: what to do if the best groups are kept."""
    if capability(context, "highest_sparsity") is None:
        return f"because the best group of each scope is kept; {advice}"
    return (
        "because whole blocks alone are pruned, and its axis has none, or a rest beyond them; leave such layers out "
        "with exclude=, or choose another context"
    )
