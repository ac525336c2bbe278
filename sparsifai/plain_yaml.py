"""Reading YAML that nobody has to trust: plain values and their lines, no code, no aliases, within bounds."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml  # type: ignore[import-untyped]

Path = tuple[Hashable, ...]

LONGEST = 1_000_000  # characters of a file
DEEPEST = 20  # levels of a file
LARGEST = 1e15  # numbers in it
MOST = 100_000  # values in it


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, which YAML 1.1 takes for a word."""


class _Dumper(yaml.SafeDumper):
    """Writes in quotes what `_Loader` would take for a number."""


_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+0123456789"))


@dataclass
class Located:
    """Plain values that were read, and where each stands.

    lines: path of keys and positions, such as ('steps', 0, 'sparsify') -> line, from 1 on.
    """

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def line(self, *path: Hashable) -> int:
        """Of what is at a path, or of the nearest that holds it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read(text: str, tags: Mapping[str, Callable[[str, Any], Any]] | None = None, first_line: int = 1) -> Located:
    """Read YAML as dictionaries, lists, strings, numbers, bools and None.

    tags: prefix of a tag, such as '!', -> what makes a value of the tag and the plain value under it; all others are
    refused. first_line: of the text in its file.
    ValueError that names the line, for what cannot be read, aliases, keys that are given twice, and what is out of
    bounds.
    """
    if len(text) > LONGEST:
        raise ValueError(f"the file has {len(text):,} characters, more than the {LONGEST:,} that a recipe may have")
    reader = _Reader(tags or {}, first_line)
    try:
        _check_events(text, first_line)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = first_line + mark.line if mark else first_line
        raise ValueError(f"line {line}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"the file is no YAML: {error}") from None
    value = None if node is None else reader.value_of(node, ())
    return Located(value, reader.lines)


def write(value: Any) -> str:
    """Plain values as YAML, in their order, that `read` reads."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _check_events(text: str, first_line: int) -> None:
    """Refuse what could grow when it is composed, before it does."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        line = first_line + event.start_mark.line
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError(f"line {line}: anchors and aliases are not read; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"line {line}: more than {DEEPEST} levels; a recipe has a few")
        if number > MOST:
            raise ValueError(f"line {line}: more than {MOST:,} values; a recipe has a few")


class _Reader:
    def __init__(self, tags: Mapping[str, Callable[[str, Any], Any]], first_line: int):
        self.tags, self.first_line = tags, first_line
        self.lines: dict[Path, int] = {}
        self.scalars = _Loader("")

    def value_of(self, node: yaml.Node, path: Path) -> Any:
        line = self.lines.setdefault(path, self.first_line + node.start_mark.line)
        make = next((make for prefix, make in self.tags.items() if node.tag.startswith(prefix)), None)
        if make is None and not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            raise ValueError(f"line {line}: the tag {node.tag!r} is not read; a recipe has plain values only")
        value = self._plain(node, path, line)
        return value if make is None else make(node.tag, value)

    def _plain(self, node: yaml.Node, path: Path, line: int) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [self.value_of(each, (*path, place)) for place, each in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if not node.tag.startswith("tag:yaml.org,2002:"):
            return node.value
        kind = node.tag.rpartition(":")[2]
        if kind not in ("str", "int", "float", "bool", "null"):
            # Dates and the like are what somebody has written without quotes.
            return node.value
        try:
            value = self.scalars.construct_object(node)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"line {line}: {node.value[:40]!r} is no number that can be read") from error
        if isinstance(value, (int, float)) and not abs(value) <= LARGEST:  # nor NaN
            raise ValueError(f"line {line}: the number {node.value[:40]} is out of bounds")
        return value

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            line = self.first_line + key_node.start_mark.line
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"line {line}: a key is a word or a number")
            key = self._plain(key_node, (*path, None), line)
            if key in made:
                raise ValueError(f"line {line}: {key!r} is given twice")
            self.lines[*path, key] = line
            made[key] = self.value_of(value_node, (*path, key))
        return made
