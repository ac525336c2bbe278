"""What: criteria. A criterion gives each weight a score; the weights with the lowest scores are pruned.

A criterion is its formula, written as a function. Each parameter without a default names a quantity, such as `weight`,
`init` (the weight at the start) or `grad`; quantity.py defines them. Parameters with a default are options. The
function returns a tensor of one score per weight, of any sign.

A criterion of your own is such a function. This one prunes the weights that are nearest to the mean of the layer:

>>> from torch import nn
>>> from sparsifai import Sparsifier
>>> def distance_from_mean(weight, power=1):
...     return (weight - weight.mean()).abs() ** power
>>> sparsifier = Sparsifier(nn.Linear(4, 6), criteria=distance_from_mean)
>>> sparsifier.sparsify(0.5)
>>> sparsifier.sparsity
0.5

`functools.partial` sets an option: criteria=partial(distance_from_mean, power=2). With `@criteria.register` above its
`def`, criteria='distance_from_mean' means the same function.

In the formulas below, w is the weight, w0 its initial value, w' its value at the last mask update, and g its gradient.
The criteria with w0 are those of Zhou et al., 2019, "Deconstructing Lottery Tickets" (arXiv:1905.01067). The updating_
criteria use w' instead of w0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..support.capability import capability, declare
from ..support.registry import Registry, name_of
from .quantity import quantities

Criterion = Callable[..., Tensor]


def quantities_of(criterion: Criterion) -> tuple[str, ...]:
    """Names of the quantities that a criterion needs, which are its parameters without a default.

    Args:
        criterion: A criterion, or a partial of one.

    Returns:
        The names, in the order of the parameters.

    Raises:
        ValueError: The parameters cannot be read, or one of them cannot be given by name.

    Example:
        >>> quantities_of(magnitude_increase)
        ('weight', 'init')
    """
    try:
        parameters = inspect.signature(criterion).parameters.values()
    except ValueError:
        raise ValueError(
            f"criterion {name_of(criterion)} hides its parameters, so the quantities it needs are not known; wrap it: "
            f"lambda weight: {name_of(criterion)}(weight)"
        ) from None
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [each for each in parameters if each.default is each.empty and each.kind not in optional]
    if any(each.kind is each.POSITIONAL_ONLY for each in required):
        raise ValueError(
            f"criterion {name_of(criterion)}: quantities are given by name; remove the '/' from its parameters"
        )
    return tuple(each.name for each in required)


def _check(criterion: Criterion) -> None:
    """Refuse a criterion that needs a quantity that is not registered."""
    unknown = [name for name in quantities_of(criterion) if name not in quantities]
    if unknown:
        raise ValueError(
            f"criterion {name_of(criterion)} needs the unknown quantity {unknown[0]!r}; {', '.join(quantities)} are "
            f"known. If {unknown[0]!r} is an option, give it a default value; if it is a quantity of your own, first "
            "register it with @quantities.register"
        )


# What a criterion can declare, as a keyword of `criteria.register` or as an attribute of the function:
#
# elementwise  The score of a weight depends on the quantities of this weight alone. See `elementwise`.
# pooling      Name of the pooling of its definition, such as 'squared_sum'. See `pooled_by`.
# proximal     Its scores are the absolute weights, so that shrinking the weights is the proximal step of its penalty.
# numpy        The same formula for a numpy array of weights. Only for elementwise criteria of `weight` alone.
# curvature    The kind of curvature that `inverse_curvature` and compensate= are computed from; else InputCurvature.
# compensates  The weights that stay are changed by default, because that belongs to its method.
# sweeps       It scores the columns of a layer in order, and each prunes before the next is scored: see sweep.py.
CAPABILITIES = ("elementwise", "pooling", "proximal", "numpy", "curvature", "compensates", "sweeps")

criteria = Registry("criterion", check=_check, capabilities=CAPABILITIES)
"""The criteria by name. `criteria.register` adds a function of quantities, which are named by its parameters.

Example:
    >>> @criteria.register
    ... def relative_increase(weight, init, epsilon=1e-8):
    ...     return weight.abs() / (init.abs() + epsilon)
    >>> sparsifier = Sparsifier(nn.Linear(8, 2), criteria='relative_increase')
"""


def elementwise(criterion: Criterion) -> Criterion:
    """Mark a criterion whose score of a weight depends on the quantities of this weight alone.

    A marked criterion is called for parts of a layer, of any shape. It is given the weights themselves instead of
    copies, so it must not change them, and its result is not checked.
    """
    declare(criterion, elementwise=True)
    return criterion


def is_elementwise(criterion: Criterion) -> bool:
    """Whether a criterion is marked as elementwise, or is a partial of a marked one that sets no tensor."""
    if isinstance(criterion, partial):
        given = (*criterion.args, *criterion.keywords.values())
        return is_elementwise(criterion.func) and not any(isinstance(value, Tensor) for value in given)
    return bool(capability(criterion, "elementwise", False))


def pooled_by(pooling: str) -> Callable[[Criterion], Criterion]:
    """Mark a criterion with the pooling of its definition.

    This pooling is the default for the criterion. It is also applied to single weights.

    Args:
        pooling: Name of a pooling, such as 'squared_sum'.
    """

    def mark(criterion: Criterion) -> Criterion:
        criterion.pooling = pooling  # type: ignore[attr-defined]
        return criterion

    return mark


@criteria.register
def random(weight: Tensor, rng: torch.Generator) -> Tensor:
    """Uniform in [0, 1), from the Sparsifier's own generator: the same scores on every device."""
    return torch.rand(weight.shape, generator=rng)


