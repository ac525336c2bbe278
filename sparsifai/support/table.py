"""Tables: the base class of everything that the library prints as one, and percentages for their cells.

Raw values are made to cells, and cells to text or HTML.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cells import Cells
from .folding import LONGEST, Line, Record, fold
from .printable import quoted
from .terminal import terminal_width

if TYPE_CHECKING:
    from typing_extensions import Self

# Remarks on the rows of a block are listed in its line if they have at most so many characters together.
_LONGEST_REMARKS = 50


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
        remark: Whether it is text of any length, which may be wrapped.
        below: Whether its texts are lines below the table, as notes that are long.
        bar: Whether its values are fractions that HTML draws as bars.
        total: The value of several rows that are one line of a folded table. By default the sum of numbers; the text
            that all rows share; or how many remarks there are.
    """

    name: str
    title: str = ""
    show: Callable[[Any], str] = shown
    left: bool = False
    remark: bool = False
    below: bool = False
    bar: bool = False
    total: Callable[[Sequence[Record]], Any] | None = None

    @property
    def header(self) -> str:
        """The title, or the name with spaces."""
        return self.title or self.name.replace("_", " ")

    def cell(self, record: Record) -> str:
        """The text of this column for a record; empty if the record has no value for it."""
        value = record.get(self.name)
        return "" if value is None else self.show(value)

    def of_several(self, records: Sequence[Record]) -> str:
        """The text of this column for rows that are one line of a folded table."""
        if self.total is not None:
            value = self.total(records)
            return "" if value is None else self.show(value)
        texts = [self.cell(record) for record in records]
        if self.remark:
            return _in_one(texts)
        if len(set(texts)) == 1 and self.left:
            return texts[0]
        values = [value for record in records if (value := record.get(self.name)) is not None]
        return "" if self.left or not values else self.show(sum(values))

    def fraction(self, records: Sequence[Record]) -> float | None:
        """The fraction that a bar fills for one or several rows."""
        return records[0].get(self.name) if len(records) == 1 or self.total is None else self.total(records)


class Table(ABC):
    """Base class of results that are shown as a table: text when printed, HTML in a notebook.

    A subclass says what is in the table: `_records` are the raw values, one dictionary per row, and `_columns` say
    which of them are shown, and how. Text, HTML, DataFrames and JSON are all made of these. If it is a dataclass, it
    needs `repr=False`, or its own repr replaces the table.
    """

    _order: tuple[int, ...] | None = None  # numbers of the records in the order in which `sort` put them
    _is_folded: bool | None = None  # by default tables are folded if they are long

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
        return self._with(_order=(*ordered, *(place for place in places if place not in set(present))))

    def fold(self) -> Self:
        """The same table with one line for each block of the model, with subtotals.

        A table of more than 40 rows is folded by itself when it is printed; in a notebook the rows can be opened below.
        Blocks are what the names say: 'layer3.11' of 'layer3.11.conv1.weight'. Neighbours that are equal are one line.
        Of a sorted table, and of one with more than 40 blocks, the lines in the middle are one.

        Returns:
            A new table. `records` and `to_pandas` have all rows.
        """
        return self._with(_is_folded=True)

    def unfold(self) -> Self:
        """The same table with all of its rows, however many there are.

        Returns:
            A new table.

        Example:
            >>> import torch
            >>> from sparsifai import Report
            >>> model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(41)))
            >>> report = Report.of(model)
            >>> len(str(report).splitlines()), len(str(report.unfold()).splitlines())
            (7, 46)
        """
        return self._with(_is_folded=False)

    def _with(self, **state: Any) -> Self:
        result = copy(self)
        for name, value in state.items():
            object.__setattr__(result, name, value)  # subclasses are frozen
        return result

    def _folded(self) -> list[Line] | None:
        """The lines of the folded table; None if it is shown with all of its rows."""
        records = self.records()
        if self._is_folded is False or (self._is_folded is None and len(records) <= LONGEST):
            return None
        lines = fold(records, self._columns()[0].name, by_block=self._order is None)
        return lines if len(lines) < len(records) else None

    def _lines(self) -> list[Line]:
        """What pictures show: the lines of the folded table, or all rows."""
        key = self._columns()[0].name
        return self._folded() or [Line(str(record[key]), [record]) for record in self.records()]

    def _column(self, name: str) -> Column:
        return next(column for column in self._columns() if column.name == name)

    def _cells(self, lines: Sequence[Line] | None = None, unfolded_by: str = ".unfold()") -> Cells:
        """The cells of all rows, or of the lines of the folded table, whose foot says what unfolds it."""
        columns, totals = self._columns(), self._totals()
        shown_lines = [Line("", [record]) for record in self.records()] if lines is None else lines
        beside, below = ([each for each in columns if each.below is is_below] for is_below in (False, True))

        def row(line: Line, its: Sequence[Column]) -> list[str]:
            if len(line.records) == 1:
                return [column.cell(line.records[0]) for column in its]
            return [line.label if column is columns[0] else column.of_several(line.records) for column in its]

        cells = [row(line, beside) for line in shown_lines]
        notes = ["; ".join(filter(None, row(line, below))) for line in shown_lines] if below else []
        bars = {
            number: [column.fraction(line.records) for line in shown_lines]
            + [total.get(column.name) for total in totals]
            for number, column in enumerate(beside)
            if column.bar
        }
        foot = ""
        if lines is not None:
            number = f"{len(lines)} line{'s' * (len(lines) != 1)}"
            foot = f"{len(self.records()):,} rows in {number}; {unfolded_by} shows all."
        return Cells(
            [column.header for column in beside],
            cells,
            totals=[[column.cell(total) for column in beside] for total in totals],
            left=[number for number, column in enumerate(beside) if column.left],
            remarks=[number for number, column in enumerate(beside) if column.remark],
            bars=bars,
            caption=self._caption(),
            notes=notes,
            foot=foot,
        )

    def _text(self, unfolded_by: str = ".unfold()") -> str:
        """The table as it is printed: folded if it is long, and in the width of the terminal if there is one."""
        return self._cells(self._folded(), unfolded_by).text(terminal_width())

    def __str__(self) -> str:
        return self._text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = self._folded()
        if lines is None:
            return self._cells().html()
        summary = f"<summary>All {len(self.records()):,} rows</summary>"
        return f"{self._cells(lines).html()}<details>{summary}{self._cells().html()}</details>"


def ratio(name: str, whole: str, complement: bool = False) -> Callable[[Sequence[Record]], float | None]:
    """A total of a column: the sum of one column divided by that of another, or 1 minus that.

    Args:
        name: The first column.
        whole: The second column.
        complement: Whether it is 1 minus the fraction. Default False.
    """

    def of(records: Sequence[Record]) -> float | None:
        known = [record for record in records if record[name] is not None and record[whole] is not None]
        all_of_it = sum(record[whole] for record in known)
        fraction = sum(record[name] for record in known) / all_of_it if all_of_it else 0.0
        return None if not known else 1 - fraction if complement else fraction

    return of


def _in_one(texts: Sequence[str]) -> str:
    """Remarks on several rows in one: the remark if there is only one, and how many rows have one."""
    given = [text for text in texts if text]
    if not given:
        return ""
    different = list(dict.fromkeys(given))
    what = "; ".join(different)
    what = what if len(different) == 1 or len(what) <= _LONGEST_REMARKS else f"{len(different):,} different ones"
    return what if len(given) == len(texts) else f"{what} ({len(given):,} of {len(texts):,})"


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
