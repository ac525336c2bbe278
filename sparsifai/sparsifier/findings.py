"""What is found in scores while they are ranked: NaN, and ties. On a GPU a finding is a tensor that is read later.

Ties are pruned in index order, so that masks are the same on every machine and kernels need no order of their own. In
a layer that starts at zero this prunes whole rows and keeps others dense, so users are warned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..axes.criterion import Criterion
from ..axes.grouping import Grouping
from ..axes.ranking.device_layer import DeviceLayer
from ..axes.ranking.scored_layer import ScoredLayer, nan_message
from ..model.parallel import whole
from ..model.tensors import computable
from ..support.printable import printable
from ..support.registry import name_of
from ..support.warning import warn_each
from .layer import Layer, Layers

# With a smaller percentage of ties in a layer, it matters little which of them are pruned.
PERCENT = 10


@dataclass(frozen=True)
class Finding:
    """What may have been found in the scores of a layer.

    Attributes:
        text: The message. '{}' stands for the number that was found.
        is_error: Whether it is an error, not a warning.
    """

    text: str
    is_error: bool = False


def nan_in(name: str) -> Finding:
    """The finding that scores of a layer are NaN."""
    return Finding(_literal(nan_message(name)), is_error=True)


def ties_in(name: str, criterion: Criterion) -> Finding:
    """The finding that many scores of a layer are equal, and only some of them are pruned."""
    return Finding(
        f"{{}} scores of {_literal(printable(name))} by {_literal(name_of(criterion))} are equal, as in a layer that "
        "starts at zero, and a part of "
        "them is pruned in index order: whole rows first; train the layer before its first update, initialize it with "
        "random values, or leave it out with exclude="
    )


def _literal(text: str) -> str:
    """A text in which braces are no place for the number."""
    return text.replace("{", "{{").replace("}", "}}")


def in_words(found: Mapping[Finding, Tensor]) -> list[str]:
    """The messages of what was found. On a GPU this waits."""
    numbers = {finding: int(number) for finding, number in found.items()}
    return [finding.text.format(number) for finding, number in numbers.items() if number]


def check_found(found: Mapping[Finding, Tensor]) -> None:
    """Raise a ValueError for what is an error, and warn of the rest. On a GPU this waits.

    Args:
        found: Finding -> the number that was found, or a bool.
    """
    for error in in_words({finding: number for finding, number in found.items() if finding.is_error}):
        raise ValueError(error)
    warn_each(in_words({finding: number for finding, number in found.items() if not finding.is_error}))


def found_ties(
    layers: Layers, scored: Sequence[ScoredLayer | DeviceLayer], kept: Sequence[Any], criterion: Criterion
) -> dict[Finding, Tensor]:
    """The ties in layers that are pruned for the first time, and that were not drawn at random.

    Other weights may have equal scores because of the data, as where an input is always zero; any of them can be
    pruned then.

    Args:
        layers: Parameter name -> layer, as it was before.
        scored: The layers that are ranked.
        kept: For each of them, bool per group.
        criterion: The criterion.

    Returns:
        Finding -> number of groups, an int tensor on the device of the scores.
    """
    found = {}
    for each, of_layer in zip(scored, kept, strict=True):
        layer = layers[each.target.name]
        if layer.level:
            continue
        constant = _is_constant(layer)
        if isinstance(each, DeviceLayer):
            score = each.score.abs() if each.magnitude else each.score
            number = _tied(layer.grouping, score, each.alive, of_layer) * constant
        elif constant:
            number = _tied(layer.grouping, *(torch.tensor(values) for values in (each.score, each.alive, of_layer)))
        else:
            continue
        found[ties_in(layer.name, criterion)] = number
    return found


def _is_constant(layer: Layer) -> Tensor:
    """Whether a weight is zero, or has one magnitude everywhere. Zeros of a part of it are those of pruning before."""
    weight = computable(whole(layer.parameter.detach()))
    if weight.device.type == "cpu" and not _has_one_magnitude(weight[:1]):
        return torch.tensor(False)  # most weights show it at once
    return _has_one_magnitude(weight)


def _has_one_magnitude(values: Tensor) -> Tensor:
    sizes = values.abs()
    return sizes.amax() == sizes.amin()


def _tied(grouping: Grouping, score: Tensor, alive: Tensor, kept: Tensor) -> Tensor:
    """Number of groups of one score of which some are pruned and others kept; 0 if few, or pruned alike in all rows."""
    pruned = alive & ~kept
    equal = score == torch.where(pruned, score, -torch.inf).amax()
    within_rows = [place for place, axis in enumerate(grouping.names) if axis not in ("groups", "expert", "out")]
    by_row = (equal & pruned).view(grouping.grid).sum(within_rows) if within_rows else (equal & pruned).long()
    some = (equal & kept).any() & (by_row.amax() - by_row.amin() > 1)
    return equal.sum() * (some & (equal.sum() * 100 >= len(score) * PERCENT))


def found_nan(scored: Sequence[DeviceLayer]) -> dict[Finding, Tensor]:
    """Which layers on a GPU have NaN scores, without reading it."""
    flags = torch.stack([layer.has_nan() for layer in scored])  # of all at once: each operation is a launch
    return dict(zip((nan_in(layer.target.name) for layer in scored), flags.unbind(), strict=True))


def both(found: Mapping[Finding, Tensor], more: Mapping[Finding, Tensor]) -> dict[Finding, Tensor]:
    """What was found in one ranking or another."""
    joined = {**found, **more}
    for is_error in (True, False):
        known = [finding for finding in more if finding in found and finding.is_error is is_error]
        if known:  # at once: each operation on a GPU is a launch
            numbers = torch.stack([torch.stack([each[finding] for finding in known]) for each in (found, more)])
            joined.update(zip(known, numbers.amax(0).unbind(), strict=True))
    return joined
