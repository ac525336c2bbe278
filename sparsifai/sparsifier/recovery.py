"""The masks of a model that is sparse already, from its zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..axes.granularity import granularities
from ..model.layers import find_weights, parameter_of
from ..model.prunable import unprunable
from ..model.tensors import check_values
from ..model.zeros import is_nonzero, why_not_plain
from ..support.warning import warn
from .followers import masks_of_followers
from .layer_selection import find_layers
from .model_masks import merged

# A few of ten million randomly drawn weights are exactly zero. Up to this fraction, zeros do not count as pruned.
CHANCE = 1e-5


def recovered_masks(model: nn.Module, masks: Mapping[str, Tensor], example_input: Any = None) -> dict[str, Tensor]:
    """The masks that prune the zeros of a model, and what other masks prune.

    If whole filters are zero, the zeros of their biases and norm layers are pruned too. A layer of zeros only was
    initialized so; none of its weights is pruned.

    Args:
        model: The model, without wrappers.
        masks: Parameter name -> mask of what is pruned in any case.
        example_input: A batch, for models that torch.fx cannot trace.

    Returns:
        Parameter name -> mask.

    Raises:
        ValueError: A parameter has no values.
    """
    check_values("the zeros of a model", dict(model.named_parameters()))
    found, zeros, weights, fixed = {}, 0, 0, unprunable(model)
    for name, weight in find_weights(model).items():
        if weight.sources or weight.names & fixed.keys():  # masks would not hold there
            continue
        kept = is_nonzero(weight.parameter)
        if kept.any():
            kept = kept | ~masks[name] if name in masks else kept
            zeros, weights = zeros + int((~kept).sum()), weights + kept.numel()
            if not kept.all():
                found[name] = kept
    with_filters = any(map(_has_zero_filters, found.values()))
    if zeros > CHANCE * weights or with_filters:
        masks = merged(masks, found)
    if with_filters:
        try:
            masks = merged(masks, _masks_behind_filters(model, example_input))
        except ValueError:  # the data flow cannot be found
            if partly := [name for name, each in model.named_parameters() if each.dim() == 1 and _is_partly_zero(each)]:
                warn(
                    f"whole filters are zero, but the data flow of {type(model).__name__} cannot be found, so that "
                    f"zeros in biases and norm layers behind them, such as {partly[0]}, may not be kept"
                )
    return dict(masks)


def _masks_behind_filters(model: nn.Module, example_input: Any) -> dict[str, Tensor]:
    """The masks that prune the zeros of the biases and norm layers of zero filters."""
    layers, followers, _ = find_layers(
        model, granularities["filter"], layers=lambda name, module: True, example_input=example_input, refuse=False
    )
    zeros = {name: layer.with_mask(layer.mask_of_zeros(), 0.0) for name, layer in layers.items() if layer.is_selected}
    return {
        name: mask | is_nonzero(parameter_of(model, name, mask))
        for name, mask in masks_of_followers(followers, zeros).items()
    }


def _is_partly_zero(parameter: Tensor) -> bool:
    """Whether some entries are zero and others are not."""
    if why_not_plain(parameter):
        return False
    kept = is_nonzero(parameter)
    return bool(kept.any() & ~kept.all())


def _has_zero_filters(kept: Tensor) -> bool:
    """Whether a whole row of the first axis is zero."""
    return not bool(kept.flatten(1).any(1).all())
