"""NaN sent through a model, to see which values depend on its input.

The input is replaced by NaN. A value that becomes NaN depends on the input, a value that stays a number does not.

- A layer passes NaN on only through weights that are not zero, so a filter of zeros stops it.
- All other operations pass it on as IEEE arithmetic does. Where they would drop it, as comparisons do, it is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..hooks import hooked
from ..layers import CONVOLUTIONS
from ..tensors import is_float
from .connections import channel_axis, nonzero_connections

NAN = float("nan")


_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


# The layers that NaN goes through by their weights.
_LAYERS = (nn.Linear, *CONVOLUTIONS, _BATCH_NORMS)


_PRODUCTS = {"mul", "mul_", "__mul__", "__imul__", "__rmul__", "multiply", "multiply_"}


# (name of a layer, layer, its input or output) -> the tensor that replaces the input or output.
Replace = Callable[[str, nn.Module, Tensor], Tensor]


def with_nan(example_input: Any) -> Any:
    """An example input with NaN in place of all floats."""
    return tree_map(lambda value: torch.full_like(value, NAN) if is_float(value) else value, example_input)


def replaced_at_layers(
    model: nn.Module, replace_input: Replace, replace_output: Replace
) -> AbstractContextManager[None]:
    """Replace the inputs and outputs of the layers of a model inside a `with` block."""

    def before(name: str) -> Callable:
        def hook(layer: nn.Module, positional: tuple, named: dict[str, Any]) -> Any:
            given = positional[0] if positional else named["input"]
            others = {key: value for key, value in named.items() if key != "input"}
            return (replace_input(name, layer, given), *positional[1:]), others

        return hook

    def after(name: str) -> Callable:
        return lambda layer, positional, named, output: replace_output(name, layer, output)

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _LAYERS)]
    return hooked(
        after=[(layer, after(name)) for name, layer in layers],
        before=[(layer, before(name)) for name, layer in layers],
    )


class NanPropagation(TorchFunctionMode):
    """Pass NaN on to all that depends on it: a mode of torch, active inside a `with` block.

    Operations outside of layers are handled by the mode. Layers are handled by `enter_layer` and `leave_layer`, which
    hooks on the model call.
    """

    def __init__(self) -> None:
        self._pauses = 0
        self._nan_inputs: dict[nn.Module, Tensor] = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Have torch compute as usual inside a `with` block."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def enter_layer(self, layer: nn.Module, given: Tensor, is_nan: Tensor) -> Tensor:
        """Remember which input channels of a layer are NaN.

        Args:
            layer: The layer that is called.
            given: Its input.
            is_nan: A bool for each input channel, which `leave_layer` reads.

        Returns:
            The input with zeros in place of NaN, so that the layer itself computes with numbers.
        """
        self._nan_inputs[layer] = is_nan
        return torch.where(given.isnan(), 0.0, given)

    def leave_layer(self, layer: nn.Module, output: Tensor) -> Tensor:
        """The output of a layer, with NaN in the channels that read a NaN input by a nonzero weight."""
        with self.paused():
            is_nan = self._nan_inputs[layer]
            if not isinstance(layer, _BATCH_NORMS):
                connections = nonzero_connections(layer)
                is_nan = (connections & is_nan.reshape(len(connections), 1, -1)).any(2).flatten()
            elif layer.weight is not None:
                is_nan = is_nan & (layer.weight != 0)
            shape = [1] * output.dim()
            shape[channel_axis(layer, output)] = -1
            return output.masked_fill(is_nan.reshape(shape), NAN)

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if self._pauses:
            return function(*args, **kwargs)
        with self.paused():
            in_place = name.startswith("__i") or name.endswith("_")
            given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            given = [value.clone() for value in given] if in_place else given
            result = function(*args, **kwargs)
            if args and (name == "__setitem__" or result is args[0]):
                if is_float(args[0]):
                    args[0].copy_(_with_nan_of(given, args[0], name))
                return result
            return tree_map(lambda value: _with_nan_of(given, value, name) if is_float(value) else value, result)


def _with_nan_of(given: list[Tensor], result: Tensor, name: str) -> Tensor:
    """The result of an operation, with NaN where the operation dropped it, and without NaN where it multiplied by 0."""
    if any(not value.is_floating_point() for value in given):
        # Comparisons, indices and the like can come from the input, and cannot be NaN themselves.
        return torch.full_like(result, NAN)
    if name in _PRODUCTS:
        for value in given:
            result = torch.where(value == 0, 0.0, result)
        return result
    for value in given:
        if value.shape == result.shape and value.isnan().any():
            result = torch.where(value.isnan(), NAN, result)
    return result
