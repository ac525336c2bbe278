"""Removing joint groups from a model: the parameters get smaller, and with them the sizes that modules keep."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..layers import axes_of
from .adapting import adapt
from .entries import remove_entries
from .groups import FOLLOWER, NO_GROUP, READER, WEIGHT, JointGroups

# Attributes by which layers keep the sizes of the axes of their weight.
_SIZES_OF_AXES = {"out": ("out_features", "out_channels", "nf"), "in": ("in_features", "in_channels", "nx")}


@torch.no_grad()
def removable_groups(model: nn.Module, groups: JointGroups) -> np.ndarray:
    """Which groups have no effect on the outputs of the model: bool per group.

    A group has none if the weights that read it are zero. A group without such weights, such as a residual block, has
    none if all its weights are zero.

    Args:
        model: The model.
        groups: Its joint groups.
    """
    return zero_groups(model, groups, *((READER,) if groups.parts_in(READER) else (WEIGHT, FOLLOWER)))


def zero_groups(model: nn.Module, groups: JointGroups, *roles: str) -> np.ndarray:
    """For each group, whether all its entries in parts with some roles are zero; false if there are no such parts.

    Args:
        model: The model.
        groups: Its joint groups.
        *roles: Such as WEIGHT.
    """
    parts = groups.parts_in(*roles)
    are_zero = np.full(groups.count, bool(parts))
    for part in parts:
        are_zero &= _are_zero(attrgetter(part.name)(model), part.axis, part.groups, groups.count)
    return are_zero


def _are_zero(tensor: Tensor, axis: int | None, of: np.ndarray, count: int) -> np.ndarray:
    """For each group, whether all entries of a tensor that belong to it are zero."""
    if axis is None:
        tensor, axis = tensor.flatten(), 0
        of = np.broadcast_to(of, len(tensor))
    is_nonzero = (tensor.detach() != 0).movedim(axis, 0).flatten(1).any(1) if tensor.dim() > 1 else tensor.detach() != 0
    belongs = of != NO_GROUP
    return np.bincount(of[belongs], is_nonzero.cpu().numpy()[belongs], count) == 0


@torch.no_grad()
def remove_groups(model: nn.Module, groups: JointGroups, removed: Iterable[int]) -> None:
    """Remove joint groups from a model, in place.

    Args:
        model: The model.
        groups: Its joint groups.
        removed: Numbers of the groups that are removed.
    """
    removed = np.asarray(sorted(removed), dtype=np.int64)
    for part in groups.parts:
        if part.axis is None:  # it goes with its module
            continue
        kept = np.flatnonzero(~np.isin(part.groups, removed))
        old = attrgetter(part.name)(model)
        replace_tensor(model, old, old.detach().index_select(part.axis, torch.from_numpy(kept).to(old.device)))
    for size in groups.sizes:
        module: Any = model.get_submodule(size.module)
        setattr(module, size.attribute, getattr(module, size.attribute) - size.per_group * len(removed))
    if groups.entries is not None:
        remove_entries(model, groups.entries, removed)
    elif len(removed):
        adapt(model, groups)


def replace_tensor(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put a smaller tensor in the place of a parameter or buffer, wherever the model has it."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, old.requires_grad)
    for module in model.modules():
        every: Any = (module._parameters, module._buffers)
        for held in every:
            for attribute in [name for name, value in held.items() if value is old]:
                held[attribute] = new
                # Of a grouped convolution an axis of the weight has the size of one group.
                axes = () if getattr(module, "groups", 1) != 1 else axes_of(module, attribute) or ()
                for axis, (before, after) in zip(axes, zip(old.shape, new.shape, strict=True), strict=False):
                    for size in _SIZES_OF_AXES.get(axis, ()):
                        if before != after and getattr(module, size, None) == before:
                            setattr(module, size, after)
