"""A layer as a product of matrices: its weight as rows, and what these are multiplied with as columns.

A Linear layer multiplies its weight with its inputs. A convolution multiplies it with its unfolded input (im2col),
group by group. In both cases the output is rows @ columns, plus a bias.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .layers import CONVOLUTIONS, NamedWeight
from .tensors import widened

# At most so many numbers of an unfolded input are in memory at once.
_UNFOLDED = 2**24

# By this fraction of the largest output, rows @ columns may differ from the output: bfloat16 has 8 bits.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class WeightRows:
    """How a weight is written as matrices of the shape (groups, outputs, columns).

    Groups are those of a grouped convolution. Columns run over the positions of the kernel, and within each over the
    inputs, so that the weights of an N:M block are neighbours.

    Attributes:
        weight: The weight.
    """

    weight: NamedWeight

    @property
    def inputs(self) -> int:
        """Number of inputs of a group."""
        return self.weight.axes["in"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, outputs, columns)."""
        axes = self.weight.axes
        return self.weight.convolution_groups, axes["out"], prod(axes.values()) // axes["out"]

    def rows(self, values: Tensor) -> Tensor:
        """A tensor in the shape of the weight, as matrices."""
        sizes = self.weight.axes.values()
        return values.reshape(self.weight.convolution_groups, *sizes).permute(0, *self._order).reshape(self.shape)

    def back(self, rows: Tensor) -> Tensor:
        """Matrices in the shape of the weight: the inverse of `rows`."""
        sizes = list(self.weight.axes.values())
        order = (0, *self._order)
        separate = rows.reshape(self.weight.convolution_groups, *(sizes[place - 1] for place in self._order))
        return separate.permute([order.index(place) for place in range(len(order))]).reshape(
            self.weight.parameter.shape
        )

    @property
    def _order(self) -> list[int]:
        """The places of the axes, the outputs first and the inputs last. Place 0 is that of the groups."""
        names = list(self.weight.axes)
        kernel = [name for name in names if name not in ("out", "in")]
        return [1 + names.index(name) for name in ("out", *kernel, "in")]


def columns_of(weight: NamedWeight, module: nn.Module, value: Tensor) -> Iterator[Tensor]:
    """What the rows of a weight are multiplied with, in parts, at least in float32.

    Args:
        weight: The weight.
        module: The layer.
        value: Its input.

    Yields:
        Tensors of the shape (groups, columns, samples), as many columns as `WeightRows` has. A sample is a place where
        the layer yields an output.
    """
    value = widened(value.detach())
    groups, _, columns = WeightRows(weight).shape
    if not isinstance(module, CONVOLUTIONS):
        yield value.reshape(1, -1, columns).transpose(1, 2)
        return
    channels = weight.axes["in"] * groups
    positions = columns // weight.axes["in"]
    value = value if value.dim() == len(weight.axes) else value[None]
    unfolding = _unfolding(module, channels, positions, value)
    for part in value.split(max(1, _UNFOLDED // max(value[0].numel() * positions, 1))):
        unfolded = unfolding(part)
        separate = unfolded.reshape(len(part), groups, weight.axes["in"], positions, -1)
        yield separate.permute(1, 3, 2, 0, 4).reshape(groups, columns, -1)


def _unfolding(module: Any, channels: int, positions: int, value: Tensor) -> Any:
    """The convolution itself, but with a kernel for each position that copies the channel there.

    So stride, padding and all else are its own, also in a subclass.
    """
    size = tuple(module.kernel_size)
    one_hot = torch.eye(positions, dtype=value.dtype, device=value.device).view(1, positions, *size)
    kernels = one_hot.expand(channels, positions, *size)
    bare = copy.copy(module)
    transposed = module.transposed
    bare._parameters = {"weight": kernels if transposed else kernels.reshape(-1, 1, *size), "bias": None}
    bare._forward_hooks, bare._forward_pre_hooks = type(bare._forward_hooks)(), type(bare._forward_pre_hooks)()
    bare.groups = channels
    return bare.forward


def is_explained(weight: NamedWeight, module: nn.Module, value: Any, output: Any) -> bool:
    """Whether the output of a layer is its weight times its input, as columns, plus a bias.

    It is not for attentions and recurrent layers, for embeddings, and where a subclass computes another weight first.

    Args:
        weight: The weight.
        module: The layer.
        value: Its input.
        output: Its output.
    """
    if not _can_be_columns(weight, module, value) or not isinstance(output, Tensor):
        return False
    is_convolution = isinstance(module, CONVOLUTIONS)
    if is_convolution:
        batched = value.dim() == len(weight.axes)
        value, output = (value[:1], output[:1]) if batched else (value[None], output[None])
        output = output.reshape(weight.out, -1)
    else:
        value, output = value.reshape(-1, value.shape[-1])[:64], output.reshape(-1, output.shape[-1])[:64].T
    try:
        columns = next(columns_of(weight, module, value))
        form, stored = WeightRows(weight), getattr(module, weight.attribute).detach()
        product = (form.rows(widened(stored)) @ columns).reshape(output.shape)
    except (RuntimeError, TypeError, AttributeError):  # a forward of the user's own that needs more than a weight
        return False
    bias = getattr(module, "bias", None)
    expected = product if bias is None else product + widened(bias.detach()).reshape(-1, 1)
    largest = output.detach().abs().max()
    return bool((expected - output).abs().max() <= _TOLERANCE * largest + 1e-6) or not bool(largest.isfinite())


def _can_be_columns(weight: NamedWeight, module: nn.Module, value: Any) -> bool:
    """Whether an input of a layer has the form of what a weight with these axes is multiplied with."""
    if weight.attribute != "weight" or not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if value.is_sparse or not value.numel():
        return False
    if isinstance(module, CONVOLUTIONS):
        return value.dim() in (len(weight.axes), len(weight.axes) - 1)
    return set(weight.axes) == {"in", "out"} and value.shape[-1] == weight.axes["in"]
