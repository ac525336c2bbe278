"""Freezing some layers of a model for a part of training."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..support.printable import quoted
from ..support.registry import close_matches
from .parallel import unwrapped
from .patterns import Places, name_matcher


class FrozenLayers:
    """Layers that are frozen from `start` to `end` of a training.

    Args:
        owner: Who asks for it, for errors.
        layers: Names or globs of layers or parameters, or a list of them. A container stands for everything within it.
        start: Fraction of the training that is done when the layers are frozen, from 0 to 1.
        end: Fraction of the training that is done when they are trained again, from 0 to 1.

    Raises:
        TypeError: `layers` is neither a name nor a list of names.
        ValueError: Not 0 <= start < end <= 1, or a pattern is malformed.
    """

    def __init__(self, owner: str, layers: Any, start: float, end: float):
        self.owner, self.layers = owner, [layers] if isinstance(layers, str) else list(layers)
        if not self.layers or not all(isinstance(each, str) for each in self.layers):
            raise TypeError(f"{owner}: layers must be names or globs of layers, or a list, not {layers!r}")
        if not 0 <= start < end <= 1:
            raise ValueError(f"{owner}: 0 <= start < end <= 1 must hold, not start={start!r}, end={end!r}")
        for pattern in self.layers:
            name_matcher(pattern)  # raises if a regular expression is malformed
        self.start, self.end = start, end
        self._frozen: tuple[nn.Parameter, ...] = ()  # what is frozen here and not yet unfrozen

    def at(self, t: float, model: nn.Module) -> None:
        """Freeze the layers at `start`, and unfreeze them at `end`.

        Args:
            t: Fraction of the training that is done.
            model: The model, wrapped or not.
        """
        if not self.start <= t < self.end:
            self.unfreeze()
        elif not self._frozen:
            self._frozen = tuple(each for each in self.parameters(model) if each.requires_grad)
            for parameter in self._frozen:
                parameter.requires_grad_(False)
                parameter.grad = None  # or the optimizer would still step it

    def unfreeze(self) -> None:
        """Let what is frozen be trained again."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = ()

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters whose names match, or lie in a layer whose name matches.

        Raises:
            ValueError: A name matches no layer.
        """
        chosen: dict[int, nn.Parameter] = {}
        named = dict(unwrapped(model).named_parameters())
        places = Places({name: [name] for name in named})
        for pattern in self.layers:
            matched = places.matching(pattern)
            if not matched:
                hint = close_matches(pattern, places.known)
                raise ValueError(f"{self.owner}: no layer matches {quoted(pattern)}; {hint}")
            chosen |= {id(each): each for name, each in named.items() if name in matched}
        return list(chosen.values())
