"""Masks that come from elsewhere: checked against the layers, and read from checkpoints that torch has pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..model.tensors import computable
from ..model.zeros import why_not_plain
from ..support.arguments import checks_arguments
from ..support.printable import printable
from ..support.registry import close_matches
from .layer import Layer, Layers
from .masking import zero_masked

# What wrappers of torch put before the names of parameters.
_PREFIXES = ("module.", "_orig_mod.")


def check_masks(masks: Any, layers: Layers, may_empty: bool = False) -> dict[str, Tensor]:
    """Check masks from elsewhere.

    Args:
        masks: Parameter name -> tensor of bools, or of zeros and ones, that broadcasts to the weight.
        layers: All layers of the Sparsifier.
        may_empty: Whether a layer may lose all its groups.

    Returns:
        Layer name -> bool per group, False where it is pruned.

    Raises:
        TypeError: `masks` is no dictionary, or a value is no tensor.
        ValueError: A name is not that of a selected layer, or a mask does not fit.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"set_masks: masks must be a dictionary from parameter names to masks, not {masks!r:.80}")
    kept = {}
    for given, mask in masks.items():
        name = _without_prefixes(str(given), layers)
        if name not in layers:
            raise ValueError(
                f"set_masks: the model has no weight with named axes {given!r}; {close_matches(name, layers)}"
            )
        if name in kept:
            raise ValueError(
                f"set_masks: there are two masks of {printable(name)}, with a prefix and without; pass one of them"
            )
        if layers[name].why_dense:
            raise ValueError(
                f"set_masks: {printable(name)} stays dense ({layers[name].why_dense}), so it has no mask; name it in "
                "layers= of the Sparsifier"
            )
        kept[name] = _kept_groups(name, mask, layers[name])
        if not (kept[name].any() or may_empty or not layers[name].grouping.indexed):
            raise ValueError(
                f"set_masks: the mask of {printable(name)} prunes the whole layer; keep at least one group of it, or "
                "make the Sparsifier with may_empty=True"
            )
    return kept


def _without_prefixes(name: str, layers: Layers) -> str:
    """The name of a parameter without what wrappers of torch put before it; unchanged if it is that of a layer."""
    while name not in layers and name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _kept_groups(name: str, mask: Any, layer: Layer) -> Tensor:
    """Bool per group of a layer, by a mask."""
    if why := why_not_plain(mask) if isinstance(mask, Tensor) else f"of type {type(mask).__name__}":
        raise TypeError(f"set_masks: the mask of {printable(name)} must be a dense tensor with values, but it is {why}")
    shape = layer.parameter.shape
    if mask.dim() != len(shape) or any(size not in (1, full) for size, full in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"set_masks: the mask of {printable(name)} has the shape {tuple(mask.shape)}, which does not fit its "
            f"weight of {tuple(shape)}; an axis has its size or 1"
        )
    numbers = computable(mask)
    if mask.dtype != torch.bool and not ((numbers == 0) | (numbers == 1)).all():
        raise ValueError(
            f"set_masks: the mask of {printable(name)} must be of bools, or of 0 and 1; compare it: mask > threshold"
        )
    full = (numbers != 0).to(layer.parameter.device).expand(shape)
    kept, lost = layer.grouping.any_of(full), layer.grouping.any_of(~full)
    if (kept & lost).any():
        raise ValueError(
            f"set_masks: the mask of {printable(name)} prunes parts of {int((kept & lost).sum())} groups, which this "
            "granularity keeps or prunes as a whole; use granularity='weight'"
        )
    return kept


@checks_arguments
def from_torch_prune(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split a checkpoint of a model that torch.nn.utils.prune has pruned into weights and masks.

    Such a checkpoint has `weight_orig` and `weight_mask` in place of each pruned `weight`.

    Args:
        state: The state_dict.

    Returns:
        A state_dict with the usual names, where pruned weights are zero, for `model.load_state_dict`. And parameter
        name -> bool mask, for `Sparsifier.set_masks`.

    Raises:
        TypeError: `state` is no dictionary.
        ValueError: An original weight has no mask, or none is there at all; a mask does not fit its weight or is not of
            zeros and ones; or one of them has no values that can be masked.

    Example:
        >>> state = {"0.weight_orig": torch.tensor([[1.0, 2.0]]), "0.weight_mask": torch.tensor([[0.0, 1.0]])}
        >>> from_torch_prune(state)
        ({'0.weight': tensor([[0., 2.]])}, {'0.weight': tensor([[False,  True]])})
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"from_torch_prune: state must be a state_dict, not {type(state).__name__}; pass model.state_dict()"
        )
    if other := [name for name in state if not isinstance(name, str)]:
        raise ValueError(f"from_torch_prune: keys must be names of parameters, not {other[0]!r:.80}; pass a state_dict")
    pruned = {name.removesuffix("_orig") for name in state if name.endswith("_orig")}
    unmasked = [name for name in sorted(pruned) if f"{name}_mask" not in state]  # masks of attention have no _orig
    if unmasked or not pruned:
        missing = f"{printable(unmasked[0])} has no mask" if unmasked else "it has none"
        raise ValueError(
            f"from_torch_prune: a checkpoint of torch.nn.utils.prune has NAME_orig and NAME_mask, but {missing}; load "
            "it as it is"
        )
    masks = {name: _mask_of_prune(name, state) for name in sorted(pruned)}
    weights: dict[str, Any] = {}
    for name, value in state.items():
        plain = name.removesuffix("_orig").removesuffix("_mask")
        if plain not in pruned:
            weights[name] = value
        elif name.endswith("_orig"):
            weights[plain] = value.detach().clone()
            zero_masked(weights[plain], masks[plain])
    return weights, masks


def _mask_of_prune(name: str, state: Mapping[str, Any]) -> Tensor:
    """The bool mask of a weight that torch.nn.utils.prune has pruned, checked."""
    weight, mask = state[f"{name}_orig"], state[f"{name}_mask"]
    for what, value in ((f"{name}_orig", weight), (f"{name}_mask", mask)):
        if why := why_not_plain(value) if isinstance(value, Tensor) else f"of type {type(value).__name__}":
            raise ValueError(f"from_torch_prune: {printable(what)} cannot be masked, because it is {why}")
    if weight.shape != mask.shape:
        raise ValueError(
            f"from_torch_prune: {printable(name)}_mask has the shape {tuple(mask.shape)} and its _orig "
            f"{tuple(weight.shape)}; pass the state_dict of one model"
        )
    numbers = computable(mask)
    if not ((numbers == 0) | (numbers == 1)).all():  # torch multiplies by it
        raise ValueError(
            f"from_torch_prune: {printable(name)}_mask has other values than 0 and 1; call prune.remove of each layer, "
            "and save the model again"
        )
    if name in state:
        raise ValueError(
            f"from_torch_prune: the checkpoint has both {printable(name)} and the same name with _orig; remove the one "
            "that is not that of the model"
        )
    return (numbers != 0).to(weight.device)
