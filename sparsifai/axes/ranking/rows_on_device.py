"""Ranking within rows and blocks on a GPU: the same groups stay as within_rows.py finds, and the host reads nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from .device_layer import DeviceLayer


def kept_in_blocks(layer: DeviceLayer, shape: tuple[int, ...], axis: int, size: int, count: int) -> Tensor:
    """Which groups of a layer stay, when `count` of every block are pruned; as write_kept of within_rows.py.

    Args:
        layer: The layer.
        shape: Number of groups along each axis.
        axis: Axis along which the blocks run. A block at its end may be shorter; what it lacks counts as pruned.
        size: Length of a block.
        count: Number of groups to prune in a whole block.
    """
    score, alive = (values.reshape(shape).movedim(axis, -1) for values in (_scores(layer), layer.alive))
    whole = shape[axis] // size * size
    kept = []
    for start, end, block in ((0, whole, size), (whole, shape[axis], shape[axis] - whole)):
        if start < end:
            form = (*score.shape[:-1], (end - start) // block, block)
            scores, masks = score[..., start:end].reshape(form), alive[..., start:end].reshape(form)
            kept.append(_all_but_lowest(scores, masks, max(count - (size - block), 0)).flatten(-2))
    return _may_stay(torch.cat(kept, -1).movedim(-1, axis).reshape(-1), layer)


def kept_in_rows(layer: DeviceLayer, shape: tuple[int, ...], order: list[int], outer: int, count: int) -> Tensor:
    """Which groups of a layer stay, when `count` of every row are pruned.

    Args:
        layer: The layer.
        shape: Number of groups along each axis.
        order: The axes, with those that index the rows first.
        outer: How many of them do.
        count: Number of groups to prune in a row.
    """
    score, alive = (values.reshape(shape).permute(order) for values in (_scores(layer), layer.alive))
    kept = _all_but_lowest(score.flatten(outer), alive.flatten(outer), count).reshape(score.shape)
    return _may_stay(kept.permute([order.index(axis) for axis in range(len(order))]).reshape(-1), layer)


def _scores(layer: DeviceLayer) -> Tensor:
    """The scores; 0.0 in place of -0.0, for a GPU sorts by bits."""
    return (layer.score.abs() if layer.magnitude else layer.score) + 0.0


def _may_stay(kept: Tensor, layer: DeviceLayer) -> Tensor:
    return kept if layer.revives else kept & layer.alive


def _all_but_lowest(score: Tensor, alive: Tensor, count: int) -> Tensor:
    """False at the `count` lowest along the last axis, masked ones first, ties in index order."""
    by_score = score.argsort(dim=-1, stable=True)
    masked_first = alive.gather(-1, by_score).byte().argsort(dim=-1, stable=True)
    order = by_score.gather(-1, masked_first)
    stays = (torch.arange(score.shape[-1], device=score.device) >= count).expand(order.shape)
    return torch.empty_like(alive).scatter_(-1, order, stays)
