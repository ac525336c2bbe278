"""FreezeCallback: layers that are not trained in a part of training."""

from __future__ import annotations

from torch import nn

from ..model.parallel import unwrapped
from ..model.patterns import name_matcher, prefixes
from ..support.registry import close_matches
from .base import TrainingCallback
from .sparsify import SparsifyCallback


class FreezeCallback(TrainingCallback):
    "Do not train some layers from `start` to `end`"

    # After SparsifyCallback, so that what is frozen for a while takes part in its masks.
    order = SparsifyCallback.order + 0.1

    name = "freeze_layers"  # `freeze` is a method of the Learner

    _stopped: tuple[nn.Parameter, ...] = ()  # by this callback, at the moment

    def __init__(
        self,
        layers,  # Names or globs of layers or parameters, or a list of them; a container means all within it
        start=0.0,  # Share of training that is over when it begins
        end=1.0,  # Share of training that is over when it ends
    ):
        super().__init__()
        self.layers = [layers] if isinstance(layers, str) else list(layers)
        if not self.layers or not all(isinstance(each, str) for each in self.layers):
            raise TypeError(f"FreezeCallback: layers are names or globs of layers, not {layers!r}")
        if not 0 <= start < end <= 1:
            raise ValueError(f"FreezeCallback: needs 0 <= start < end <= 1, got start={start!r}, end={end!r}")
        for pattern in self.layers:
            name_matcher(pattern)  # raises for what is no regular expression
        self.start, self.end = start, end

    def _taken_off(self) -> None:
        self._train_again()

    def before_fit(self):
        "Know the layers, before anything is trained"
        if not self.learn.lock.locked():
            self._train_again()
            self._chosen()

    def before_batch(self):
        "Freeze, or train again, when it is time"
        if self.learn.training:
            if self.start <= self._start < self.end:
                if not self._stopped:
                    self._stopped = tuple(each for each in self._chosen() if each.requires_grad)
                    for parameter in self._stopped:
                        parameter.requires_grad_(False)
                        parameter.grad = None  # or the optimizer would still step it
            else:
                self._train_again()

    def after_fit(self):
        "Leave the layers as they were"
        if not self.learn.lock.locked():
            self._train_again()

    def _train_again(self) -> None:
        for parameter in self._stopped:
            parameter.requires_grad_(True)
        self._stopped = ()

    def _chosen(self) -> list[nn.Parameter]:
        chosen: dict[int, nn.Parameter] = {}
        named = dict(unwrapped(self.learn.model).named_parameters())
        for pattern in self.layers:
            matches = name_matcher(pattern)
            matched = [each for name, each in named.items() if any(map(matches, prefixes(name)[1:]))]
            if not matched:
                hint = close_matches(pattern, {place for name in named for place in prefixes(name)[1:]})
                raise ValueError(f"FreezeCallback: no layer matches {pattern!r}; {hint}")
            chosen |= {id(each): each for each in matched}
        return list(chosen.values())
