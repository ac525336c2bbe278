"""The data flow of a model: its first and last layers, and which norm layer follows which layer.

A flow is the list of operations of a forward, in the order of computation; `tracing` finds it. From a layer to its norm
layer the search passes operations that keep channels separate and keep channels of zeros zero, such as relu. It ends at
operations that mix channels, so a norm layer after a sum or a concatenation follows no layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from .norms import NORMS_OVER_CHANNELS, NORMS_OVER_LAST_AXIS


@dataclass
class Operation:
    """One operation of a forward.

    Args:
        reads: Indices of the operations whose results it reads.
        parameters: Names of the parameters that it uses.
        keeps_zeros: Whether each channel of its result depends on the same channel of its input alone, and is zero if
            that is. Default False.
        moved: The new order of the axes if it permutes them, else None.
        norm: Name of the norm layer that is this operation as a whole, for those that are not of torch. Default none.
    """

    reads: list[int]
    parameters: set[str]
    keeps_zeros: bool = False
    moved: tuple[int, ...] | None = None
    norm: str = ""


@dataclass
class Flow:
    """The operations of a forward.

    Args:
        steps: The operations in the order of computation.
        sources: Indices of the operations that stand for the inputs of the model.
        results: Indices of the operations whose results are the outputs of the model.
    """

    steps: list[Operation]
    sources: set[int]
    results: set[int]

    def first(self, layers: Iterable[str]) -> set[str]:
        """Find the layers that read the input of the model, with no other of the layers before them.

        Args:
            layers: Names of the weights to look at, such as 'conv1.weight'.

        Returns:
            The names of those whose layers come first.
        """
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
        """Find the layers that compute the output of the model, with no other of the layers after them.

        Args:
            layers: Names of the weights to look at.

        Returns:
            The names of those whose layers come last.
        """
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
        """Find the norm layers that normalize the outputs of layers and nothing else.

        A norm layer that also reads another value is left out: its channels are not always zero when those of the
        layers are.

        Args:
            model: The model.
            layers: Names of the weights to look at.

        Returns:
            (name of the norm layer, whether channels are moved to the last axis before it) -> the names of the weights
            whose outputs it normalizes.
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

    def reads_only(self, tensors: Iterable[str], layers: Iterable[str]) -> bool:
        """Tell whether what uses some tensors reads the outputs of layers alone, or is not in the flow.

        Args:
            tensors: Names of the tensors, such as those of a norm layer.
            layers: Names of the weights of the layers.
        """
        own, names = set(tensors), set(layers)
        first = next((step for step in self.steps if step.parameters & own), None)
        pending, seen = list(first.reads) if first is not None else [], set()
        while pending:
            index = pending.pop()
            others = self.steps[index].parameters - own
            if index in self.sources or others and not others & names:
                return False
            if not others and index not in seen:
                seen.add(index)
                pending += self.steps[index].reads
        return True

    def _producers(self, index: int, names: set[str]) -> tuple[set[str], bool]:
        """The parameters of `names` whose zero channels reach an operation as zeros, and whether as the last axis."""
        step, moved = self.steps[index], False
        while len(step.reads) == 1 and not step.parameters & names:
            if step.moved is not None and not moved and _moves_channels_last(step.moved):
                moved = True
            elif not step.keeps_zeros:
                break
            step = self.steps[step.reads[0]]
        return step.parameters & names, moved


def _moves_channels_last(order: Sequence[int]) -> bool:
    """Whether a permutation takes (batch, channels, ...) to (batch, ..., channels)."""
    return len(order) > 2 and list(order) == [0, *range(2, len(order)), 1]


def _norms_of(model: nn.Module, step: Operation) -> set[str]:
    """Names of the norm layers whose parameters an operation uses."""
    holders = {name.rpartition(".")[0] for name in step.parameters}
    whole = {step.norm} if step.norm else set()
    return whole | {
        name for name in holders if isinstance(model.get_submodule(name), NORMS_OVER_CHANNELS + NORMS_OVER_LAST_AXIS)
    }
