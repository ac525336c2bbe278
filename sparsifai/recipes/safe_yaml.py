"""YAML from other people: read as plain values with their lines, within limits, and never as Python objects.

No tag constructs anything. An alias of a list or a mapping counts as all of its values, so that a short text cannot
grow huge while it is read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ..support.files import read_bytes
from ..support.printable import LONGEST_MESSAGE, printable, quoted

# Limits, about a hundred times what the recipe of a large language model has.
LONGEST_TEXT = 250_000  # characters
DEEPEST = 20  # levels of nesting
MOST_VALUES = 20_000
LONGEST_NUMBER = 40  # characters
LONGEST_KEY = 1200  # characters

# Bytes in which so many characters fit.
LARGEST_FILE = 4 * LONGEST_TEXT

_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class _Anchored:
    """What an anchor stands for, with its own aliases written out: how many values, characters and levels."""

    values: int
    characters: int
    levels: int


class _Loader(yaml.SafeLoader):
    """Composes nodes within the limits, and constructs no objects. An alias counts as all that it stands for."""

    def __init__(self, stream):
        super().__init__(stream)
        self.depth = self.deepest = self.values = self.characters = self.copied = 0
        self.anchored: dict[str, _Anchored] = {}

    def compose_node(self, parent, index):
        """Like SafeLoader's; raises ComposerError beyond the limits, and for an alias of what is not above it."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._count_alias(event)
            node = super().compose_node(parent, index)
            node.has_alias = True
            return node
        before, outer = (self.values, self.characters), self.deepest
        self.values += 1
        self._check(event, self.depth + 1, self.values)
        self.depth += 1
        self.deepest = self.depth
        node = super().compose_node(parent, index)
        self.depth -= 1
        self.characters += len(node.value) if isinstance(node, ScalarNode) else 0
        if event.anchor:
            values, characters = self.values - before[0], self.characters - before[1]
            self.anchored[event.anchor] = _Anchored(values, characters, self.deepest - self.depth)
        self.deepest = max(outer, self.deepest)
        return node

    def _count_alias(self, event):
        """Count what an alias stands for, before anything is made of it."""
        anchored = self.anchored.get(event.anchor)
        if anchored is None:
            raise self._error(event, f"the alias *{event.anchor} must stand for a value that is complete above it")
        self.values += anchored.values
        self.characters += anchored.characters
        self.copied += anchored.characters
        self.deepest = max(self.deepest, self.depth + anchored.levels)
        self._check(event, self.depth + anchored.levels, self.values)
        if self.copied > LONGEST_TEXT:
            raise self._error(event, f"aliases stand for more than {LONGEST_TEXT:,} characters in all")

    def _check(self, event, depth, values):
        if depth > DEEPEST:
            raise self._error(event, f"nested deeper than {DEEPEST} levels")
        if values > MOST_VALUES:
            raise self._error(event, f"more than {MOST_VALUES} values")

    def _error(self, event, problem):
        return yaml.composer.ComposerError(None, None, problem, event.start_mark)


_SURROGATE = re.compile("[\ud800-\udfff]")

# YAML 1.1 reads 1e-5 as text.
_SCIENTIFIC = (
    f"{_TAG}float", re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z"), list("-+.0123456789"),
)  # fmt: skip
# It also reads 2:4 as 124, a number to the base of sixty.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_TAG}int", f"{_TAG}float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(*_SCIENTIFIC)
_Loader.add_implicit_resolver(
    f"{_TAG}int", re.compile(r"[-+]?(?:0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)\Z"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z"),
    list("-+.0123456789"),
)


# --- Nodes ------------------------------------------------------------------------------------------------------------


def compose(text: str) -> Node:
    """Parse a text into the nodes of one YAML document, without constructing values.

    Args:
        text: The YAML, up to 250,000 characters.

    Returns:
        The root node.

    Raises:
        TypeError: `text` is not a str.
        ValueError: The text is not valid YAML, is empty, or is beyond a limit. The message begins with the line.
    """
    if not isinstance(text, str):
        raise TypeError(f"the text of a recipe must be a str, not {type(text).__name__}")
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"line 1: the text has {len(text)} characters, more than the limit of {LONGEST_TEXT}")
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(
            f"line {line}: the character {chr(error.character)!r} is not allowed in YAML; remove it"
        ) from None
    try:
        node = loader.get_single_node()
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = (mark or loader.get_mark()).line + 1
        problem = printable(str(getattr(error, "problem", error)), LONGEST_MESSAGE)
        raise ValueError(f"line {line}: this YAML cannot be read: {problem}") from None
    if node is None:
        raise ValueError("line 1: the recipe is empty")
    return node


