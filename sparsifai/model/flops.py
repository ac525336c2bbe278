"""FLOPs of the products with each weight of a model, counted by running the model once on an example.

torch's own counter finds none in recurrent layers and in attention in evaluation mode. Here every weight has its own
count: of the calls of its layer, or of the products of torch that read its memory, as where a model calls
`torch.nn.functional.linear` with the weight of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from ..support.printable import message_of
from .hooks import hooked
from .layers import CONVOLUTIONS, NamedWeight
from .running import evaluating, in_modes, run, untraced, without_fast_path

# torch keeps a flag for the whole process while a TorchDispatchMode is active. Threads that take turns restore it.
_ONE_AT_A_TIME = RLock()


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


_ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


_LOOK_UPS = (nn.Embedding, nn.EmbeddingBag)


# Weight of nn.MultiheadAttention -> the inputs that it multiplies.
_INPUTS_OF_ATTENTION = {
    "in_proj_weight": ("query", "key", "value"),
    "q_proj_weight": ("query",),
    "k_proj_weight": ("key",),
    "v_proj_weight": ("value",),
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of a model.

    Attributes:
        of_weights: Name of a weight -> FLOPs of the products with it.
        others: FLOPs of products with none of these weights, such as those of two activations in attention.
    """

    of_weights: dict[str, int]
    others: int


def count_flops(model: nn.Module, targets: Mapping[str, NamedWeight], example: Any) -> dict[str, int]:
    """Count the FLOPs of each weight; see `all_flops`.

    Args:
        model: The model.
        targets: The weights by name, from `find_weights`.
        example: A batch of inputs.

    Returns:
        Name of a weight -> FLOPs for the whole batch.
    """
    return all_flops(model, targets, example).of_weights


def all_flops(model: nn.Module, targets: Mapping[str, NamedWeight], example: Any) -> Flops:
    """Count the FLOPs of each weight, and of all other products.

    Those of a weight are 2 x multiply-adds = 2 x (number of weights) x (positions that it is applied at). The positions
    are the output positions of a convolution, counting padding, and the input positions of a transposed convolution and
    of all other layers. An embedding has none. Products of two activations, as in attention, belong to no weight. The
    model runs in evaluation mode; its modes, buffers, gradients and the random generators are restored.

    Args:
        model: The model.
        targets: The weights by name, from `find_weights`.
        example: A batch of inputs on the device of the model: one input, a tuple of positional inputs, or a dictionary
            of named ones.

    Returns:
        The FLOPs for the whole batch. There is no entry for a weight that no product of torch reads, and whose layer
        is not called or of a kind that is not known to use it as a matrix.

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
    products = _Products(targets)
    modes = in_modes(torch.no_grad(), products)
    try:
        with _ONE_AT_A_TIME, untraced(model), hooked(hooks), evaluating(model), without_fast_path(), modes:
            run(model, example)
    except Exception as error:
        raise ValueError(
            f"the model does not run on example_input ({message_of(error)}); pass a batch of inputs on the device of "
            "the model: a tuple for several positional inputs, a dictionary for named ones"
        ) from error
    # A layer whose products torch's formulas do not know is counted by its calls; one whose weight is read by functions
    # too, by its products.
    for name, flops in products.of_weights.items():
        counted[name] = max(flops, counted.get(name, 0))
    return Flops({name: counted[name] for name in targets if name in counted}, products.others)


class _Products(TorchDispatchMode):
    """Counts the FLOPs of torch's products inside a `with` block, by the formulas of torch's own counter.

    A product belongs to the weight whose memory one of its factors shares; views and transposed weights do.
    """

    def __init__(self, targets: Mapping[str, NamedWeight]):
        from torch.utils.flop_counter import flop_registry  # it imports Triton where that is installed

        super().__init__()
        self._formulas = flop_registry
        self.of_weights: dict[str, int] = {}
        self.others = 0
        # The address of the storage itself: on the meta device there is no memory.
        self._names = {_storage_of(weight.parameter): name for name, weight in targets.items()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        operation = getattr(function, "_overloadpacket", None)
        formula = _flops_of_attention if operation is _ATTENTION_ON_CPU else self._formulas.get(operation)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=result)
            # The first argument of addmm and baddbmm is a bias, which has the shape of no factor.
            factors = [value for value in args if isinstance(value, Tensor)]
            name = next((self._names[key] for key in map(_storage_of, factors) if key in self._names), None)
            if name is None:
                self.others += flops
            else:
                self.of_weights[name] = self.of_weights.get(name, 0) + flops
        return result


def _flops_of_attention(query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> int:
    """Queries with keys, and the result with values: torch's counter has no formula for attention on the CPU."""
    return 2 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else 0


def _called_layer(model: nn.Module, name: str, owner: nn.Module) -> nn.Module:
    """The module whose forward uses a weight: for the output projection of attention, the attention itself."""
    if isinstance(owner, NonDynamicallyQuantizableLinear):
        outer = model.get_submodule(name.rpartition(".")[0])
        return outer if isinstance(outer, nn.MultiheadAttention) else owner
    return owner


def _multiply_adds(weight: NamedWeight, layer: nn.Module, inputs: tuple, named: Mapping[str, Any], output: Any) -> Any:
    """Multiply-adds with a weight in one call of its layer, None if they are not known."""
    size = weight.parameter.numel()
    if "expert" in weight.axes:
        return None  # which tokens an expert gets is not known from the inputs
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
