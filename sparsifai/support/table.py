"""Tables: the base class of everything that the library prints as one, and percentages for their cells."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from textwrap import fill

from .printable import LONGEST_MESSAGE, printable, printable_lines

_WIDTH_OF_NOTES = 120


@dataclass(frozen=True)
class Cells:
    """The cells of a table, all of them text.

    Args:
        header: The titles of the columns.
        rows: One sequence of cells per row, as many as the header has.
        totals: Rows that are shown below a rule (in HTML, as the foot of the table).
        left: Numbers of the columns that are aligned to the left; the others are aligned to the right. Negative
            numbers count from the last column.
        caption: Lines above the table; none if empty.
        notes: One note per row, empty if there is none to give. In text each is a line below the table that begins
            with the first cell of its row; in HTML they are a last column.

    Example:
        >>> print(Cells(('layer', 'weights'), [('fc', '20')], totals=[('all', '20')]).text())
        layer  weights
        --------------
        fc          20
        --------------
        all         20
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    totals: Sequence[Sequence[str]] = ()
    left: Sequence[int] = (0,)
    caption: str = ""
    notes: Sequence[str] = ()

    def text(self) -> str:
        """The table as plain text."""
        header, rows, totals = self._printable()
        lines = (header, *rows, *totals)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = self._columns_to_the_left()

        def line(row: Sequence[str]) -> str:
            padded = (
                cell.ljust(width) if column in left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            return "  ".join(padded).rstrip()

        rule = "-" * max(len(line(row)) for row in lines)
        parts = [printable_lines(self.caption)] if self.caption else []
        parts += [line(header), rule, *map(line, rows)]
        parts += [rule, *map(line, totals)] if totals else []
        parts += [
            fill(f"{row[0]}: {printable(note, LONGEST_MESSAGE)}", _WIDTH_OF_NOTES, subsequent_indent="  ")
            for row, note in zip(rows, self.notes, strict=False)
            if note
        ]
        return "\n".join(parts)

    def html(self) -> str:
        """The table as HTML, with all text escaped."""
        header, rows, totals = self._printable()
        left = self._columns_to_the_left()
        if self.notes:
            left = left | {len(header)}
            header = [*header, "note"]
            rows = [[*row, printable(note, LONGEST_MESSAGE)] for row, note in zip(rows, self.notes, strict=True)]

        def line(row: Sequence[str], tag: str) -> str:
            aligned = (
                f'<{tag} style="text-align: {"left" if column in left else "right"}">{escape(cell)}</{tag}>'
                for column, cell in enumerate(row)
            )
            return f"<tr>{''.join(aligned)}</tr>"

        caption = escape(" ".join(printable_lines(self.caption).split("\n")))
        parts = [f"<caption>{caption}</caption>"] if caption else []
        parts.append(f"<thead>{line(header, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows)}</tbody>")
        if totals:
            parts.append(f"<tfoot>{''.join(line(row, 'th') for row in totals)}</tfoot>")
        return f"<table>{''.join(parts)}</table>"

    def _printable(self) -> tuple[list[str], list[list[str]], list[list[str]]]:
        """Header, rows and totals without what a terminal would obey: names may have any characters."""
        rows = [[[printable(cell) for cell in row] for row in part] for part in ([self.header], self.rows, self.totals)]
        return rows[0][0], rows[1], rows[2]

    def _columns_to_the_left(self) -> set[int]:
        return {column % len(self.header) for column in self.left}


class Table(ABC):
    """Base class of results that are shown as a table: text when printed, HTML in a notebook.

    A subclass defines `_cells`. If it is a dataclass, it needs `repr=False`, or its own repr replaces the table.
    """

    @abstractmethod
    def _cells(self) -> Cells:
        """The cells to show."""

    def __str__(self) -> str:
        return self._cells().text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._cells().html()


def percent(fraction: float) -> str:
    """A fraction as a percentage with two decimals; only 0 and 1 themselves become 0.00% and 100.00%.

    Args:
        fraction: A number from 0 to 1.

    Example:
        >>> percent(0.5), percent(0.99999), percent(0.00001), percent(1)
        ('50.00%', '99.99%', '0.01%', '100.00%')
    """
    return f"{fraction if fraction in (0, 1) else min(max(fraction, 0.0001), 0.9999):.2%}"
