"""What a command prints: tables, drawn by rich in a terminal and plain in a pipe, or JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..support.printable import printable, printable_lines

if TYPE_CHECKING:
    from ..support.table import Cells, Table

_NARROWEST = 20  # characters of a column of text
_APART = 3  # characters between two columns
_BESIDE = 28  # characters that names leave to the column beside them


def print_table(table: Table) -> None:
    """Print a table: drawn to the width of the terminal if standard output is one, and plain text otherwise."""
    if not (sys.stdout.isatty() and _drawn(table)):
        print(table.unfold())


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
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return False
    cells, console = table._cells(), Console(highlight=False)
    if cells.caption:
        console.print(Text(printable_lines(cells.caption)))
    for number, columns in enumerate(_blocks(cells, console.width)):
        if number:
            console.print()
        console.print(_block(cells, columns))
    for row, note in zip(cells.rows, cells.notes, strict=False):
        if note:
            console.print(Text(printable_lines(f"{row[0]}: {note}"), style="dim"))
    return True


def _block(cells: Cells, columns: Mapping[int, int]) -> Any:
    """Some columns of a table. columns: number of a column -> its width."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    left = {column % len(cells.header) for column in cells.left}
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, width in columns.items():
        justify: Any = "left" if number in left else "right"
        drawn.add_column(Text(printable(cells.header[number])), justify=justify, overflow="fold", width=width)
    for rows, style in ((cells.rows, ""), (cells.totals, "bold")):
        for row in rows:
            drawn.add_row(*(Text(printable(row[number])) for number in columns), style=style)
        drawn.add_section()
    return drawn


def _blocks(cells: Cells, width: int) -> list[dict[int, int]]:
    """The columns of each part of a table that fits into a terminal, each with its width.

    The first column names the rows of every part.

    Numbers are never cut. Texts are folded, but not into less than `_NARROWEST` characters. A column without any text
    is left out.
    """
    left = {column % len(cells.header) for column in cells.left}
    below = (*cells.rows, *cells.totals)
    widths = [max(len(printable(row[number])) for row in (cells.header, *below)) for number in range(len(cells.header))]
    first = min(widths[0], max(width // 2, width - _BESIDE))
    blocks = [{0: first}]
    for number, natural in enumerate(widths[1:], 1):
        if not any(row[number] for row in below):
            continue
        block, each = blocks[-1], min(natural, _NARROWEST) if number in left else natural
        if len(block) > 1 and sum(block.values()) + each + _APART * len(block) > width:
            block = {0: first}
            blocks.append(block)
        block[number] = each
    for block in blocks:
        spare = width - sum(block.values()) - _APART * (len(block) - 1)
        for number in sorted(block, key=lambda number: widths[number]):
            more = min(widths[number] - block[number], max(spare, 0))
            block[number], spare = block[number] + more, spare - more
    return blocks