def line_of(node: Node) -> int:
    """The line on which a node begins, counted from 1."""
    return node.start_mark.line + 1


def has_alias(node: Node) -> bool:
    """Whether an alias stands for a node, or for one within it.

    Args:
        node: The node, from `compose`.
    """
    if getattr(node, "has_alias", False):
        return True
    if isinstance(node, MappingNode):
        return any(has_alias(each) for pair in node.value for each in pair)
    return isinstance(node, SequenceNode) and any(map(has_alias, node.value))


def pairs(node: MappingNode) -> Iterator[tuple[Any, int, Node]]:
    """Iterate over the entries of a mapping.

    Args:
        node: The mapping.

    Returns:
        An iterator of (key, line of the key, node of the value).

    Raises:
        ValueError: A key is given twice or is not a single value. The message begins with the line.
    """
    seen: dict[Any, int] = {}
    for key_node, value in node.value:
        line = line_of(key_node)
        if not isinstance(key_node, ScalarNode):
            raise ValueError(f"line {line}: a key must be a single value, not a list or a mapping")
        key = plain(key_node)
        if isinstance(key, str) and len(key) > LONGEST_KEY:
            raise ValueError(
                f"line {line}: the key {quoted(key)} has {len(key):,} characters, more than {LONGEST_KEY:,}"
            )
        if key in seen:
            raise ValueError(f"line {line}: the key {quoted(str(key))} is given a second time, after line {seen[key]}")
        seen[key] = line
        yield key, line, value


def plain(node: Node) -> Any:
    """Convert a node to numbers, strings, booleans, None, lists and dictionaries.

    Args:
        node: The node, from `compose`.

    Returns:
        The plain value.

    Raises:
        ValueError: The node has any other tag, or is not what its tag says. The message begins with the line.
    """
    if isinstance(node, SequenceNode) and node.tag == f"{_TAG}seq":
        return [plain(item) for item in node.value]
    if isinstance(node, MappingNode) and node.tag == f"{_TAG}map":
        return {key: plain(value) for key, _, value in pairs(node)}
    if isinstance(node, ScalarNode) and node.tag.startswith(_TAG):
        return _scalar(node, node.tag[len(_TAG) :])
    raise _unknown_tag(node)


def _scalar(node: ScalarNode, kind: str) -> Any:
    if kind in ("str", "timestamp", "value"):
        if _SURROGATE.search(node.value):
            raise ValueError(
                f"line {line_of(node)}: {quoted(node.value)} has half of a surrogate pair, which is no character; "
                "remove it"
            )
        return node.value
    construct = {
        "int": SafeConstructor.construct_yaml_int,
        "float": SafeConstructor.construct_yaml_float,
        "bool": SafeConstructor.construct_yaml_bool,
        "null": SafeConstructor.construct_yaml_null,
    }.get(kind)
    if construct is None:
        raise _unknown_tag(node)
    try:
        value = construct(SafeConstructor(), node) if len(node.value) <= LONGEST_NUMBER else math.inf
    except (ValueError, KeyError, IndexError, OverflowError):
        raise ValueError(f"line {line_of(node)}: {quoted(node.value)} is not a valid {kind}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"line {line_of(node)}: {quoted(node.value)} is not a finite number of up to {LONGEST_NUMBER} characters"
        )
    return value


def _unknown_tag(node: Node) -> ValueError:
    return ValueError(
        f"line {line_of(node)}: the tag {quoted(node.tag)} is not allowed; a recipe holds plain values, and a recipe "
        "of SparseML also modifiers in its lists of modifiers"
    )


# --- Plain values -----------------------------------------------------------------------------------------------------


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
    """Quotes strings that `_Loader` would read as numbers."""


_Dumper.add_implicit_resolver(*_SCIENTIFIC)


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
