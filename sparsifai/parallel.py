"""Wrapped, replicated and sharded models: which module is meant, and how all processes come to the same masks.

DistributedDataParallel keeps a replica in every process. fully_shard (FSDP2) makes every parameter a DTensor, of which
each process holds a shard. In both, every process ranks the whole weights and has the whole masks; of a sharded
parameter it applies its part.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module in a wrapper of torch (data parallel, compiled, averaged), under whose names the parameters are."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's wrapper, whose class is slow to import
            model = model.get_submodule("_orig_mod")
        else:
            return model


def group_of(model: nn.Module) -> torch.distributed.ProcessGroup | None:
    """The processes that train `model` together, None if there is one alone or if they are not known."""
    if isinstance(model, DistributedDataParallel):
        return model.process_group
    for parameter in model.parameters():
        if is_sharded(parameter) and parameter.device_mesh.ndim == 1:
            return parameter.device_mesh.get_group()
    return None


def agree(values: Iterable[Tensor], group: torch.distributed.ProcessGroup | None, device: torch.device) -> list[Tensor]:
    """The bools of the first process of the group, in all of them. device: one that the group can send from."""
    values = list(values)
    if group is None or torch.distributed.get_world_size(group) == 1:
        return values
    joined = torch.cat(values).to(device, torch.uint8)
    torch.distributed.broadcast(joined, torch.distributed.get_global_rank(group, 0), group)
    return list(joined.to(values[0].device, torch.bool).split([len(each) for each in values]))


def is_sharded(tensor: Tensor) -> TypeGuard[Any]:
    """Whether a tensor is a DTensor, whose class is slow to import."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its shards, which every process of its mesh must ask for."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_shard(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What this process holds of a tensor, and of a mask that broadcasts to it."""
    if not is_sharded(tensor):
        return tensor, mask
    from torch.distributed.tensor import distribute_tensor

    spread = mask.expand(tensor.shape).contiguous()
    part = distribute_tensor(spread, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return tensor.to_local(), part.to_local()


def reshard(model: nn.Module) -> None:
    """Free what fully_shard has gathered for a forward, so that parameters are again the shards that are trained."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]
