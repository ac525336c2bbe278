"""Whether a saved state of a Sparsifier fits, before any of it is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def check_state(
    state: Any,
    masks: Mapping[str, Tensor],
    levels: Mapping[str, float],
    statistics: Mapping[str, Mapping[str, Tensor]],
    criterion: str,
) -> None:
    """ValueError unless `state` has what `state_dict` of a Sparsifier with these masks, levels and statistics has.

    criterion: the name of the one that needs the statistics, for the message.
    """
    if not isinstance(state, Mapping) or not {"masks", "levels", "statistics", "rng"} <= state.keys():
        raise ValueError("load_state_dict: the state has not the masks, levels, statistics and rng of a Sparsifier")
    if state["statistics"].keys() != statistics.keys():
        raise ValueError(
            f"load_state_dict: the state has the quantities {sorted(state['statistics'])}, the criterion {criterion} "
            f"needs {sorted(statistics)}; use the same criterion"
        )
    tables: list[tuple[str, Mapping, Mapping]] = [("mask", masks, state["masks"]), ("level", levels, state["levels"])]
    tables += [(quantity, stored, state["statistics"][quantity]) for quantity, stored in statistics.items()]
    for what, here, given in tables:
        for name in sorted(here.keys() | given.keys()):
            if _form(given.get(name)) != _form(here.get(name)):
                raise ValueError(
                    f"load_state_dict: the {what} of {name} is {_form(given.get(name))} in the state and "
                    f"{_form(here.get(name))} here; use the same model, granularity, layers and exclude as when it "
                    "was saved"
                )
    torch.Generator().set_state(state["rng"].cpu())  # raises here what it would raise half-way


def _form(value: Any) -> str:
    """Kind and shape of an entry, for comparison and for messages."""
    if isinstance(value, Tensor):
        return f"{'bools' if value.dtype == torch.bool else 'numbers'} of the shape {tuple(value.shape)}"
    return "absent" if value is None else "a number"
