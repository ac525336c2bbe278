"""Wrapped, replicated and sharded models: the module in a wrapper, and how all processes get the same masks.

DistributedDataParallel keeps a replica of the model in every process. fully_shard (FSDP2) turns every parameter into a
DTensor, of which each process holds a shard. With both, every process ranks all weights and has the whole masks. It
applies to a sharded parameter the part of the mask that belongs to its shard.
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
    """Yield a model, then the module in it if it is a wrapper of torch, and so on."""
    while True:
        yield model
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's wrapper, whose class is slow to import
            model = model.get_submodule("_orig_mod")
        else:
            return


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside wrappers of torch (data parallel, compiled, averaged).

    Parameters are named as in this module, without the prefixes of the wrappers.

    Args:
        model: A model, wrapped or not.
    """
    *_, inner = _unwrapping(model)
    return inner


def process_group_of(model: nn.Module) -> torch.distributed.ProcessGroup | None:
    """Return the process group that holds replicas of a model, None without DistributedDataParallel."""
    for module in _unwrapping(model):
        if isinstance(module, DistributedDataParallel):
            return module.process_group
    return None


def process_groups_of_shards(model: nn.Module) -> list[torch.distributed.ProcessGroup]:
    """List the process groups that hold shards of a model, one per axis of the mesh; none if it is not sharded."""
    meshes = (parameter.device_mesh for parameter in model.parameters() if is_sharded(parameter))
    return next((mesh.get_all_groups() for mesh in meshes), [])


def agree(
    values: Sequence[np.ndarray], groups: Sequence[torch.distributed.ProcessGroup], device: torch.device
) -> list[np.ndarray]:
    """Give all processes the bools of the first process.

    Args:
        values: Arrays of bools, of the same shapes in every process.
        groups: The process groups; several for a mesh of several axes.
        device: A device that the processes can send from.

    Returns:
        The arrays of the first process.
    """
    groups = [group for group in groups if torch.distributed.get_world_size(group) > 1]
    if not groups:
        return list(values)
    joined = torch.from_numpy(np.concatenate(values)).to(device, torch.uint8)
    # Broadcast along one axis of the mesh after another: after the last, all processes have the values of the first.
    for group in groups:
        torch.distributed.broadcast(joined, torch.distributed.get_global_rank(group, 0), group)
    return np.split(joined.bool().cpu().numpy(), np.cumsum([len(each) for each in values])[:-1])


def is_sharded(tensor: Tensor) -> TypeGuard[Any]:
    """Tell whether a tensor is a DTensor, without importing that class, which is slow."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, which every process of its mesh must do; return others unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_shard(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shard of a tensor that this process holds, and the same part of a mask.

    Args:
        tensor: The tensor, sharded or not.
        mask: The whole mask, which broadcasts to the shape of the tensor.
    """
    if not is_sharded(tensor):
        return tensor, mask
    from torch.distributed.tensor import DTensor, Replicate

    # Every process has the whole mask and takes its part, so nothing is sent.
    everywhere = [Replicate()] * tensor.device_mesh.ndim
    spread = DTensor.from_local(mask.expand(tensor.shape), tensor.device_mesh, everywhere, run_check=False)
    return tensor.to_local(), spread.redistribute(placements=tensor.placements).to_local()


def is_fully_sharded(model: nn.Module) -> bool:
    """Tell whether fully_shard was called on a model or on one of its modules."""
    return any(hasattr(module, "reshard") for module in model.modules())


def kind_of(module: nn.Module) -> str:
    """Return the class name of a module, as it was before fully_shard turned Linear into FSDPLinear."""
    kinds = type(module).__mro__
    return (kinds[2] if hasattr(module, "reshard") else kinds[0]).__name__


def reshard(model: nn.Module) -> None:
    """Free the parameters that fully_shard gathered for a forward, so that they are the trained shards again."""
    for module in model.modules():
        if hasattr(type(module), "reshard"):  # asked of the class, for a module looks long for what it does not have
            module.reshard()  # type: ignore[operator]
