"""Checks whether a saved state fits a Sparsifier, before any of it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..axes.quantity import AVERAGED, STORED
from ..support.printable import printable
from ..support.registry import name_of
from .collection import CollectedQuantities
from .layer import Layers
from .regrowth import Regrowth


def check_state(state: Any, layers: Layers, collected: CollectedQuantities, regrowth: Regrowth | None) -> None:
    """Check that a state fits a Sparsifier.

    Args:
        state: The state, as `Sparsifier.state_dict` returns it.
        layers: The selected layers of the Sparsifier.
        collected: Its criterion and quantities.
        regrowth: Its regrowth, or None.

    Raises:
        ValueError: The state is not that of a Sparsifier with these layers, quantities and regrowth.
        RuntimeError: The state of the random generator is not one.
    """
    if not isinstance(state, Mapping) or not {"masks", "levels", "statistics", "rng"} <= state.keys():
        raise ValueError(
            "load_state_dict: the state lacks the masks, levels, statistics or rng of a Sparsifier; give what "
            "state_dict() returned"
        )
    if ("regrowth" in state) != (regrowth is not None):
        raise ValueError(
            "load_state_dict: only one of the state and this Sparsifier has regrow=; use the same regrow= as when the "
            "state was saved"
        )
    masks = {name: layer.mask for name, layer in layers.items()}
    levels = {name: layer.level for name, layer in layers.items()}
    tables: list[tuple[str, Mapping, Mapping]] = [("mask", masks, state["masks"]), ("level", levels, state["levels"])]
    tables += _quantity_tables(state["statistics"], masks, collected)
    if regrowth is not None:
        if "used" not in state["regrowth"]:
            raise ValueError("load_state_dict: the state lacks the weights that were ever used; save it with regrow=")
        tables += _quantity_tables(state["regrowth"], masks, regrowth)
        tables.append(("used mask", masks, {**masks, **state["regrowth"]["used"]}))
    for what, known, given in tables:
        for name in sorted(known.keys() | given.keys()):
            if _form(given.get(name)) != _form(known.get(name)):
                raise ValueError(
                    f"load_state_dict: the {what} of {printable(name)} is {_form(given.get(name))} in the state and "
                    f"{_form(known.get(name))} here; use the same model, granularity, layers and exclude as when it "
                    "was saved, and freeze the same layers"
                )
    torch.Generator().set_state(state["rng"].cpu())  # else it would fail after half of the state is loaded


def _quantity_tables(
    saved: Any, masks: Mapping[str, Tensor], collected: CollectedQuantities
) -> Iterator[tuple[str, Mapping, Mapping]]:
    """The quantities whose values are compared: (quantity, values here by layer, values in the state by layer)."""
    if not isinstance(saved, Mapping) or not {"stored", "counts", "begins"} <= saved.keys():
        raise ValueError("load_state_dict: the statistics of the state are not those of a Sparsifier")
    stored, fixed, means = saved["stored"], set(collected.at(*STORED)), set(collected.at(*AVERAGED))
    if not fixed <= stored.keys() <= fixed | means:
        raise ValueError(
            f"load_state_dict: the state has the quantities {sorted(stored)}, the criterion "
            f"{name_of(collected.criterion)} needs {sorted(fixed | means)}; use the same criterion"
        )
    unknown = {name for quantity in means & stored.keys() for name in stored[quantity]} - masks.keys()
    if unknown:
        raise ValueError(
            f"load_state_dict: the state has quantities of {printable(sorted(unknown)[0])}, which is not selected "
            "here; use the "
            "same layers and exclude as when it was saved"
        )
    # A mean over batches is compared only if both have it. It can be missing for some layers, or as a whole.
    for quantity in stored.keys() & collected.stored.keys():
        yield quantity, collected.stored[quantity], stored[quantity]


def _form(value: Any) -> str:
    """Kind and shape of an entry, for comparison and for messages."""
    if isinstance(value, Tensor):
        return f"{'bools' if value.dtype == torch.bool else 'numbers'} of the shape {tuple(value.shape)}"
    return "absent" if value is None else "a number"
