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

from ..support.registry import Registry, name_of
from .quantity import quantities

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


def pooled_by(pooling: str) -> Callable[[Criterion], Criterion]:
    """Mark a criterion with the pooling of its definition: used if no other is asked for, and of single weights too."""

    def mark(criterion: Criterion) -> Criterion:
        criterion.pooling = pooling  # type: ignore[attr-defined]
        return criterion

    return mark


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


@criteria.register(name="grad")
def large_gradient(grad: Tensor) -> Tensor:
    """|g|: what comes back in RigL. Evci et al., 2020, "Rigging the Lottery" (arXiv:1911.11134)."""
    return grad.abs()


@criteria.register
def normalized_final(weight: Tensor) -> Tensor:
    """|w| / ||W||, with the l2 norm of the layer's weights: layers of different scale can be ranked together."""
    weight = weight.double()
    return weight.abs() / weight.norm().clamp(min=1e-300)


@criteria.register
def lamp(weight: Tensor) -> Tensor:
    """w^2 over the sum of v^2 of all weights v of the layer that rank no lower; of equals the later rank higher.

    For a context that ranks layers together. Lee et al., 2021 (arXiv:2010.07611).
    """
    squares = weight.double().square().flatten()
    order = squares.argsort(stable=True)
    ranked = squares[order]
    above = ranked.flip(0).cumsum(0).flip(0)
    return torch.empty_like(squares).scatter_(0, order, ranked / above.clamp(min=1e-300)).view_as(weight)


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


# --- Criteria that look at data ----------------------------------------------------------------------------------


@criteria.register
@elementwise
def snip(weight: Tensor, grad: Tensor) -> Tensor:
    """|w g|. Lee et al., 2019, "SNIP" (arXiv:1810.02340)."""
    return (weight * grad).abs()


@criteria.register
@elementwise
def grasp(weight: Tensor, hessian_grad: Tensor) -> Tensor:
    """w Hg. Published as -w Hg, what the gradient's norm gains when a weight goes, of which the highest go.

    Wang et al., 2020, "Picking Winning Tickets Before Training" (arXiv:2002.07376).
    """
    return weight * hessian_grad


@criteria.register
@elementwise
def synflow(weight: Tensor, flow: Tensor) -> Tensor:
    """|w| dR/d|w|, R being the sum of outputs for an input of ones and weights |w|; to be used in many steps.

    `sparsify(0.99, steps=100)`. Tanaka et al., 2020 (arXiv:2006.05467).
    """
    return weight.abs() * flow


@criteria.register
@pooled_by("squared_sum")
@elementwise
def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """w g, of which a group scores (sum of w g)^2: what the loss changes by when the group goes, squared.

    Of a whole filter before a batch norm the sum is zero, for the norm undoes its scale. Molchanov et al., 2019,
    "Importance Estimation for Neural Network Pruning" (arXiv:1906.10771).
    """
    return weight * grad


@criteria.register
@elementwise
def fisher(weight: Tensor, grad_sq: Tensor) -> Tensor:
    """w^2 F / 2, F being the diagonal of the empirical Fisher matrix. Theis et al., 2018 (arXiv:1801.05787)."""
    return weight.square() * grad_sq / 2


@criteria.register
@elementwise
def movement_pruning(weight_grad: Tensor) -> Tensor:
    """-w g, over all batches: weights that move away from zero survive. Sanh et al., 2020 (arXiv:2005.07683)."""
    return -weight_grad


@criteria.register
def wanda(weight: Tensor, activation: Tensor) -> Tensor:
    """|w| ||x||, x being the input that the weight is multiplied with; published with context 'per_output'.

    Sun et al., 2023, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv:2306.11695).
    """
    return weight.abs() * activation