@criteria.register(elementwise=True, proximal=True, numpy=np.abs)
def large_final(weight: Tensor) -> Tensor:
    """|w|: large weights are kept.

    Example:
        >>> large_final(torch.tensor([3.0, -1.0]))
        tensor([3., 1.])
    """
    return weight.abs()


@criteria.register
@elementwise
def small_final(weight: Tensor) -> Tensor:
    """-|w|: small weights are kept.

    Example:
        >>> small_final(torch.tensor([3.0, -1.0]))
        tensor([-3., -1.])
    """
    return -weight.abs()


@criteria.register
@elementwise
def squared_final(weight: Tensor) -> Tensor:
    """|w|^2: the order of large_final; the scores of groups differ.

    Example:
        >>> squared_final(torch.tensor([3.0, -1.0]))
        tensor([9., 1.])
    """
    return weight.abs().square()


@criteria.register(name="grad")
def large_gradient(grad: Tensor) -> Tensor:
    """|g|: RigL regrows weights by it. Evci et al., 2020, "Rigging the Lottery" (arXiv:1911.11134)."""
    return grad.abs()


@criteria.register
def normalized_final(weight: Tensor) -> Tensor:
    """|w| / ||W||, ||W|| being the l2 norm of the layer: for ranking layers of different scale together.

    Example:
        >>> normalized_final(torch.tensor([3.0, -4.0]))
        tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    sizes = weight.abs().double()
    return sizes / sizes.norm().clamp(min=1e-300)


@criteria.register
def lamp(weight: Tensor) -> Tensor:
    """|w|^2 over the sum of |v|^2, v being all weights of the layer that rank no lower.

    Of equal weights the later ranks higher. For contexts that rank layers together. Lee et al., 2021, "Layer-Adaptive
    Sparsity for the Magnitude-based Pruning" (arXiv:2010.07611).

    Example:
        >>> lamp(torch.tensor([1.0, -1.0, 2.0]))  # 1/6, 1/5 and 4/4
        tensor([0.1667, 0.2000, 1.0000], dtype=torch.float64)
    """
    squares = weight.abs().double().square().flatten()
    order = squares.argsort(stable=True)
    ranked = squares[order]
    above = ranked.flip(0).cumsum(0).flip(0)
    return torch.empty_like(squares).scatter_(0, order, ranked / above.clamp(min=1e-300)).view_as(weight)


@criteria.register
@elementwise
def large_init(init: Tensor) -> Tensor:
    """|w0|: weights with a large initial value are kept.

    Example:
        >>> large_init(init=torch.tensor([3.0, -1.0]))
        tensor([3., 1.])
    """
    return init.abs()


@criteria.register
@elementwise
def small_init(init: Tensor) -> Tensor:
    """-|w0|: weights with a small initial value are kept.

    Example:
        >>> small_init(init=torch.tensor([3.0, -1.0]))
        tensor([-3., -1.])
    """
    return -init.abs()


@criteria.register
@elementwise
def large_init_large_final(weight: Tensor, init: Tensor, alpha: float = 1.0) -> Tensor:
    """min(alpha |w|, |w0|): weights that are large at both times are kept.

    Example:
        >>> large_init_large_final(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0]))
        tensor([1., 1.])
    """
    return torch.minimum(alpha * weight.abs(), init.abs())


@criteria.register
@elementwise
def small_init_small_final(weight: Tensor, init: Tensor, alpha: float = 1.0) -> Tensor:
    """-max(alpha |w|, |w0|): weights that are small at both times are kept.

    Example:
        >>> small_init_small_final(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0]))
        tensor([-3., -2.])
    """
    return -torch.maximum(alpha * weight.abs(), init.abs())


@criteria.register
@elementwise
def magnitude_increase(weight: Tensor, init: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha |w| - |w0|: weights whose magnitude has grown are kept.

    Example:
        >>> magnitude_increase(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0]))
        tensor([ 2., -1.])
    """
    return alpha * weight.abs() - init.abs()


@criteria.register
@elementwise
def movement(weight: Tensor, init: Tensor) -> Tensor:
    """|w - w0|: weights that have moved far are kept.

    Example:
        >>> movement(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0]))
        tensor([2., 3.])
    """
    return (weight - init).abs()


@criteria.register
@elementwise
def movmag(weight: Tensor, init: Tensor) -> Tensor:
    """|w (w - w0)|: movement times magnitude.

    Example:
        >>> movmag(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0]))
        tensor([6., 3.])
    """
    return (weight * (weight - init)).abs()


@criteria.register
@elementwise
def updating_magnitude_increase(weight: Tensor, previous: Tensor) -> Tensor:
    """|w| - |w'|: magnitude_increase since the last mask update.

    Example:
        >>> updating_magnitude_increase(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0]))
        tensor([ 2., -1.])
    """
    return weight.abs() - previous.abs()


@criteria.register
@elementwise
def updating_movement(weight: Tensor, previous: Tensor) -> Tensor:
    """|w - w'|: movement since the last mask update.

    Example:
        >>> updating_movement(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0]))
        tensor([2., 3.])
    """
    return (weight - previous).abs()


@criteria.register
@elementwise
def updating_movmag(weight: Tensor, previous: Tensor) -> Tensor:
    """|w (w - w')|: movmag since the last mask update.

    Example:
        >>> updating_movmag(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0]))
        tensor([6., 3.])
    """
    return (weight * (weight - previous)).abs()
