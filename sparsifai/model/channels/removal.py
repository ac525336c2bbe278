"""Removing channels from a model: the rest is dense, smaller, and computes the same.

A channel can be removed if no layer needs it: each layer reads it by zeros only, or the channel is constant and what it
adds can be moved to the layer's bias. coupling.py finds which outputs and inputs belong to one channel, constants.py
finds which are constant. Removing some channels lets others be removed, so this is repeated until none is left.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...support.components import components
from ...support.printable import printable
from ..layers import CHANNEL_LAYERS, outputs_of
from ..norms import affine_names
from ..parallel import unwrapped
from ..running import copy_of, untraced
from .connections import keeps_constants, nonzero_connections, weights_of_output, zero_outputs
from .constants import constant_inputs, has_other_path
from .coupling import ChannelSet, LayerIndex, find_channels
from .cutting import cut, indices_of
from .equal_groups import balance, has_several_groups
from .smaller_copy import SmallerCopy

LAST_OUTPUT = "last output of a layer"


def why_stuck(model: nn.Module, example_input: Any, channels: Iterable[ChannelSet]) -> dict[ChannelSet, str]:
    """The channels that could not be removed even if all their weights were zero, and why. It is tried on a copy.

    Args:
        model: Any torch model, also in a wrapper.
        example_input: A batch, a tuple of positional inputs or a dictionary of named ones.
        channels: Channels of the model.
    """
    channels, trial = list(channels), copy_of(unwrapped(model))
    with torch.no_grad():
        for name, index in dict.fromkeys(pair for each in channels for pair in (*each.outputs, *each.through)):
            module: Any = trial.get_submodule(name)
            if isinstance(getattr(module, "weight", None), Tensor):
                weights_of_output(module, index).zero_()
            for other in {"bias", *affine_names(module)} - {"weight"}:
                if isinstance(getattr(module, other, None), Tensor):
                    getattr(module, other)[index] = 0
    removal = Removal(SmallerCopy(trial, example_input)).remove_all()
    # A channel that stays so that groups keep equal sizes is one of several zero ones; another one was removed.
    reasons = {output: why for output, why in removal.why_kept.items() if output not in removal.spared}
    return {each: reasons[each.outputs[0]] for each in channels if each.outputs[0] in reasons}


class Removal:
    """Removal of channels from a copy of a model.

    Args:
        copy: The copy, which gets smaller.
        remaining: Layer name -> the outputs of the model that the copy still has, where it lacks some. Outputs are
            numbered as in the model.

    Attributes:
        remaining: The same for all convolutions and Linear layers.
        why_kept: (layer name, output) -> why it cannot be removed.
        spared: Those of them that could be removed, if the groups of a convolution need not keep equal sizes.
    """

    def __init__(self, copy: SmallerCopy, remaining: Mapping[str, list[int]] | None = None):
        self._copy = copy
        known = remaining or {}
        self.remaining = {
            name: list(known[name]) if name in known else list(range(outputs_of(module)))
            for name, module in copy.model.named_modules()
            if isinstance(module, CHANNEL_LAYERS)
        }
        self.why_kept: dict[LayerIndex, str] = {}
        self.spared: set[LayerIndex] = set()
        self._whole: set[tuple[str, int]] = set()  # grouped convolution, and group of it that is removed as a whole
        self._needed: set[LayerIndex] = set()  # outputs whose removal changed the outputs of the model, or would

    @property
    def model(self) -> nn.Module:
        """The copy, as small as it is by now."""
        return self._copy.model

    def remove_all(self) -> Removal:
        """Remove channels until none is left that can be removed; returns itself.

        Raises:
            ImportError: torch-pruning is not installed.
            ValueError: torch-pruning cannot follow the computation of the model.
        """
        while self._step():
            pass
        return self

    def _step(self) -> bool:
        """Remove the channels that can be removed now; returns whether there were any to try."""
        channels = find_channels(self.model, self._copy.example_input)
        with untraced(self.model):
            constants = constant_inputs(self.model, self._copy.example_input, *self._copy.check.others)
        removable, self.why_kept = self._divide(channels, constants)
        parts = self._parts(removable)
        if mixed := self._mixed(parts):
            self._keep(mixed)
        elif removable:
            self._remove(parts, constants)
        return bool(removable)

    def _divide(
        self, channels: list[ChannelSet], constants: Mapping[str, Tensor]
    ) -> tuple[list[ChannelSet], dict[LayerIndex, str]]:
        """The channels that can be removed, and for each output that cannot, why."""
        reasons = self._reasons(channels, constants)
        kept = Counter(
            name for channel, why in zip(channels, reasons, strict=True) if why for name, _ in channel.outputs
        )
        for number, channel in enumerate(channels):
            if not all(kept[name] for name, _ in channel.outputs):
                reasons[number] = LAST_OUTPUT
                kept.update(name for name, _ in channel.outputs)
        free = {number for number, why in enumerate(reasons) if not why}
        self.spared = set()
        spared, self._whole = balance([each.cell for each in channels], free)
        for number in spared:
            reasons[number] = channels[number].why_spared
            self.spared.update((name, self.remaining[name][index]) for name, index in channels[number].outputs)
        why_kept = {
            (name, self.remaining[name][index]): why
            for channel, why in zip(channels, reasons, strict=True)
            for name, index in channel.outputs
            if why
        }
        return [channel for channel, why in zip(channels, reasons, strict=True) if not why], why_kept

    def _reasons(self, channels: list[ChannelSet], constants: Mapping[str, Tensor]) -> list[str]:
        """For each channel, why it cannot be removed, empty if it can; the last output of a layer is not looked for."""
        modules = dict(self.model.named_modules())
        reads = {name: nonzero_connections(modules[name]).any(1).flatten().tolist() for name in self.remaining}
        values = {name: value.tolist() for name, value in constants.items()}
        is_zero = {name: zero_outputs(modules[name]) for name in self.remaining}

        def why_kept(channel: ChannelSet) -> str:
            if channel.kept:
                return channel.kept
            if any((name, self.remaining[name][index]) in self._needed for name, index in channel.outputs):
                return "its removal would change the model's outputs"
            for name, index in channel.inputs:
                value = values[name][index] if name in values else math.nan
                if not reads[name][index] or value == 0:
                    continue
                if math.isnan(value):
                    coupled = dict.fromkeys(layer for layer, _ in channel.outputs)
                    if not all(is_zero[layer][output] for layer, output in channel.outputs):
                        if len(coupled) > 1:
                            return f"coupled in {', '.join(coupled)}, but not zero in all of them"
                        if norm := next((each for each, _ in channel.through if has_several_groups(modules[each])), ""):
                            return f"in one group of {printable(norm)} (GroupNorm) with channels that are not zero"
                    return f"not constant where {printable(name)} reads it"
                if not keeps_constants(modules[name]):
                    return f"constant {value:.3g}, but {printable(name)} pads its input with zeros"
            return ""

        return [why_kept(channel) for channel in channels]

    def _parts(self, channels: Sequence[ChannelSet]) -> list[list[ChannelSet]]:
        """Split channels into those that are removed together: of the same layers, or of the same groups."""
        keys: list[list] = [[tuple(dict.fromkeys(name for name, _ in each.outputs))] for each in channels]
        for key, channel in zip(keys, channels, strict=True):
            key += [name if (name, group) in self._whole else (name, side) for name, side, group in channel.cell]
        parts: dict[int, list[ChannelSet]] = {}
        for channel, number in zip(channels, components(keys), strict=True):
            parts.setdefault(number, []).append(channel)
        return list(parts.values())

    def _mixed(self, parts: list[list[ChannelSet]]) -> list[ChannelSet]:
        """The channels that are also read by something other than their known layers, such as a mean over channels."""

        def has_reader(channels: list[ChannelSet]) -> bool:
            with untraced(self.model):
                sides = indices_of(channels, "outputs"), indices_of(channels, "inputs")
                return has_other_path(self.model, self._copy.example_input, *sides)

        every = [channel for part in parts for channel in part]
        # Where NaN reaches the output even if no channel is NaN, as after whole numbers, the check says nothing.
        if not every or not has_reader(every) or has_reader([]):
            return []
        return [channel for part in parts if has_reader(part) for channel in part]

    def _keep(self, channels: list[ChannelSet]) -> None:
        self._needed |= {(name, self.remaining[name][index]) for each in channels for name, index in each.outputs}

    def _remove(self, parts: list[list[ChannelSet]], constants: Mapping[str, Tensor]) -> bool:
        """Remove all parts. If that changes the outputs of the model, try each half; keep a single part that does.

        Returns whether something was removed: the indices of all other channels are then out of date.
        """
        channels = [channel for part in parts for channel in part]
        if not self._copy.try_change(lambda trial: cut(trial, channels, constants)):
            for name, removed in indices_of(channels, "outputs").items():
                self.remaining[name] = [
                    output for index, output in enumerate(self.remaining[name]) if index not in removed
                ]
            return True
        if len(parts) == 1:
            self._keep(channels)
            return False
        half = len(parts) // 2
        return self._remove(parts[:half], constants) or self._remove(parts[half:], constants)
