"""PixelShuffle in torch-pruning's graph, which does not know that it makes one channel of several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..hooks import hooked
from ..running import run


@dataclass
class PixelShuffles:
    """The pruner that the graph asks about PixelShuffle, which turns r x r channels into one.

    Args:
        channels: Layer -> number of channels of its output.
    """

    channels: Mapping[nn.Module, int]

    def prune_out_channels(self, module: nn.Module, indices: list[int]) -> nn.Module:
        """Nothing to do: the layer has no parameters."""
        return module

    prune_in_channels = prune_out_channels

    def get_out_channels(self, module: nn.Module) -> int:
        """Number of channels of the output."""
        return self.channels[module]

    def get_in_channels(self, module: nn.PixelShuffle) -> int:
        """Number of channels of the input, by which the graph numbers its indices."""
        return self.channels[module] * module.upscale_factor**2


def channels_of_shuffles(model: nn.Module, example_input: Any) -> dict[nn.Module, int]:
    """Count the channels of the output of each PixelShuffle: layer -> number."""
    channels: dict[nn.Module, int] = {}

    def count(module: nn.Module, inputs: Any, named: Any, output: Tensor) -> None:
        channels[module] = output.shape[-3]

    shuffles = [module for module in model.modules() if isinstance(module, nn.PixelShuffle)]
    if shuffles:
        with hooked([(module, count) for module in shuffles]):
            run(model, example_input)
    return channels


def map_pixel_shuffles(graph: Any) -> None:
    """Have the graph map the r x r channels that a PixelShuffle reads to the one that it makes of them, and back."""
    for module, node in graph.module2node.items():
        if isinstance(module, nn.PixelShuffle):
            size = module.upscale_factor**2
            for dependency in node.dependencies:
                if dependency.target in node.outputs:
                    dependency.index_mapping[0] = partial(_merged, size)
            for behind in node.outputs:
                for dependency in behind.dependencies:
                    if dependency.target is node:
                        # Appended, as on the way back it comes after the offset in a concatenation.
                        dependency.index_mapping.append(partial(_spread, size))


def _merged(size: int, indices: list) -> list:
    """Of the graph's indices of channels, those of the channels that `size` each become."""
    return list({index._replace(idx=index.idx // size) for index in indices})


def _spread(size: int, indices: list) -> list:
    """Of the graph's indices of channels, those of the `size` channels that each is made of."""
    return [index._replace(idx=part) for index in indices for part in range(index.idx * size, (index.idx + 1) * size)]
