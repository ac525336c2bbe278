"""The config of a transformers model that has been made smaller: it says the new widths, or saving is refused.

`from_pretrained` makes a model from its config alone. So a config is changed where one number per width suffices, and
whether it does is tried: a model made from it, without memory, must have the shapes of the smaller model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..model.joint.entries import LISTS
from ..model.joint.groups import READER, JointGroups
from ..model.joint.kinds import contains
from ..support.printable import message_of, printable

# Names of widths in the configs of transformers. Those with a prefix are for modules inside an encoder or a decoder.
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "attention_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_NEURONS = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "ffn_hidden_size", "hidden_dim", "d_ff", "n_inner")
_HEAD_SIZE = "head_dim"
# Sizes of modules that decide what they compute, beside the shapes of their parameters.
_SIZES = (*_HEADS, *_KEY_VALUE_HEADS, "head_dim", "attention_head_size", "num_key_value_groups", "n_rep")

# What to use in place of save_pretrained: where modules are narrower, and where whole ones are gone.
_CUT = "sparsifai.save_shrunk(model, file) and load_shrunk(original_model, file)"
_WHOLE = "torch.save(model, file) and torch.load(file, weights_only=False), since whole modules are removed"


def update_config(model: nn.Module, found: Iterable[JointGroups], original: nn.Module) -> None:
    """Have the configs of a smaller model say its sizes; where they cannot, its `save_pretrained` raises an error.

    Args:
        model: The smaller model, which holds models of transformers, or is one. Others are left as they are.
        found: The joint groups of the larger model, under the names that they have in the smaller one.
        original: The larger model.
    """
    found = list(found)
    for name, pretrained in _outermost(model):
        inside = [(groups, _remaining(model, groups)) for groups in found if contains(name, groups.name)]
        larger: Any = original.get_submodule(name)
        why = _updated(pretrained, [(groups, _without(groups.name, name), left) for groups, left in inside], larger)
        advice = _WHOLE if _has_lost_modules(pretrained, larger) else _CUT
        for part in pretrained.modules():
            if is_pretrained(part):
                vars(part).pop("save_pretrained", None)
                if why:
                    vars(part)["save_pretrained"] = partial(_refuse_to_save, type(part).__name__, why, advice)


def _refuse_to_save(kind: str, why: str, advice: str, *arguments: Any, **named: Any) -> None:
    raise ValueError(f"{kind}.save_pretrained: {why}, so from_pretrained could not load what is saved; use {advice}")


def _has_lost_modules(model: nn.Module, original: nn.Module) -> bool:
    """Whether whole modules, such as residual blocks, have been removed from lists of a model."""
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, LISTS)}
    return any(len(module) != lists.get(name) for name, module in original.named_modules() if isinstance(module, LISTS))


def _is_config(value: Any) -> bool:
    return hasattr(value, "model_type") and hasattr(value, "to_dict")


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of transformers: it has a config and `save_pretrained`."""
    return callable(getattr(type(module), "save_pretrained", None)) and _is_config(getattr(module, "config", None))


def _outermost(model: nn.Module, name: str = "") -> Iterator[tuple[str, Any]]:
    """The models of transformers in a model that are in no other one, by name."""
    if is_pretrained(model):
        yield name, model
    else:
        for child, module in model.named_children():
            yield from _outermost(module, f"{name}.{child}" if name else child)


def _without(name: str, outer: str) -> str:
    return name[len(outer) :].lstrip(".")


def _remaining(model: nn.Module, groups: JointGroups) -> int:
    """How many groups a smaller model still has."""
    part = groups.parts_in(READER)[0]
    return attrgetter(part.name)(model).shape[part.axis] * groups.count // len(part.groups)


