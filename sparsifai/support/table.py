"""Rows of text as a table: for print, and for a notebook."""

from __future__ import annotations

from collections.abc import Container, Sequence
from html import escape

Rows = Sequence[Sequence[str]]


def as_text(rows: Rows, left: Container[int] = (0,), totals: int = 0, caption: str = "") -> str:
    """A table of plain text, of which the first row is the header.

    left: the columns that are aligned to the left, not to the right. totals: rows at the end that stand apart.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule, end = "-" * max(map(len, lines)), len(lines) - totals
    foot = [rule, *lines[end:]] if totals else []
    return "\n".join([*([caption] if caption else []), lines[0], rule, *lines[1:end], *foot])


def as_html(rows: Rows, left: Container[int] = (0,), totals: int = 0, caption: str = "") -> str:
    """The same as HTML."""

    def line(row: Sequence[str], tag: str) -> str:
        aligned = (
            f'<{tag} style="text-align: {"left" if column in left else "right"}">{escape(cell)}</{tag}>'
            for column, cell in enumerate(row)
        )
        return f"<tr>{''.join(aligned)}</tr>"

    end = len(rows) - totals
    parts = [f"<caption>{escape(caption)}</caption>"] if caption else []
    parts.append(
        f"<thead>{line(rows[0], 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows[1:end])}</tbody>"
    )
    if totals:
        parts.append(f"<tfoot>{''.join(line(row, 'th') for row in rows[end:])}</tfoot>")
    return f"<table>{''.join(parts)}</table>"


def percent(fraction: float) -> str:
    """As a percentage with two decimals; 100.00% only if it is exactly that, 0.00% likewise.

    >>> percent(0.5), percent(0.99999), percent(0.00001), percent(1)
    ('50.00%', '99.99%', '0.01%', '100.00%')
    """
    return f"{fraction if fraction in (0, 1) else min(max(fraction, 0.0001), 0.9999):.2%}"
