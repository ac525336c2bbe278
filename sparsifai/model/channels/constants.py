"""Which channels of a model are constant, and which affect its output on unknown paths: both are seen by NaN."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..parallel import kind_of
from ..running import in_modes, run
from ..tensors import tensors_in
from .connections import channel_axis, keeps_constants
from .nan_propagation import NAN, NanPropagation, replaced_at_layers, with_nan


@torch.no_grad()
def constant_inputs(model: nn.Module, example_input: Any, *others: Any) -> dict[str, Tensor]:
    """The value of each input channel of each layer, where it does not depend on the input of the model.

    A value counts as constant only if forward passes of the example and of `others` give it too.

    Args:
        model: A model in evaluation mode.
        example_input: A batch, a tuple of positional inputs or a dictionary of named ones.
        *others: Inputs of other sizes.

    Returns:
        Layer name -> a vector with one value per input channel, NaN where it is not constant. Layers that are not
        called have no entry.

    Raises:
        ValueError: The model does not run with NaN as its input.
    """
    measured = [_channel_values(model, example) for example in (example_input, *others)]
    nan, of_nan = NanPropagation(example_input), with_nan(example_input)
    try:
        with in_modes(nan):
            constants = _channel_values(model, of_nan, nan)
    except Exception as error:
        raise ValueError(
            f"cannot find the constant channels of {kind_of(model)}: with NaN as its input it raises "
            f"{type(error).__name__}: {error}; models that decide something by values of their input are not supported"
        ) from error
    for values in measured:
        for name in constants.keys() & values.keys():
            constants[name] = torch.where(_equal(constants[name], values[name]), constants[name], NAN)
    return {name: value for name, value in constants.items() if name in measured[0]}


def _equal(value: Tensor, other: Tensor) -> Tensor:
    """Whether numbers are equal up to the rounding of functions that have several implementations."""
    return (value - other).abs() <= 1e-6 * value.abs()


def _channel_values(model: nn.Module, example_input: Any, nan: NanPropagation | None = None) -> dict[str, Tensor]:
    """The value that each input channel of each layer has at all positions, NaN where the positions differ."""
    found: dict[str, Tensor] = {}

    def record_input(name: str, layer: nn.Module, given: Tensor) -> Tensor:
        with nan.paused() if nan else nullcontext():
            values = given.movedim(channel_axis(layer, given), 0).flatten(1)
            first = values[:, 0] if values.numel() else torch.full((len(values),), NAN, device=values.device)
            value = torch.where(_equal(values, values[:, :1]).all(1), first, NAN)
            found[name] = torch.where(_equal(found[name], value), value, NAN) if name in found else value
            if nan is None:
                return given
            # A constant that the layer turns into values that differ at the edges counts as NaN: their mean, for
            # instance, would be a constant that depends on the size of the input.
            return nan.enter_layer(layer, given, value.isnan() | (not keeps_constants(layer)) & (value != 0))

    def mark_output(name: str, layer: nn.Module, output: Tensor) -> Tensor:
        return nan.leave_layer(layer, output) if nan else output

    with replaced_at_layers(model, record_input, mark_output):
        run(model, example_input)
    return found


@torch.no_grad()
def has_other_path(
    model: nn.Module, example_input: Any, outputs: Mapping[str, set[int]], inputs: Mapping[str, set[int]]
) -> bool:
    """Whether some outputs of layers affect the model's output on another path than through these inputs of layers.

    They do, for instance, where a mean over channels is computed: without them it is another mean.

    Args:
        model: A model in evaluation mode.
        example_input: A batch, a tuple of positional inputs or a dictionary of named ones.
        outputs: Layer name -> indices of its outputs, which are replaced by NaN.
        inputs: Layer name -> indices of its inputs, which pass no NaN on.
    """
    nan = NanPropagation()

    def mark_input(name: str, layer: nn.Module, given: Tensor) -> Tensor:
        with nan.paused():
            is_nan = given.isnan().movedim(channel_axis(layer, given), 0).flatten(1).any(1)
            is_nan[list(inputs.get(name, ()))] = False
            return nan.enter_layer(layer, given, is_nan)

    def mark_output(name: str, layer: nn.Module, output: Tensor) -> Tensor:
        output = nan.leave_layer(layer, output)
        with nan.paused():
            indices = torch.tensor(sorted(outputs.get(name, ())), dtype=torch.long, device=output.device)
            return output.index_fill(channel_axis(layer, output), indices, NAN)

    with replaced_at_layers(model, mark_input, mark_output), in_modes(nan):
        output = run(model, example_input)
    return any(bool(value.isnan().any()) for value in tensors_in(output) if value.is_floating_point())
