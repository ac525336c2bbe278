"""Weights of layers on a GPU pooled to scores of groups: by Triton's kernels for all layers at once, where they can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from ..model.tensors import widened
from .grouping import mean, sides_of
from .ranking.device_layer import DeviceLayer


def pool_magnitudes(layers: Sequence[DeviceLayer], pool: Callable) -> None:
    """Pool the magnitudes of layers whose score is their weight, one number for each weight.

    Args:
        layers: They get one score for each group.
        pool: `mean` or `total`.
    """
    groupings = [layer.unpooled for layer in layers]
    kernels = _kernels()
    weights, sides = [layer.score.contiguous() for layer in layers], [sides_of(grouping) for grouping in groupings]
    if kernels is not None and kernels.fits(weights, sides):
        scores = kernels.pool_at_once(weights, sides, pool is mean)
    else:
        scores = [
            grouping.pool(lambda part, weight=weight: widened(weight[part]).abs(), pool, at_once=True)
            for grouping, weight in zip(groupings, weights, strict=True)
        ]
    for layer, score in zip(layers, scores, strict=True):
        layer.score, layer.unpooled, layer.magnitude = score, None, False


def _kernels() -> ModuleType | None:
    return import_module("sparsifai.axes.pooling_triton") if find_spec("triton") else None
