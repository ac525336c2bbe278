"""Tables: the base class of everything that the library prints as one, and percentages for their cells."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from html import escape
from textwrap import fill
from typing import TYPE_CHECKING, Any

from .printable import LONGEST_MESSAGE, printable, printable_lines, quoted

if TYPE_CHECKING:
    from typing_extensions import Self

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


Record = Mapping[str, Any]


def shown(value: Any) -> str:
    """A value as the text of a cell: whole numbers with commas, shapes with x, nothing for None.

    Example:
        >>> shown(1200), shown((8, 3, 3)), shown(0.25), shown(True), shown(None)
        ('1,200', '8x3x3', '0.25', 'yes', '')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class Column:
    """A column of a table: which value of each record it shows, and how.

    Attributes:
        name: Key of the value in the records.
        title: The header. Default: the name, with spaces.
        show: The text of a value. Values that are None are shown as an empty cell without asking it.
        left: Whether it is aligned to the left, as text is, and not to the right, as numbers are.
        below: Whether its texts are lines below the table, as notes that are long; in HTML they are a column.
    """

    name: str
    title: str = ""
    show: Callable[[Any], str] = shown
    left: bool = False
    below: bool = False

    @property
    def header(self) -> str:
        """The title, or the name with spaces."""
        return self.title or self.name.replace("_", " ")

    def cell(self, record: Record) -> str:
        """The text of this column for a record; empty if the record has no value for it."""
        value = record.get(self.name)
        return "" if value is None else self.show(value)


class Table(ABC):
    """Base class of results that are shown as a table: text when printed, HTML in a notebook.

    A subclass says what is in the table: `_records` are the raw values, one dictionary per row, and `_columns` say
    which of them are shown, and how. Text, HTML, DataFrames and JSON are all made of these. If it is a dataclass, it
    needs `repr=False`, or its own repr replaces the table.
    """

    _order: tuple[int, ...] | None = None  # numbers of the records in the order in which `sort` put them

    @abstractmethod
    def _records(self) -> list[dict[str, Any]]:
        """The raw values of each row, all with the same keys."""

    @abstractmethod
    def _columns(self) -> Sequence[Column]:
        """The columns to show. The first one names the row."""

    def _totals(self) -> list[dict[str, Any]]:
        """The raw values of the rows below the rule: no more keys than those of the records."""
        return []

    def _caption(self) -> str:
        """Lines above the table."""
        return ""

    def records(self) -> list[dict[str, Any]]:
        """The raw values of the table, without its totals.

        Numbers are numbers, shapes are tuples, and sparsities are fractions from 0 to 1. A number that is not available
        is None. Units are in the names: `bytes`, `milliseconds`.

        Returns:
            One dictionary per row, all with the same keys.

        Example:
            >>> import torch
            >>> from sparsifai import Report
            >>> Report.of(torch.nn.Linear(4, 2)).records()[0]['shape']
            (2, 4)
        """
        records = self._records()
        return records if self._order is None else [records[number] for number in self._order]

    def totals(self) -> list[dict[str, Any]]:
        """The raw values of the totals, which are the last rows of the printed table.

        Returns:
            One dictionary per total, with the same keys as `records`; None for what has no total.
        """
        keys = dict.fromkeys(key for record in self._records()[:1] for key in record)
        return [{**keys, **total} for total in self._totals()]

    def to_pandas(self) -> Any:
        """The records as a DataFrame of pandas, with one row per row of the table and without totals.

        Returns:
            The pandas.DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                f"{type(self).__name__}.to_pandas needs pandas: pip install pandas; without it, use records()"
            ) from error
        records = self.records()
        return pd.DataFrame(records, columns=list(records[0]) if records else [each.name for each in self._columns()])

    def sort(self, by: str, descending: bool = False) -> Self:
        """The same table with its rows in another order. Rows that are equal in it keep their order.

        Args:
            by: A key of `records`, such as 'sparsity'. Rows without a value come last.
            descending: Whether the largest value comes first. Default False.

        Returns:
            A new table; its attributes are those of this one, only the rows that it shows are in another order.

        Raises:
            ValueError: The table has no such column.

        Example:
            >>> import torch
            >>> from sparsifai import Report
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(2, 8))
            >>> [row['layer'] for row in Report.of(model).sort('weights', descending=True).records()]
            ['1.weight', '0.weight']
        """
        records = self._records()
        if records and by not in records[0]:
            raise ValueError(
                f"{type(self).__name__}.sort: no column is named {quoted(by)}; choose from {', '.join(records[0])}"
            )
        places = self._order or range(len(records))
        present = [place for place in places if not _is_missing(records[place][by])]
        ordered = sorted(present, key=lambda place: records[place][by], reverse=descending)
        result = copy(self)
        object.__setattr__(result, "_order", (*ordered, *(place for place in places if place not in set(present))))
        return result

    def _cells(self) -> Cells:
        records, columns = self.records(), self._columns()
        beside = [column for column in columns if not column.below]
        below = [column for column in columns if column.below]
        return Cells(
            [column.header for column in beside],
            [[column.cell(record) for column in beside] for record in records],
            totals=[[column.cell(total) for column in beside] for total in self._totals()],
            left=[number for number, column in enumerate(beside) if column.left],
            caption=self._caption(),
            notes=["; ".join(filter(None, (column.cell(record) for column in below))) for record in records]
            if below
            else (),
        )

    def __str__(self) -> str:
        return self._cells().text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._cells().html()


def _is_missing(value: Any) -> bool:
    return value is None or value != value  # NaN is not itself


def percent(fraction: float) -> str:
    """A fraction as a percentage with two decimals; only 0 and 1 themselves become 0.00% and 100.00%.

    Args:
        fraction: A number from 0 to 1.

    Example:
        >>> percent(0.5), percent(0.99999), percent(0.00001), percent(1)
        ('50.00%', '99.99%', '0.01%', '100.00%')
    """
    return f"{fraction if fraction in (0, 1) else min(max(fraction, 0.0001), 0.9999):.2%}"
