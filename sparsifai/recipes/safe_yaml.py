"""YAML that others have written: read as plain values with their lines, bounded, and never as objects.

Nothing is constructed by tags. Aliases may stand for single values only, so that a text cannot grow while it is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

# A recipe of a large language model has a hundredth of these.
LONGEST, DEEPEST, MOST_VALUES, LONGEST_NUMBER = 250_000, 20, 20_000, 40

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Composes nodes within bounds, and constructs nothing."""

    depth = values = 0

    def compose_node(self, parent, index):
        """As SafeLoader's; ComposerError for what is too deep, too much, or an alias of more than one value."""
        event = self.peek_event()
        self.values += 1
        problem = ""
        if self.depth == DEEPEST:
            problem = f"nested deeper than {DEEPEST} levels"
        elif self.values > MOST_VALUES:
            problem = f"more than {MOST_VALUES} values"
        elif isinstance(event, yaml.AliasEvent) and not isinstance(self.anchors.get(event.anchor), ScalarNode):
            problem = f"the alias *{event.anchor} stands for no single value that is defined before it; write it out"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


# YAML 1.1 takes 1e-5 for a text.
_SCIENTIFIC = (
    f"{_TAG}float", re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z"), list("-+.0123456789"),
)  # fmt: skip
# And 2:4 for 124, a number to the base of sixty.
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


def compose(text: str) -> Node:
    """The nodes of one document. ValueError, with the line, if it is no YAML, empty, or beyond the bounds."""
    if not isinstance(text, str):
        raise TypeError(f"the text of a recipe is a str, not {type(text).__name__}")
    if len(text) > LONGEST:
        raise ValueError(f"line 1: the text has {len(text)} characters, more than {LONGEST}")
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: the character {error.character!r} is not allowed") from None
    try:
        node = loader.get_single_node()
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = (mark or loader.get_mark()).line + 1
        raise ValueError(f"line {line}: not YAML that can be read: {getattr(error, 'problem', error)}") from None
    if node is None:
        raise ValueError("line 1: the recipe is empty")
    return node


def line_of(node: Node) -> int:
    """Where a value begins, counted from 1."""
    return node.start_mark.line + 1


def pairs(node: MappingNode) -> Iterator[tuple[Any, int, Node]]:
    """Keys, their lines, and values. ValueError, with the line, for a key that comes twice or is no single value."""
    seen: dict[Any, int] = {}
    for key_node, value in node.value:
        line = line_of(key_node)
        if not isinstance(key_node, ScalarNode):
            raise ValueError(f"line {line}: a key is a single value, not a list or a mapping")
        key = plain(key_node)
        if key in seen:
            raise ValueError(f"line {line}: the key {str(key)[:80]!r} comes a second time, after line {seen[key]}")
        seen[key] = line
        yield key, line, value


def plain(node: Node) -> Any:
    """A node as numbers, texts, booleans, None, lists and dictionaries. ValueError, with the line, for other tags."""
    if isinstance(node, SequenceNode) and node.tag == f"{_TAG}seq":
        return [plain(item) for item in node.value]
    if isinstance(node, MappingNode) and node.tag == f"{_TAG}map":
        return {key: plain(value) for key, _, value in pairs(node)}
    if isinstance(node, ScalarNode) and node.tag.startswith(_TAG):
        return _scalar(node, node.tag[len(_TAG) :])
    raise _refused(node)


def _scalar(node: ScalarNode, kind: str) -> Any:
    if kind in ("str", "timestamp", "value"):
        return node.value
    load_yaml = {
        "int": SafeConstructor.construct_yaml_int,
        "float": SafeConstructor.construct_yaml_float,
        "bool": SafeConstructor.construct_yaml_bool,
        "null": SafeConstructor.construct_yaml_null,
    }.get(kind)
    if load_yaml is None:
        raise _refused(node)
    try:
        value = load_yaml(SafeConstructor(), node) if len(node.value) <= LONGEST_NUMBER else math.inf
    except (ValueError, KeyError, IndexError, OverflowError):
        raise ValueError(f"line {line_of(node)}: {node.value[:40]!r} is no {kind}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"line {line_of(node)}: {node.value[:40]!r} is no finite number of up to 40 characters")
    return value


def _refused(node: Node) -> ValueError:
    return ValueError(
        f"line {line_of(node)}: the tag {node.tag[:80]!r} is not read here; a recipe has plain values, and "
        "modifiers of SparseML in their lists"
    )


@dataclass
class Located:
    """Plain values that were read, and where each stands.

    lines: path of keys and positions, such as ('steps', 0, 'sparsify') -> line, from 1 on.
    """

    value: Any
    lines: dict[tuple[Hashable, ...], int] = field(default_factory=dict)

    def line(self, *path: Hashable) -> int:
        """Of what is at a path, or of the nearest that holds it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def load_yaml(text: str) -> Located:
    """Dictionaries, lists, numbers, texts, booleans and None. ValueError, with the line, for all else."""
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
        for number, each in enumerate(node.value):
            _note_lines(each, (*path, number), lines)


class _Dumper(yaml.SafeDumper):
    """Writes in quotes what `_Loader` would take for a number."""


_Dumper.add_implicit_resolver(*_SCIENTIFIC)


def dump_yaml(value: Any) -> str:
    """Plain values as YAML, in their order, as `read` reads them."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
