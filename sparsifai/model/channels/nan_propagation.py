"""NaN sent through a model, to see which values depend on its input.

The input is replaced by NaN. A value that becomes NaN depends on the input, a value that stays a number does not.

- A layer passes NaN on only through weights that are not zero, so a filter of zeros stops it.
- All other operations pass it on as IEEE arithmetic does. Where they would drop it, as comparisons do, it is put back.
- Integers and bools cannot be NaN. Those that are computed from a NaN, or from such integers, are remembered.

Tensors keep the strides that the model gives them, since some views need these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..hooks import hooked
from ..layers import CONVOLUTIONS
from ..running import without_fast_path
from ..tensors import is_float, tensors_in
from .connections import channel_axis, nonzero_connections

NAN = float("nan")


_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


# The layers that NaN goes through by their weights.
_LAYERS = (nn.Linear, *CONVOLUTIONS, _BATCH_NORMS)


# Functions of the shape of a tensor alone.
_OF_SHAPES = {
    *(f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")),
    *(f"new_{kind}" for kind in ("zeros", "ones", "full", "empty", "tensor")),
}


# Methods that take the shape or the type of a second tensor, not its values.
_LIKE_ANOTHER = {"expand_as", "view_as", "reshape_as", "type_as", "to"}


# Functions that only move numbers, so that they drop no NaN.
_MOVES = {
    *("__getitem__", "index_select", "gather", "take_along_dim", "flip", "fliplr", "flipud", "roll", "rot90"),
    *("channel_shuffle", "permute", "transpose", "contiguous", "clone"),
}


_CANNOT_INDEX = (torch.bool, torch.complex64, torch.complex128)


_PRODUCTS = {"mul", "mul_", "__mul__", "__imul__", "__rmul__", "multiply", "multiply_"}


# (name of a layer, layer, its input or output) -> the tensor that replaces the input or output.
Replace = Callable[[str, nn.Module, Tensor], Tensor]


def with_nan(example_input: Any) -> Any:
    """An example input with NaN in place of all floats."""
    return tree_map(lambda value: torch.full_like(value, NAN) if is_float(value) else value, example_input)


@contextmanager
def replaced_at_layers(model: nn.Module, replace_input: Replace, replace_output: Replace) -> Iterator[None]:
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
    with (
        without_fast_path(),
        hooked(
            after=[(layer, after(name)) for name, layer in layers],
            before=[(layer, before(name)) for name, layer in layers],
        ),
    ):
        yield


class NanPropagation(TorchFunctionMode):
    """Pass NaN on to all that depends on it: a mode of torch, active inside a `with` block.

    Operations outside of layers are handled by the mode. Layers are handled by `enter_layer` and `leave_layer`, which
    hooks on the model call.
    """

    def __init__(self, example_input: Any = None):
        """The integers and bools of an example input count as depending on it; its floats are to be NaN."""
        self._pauses = 0
        self._nan_inputs: dict[nn.Module, Tensor] = {}
        self._dependent: dict[int, Tensor] = {}  # address of the memory of a tensor -> the tensor, to keep it alive
        for value in tensors_in(example_input):
            if not is_float(value):
                self._note_dependent(value)

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
        return _filled(given, given.isnan(), 0.0)

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
            return _filled(output, is_nan.reshape(shape), NAN)

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if self._pauses:
            return function(*args, **kwargs)
        with self.paused():
            in_place = name.startswith("__i") or name == "__setitem__" or name.endswith("_") and name[:2] != "__"
            read = args[:1] if name in _LIKE_ANOTHER else (args, kwargs)
            given = [value for value in tree_leaves(read) if isinstance(value, Tensor)]
            is_dependent = any(self._is_dependent(value) for value in given)
            given = [value.clone() for value in given] if in_place else given
            result = function(*args, **kwargs)
            if name in _OF_SHAPES:
                return result
            if args and (name == "__setitem__" or result is args[0]):
                written = self._with_nan_of(given, is_dependent, args[0], name)
                if written is not args[0]:
                    args[0].copy_(written)
                return result
            return tree_map(lambda value: self._with_nan_of(given, is_dependent, value, name), result)

    def _with_nan_of(self, given: list[Tensor], is_dependent: bool, result: Any, name: str) -> Any:
        """The result of an operation, with NaN where the operation dropped it, or without NaN where it multiplied by 0.

        Args:
            given: The tensors that the operation has read.
            is_dependent: Whether integers or bools among them depend on the input.
            result: A result of the operation.
            name: Name of the operation.
        """
        if not isinstance(result, Tensor):
            return result
        if not is_float(result):
            for value in given:
                # A cast of NaN to an integer gives a number that is no index.
                if is_float(value) and value.shape == result.shape and result.dtype not in _CANNOT_INDEX:
                    result = _filled(result, value.isnan(), 0)
            if is_dependent or any(bool(value.isnan().any()) for value in given if is_float(value)):
                self._note_dependent(result)
            return result
        if is_dependent:
            return _filled(result, torch.ones_like(result, dtype=torch.bool), NAN)
        if name in _PRODUCTS:
            for value in given:
                result = _filled(result, value == 0, 0.0)
            return result
        for value in given if name not in _MOVES else ():
            # A view has the NaN of its base, at other positions.
            if value.shape == result.shape and is_float(value) and _address(value) != _address(result):
                result = _filled(result, value.isnan(), NAN)
        return result

    def _is_dependent(self, value: Tensor) -> bool:
        return _address(value) in self._dependent

    def _note_dependent(self, value: Tensor) -> None:
        if value.numel():
            self._dependent[_address(value)] = value


def _address(value: Tensor) -> int:
    """Address of the memory of a tensor, which its views share."""
    return value.untyped_storage().data_ptr()


def _filled(value: Tensor, positions: Tensor, number: float) -> Tensor:
    """A tensor with a number at some positions, and with its own strides; the tensor itself if there are none."""
    return value.clone().masked_fill_(positions, number) if positions.any() else value
