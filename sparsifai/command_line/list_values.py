"""`sparsifai list`: the values of each axis, with their formulas."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..support.registry import Registry

DESCRIPTION = """List the values of the axes: granularities, contexts, criteria and schedules.

Each has its formula or what it does; a criterion also has the quantities that it is computed from. Forms such as 4x4
and 2:4 are listed, too. Those in braces are options, as recipes and `sparsifai apply` take them: {iterative: 5}.

example: sparsifai list criteria
"""

# Axis -> the words by which it can be asked for.
_WORDS = {
    "granularity": ("granularity", "granularities"),
    "context": ("context", "contexts"),
    "criteria": ("criteria", "criterion"),
    "schedule": ("schedule", "schedules"),
}

# Forms of an axis that are no names, and what they mean. Those with options are made by functions.
_FORMS = {
    "granularity": {
        "4x4": "Tiles of 4 outputs by 4 inputs; other numbers likewise. In Python also block(4, 4).",
        "out,h": "The axes that index the mask: some of out, in, d, h, w. In Python ('out', 'h').",
    },
    "context": {"2:4": "Of every 4 consecutive weights 2 are kept; other numbers likewise."},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    words = [word for words in _WORDS.values() for word in words]
    parser.add_argument("axis", nargs="?", choices=words, metavar="axis", help=f"one of {', '.join(words)}")


def run(given: argparse.Namespace) -> None:
    """Print a table for each axis."""
    from ..recipes.axis_value import REGISTRIES
    from ..support.table import Column, Table
    from .output import content_of, print_json, print_table

    class Values(Table):
        """The values of one axis."""

        def __init__(self, axis: str):
            self.axis = axis

        def _records(self) -> list[dict[str, Any]]:
            return [*_records(self.axis, REGISTRIES[self.axis])]

        def _columns(self) -> list[Column]:
            columns = [Column("name", self.axis, left=True), Column("what", "what it is", left=True, remark=True)]
            needs = Column("needs", show=", ".join, left=True, remark=True)
            return [columns[0], needs, columns[1]] if self.axis == "criteria" else columns

    tables = {axis: Values(axis) for axis, words in _WORDS.items() if given.axis in (None, *words)}
    if given.json:
        print_json({axis: content_of(table)["rows"] for axis, table in tables.items()})
        return
    for number, table in enumerate(tables.values()):
        if number:
            print()
        print_table(table, given.all)


def _records(axis: str, registry: Registry) -> Iterator[dict[str, Any]]:
    from ..axes.criterion import quantities_of
    from ..recipes.axis_value import MAKERS

    for name, function in registry.items():
        needs = {"needs": tuple(quantities_of(function))} if axis == "criteria" else {}
        yield {"name": name, **needs, "what": _what(function)}
    for form, what in _FORMS.get(axis, {}).items():
        yield {"name": form, "what": what}
    for name, maker in MAKERS.get(axis, {}).items():
        yield {"name": f"{{{name}: ...}}", "what": _what(maker)}


def _what(function: Callable) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]
