"""What a command prints: a table as text, or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..support.terminal import terminal_width

if TYPE_CHECKING:
    from ..support.table import Table


def print_table(table: Table, every_row: bool = False) -> None:
    """Print a table.

    Args:
        table: The table.
        every_row: Whether it is not folded in a terminal; elsewhere it never is. Default False.
    """
    print(table.unfold() if every_row or terminal_width() is None else table._text(unfolded_by="--all"))


def print_json(content: Mapping[str, Any]) -> None:
    """Print JSON, in which a number that is none, or infinite, is null."""
    print(json.dumps(_plain(content), indent=2, allow_nan=False))


def content_of(table: Table) -> dict[str, Any]:
    """The raw values of a table: its rows and its totals."""
    return {"rows": table.records(), "totals": table.totals()}


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
