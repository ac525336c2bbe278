"""Taking dead channels out of a model: what is left is dense, smaller, and computes the same.

A channel can go if every layer that reads it can do without: it reads it by zeros alone, or the channel is constant,
so that what it adds can be folded into the layer's bias. Which places are the same channel coupling.py knows, which are
constant constant.py. Removing some makes others dead, so it is done until nothing is left to remove.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..layers import CHANNEL_LAYERS, is_depthwise, outputs_of
from ..parallel import unwrapped
from ..running import check_runs, copy_of, run, untraced
from ..tensors import is_float, tensors_in
from .constants import constant_inputs, escapes, pads_alike, reading
from .coupling import ChannelSet, Place, find_channels
from .cutting import cut, places_of
from .dependency_graph import LOST

TOLERANCE = 1e-5  # of outputs, relative to the largest of them


def alike(output: Tensor, expected: Tensor) -> bool:
    """Whether an output is as expected, but for rounding; infinities and NaN at the same places."""
    if output.shape != expected.shape or not expected.is_floating_point():
        return torch.equal(output, expected)
    finite = expected[expected.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    return torch.allclose(output, expected, rtol=0, atol=TOLERANCE * largest, equal_nan=True)


def random_like(value: Any) -> Any:
    """Random numbers with the mean and the deviation of a tensor of floats; all else as it is."""
    if not is_float(value):
        return value
    spread = value.std() if value.numel() > 1 else value.abs().max()
    return torch.randn_like(value) * spread.clamp(min=1e-3) + value.mean()


def other_size(model: nn.Module, example_input: Any) -> list[Any]:
    """One example of another batch size, as long again in a further axis, of other values: as much as the model takes.

    What depends on the size of the input, or on the sign of its values, is another with it.
    """
    for axes in ((0, -1), (0, 1), (-1,), (1,), (0,)):
        other = tree_map(partial(_resized, axes=axes), example_input)
        try:
            with untraced(model), torch.no_grad():
                run(model, other)
        except Exception:  # it has a fixed size
            continue
        return [other]
    return []


def _resized(value: Any, axes: tuple[int, ...]) -> Any:
    if not isinstance(value, Tensor) or not value.dim():
        return value
    if 0 in axes:
        value = value[:1] if len(value) > 1 else torch.cat([value, value])
    if not value.is_floating_point():
        return value
    for axis in filter(None, axes if value.dim() > 2 else ()):
        value = torch.cat([value, value], axis)
    return -2 * value


def in_float32(value: Any) -> Any:
    """A tensor of floats in float32; all else as it is."""
    return value.float() if is_float(value) else value


def why_stuck(model: nn.Module, example_input: Any, channels: Iterable[ChannelSet]) -> dict[ChannelSet, str]:
    """Which channels `shrink` could not remove if all that yields them were zero, and why. It is tried on a copy."""
    channels, trial = list(channels), copy_of(unwrapped(model))
    with torch.no_grad():
        for name, place in dict.fromkeys(place for each in channels for place in (*each.outputs, *each.through)):
            module: Any = trial.get_submodule(name)
            if isinstance(getattr(module, "weight", None), Tensor):
                out = 1 if getattr(module, "transposed", False) and not is_depthwise(module) else 0
                module.weight.select(out, place).zero_()
            if isinstance(getattr(module, "bias", None), Tensor):
                module.bias[place] = 0
    kept = Removal(trial, example_input).done().kept
    return {each: kept[each.outputs[0]] for each in channels if each.outputs[0] in kept}


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, by name."""
    return [*model.named_parameters(), *model.named_buffers()]


