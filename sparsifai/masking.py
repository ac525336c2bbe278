"""Applying masks: to weights, to their gradients, and to the moments that an optimizer keeps of them.

A weight whose value, gradient and moments are zero stays zero in the step of any optimizer that works weight by weight,
weight decay and momentum included: its zero holds by construction, even if the step is interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .parallel import is_sharded, own_shard

Masked = Iterable[tuple[nn.Parameter, Tensor]]

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_masked(tensor: Tensor, mask: Tensor) -> None:
    """Set `tensor` to zero where the bool `mask`, which broadcasts to it, is false; inf and NaN too."""
    tensor, mask = own_shard(tensor.detach(), mask)
    # Multiplied as integers, the bits of any value times zero are those of zero.
    bits = tensor.view(_INTEGER[tensor.element_size()])
    if bits.device.type == "cpu":
        array = bits.numpy()
        np.multiply(array, mask.numpy(), out=array)  # several times faster than torch's own
        torch.autograd.graph.increment_version(tensor)  # numpy's writing is unseen by autograd
    else:
        bits.mul_(mask)


@torch.no_grad()
def zero_weights(masked: Masked) -> None:
    """Set the masked values of parameters to zero."""
    for parameter, mask in masked:
        zero_masked(parameter, mask)


@torch.no_grad()
def is_masked_zero(masked: Masked) -> bool:
    """Whether all masked values of parameters are zero."""
    for parameter, mask in masked:
        values, kept = own_shard(parameter.detach(), mask)
        if torch.logical_and(values != 0, ~kept).any():
            return False
    return True


@torch.no_grad()
def zero_gradients(masked: Masked) -> None:
    """Set the gradients of masked values to zero."""
    for parameter, mask in masked:
        # A sparse gradient of an embedding is left: its zeros hold because masks are applied after the step.
        if parameter.grad is not None and parameter.grad.layout == torch.strided:
            zero_masked(parameter.grad, mask)


@torch.no_grad()
def zero_moments(masked: Masked, optimizer: Any) -> None:
    """Set to zero what an optimizer keeps of masked values: all floats of its state in the shape of the parameter.

    optimizer: torch's or fastai's, or a wrapper around one. TypeError if it has no state by parameter.
    """
    states = list(_states_of(optimizer))
    for parameter, mask in masked:
        for state in states:
            for kept in state.get(parameter, {}).values():
                if _is_plain(kept) and kept.shape == parameter.shape:
                    zero_masked(kept, mask)


def _is_plain(kept: Any) -> bool:
    """Whether a piece of state is a tensor of floats; the codes of a quantized one are no values."""
    return isinstance(kept, Tensor) and (type(kept) is Tensor or is_sharded(kept)) and kept.is_floating_point()


def _states_of(optimizer: Any) -> Iterator[dict[nn.Parameter, dict[str, Any]]]:
    """All that an optimizer and those within it keep, each as a dictionary from parameters to named values."""
    if getattr(optimizer, "slow_weights", None) is not None:  # fastai's Lookahead writes them back
        of_groups = zip(optimizer.param_lists, optimizer.slow_weights, strict=True)
        yield {
            parameter: {"slow": slow}
            for group, slow_group in of_groups
            for parameter, slow in zip(group, slow_group, strict=True)
        }
    held = vars(optimizer) if hasattr(optimizer, "__dict__") else {}
    inner = held.get("opt", held.get("optimizer"))  # of fastai's wrappers and of accelerate's
    if inner is not None:
        yield from _states_of(inner)
    elif isinstance(held.get("state"), dict):
        yield held["state"]
    else:
        raise TypeError(f"{type(optimizer).__name__} is no optimizer: it keeps no `state` by parameter")
