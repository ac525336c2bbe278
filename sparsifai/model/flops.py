"""FLOPs of the products with the weights of a model, counted by running it once on an example.

torch's own counter gives none for recurrent layers and for attention in evaluation mode, and cannot tell which of the
weights of attention they are of; here they go by the weight.
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
from .running import evaluating, run, untraced

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


_LOOK_UPS = (nn.Embedding, nn.EmbeddingBag)


_OF_ATTENTION = {"q_proj_weight": ("query",), "k_proj_weight": ("key",), "v_proj_weight": ("value",)}


def count_flops(model: nn.Module, targets: Mapping[str, NamedWeight], example: Any) -> dict[str, int]:
    """2 x multiply-adds with each weight: 2 x weights x places that the weight is applied at, padding among them.

    Places are the output positions of a convolution, the input positions of a transposed one and of all other layers;
    a look-up has none. Products of activations with each other, as in attention, are of no weight. A weight whose layer
    is not called in the forward, or whose use of its input is not known, has no entry.
    The model runs in evaluation mode; modes, buffers, gradients and random generators are afterwards as before.
    ValueError if it does not run.
    """
    counted: dict[str, int] = {}

    def hook(target: NamedWeight) -> Callable:
        def count(module: nn.Module, inputs: tuple, named: dict[str, Any], output: Any) -> None:
            products = _multiply_adds(target, module, inputs, named, output)
            if products is not None:
                counted[target.name] = counted.get(target.name, 0) + 2 * products

        return count

    hooks = [
        (_caller(model, name, owner), hook(target)) for target in targets.values() for name, owner in target.owners
    ]
    with hooked(hooks), untraced(model), evaluating(model), torch.no_grad():
        try:
            run(model, example)
        except Exception as error:
            raise ValueError(
                f"the model does not run on example_input ({error}); give a batch of inputs on the device of the "
                "model, a tuple for several positional ones, a dictionary for named ones"
            ) from error
    return counted


def _caller(model: nn.Module, name: str, owner: nn.Module) -> nn.Module:
    """The module that is called when a weight is used: attention reads the weight of its projection out itself."""
    if isinstance(owner, NonDynamicallyQuantizableLinear):
        outer = model.get_submodule(name.rpartition(".")[0])
        return outer if isinstance(outer, nn.MultiheadAttention) else owner
    return owner


def _multiply_adds(target: NamedWeight, module: nn.Module, inputs: tuple, named: Mapping[str, Any], output: Any) -> Any:
    """Of one call of a module, None if they are not known."""
    weights = target.parameter.numel()
    if isinstance(module, _LOOK_UPS):
        return 0
    if isinstance(module, nn.MultiheadAttention):
        given = {**dict(zip(("query", "key", "value"), inputs, strict=False)), **named}
        three = target.attribute == "in_proj_weight"
        read = ("query", "key", "value") if three else _OF_ATTENTION.get(target.attribute, ("query",))
        return weights // len(read) * sum(_places(given[each]) for each in read)
    value = inputs[0] if inputs else next(iter(named.values()), None)
    value = value.data if isinstance(value, PackedSequence) else value
    if not isinstance(value, Tensor) or not value.numel():
        return None
    if isinstance(module, _TRANSPOSED):
        return weights * (value.numel() // module.in_channels)
    if isinstance(module, CONVOLUTIONS):
        return weights * (output.numel() // module.out_channels)
    # Weights of recurrent layers have more in their names; tied to a look-up, a Linear has the axes of that.
    known = isinstance(module, nn.Linear) or target.attribute.startswith("weight_")
    return weights * _places(value) if known or value.shape[-1] == target.axes.get("in") else None


def _places(value: Tensor) -> int:
    return value.numel() // value.shape[-1]
