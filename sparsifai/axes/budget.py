"""Contexts that give every layer a sparsity of its own: by its shape, by LAMP scores, or within bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from ..model.layers import NamedWeight
from ..model.patterns import matching
from ..support.registry import name_of
from .context import Context, contexts, local
from .criterion import lamp as lamp_score
from .ranking.scored_layer import ScoredLayer
from .ranking.selection import select_groups


@contexts.register
def erk(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Erdos-Renyi-Kernel: the density of a layer is in proportion to (n_in + n_out + k_h + k_w) / (n_in n_out k_h k_w).

    Layers that would be more than dense are dense, and the others make up for it. Each is ranked alone. Evci et al.,
    2020, "Rigging the Lottery" (arXiv:1911.11134).
    """
    return _budgeted(layers, sparsity, [_relative(_shapes(layer)) for layer in layers])


@contexts.register
def er(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Erdos-Renyi: as erk, without the kernel: (n_in + n_out) / (n_in n_out).

    Mocanu et al., 2018 (arXiv:1707.04780).
    """
    return _budgeted(layers, sparsity, [_relative(_shapes(layer), kernel=False) for layer in layers])


def _relative(shapes: Sequence[tuple[int, ...]], kernel: bool = True) -> float:
    """The density of a layer in proportion; of several that are joined the mean by weights."""
    sizes = [math.prod(shape) for shape in shapes]
    axes = [shape if kernel else shape[:2] for shape in shapes]
    densities = [sum(each) / math.prod(each) for each in axes]
    return sum(size * density for size, density in zip(sizes, densities, strict=True)) / sum(sizes)


@contexts.register
def uniform_plus(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """The first layer, if a convolution, is dense, the last at most 80 % sparse, the others equally sparse.

    First and last of those that take part, in the order of the model's modules. Gale et al., 2019, "The State of
    Sparsity" (arXiv:1902.09574).
    """
    bounds: dict[int, tuple[float, float]] = {}
    if len(layers) > 1 and len(_shapes(layers[0])[0]) > 2:
        bounds[0] = (0.0, 0.0)
    if len(layers) > 1:
        bounds[len(layers) - 1] = (0.0, 0.8)
    return _bounded(local, layers, sparsity, bounds)


@contexts.register
def lamp(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Every layer gets the sparsity that ranking LAMP scores of all layers together would give it, and is ranked alone.

    Lee et al., 2021, "Layer-Adaptive Sparsity for the Magnitude-based Pruning" (arXiv:2010.07611).
    """
    scored = [
        ScoredLayer(layer.target, score.__getitem__, np.ones(len(score), bool), may_empty=layer.may_empty)
        for layer in layers
        for score in [np.concatenate([_lamp_scores(target) for target in layer.targets])]
    ]
    shares = [1 - stays.mean() for stays in select_groups(scored, sparsity)]
    return _each(layers, shares)


def _lamp_scores(target: NamedWeight) -> np.ndarray:
    return lamp_score(target.parameter.detach()).flatten().cpu().numpy()


def bounded(context: str | Context, bounds: Mapping[str, float | tuple[float, float]]) -> Context:
    """A context in which some layers have a sparsity of their own, or limits; the others make up for it.

    bounds: glob of layer names -> sparsity, or (lowest, highest); of globs that match a layer the last counts. At a
    sparsity below what the lowest limits add up to, as early in a schedule, these are lowered in proportion.

    >>> bounded('global', {'fc': 0.5, 'layer1.*': (0, 0.8)}).__name__
    'bounded(global)'
    """
    if not isinstance(bounds, Mapping):
        raise TypeError(f"bounded: bounds is a dictionary, such as {{'fc': 0.5, 'layer1.*': (0, 0.8)}}, not {bounds!r}")
    limits = {pattern: _limits(pattern, given) for pattern, given in bounds.items()}
    inner = contexts.resolve(context)
    return _Bounded(inner, limits, f"bounded({name_of(inner)})")


def _limits(pattern: Any, given: Any) -> tuple[float, float]:
    pair = given if isinstance(given, (tuple, list)) else (given, given)
    numbers = all(isinstance(each, Real) and not isinstance(each, bool) for each in pair)
    if not isinstance(pattern, str) or len(pair) != 2 or not numbers or not 0 <= pair[0] <= pair[1] <= 1:
        raise ValueError(
            f"bounded: {pattern!r}: {given!r} is not a glob of layer names and a sparsity from 0 to 1, or two: "
            "(lowest, highest)"
        )
    return float(pair[0]), float(pair[1])


@dataclass(frozen=True)
class _Bounded:
    context: Context
    limits: Mapping[str, tuple[float, float]]
    __name__: str

    def __call__(self, layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
        targets = {target.name: target for layer in layers for target in layer.targets}
        bounds: dict[int, tuple[float, float]] = {}
        for pattern, limit in self.limits.items():
            try:
                matched = matching(pattern, targets, None)  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(
                    f"context {self.__name__}: {error}; layers that stay dense, or are ranked apart, have no limits"
                ) from None
            bounds |= {
                number: limit
                for number, layer in enumerate(layers)
                if any(target.name in matched for target in layer.targets)
            }
        return _bounded(self.context, layers, sparsity, bounds)

    def note(self, grid: Mapping[str, int]) -> str:
        """What the context within says of a layer."""
        return self.context.note(grid) if hasattr(self.context, "note") else ""


def _shapes(layer: ScoredLayer) -> list[tuple[int, ...]]:
    """Of a weight as it is stored, or of those that are joined, their outputs and inputs first."""
    named = [dict(zip(target.axes, target.parameter.shape, strict=True)) for target in layer.targets]
    return [(sizes.pop("out", 1), sizes.pop("in", 1), *sizes.values()) for sizes in named]


def _stay_masked(layer: ScoredLayer) -> int:
    """Weights that are zero and must not come back."""
    return 0 if layer.revives else layer.weights(layer.masked)


def _each(layers: Sequence[ScoredLayer], shares: Sequence[float]) -> list[np.ndarray]:
    """Every layer ranked alone, at a sparsity of its own."""
    return [stays for layer, share in zip(layers, shares, strict=True) for stays in select_groups([layer], share)]


def _budgeted(layers: Sequence[ScoredLayer], sparsity: float, relative: Sequence[float]) -> list[np.ndarray]:
    """Every layer ranked alone, with densities in proportion to `relative`, at most 1, that reach the sparsity.

    What must stay masked counts: of such a layer no more can be kept than is left.
    """
    sizes = np.array([layer.total for layer in layers], float)
    most = 1 - np.array([_stay_masked(layer) for layer in layers]) / sizes
    kept = (1 - sparsity) * sizes.sum()
    full = np.zeros(len(layers), bool)
    while True:
        rest = kept - (most * sizes)[full].sum()
        scale = rest / max((sizes * relative)[~full].sum(), 1e-300)
        density = np.where(full, most, scale * np.array(relative))
        excess = density / np.maximum(most, 1e-300)
        if not (excess > 1).any():
            return _each(layers, list(1 - density))
        full |= excess >= excess.max()


def _bounded(
    context: Context, layers: Sequence[ScoredLayer], sparsity: float, bounds: Mapping[int, tuple[float, float]]
) -> list[np.ndarray]:
    """What `context` gives, with limits for the sparsity of some layers, by their number."""
    sizes = [layer.total for layer in layers]
    wanted = sparsity * sum(sizes)
    least, most = (
        sum(bounds.get(number, (0.0, 1.0))[side] * size for number, size in enumerate(sizes)) for side in (0, 1)
    )
    if wanted > most + 0.5:
        raise ValueError(
            f"context {name_of(context)}, bounded: sparsity {sparsity:g} cannot be had: the limits allow "
            f"{most / sum(sizes):.4g} at most; widen them"
        )
    lower = min(1.0, wanted / least) if least else 1.0
    limits = {number: (low * lower, low * lower if low == high else high) for number, (low, high) in bounds.items()}
    fixed = {number: low for number, (low, high) in limits.items() if low == high}
    # What is masked already has no say in what each layer is to have, unless it is what may come back.
    unmasked = [layer if layer.revives else replace(layer, alive=np.ones(len(layer), bool)) for layer in layers]
    while True:
        free = [number for number in range(len(layers)) if number not in fixed]
        left = wanted - sum(max(share * sizes[number], _stay_masked(layers[number])) for number, share in fixed.items())
        room = sum(sizes[number] for number in free)
        level = min(max(left / room, 0.0), 1.0) if room else 0.0
        beyond = {}
        for number, stays in zip(
            free, context([unmasked[number] for number in free], level) if free else [], strict=True
        ):
            share = 1 - layers[number].weights(stays) / sizes[number]
            low, high = limits.get(number, (0.0, 1.0))
            # What the size of groups rounds is not beyond.
            if (nearest := min(max(share, low), high)) != share and abs(share - nearest) * sizes[number] > 0.5:
                beyond[number] = (share, nearest)
        if not beyond:
            break
        # Those on the side that weighs more first: fixing them moves the others away from the other side.
        excess = sum((share - nearest) * sizes[number] for number, (share, nearest) in beyond.items())
        fixed |= {
            number: nearest for number, (share, nearest) in beyond.items() if (share > nearest) == (excess > 0)
        } or {number: nearest for number, (share, nearest) in beyond.items()}
    kept = dict(zip(free, context([layers[number] for number in free], level) if free else [], strict=True))
    for number, share in fixed.items():
        (kept[number],) = context([layers[number]], share)
    return [kept[number] for number in range(len(layers))]
