"""Quantities: what a criterion may name as a parameter, such as `weight`, `init` or `grad`.

A quantity is a function of a source and the name of a parameter. The source has the model and its selected layers;
`QuantitySource` lists what a quantity can read. The quantity returns a tensor that broadcasts to the weight. It is only
computed if a criterion names it. `taken` marks the function with the moments at which it is called:

- 'score': whenever scores are computed. Nothing is stored.
- 'passes': the same, from passes over the batches that `calibrate` was given last, by `curvatures`.
- 'start': when the Sparsifier is made. A copy of the result is stored.
- 'update': after each mask update. A copy of the result is stored.
- 'backward': after a backward pass, when `.grad` is there: in training, or in a batch of `calibrate`. A layer that the
  batch has skipped has zeros for `.grad`.
- 'forward': in a batch of `calibrate`, when a layer computes; its input is `inputs[name]`.
- 'loss': in a batch of `calibrate`, when its `loss` is there, for quantities that need more than the gradient.
- 'input_grad': in a batch of `calibrate`, when the gradients of the inputs of those layers are there that read joint
  groups, such as attention heads; they are in `input_grads`.

For the last four, the mean over all batches since the last mask update is stored.

A quantity of your own is such a function. Criteria can then name it:

    @quantities.register
    @taken('backward')
    def grad_size(source, name):
        return source.layers[name].parameter.grad.abs()

    @criteria.register
    def large_grad_size(weight, grad_size):
        return weight.abs() * grad_size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..model.layers import CONVOLUTIONS, NamedWeight
from ..model.parallel import whole
from ..model.running import first_example, in_modes, run, shell_of
from ..model.tensors import computable, is_float, tensors_in, widened, with_autograd
from ..support.printable import message_of, printable
from ..support.registry import Registry, name_of


class QuantitySource(Protocol):
    """What a quantity may read: a part of the Sparsifier.

    Attributes:
        model: The model.
        layers: Parameter name -> the weight of a selected layer; its tensor is `layers[name].parameter`.
        rng: The Sparsifier's random generator, on the CPU.
        example_input: A batch, or None.
        inputs: Parameter name -> the input of its layer, at the moment 'forward'.
        loss: The loss of the batch, a tensor, at the moment 'loss'.
        skipped: The layers that no gradient of the batch reaches; theirs is zero.
        joint: With a joint granularity, parameter name -> (its `JointGroups`, its `Part` of them); else empty.
        input_grads: Parameter name -> (input, its gradient, number of examples) for each call of its layer, at the
            moment 'input_grad', for layers that read joint groups. Examples are the first axis of an input, or blocks
            of it.
        curvatures: Function that yields pairs of a parameter name and its `Curvature`, at the moment 'passes'. One
            curvature after the other is in memory.
    """

    model: nn.Module
    layers: Mapping[str, NamedWeight]
    rng: torch.Generator
    example_input: Any
    inputs: dict[str, Tensor]
    loss: Any
    skipped: set[str]
    joint: Mapping[str, Any]
    input_grads: Mapping[str, list[tuple[Tensor, Tensor, int]]]
    curvatures: Any

    def once(self, compute: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Compute something for all layers, once at each moment.

        Args:
            compute: A function of the source that returns parameter name -> tensor.

        Returns:
            The result of `compute`; for all but the first layer of a moment, the stored one.
        """
        ...


class UnsuitableLayerError(ValueError):
    """A quantity cannot be computed for a layer."""


# Moments at which a copy is stored, those of a batch of `calibrate` alone, and those at which a mean over batches is.
STORED = ("start", "update")
CALIBRATED = ("forward", "loss", "input_grad")
AVERAGED = ("backward", *CALIBRATED)
MOMENTS = ("score", "passes", *STORED, *AVERAGED)


def taken(*moments: str, running: bool = False, finish: Callable[[Tensor], Tensor] | None = None) -> Callable:
    """Mark a quantity with the moments at which it is computed.

    A quantity is a function of a `QuantitySource` and the name of a weight. A criterion asks for it by naming a
    parameter like it.

    Args:
        *moments: One or more of 'score' (whenever scores are computed), 'passes' (the same, from the batches of
            `calibrate`), 'start' (when the Sparsifier is made) and 'update' (after each mask update). Or, for a mean
            over batches, one of 'backward' (after a backward pass),
            'forward' (when a layer computes in a batch of `calibrate`), 'loss' (when the loss of a batch of
            `calibrate` is computed) and 'input_grad' (when the gradients of inputs are there, too).
        running: Whether the mean is over all batches. By default it is over those since the last mask update.
        finish: Function of the mean, applied when a criterion needs it, such as torch.sqrt for a mean of squares.
            Default none.

    Returns:
        A decorator, to be put below `@quantities.register`.

    Raises:
        ValueError: A moment is unknown, there are several moments for a mean, or `running` or `finish` is
            given without a mean.

    Example:
        >>> @taken('backward')
        ... def grad_size(source, name):
        ...     return source.layers[name].parameter.grad.abs()
        >>> grad_size.moments
        ('backward',)
    """
    averaged = set(moments) & set(AVERAGED)
    if not moments or not set(moments) <= set(MOMENTS) or (averaged and len(moments) > 1):
        raise ValueError(
            "taken: give one or more of 'score', 'passes', 'start' and 'update', or one of 'backward', 'forward', "
            f"'loss' and 'input_grad'; not {moments!r}"
        )
    if (running or finish) and not averaged:
        raise ValueError(f"taken: running= and finish= are for means over batches, at {', '.join(AVERAGED)}")

    def mark(quantity: Callable) -> Callable:
        quantity.moments, quantity.running, quantity.finish = moments, running, finish  # type: ignore[attr-defined]
        return quantity

    return mark


