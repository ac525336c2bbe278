"""Long tables folded to the blocks of a model: which rows belong together, and what one line says about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

Record = Mapping[str, Any]

# A table of more rows is folded.
LONGEST = 40


@dataclass(frozen=True)
class Line:
    """One line of a folded table.

    Attributes:
        label: What it is called: the name of its only row, or of a block.
        records: The rows that it stands for.
    """

    label: str
    records: Sequence[Record]


def fold(records: Sequence[Record], key: str, by_block: bool = True) -> list[Line]:
    """Fold the rows of a table to one line per block.

    Neighbouring blocks that are equal in all but their number are one line. If there are more than 40 lines even so,
    those in the middle become one.

    Args:
        records: The rows.
        key: The key of their names; what it holds are 'layers' in the plural, if it is 'layer'.
        by_block: Whether rows of a block become one line. Default True.
    """
    things = f"{key}s"
    if not by_block:
        return _without_middle([Line(str(record[key]), [record]) for record in records], things)
    blocks: dict[str, list[Record]] = {}
    for record in records:
        blocks.setdefault(block_of(str(record[key])), []).append(record)
    lines = []
    for _, equal in groupby(blocks.items(), key=lambda block: _content(block[0], block[1], key)):
        names, of_blocks = zip(*equal, strict=True)
        together = [record for block in of_blocks for record in block]
        if len(together) == 1:
            label = str(together[0][key])
        else:
            last = f" to {names[-1].rpartition('.')[2]}" if len(names) > 1 else ""
            label = f"{names[0]}{last} ({len(together):,} {things})"
        lines.append(Line(label, together))
    return _without_middle(lines, things)


def block_of(name: str) -> str:
    """The block of a model that a parameter belongs to; the name itself if it is in none.

    It ends with the first part of the name that is a number, or ends with an underscore and one. Without one, it ends
    with the first part that has a digit, or is the module that holds the layer.

    Example:
        >>> block_of('encoder.layer.3.attention.self.query.weight'), block_of('layer3.11.conv2.weight')
        ('encoder.layer.3', 'layer3.11')
        >>> block_of('features.denseblock1.denselayer2.conv1.weight'), block_of('fc.weight')
        ('features.denseblock1', 'fc.weight')
        >>> block_of('encoder.layers.encoder_layer_3.mlp.0.weight')
        'encoder.layers.encoder_layer_3'
    """
    parts = name.split(".")
    modules = parts[:-2]  # without the layer and its parameter
    for of_name, is_last in (parts, _is_numbered), (modules, _has_digit):
        for place, part in enumerate(of_name, 1):
            if is_last(part):
                return ".".join(parts[:place])
    return ".".join(modules) or name


def _is_numbered(part: str) -> bool:
    return part.rpartition("_")[2].isdecimal()


def _has_digit(part: str) -> bool:
    return any(map(str.isdecimal, part))


def _content(block: str, records: Sequence[Record], key: str) -> Any:
    """What has to be equal in blocks that are one line: where they are, names within them, and all values."""
    parent, _, number = block.rpartition(".")
    if not number.isdecimal():
        return block
    return parent, [
        (str(record[key])[len(block) :], [value for name, value in record.items() if name != key]) for record in records
    ]


def _without_middle(lines: list[Line], things: str) -> list[Line]:
    """At most 40 lines: those in the middle are one."""
    if len(lines) <= LONGEST:
        return lines
    end = LONGEST // 2
    middle = [record for line in lines[end : 1 - end] for record in line.records]
    return [*lines[:end], Line(f"... {len(middle):,} {things} between ...", middle), *lines[1 - end :]]
