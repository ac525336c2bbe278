"""Applying masks: to weights, to their gradients, and to the moments that an optimizer keeps of them.

A weight whose value, gradient and moments are zero stays zero in the step of any optimizer that works weight by weight,
weight decay and momentum included: its zero holds by construction, even if the step is interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..model.parallel import is_sharded, own_shard
from ..support.chunk import CHUNK

Masked = Iterable[tuple[nn.Parameter, Tensor]]

# Optimizers of torch that work weight by weight.
_BY_WEIGHT = ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")

# What optimizers take the square root of. Of zeros, on the CPU, that takes up to ten times as long as of other numbers,
# so that a step with AdamW takes twice as long; of this number, far below any mean square of a gradient, it does not.
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "sqr_avg")


NEXT_TO_ZERO = 1e-16

# One in so many weights, or less, is newly masked: then places are set, more quickly than by a mask.
FEW = 32

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def newly_masked(parameter: nn.Parameter, before: Tensor, mask: Tensor) -> Tensor:
    """The places, in the order of memory, of weights that `mask` masks and `before` did not; or `mask`, where that is
    as fast: of masks of groups, on a GPU, or if they are many."""
    plain = mask.device.type == before.device.type == "cpu" and parameter.is_contiguous() and not is_sharded(parameter)
    if mask.shape != parameter.shape or not plain:
        return mask
    earlier, now, places = before.numpy().reshape(-1), mask.numpy().reshape(-1), []
    for start in range(0, len(now), CHUNK):
        part = slice(start, start + CHUNK)
        places.append(start + np.flatnonzero(earlier[part] > now[part]))
    count = sum(map(len, places))
    return torch.from_numpy(np.concatenate(places)) if FEW * count < len(now) else mask


def zero_masked(tensor: Tensor, mask: Tensor, zero: float = 0.0) -> None:
    """Set `tensor` to zero where the bool `mask`, which broadcasts to it, is false; inf and NaN too.

    mask: or places in the order of memory. zero: what to set it to instead.
    """
    if mask.dtype == torch.long:
        if tensor.is_contiguous():
            tensor.detach().view(-1)[mask] = zero
            return
        mask = torch.ones(tensor.numel(), dtype=torch.bool).index_fill(0, mask, False).view(tensor.shape)
    tensor, mask = own_shard(tensor.detach(), mask)
    # Multiplied as integers, the bits of any value times zero are those of zero.
    bits = tensor.view(_INTEGER[tensor.element_size()])
    if mask.shape != bits.shape or bits.numel() <= 2 * CHUNK or bits.device.type != "cpu":
        bits.mul_(mask)
    else:
        # torch makes integers of the bools first: of few at a time, so that these stay in the cache.
        rows = max(1, 2 * CHUNK * len(bits) // bits.numel())
        for part, kept in zip(bits.split(rows), mask.split(rows), strict=True):
            part.mul_(kept)
    if zero:
        tensor.add_(~mask, alpha=zero)


def _zero_all_masked(pairs: Iterable[tuple[Tensor, Tensor]], zero: float = 0.0) -> None:
    """zero_masked of many tensors; on a GPU, where torch brings Triton, those of a type at once."""
    by_type: dict[tuple[torch.device, torch.dtype], dict[int, tuple[Tensor, Tensor]]] = {}
    for tensor, mask in pairs:
        of_type = by_type.setdefault((tensor.device, tensor.dtype), {})
        # Twice the same tensor, as of tied parameters, is no matter for programs that run at once.
        if not _is_for_kernel(tensor, mask) or tensor.data_ptr() in of_type:
            zero_masked(tensor, mask, zero)
        else:
            of_type[tensor.data_ptr()] = tensor.detach(), mask
    for of_type in filter(None, by_type.values()):
        tensors, masks = zip(*of_type.values(), strict=True)
        _kernel().zero_masked_at_once(tensors, masks, zero)


def _is_for_kernel(tensor: Tensor, mask: Tensor) -> bool:
    # What a CUDA graph captures is replayed, and so may not come from memory of the host that is free by then.
    on_gpu = tensor.is_cuda and mask.is_cuda and not is_sharded(tensor) and find_spec("triton") is not None
    return on_gpu and not torch.cuda.is_current_stream_capturing() and _kernel().fits(tensor, mask)


def _kernel() -> ModuleType:
    return import_module("sparsifai.sparsifier.masking_triton")


@torch.no_grad()
def zero_weights(masked: Masked) -> None:
    """Set the masked values of parameters to zero."""
    _zero_all_masked(masked)


@torch.no_grad()
def is_masked_zero(masked: Masked) -> bool:
    """Whether all masked values of parameters are zero."""
    for parameter, mask in masked:
        values, kept = own_shard(parameter.detach(), mask)
        if torch.logical_and(values != 0, ~kept).any():
            return False
    return True


@torch.no_grad()
def zero_gradients(masked: Masked) -> bool:
    """Set the gradients of masked values to zero. False if one is sparse, as of an embedding: those are left."""
    gradients = [(parameter.grad, mask) for parameter, mask in masked if parameter.grad is not None]
    plain = [(gradient, mask) for gradient, mask in gradients if gradient.layout == torch.strided]
    _zero_all_masked(plain)
    return len(plain) == len(gradients)


@torch.no_grad()
def zero_moments(masked: Masked, optimizer: Any, squares: float = 0.0) -> None:
    """Set to zero what an optimizer keeps of masked values: all floats of its state in the shape of the parameter.

    optimizer: torch's or fastai's, or a wrapper around one. TypeError if it has no state by parameter.
    squares: what to set its means of squares to, instead; these move nothing, so NEXT_TO_ZERO, which they decay from,
        is as good and faster.
    """
    states = list(_states_of(optimizer))
    moments: dict[float, list[tuple[Tensor, Tensor]]] = {}
    for parameter, mask in masked:
        for state in states:
            for name, kept in state.get(parameter, {}).items():
                if _is_plain(kept) and kept.shape == parameter.shape:
                    moments.setdefault(squares if name in _SQUARES else 0.0, []).append((kept, mask))
    for zero, pairs in moments.items():
        _zero_all_masked(pairs, zero)


def holds_zeros(optimizer: Any) -> bool:
    """Whether a weight whose value, gradient and moments are zero is known to stay so in the step of an optimizer."""
    kind, inner = type(optimizer), _inner_of(optimizer)
    if inner is not None:
        return kind.__module__ in ("fastai.optimizer", "accelerate.optimizer") and holds_zeros(inner)
    if kind.__module__ == "fastai.optimizer":
        return all(getattr(step, "func", step).__module__ == "fastai.optimizer" for step in optimizer.cbs)
    if not any(kind is getattr(torch.optim, name) for name in _BY_WEIGHT):
        return False
    hooks = [_global_optimizer_pre_hooks, _global_optimizer_post_hooks]
    return not any([*hooks, optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks])


def parameters_of(optimizer: Any) -> Iterator[nn.Parameter]:
    """What an optimizer steps: torch's, fastai's, or a wrapper around one."""
    if hasattr(optimizer, "param_lists"):
        yield from (parameter for group in optimizer.param_lists for parameter in group)
    else:
        yield from (parameter for group in optimizer.param_groups for parameter in group["params"])


def _inner_of(optimizer: Any) -> Any:
    """The optimizer in a wrapper of fastai or accelerate, or None."""
    held = vars(optimizer) if hasattr(optimizer, "__dict__") else {}
    return held.get("opt", held.get("optimizer"))


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
    inner = _inner_of(optimizer)
    if inner is not None:
        yield from _states_of(inner)
    elif isinstance(getattr(optimizer, "state", None), dict):
        yield optimizer.state
    else:
        raise TypeError(f"{type(optimizer).__name__} is no optimizer: it keeps no `state` by parameter")
