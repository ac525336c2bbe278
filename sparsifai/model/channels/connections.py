"""How one layer connects the channels of its input with the channels of its output."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..layers import CONVOLUTIONS


def channel_axis(layer: nn.Module, value: Tensor) -> int:
    """The axis of a layer's input or output that numbers its channels."""
    if isinstance(layer, nn.Linear):
        return value.dim() - 1
    if isinstance(layer, CONVOLUTIONS):
        return value.dim() - len(layer.kernel_size) - 1
    return min(1, value.dim() - 1)


def nonzero_connections(layer: Any) -> Tensor:
    """Which outputs of a convolution or Linear layer read which inputs by a nonzero weight.

    Args:
        layer: A layer of `CHANNEL_LAYERS`.

    Returns:
        A bool tensor (groups, outputs / groups, inputs / groups).
    """
    groups, nonzero = getattr(layer, "groups", 1), layer.weight.detach() != 0
    if getattr(layer, "transposed", False):
        nonzero = nonzero.unflatten(0, (groups, -1)).transpose(1, 2)
    else:
        nonzero = nonzero.unflatten(0, (groups, -1))
    return nonzero.flatten(3).any(3) if nonzero.dim() > 3 else nonzero


def weights_of_output(layer: Any, index: int) -> Tensor:
    """The weights of one output of a convolution or Linear layer, or of one channel of a norm layer: a view of them."""
    if not getattr(layer, "transposed", False):
        return layer.weight.select(0, index)
    share = layer.out_channels // layer.groups
    return layer.weight.unflatten(0, (layer.groups, -1))[index // share, :, index % share]


def zero_outputs(layer: Any) -> list[bool]:
    """For each output of a layer, whether all its weights are zero."""
    return (~nonzero_connections(layer).any(2)).flatten().tolist()


def keeps_constants(layer: Any) -> bool:
    """Whether a constant input channel adds the same number at every position of the output.

    Padding with zeros breaks this at the edges, and the windows of a transposed convolution overlap unevenly.
    """
    if not isinstance(layer, CONVOLUTIONS):
        return True
    is_larger = any(size > 1 for size in layer.kernel_size)
    pads = is_larger if layer.padding == "same" else layer.padding != "valid" and any(layer.padding)
    return not layer.transposed and not (pads and layer.padding_mode == "zeros")
