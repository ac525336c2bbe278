"""Applying masks: to weights, to their gradients, and to the moments that an optimizer keeps of them.

An optimizer that works weight by weight does not move a weight whose value, gradient and moments are zero. Weight
decay and momentum do not move it either. So a pruned weight stays zero even if a step is interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..model.layers import parameter_of
from ..model.parallel import is_sharded, own_shard
from ..model.zeros import is_nonzero
from ..support.chunk import CHUNK
from .optimizer_state import check_writable, is_plain, moments_of, states_of, wrapped_by

Masked = Iterable[tuple[nn.Parameter, Tensor]]

# Optimizers of torch that work weight by weight. Their subclasses may do something else.
_BY_WEIGHT = ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")

# Names of the mean squares of gradients in the state of optimizers, which take their square root.
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "sqr_avg")

# On the CPU the square root of zero takes up to ten times as long as that of another number, so that zeros make a step
# with AdamW twice as long. This number does not, and it is far below the mean square of any gradient.
NEXT_TO_ZERO = 1e-16

# Every so many steps, means of squares are set to NEXT_TO_ZERO again, before they decay to denormal numbers, with which
# arithmetic is slow. With a decay of 0.9 that takes 480 steps.
REFRESH = 300

# If at most one in FEW weights is newly pruned, setting these weights by index is faster than multiplying by a mask.
FEW = 32

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked_parameters(
    model: nn.Module, masks: MutableMapping[str, Tensor], move: bool = False
) -> list[tuple[nn.Parameter, Tensor]]:
    """Find the parameters that masks belong to.

    Args:
        model: The model, or a wrapper of torch around it.
        masks: Parameter name -> mask.
        move: Whether to store masks in `masks` again that were moved to the device of their parameter. Default False.

    Returns:
        Pairs of a parameter and its mask, on the device of the parameter.

    Raises:
        ValueError: The model has no such parameter, or a mask does not fit its shape.
    """
    masked = []
    for name, mask in masks.items():
        parameter = parameter_of(model, name, mask)
        if mask.device != parameter.device:
            mask = mask.to(parameter.device)
            if move:
                masks[name] = mask
        masked.append((parameter, mask))
    return masked


def newly_masked(parameter: nn.Parameter, before: Tensor, mask: Tensor) -> Tensor:
    """The weights that `mask` prunes and `before` kept, in the form that `zero_masked` applies fastest.

    Args:
        parameter: The weight.
        before: Its earlier mask, bool.
        mask: Its new mask, bool, of the same shape.

    Returns:
        Long tensor of the indices of these weights in memory order, if they are few. If they are many, on a GPU, and
        for masks of groups: `mask` itself, which masks the other pruned weights again.
    """
    found = _indices_where(np.greater, parameter, before, mask)
    return mask if found is None else torch.from_numpy(found)


def newly_changed(parameter: nn.Parameter, before: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The weights that `mask` prunes and `before` kept, and those that `mask` keeps and `before` pruned.

    Args:
        parameter: The weight.
        before: Its earlier mask, bool.
        mask: Its new mask, bool, of the same shape.

    Returns:
        For each, what `newly_masked` returns.
    """
    found = _indices_where(np.not_equal, parameter, before, mask)
    if found is None:
        return mask, mask
    kept = mask.numpy().reshape(-1)[found]
    return torch.from_numpy(found[~kept]), torch.from_numpy(found[kept])


def _indices_where(differ: np.ufunc, parameter: nn.Parameter, before: Tensor, mask: Tensor) -> np.ndarray | None:
    """Where two masks of a weight differ, as indices in memory order; None if these are many, or of no use."""
    plain = mask.device.type == before.device.type == "cpu" and parameter.is_contiguous() and not is_sharded(parameter)
    if mask.shape != parameter.shape or not plain:
        return None
    earlier, now, found = before.numpy().reshape(-1), mask.numpy().reshape(-1), []
    for start in range(0, len(now), CHUNK):
        part = slice(start, start + CHUNK)
        found.append(start + np.flatnonzero(differ(earlier[part], now[part])))
    count = sum(map(len, found))
    return np.concatenate(found) if FEW * count < len(now) else None