def _updated(model: Any, found: list[tuple[JointGroups, str, int]], original: Any) -> str:
    """Change the config of a model; why it cannot say the widths, with the config as before, or empty."""
    configs = {id(part.config): part.config for part in model.modules() if _is_config(vars(part).get("config"))}
    narrower = {groups.what for groups, _, left in found if left < groups.count}
    wanted: dict[tuple[type, str], set[int]] = {}
    for groups, name, left in found:
        if groups.what not in narrower:
            continue
        kind = type(_config_of(model, name))
        for attribute, value in _widths(_config_of(model, name), model.get_submodule(name), groups, left).items():
            wanted.setdefault((kind, attribute), set()).add(value)
    several = next((f"{attribute} would be {sorted(values)}" for (_, attribute), values in wanted.items()
                    if len(values) > 1), "")  # fmt: skip
    if several:
        return f"its layers have different widths ({several})"
    before = [(config, dict(vars(config))) for config in configs.values()]
    try:
        for (kind, attribute), (value,) in wanted.items():
            for config in configs.values():
                if type(config) is kind:
                    setattr(config, attribute, value)
        why = _why_different(model, original)
    except Exception as error:  # a config can refuse any value
        why = f"{type(model.config).__name__} refuses its widths ({message_of(error)})"
    for config, values in before:
        if why:
            vars(config).clear()
            vars(config).update(values)
    if not why:
        for part in model.modules():
            own = vars(part).get("config")
            if _is_config(own) and own is not model.config and own.to_dict() == model.config.to_dict():
                part.config = model.config
    return why


def _config_of(model: Any, name: str) -> Any:
    """The config that a module is made from: its own, or that of the nearest module that it is in."""
    config, part = model.config, model
    for piece in filter(None, name.split(".")):
        part = getattr(part, piece)
        config = vars(part).get("config", config) if _is_config(vars(part).get("config")) else config
    # Parts with a copy of the config of the model, such as an encoder, are made from that.
    return model.config if type(config) is type(model.config) else config


def _named(config: Any, path: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The attributes that a config has: with the prefix of the encoder or decoder of a path, or else without."""
    for prefix in (*(f"{part}_" for part in ("encoder", "decoder") if part in path.split(".")), ""):
        have = {f"{prefix}{name}" for name in names} & vars(config).keys()
        if have:
            return {name: getattr(config, name) for name in have}
    return {}


def _widths(config: Any, module: nn.Module, groups: JointGroups, left: int) -> dict[str, int]:
    """The attributes of a config that say how many groups a module has, with the values for the smaller module."""

    def named(names: tuple[str, ...]) -> dict[str, Any]:
        return _named(config, groups.name, names)

    if groups.what == "neuron":
        values = named(_NEURONS)
        return {name: left for name, value in values.items() if value == groups.count or value is None}
    if groups.what != "head":
        return {}
    widths = {
        name: value * left // groups.count
        for name, value in {**named(_HEADS), **named(_KEY_VALUE_HEADS)}.items()
        if isinstance(value, int) and value % groups.count == 0
    }
    size = getattr(module, _HEAD_SIZE, None)
    is_free = not hasattr(type(config), _HEAD_SIZE) or _HEAD_SIZE in vars(config)
    return {**widths, _HEAD_SIZE: size} if isinstance(size, int) and is_free else widths


def _why_different(model: Any, original: Any) -> str:
    """Why a model that is made from the config has other sizes; empty if it has the same."""
    kind = type(model).__name__
    try:
        config = type(model.config).from_dict(model.config.to_dict())  # as from_pretrained reads it
        with torch.device("meta"):
            made = type(model)(config)
    except Exception as error:  # the code of a model's class can raise anything
        return f"{kind} cannot be made from the config for its sizes ({message_of(error)})"
    shapes = {name: value.shape for name, value in made.state_dict().items()}
    for name, value in model.state_dict().items():
        if shapes.get(name) != value.shape:
            return f"its config cannot say that {printable(name)} has the shape {tuple(value.shape)}"
    missing = [name for name in shapes.keys() & original.state_dict().keys() if name not in model.state_dict()]
    if missing:
        return f"its config cannot say that it has no {printable(min(missing))}"
    modules = dict(made.named_modules())
    for name, module in model.named_modules():
        for attribute in _SIZES:
            value = vars(module).get(attribute)
            if name in modules and value != vars(modules[name]).get(attribute):
                return f"its config cannot say that {attribute} of {printable(name)} is {value}"
    return ""
