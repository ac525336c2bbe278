"""A file of SparseML, converted: refused if too much is lost, with a warning if anything is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from ...support.printable import LONGEST_MESSAGE, printable, quoted
from ...support.warning import warn
from ..safe_yaml import read_text
from .convert import convert
from .modifiers import Notice

MOST_WARNED = 3  # losses that a warning names


def converted(
    path: str | os.PathLike, strict: bool = False, epochs: int | None = None
) -> tuple[dict[str, Any], list[Notice]]:
    """Convert a recipe of SparseML, and warn of what is lost.

    Args:
        path: The file.
        strict: Whether a loss is an error. Default False.
        epochs: The number of epochs of stages that do not give it. Default None.

    Returns:
        The content of a recipe, and the notices, as `convert`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a recipe of SparseML, nothing in it can be converted, nothing is left of its pruning, or
            `strict` forbids a loss.
    """
    if "\n" in str(path) or str(path).startswith("zoo:"):
        raise ValueError(
            f"from_sparseml: give the path of a file, not {quoted(str(path))}: it reads no text, and downloads nothing"
        )
    try:
        content, notices = convert(read_text(path), epochs)
    except ValueError as error:
        if not str(error).startswith("line "):
            raise
        raise ValueError(f"{printable(str(path))}: {error}") from error
    lost = [notice for notice in notices if notice.lost]
    if strict and lost:
        raise ValueError(_joined(f"{path}: parts of the recipe have no counterpart:", lost))
    if not content.get("stages") and not content["steps"]:
        raise ValueError(_joined(f"{path}: nothing in the recipe can be converted:", notices))
    if lost:
        named = "; ".join(str(notice) for notice in lost[:MOST_WARNED])
        more = f"; and {len(lost) - MOST_WARNED} more, in recipe.notices" if len(lost) > MOST_WARNED else ""
        parts = "one part of the recipe has" if len(lost) == 1 else f"{len(lost)} parts of the recipe have"
        warn(f"{path}: {parts} no counterpart and would change the model: {named}{more}")
    return content, notices


def _joined(title: str, notices: Iterable[Notice]) -> str:
    return "\n".join([printable(title, LONGEST_MESSAGE), *map(str, notices)])
