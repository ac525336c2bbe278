"""Which channels of a model do not depend on its input, and what their values are.

NaN is sent through the model in place of the input: what it reaches depends on the input, what it does not reach is
constant. A layer passes it on from the inputs that it reads by a weight that is not zero, so a filter of zeros stops
it; in all else it spreads as IEEE arithmetic has it, and where that would drop it, as comparisons do, it is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..hooks import hooked
from ..layers import CONVOLUTIONS
from ..parallel import kind_of
from ..running import run
from ..tensors import is_float, tensors_in

_NAN = float("nan")


_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


_LAYERS = (nn.Linear, *CONVOLUTIONS, _BATCH_NORMS)


# (name of a layer, layer, its input or output) -> what is to be in its place.
_Change = Callable[[str, nn.Module, Tensor], Tensor]


_PRODUCTS = {"mul", "mul_", "__mul__", "__imul__", "__rmul__", "multiply", "multiply_"}


@torch.no_grad()
def constant_inputs(model: nn.Module, example_input: Any, *others: Any) -> dict[str, Tensor]:
    """Layer -> a vector with, for each of its inputs, the value that it always has, NaN if there is none.

    model: in evaluation mode; a layer that is not called has no entry. A value is taken for one only if it is also
    found in forwards of the example and of `others`, which are inputs of other sizes. ValueError if NaN does not run
    through the model.
    """
    found = [_inputs_of_layers(model, each) for each in (example_input, *others)]
    spread = _Spread()
    try:
        with spread:
            always = _inputs_of_layers(model, spread.start(example_input), spread)
    except Exception as error:
        raise ValueError(
            f"what in {kind_of(model)} does not depend on the input cannot be told: with NaN for the input it raises "
            f"{type(error).__name__}: {error}; it decides something by values of its input"
        ) from error
    for values in found:
        for name in always.keys() & values.keys():
            always[name] = torch.where(_equal(always[name], values[name]), always[name], _NAN)
    return {name: value for name, value in always.items() if name in found[0]}


def _equal(value: Tensor, other: Tensor) -> Tensor:
    """Whether numbers are equal but for the rounding of functions that are computed in several ways."""
    return (value - other).abs() <= 1e-6 * value.abs()


def _inputs_of_layers(model: nn.Module, example_input: Any, spread: _Spread | None = None) -> dict[str, Tensor]:
    """For each input of each layer the one value that it has at all places, else NaN."""
    found: dict[str, Tensor] = {}

    def enter(name: str, module: nn.Module, given: Tensor) -> Tensor:
        with _paused(spread):
            values = given.movedim(channel_axis(module, given), 0).flatten(1)
            value = torch.where(_equal(values, values[:, :1]).all(1), values[:, 0], _NAN)
            found[name] = torch.where(_equal(found[name], value), value, _NAN) if name in found else value
            if spread is None:
                return given
            # What differs from place to place counts as reached: pooled, it would be a constant of the input's size.
            return spread.enter(module, given, value.isnan() | (not pads_alike(module)) & (value != 0))

    def leave(name: str, module: nn.Module, output: Tensor) -> Tensor:
        return output if spread is None else spread.leave(module, output)

    with _hooked(model, enter, leave):
        run(model, example_input)
    return found


@torch.no_grad()
def escapes(
    model: nn.Module, example_input: Any, outputs: Mapping[str, set[int]], inputs: Mapping[str, set[int]]
) -> bool:
    """Whether outputs of layers reach the output of the model otherwise than by these inputs of layers.

    As they do where something is computed across channels, such as a mean, which is another without them. They are made
    NaN, and the inputs are not read.
    """
    spread = _Spread()

    def enter(name: str, module: nn.Module, given: Tensor) -> Tensor:
        with _paused(spread):
            reached = given.isnan().movedim(channel_axis(module, given), 0).flatten(1).any(1)
            reached[list(inputs.get(name, ()))] = False
            return spread.enter(module, given, reached)

    def leave(name: str, module: nn.Module, output: Tensor) -> Tensor:
        output = spread.leave(module, output)
        with _paused(spread):
            places = torch.tensor(sorted(outputs.get(name, ())), dtype=torch.long, device=output.device)
            return output.index_fill(channel_axis(module, output), places, _NAN)

    with _hooked(model, enter, leave), spread:
        output = run(model, example_input)
    return any(bool(value.isnan().any()) for value in tensors_in(output) if value.is_floating_point())


def _hooked(model: nn.Module, enter: _Change, leave: _Change) -> AbstractContextManager[None]:
    """Have `enter` change what layers are given meanwhile, and `leave` what they put out."""

    def before(name: str) -> Callable:
        def hook(module: nn.Module, positional: tuple, named: dict[str, Any]) -> Any:
            given = positional[0] if positional else named["input"]
            others = {key: each for key, each in named.items() if key != "input"}
            return (enter(name, module, given), *positional[1:]), others

        return hook

    def after(name: str) -> Callable:
        return lambda module, positional, named, output: leave(name, module, output)

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, _LAYERS)]
    return hooked(
        after=[(module, after(name)) for name, module in layers],
        before=[(module, before(name)) for name, module in layers],
    )


def channel_axis(module: nn.Module, value: Tensor) -> int:
    """The axis of a layer's input or output along which its channels stand."""
    if isinstance(module, nn.Linear):
        return value.dim() - 1
    if isinstance(module, CONVOLUTIONS):
        return value.dim() - len(module.kernel_size) - 1
    return min(1, value.dim() - 1)


