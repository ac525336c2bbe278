"""Wrapped, replicated and sharded models: which module is meant, and how all processes come to the same masks.

DistributedDataParallel keeps a replica in every process. fully_shard (FSDP2) makes every parameter a DTensor, of which
each process holds a shard. In both, every process ranks the whole weights and has the whole masks; of a sharded
parameter it applies its part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)


def _unwrapping(model: nn.Module) -> Iterator[nn.Module]:
    """A model, what is in it if it is a wrapper of torch, and so on."""
    while True:
        yield model
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's wrapper, whose class is slow to import
            model = model.get_submodule("_orig_mod")
        else:
            return


def unwrapped(model: nn.Module) -> nn.Module:
    """The module in a wrapper of torch (data parallel, compiled, averaged), under whose names the parameters are."""
    *_, inner = _unwrapping(model)
    return inner


def process_group_of(model: nn.Module) -> torch.distributed.ProcessGroup | None:
    """The processes that hold replicas of `model`, None if it is in no DistributedDataParallel."""
    for module in _unwrapping(model):
        if isinstance(module, DistributedDataParallel):
            return module.process_group
    return None


def process_groups_of_shards(model: nn.Module) -> list[torch.distributed.ProcessGroup]:
    """The processes that hold shards of `model`, by axis of their mesh; none if it is not sharded."""
    meshes = (parameter.device_mesh for parameter in model.parameters() if is_sharded(parameter))
    return next((mesh.get_all_groups() for mesh in meshes), [])


def agree(
    values: Sequence[np.ndarray], groups: Sequence[torch.distributed.ProcessGroup], device: torch.device
) -> list[np.ndarray]:
    """The bools of the first process of all groups, in all of them. device: one that they can send from."""
    groups = [group for group in groups if torch.distributed.get_world_size(group) > 1]
    if not groups:
        return list(values)
    joined = torch.from_numpy(np.concatenate(values)).to(device, torch.uint8)
    # Along one axis of a mesh after the other, what the first process has comes to all.
    for group in groups:
        torch.distributed.broadcast(joined, torch.distributed.get_global_rank(group, 0), group)
    return np.split(joined.bool().cpu().numpy(), np.cumsum([len(each) for each in values])[:-1])


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
    from torch.distributed.tensor import DTensor, Replicate

    # From a mask that every process has, each takes its part: nothing is sent.
    everywhere = [Replicate()] * tensor.device_mesh.ndim
    spread = DTensor.from_local(mask.expand(tensor.shape), tensor.device_mesh, everywhere, run_check=False)
    return tensor.to_local(), spread.redistribute(placements=tensor.placements).to_local()


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether fully_shard has been called on `model` or on a module of it."""
    return any(hasattr(module, "reshard") for module in model.modules())


def kind_of(module: nn.Module) -> str:
    """Name of the class of a module, the one that it was before fully_shard made it FSDPLinear(FSDPModule, Linear)."""
    kinds = type(module).__mro__
    return (kinds[2] if hasattr(module, "reshard") else kinds[0]).__name__


def reshard(model: nn.Module) -> None:
    """Free what fully_shard has gathered for a forward, so that parameters are again the shards that are trained."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]
