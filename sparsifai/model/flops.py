"""FLOPs of the products with each weight of a model, counted by running the model once on an example.

torch's own counter finds none in recurrent layers and in attention in evaluation mode, and it cannot tell the FLOPs of
the several weights of an attention layer apart. Here every weight has its own count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.rnn import PackedSequence

from .hooks import hooked
from .layers import CONVOLUTIONS, NamedWeight
from .running import evaluating, run, untraced, without_fast_path

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


_LOOK_UPS = (nn.Embedding, nn.EmbeddingBag)


# Weight of nn.MultiheadAttention -> the inputs that it multiplies.
_INPUTS_OF_ATTENTION = {
    "in_proj_weight": ("query", "key", "value"),
    "q_proj_weight": ("query",),
    "k_proj_weight": ("key",),
    "v_proj_weight": ("value",),
}


def count_flops(model: nn.Module, targets: Mapping[str, NamedWeight], example: Any) -> dict[str, int]:
    """Count the FLOPs of each weight: 2 x multiply-adds = 2 x (number of weights) x (positions that it is applied at).

    The positions are the output positions of a convolution, counting padding, and the input positions of a transposed
    convolution and of all other layers. An embedding has none. Products of two activations, as in attention, belong to
    no weight and are not counted. The model runs in evaluation mode; its modes, buffers, gradients and the random
    generators are restored.

    Args:
        model: The model.
        targets: The weights by name, from `find_weights`.
        example: A batch of inputs on the device of the model: one input, a tuple of positional inputs, or a dictionary
            of named ones.

    Returns:
        Name of a weight -> FLOPs for the whole batch. There is no entry for a weight whose layer is not called, or
        whose kind of layer is not known to use it as a matrix.

    Raises:
        ValueError: The model fails on the example.
    """
    counted: dict[str, int] = {}

    def counter_of(weight: NamedWeight) -> Callable:
        def count(layer: nn.Module, inputs: tuple, named: dict[str, Any], output: Any) -> None:
            multiply_adds = _multiply_adds(weight, layer, inputs, named, output)
            if multiply_adds is not None:
                counted[weight.name] = counted.get(weight.name, 0) + 2 * multiply_adds

        return count

    hooks = [
        (_called_layer(model, name, owner), counter_of(weight))
        for weight in targets.values()
        for name, owner in weight.owners
    ]
    with hooked(hooks), untraced(model), evaluating(model), without_fast_path(), torch.no_grad():
        try:
            run(model, example)
        except Exception as error:
            raise ValueError(
                f"the model does not run on example_input ({error}); pass a batch of inputs on the device of the "
                "model: a tuple for several positional inputs, a dictionary for named ones"
            ) from error
    return counted


def _called_layer(model: nn.Module, name: str, owner: nn.Module) -> nn.Module:
    """The module whose forward uses a weight: for the output projection of attention, the attention itself."""
    if isinstance(owner, NonDynamicallyQuantizableLinear):
        outer = model.get_submodule(name.rpartition(".")[0])
        return outer if isinstance(outer, nn.MultiheadAttention) else owner
    return owner


def _multiply_adds(weight: NamedWeight, layer: nn.Module, inputs: tuple, named: Mapping[str, Any], output: Any) -> Any:
    """Multiply-adds with a weight in one call of its layer, None if they are not known."""
    size = weight.parameter.numel()
    if isinstance(layer, _LOOK_UPS):
        return 0
    if isinstance(layer, nn.MultiheadAttention):
        given = {**dict(zip(("query", "key", "value"), inputs, strict=False)), **named}
        multiplied = _INPUTS_OF_ATTENTION.get(weight.attribute, ("query",))
        return size // len(multiplied) * sum(_positions(given[name]) for name in multiplied)
    value = inputs[0] if inputs else next(iter(named.values()), None)
    value = value.data if isinstance(value, PackedSequence) else value
    if not isinstance(value, Tensor) or not value.numel():
        return None
    if isinstance(layer, _TRANSPOSED):
        return size * (value.numel() // layer.in_channels)
    if isinstance(layer, CONVOLUTIONS):
        return size * (output.numel() // layer.out_channels)
    # The weights of recurrent layers are called weight_ih_l0 and so on. A Linear is recognized by its class: if it is
    # tied to an embedding, the axes of its weight are those of the embedding.
    known = isinstance(layer, nn.Linear) or weight.attribute.startswith("weight_")
    return size * _positions(value) if known or value.shape[-1] == weight.axes.get("in") else None


def _positions(value: Tensor) -> int:
    """Number of vectors in an input whose last axis holds the features."""
    return value.numel() // value.shape[-1]
