"""The exact ranking of selection.py for layers on a GPU: the same groups stay, and no value is read by the host.

The host goes on while the GPU works, so a step costs what the kernels cost. What the host would have to read to decide
(how much is masked, whether a layer would be emptied) is computed there for both cases, and the right one taken.
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
    """One layer on a GPU; tensors have one entry per group, in index order.

    score: float. alive: not zero already. size: weights in a group. whole: a group is the whole layer. revives: whether
    groups that are zero may come back. may_empty: whether the best group may fall, too.
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
        """Of the whole layer, which no tensor needs to be read for."""
        return self.target.parameter.numel()


def select_on_device(layers: Sequence[DeviceLayer], sparsity: float) -> list[Tensor]:
    """Rank the groups of `layers` in one list, as select_groups of selection.py does: True where a group stays."""
    score = torch.cat([layer.score for layer in layers])
    alive = torch.cat([layer.alive for layer in layers])
    equal = all(isinstance(layer.size, int) and layer.size == layers[0].size for layer in layers)
    sizes = [_sizes(layer) for layer in layers]
    size = sizes[0][0].expand(len(score)) if equal else torch.cat(sizes)
    wanted = sparsity * sum(layer.weights for layer in layers)
    masked = size[0] * (~alive).sum() if equal else (size * ~alive).sum()

    # A rising target adds to what is masked, but for the best of every layer. Of a falling one, which only gives
    # back, the masked ones are the candidates.
    falling = wanted < masked
    revives = torch.cat([_full(layer, layer.revives) for layer in layers])
    candidate = alive if layers[0].may_empty else alive & ~torch.cat(_best(layers))
    candidate = torch.where(falling, ~alive & revives, candidate)
    stay_masked = (size * (~alive & ~revives)).sum()
    amount = torch.where(falling, (wanted - stay_masked).clamp(min=0), wanted - masked)

    if equal:
        number = torch.minimum((amount / size[0] + 0.5).floor().long().clamp(min=0), candidate.sum())
        kernels = kernels_for(score)
        falls = (kernels.lowest if kernels is not None else _lowest_of_equal_size)(score, candidate, number)
    else:
        falls = _lowest(score, candidate, size, amount)
    stays = (alive | (falling & revives)) & ~falls
    return list(stays.split([len(layer) for layer in layers]))


def kernels_for(score: Tensor) -> ModuleType | None:
    """The Triton kernels, where they can run: on CUDA, where torch brings Triton. Elsewhere a sort does the same."""
    if score.device.type != "cuda" or score.dtype != torch.float32 or find_spec("triton") is None:
        return None
    return import_module("sparsifai.axes.ranking.on_device_triton")


def _lowest_of_equal_size(score: Tensor, candidate: Tensor, number: Tensor) -> Tensor:
    """True at the `number` candidates of lowest score, ties in index order."""
    order = score.argsort(stable=True)
    in_order = candidate[order]
    return torch.empty_like(candidate).scatter_(0, order, in_order & (in_order.cumsum(0) <= number))


def _lowest(score: Tensor, candidate: Tensor, size: Tensor, amount: Tensor) -> Tensor:
    """True at the candidates of lowest score whose sizes add up to the nearest of `amount`."""
    # Candidate i falls if the sum of sizes with it is at least as near to the amount as the sum without it.
    order = score.argsort(stable=True)  # ties in index order
    sizes = torch.where(candidate, size, 0)[order]
    falls_in_order = (sizes.cumsum(0) - sizes / 2 <= amount) & candidate[order]
    return torch.empty_like(candidate).scatter_(0, order, falls_in_order)


def _full(layer: DeviceLayer, value: bool) -> Tensor:
    """One bool for all groups, filled on the GPU."""
    return torch.full((1,), value, device=layer.alive.device).expand(len(layer))


def _sizes(layer: DeviceLayer) -> Tensor:
    """Weights in every group, as float64: sums of whole numbers are exact in whatever order."""
    if isinstance(layer.size, Tensor):
        return layer.size.double()
    # Filled on the GPU; a number that is sent there would be waited for.
    return torch.full((1,), layer.size, dtype=torch.float64, device=layer.alive.device).expand(len(layer))


def _best(layers: Sequence[DeviceLayer]) -> list[Tensor]:
    """For each layer, True at its best group: its highest score, the last of equals. Of whole layers, of them all."""
    if all(layer.whole for layer in layers):
        score, alive = torch.cat([layer.score for layer in layers]), torch.cat([layer.alive for layer in layers])
        return list(_best_of(score, alive).split([len(layer) for layer in layers]))
    return [_best_of(layer.score, layer.alive) for layer in layers]


def _best_of(score: Tensor, alive: Tensor) -> Tensor:
    highest = score.masked_fill(~alive, -math.inf).amax()
    place = torch.arange(len(score), device=score.device)
    last = torch.where((score == highest) & alive, place, -1).amax()
    return place == last
