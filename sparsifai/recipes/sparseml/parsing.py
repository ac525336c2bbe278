"""From the text of a SparseML recipe to its modifiers, with variables replaced by their values.

Follows the documentation and the source of neuralmagic/sparseml, src/sparseml/optim: `helpers.py` defines where the
YAML begins and ends in Markdown, what stages are, and what `eval(...)` may name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ...support.printable import printable, quoted
from ...support.work import Work
from ..expression import Evaluation, is_expression, without_eval, work_of_recipe
from ..safe_yaml import compose, line_of, pairs, plain
from .modifiers import Modifier, Notice

_TAG = re.compile(r"!(?:\w{1,100}\.)?(\w{0,100}Modifier)")

MOST_MODIFIERS = 1000  # far beyond what a recipe has

# Keys that describe the recipe and are no variables.
_ABOUT_THE_RECIPE = ("version", "__metadata__")


def read_modifiers(text: str) -> tuple[list[Modifier], list[Notice]]:
    """Read the modifiers of a SparseML recipe.

    Args:
        text: YAML, or Markdown that begins with it.

    Returns:
        The modifiers in the order of the file, and notices about variables that no modifier uses.

    Raises:
        TypeError: `text` is not a str.
        ValueError: It is not a recipe of SparseML. The message names the line.
    """
    notices: list[Notice] = []
    root = compose(_front_matter(text))
    try:
        modifiers = list(_modifiers(root, _Variables({}, {}, None), notices))
    except RecursionError:  # in a regular expression or an expression; the depth of nodes is limited
        raise ValueError("line 1: the recipe is nested too deeply") from None
    if len(modifiers) > MOST_MODIFIERS:
        raise ValueError(
            f"line {modifiers[MOST_MODIFIERS].line}: the recipe has {len(modifiers):,} modifiers, more than "
            f"{MOST_MODIFIERS}"
        )
    if not modifiers:
        raise ValueError(f"line {line_of(root)}: the text has no modifier of SparseML, such as !GMPruningModifier")
    return modifiers, notices


def _front_matter(text: str) -> str:
    """The text between the first two lines of --- or +++, if only comments precede it; its lines keep their numbers."""
    if not isinstance(text, str):
        raise TypeError(f"the text of a recipe must be a str, not {type(text).__name__}")
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
    """The variables of a recipe or of a stage, which may use the variables around it.

    own: name -> value. places: name -> line. outer: the variables around. used: names that a modifier has used.
    work: what may be spent on expressions, of all stages together.
    """

    own: dict[Any, Any]
    places: dict[Any, int]
    outer: _Variables | None
    used: set[str] = field(default_factory=set)
    work: Work = field(default_factory=work_of_recipe)

    def __post_init__(self) -> None:
        self.work = self.work if self.outer is None else self.outer.work
        self.evaluation = Evaluation(self, self.work)

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

    def computed(self, value: Any) -> Any:
        """A value with every 'eval(...)' computed; 'eval(name)' may also name a variable that is not a number."""
        if isinstance(value, list):
            return [self.computed(item) for item in value]
        if isinstance(value, dict):
            return {self.computed(key): self.computed(item) for key, item in value.items()}
        if not is_expression(value):
            return value
        name = without_eval(value)
        if name in self and not is_expression(self[name]) and not isinstance(self[name], (int, float)):
            self.work.spend(len(repr(self[name])))
            return self[name]
        return self.evaluation.of(value)

    def notices_of_unused(self) -> Iterator[Notice]:
        for name in self.own.keys() - self.used - {*_ABOUT_THE_RECIPE}:
            yield Notice(self.places[name], str(name), "no modifier uses this variable; left out")


def _modifiers(node: Node, variables: _Variables, notices: list[Notice]) -> Iterator[Modifier]:
    """The modifiers of a recipe, a stage or a list; or the one modifier that `node` is."""
    name = _name(node)
    if name:
        yield _modifier(name, node, variables, notices)
    elif isinstance(node, SequenceNode):
        for item in node.value:
            if not _name(item):
                raise ValueError(
                    f"line {line_of(item)}: expected a modifier of SparseML, such as !GMPruningModifier, not "
                    f"{quoted(plain(item))}"
                )
            yield from _modifiers(item, variables, notices)
    elif isinstance(node, MappingNode):
        yield from _of_mapping(node, variables, notices)
    else:
        raise ValueError(
            f"line {line_of(node)}: expected the variables and modifiers of a recipe, not {quoted(plain(node))}"
        )


def _of_mapping(node: MappingNode, outer: _Variables, notices: list[Notice]) -> Iterator[Modifier]:
    groups: list[Node] = []
    variables = _Variables({}, {}, outer)
    for key, line, value in pairs(node):
        # An empty list of modifiers is neither a group nor a variable.
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
    """The name of the modifier that a node is, or ''."""
    tag = _TAG.fullmatch(node.tag or "")
    return tag[1] if tag else ""


def _modifier(name: str, node: Node, variables: _Variables, notices: list[Notice]) -> Modifier:
    if isinstance(node, SequenceNode) or (isinstance(node, ScalarNode) and node.value):
        raise ValueError(f"line {line_of(node)}: !{name} must be followed by its parameters, such as start_epoch: 0")
    modifier = Modifier(name, line_of(node), {}, {}, notices)
    for key, line, value in pairs(node) if isinstance(node, MappingNode) else ():
        try:
            modifier.values[str(key)] = variables.computed(plain(value))
        except (ValueError, TypeError) as error:
            message = str(error)
            raise ValueError(
                message if message.startswith("line ") else f"line {line}: {name}, {printable(str(key))}: {error}"
            ) from None
        modifier.lines[str(key)] = line
    return modifier
