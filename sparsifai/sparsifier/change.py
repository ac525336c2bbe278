"""A change of a Sparsifier: computed as a whole, then carried out, and carried to its end if that was interrupted.

Weights are set to zero in place, which cannot be undone if it fails in the middle. So an operation first computes all
that it will change, and changes nothing. Then the Sparsifier stores this `Change` by one assignment, and carries it
out. If an interrupt or an error comes in between, the change is still stored, and the next call of a method of the
Sparsifier carries out all of it again: each part of it can be done twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .layer import Layer


@dataclass(frozen=True, eq=False)
class Change:
    """All that an operation changes.

    Attributes:
        layers: Parameter name -> the record of the layer that replaces the present one.
        followers: Parameter name -> mask, of all followers; None if these stay.
        attributes: Pairs of an object and its new attributes, by name.
        random: State of the random generator; None if it stays.
        weights: Pairs of a parameter and the values that it gets.
        moments: Number -> pairs of a moment of an optimizer and what is set to this number in it: a bool mask, False
            where it is set, or indices.
        zeroes: Whether masked weights are set to zero.
        from_dense: Whether the weights that are kept next are taken from the dense weights, in straight-through
            training.
        is_update: Whether the quantities that are taken after a mask update are stored at the end.
    """

    layers: Mapping[str, Layer] = field(default_factory=dict)
    followers: Mapping[str, Tensor] | None = None
    attributes: Sequence[tuple[Any, Mapping[str, Any]]] = ()
    random: Tensor | None = None
    weights: Sequence[tuple[nn.Parameter, Tensor]] = ()
    moments: Mapping[float, Sequence[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    zeroes: bool = False
    from_dense: bool = False
    is_update: bool = False
