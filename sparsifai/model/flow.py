"""Data flow of a model: which layers read its input, which yield its output, and what norm layers stand behind which.

The flow is a list of steps in the order of computation. It comes from torch.fx, which needs no data; where a model
cannot be traced symbolically, one forward of an example input is recorded instead. Both see what calls what, never the
order in which a file defines things. Both run on a shell of the model, which shares its parameters but neither its
modules nor its buffers; hooks that a user has put on it do run.

Followed from a layer to a norm layer are operations that keep channels apart and zero channels zero. What joins,
splits or adds channels ends the search, so a norm layer behind a sum or a concatenation is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

NORMS_OVER_CHANNELS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


NORMS_OVER_LAST_AXIS = (nn.LayerNorm, nn.RMSNorm)


@dataclass
class Operation:
    """A computation: the steps whose results it reads, the parameters it uses, if a zero channel stays zero in it.

    moved: the order of axes that it puts, where it permutes them.
    """

    reads: list[int]
    parameters: set[str]
    keeps_zeros: bool = False
    moved: tuple[int, ...] | None = None


@dataclass
class Flow:
    """The steps of a model in order; sources are those that give its input, results those that give its output."""

    steps: list[Operation]
    sources: set[int]
    results: set[int]

    def first(self, layers: Iterable[str]) -> set[str]:
        """Names of the parameters in `layers` that read the input of the model, no other layer between."""
        names = set(layers)
        reached, found = set(self.sources), set()
        for index, step in enumerate(self.steps):
            if reached.intersection(step.reads):
                here = step.parameters & names
                found |= here
                if not here:
                    reached.add(index)
        return found

    def last(self, layers: Iterable[str]) -> set[str]:
        """Names of the parameters in `layers` that yield the output of the model, no other layer between."""
        names = set(layers)
        reached, found = set(self.results), set()
        for index in reversed(range(len(self.steps))):
            if index in reached:
                here = self.steps[index].parameters & names
                found |= here
                if not here:
                    reached.update(self.steps[index].reads)
        return found

    def norms_behind(self, model: nn.Module, layers: Iterable[str]) -> dict[tuple[str, bool], set[str]]:
        """(Norm layer, whether channels are moved last before it) -> the parameters in `layers` that it reads.

        A norm layer that reads anything else besides is left out: its channels are not dead with those layers.
        """
        names = set(layers)
        producers: dict[tuple[str, bool], set[str]] = {}
        others = set()
        for step in self.steps:
            found = [self._producers(read, names) for read in step.reads]
            for norm in _norms_of(model, step):
                for made, moved in found:
                    producers.setdefault((norm, moved), set()).update(made)
                if not found or not all(made for made, _ in found):
                    others.add(norm)
        return {key: made for key, made in producers.items() if key[0] not in others}

    def _producers(self, index: int, names: set[str]) -> tuple[set[str], bool]:
        """The parameters of `names` whose zero outputs arrive at a step as zeros; whether as the last axis."""
        step, moved = self.steps[index], False
        while len(step.reads) == 1 and not step.parameters & names:
            if step.moved is not None and not moved and _moves_channels_last(step.moved):
                moved = True
            elif not step.keeps_zeros:
                break
            step = self.steps[step.reads[0]]
        return step.parameters & names, moved


def _moves_channels_last(order: Sequence[int]) -> bool:
    """Whether axes are put from (batch, channels, ...) to (batch, ..., channels)."""
    return len(order) > 2 and list(order) == [0, *range(2, len(order)), 1]


def _norms_of(model: nn.Module, step: Operation) -> set[str]:
    holders = {name.rpartition(".")[0] for name in step.parameters}
    return {
        name for name in holders if isinstance(model.get_submodule(name), NORMS_OVER_CHANNELS + NORMS_OVER_LAST_AXIS)
    }
