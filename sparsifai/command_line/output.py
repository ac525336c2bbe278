"""What a command prints: tables, drawn by rich in a terminal and plain in a pipe, or JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..support.printable import printable, printable_lines

if TYPE_CHECKING:
    from ..support.table import Table


def print_table(table: Table) -> None:
    """Print a table: drawn to the width of the terminal if standard output is one, and plain text otherwise."""
    if not (sys.stdout.isatty() and _drawn(table)):
        print(table)


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


def _drawn(table: Table) -> bool:
    """Draw a table with rich. Returns whether rich, which comes with fastai, is installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        return False
    cells, console = table._cells(), Console(highlight=False)
    left = {column % len(cells.header) for column in cells.left}
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, title in enumerate(cells.header):
        is_text = number in left
        # Numbers are not cut. Names and reasons are folded where the terminal is narrow.
        drawn.add_column(
            Text(printable(title)), justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold"
        )
    for row in cells.rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    if cells.totals:
        drawn.add_section()
    for row in cells.totals:
        drawn.add_row(*(Text(printable(cell)) for cell in row), style="bold")
    if cells.caption:
        console.print(Text(printable_lines(cells.caption)))
    console.print(drawn)
    for row, note in zip(cells.rows, cells.notes, strict=False):
        if note:
            console.print(Text(printable_lines(f"{row[0]}: {note}"), style="dim"))
    return True
