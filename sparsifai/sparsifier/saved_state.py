"""Whether a saved state of a Sparsifier fits, before any of it is taken over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..axes.quantity import AVERAGED, STORED
from ..support.registry import name_of
from .collection import CollectedQuantities
from .regrowth import Regrowth


def check_state(
    state: Any,
    masks: Mapping[str, Tensor],
    levels: Mapping[str, float],
    here: CollectedQuantities,
    regrowth: Regrowth | None,
) -> None:
    """ValueError unless `state` has what `state_dict` of a Sparsifier with these masks, levels and quantities has."""
    if not isinstance(state, Mapping) or not {"masks", "levels", "statistics", "rng"} <= state.keys():
        raise ValueError("load_state_dict: the state has not the masks, levels, statistics and rng of a Sparsifier")
    if ("regrowth" in state) != (regrowth is not None):
        raise ValueError(
            "load_state_dict: the state is of a Sparsifier with regrow=, or this is one; use the same regrow="
        )
    tables: list[tuple[str, Mapping, Mapping]] = [("mask", masks, state["masks"]), ("level", levels, state["levels"])]
    tables += _checked_statistics(state["statistics"], masks, here)
    if regrowth is not None:
        if "used" not in state["regrowth"]:
            raise ValueError("load_state_dict: the state does not tell what was ever used, as that of regrow= does")
        tables += _checked_statistics(state["regrowth"], masks, regrowth)
        tables.append(("used mask", masks, {**masks, **state["regrowth"]["used"]}))
    for what, known, given in tables:
        for name in sorted(known.keys() | given.keys()):
            if _form(given.get(name)) != _form(known.get(name)):
                raise ValueError(
                    f"load_state_dict: the {what} of {name} is {_form(given.get(name))} in the state and "
                    f"{_form(known.get(name))} here; use the same model, granularity, layers and exclude as when it "
                    "was saved"
                )
    torch.Generator().set_state(state["rng"].cpu())  # raises here what it would raise half-way


def _checked_statistics(
    statistics: Any, masks: Mapping[str, Tensor], here: CollectedQuantities
) -> Iterator[tuple[str, Mapping, Mapping]]:
    """What of statistics is to be compared by name: what it is, what is here, what is given."""
    if not isinstance(statistics, Mapping) or not {"stored", "counts", "begins"} <= statistics.keys():
        raise ValueError("load_state_dict: the statistics of the state are not those of a Sparsifier")
    stored, fixed, means = statistics["stored"], set(here.at(*STORED)), set(here.at(*AVERAGED))
    if not fixed <= stored.keys() <= fixed | means:
        raise ValueError(
            f"load_state_dict: the state has the quantities {sorted(stored)}, the criterion {name_of(here.criterion)} "
            f"needs {sorted(fixed | means)}; use the same criterion"
        )
    unknown = {name for quantity in means & stored.keys() for name in stored[quantity]} - masks.keys()
    if unknown:
        raise ValueError(f"load_state_dict: the state has quantities of {sorted(unknown)[0]}, which takes no part here")
    # Of means, what is here may have been collected of other layers, or not yet.
    for quantity in stored.keys() & here.stored.keys():
        yield quantity, here.stored[quantity], stored[quantity]


def _form(value: Any) -> str:
    """Kind and shape of an entry, for comparison and for messages."""
    if isinstance(value, Tensor):
        return f"{'bools' if value.dtype == torch.bool else 'numbers'} of the shape {tuple(value.shape)}"
    return "absent" if value is None else "a number"
