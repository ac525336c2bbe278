"""Ranking within rows and blocks on a GPU: the same groups stay as within_rows.py finds, and the host reads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from .device_layer import DeviceLayer, Rows
from .on_device import can_have_keys, for_kernels


def kept_in_rows(layers: Sequence[DeviceLayer], all_rows: Sequence[Rows]) -> list[Tensor]:
    """Which groups of each layer stay, when the lowest of every row are pruned, masked ones first, ties in index order.

    Args:
        layers: The layers.
        all_rows: Their rows.
    """
    if can_have_keys(layers):
        kernels = import_module("sparsifai.axes.ranking.rows_triton")
        if all(min(rows.size, rows.length) <= kernels.LONGEST for rows in all_rows):
            for_kernels(layers)
            return kernels.rank(layers, all_rows)
    return [_kept_in_rows(layer, rows) for layer, rows in zip(layers, all_rows, strict=True)]


def _kept_in_rows(layer: DeviceLayer, rows: Rows) -> Tensor:
    """Of one layer, with torch alone."""
    outer, length, inner, size, pruned = rows
    # 0.0 in place of -0.0, for a GPU sorts by bits.
    score = (layer.score.abs() if layer.magnitude else layer.score) + 0.0
    score, alive = (values.reshape(outer, length, inner).movedim(1, -1) for values in (score, layer.alive))
    whole = length // size * size
    kept = []
    for start, end, row in ((0, whole, size), (whole, length, length - whole)):
        if start < end:
            form = (outer, inner, (end - start) // row, row)
            scores, masks = score[..., start:end].reshape(form), alive[..., start:end].reshape(form)
            kept.append(_all_but_lowest(scores, masks, max(pruned - (size - row), 0)).flatten(-2))
    stays = torch.cat(kept, -1).movedim(-1, 1).reshape(-1)
    return stays if layer.revives else stays & layer.alive


def _all_but_lowest(score: Tensor, alive: Tensor, count: int) -> Tensor:
    """False at the `count` lowest along the last axis, masked ones first, ties in index order."""
    by_score = score.argsort(dim=-1, stable=True)
    masked_first = alive.gather(-1, by_score).byte().argsort(dim=-1, stable=True)
    order = by_score.gather(-1, masked_first)
    stays = (torch.arange(score.shape[-1], device=score.device) >= count).expand(order.shape)
    return torch.empty_like(alive).scatter_(-1, order, stays)