def zero_masked(tensor: Tensor, mask: Tensor, zero: float = 0.0) -> None:
    """Set the masked values of a tensor to zero, inf and NaN included.

    Args:
        tensor: The tensor, changed in place.
        mask: Bool tensor that broadcasts to it, False where a value is masked. Or long tensor of the indices of the
            masked values in memory order.
        zero: The number to set masked values to instead of zero.
    """
    if mask.dtype == torch.long:
        if tensor.is_contiguous() and not tensor.is_inference():
            tensor.detach().view(-1)[mask] = zero
            return
        mask = torch.ones(tensor.numel(), dtype=torch.bool).index_fill(0, mask, False).view(tensor.shape)
    tensor, mask = own_shard(tensor.detach(), mask)
    if tensor.is_conj() or tensor.is_neg():  # bits of such a view, as a gradient may be, are not its values
        tensor.masked_fill_(~mask, zero)
        return
    if tensor.is_complex():
        tensor, mask = torch.view_as_real(tensor), mask.unsqueeze(-1)
    _multiply(tensor, tensor, mask)
    if zero:
        tensor.add_(~mask, alpha=zero)


def write_masked(tensor: Tensor, values: Tensor, mask: Tensor) -> None:
    """Write values into a tensor, and zeros where they are masked, inf and NaN included.

    Args:
        tensor: The tensor, changed in place.
        values: A tensor of the same shape, type and memory order.
        mask: Bool tensor that broadcasts to them, False where a value is masked.
    """
    tensor, values = tensor.detach(), values.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor.copy_(torch.where(mask, values, torch.zeros_like(values)))
        return
    if tensor.is_complex():
        tensor, values, mask = torch.view_as_real(tensor), torch.view_as_real(values), mask.unsqueeze(-1)
    _multiply(tensor, values, mask)


def _multiply(into: Tensor, values: Tensor, mask: Tensor) -> None:
    """Write values times a mask into a tensor.

    Times zero, inf and NaN would give NaN. Their bits, read as an integer, times zero are the bits of zero.
    """
    into, bits = (each.view(_INTEGER[each.element_size()]) for each in (into, values))
    # torch converts the bools to integers first.
    for written, part, kept in _parts(into, bits, mask) if mask.shape == bits.shape else [(into, bits, mask)]:
        torch.mul(part, kept, out=written)


def add_pull(gradient: Tensor, dense: Tensor, sparse: Tensor, decay: float) -> None:
    """Add decay (1 - M) W to a gradient, W being the dense weight and W * M the sparse one.

    Args:
        gradient: The gradient, changed in place.
        dense: W.
        sparse: W * M.
        decay: The strength of the pull.
    """
    for pulled, of_dense, of_sparse in _parts(gradient, dense, sparse.detach()):
        # Where a weight is kept both are the same number, so nothing is added.
        pulled.add_(of_dense - of_sparse, alpha=decay)


