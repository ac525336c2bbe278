"""Scores of the groups of a layer, from the quantities that a criterion names.

A criterion that works element by element is called of one part of a layer after the other, while they are ranked: its
scores are never all in memory. Any other is called once, of the whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..axes.criterion import Criterion, is_elementwise, large_final
from ..axes.grouping import Grouping, squared_sum
from ..axes.ranking.device_layer import DeviceLayer
from ..axes.ranking.scored_layer import ScoredLayer
from ..model.layers import NamedWeight
from ..model.parallel import is_sharded
from ..model.tensors import cloned, widened
from ..support.registry import name_of


def score_layer(
    target: NamedWeight,
    grouping: Grouping,
    mask: Tensor,
    criterion: Criterion,
    values: Mapping[str, Any],
    pool: Callable,
    on_device: bool = False,
    **options: Any,
) -> ScoredLayer | DeviceLayer:
    """Score every group of a layer.

    mask: of the layer, as it is. values: the quantities that the criterion names. on_device: keep all on its GPU; it is
        not looked for NaN then. options: of a ScoredLayer, `revives` and `may_empty`.
    ValueError if the criterion does not return one real score per weight, or, at once or when they are ranked, NaN.
    """
    by_element = is_elementwise(criterion)
    # Single weights are not pooled; but this pooling is a part of its criterion's formula.
    finished = torch.square if grouping.single and pool is squared_sum else (lambda scores: scores)
    if by_element:
        if grouping.single:
            values = {quantity: value.reshape(-1) for quantity, value in values.items()}

        def scores_of(part: slice) -> Tensor:
            return finished(criterion(**{quantity: widened(value[part]) for quantity, value in values.items()}))

    else:
        scores = criterion(**{quantity: _own(value) for quantity, value in values.items()})
        if not isinstance(scores, Tensor) or scores.shape != target.parameter.shape or scores.is_complex():
            got = f"{tuple(scores.shape)}, {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"criterion {name_of(criterion)} must return one real score per weight: for {target.name} a tensor of "
                f"the shape {tuple(target.parameter.shape)}, not {got}"
            )
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        all_scores = finished(scores.flatten() if grouping.single else scores)

        def scores_of(part: slice) -> Tensor:
            return all_scores[part]

    if on_device:
        alive, whole = grouping.gather(mask), not grouping.indexed
        if criterion is large_final and grouping.single and pool is not squared_sum:
            # The ranking takes the absolute values on its way through the weights.
            weight = target.parameter.detach().reshape(-1)
            return DeviceLayer(target, weight, alive, 1, whole, **options, magnitude=True)
        all_of = scores_of(slice(None)) if grouping.single else grouping.pool(scores_of, pool, at_once=True)
        return DeviceLayer(target, all_of.to(mask.device), alive, grouping.size_on(mask.device), whole, **options)
    alive = grouping.gather(mask).cpu().numpy().view()
    alive.flags.writeable = False  # it can be the mask itself
    grid = grouping.named_grid
    if by_element and grouping.single and mask.device.type == "cpu":
        weight = target.parameter.detach()
        if (
            criterion is large_final
            and weight.element_size() >= 4
            and weight.is_contiguous()
            and not is_sharded(weight)
        ):
            return ScoredLayer(target, partial(_magnitude, weight.numpy().reshape(-1)), alive, grid=grid, **options)
        return ScoredLayer(target, lambda part: scores_of(part).numpy(), alive, grid=grid, **options)
    score = (scores_of(slice(None)) if grouping.single else grouping.pool(scores_of, pool)).cpu().numpy()
    size = grouping.size if isinstance(grouping.size, int) else grouping.size.numpy()
    layer = ScoredLayer(target, score.__getitem__, alive, size, not grouping.indexed, grid=grid, **options)
    layer.check(score, alive)
    return layer


def _magnitude(weight: np.ndarray, part: slice) -> np.ndarray:
    """What large_final gives, by numpy: the commonest criterion in half the time."""
    return np.abs(weight[part])


def _own(value: Any) -> Any:
    """A copy of a tensor, so that no criterion can change a weight; all else as it is."""
    return widened(cloned(value)) if isinstance(value, Tensor) else value
