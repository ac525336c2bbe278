"""Contexts that give each layer a sparsity of its own: by its shape, by LAMP scores, or within limits that you set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from ..model.parallel import whole
from ..model.patterns import matching_each
from ..support.arguments import checks_arguments
from ..support.capability import capability
from ..support.registry import name_of
from .context import Context, contexts, local
from .ranking.lamp_counts import lamp_counts
from .ranking.scored_layer import ScoredLayer
from .ranking.selection import select_groups


@contexts.register(fixes_counts=True, keeps_masked=True)
def erk(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Erdos-Renyi-Kernel: the density of a layer is in proportion to (n_in + n_out + k_h + k_w) / (n_in n_out k_h k_w).

    The density is the fraction of weights that are kept. A layer whose density would be above 1 stays dense, and the
    others are pruned more. Each layer is ranked alone. Evci et al., 2020, "Rigging the Lottery" (arXiv:1911.11134).
    """
    return _budgeted(layers, sparsity, [_relative(_shapes(layer)) for layer in layers])


@contexts.register(fixes_counts=True, keeps_masked=True)
def er(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Erdos-Renyi: like erk, without the kernel: density in proportion to (n_in + n_out) / (n_in n_out).

    Mocanu et al., 2018, "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity"
    (arXiv:1707.04780).
    """
    return _budgeted(layers, sparsity, [_relative(_shapes(layer), kernel=False) for layer in layers])


def _relative(shapes: Sequence[tuple[int, ...]], kernel: bool = True) -> float:
    """Density of a layer, up to a common factor; for coupled layers the mean over their weights."""
    sizes = [math.prod(shape) for shape in shapes]
    axes = [shape if kernel else shape[:2] for shape in shapes]
    densities = [sum(each) / math.prod(each) for each in axes]
    return sum(size * density for size, density in zip(sizes, densities, strict=True)) / sum(sizes)


@contexts.register(fixes_counts=True)
def uniform_plus(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Keep a first convolution dense and the last layer at most 80 % sparse; the others are equally sparse.

    First and last are counted among the selected layers, in the order of the model's modules. Gale et al., 2019, "The
    State of Sparsity in Deep Neural Networks" (arXiv:1902.09574).
    """
    bounds: dict[int, tuple[float, float]] = {}
    if len(layers) > 1 and len(_shapes(layers[0])[0]) > 2:
        bounds[0] = (0.0, 0.0)
    if len(layers) > 1:
        bounds[len(layers) - 1] = (0.0, 0.8)
    return _bounded(local, layers, sparsity, bounds, "uniform_plus")


@contexts.register(keeps_masked=True)
def lamp(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Give each layer the sparsity that a joint ranking of the LAMP scores would give it, and rank each layer alone.

    The ranking within a layer is by the criterion. Lee et al., 2021, "Layer-Adaptive Sparsity for the Magnitude-based
    Pruning" (arXiv:2010.07611).
    """
    weights = [
        [(weight.name, whole(weight.parameter.detach()).flatten().cpu()) for weight in layer.targets]
        for layer in layers
    ]
    counts = lamp_counts(weights, sparsity, any(layer.may_empty for layer in layers))
    sizes = [sum(len(values) for _, values in each) for each in weights]
    return _each(layers, [1 - (size - count) / size for size, count in zip(sizes, counts, strict=True)])


@checks_arguments
def bounded(context: str | Context, bounds: Mapping[str, float | tuple[float, float]]) -> Context:
    """Make a context in which some layers have a fixed sparsity, or limits; the other layers make up for it.

    At the start of a schedule the sparsity can be too low for the lowest limits. All of them are then lowered in
    proportion.

    Args:
        context: The context for all other layers: a name of `contexts`, or a function.
        bounds: Layer name or glob -> sparsity, or a pair (lowest, highest), each from 0 to 1. If several globs
            match a layer, the last counts.

    Returns:
        The context, for `context=`.

    Raises:
        TypeError: `bounds` is not a dictionary.
        ValueError: A limit is not a fraction, or the lowest of a pair is above the highest. When the context is
            used: a glob matches no layer, or the limits do not allow the sparsity that is asked for.

    Example:
        The layer 'fc' has a sparsity of 0.5, and the layers in 'layer1' at most 0.8:

        >>> bounded('global', {'fc': 0.5, 'layer1.*': (0, 0.8)}).__name__
        'bounded(global)'
    """
    if not isinstance(bounds, Mapping):
        raise TypeError(
            f"bounded: bounds must be a dictionary, such as {{'fc': 0.5, 'layer1.*': (0, 0.8)}}, not {bounds!r}"
        )
    limits = {pattern: _limits(pattern, given) for pattern, given in bounds.items()}
    inner = contexts.resolve(context)
    return _Bounded(inner, limits, f"bounded({name_of(inner)})")


def _limits(pattern: Any, given: Any) -> tuple[float, float]:
    """What is given for a pattern, as (lowest, highest) sparsity."""
    pair = given if isinstance(given, (tuple, list)) else (given, given)
    numbers = all(isinstance(each, Real) and not isinstance(each, bool) for each in pair)
    if not isinstance(pattern, str) or len(pair) != 2 or not numbers or not 0 <= pair[0] <= pair[1] <= 1:
        raise ValueError(
            f"bounded: {pattern!r}: {given!r} must be a layer name or glob, and a sparsity from 0 to 1 or a pair "
            "(lowest, highest) of them"
        )
    return float(pair[0]), float(pair[1])


@dataclass(frozen=True)
class _Bounded:
    """A context with limits for some layers; a class, so that it can be pickled."""

    context: Context
    limits: Mapping[str, tuple[float, float]]
    __name__: str

    @property
    def fixes_counts(self) -> Any:
        """As of the context for the other layers."""
        return capability(self.context, "fixes_counts", False)

    @property
    def instead(self) -> str | None:
        """The same context without a highest sparsity, as a user writes it."""
        inner = capability(self.context, "instead")
        return None if inner is None else f"bounded({inner}, ...)"

    @property
    def highest_sparsity(self) -> float | None:
        """What is above that of the context, and of all limits, cannot be reached."""
        most = capability(self.context, "highest_sparsity")
        return None if most is None else max(most, *(limit for _, limit in self.limits.values()))

    def __call__(self, layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
        weights = {weight.name: weight for layer in layers for weight in layer.targets}
        bounds: dict[int, tuple[float, float]] = {}
        try:
            all_matched = matching_each(self.limits, weights, None)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(
                f"context {self.__name__}: {error}; bounds can only name layers that are pruned together: with a "
                "dictionary of sparsities, the layers of one of its patterns"
            ) from None
        for matched, limit in zip(all_matched, self.limits.values(), strict=True):
            bounds |= {
                number: limit
                for number, layer in enumerate(layers)
                if any(weight.name in matched for weight in layer.targets)
            }
        return _bounded(self.context, layers, sparsity, bounds, self.__name__)

    def note(self, grid: Mapping[str, int]) -> str:
        """Remark of the inner context on a layer, for the report."""
        return self.context.note(grid) if hasattr(self.context, "note") else ""


def _shapes(layer: ScoredLayer) -> list[tuple[int, ...]]:
    """Shapes of the weight as it is stored, or of all coupled ones: outputs, inputs, then the other axes.

    Of the matrices of several experts it is the shape of one.
    """
    named = [dict(zip(weight.axes, weight.parameter.shape, strict=True)) for weight in layer.targets]
    for sizes in named:
        sizes.pop("expert", None)
    return [(sizes.pop("out", 1), sizes.pop("in", 1), *sizes.values()) for sizes in named]


def _stay_masked(layer: ScoredLayer) -> int:
    """Number of weights that are masked and must not be revived."""
    return 0 if layer.revives else layer.weights(layer.masked)


def _each(layers: Sequence[ScoredLayer], sparsities: Sequence[float]) -> list[np.ndarray]:
    """Rank every layer alone, at a sparsity of its own."""
    return [kept for layer, share in zip(layers, sparsities, strict=True) for kept in select_groups([layer], share)]


def _budgeted(layers: Sequence[ScoredLayer], sparsity: float, relative: Sequence[float]) -> list[np.ndarray]:
    """Rank every layer alone, with densities in proportion to `relative` that together reach the sparsity.

    No density is above 1, nor above the fraction of weights that may be kept: what is masked and not revived counts.
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
    context: Context,
    layers: Sequence[ScoredLayer],
    sparsity: float,
    bounds: Mapping[int, tuple[float, float]],
    name: str,
) -> list[np.ndarray]:
    """Call a context so that some layers, given by their number, keep (lowest, highest) limits of sparsity.

    A layer that the context puts outside of its limits is fixed at the nearer limit. The context is then called again
    for the other layers, at the sparsity that they need, until no layer is outside.
    """
    sizes = [layer.total for layer in layers]
    wanted = sparsity * sum(sizes)
    least, most = (
        sum(bounds.get(number, (0.0, 1.0))[side] * size for number, size in enumerate(sizes)) for side in (0, 1)
    )
    if wanted > most + 0.5:
        raise ValueError(
            f"context {name}: sparsity {sparsity:g} cannot be reached, because its limits allow "
            f"{most / sum(sizes):.4g} at most; ask for less, or widen the limits"
        )
    lower = min(1.0, wanted / least) if least else 1.0
    limits = {number: (low * lower, low * lower if low == high else high) for number, (low, high) in bounds.items()}
    fixed = {number: low for number, (low, high) in limits.items() if low == high}
    # The context divides the sparsity among the layers as if nothing were masked, except where groups may be revived.
    unmasked = [layer if layer.revives else replace(layer, alive=np.ones(len(layer), bool)) for layer in layers]
    while True:
        free = [number for number in range(len(layers)) if number not in fixed]
        rest = wanted - sum(max(share * sizes[number], _stay_masked(layers[number])) for number, share in fixed.items())
        room = sum(sizes[number] for number in free)
        level = min(max(rest / room, 0.0), 1.0) if room else 0.0
        beyond = {}
        for number, kept in zip(
            free, context([unmasked[number] for number in free], level) if free else [], strict=True
        ):
            share = 1 - layers[number].weights(kept) / sizes[number]
            low, high = limits.get(number, (0.0, 1.0))
            # Half a weight beyond a limit is rounding.
            if (nearest := min(max(share, low), high)) != share and abs(share - nearest) * sizes[number] > 0.5:
                beyond[number] = (share, nearest)
        if not beyond:
            break
        # First the layers on the side with more excess: fixing them moves the others away from the other side.
        excess = sum((share - nearest) * sizes[number] for number, (share, nearest) in beyond.items())
        fixed |= {
            number: nearest for number, (share, nearest) in beyond.items() if (share > nearest) == (excess > 0)
        } or {number: nearest for number, (share, nearest) in beyond.items()}
    answers = dict(zip(free, context([layers[number] for number in free], level) if free else [], strict=True))
    for number, share in fixed.items():
        (answers[number],) = context([layers[number]], share)
    return [answers[number] for number in range(len(layers))]