def _parts(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Tensors of the same shape, a few rows at a time, so that what is computed of them stays in the cache."""
    first = tensors[0]
    if first.numel() <= 2 * CHUNK or first.device.type != "cpu":
        return [tensors]
    rows = max(1, 2 * CHUNK * len(first) // first.numel())
    return zip(*(each.split(rows) for each in tensors), strict=True)


def _zero_all_masked(pairs: Iterable[tuple[Tensor, Tensor]], zero: float = 0.0) -> None:
    """Call zero_masked for many tensors; on a GPU with Triton, in one launch for all tensors of a type."""
    by_type: dict[tuple[torch.device, torch.dtype], dict[int, tuple[Tensor, Tensor]]] = {}
    for tensor, mask in pairs:
        of_type = by_type.setdefault((tensor.device, tensor.dtype), {})
        # The same tensor twice, as of tied parameters, must not be written by programs that run at once.
        if not _is_for_kernel(tensor, mask) or tensor.data_ptr() in of_type:
            zero_masked(tensor, mask, zero)
        else:
            of_type[tensor.data_ptr()] = tensor.detach(), mask
    for of_type in filter(None, by_type.values()):
        tensors, masks = zip(*of_type.values(), strict=True)
        _kernel().zero_masked_at_once(tensors, masks, zero)


def _is_for_kernel(tensor: Tensor, mask: Tensor) -> bool:
    """Whether the Triton kernel can mask a tensor."""
    # A CUDA graph is replayed when the addresses that the host has sent may be freed.
    plain = not is_sharded(tensor) and not tensor.is_neg()
    on_gpu = tensor.is_cuda and mask.is_cuda and plain and find_spec("triton") is not None
    return on_gpu and not torch.cuda.is_current_stream_capturing() and _kernel().fits(tensor, mask)


def _kernel() -> ModuleType:
    return import_module("sparsifai.sparsifier.masking_triton")


@torch.no_grad()
def zero_weights(masked: Masked) -> None:
    """Set the masked values of parameters to zero.

    Args:
        masked: Pairs of a parameter and its bool mask, False where a value is masked.
    """
    _zero_all_masked(masked)


@torch.no_grad()
def is_masked_zero(masked: Masked) -> bool:
    """Whether all masked values of parameters are zero.

    Args:
        masked: Pairs of a parameter and its bool mask, False where a value is masked.
    """
    for parameter, mask in masked:
        values, kept = own_shard(parameter.detach(), mask)
        if torch.logical_and(is_nonzero(values), ~kept).any():
            return False
    return True


@torch.no_grad()
def zero_gradients(masked: Masked) -> bool:
    """Set the gradients of masked values to zero.

    Args:
        masked: Pairs of a parameter and its bool mask, False where a value is masked.

    Returns:
        False if the gradient of a parameter is a sparse tensor, as of an embedding. It is not changed then.
    """
    gradients = [(parameter.grad, mask) for parameter, mask in masked if parameter.grad is not None]
    plain = [(gradient, mask) for gradient, mask in gradients if gradient.layout == torch.strided]
    _zero_all_masked(plain)
    return len(plain) == len(gradients)


@torch.no_grad()
def zero_moments(masked: Masked, optimizer: Any, squares: float = 0.0) -> None:
    """Set the moments of masked values to zero: all real or complex state in the shape of the parameter.

    Args:
        masked: As of `moments_to_zero`.
        optimizer: As of `moments_to_zero`.
        squares: As of `moments_to_zero`.

    Raises:
        TypeError: As `moments_to_zero`. Nothing has changed then.
    """
    zero_found(moments_to_zero(masked, optimizer, squares))


def moments_to_zero(masked: Masked, optimizer: Any, squares: float = 0.0) -> dict[float, list[tuple[Tensor, Tensor]]]:
    """Find what `zero_moments` sets to zero, and change nothing.

    Args:
        masked: Pairs of a parameter and its bool mask, or the indices that `newly_masked` gives.
        optimizer: torch's or fastai's optimizer, or a wrapper around one.
        squares: The number to set the mean squares of gradients to instead of zero. These alone move no weight, so
            NEXT_TO_ZERO is as safe as zero, and faster.

    Returns:
        The number to set masked values to -> pairs of a moment and the mask or the indices.

    Raises:
        TypeError: The optimizer has no state by parameter, or a moment cannot be written.
    """
    states = states_of(optimizer)
    found: dict[float, list[tuple[Tensor, Tensor]]] = {}
    for parameter, mask in masked:
        for name, value in moments_of(parameter, states):
            if is_plain(value):
                check_writable(name, value, optimizer)
                found.setdefault(squares if name in _SQUARES else 0.0, []).append((value, mask))
    return found


@torch.no_grad()
def zero_found(found: Mapping[float, Iterable[tuple[Tensor, Tensor]]]) -> None:
    """Set what `moments_to_zero` has found to its numbers."""
    for number, pairs in found.items():
        _zero_all_masked([(moment, mask.to(moment.device)) for moment, mask in pairs], number)


def holds_zeros(optimizer: Any) -> bool:
    """Whether a step of an optimizer is known to leave a weight at zero if its gradient and moments are zero, too.

    Args:
        optimizer: torch's or fastai's optimizer, or a wrapper around one. A subclass, an optimizer with hooks, and any
            other class are not known.
    """
    kind, wrapped = type(optimizer), wrapped_by(optimizer)
    if wrapped:
        return kind.__module__ in ("fastai.optimizer", "accelerate.optimizer") and all(map(holds_zeros, wrapped))
    if kind.__module__ == "fastai.optimizer":
        return all(getattr(step, "func", step).__module__ == "fastai.optimizer" for step in optimizer.cbs)
    if not any(kind is getattr(torch.optim, name) for name in _BY_WEIGHT):
        return False
    hooks = [_global_optimizer_pre_hooks, _global_optimizer_post_hooks]
    return not any([*hooks, optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks])


def parameters_of(optimizer: Any) -> Iterator[nn.Parameter]:
    """The parameters that an optimizer steps.

    Args:
        optimizer: torch's or fastai's optimizer, or a wrapper around one.
    """
    if hasattr(optimizer, "param_lists"):
        yield from (parameter for group in optimizer.param_lists for parameter in group)
    else:
        yield from (parameter for group in optimizer.param_groups for parameter in group["params"])
