"""Removing whole modules: residual blocks and experts that are zero, if that leaves the outputs as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from ..channels.output_check import OutputCheck
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
        The copy; the model itself if nothing is removed. And what becomes of each list of blocks and each mixture that
        has some that are zero.

    Raises:
        ValueError: The model does not run on the example, or has other outputs when run again.
    """
    blocks = _rows(model, find_blocks(model, example_input)) if has_zero_candidates(model) else []
    experts = _rows(model, find_experts(model))
    if not blocks and not experts:
        return model, []
    start = sharing_copy(model).eval()
    check = OutputCheck(start, example_input)
    _remove(start, blocks, blocks, check)
    gone = tuple(f"{name}." for row in blocks for name in _names(model, row))
    experts = [row for row in experts if not row.groups.name.startswith(gone)]
    _refuse_chosen(start, experts, example_input)
    _remove(start, [row for row in experts if not row.why_kept], blocks + experts, check)
    removed = [row for row in blocks + experts if row.removed]
    return (_without(model, removed) if removed else model), blocks + experts


def _names(model: nn.Module, row: Removed) -> list[str]:
    """Names of the modules that are removed from a list of blocks."""
    assert row.groups.entries is not None
    name, groups = row.groups.entries.name, row.groups.entries.groups
    keys = list(model.get_submodule(name)._modules)
    return [f"{name}.{key}" for key, group in zip(keys, groups, strict=True) if group in row.removed]


def _rows(model: nn.Module, found: Sequence[JointGroups]) -> list[Removed]:
    """What becomes of joint groups of which some are zero, before anything is removed."""
    rows = [
        Removed(groups, np.flatnonzero(removable_groups(model, groups)).tolist(), why_kept=groups.why_kept)
        for groups in found
        if groups.what == "expert" or not groups.why_kept
    ]
    return [row for row in rows if row.zeros]


def _refuse_chosen(model: nn.Module, rows: Sequence[Removed], example_input: Any) -> None:
    """Note why experts are kept that tokens of the example choose, or without which too few are left."""
    if not rows:
        return
    for row, tokens in zip(rows, choosing_tokens(model, [row.groups for row in rows], example_input), strict=True):
        row.why_kept = row.why_kept or why_too_few(model, row.groups, row.zeros)
        if not row.why_kept and tokens is None:
            row.why_kept = "it does not show which tokens choose its experts"
        elif not row.why_kept and tokens is not None and (times := tokens[row.zeros].sum()):
            row.why_kept = (
                f"tokens of the example choose them {times} times, so without them the outputs would be others; "
                "remove_experts removes them all the same"
            )


def _remove(model: nn.Module, rows: Sequence[Removed], everything: Sequence[Removed], check: OutputCheck) -> None:
    """Note which groups are removed: all of them, or if that changes the outputs, those of each row that does not.

    everything: All rows, also those of which groups are removed already.
    """
    for tried in [rows, *([row] for row in rows)] if len(rows) > 1 else [rows] if rows else []:
        if any(row.removed for row in tried):
            continue
        for row in tried:
            row.removed = row.zeros
        why = check.why_not(_without(model, [row for row in everything if row.removed]))
        for row in tried if why else ():
            row.removed = []
        if len(tried) == 1:
            tried[0].why_kept = why


def _without(model: nn.Module, rows: Sequence[Removed]) -> nn.Module:
    """A copy of a model without the groups that are to be removed."""
    copy = sharing_copy(model)
    experts = {row.groups.name: row.removed for row in rows if row.groups.what == "expert"}
    remove_experts_from(copy, experts)
    for row in rows:
        if row.groups.what == "block":
            remove_groups(copy, row.groups, row.removed)
    return copy
