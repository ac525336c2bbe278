"""YAML from other people: read as plain values with their lines, and written so that it is read as the same.

`yaml_nodes` has the limits and says which values there are.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, SequenceNode

from ..support.files import read_bytes
from ..support.printable import LONGEST_MESSAGE, printable
from .yaml_nodes import LONGEST_TEXT, SCIENTIFIC, compose, line_of, pairs, plain

# Bytes in which so many characters fit.
LARGEST_FILE = 4 * LONGEST_TEXT


@dataclass
class Located:
    """Plain values together with the line of each.

    Args:
        value: The plain values: numbers, strings, booleans, None, lists and dictionaries.
        lines: Path of keys and positions, such as ('steps', 0, 'sparsify') -> line, counted from 1. Empty by default,
            for values that were not read from a text.
        within: Path of the value in the text, for errors. Empty by default.
    """

    value: Any
    lines: dict[tuple[Hashable, ...], int] = field(default_factory=dict)
    within: tuple[Hashable, ...] = ()

    def part(self, *path: Hashable) -> Located:
        """The value at a path, with its lines.

        Args:
            *path: Keys and positions that lead to the value.
        """
        value = self.value
        for key in path:
            value = value[key]
        lines = {place[len(path) :]: line for place, line in self.lines.items() if place[: len(path)] == path}
        return Located(value, {(): self.line(*path)} | lines, (*self.within, *path))

    def line(self, *path: Hashable) -> int:
        """The line of the value at a path, or of the nearest value that contains it; 1 if no line is known.

        Args:
            *path: Keys and positions that lead to the value.
        """
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def error(self, path: tuple[Hashable, ...], message: Any) -> ValueError:
        """A ValueError whose message begins with the line and the path of a value.

        Args:
            path: Keys and positions that lead to the value.
            message: What is wrong with it.
        """
        where = ".".join(printable(str(key)) for key in (*self.within, *path))
        return ValueError(f"line {self.line(*path)}: {where}: {printable(str(message), LONGEST_MESSAGE)}")

    @contextmanager
    def at(self, *path: Hashable) -> Iterator[None]:
        """Raise a TypeError or ValueError of the block again with the line and the path of a value.

        Args:
            *path: Keys and positions that lead to the value.

        Raises:
            ValueError: The block raised; an error that names its line already is raised unchanged.
        """
        try:
            yield
        except (TypeError, ValueError) as error:
            if str(error).startswith("line "):
                raise
            raise self.error(path, error) from error


def read_text(path: str | os.PathLike) -> str:
    """Read the text of a recipe.

    Args:
        path: A regular file of UTF-8, up to 1 MB.

    Returns:
        The text.

    Raises:
        OSError: The file cannot be read, or is a folder, a device, a pipe or a socket.
        ValueError: It is too large, or not UTF-8.
    """
    data = read_bytes(path, LARGEST_FILE, "a recipe")
    try:
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line}: the file is not text in UTF-8, as a recipe must be") from None


def load_yaml(text: str) -> Located:
    """Read YAML as plain values.

    Args:
        text: The YAML, up to 250,000 characters.

    Returns:
        Dictionaries, lists, numbers, strings, booleans and None, with their lines.

    Raises:
        TypeError: `text` is not a str.
        ValueError: The text is not valid YAML, holds other tags, or is beyond a limit. The message begins with the
            line.

    Example:
        >>> load_yaml('epochs: 3').value
        {'epochs': 3}
    """
    node = compose(text)
    lines: dict[tuple[Hashable, ...], int] = {}
    _note_lines(node, (), lines)
    return Located(plain(node), lines)


def _note_lines(node: Node, path: tuple[Hashable, ...], lines: dict[tuple[Hashable, ...], int]) -> None:
    lines.setdefault(path, line_of(node))
    if isinstance(node, MappingNode):
        for key, line, value in pairs(node):
            place = (*path, key)
            lines[place] = line
            _note_lines(value, place, lines)
    elif isinstance(node, SequenceNode):
        for position, each in enumerate(node.value):
            _note_lines(each, (*path, position), lines)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that would be read as numbers."""


_Dumper.add_implicit_resolver(*SCIENTIFIC)


def dump_yaml(value: Any) -> str:
    """Write plain values as YAML, in their order, so that `load_yaml` reads the same values.

    Args:
        value: Dictionaries, lists, numbers, strings, booleans and None.

    Returns:
        The YAML.
    """
    for allow_unicode in (True, False):
        text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode, width=110)
        if all(map(str.isprintable, text.split("\n"))):
            break  # else what cannot be printed, such as a bidirectional override, is written with escapes
    return text
