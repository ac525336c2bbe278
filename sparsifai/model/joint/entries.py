"""Removing modules from lists of modules, and what models keep of their number and their positions."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from .groups import Entries

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)

# Attributes by which models and configs of different libraries keep the number of blocks.
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks", "depth")
_OF_SIDE = {"encoder": ("encoder_layers", "num_encoder_layers"), "decoder": ("decoder_layers", "num_decoder_layers")}

# Attributes by which a module knows at which position of the list it is, as caches of keys and values are indexed.
_POSITIONS = ("layer_idx", "layer_id", "layer_index", "block_idx")


def remove_entries(model: nn.Module, entries: Entries, removed: Collection[int]) -> None:
    """Remove groups that are entries of a list of modules, in place.

    Entries with numbered names, as those of a ModuleList, are numbered anew, and so is what modules in them keep of
    their position. The config of a transformers model follows.

    Args:
        model: The model.
        entries: The list.
        removed: Numbers of the groups that are removed.
    """
    holder: Any = model.get_submodule(entries.name)
    kept = [place for place, group in enumerate(entries.groups) if group not in removed]
    names, modules = list(holder._modules), list(holder._modules.values())
    renamed = names[: len(kept)] if _are_numbered(names) else [names[place] for place in kept]
    holder._modules.clear()
    holder._modules.update(zip(renamed, (modules[place] for place in kept), strict=True))
    if not entries.are_layers:
        return
    for now, before in enumerate(kept):
        for module in modules[before].modules():
            for attribute in _POSITIONS:
                if vars(module).get(attribute) == before:
                    setattr(module, attribute, now)
    for config in _configs_above(model, entries.name):
        if (stage := _stage_of(model, entries.name)) is None:
            _update_depth(config, entries.name, len(names), kept)
        elif getattr(config, "depths", None):
            depths = [*config.depths[:stage], len(kept), *config.depths[stage + 1 :]]
            config.depths = type(config.depths)(depths)


def _are_numbered(names: list[str]) -> bool:
    """Whether names are those of consecutive numbers, perhaps behind the same beginning: layer_0, layer_1, ..."""
    matches = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    pairs = [(match[1], int(match[2])) for match in matches if match]
    return len(pairs) == len(names) and all(
        pair == (pairs[0][0], pairs[0][1] + place) for place, pair in enumerate(pairs)
    )


def _stage_of(model: nn.Module, name: str) -> int | None:
    """The position of the stage that a list of blocks is in, as in a Swin; None if the list is in no other list."""
    while name:
        name, _, key = name.rpartition(".")
        if isinstance(holder := model.get_submodule(name), LISTS):
            return list(holder._modules).index(key)
    return None


def _configs_above(model: nn.Module, name: str) -> list[Any]:
    """The configs of the modules that a module is in, from the model inwards."""
    configs, module = [getattr(model, "config", None)], model
    for piece in filter(None, name.split(".")):
        module = getattr(module, piece)
        configs.append(getattr(module, "config", None))
    return list({id(config): config for config in configs if hasattr(config, "__dict__")}.values())


def configs_in(model: nn.Module) -> list[Any]:
    """The configs of a model and of the modules in it."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in configs if hasattr(config, "__dict__")}.values())


def _update_depth(config: Any, name: str, before: int, kept: list[int]) -> None:
    """Set the number of blocks in a config, and shorten its lists with one entry per block.

    name: that of the list of blocks, which says whether it is an encoder or a decoder. before: how many blocks it had.
    """
    side = next((piece for piece in reversed(name.split(".")) if piece in _OF_SIDE), "")
    of_both = getattr(config, "is_encoder_decoder", False)
    depths = _OF_SIDE.get(side, ()) + (() if of_both and side == "decoder" else DEPTHS)
    found = [attribute for attribute in depths if getattr(config, attribute, None) == before]
    for attribute in found:
        if getattr(config, attribute) == before:  # several names can be one number
            setattr(config, attribute, len(kept))
    for attribute, value in list(vars(config).items()) if found else ():
        if "layer" not in attribute or not isinstance(value, (list, tuple)):
            continue
        if len(value) == before:
            setattr(config, attribute, type(value)(value[place] for place in kept))
        elif value and all(type(each) is int and 0 <= each < before for each in value):
            setattr(config, attribute, type(value)(kept.index(each) for each in value if each in kept))
    stages = getattr(config, "stage_names", None)  # of a backbone: the stem, and one for each block
    if found and isinstance(stages, list) and len(stages) == before + 1:
        places = [
            sum(place < stage % len(stages) for place in kept) for stage in getattr(config, "_out_indices", None) or []
        ]
        config.stage_names = stages[: len(kept) + 1]
        if places:
            vars(config).update(_out_indices=places, _out_features=[stages[place] for place in places])
