"""Experts of mixtures as joint groups: all weights of an expert, with its row of the router.

A mixture is found by what it has: a router with as many outputs as there are experts, and the experts, stacked in
parameters with an axis 'expert' or in a list of modules.

The row of the router is removed with its expert, but not pruned before: a row of zeros would not mean that the router
never chooses the expert, but that it always scores 0. As long as the expert is there, the router can learn to avoid it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..hooks import hooked
from ..layers import axes_of, find_weights, parameter_name
from ..running import check_runs, evaluating, untraced, without_fast_path
from .entries import configs_in
from .groups import FOLLOWER, TABLE, WEIGHT, Entries, JointGroups, Part, number_in, sizes_in
from .removal import removable_groups, remove_groups

_ROUTERS = ("gate", "router", "gating")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("top_k", "num_experts_per_tok", "moe_top_k")
_GROUPS = ("n_group", "num_group", "num_expert_group")


def find_experts(model: nn.Module) -> list[JointGroups]:
    """The experts of all mixtures of a model, in the order of its modules.

    Args:
        model: The model, without wrappers.
    """
    return [groups for name, module in model.named_modules() if (groups := _experts_of(module, name)) is not None]


def layers_of_zero_experts(model: nn.Module) -> set[str]:
    """Names of the layers in those experts of lists that are zero."""
    names = set()
    for groups in find_experts(model):
        zero = np.flatnonzero(removable_groups(model, groups))
        own = (part for part in groups.parts_in(WEIGHT) if part.axis is None and np.isin(part.groups, zero).all())
        names |= {part.name.rpartition(".")[0] for part in own}
    return names


def _experts_of(module: nn.Module, name: str) -> JointGroups | None:
    """The experts of a mixture; None if a module is none."""
    router = next((key for key in _ROUTERS if isinstance(getattr(module, key, None), nn.Module)), None)
    if router is None:
        return None
    rows = dict(getattr(module, router).named_parameters())
    counts = {len(value) for value in rows.values() if value.dim() == 2}
    if len(counts) != 1 or (count := counts.pop()) < 2:
        return None
    rows |= dict(getattr(module, router).named_buffers())
    numbers = np.arange(count)
    parts, entries = _stacked(module, name, count), None
    if not parts:
        parts, entries = _listed(module, name, count)
    if not parts:
        return None
    parts += [
        Part(parameter_name(name, f"{router}.{each}"), 0, numbers, TABLE)
        for each, value in rows.items()
        if value.dim() and len(value) == count
    ]
    inside = list(module.named_modules(prefix=name))
    groups = number_in((part for _, part in inside), _GROUPS) or 1
    why = f"its router chooses among {groups} groups of experts, which must be of one size" if groups > 1 else ""
    return JointGroups(
        name, "expert", count, tuple(parts), sizes_in(inside, dict.fromkeys(_COUNTS, 1), count), why, entries=entries
    )


def _stacked(module: nn.Module, name: str, count: int) -> list[Part]:
    """The parts of experts that are stacked in parameters with an axis 'expert'."""
    parts, numbers = [], np.arange(count)
    for inside, layer in module.named_modules():
        for attribute, value in layer.named_parameters(recurse=False):
            axes, place = axes_of(layer, attribute) or (), parameter_name(parameter_name(name, inside), attribute)
            if "expert" in axes and value.dim() == len(axes) and value.shape[axes.index("expert")] == count:
                parts.append(Part(place, axes.index("expert"), numbers))
            elif "bias" in attribute and value.dim() == 2 and len(value) == count:
                parts.append(Part(place, 0, numbers, FOLLOWER))
    return parts if any(part.role == WEIGHT for part in parts) else []


def _listed(module: nn.Module, name: str, count: int) -> tuple[list[Part], Entries | None]:
    """The parts of experts that are modules in a list, and that list."""
    for key, holder in module.named_children():
        if not isinstance(holder, (nn.ModuleList, nn.ModuleDict)) or len(holder) != count:
            continue
        path, parts = parameter_name(name, key), []
        for number, (of_expert, expert) in enumerate(holder.named_children()):
            named = find_weights(expert)
            for each, value in expert.named_parameters():
                role = WEIGHT if each in named else FOLLOWER
                if role == WEIGHT or value.dim() in (1, 2):
                    parts.append(Part(f"{path}.{of_expert}.{each}", None, np.array([number]), role))
        return parts, Entries(path, np.arange(count))
    return [], None


def choosing_tokens(model: nn.Module, found: Sequence[JointGroups], example_input: Any) -> list[np.ndarray | None]:
    """How many tokens of an example choose each expert; None for a mixture that does not show it.

    Args:
        model: The model, without wrappers.
        found: Its experts.
        example_input: A batch, which is run through the model once.

    Raises:
        ValueError: The model does not run on the example.
    """
    counts: list[np.ndarray | None] = [None] * len(found)

    def counter(place: int, number: int | None) -> Any:
        def count(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
            given = [each for each in tree_leaves((inputs, named)) if isinstance(each, Tensor)]
            before = counts[place]
            now = np.zeros(found[place].count, np.int64) if before is None else before
            if number is not None:
                now[number] += given[0].shape[:-1].numel()
            elif chosen := [each for each in given if not each.is_floating_point() and each.dim() == 2]:
                now += np.bincount(chosen[0].flatten().cpu().numpy(), minlength=len(now))[: len(now)]
            else:
                return
            counts[place] = now

        return count

    before = []
    for place, groups in enumerate(found):
        if groups.entries is not None:
            counts[place] = np.zeros(groups.count, np.int64)
            entries = enumerate(model.get_submodule(groups.entries.name).children())
            before += [(entry, counter(place, number)) for number, entry in entries]
        else:
            holder = next(part.name for part in groups.parts_in(WEIGHT)).rpartition(".")[0]
            before.append((model.get_submodule(holder), counter(place, None)))
    with evaluating(model), untraced(model), torch.no_grad(), without_fast_path(), hooked(before=before):
        check_runs(model, example_input)
    return counts


def why_too_few(model: nn.Module, groups: JointGroups, removed: Sequence[int] | np.ndarray) -> str:
    """Why some experts cannot be removed, because too few would be left; empty if they can."""
    chosen = number_in(model.get_submodule(groups.name).modules(), _CHOSEN) or 1
    left = groups.count - len(removed)
    if left >= chosen:
        return ""
    return (
        f"only {left} of {groups.count} experts would be left, but its router chooses {chosen} for each token; prune "
        "fewer, with context 'local' the same number in each mixture"
    )


def remove_experts_from(model: nn.Module, removed: Mapping[str, Sequence[int] | np.ndarray]) -> None:
    """Remove experts, in place. What the model and its config keep of their number follows if all mixtures have one.

    Args:
        model: The model.
        removed: Name of a mixture -> numbers of the experts.
    """
    found = find_experts(model)
    before = {groups.count for groups in found}
    for groups in found:
        remove_groups(model, groups, removed.get(groups.name, ()))
    after = {groups.count - len(removed.get(groups.name, ())) for groups in found}
    if len(before) == len(after) == 1:
        (old,), (new,) = before, after
        for holder in (model, *configs_in(model)):
            for attribute in _COUNTS:
                if getattr(holder, attribute, None) == old:
                    setattr(holder, attribute, new)
