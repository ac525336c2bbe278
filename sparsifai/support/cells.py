"""The cells of a table as text that fits a terminal, and as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from textwrap import fill, wrap

from .printable import LONGEST_MESSAGE, printable, printable_lines

# The width of notes where there is no terminal, as in a file or a notebook.
_WIDTH = 120
_GAP = "  "
# Narrower than this, names and remarks cannot be read any more.
_LEAST_NAME, _LEAST_REMARK = 20, 24
# A bar of a translucent colour, so that it is seen on a light and on a dark page.
_BAR = "background: linear-gradient(90deg, #4682b466 {percent:.1f}%, transparent 0); "
# Remarks are wrapped in HTML, too, also where a page keeps cells in one line.
_WRAPPED = "; white-space: normal; min-width: 14em"
# Printers leave out backgrounds unless they are told not to.
_PRINTED = ' style="-webkit-print-color-adjust: exact; print-color-adjust: exact"'


@dataclass(frozen=True)
class Cells:
    """The cells of a table, all of them text.

    Args:
        header: The titles of the columns.
        rows: One sequence of cells per row, as many as the header has.
        totals: Rows that are shown below a rule (in HTML, as the foot of the table).
        left: Numbers of the columns that are aligned to the left; the others are aligned to the right.
        remarks: Numbers of the columns that may be wrapped where the text is too wide. No other cell ever is.
        bars: Number of a column -> for each row and each total the fraction from 0 to 1 that a bar fills in HTML, or
            None for no bar.
        caption: Lines above the table; none if empty.
        notes: One note per row, empty if there is none to give. Each is a line below the table that begins with the
            first cell of its row.
        foot: Lines below the text; not in HTML.

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
    remarks: Sequence[int] = ()
    bars: Mapping[int, Sequence[float | None]] = field(default_factory=dict)
    caption: str = ""
    notes: Sequence[str] = ()
    foot: str = ""

    def text(self, width: int | None = None) -> str:
        """The table as plain text.

        If it is wider than `width`, empty columns are left out, remarks are wrapped, and names in the first column are
        shortened in the middle. If that is not enough, the columns stand below each other in parts, each with the first
        column. Numbers are never cut, so a single one may be wider.

        Args:
            width: The number of characters in a line. Default: the table is as wide as it is, and notes below it have
                lines of 120 characters.
        """
        table = self._printable()
        parts = table.caption.split("\n") if table.caption else []
        if width is None:
            parts.append(table._lines(table._widths()))
        else:
            parts = [_filled(line, width) for line in parts]
            parts.append("\n\n".join(part._lines(widths) for part, widths in table._fitted(width)))
        below = [*table._noted(), *(table.foot.split("\n") if table.foot else [])]
        return "\n".join([*parts, *(_filled(line, width or _WIDTH) for line in below)])

    def html(self) -> str:
        """The table as HTML, with all text escaped."""
        table = self._printable()
        rows = table.rows

        def line(row: Sequence[str], tag: str, number: int | None = None) -> str:
            cells = []
            for column, cell in enumerate(row):
                share = self.bars[column][number] if number is not None and column in self.bars else None
                bar = _BAR.format(percent=100 * share) if share else ""
                align = "left" if column in self.left else "right"
                wrapped = _WRAPPED if column in self.remarks and len(cell) > _LEAST_REMARK else ""
                cells.append(f'<{tag} style="{bar}text-align: {align}{wrapped}">{escape(cell)}</{tag}>')
            return f"<tr>{''.join(cells)}</tr>"

        caption = _lines_of_html(table.caption.split("\n"))
        parts = [f"<caption>{caption}</caption>"] if caption else []
        body = "".join(line(row, "td", number) for number, row in enumerate(rows))
        parts.append(f"<thead>{line(table.header, 'th')}</thead><tbody>{body}</tbody>")
        if table.totals:
            foot = "".join(line(row, "th", len(rows) + number) for number, row in enumerate(table.totals))
            parts.append(f"<tfoot>{foot}</tfoot>")
        below = f"<p>{_lines_of_html(noted)}</p>" if (noted := table._noted()) else ""
        return f"<table{_PRINTED if self.bars else ''}>{''.join(parts)}</table>{below}"

    def _noted(self) -> list[str]:
        """The notes, each behind the first cell of its row."""
        return [f"{row[0]}: {note}" for row, note in zip(self.rows, self.notes, strict=False) if note]

    def _printable(self) -> Cells:
        """The same without what a terminal would obey: names may have any characters."""
        header, rows, totals = (
            [[printable(cell) for cell in row] for row in part] for part in ([self.header], self.rows, self.totals)
        )
        notes = [printable(note, LONGEST_MESSAGE) for note in self.notes]
        return replace(
            self, header=header[0], rows=rows, totals=totals, notes=notes, caption=printable_lines(self.caption)
        )

    def _widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(self.header, *self.rows, *self.totals, strict=True)]

    def _fitted(self, width: int) -> list[tuple[Cells, list[int]]]:
        """Parts of the table that are not wider than `width`, each with the widths of its columns."""
        widths = self._widths()
        if _sum(widths) <= width:
            return [(self, widths)]
        lines = (*self.rows, *self.totals)
        table = self._only([column for column in range(len(widths)) if not column or any(row[column] for row in lines)])
        widths = table._widths()
        for column in table.remarks:
            widths[column] -= max(0, min(_sum(widths) - width, widths[column] - _LEAST_REMARK))
        excess = _sum(widths) - width
        named = table._with_names(max(widths[0] - excess, _LEAST_NAME)) if excess > 0 else table
        widths[0] = named._widths()[0]
        if _sum(widths) <= width:
            return [(named, widths)]
        return table._with_names(max(width // 2, _LEAST_NAME))._parts(width)

    def _with_names(self, room: int) -> Cells:
        """The same with the names of the first column shortened, where that leaves them distinct."""
        names = [row[0] for row in (*self.rows, *self.totals)]
        short = iter(_shortened(names, room))
        rows, totals = ([[next(short), *row[1:]] for row in part] for part in (self.rows, self.totals))
        return replace(self, rows=rows, totals=totals)

    def _parts(self, width: int) -> list[tuple[Cells, list[int]]]:
        """As many columns at a time as fit beside the first; what may be wrapped gets the room that is left."""
        natural = self._widths()
        parts: list[list[int]] = []
        widths: list[list[int]] = []
        for column in range(1, len(natural)):
            least = min(natural[column], _LEAST_REMARK) if column in self.remarks else natural[column]
            if not parts or _sum([*widths[-1], least]) > width:
                parts.append([0])
                widths.append([natural[0]])
            room = width - _sum(widths[-1]) - len(_GAP)
            parts[-1].append(column)
            widths[-1].append(min(natural[column], max(room, least)) if column in self.remarks else least)
        first, *others = (self._only(columns) for columns in parts)
        return list(zip([first, *(part._without_empty_rows() for part in others)], widths, strict=True))

    def _only(self, columns: Sequence[int]) -> Cells:
        header, rows, totals = (
            [[row[column] for column in columns] for row in part] for part in ([self.header], self.rows, self.totals)
        )
        left, remarks = (
            [place for place, column in enumerate(columns) if column in its] for its in (self.left, self.remarks)
        )
        return replace(self, header=header[0], rows=rows, totals=totals, left=left, remarks=remarks)

    def _without_empty_rows(self) -> Cells:
        rows, totals = ([row for row in part if any(row[1:])] for part in (self.rows, self.totals))
        return replace(self, rows=rows, totals=totals)

    def _lines(self, widths: Sequence[int]) -> str:
        """Header, rows and totals, with cells that are wider than their columns wrapped."""

        def lines(row: Sequence[str]) -> list[str]:
            cells = [
                wrap(cell, width) if len(cell) > width else [cell] for cell, width in zip(row, widths, strict=True)
            ]
            return [
                _GAP.join(
                    (cell[number] if number < len(cell) else "").ljust(width)
                    if column in self.left
                    else (cell[number] if number < len(cell) else "").rjust(width)
                    for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
                ).rstrip()
                for number in range(max(map(len, cells)))
            ]

        header, rows, totals = (
            [line for row in part for line in lines(row)] for part in ([self.header], self.rows, self.totals)
        )
        rule = "-" * max(len(line) for line in (*header, *rows, *totals))
        return "\n".join([*header, rule, *rows, *([rule, *totals] if totals else [])])


def _sum(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _lines_of_html(lines: Sequence[str]) -> str:
    return "<br>".join(map(escape, lines))


def _filled(line: str, width: int) -> str:
    return fill(line, width, subsequent_indent="  ")


def _shortened(names: Sequence[str], room: int) -> list[str]:
    """Names of at most `room` characters, without their middle, or as many more as tell them apart."""
    longest = max(map(len, names), default=0)
    for most in range(room, longest):
        for start in dict.fromkeys(((most - 3) // 2, (most - 3) // 4, 0)):
            short = [
                name if len(name) <= most else f"{name[:start]}...{name[len(name) - (most - 3 - start) :]}"
                for name in names
            ]
            if len(set(short)) == len(set(names)):
                return short
    return list(names)
