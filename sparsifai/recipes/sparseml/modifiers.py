"""What stands in a recipe of SparseML: its modifiers, with lines, and its variables put in.

After the documentation and the source of neuralmagic/sparseml, src/sparseml/optim: `helpers.py` says where the YAML
begins and ends in Markdown, what stages are, and what `eval(...)` may name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ..expression import evaluate, inner, is_expression
from ..safe_yaml import compose, line_of, pairs, plain

_TAG = re.compile(r"!(?:\w+\.)?(\w*Modifier)")


LONGEST_NAME = 500


# No epoch and no fraction is beyond it.
LARGEST = 1e6


_ABOUT_THE_RECIPE = ("version", "__metadata__")


@dataclass(frozen=True)
class Notice:
    """What of a recipe has no counterpart, is left to fastai, or means something else.

    line: in the file, from 1 on. lost: whether something of the sparsity, or of the model, is lost with it.
    """

    line: int
    key: str
    message: str
    lost: bool = False

    def __str__(self) -> str:
        return f"line {self.line}: {self.key}: {self.message}"


@dataclass
class Modifier:
    """One modifier: its parameters, where they stand, and which of them have been carried over."""

    name: str
    line: int
    values: dict[str, Any]
    lines: dict[str, int]
    notices: list[Notice]
    taken: set[str] = field(default_factory=set)

    def take(self, key: str, default: Any = None) -> Any:
        """A parameter, which counts as carried over."""
        self.taken.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def note(self, key: str, message: str, lost: bool = False) -> None:
        """Say that a parameter, or the modifier, means something else here; only if it stands in the file."""
        self.taken.add(key)
        if key in self.values or key == self.name:
            self.notices.append(Notice(self.lines.get(key, self.line), key, message, lost))

    def error(self, key: str, problem: str) -> ValueError:
        """An error that names the line."""
        return ValueError(f"line {self.lines.get(key, self.line)}: {self.name}, {key}: {problem}")

    def number(self, key: str, default: float | None = None) -> Any:
        """A number, or the default."""
        return self.check_number(key, self.take(key, default))

    def check_number(self, key: str, value: Any) -> Any:
        """A value as a number, or None. SparseML takes '0.5' for one."""
        if isinstance(value, str):
            try:
                value = evaluate(value, {})
            except ValueError:
                raise self.error(key, f"expected a number, not {value[:80]!r}") from None
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise self.error(key, f"expected a number, not {str(value)[:80]!r}")
        if value is not None and abs(value) > LARGEST:
            raise self.error(key, f"expected a number up to {LARGEST:g}, not {str(value)[:80]}")
        return value

    def fraction(self, key: str, value: Any) -> float:
        """A value as a number from 0 to 1."""
        value = self.check_number(key, value)
        if value is None or not 0 <= value <= 1:
            raise self.error(key, f"expected a fraction from 0 to 1, not {value!r}")
        return value

    def leave(self, message: str, lost: bool = True) -> None:
        """Say that none of the modifier is carried over, and what it had."""
        had = ", ".join(f"{key}={_shown(value)}" for key, value in self.values.items())
        self.note(self.name, f"{message}; left out{f': {had}' if had else ''}", lost)
        self.taken.update(self.values)

    def leave_rest(self) -> None:
        """Say of each parameter that nothing has asked for that it is not carried over."""
        for key in self.values.keys() - self.taken:
            self.note(key, f"{_shown(self.values[key])} has no counterpart; left out", lost=True)


def read_modifiers(text: str) -> tuple[list[Modifier], list[Notice]]:
    """The modifiers of a recipe in YAML, or in Markdown that begins with it. ValueError, with the line, for others."""
    notices: list[Notice] = []
    root = compose(_front_matter(text))
    try:
        modifiers = list(_modifiers(root, _Variables({}, {}, None), notices))
    except RecursionError:  # of a regular expression or an expression; the nodes are bounded
        raise ValueError("line 1: the recipe is nested too deeply") from None
    if not modifiers:
        raise ValueError(f"line {line_of(root)}: no modifier of SparseML, such as !GMPruningModifier, is in this text")
    return modifiers, notices


def _front_matter(text: str) -> str:
    """What stands between the first two lines of --- or +++, if nothing but comments is before; in its lines."""
    if not isinstance(text, str):
        raise TypeError(f"the text of a recipe is a str, not {type(text).__name__}")
    lines = text.removeprefix("\ufeff").split("\n")
    fences = [number for number, line in enumerate(lines) if line.rstrip() in ("---", "+++")][:2]
    if len(fences) < 2 or not _is_comment(lines[: fences[0]]):
        return "\n".join(lines)
    return "\n" * (fences[0] + 1) + "\n".join(lines[fences[0] + 1 : fences[1]])


def _is_comment(lines: list[str]) -> bool:
    within = False
    for line in map(str.strip, lines):
        if not within and line and not line.startswith(("#", "<!--")):
            return False
        within = (within or line.startswith("<!--")) and not line.endswith("-->")
    return not within


@dataclass
class _Variables(Mapping):
    """The variables of a recipe, or of a stage of it, which may use those around it."""

    own: dict[Any, Any]
    places: dict[Any, int]
    outer: _Variables | None
    used: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        if name in self.own or self.outer is None:
            return self.own[name]
        return self.outer[name]

    def __contains__(self, name: object) -> bool:
        return name in self.own or (self.outer is not None and name in self.outer)

    def __iter__(self) -> Iterator[str]:
        return iter({**self.own, **(self.outer or {})})

    def __len__(self) -> int:
        return len({**self.own, **(self.outer or {})})

    def put_in(self, value: Any) -> Any:
        """A value with every 'eval(...)' computed; one that names a variable alone is whatever that is."""
        if isinstance(value, list):
            return [self.put_in(item) for item in value]
        if isinstance(value, dict):
            return {self.put_in(key): self.put_in(item) for key, item in value.items()}
        if not is_expression(value):
            return value
        name = inner(value)
        if name in self and not is_expression(self[name]) and not isinstance(self[name], (int, float)):
            return self[name]
        return evaluate(value, self)

    def notices_of_unused(self) -> Iterator[Notice]:
        for name in self.own.keys() - self.used - {*_ABOUT_THE_RECIPE}:
            yield Notice(self.places[name], str(name), "no modifier uses this variable; left out")


def _modifiers(node: Node, variables: _Variables, notices: list[Notice]) -> Iterator[Modifier]:
    """All modifiers of a recipe, of a stage, of a list, or the one that `node` is."""
    name = _name(node)
    if name:
        yield _modifier(name, node, variables, notices)
    elif isinstance(node, SequenceNode):
        for item in node.value:
            if not _name(item):
                raise ValueError(
                    f"line {line_of(item)}: expected a modifier of SparseML, such as !GMPruningModifier, not "
                    f"{_shown(plain(item))}"
                )
            yield from _modifiers(item, variables, notices)
    elif isinstance(node, MappingNode):
        yield from _of_mapping(node, variables, notices)
    else:
        raise ValueError(
            f"line {line_of(node)}: expected the variables and modifiers of a recipe, not {_shown(plain(node))}"
        )


def _of_mapping(node: MappingNode, outer: _Variables, notices: list[Notice]) -> Iterator[Modifier]:
    groups: list[Node] = []
    variables = _Variables({}, {}, outer)
    for key, line, value in pairs(node):
        # An empty list of modifiers is a variable that nobody misses.
        is_group = isinstance(key, str) and "modifiers" in key and bool(value.value)
        if is_group or _holds_modifiers(value):
            groups.append(value)
        elif not (isinstance(key, str) and "modifiers" in key):
            variables.own[key], variables.places[key] = plain(value), line
    for group in groups:
        yield from _modifiers(group, variables, notices)
    notices += variables.notices_of_unused()


def _holds_modifiers(node: Node) -> bool:
    if _name(node):
        return True
    if isinstance(node, MappingNode):
        return any(_holds_modifiers(value) for _, value in node.value)
    return isinstance(node, SequenceNode) and any(_holds_modifiers(item) for item in node.value)


def _name(node: Node) -> str:
    """Name of the modifier that a node is, or ''."""
    tag = _TAG.fullmatch(node.tag or "")
    return tag[1] if tag else ""


def _modifier(name: str, node: Node, variables: _Variables, notices: list[Notice]) -> Modifier:
    if isinstance(node, SequenceNode) or (isinstance(node, ScalarNode) and node.value):
        raise ValueError(f"line {line_of(node)}: !{name} is followed by its parameters, such as start_epoch: 0")
    modifier = Modifier(name, line_of(node), {}, {}, notices)
    for key, line, value in pairs(node) if isinstance(node, MappingNode) else ():
        try:
            modifier.values[str(key)] = variables.put_in(plain(value))
        except (ValueError, TypeError) as error:
            message = str(error)
            raise ValueError(
                message if message.startswith("line ") else f"line {line}: {name}, {key}: {error}"
            ) from None
        modifier.lines[str(key)] = line
    return modifier


def pattern(modifier: Modifier, key: str, name: Any) -> str:
    """A name of SparseML's parameters as a pattern of layers.

    Its regular expressions need to match the beginning of a name only; ours match all of it.
    """
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
        raise modifier.error(key, f"expected names of parameters, not {_shown(name)}")
    if not name.startswith("re:"):
        return name
    expression = name[len("re:") :]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise modifier.error(key, f"{_shown(name)} is no regular expression: {error}") from None
    if "|" in expression or "(?" in expression:
        return f"re:(?:{expression}).*"
    return name if expression.endswith((".*", "$")) else f"{name}.*"


def _shown(value: Any) -> str:
    """A value in a message, shortened."""
    text = repr(value[:80] if isinstance(value, (str, list)) else value)
    return text if len(text) <= 90 else f"{text[:80]}..."
