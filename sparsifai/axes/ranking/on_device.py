"""The exact ranking of selection.py for layers on a GPU: the same groups stay, and no value is read by the host.

The host goes on while the GPU works, so a step costs what the kernels cost. What the host would have to read to decide
(how much is masked, whether a layer would be emptied) is computed there for both cases, and the right one taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ...model.tensors import sent
from .device_layer import DeviceLayer


def select_on_device(scopes: Sequence[Sequence[DeviceLayer]], sparsity: float) -> list[Tensor]:
    """Rank the groups of each scope in one list, as select_groups of selection.py does: True where a group stays.

    Returns a bool tensor for each layer of all scopes, in order.
    """
    kernels = kernels_for(scopes)
    if kernels is not None:
        for_kernels([layer for layers in scopes for layer in layers])
        return kernels.select(scopes, sparsity)
    return [stays for layers in scopes for stays in _select(layers, sparsity)]


def _select(layers: Sequence[DeviceLayer], sparsity: float) -> list[Tensor]:
    """One scope, with torch alone: all layers in one list, for each operation is a launch."""
    lengths = [len(layer) for layer in layers]
    device, count = layers[0].alive.device, len(layers)
    equal = all(isinstance(layer.size, int) and layer.size == layers[0].size for layer in layers)
    own = [layer.size if isinstance(layer.size, int) else 0 for layer in layers]
    numbers = np.array([0, *accumulate(lengths), *own, *(layer.revives for layer in layers)], np.int64)
    offsets, sizes, may_revive = sent(numbers, device).split([count + 1, count, count])
    each = torch.arange(count, device=device)
    layer_of = each.repeat_interleave(offsets.diff(), output_size=sum(lengths))
    score, alive = _joined_scores(layers), torch.cat([layer.alive for layer in layers])
    revives = may_revive.bool().index_select(0, layer_of)
    nan = _any_of_layers(score.isnan() & (alive | revives), offsets).unbind()
    for layer, flag in zip(layers, nan, strict=True):
        layer.nan = flag
    size = sizes.double()[:1] if equal else sizes.double().index_select(0, layer_of)  # of which sums are exact
    if any(isinstance(layer.size, Tensor) for layer in layers):
        pieces = zip(layers, size.split(lengths), strict=True)
        size = torch.cat([layer.size.double() if isinstance(layer.size, Tensor) else piece for layer, piece in pieces])
    wanted = sparsity * sum(layer.weights for layer in layers)
    masked = (size * ~alive).sum()

    # A rising target adds to what is masked, but for the best of every layer. Of a falling one, which only gives
    # back, the masked ones are the candidates.
    falling = wanted < masked
    candidate = alive
    if not layers[0].may_empty:
        if all(layer.whole for layer in layers):  # of whole layers, the best of them all
            offsets, layer_of = offsets[:: len(layers)], torch.zeros_like(layer_of)
        candidate = alive & ~_best(score, alive, offsets, layer_of)
    candidate = torch.where(falling, ~alive & revives, candidate)
    stay_masked = (size * (~alive & ~revives)).sum()
    amount = torch.where(falling, (wanted - stay_masked).clamp(min=0), wanted - masked)

    if equal:
        number = torch.minimum((amount / size[0] + 0.5).floor().long().clamp(min=0), candidate.sum())
        falls = _lowest_of_equal_size(score, candidate, number)
    else:
        falls = _lowest(score, candidate, size, amount)
    stays = (alive | (falling & revives)) & ~falls
    return list(stays.split(lengths))


def _joined_scores(layers: Sequence[DeviceLayer]) -> Tensor:
    """The scores of all layers; 0.0 in place of -0.0, for a GPU sorts by bits."""
    if len({layer.magnitude for layer in layers}) > 1:
        for layer in layers:
            layer.score, layer.magnitude = layer.score.abs() if layer.magnitude else layer.score, False
    score = torch.cat([layer.score for layer in layers])
    return score.abs() if layers[0].magnitude else score + 0.0


def _any_of_layers(values: Tensor, offsets: Tensor) -> Tensor:
    """For each layer, whether any of its values is true. offsets: where each layer begins, and the end."""
    upto = values.cumsum(0).index_select(0, offsets[1:] - 1)
    return upto.diff(prepend=torch.zeros_like(upto[:1])) > 0


def kernels_for(scopes: Sequence[Sequence[DeviceLayer]]) -> ModuleType | None:
    """The Triton kernels, where they can rank all scopes: on CUDA, where torch brings Triton, groups of one size."""
    if not all(map(_is_for_kernels, scopes)):
        return None
    return import_module("sparsifai.axes.ranking.on_device_triton")


def _is_for_kernels(layers: Sequence[DeviceLayer]) -> bool:
    sizes = {layer.size if isinstance(layer.size, int) else None for layer in layers}
    fit = can_have_keys(layers) and not any(layer.whole for layer in layers)
    fit = fit and sum(map(len, layers)) < 2**31  # which is what a bin can count
    return fit and len(sizes) == 1 and None not in sizes


def can_have_keys(layers: Sequence[DeviceLayer]) -> bool:
    """Whether Triton can rank scores by their bits: on CUDA, where torch brings Triton, no float64."""
    floats = {layer.score.dtype for layer in layers} <= {torch.float32, torch.bfloat16, torch.float16}
    fit = floats and all(0 < len(layer) < 2**30 and layer.alive.is_cuda for layer in layers)
    return fit and find_spec("triton") is not None


def for_kernels(layers: Sequence[DeviceLayer]) -> None:
    """Give layers scores of one type, and tensors that begin where a GPU reads fast."""
    if len({(layer.score.dtype, layer.magnitude) for layer in layers}) > 1:
        for layer in layers:
            score = layer.score.float()
            layer.score, layer.magnitude = score.abs() if layer.magnitude else score, False
    for layer in layers:
        layer.score, layer.alive = _aligned(layer.score), _aligned(layer.alive)


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


def _best(score: Tensor, alive: Tensor, offsets: Tensor, layer_of: Tensor) -> Tensor:
    """True at the best group of each layer: its highest score, the last of equals."""

    def highest_of_layer(values: Tensor) -> Tensor:
        # Unsafe is that offsets are not checked, for which the host would have to read them.
        return torch.segment_reduce(values, "max", offsets=offsets, unsafe=True).index_select(0, layer_of)

    values = score.double().masked_fill(~alive, -math.inf)
    place = torch.arange(len(score), dtype=torch.float64, device=score.device)
    is_highest = (values == highest_of_layer(values)) & alive
    return is_highest & (place == highest_of_layer(torch.where(is_highest, place, -1.0)))