def _check(quantity: Callable) -> None:
    """Refuse a quantity without moments."""
    if not getattr(quantity, "moments", ()):
        raise ValueError(
            f"quantity {name_of(quantity)} does not say when it is computed; mark it with @taken(...) below the "
            f"registration, and with one or more of {', '.join(MOMENTS)}"
        )


quantities = Registry("quantity", check=_check)
"""The quantities by name, which criteria ask for by the names of their parameters.

Example:
    >>> @quantities.register
    ... @taken('backward')
    ... def gradient_sign(source, name):
    ...     return source.layers[name].parameter.grad.sign()
    >>> sparsifier = Sparsifier(nn.Linear(8, 2), criteria=lambda weight, gradient_sign: weight * gradient_sign)
"""


@quantities.register
@taken("score")
def weight(source: QuantitySource, name: str) -> Tensor:
    """The weight now."""
    return whole(source.layers[name].parameter.detach())


@quantities.register
@taken("start")
def init(source: QuantitySource, name: str) -> Tensor:
    """The weight when the Sparsifier was made."""
    return whole(source.layers[name].parameter.detach())


@quantities.register
@taken("start", "update")
def previous(source: QuantitySource, name: str) -> Tensor:
    """The weight at the last mask update, or when the Sparsifier was made."""
    return whole(source.layers[name].parameter.detach())


@quantities.register
@taken("score")
def rng(source: QuantitySource, name: str) -> torch.Generator:
    """The Sparsifier's own random generator, on the CPU; torch's global generator is not used."""
    return source.rng


@quantities.register
@taken("backward")
def grad(source: QuantitySource, name: str) -> Tensor:
    """g = dL/dw, the mean over the batches since the last mask update. Masked weights have a gradient, too."""
    return _gradient(source.layers[name])


@quantities.register
@taken("backward")
def grad_sq(source: QuantitySource, name: str) -> Tensor:
    """g^2, the mean over the batches since the last mask update.

    It estimates the diagonal of the empirical Fisher matrix; g is the gradient of a batch, not of one example.
    """
    return _gradient(source.layers[name]).square()


@quantities.register
@taken("backward", running=True)
def weight_grad(source: QuantitySource, name: str) -> Tensor:
    """w g, the mean over all batches."""
    layer = source.layers[name]
    return whole(layer.parameter.detach()) * _gradient(layer)


@quantities.register
@taken("forward", finish=torch.sqrt)
def activation(source: QuantitySource, name: str) -> Tensor:
    """Root mean square of the layer's input, per input channel, in a shape that broadcasts to the weight."""
    layer = source.layers[name]
    squares = _by_channel(layer, source.inputs[name]).square().mean(1)
    axes = list(layer.axes)
    if layer.convolution_groups > 1:
        # In a grouped convolution each group of outputs reads other inputs; the first axis runs over these groups.
        squares = squares.view(layer.convolution_groups, -1)
        groups = squares.repeat_interleave(layer.axes["out"], 0) if axes[0] == "out" else squares.view(-1, 1)
        return groups.reshape(groups.shape + (1,) * (len(axes) - 2))
    return squares.view([-1 if axis == "in" else 1 for axis in axes])


@quantities.register
@taken("loss")
def hessian_grad(source: QuantitySource, name: str) -> Tensor:
    """H g, the Hessian of the loss times its gradient, both over the weights of all selected layers."""
    return source.once(_hessian_gradients)[name]


@quantities.register
@taken("score")
def flow(source: QuantitySource, name: str) -> Tensor:
    """dR/d|w|, where R is the sum of the outputs for an input of ones, with |w| for each weight w. It needs no data.

    Computed in float64, because over many layers R leaves the range of float32. Tanaka et al., 2020 (arXiv:2006.05467).
    """
    return source.once(_synaptic_flow)[name]


@quantities.register
@taken("passes")
def inverse_curvature(source: QuantitySource, name: str) -> Tensor:
    """[C^-1]_ii, the diagonal of the inverse of the criterion's curvature C: by default that of a layer's inputs.

    1 / (2 [C^-1]_ii) is the least error of pruning a weight per square of it, if the other weights of its row adapt.
    """
    return source.once(_inverse_diagonals)[name]


