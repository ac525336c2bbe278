"""The exact ranking of selection.py for layers on a GPU: the same groups are kept, and the host reads no value.

The host does not wait for the GPU, so a step costs only the time of its kernels. Where the host would have to read a
value to decide (how much is masked, whether a layer would be emptied), the GPU computes both cases and takes the right
one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...model.layers import NamedWeight


@dataclass
class DeviceLayer:
    """One layer on a GPU. Tensors have one entry per group, in index order.

    Attributes:
        target: The weight: its name, axes and parameter.
        score: The scores, floats.
        alive: False where a group is masked already.
        size: Weights in a group: one number if all groups are equal, else one per group.
        whole: Whether the only group is the whole layer.
        revives: Whether masked groups may be revived.
        may_empty: Whether the best group of the layer may be pruned too.
    """

    target: NamedWeight
    score: Tensor
    alive: Tensor
    size: int | Tensor
    whole: bool = False
    revives: bool = True
    may_empty: bool = False

    def __len__(self) -> int:
        return len(self.alive)

    @property
    def weights(self) -> int:
        """Number of weights in the layer, from its shape."""
        return self.target.parameter.numel()


def select_on_device(layers: Sequence[DeviceLayer], sparsity: float) -> list[Tensor]:
    """Rank the groups of some layers together, as `select_groups` does, without waiting for the GPU.

    Args:
        layers: The layers to rank together, all on one GPU.
        sparsity: Fraction of the weights of all these layers to prune, from 0 to 1.

    Returns:
        For each layer a bool tensor with one entry per group: True where the group is kept.
    """
    score = torch.cat([layer.score for layer in layers])
    alive = torch.cat([layer.alive for layer in layers])
    equal = all(isinstance(layer.size, int) and layer.size == layers[0].size for layer in layers)
    sizes = [_sizes(layer) for layer in layers]
    size = sizes[0][0].expand(len(score)) if equal else torch.cat(sizes)
    wanted = sparsity * sum(layer.weights for layer in layers)
    masked = size[0] * (~alive).sum() if equal else (size * ~alive).sum()

    # At a rising sparsity the candidates for pruning are the groups that are not masked, without the best of every
    # layer. At a falling one, which only revives, they are the masked groups: all but the best stay pruned.
    falling = wanted < masked
    revives = torch.cat([_full(layer, layer.revives) for layer in layers])
    candidate = alive if layers[0].may_empty else alive & ~torch.cat(_best(layers))
    candidate = torch.where(falling, ~alive & revives, candidate)
    stay_masked = (size * (~alive & ~revives)).sum()
    amount = torch.where(falling, (wanted - stay_masked).clamp(min=0), wanted - masked)

    if equal:
        number = torch.minimum((amount / size[0] + 0.5).floor().long().clamp(min=0), candidate.sum())
        kernels = kernels_for(score)
        pruned = (kernels.lowest if kernels is not None else _lowest_of_equal_size)(score, candidate, number)
    else:
        pruned = _lowest(score, candidate, size, amount)
    kept = (alive | (falling & revives)) & ~pruned
    return list(kept.split([len(layer) for layer in layers]))


def kernels_for(score: Tensor) -> ModuleType | None:
    """The module of Triton kernels, for float32 scores on CUDA with Triton; else None, and a sort does the same."""
    if score.device.type != "cuda" or score.dtype != torch.float32 or find_spec("triton") is None:
        return None
    return import_module("sparsifai.axes.ranking.on_device_triton")


def _lowest_of_equal_size(score: Tensor, candidate: Tensor, number: Tensor) -> Tensor:
    """True at the `number` candidates of lowest score, ties in index order."""
    order = score.argsort(stable=True)
    in_order = candidate[order]
    return torch.empty_like(candidate).scatter_(0, order, in_order & (in_order.cumsum(0) <= number))


def _lowest(score: Tensor, candidate: Tensor, size: Tensor, amount: Tensor) -> Tensor:
    """True at the candidates of lowest score whose sizes add up to the value nearest to `amount`."""
    # Candidate i is pruned if the sum of sizes with it is at least as near to the amount as the sum without it.
    order = score.argsort(stable=True)  # ties in index order
    sizes = torch.where(candidate, size, 0)[order]
    pruned_in_order = (sizes.cumsum(0) - sizes / 2 <= amount) & candidate[order]
    return torch.empty_like(candidate).scatter_(0, order, pruned_in_order)


def _full(layer: DeviceLayer, value: bool) -> Tensor:
    """The same bool for all groups, created on the GPU."""
    return torch.full((1,), value, device=layer.alive.device).expand(len(layer))


def _sizes(layer: DeviceLayer) -> Tensor:
    """Weights in every group, as float64: sums of whole numbers are exact in any order."""
    if isinstance(layer.size, Tensor):
        return layer.size.double()
    # Created on the GPU: the host would wait for a number that it sends there.
    return torch.full((1,), layer.size, dtype=torch.float64, device=layer.alive.device).expand(len(layer))


def _best(layers: Sequence[DeviceLayer]) -> list[Tensor]:
    """For each layer, True at its best group: the highest score, the last of equal ones.

    If groups are whole layers, True only at the best of all layers.
    """
    if all(layer.whole for layer in layers):
        score, alive = torch.cat([layer.score for layer in layers]), torch.cat([layer.alive for layer in layers])
        return list(_best_of(score, alive).split([len(layer) for layer in layers]))
    return [_best_of(layer.score, layer.alive) for layer in layers]


def _best_of(score: Tensor, alive: Tensor) -> Tensor:
    """True at the highest score among groups that are not masked, the last of equal ones."""
    highest = score.masked_fill(~alive, -math.inf).amax()
    place = torch.arange(len(score), device=score.device)
    last = torch.where((score == highest) & alive, place, -1).amax()
    return place == last
