"""Regrowth: at constant sparsity some weights fall and as many come back, so that training finds where they belong.

A share of what is left falls by the criterion of the Sparsifier, and the same amount comes back by another: by the
gradient that zeros have in RigL (Evci et al., 2020, arXiv:1911.11134), at random in SET (Mocanu et al., 2018,
arXiv:1707.04780). The context answers both times, as for a sparsity that rises and one that falls.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from ..axes.criterion import criteria, quantities_of
from ..axes.n_of_m import Blocks
from ..axes.quantity import QuantitySource, quantities
from ..support.registry import name_of
from .collection import CollectedQuantities


class Regrowth(CollectedQuantities):
    """What comes back: a criterion, the quantities that it names, and which weights were ever used.

    used: parameter name -> bool in the shape of its mask, of what any masks since the first have left alive.
    """

    def __init__(self, regrow: Any):
        criterion = criteria.resolve(regrow)
        super().__init__(quantities_of(criterion), criterion)
        if unseen := self.at("forward", "loss"):
            raise ValueError(
                f"regrow={name_of(criterion)} needs {unseen[0]}, which no backward pass gives; choose 'grad', "
                f"'random', or a function of {', '.join(name for name in quantities if not self._is_unseen(name))}"
            )
        self.used: dict[str, Tensor] = {}

    @staticmethod
    def _is_unseen(quantity: str) -> bool:
        return bool({"forward", "loss"} & set(quantities[quantity].moments))  # type: ignore[attr-defined]

    def check(self, context: Any, drops_outputs: bool) -> None:
        """ValueError if nothing can fall for something to come back; a warning if what comes back stays dead."""
        context = getattr(context, "context", context)  # that of bounded
        if isinstance(context, Blocks) and context.exact:
            raise ValueError(
                f"regrow: more than {context.__name__} allows for has to fall before as much comes back; choose "
                f"context=blocks({context.size}), which ends at the sparsity that is asked for all the same"
            )
        if drops_outputs:
            warnings.warn(
                "regrow: whole outputs that come back start at zero, and so does what stands behind them: no gradient "
                "reaches them behind a ReLU or a norm layer; choose smaller groups, such as kernels or weights",
                stacklevel=3,
            )

    def how(self, moments: Container[str]) -> str:
        """How to have gradients seen."""
        return "collect_gradients() after a backward, before they are masked,"

    def take(self, moment: str, source: QuantitySource) -> None:
        """As Statistics; but after an update, gradients of earlier batches are let go of."""
        super().take(moment, source)
        if moment == "update":
            for quantity in self.begins & self.stored.keys():
                del self.stored[quantity], self.counts[quantity]

    def note(self, masks: Mapping[str, Tensor]) -> None:
        """Take into what was used what these masks leave alive."""
        for name, mask in masks.items():
            self.used[name] = self.used[name].to(mask.device) | mask if name in self.used else mask

    def share(self, name: str) -> str:
        """How much of a layer was used, for the report."""
        used = self.used.get(name)
        return "" if used is None else f"{float(used.float().mean()):.0%} ever used"

    def state(self) -> dict[str, Any]:
        """What is stored, of how many batches, and what was used."""
        return {**super().state(), "used": dict(self.used)}

    def restore(self, state: Mapping[str, Any], source: QuantitySource) -> None:
        """Take over what `state` gave, on the devices of the parameters."""
        super().restore(state, source)
        self.used = {name: used.to(source.targets[name].parameter.device) for name, used in state["used"].items()}


def check_drop(drop: Any, regrows: bool = True) -> float:
    """A share from 0 to less than 1. regrows: whether anything says what comes back."""
    if isinstance(drop, bool) or not isinstance(drop, Real) or not 0 <= float(drop) < 1:
        raise ValueError(f"drop is the share of what is left that falls, from 0 to less than 1, not {drop!r}")
    if drop and not regrows:
        raise ValueError(f"drop={drop!r}: nothing says what comes back; make the Sparsifier with regrow=")
    return float(drop)


def sparsity_of_drop(sparsity: float, drop: float) -> float:
    """1 - (1 - s)(1 - d): where a share d of what is left at s has fallen, too.

    >>> round(sparsity_of_drop(0.9, 0.3), 3)
    0.93
    """
    return 1 - (1 - sparsity) * (1 - drop)