@dataclass
class Removal:
    """The model as it gets smaller, and the outputs that it has to have.

    numbers: layer -> the numbers that its outputs had in the model as it was given. kept: of outputs that stay, by
    those numbers, the reason. refused: removing them has changed the outputs.
    """

    model: nn.Module
    example_input: Any
    numbers: dict[str, list[int]] = field(init=False)
    kept: dict[Place, str] = field(default_factory=dict)
    refused: set[Place] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.model = copy_of(self.model).eval()
        halves = [value for _, value in named_tensors(self.model) if value.dtype in (torch.float16, torch.bfloat16)]
        if halves:
            # In half precision no difference could be told from rounding.
            for value in halves:
                value.data = value.data.float()
            self.example_input = tree_map(in_float32, self.example_input)
        with torch.random.fork_rng():
            others = other_size(self.model, self.example_input)
            self.inputs = [self.example_input, tree_map(random_like, self.example_input), *others]
            self.outputs = self._outputs(self.model)
            torch.manual_seed(0)
            steady = self._same(self.model)
        if not steady:
            raise ValueError(
                f"shrink: {type(self.model).__name__} gives two outputs for the same input in evaluation mode, so that "
                "nothing can be checked; turn off what is random in it, or what it remembers from input to input"
            )
        self.numbers = {
            name: list(range(outputs_of(module)))
            for name, module in self.model.named_modules()
            if isinstance(module, CHANNEL_LAYERS)
        }

    def done(self) -> Removal:
        """Itself, when nothing is left to remove."""
        while self.step():
            pass
        return self

    def step(self) -> bool:
        """Remove what can be removed now; whether there was anything to try."""
        channels = find_channels(self.model, self.example_input)
        with untraced(self.model):
            constants = constant_inputs(self.model, self.example_input, *self.inputs[2:])
        goes, self.kept = self._divide(channels, constants)
        parts: dict[Any, list[ChannelSet]] = {}
        for channel in goes:  # those of the same layers together
            parts.setdefault(tuple(dict.fromkeys(name for name, _ in channel.outputs)), []).append(channel)
        if mixed := self._mixed(list(parts.values())):
            self._refuse(mixed)
        elif goes:
            self._remove(list(parts.values()), constants)
        return bool(goes)

    def _mixed(self, parts: list[list[ChannelSet]]) -> list[ChannelSet]:
        """The channels that something reads besides the layers that are known to: what is computed across channels."""

        def escaping(channels: list[ChannelSet]) -> bool:
            with untraced(self.model):
                sides = places_of(channels, "outputs"), places_of(channels, "inputs")
                return escapes(self.model, self.example_input, *sides)

        every = [channel for part in parts for channel in part]
        # Where it reaches the output even of no channel, as behind whole numbers, it tells nothing.
        if not every or not escaping(every) or escaping([]):
            return []
        return [channel for part in parts if escaping(part) for channel in part]

    def _refuse(self, channels: list[ChannelSet]) -> None:
        self.refused |= {(name, self.numbers[name][place]) for each in channels for name, place in each.outputs}

    def _divide(
        self, channels: list[ChannelSet], constants: Mapping[str, Tensor]
    ) -> tuple[list[ChannelSet], dict[Place, str]]:
        """The channels that can go, and of the outputs that cannot, by their first numbers, the reason."""
        modules = dict(self.model.named_modules())
        reads = {name: reading(modules[name]).any(1).flatten().tolist() for name in self.numbers}
        values = {name: value.tolist() for name, value in constants.items()}
        alive = {name: reading(modules[name]).any(2).flatten().tolist() for name in self.numbers}

        def why_kept(channel: ChannelSet) -> str:
            if channel.kept:
                return channel.kept
            if any((name, self.numbers[name][place]) in self.refused for name, place in channel.outputs):
                return LOST
            for name, place in channel.inputs:
                value = values[name][place] if name in values else math.nan
                if not reads[name][place] or value == 0:
                    continue
                if math.isnan(value):
                    coupled = dict.fromkeys(each for each, _ in channel.outputs)
                    living = any(alive[each][number] for each, number in channel.outputs)
                    if living and len(coupled) > 1:
                        return f"coupled in {', '.join(coupled)}, not zero in all"
                    return f"not constant where {name} reads it"
                if not pads_alike(modules[name]):
                    return f"{value:.3g} where {name} pads its input with zeros"
            return ""

        reasons = [why_kept(channel) for channel in channels]
        left = Counter(
            name for channel, why in zip(channels, reasons, strict=True) if why for name, _ in channel.outputs
        )
        for number, channel in enumerate(channels):
            if not all(left[name] for name, _ in channel.outputs):
                reasons[number] = "the last output of a layer"
                left.update(name for name, _ in channel.outputs)
        kept = {
            (name, self.numbers[name][place]): why
            for channel, why in zip(channels, reasons, strict=True)
            for name, place in channel.outputs
            if why
        }
        return [channel for channel, why in zip(channels, reasons, strict=True) if not why], kept

    def _remove(self, parts: list[list[ChannelSet]], constants: Mapping[str, Tensor]) -> bool:
        """Remove all parts; if that changes the outputs, a half, and of one part alone note that it has to stay.

        Returns whether something was removed; what is left to do then has other places.
        """
        channels = [channel for part in parts for channel in part]
        smaller = copy.deepcopy(self.model)
        cut(smaller, channels, constants)
        if self._same(smaller):
            self.model = smaller
            for name, gone in places_of(channels, "outputs").items():
                self.numbers[name] = [number for place, number in enumerate(self.numbers[name]) if place not in gone]
            return True
        if len(parts) == 1:
            self._refuse(channels)
            return False
        half = len(parts) // 2
        return self._remove(parts[:half], constants) or self._remove(parts[half:], constants)

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with untraced(model), torch.no_grad():
            return [each for inputs in self.inputs for each in tensors_in(check_runs(model, inputs))]

    def _same(self, model: nn.Module) -> bool:
        """Whether a model has the outputs that the model had at first."""
        try:
            outputs = self._outputs(model)
        except Exception:  # what was cut does not fit together
            return False
        return all(map(alike, outputs, self.outputs))
