"""The quantities that a criterion may name, each one function, collected only when a criterion names it.

A quantity is a function of the Sparsifier and the name of a parameter. `taken` says at which moments it is called:

- 'score': each time that scores are computed; nothing is stored.
- 'start': when the Sparsifier is made; a copy of what it returns is stored.
- 'update': after each mask update; a copy of what it returns is stored.
- 'backward': after a backward, with gradients there: in training those that pass anyway, else those of `calibrate`.
- 'forward': when a layer computes in a batch of `calibrate`, with its input in `inputs[name]`.
- 'loss': in a batch of `calibrate`, with its `loss` there, through which gradients can be taken.

Of the last three the mean over the batches since the last update is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from ..model.layers import CONVOLUTIONS, NamedWeight
from ..model.parallel import whole
from ..model.running import evaluating, run
from ..model.tensors import widened
from ..support.registry import Registry


class QuantitySource(Protocol):
    """What a quantity may read of the Sparsifier."""

    model: nn.Module
    targets: dict[str, NamedWeight]
    rng: torch.Generator
    example_input: Any  # a batch, or None
    inputs: dict[str, Tensor]  # of the layer that computes, at the moment 'forward'
    loss: Any  # a tensor, at the moment 'loss'

    def once(self, compute: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `compute` gives of the Sparsifier, computed at the first layer of a moment only."""
        ...


class UnsuitableLayerError(ValueError):
    """A quantity cannot be had of a layer."""


STORED = ("start", "update")


AVERAGED = ("backward", "forward", "loss")


MOMENTS = ("score", *STORED, *AVERAGED)


def taken(*moments: str, running: bool = False, finish: Callable[[Tensor], Tensor] | None = None) -> Callable:
    """Mark a quantity with the moments at which it is taken: 'score', 'start', 'update', 'backward', ...

    running: the mean is over all batches, not over those since the last update. finish: applied to the mean when it is
    asked for, as the root to a mean of squares.
    """
    averaged = set(moments) & set(AVERAGED)
    if not moments or not set(moments) <= set(MOMENTS) or (averaged and len(moments) > 1):
        raise ValueError(
            f"taken: a quantity is taken at one or more of {', '.join(MOMENTS)}, a mean over batches at one moment; "
            f"not {moments!r}"
        )
    if (running or finish) and not averaged:
        raise ValueError(f"taken: running= and finish= are for means over batches, taken at {', '.join(AVERAGED)}")

    def mark(quantity: Callable) -> Callable:
        quantity.moments, quantity.running, quantity.finish = moments, running, finish  # type: ignore[attr-defined]
        return quantity

    return mark


def _check(quantity: Callable) -> None:
    if not getattr(quantity, "moments", ()):
        raise ValueError(
            f"quantity {quantity.__name__}: mark it with @taken(...) and one or more of {', '.join(MOMENTS)}"
        )


quantities = Registry("quantity", check=_check)


@quantities.register
@taken("score")
def weight(sparsifier: QuantitySource, name: str) -> Tensor:
    """The weight as it is."""
    return whole(sparsifier.targets[name].parameter.detach())


@quantities.register
@taken("start")
def init(sparsifier: QuantitySource, name: str) -> Tensor:
    """The weight as it was when the Sparsifier was made."""
    return whole(sparsifier.targets[name].parameter.detach())


@quantities.register
@taken("start", "update")
def previous(sparsifier: QuantitySource, name: str) -> Tensor:
    """The weight as it was at the last mask update."""
    return whole(sparsifier.targets[name].parameter.detach())


@quantities.register
@taken("score")
def rng(sparsifier: QuantitySource, name: str) -> torch.Generator:
    """The Sparsifier's own random generator, on the CPU; torch's global one is left alone."""
    return sparsifier.rng


@quantities.register
@taken("backward")
def grad(sparsifier: QuantitySource, name: str) -> Tensor:
    """g = dL/dw, the mean over the batches since the last update; of masked weights too."""
    return _gradient(sparsifier.targets[name])


@quantities.register
@taken("backward")
def grad_sq(sparsifier: QuantitySource, name: str) -> Tensor:
    """g^2, the mean over the batches since the last update: the diagonal of the empirical Fisher matrix, by batches."""
    return _gradient(sparsifier.targets[name]).square()


@quantities.register
@taken("backward", running=True)
def weight_grad(sparsifier: QuantitySource, name: str) -> Tensor:
    """w g, the mean over all batches."""
    target = sparsifier.targets[name]
    return whole(target.parameter.detach()) * _gradient(target)


