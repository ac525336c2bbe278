"""The variables of a SparseML recipe: what `eval(...)` may name, and which of them nothing uses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from yaml.nodes import Node

from ...support.work import Work
from ..expression import Evaluation, is_expression, without_eval, work_of_recipe
from ..yaml_nodes import has_alias, plain
from .modifiers import Notice

_NAME = re.compile(r"[^\W\d]\w*")

# Keys that describe the recipe and are no variables.
_ABOUT_THE_RECIPE = ("version", "__metadata__", "metadata", "framework")


@dataclass
class Variables(Mapping):
    """The variables of a recipe or of a stage, which may use the variables around it.

    Args:
        own: Name -> value.
        places: Name -> line.
        outer: The variables around these; None for those of a recipe.
        used: Names that something has used. Default: none.
        work: What may be spent on expressions, of all stages together. Default: that of a recipe.
    """

    own: dict[Any, Any]
    places: dict[Any, int]
    outer: Variables | None
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
        """A value with every 'eval(...)' computed; 'eval(name)' may also name a variable that is not a number.

        Args:
            value: Any plain value.

        Raises:
            ValueError: An expression is not valid.
        """
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

    def add(self, name: Any, line: int, node: Node) -> None:
        """Add a variable. One that an alias stands for is used, whatever names it.

        Args:
            name: Its name.
            line: The line of the name.
            node: Its value.
        """
        self.own[name], self.places[name] = plain(node), line
        self.note_uses(self.own[name])
        if has_alias(node):
            self.used.add(name)

    def note_uses(self, value: Any) -> None:
        """Count the variables that the expressions in a value name as used.

        Args:
            value: Any plain value.
        """
        if isinstance(value, (list, dict)):
            for item in [*value, *value.values()] if isinstance(value, dict) else value:
                self.note_uses(item)
        elif is_expression(value):
            for name in _NAME.findall(value):
                scope: Variables | None = self
                while scope is not None:
                    scope.used.add(name)
                    scope = scope.outer

    def notices_of_unused(self) -> Iterator[Notice]:
        """A notice for each of its own variables that nothing has used."""
        for name in self.own.keys() - self.used - {*_ABOUT_THE_RECIPE}:
            yield Notice(self.places[name], str(name), "nothing in the recipe uses this variable; left out")
