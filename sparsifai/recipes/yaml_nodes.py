"""YAML from other people, parsed within limits to nodes and plain values, and never to Python objects.

No tag constructs anything. An alias of a list or a mapping counts as all of its values, so that a short text cannot
grow huge while it is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ..support.printable import LONGEST_MESSAGE, printable, quoted

# Limits, about a hundred times what the recipe of a large language model has.
LONGEST_TEXT = 250_000  # characters
DEEPEST = 20  # levels of nesting
MOST_VALUES = 20_000
LONGEST_NUMBER = 40  # characters
LONGEST_KEY = 1200  # characters

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
SCIENTIFIC = (
    f"{_TAG}float", re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z"), list("-+.0123456789"),
)  # fmt: skip
# It also reads 2:4 as 124, a number to the base of sixty.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_TAG}int", f"{_TAG}float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(*SCIENTIFIC)
_Loader.add_implicit_resolver(
    f"{_TAG}int", re.compile(r"[-+]?(?:0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)\Z"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z"),
    list("-+.0123456789"),
)


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