def _inverse_diagonals(source: QuantitySource) -> dict[str, Tensor]:
    """The diagonals of the inverse curvatures of all layers."""
    diagonals = {}
    for name, curvature in source.curvatures():
        diagonals[name] = curvature.inverse_diagonal()
        del curvature  # before the next one is made
    for name, layer in source.layers.items():
        if name not in diagonals:
            raise UnsuitableLayerError(
                f"inverse_curvature: no batch shows what {printable(name)} is multiplied with, as in {layer.kind} or "
                "in a module that is not called; leave it out with exclude=, or choose a criterion without it"
            )
    return diagonals


def _gradient(layer: NamedWeight) -> Tensor:
    """The gradient of a weight, dense and whole."""
    gradient = layer.parameter.grad
    if gradient is None:
        raise ValueError(
            f"no gradient has reached {printable(layer.name)}, which is frozen; leave it out with exclude="
        )
    return widened(whole(gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()))


def _by_channel(layer: NamedWeight, value: Tensor) -> Tensor:
    """Reshape the input of a layer to (channels, everything else)."""
    if "expert" in layer.axes:
        raise UnsuitableLayerError(
            f"activation: every expert of {printable(layer.name)} has inputs of its own, which are not seen; leave the "
            f"experts out with exclude=, such as the class {layer.kind}, or choose a criterion without activations, "
            "such as large_final with context 'per_output'"
        )
    channels = layer.axes["in"] * layer.convolution_groups
    # Channels are the second axis in a convolution (the first without a batch), and the last axis in other layers.
    axis = -1 if not isinstance(layer.module, CONVOLUTIONS) else 1 if value.dim() == len(layer.axes) else 0
    value = value.abs() if value.is_complex() else value
    if layer.attribute != "weight" or not value.is_floating_point() or value.shape[axis] != channels:
        raise UnsuitableLayerError(
            f"activation: {printable(layer.name)} is not multiplied with the input of {layer.kind}, of shape "
            f"{tuple(value.shape)}; leave it out with exclude="
        )
    return widened(value.detach()).movedim(axis, 0).reshape(channels, -1)


@torch.enable_grad()
def _hessian_gradients(source: QuantitySource) -> dict[str, Tensor]:
    """H g of all layers: the gradient of g * stop_gradient(g)."""
    parameters = {name: layer.parameter for name, layer in source.layers.items()}
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if frozen:
        raise UnsuitableLayerError(
            f"no gradient reaches {printable(frozen[0])}, which is frozen; leave it out with exclude="
        )
    gradients = torch.autograd.grad(source.loss, list(parameters.values()), create_graph=True, allow_unused=True)
    source.skipped = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None}
    gradients = tuple(gradient for gradient in gradients if gradient is not None)
    if not gradients:
        return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    squares = torch.stack([(gradient * gradient.detach()).sum() for gradient in gradients]).sum()
    if not squares.requires_grad:  # the loss is linear in all weights
        return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    products = torch.autograd.grad(squares, list(parameters.values()), retain_graph=True, allow_unused=True)
    # None: no gradient depends on this weight, as where the loss is linear in it.
    return {
        name: torch.zeros_like(parameter) if product is None else widened(product.detach())
        for (name, parameter), product in zip(parameters.items(), products, strict=True)
    }


@torch.inference_mode(False)
def _synaptic_flow(source: QuantitySource) -> dict[str, Tensor]:
    """dR/d|w| of all layers."""
    if source.example_input is None:
        raise ValueError("synflow needs the shape of an input: give the Sparsifier a batch, example_input=")
    model = source.model
    values = {
        value: _magnitudes(computable(value.detach())).double()
        for value in (*model.parameters(), *model.buffers())
        if value.is_floating_point()
    }
    parameters = {name: values[layer.parameter].requires_grad_() for name, layer in source.layers.items()}
    with in_modes(torch.enable_grad()):
        inputs = tree_map(_ones, with_autograd(first_example(source.example_input)))
        # A copy, because the model can be in use by other threads, and this can be interrupted.
        shell = shell_of(model, values)
        try:
            output = run(shell, inputs)
        except Exception as error:
            raise ValueError(
                f"synflow: the model fails on ones in float64 in the shape of example_input ({message_of(error)}); "
                "pass an example_input= that fits, a tuple for several inputs or one list, a dictionary for named "
                "ones, and cast nothing to another type in forward"
            ) from error
        total = torch.stack([each.sum() for each in tensors_in(output) if each.requires_grad]).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    if unused:
        raise ValueError(f"synflow: the output does not depend on {printable(unused[0])}; leave it out with exclude=")
    return dict(zip(parameters, gradients, strict=True))


def _magnitudes(value: Tensor) -> Tensor:
    # An attention mask holds -inf, which must stay so.
    return torch.where(value.isinf(), value, value.abs())


def _ones(value: Any) -> Any:
    """Ones for floats; tokens and other integers are kept."""
    return torch.ones_like(value, dtype=torch.float64) if is_float(value) else value
