"""Removing whole modules: residual blocks and experts that are zero, if that leaves the outputs as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from ..channels.output_check import OutputCheck
from ..layers import parameter_name
from ..running import sharing_copy
from .blocks import find_blocks, has_zero_candidates
from .experts import choosing_tokens, find_experts, remove_experts_from, why_too_few
from .groups import JointGroups
from .joint_removal import Removed
from .removal import removable_groups, remove_groups


def without_wholes(model: nn.Module, example_input: Any) -> tuple[nn.Module, list[Removed]]:
    """A copy of a model without residual blocks and experts that are zero, which shares memory with it.

    Args:
        model: The model, without wrappers. It is not run if it has no such blocks and experts.
        example_input: A batch, a tuple of positional inputs or a dictionary of named ones.

    Returns:
        The copy; the model itself if nothing is removed. And what becomes of each list of blocks and each mixture, if
        any of them has some that are zero.

    Raises:
        ValueError: The model does not run on the example, or has other outputs when run again.
    """
    lists = _rows(model, find_blocks(model, example_input)) if has_zero_candidates(model) else []
    mixtures = _rows(model, find_experts(model))
    blocks, experts = ([row for row in rows if row.zeros] for rows in (lists, mixtures))
    if not blocks and not experts:
        return model, []
    start = sharing_copy(model).eval()
    check = OutputCheck(start, example_input)
    _remove(start, blocks, {row.groups.name: row.zeros for row in blocks}, blocks, check)
    gone = tuple(f"{name}." for row in blocks for name in _names(model, row))
    experts, mixtures = ([row for row in rows if not row.groups.name.startswith(gone)] for rows in (experts, mixtures))
    _remove(start, experts, _unchosen(start, experts, example_input), blocks + experts, check)
    removed = [row for row in blocks + experts if row.removed]
    return (_without(model, removed) if removed else model), lists + mixtures


def _names(model: nn.Module, row: Removed) -> list[str]:
    """Names of the modules that are removed from a list of blocks."""
    assert row.groups.entries is not None
    name, groups = row.groups.entries.name, row.groups.entries.groups
    keys = list(model.get_submodule(name)._modules)
    return [parameter_name(name, key) for key, group in zip(keys, groups, strict=True) if group in row.removed]


def _rows(model: nn.Module, found: Sequence[JointGroups]) -> list[Removed]:
    """What becomes of joint groups, before anything is removed."""
    return [
        Removed(groups, zeros, why_kept=groups.why_kept if zeros else "")
        for groups in found
        if groups.what == "expert" or not groups.why_kept
        for zeros in [np.flatnonzero(removable_groups(model, groups)).tolist()]
    ]


def _unchosen(model: nn.Module, rows: Sequence[Removed], example_input: Any) -> dict[str, list[int]]:
    """The experts that are zero and that no token of an example chooses: name of the mixture -> their numbers.

    Notes why others are kept.
    """
    found: dict[str, list[int]] = {}
    counts = choosing_tokens(model, [row.groups for row in rows], example_input) if rows else []
    for row, tokens in zip(rows, counts, strict=True):
        unchosen = [number for number in row.zeros if tokens is not None and not tokens[number]]
        row.why_kept = row.why_kept or why_too_few(model, row.groups, unchosen)
        if not row.why_kept and tokens is None:
            row.why_kept = "it does not show which tokens choose its experts"
        if row.why_kept:
            continue
        if tokens is not None and (times := tokens[row.zeros].sum()):
            row.why_kept = (
                f"tokens of the example choose them {times} times, so without them the outputs would be others; "
                "remove_experts removes them all the same"
            )
        if unchosen:
            found[row.groups.name] = unchosen
    return found


def _remove(
    model: nn.Module,
    rows: Sequence[Removed],
    wanted: Mapping[str, list[int]],
    everything: Sequence[Removed],
    check: OutputCheck,
) -> None:
    """Note which groups are removed: all that are wanted, or if that changes the outputs, those of single rows.

    Args:
        model: The model in evaluation mode.
        rows: Some lists of blocks, or some mixtures.
        wanted: Name of the list or mixture -> numbers of the groups to remove.
        everything: All rows, also those of which groups are removed already.
        check: The check of the outputs.
    """
    rows = [row for row in rows if row.groups.name in wanted]
    for tried in [rows, *([row] for row in rows)] if len(rows) > 1 else [rows] if rows else []:
        if any(row.removed for row in tried):
            continue
        for row in tried:
            row.removed = wanted[row.groups.name]
        why = check.why_not(_without(model, [row for row in everything if row.removed]))
        for row in tried if why else ():
            row.removed = []
            row.why_kept = why if len(tried) == 1 else row.why_kept


def _without(model: nn.Module, rows: Sequence[Removed]) -> nn.Module:
    """A copy of a model without the groups that are to be removed."""
    copy = sharing_copy(model)
    experts = {row.groups.name: row.removed for row in rows if row.groups.what == "expert"}
    remove_experts_from(copy, experts)
    for row in rows:
        if row.groups.what == "block":
            remove_groups(copy, row.groups, row.removed)
    return copy
