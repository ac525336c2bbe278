"""Applying a mask to a tensor: tensor *= mask, whatever the values are."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_masked(tensor: Tensor, mask: Tensor) -> None:
    """Set `tensor` to zero where the bool `mask`, which broadcasts to it, is false; inf and NaN too."""
    # Multiplied as integers, the bits of any value times zero are those of zero.
    bits = tensor.detach().view(_INTEGER[tensor.element_size()])
    if bits.device.type == "cpu":
        array = bits.numpy()
        np.multiply(array, mask.numpy(), out=array)  # several times faster than torch's own
        torch.autograd.graph.increment_version(tensor)  # numpy's writing is unseen by autograd
    else:
        bits.mul_(mask)


@torch.no_grad()
def zero_weights(masked: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Set the masked values of parameters to zero."""
    for parameter, mask in masked:
        zero_masked(parameter, mask)


@torch.no_grad()
def zero_gradients(masked: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Set the gradients of masked values to zero."""
    for parameter, mask in masked:
        # A sparse gradient of an embedding is left: its zeros hold because masks are applied after the step.
        if parameter.grad is not None and parameter.grad.layout == torch.strided:
            zero_masked(parameter.grad, mask)
