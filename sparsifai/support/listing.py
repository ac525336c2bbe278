"""Lists of names in messages, which stay short however many names there are."""

from __future__ import annotations

from collections.abc import Sequence

from .printable import printable


def in_short(names: Sequence[str], most: int = 3, others: str = "others") -> str:
    """The first names, and how many others there are.

    Args:
        names: The names.
        most: How many names are written. Default 3.
        others: What the others are called. Default 'others'.

    Example:
        >>> in_short(['a', 'b', 'c', 'd', 'e']), in_short(['a', 'b'])
        ('a, b, c and 2 others', 'a, b')
    """
    rest = len(names) - most
    return f"{', '.join(map(printable, names[:most]))}{f' and {rest} {others}' if rest > 0 else ''}"