@quantities.register
@taken("forward", finish=torch.sqrt)
def activation(sparsifier: QuantitySource, name: str) -> Tensor:
    """Root of the mean square of the layer's input, per input channel; in a shape that broadcasts to the weight."""
    target = sparsifier.targets[name]
    squares = _by_channel(target, sparsifier.inputs[name]).square().mean(1)
    axes = list(target.axes)
    if target.convolution_groups > 1:
        # Of a grouped convolution each group of outputs reads inputs of its own; its first axis runs over the groups.
        squares = squares.view(target.convolution_groups, -1)
        groups = squares.repeat_interleave(target.axes["out"], 0) if axes[0] == "out" else squares.view(-1, 1)
        return groups.reshape(groups.shape + (1,) * (len(axes) - 2))
    return squares.view([-1 if axis == "in" else 1 for axis in axes])


@quantities.register
@taken("loss")
def hessian_grad(sparsifier: QuantitySource, name: str) -> Tensor:
    """H g, the Hessian of the loss times its gradient, over all layers that take part."""
    return sparsifier.once(_hessian_gradients)[name]


@quantities.register
@taken("score")
def flow(sparsifier: QuantitySource, name: str) -> Tensor:
    """dR/d|w|, where R is the sum of the outputs for an input of ones, all weights being |w|; needs no data.

    In float64: over many layers R leaves the range of float32. Tanaka et al., 2020 (arXiv:2006.05467).
    """
    return sparsifier.once(_synaptic_flow)[name]


def _gradient(target: NamedWeight) -> Tensor:
    gradient = target.parameter.grad
    if gradient is None:
        raise ValueError(
            f"no gradient has reached {target.name}, which has no part in the loss or is frozen; exclude= leaves it out"
        )
    return widened(whole(gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()))


def _by_channel(target: NamedWeight, value: Tensor) -> Tensor:
    """The input of a layer -> (channels, all else)."""
    channels = target.axes["in"] * target.convolution_groups
    # A convolution has its channels in the second axis, all else in the last one.
    axis = -1 if not isinstance(target.module, CONVOLUTIONS) else 1 if value.dim() == len(target.axes) else 0
    if target.attribute != "weight" or not value.is_floating_point() or value.shape[axis] != channels:
        raise UnsuitableLayerError(
            f"activation: {target.name} is not multiplied with what {target.kind} is given, of the shape "
            f"{tuple(value.shape)}; leave it out with exclude="
        )
    return widened(value.detach()).movedim(axis, 0).reshape(channels, -1)


@torch.enable_grad()
def _hessian_gradients(sparsifier: QuantitySource) -> dict[str, Tensor]:
    parameters = {name: target.parameter for name, target in sparsifier.targets.items()}
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if frozen:
        raise UnsuitableLayerError(f"no gradient reaches {frozen[0]}, which is frozen; leave it out with exclude=")
    gradients = torch.autograd.grad(sparsifier.loss, list(parameters.values()), create_graph=True, allow_unused=True)
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    if unused:
        raise ValueError(f"no gradient has reached {unused[0]}: it has no part in the loss; leave it out with exclude=")
    squares = torch.stack([(gradient * gradient.detach()).sum() for gradient in gradients]).sum()
    if not squares.requires_grad:  # of a loss that is linear in all weights
        return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    products = torch.autograd.grad(squares, list(parameters.values()), retain_graph=True, allow_unused=True)
    # The gradient of a weight that enters the loss linearly does not change with it.
    return {
        name: torch.zeros_like(parameter) if product is None else widened(product.detach())
        for (name, parameter), product in zip(parameters.items(), products, strict=True)
    }


def _synaptic_flow(sparsifier: QuantitySource) -> dict[str, Tensor]:
    if sparsifier.example_input is None:
        raise ValueError("synflow needs the shape of an input: give the Sparsifier an example_input=")
    model = sparsifier.model
    values = {
        # A mask of minus infinities, as attention has, stays one.
        name: torch.where(value.isinf(), value, value.abs()).detach().double() if value.is_floating_point() else value
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    parameters = {name: values[name].requires_grad_() for name in sparsifier.targets}
    with torch.enable_grad(), evaluating(model):
        try:
            output = run(partial(functional_call, model, values), tree_map(_ones, sparsifier.example_input))
        except Exception as error:
            raise ValueError(
                f"synflow: the model does not run on ones in float64 of the shape of example_input ({error}); pass an "
                "example_input= that fits, and cast nothing to another type in forward"
            ) from error
        total = torch.stack([each.sum() for each in tree_leaves(output) if isinstance(each, Tensor)]).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    if unused:
        raise ValueError(f"synflow: the output does not depend on {unused[0]}; leave it out with exclude=")
    return dict(zip(parameters, gradients, strict=True))


def _ones(value: Any) -> Any:
    """The first example of a batch, with ones for its numbers; tokens and the like stay as they are."""
    if not isinstance(value, Tensor):
        return value
    return torch.ones_like(value[:1], dtype=torch.float64) if value.is_floating_point() else value[:1]
