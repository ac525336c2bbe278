"""Text of others for terminals and notebooks: no escape sequences, no line breaks in names, never endless.

What is read from files and the names of layers may hold any character. A control character can move the cursor or
clear the screen, a bidirectional override shows letters in another order, and half of a surrogate pair cannot be
encoded at all. Such characters are shown as Python writes them in a string, such as \\x1b.
"""

from __future__ import annotations

from typing import Any

LONGEST_NAME = 200  # characters of a name
LONGEST_MESSAGE = 4000  # characters of an error or a warning


def printable(text: str, most: int = LONGEST_NAME) -> str:
    """A text in one line, with escapes for what cannot be printed, and without its middle if it is long.

    Args:
        text: Any text.
        most: So many characters are shown at most. Default 200.

    Example:
        >>> printable('layer1.0.weight')
        'layer1.0.weight'
        >>> print(printable('a' + chr(27) + '[2J'), printable('0123456789', most=7))
        a\\x1b[2J 01...89
    """
    if len(text) > most:
        start = (most - 3) // 2
        text = f"{text[: most - 3 - start]}...{text[-start:]}"
    if text.isprintable():
        return text
    escaped = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
    return printable(escaped, most)


def printable_lines(text: str, most: int = LONGEST_MESSAGE) -> str:
    """A text of several lines, each of them printable.

    Args:
        text: Any text.
        most: So many characters of a line are shown at most. Default 4000.
    """
    return "\n".join(printable(line, most) for line in text.split("\n"))


def quoted(value: Any, most: int = 90) -> str:
    """A value as Python writes it, for messages: shortened, and in one line.

    Args:
        value: Any value; of a string and a list only the beginning is looked at.
        most: So many characters are shown at most. Default 90.

    Example:
        >>> quoted('a\\n'), quoted([1, 2])
        ("'a\\\\n'", '[1, 2]')
    """
    return printable(repr(value[:most] if isinstance(value, (str, bytes, list, tuple)) else value), most)


def message_of(error: BaseException) -> str:
    """What an error says, printable; the name of its class if it says nothing, as many a MemoryError.

    Example:
        >>> message_of(ValueError('no')), message_of(MemoryError())
        ('no', 'MemoryError')
    """
    return printable_lines(str(error)) or type(error).__name__
