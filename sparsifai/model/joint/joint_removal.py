"""Removing the joint groups of a model that have no effect: heads and neurons that its zeros make unnecessary."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import nn

from ..channels.smaller_copy import SmallerCopy
from ..layers import CHANNEL_LAYERS, axes_of
from .adapting import multiple_of, why_not_removed
from .groups import NO_GROUP, JointGroups
from .removal import removable_groups, remove_groups

# How often a smaller copy is run to find the modules whose groups cannot be removed.
MOST_TRIALS = 32

Finder = Callable[[nn.Module], list[JointGroups]]


@dataclass
class Removed:
    """What becomes of the joint groups of one attention or MLP.

    Attributes:
        groups: The groups.
        zeros: Numbers of the groups without effect.
        multiple: What the number of groups that remain must be a multiple of.
        removed: Numbers of those that are removed.
        why_kept: Why the others are kept.
    """

    groups: JointGroups
    zeros: list[int]
    multiple: int = 1
    removed: list[int] = field(default_factory=list)
    why_kept: str = ""

    @property
    def wanted(self) -> list[int]:
        """Numbers of the groups to remove: those without effect, but not the last ones of the module."""
        remaining = max(self.groups.count - len(self.zeros), 1)
        remaining += -remaining % self.multiple
        return self.zeros[len(self.zeros) - (self.groups.count - remaining) :]


class JointRemoval:
    """Removal of joint groups from a copy of a model.

    Args:
        copy: The copy, which gets smaller.
        finders: Functions of a model that return its joint groups.

    Attributes:
        rows: What becomes of the groups of each attention and MLP.
        remaining: Layer name -> the outputs that it still has, of layers that have lost some.
    """

    def __init__(self, copy: SmallerCopy, finders: Iterable[Finder]):
        self._copy = copy
        self.remaining: dict[str, list[int]] = {}
        self.rows = [
            Removed(
                groups,
                np.flatnonzero(removable_groups(copy.model, groups)).tolist(),
                multiple_of(copy.model, groups),
            )
            for find in finders
            for groups in find(copy.model)
        ]

    def remove_all(self) -> JointRemoval:
        """Remove the groups without effect, in as many modules as that is possible; returns itself.

        If the outputs of the copy change, those of some modules stay: halves of the modules are tried, so that few
        trials tell them apart. After `MOST_TRIALS` trials all others stay, too.
        """
        wanted = []
        for row in self.rows:
            if not row.wanted:
                continue
            row.why_kept = row.groups.why_kept or why_not_removed(self._copy.model, row.groups)
            if not row.why_kept:
                wanted.append(row)
        self._remove(wanted)
        for row in self.rows:
            if not row.why_kept and len(row.removed) < len(row.zeros):
                row.why_kept = (
                    f"last {row.groups.what}"
                    if row.multiple == 1
                    else f"stacked experts need widths that are multiples of {row.multiple}; prune with "
                    f"round_to={row.multiple}"
                )
        return self

    def _remove(self, rows: list[Removed]) -> None:
        """Remove the groups of some modules: all at once, or in parts, the largest first, if that fails."""
        waiting = deque([rows] if rows else [])
        for _ in range(MOST_TRIALS):
            if not waiting:
                return
            part = waiting.popleft()
            why = self._copy.try_change(partial(_cut, part))
            if not why:
                for row in part:
                    row.removed = row.wanted
                    self._count(row)
            elif len(part) == 1:
                part[0].why_kept = why
            else:
                waiting += self._parts(part)
        for row in (row for part in waiting for row in part):
            row.why_kept = f"not tried: {MOST_TRIALS} trials have not found all modules whose groups must stay"

    def _parts(self, rows: list[Removed]) -> list[list[Removed]]:
        """The rows of each class, since mostly all modules of a class must stay; halves if they have one class."""
        kinds = dict.fromkeys(self._kind(row) for row in rows)
        if len(kinds) > 1:
            return [[row for row in rows if self._kind(row) == kind] for kind in kinds]
        return [rows[: len(rows) // 2], rows[len(rows) // 2 :]]

    def _kind(self, row: Removed) -> tuple[str, type[nn.Module]]:
        return row.groups.what, type(self._copy.model.get_submodule(row.groups.name))

    def _count(self, row: Removed) -> None:
        """Note which outputs the layers of a module still have."""
        for part in row.groups.parts:
            name, _, attribute = part.name.rpartition(".")
            layer = self._copy.model.get_submodule(name)
            axes = axes_of(layer, attribute) or ()
            axis = None if part.axis is None else axes[part.axis : part.axis + 1]
            if isinstance(layer, CHANNEL_LAYERS) and axis == ("out",):
                kept = (part.groups == NO_GROUP) | ~np.isin(part.groups, row.removed)
                self.remaining[name] = np.flatnonzero(kept).tolist()


def _cut(rows: Iterable[Removed], model: nn.Module) -> None:
    for row in rows:
        remove_groups(model, row.groups, row.wanted)
