"""The exact ranking of selection.py for layers on a GPU: the same groups stay, and no value is read by the host.

The host goes on while the GPU works, so a step costs what the kernels cost. What the host would have to read to decide
(how much is masked, whether a layer would be emptied) is computed there for both cases, and the right one taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from .device_layer import DeviceLayer


def select_on_device(scopes: Sequence[Sequence[DeviceLayer]], sparsity: float) -> list[Tensor]:
    """Rank the groups of each scope in one list, as select_groups of selection.py does: True where a group stays.

    Returns a bool tensor for each layer of all scopes, in order.
    """
    kernels = kernels_for(scopes)
    if kernels is not None:
        return kernels.select(_for_kernels(scopes), sparsity)
    return [stays for layers in scopes for stays in _select(layers, sparsity)]


def _select(layers: Sequence[DeviceLayer], sparsity: float) -> list[Tensor]:
    """One scope, with torch alone."""
    for layer in layers:
        if layer.magnitude:
            layer.score, layer.magnitude = layer.score.abs(), False
        layer.nan = (layer.score.isnan() & (layer.alive | layer.revives)).any()
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
        falls = _lowest_of_equal_size(score, candidate, number)
    else:
        falls = _lowest(score, candidate, size, amount)
    stays = (alive | (falling & revives)) & ~falls
    return list(stays.split([len(layer) for layer in layers]))


def kernels_for(scopes: Sequence[Sequence[DeviceLayer]]) -> ModuleType | None:
    """The Triton kernels, where they can rank all scopes: on CUDA, where torch brings Triton, groups of one size."""
    if find_spec("triton") is None or not all(map(_is_for_kernels, scopes)):
        return None
    return import_module("sparsifai.axes.ranking.on_device_triton")


def _is_for_kernels(layers: Sequence[DeviceLayer]) -> bool:
    sizes = {layer.size if isinstance(layer.size, int) else None for layer in layers}
    floats = {layer.score.dtype for layer in layers} <= {torch.float32, torch.bfloat16, torch.float16}
    fit = all(not layer.whole and 0 < len(layer) < 2**30 and layer.alive.is_cuda for layer in layers)
    fit = fit and sum(map(len, layers)) < 2**31  # which is what a bin can count
    return fit and floats and len(sizes) == 1 and None not in sizes


def _for_kernels(scopes: Sequence[Sequence[DeviceLayer]]) -> Sequence[Sequence[DeviceLayer]]:
    """With scores of one type, and with tensors that begin where a GPU reads fast."""
    layers = [layer for scope in scopes for layer in scope]
    if len({(layer.score.dtype, layer.magnitude) for layer in layers}) > 1:
        for layer in layers:
            score = layer.score.float()
            layer.score, layer.magnitude = score.abs() if layer.magnitude else score, False
    for layer in layers:
        layer.score, layer.alive = _aligned(layer.score), _aligned(layer.alive)
    return scopes


def _aligned(values: Tensor) -> Tensor:
    return (
        values
        if values.is_contiguous() and values.data_ptr() % 16 == 0
        else values.clone(memory_format=torch.contiguous_format)
    )


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
