"""The KeepSparsity callbacks on a Learner, in a fit of SparsifyCallback: one of them gets all masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..sparsifier.model_masks import merged, prune_any, prunes
from ..support.table import percent
from .display import notify
from .keep import KeepSparsity


@dataclass(eq=False)
class Keepers:
    """What keeps the zeros of a model in a fit.

    Attributes:
        learn: The Learner.
        parts: The parts of the fit, each with what it has pruned; empty as long as nothing is pruned.
        own: The KeepSparsity that the fit gives its masks, in this fit and later ones.
        kept: Parameter name -> mask, of what is kept at zero as long as no part of the fit has pruned anything.
        emptied: The other KeepSparsity callbacks, and the masks that they get back at the end of the fit.
    """

    learn: Any
    parts: list[Any] = field(default_factory=list)
    own: Any = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    emptied: list[tuple[KeepSparsity, Any]] = field(default_factory=list)

    @property
    def all(self) -> list[KeepSparsity]:
        """All that are on the Learner."""
        return list(self.learn._grab_cbs(KeepSparsity))

    def find(self) -> bool:
        """Add one to the Learner, unless an earlier fit left one. Returns whether the Learner had any."""
        keepers = self.all
        for each in keepers:
            each.recover()  # adds the zeros of the model, before any mask changes
        self.own = next((each for each in keepers if each.left_by_fit), None)
        if self.own is None:
            self.own = KeepSparsity()
            self.own.left_by_fit = True
            self.learn.add_cb(self.own)
        self.own.begin()
        return bool(keepers)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks of everything that is kept at zero on the Learner."""
        return _all_of(each.masks for each in self.all)

    def give(self, kept: Mapping[str, Tensor]) -> None:
        """Give all masks to one. The masks of the others would hinder weights from regrowing or reviving.

        Args:
            kept: Parameter name -> mask of everything that is kept at zero on the Learner.
        """
        for each in self.all:
            if each is not self.own:
                self.emptied.append((each, each.masks))
                each.masks = {}
        self.kept = kept
        self.refresh()
        self.own.enforce()

    def refresh(self) -> None:
        """Give it the masks that the parts of the fit have at present."""
        self.own.masks = _all_of(part.pruned.masks for part in self.parts) if self.parts else self.kept
        # In straight-through training, gradients and moments move what is pruned, but not the zeros of others.
        changes = any(part.changes_its_mind for part in self.parts)
        unmoved = (part.pruned.others if part.changes_its_mind else part.pruned.masks for part in self.parts)
        self.own.masks_of_gradients = _all_of(unmoved) if changes else None

    def give_back(self) -> None:
        """Give the others their masks again, or the present ones if pruned weights have come back."""
        for each, masks in self.emptied:
            each.masks = masks if prunes(self.own.masks, masks) else dict(self.own.masks)

    def announce(self, sparsity: float) -> None:
        """Tell the user that one stays on the Learner; or remove it, if nothing is pruned."""
        for each in self.all:
            each.restore()  # an interrupt can come between a step and the event after it
        if self.own.learn is None:  # removed by the user
            return
        if not prune_any(self.own.masks):
            self.learn.remove_cb(self.own)
        elif not self.own.announced:
            self.own.announced = True
            notify(
                self.learn,
                f"KeepSparsity keeps the {percent(sparsity)} of zeros in later fits, too; "
                "learn.remove_cb(KeepSparsity) removes it",
            )


def _all_of(several: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The masks that prune what any of these prune."""
    masks: dict[str, Tensor] = {}
    for each in several:
        masks = merged(masks, each)
    return masks
