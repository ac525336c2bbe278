"""Regrowth: pruned weights become active again while the sparsity stays, so that training finds where weights belong.

At an update the Sparsifier prunes a fraction of the remaining weights by its own criterion, and regrows as many by a
second one: by the gradient of pruned weights in RigL (Evci et al., 2020, arXiv:1911.11134), at random in SET (Mocanu
et al., 2018, arXiv:1707.04780). The context ranks both times, first for the higher sparsity, then for the lower one.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from ..axes.criterion import criteria, quantities_of
from ..axes.quantity import CALIBRATED, quantities
from ..support.capability import capability
from ..support.printable import printable
from ..support.registry import name_of
from .collection import CollectedQuantities, Source
from .layer import Layers, count_of


class Regrowth(CollectedQuantities):
    """The criterion by which weights regrow, the quantities that it names, and the weights that were ever active.

    Attributes:
        used: Parameter name -> bool tensor in the shape of its mask: kept by any mask since the first.
    """

    def __init__(self, criterion: Any, source: Source):
        super().__init__(criterion, source)
        self.used: dict[str, Tensor] = {}

    def how(self, moments: Container[str]) -> str:
        """The call by which users collect gradients."""
        return "collect_gradients() after a backward, before gradients are masked,"

    def after(self, moment: str, names: Iterable[str] | None = None) -> dict[str, Any]:
        """What `CollectedQuantities.after` returns. After an update, the gradients of earlier batches are dropped."""
        attributes = super().after(moment, names)
        if moment == "update":
            begins = attributes["begins"]
            for kind, values in (("stored", attributes["stored"]), ("counts", self.counts)):
                attributes[kind] = {quantity: each for quantity, each in values.items() if quantity not in begins}
        return attributes

    def used_with(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that were ever used, if these masks are used next."""
        known = {name: self.used[name].to(mask.device) | mask for name, mask in masks.items() if name in self.used}
        return {**self.used, **masks, **known}

    def explored(self, layers: Layers) -> float:
        """Fraction of the weights that were ever used."""
        return count_of(each.with_mask(self.used.get(name, each.mask), 0) for name, each in layers.items()).density

    def share(self, name: str) -> str:
        """The fraction of a layer that was ever used, for the report."""
        used = self.used.get(name)
        return "" if used is None else f"{float(used.float().mean()):.0%} ever used"

    def state(self) -> dict[str, Any]:
        """The stored values, the number of batches in each mean, and the weights that were ever used."""
        return {**super().state(), "used": dict(self.used)}


def check_regrow(regrow: Any, context: Any) -> Any:
    """The criterion by which weights regrow, by name or as a function.

    Raises:
        ValueError: The criterion needs more than gradients, or the context prunes a fixed number of every block.
    """
    criterion = criteria.resolve(regrow)

    def is_unseen(quantity: str) -> bool:
        return bool(set(CALIBRATED) & set(quantities[quantity].moments))  # type: ignore[attr-defined]

    if unseen := [quantity for quantity in quantities_of(criterion) if is_unseen(quantity)]:
        raise ValueError(
            f"regrow={name_of(criterion)} needs {printable(unseen[0])}, which a backward pass does not give; choose "
            f"'grad', 'random', or a function of {', '.join(name for name in quantities if not is_unseen(name))}"
        )
    if capability(context, "highest_sparsity") is not None:
        instead = capability(context, "instead")
        other = "a context without a highest sparsity" if instead is None else f"context={instead}"
        raise ValueError(
            f"regrow: regrowth first prunes more than context {name_of(context)} allows; use {other}, which ends at "
            "the same sparsity"
        )
    return criterion


def check_drop(drop: Any, regrows: bool = True) -> float:
    """Check `drop`, the fraction of the remaining weights that is pruned and regrown.

    Args:
        drop: A number from 0 to less than 1.
        regrows: Whether a criterion says which weights regrow.

    Raises:
        ValueError: It is no such number, or it is above 0 and nothing says what regrows.
    """
    if isinstance(drop, bool) or not isinstance(drop, Real) or not 0 <= float(drop) < 1:
        raise ValueError(
            f"drop is the fraction of the remaining weights that is pruned and regrown, from 0 to less than 1, "
            f"not {drop!r}"
        )
    if drop and not regrows:
        raise ValueError(f"drop={drop!r}: nothing says what regrows; make the Sparsifier with regrow=")
    return float(drop)


def sparsity_of_drop(sparsity: float, drop: float) -> float:
    """1 - (1 - s)(1 - d): the sparsity when a fraction d of the weights remaining at s is pruned as well.

    >>> round(sparsity_of_drop(0.9, 0.3), 3)
    0.93
    """
    return 1 - (1 - sparsity) * (1 - drop)