def pads_alike(module: Any) -> bool:
    """Whether a constant input adds the same to the output at every place, its edges among them."""
    if not isinstance(module, CONVOLUTIONS):
        return True
    kernels = any(size > 1 for size in module.kernel_size)
    padded = kernels if module.padding == "same" else module.padding != "valid" and any(module.padding)
    return not module.transposed and not (padded and module.padding_mode == "zeros")


def reading(module: Any) -> Tensor:
    """Bool (groups, outputs / groups, inputs / groups): which inputs a layer reads by a weight that is not zero."""
    groups, weight = getattr(module, "groups", 1), module.weight.detach() != 0
    if getattr(module, "transposed", False):
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    else:
        weight = weight.unflatten(0, (groups, -1))
    return weight.flatten(3).any(3) if weight.dim() > 3 else weight


class _Spread(TorchFunctionMode):
    """Spreads NaN from the input over all that depends on it."""

    def __init__(self) -> None:
        self.paused = 0
        self.reached: dict[nn.Module, Tensor] = {}  # inputs of a layer that depend on the input of the model

    def start(self, example_input: Any) -> Any:
        """The example with NaN for its floats."""
        with _paused(self):
            return tree_map(lambda value: torch.full_like(value, _NAN) if is_float(value) else value, example_input)

    def enter(self, module: nn.Module, given: Tensor, reached: Tensor) -> Tensor:
        """Note which inputs of a layer NaN has reached; what is given to it, with zeros in the place of NaN."""
        self.reached[module] = reached
        return torch.where(given.isnan(), 0.0, given)

    def leave(self, module: nn.Module, output: Tensor) -> Tensor:
        """Put NaN into the outputs that read an input that it has reached."""
        with _paused(self):
            reached = self.reached[module]
            if not isinstance(module, _BATCH_NORMS):
                reads = reading(module)
                reached = (reads & reached.reshape(len(reads), 1, -1)).any(2).flatten()
            elif module.weight is not None:
                reached = reached & (module.weight != 0)
            shape = [1] * output.dim()
            shape[channel_axis(module, output)] = -1
            return output.masked_fill(reached.reshape(shape), _NAN)

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if self.paused:
            return function(*args, **kwargs)
        with _paused(self):
            in_place = name.startswith("__i") or name.endswith("_")
            given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            given = [each.clone() for each in given] if in_place else given
            made = function(*args, **kwargs)
            if args and (name == "__setitem__" or made is args[0]):
                if is_float(args[0]):
                    args[0].copy_(self._put_back(args[0], given, name))
                return made
            return tree_map(lambda each: self._put_back(each, given, name) if is_float(each) else each, made)

    def _put_back(self, made: Tensor, given: list[Tensor], name: str) -> Tensor:
        """Put NaN where an operation has dropped it, take it from where zeros annihilate it."""
        if any(not value.is_floating_point() for value in given):
            return torch.full_like(made, _NAN)  # comparisons, places and the like can be of the input
        if name in _PRODUCTS:
            for value in given:
                made = torch.where(value == 0, 0.0, made)
            return made
        for value in given:
            if value.shape == made.shape and value.isnan().any():
                made = torch.where(value.isnan(), _NAN, made)
        return made


@contextmanager
def _paused(spread: _Spread | None) -> Iterator[None]:
    """Have the functions that are called meanwhile compute what they compute."""
    if spread is None:
        yield
        return
    spread.paused += 1
    try:
        yield
    finally:
        spread.paused -= 1
