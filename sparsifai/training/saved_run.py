"""The file of a run of lottery tickets: write it, read it, and compare its settings with those of a new call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn

from ..support.checkpoints import load_checkpoint
from ..support.files import write_whole
from ..support.registry import name_of


def save_run(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Write a file whole or not at all, as `write_whole` does."""
    write_whole(path, lambda file: torch.save(state, file))


def load_run(path: str | os.PathLike) -> dict[str, Any]:
    """Read what `save_run` wrote, without running any code in it.

    Args:
        path: The file.

    Returns:
        A dictionary with the keys "tickets", "metric" and "start", and "run" if the run can be resumed.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file does not hold lottery tickets.
    """
    try:
        state = load_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a file of lottery tickets ({error})") from None
    if not isinstance(state, dict) or not {"tickets", "metric", "start"} <= state.keys():
        raise ValueError(f"{path} is not a file of lottery tickets: it has no tickets, metric and start")
    return state


def check_same_settings(saved: Mapping[str, str], settings: Mapping[str, str]) -> None:
    """Refuse to resume a run with other arguments than it was begun with.

    Args:
        saved: The settings in the file: name of an argument -> its text, as `in_words` gives it.
        settings: Those of the present call.

    Raises:
        ValueError: A setting differs.
    """
    for name in sorted(saved.keys() | settings.keys()):
        if saved.get(name) != settings.get(name):
            raise ValueError(
                f"it was written with {name}={saved.get(name)}, not {settings.get(name)}; pass the same arguments "
                "to resume that run, or another path= to begin a new one"
            )


def in_words(value: Any) -> str:
    """The value of an argument as a text that is the same in every process."""
    if is_dataclass(value) and not isinstance(value, type):  # such as bounded(...)
        return f"{name_of(value)}: {in_words(vars(value))}"
    if isinstance(value, Mapping):
        return ", ".join(f"{in_words(key)}: {in_words(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(in_words, value))
    if isinstance(value, nn.Module):
        return type(value).__name__
    return name_of(value) if callable(value) else str(value)
