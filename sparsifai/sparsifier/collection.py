"""Collecting the quantities that a criterion names, at the moments of training when each of them is available."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.criterion import quantities_of
from ..axes.quantity import AVERAGED, STORED, quantities
from ..model.layers import NamedWeight
from ..model.tensors import cloned
from ..support.registry import name_of


@dataclass(eq=False)
class Source:
    """What quantities are computed from.

    Attributes:
        model: The model.
        layers: Parameter name -> the named weight of a selected layer, in the order of the model.
        rng: The random generator of the Sparsifier, on the CPU.
        example_input: A batch of one example, or None.
        inputs: Parameter name -> the input of the layer, while the layer runs (moment 'forward').
        loss: The loss of a batch, with its graph (moment 'loss').
    """

    model: nn.Module
    layers: Mapping[str, NamedWeight]
    rng: torch.Generator
    example_input: Any = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    _computed: dict[Callable, dict[str, Tensor]] = field(default_factory=dict)

    def once(self, compute: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return `compute(source)`, a value for each layer. It is computed once and reused until `forget`."""
        if compute not in self._computed:
            self._computed[compute] = compute(self)
        return self._computed[compute]

    def forget(self) -> None:
        """Drop what `once` has computed."""
        self._computed.clear()


class CollectedQuantities:
    """The quantities that a criterion names, of the selected layers.

    Attributes:
        criterion: The criterion.
        source: What they are computed from.
        named: Names of the quantities.
        stored: Quantity -> parameter name -> value, for quantities that are not computed at each scoring.
        counts: Quantity -> parameter name -> the number of batches, or of values, in the mean.
        begins: Quantities whose mean starts anew with the next batch.
    """

    def __init__(self, criterion: Callable, source: Source):
        self.criterion, self.source = criterion, source
        self.named = tuple(quantities_of(criterion))
        self.stored: dict[str, dict[str, Tensor]] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self.begins: set[str] = set()

    def on(self, source: Source) -> CollectedQuantities:
        """The same quantities, with another source for those that are computed at each scoring."""
        other = copy.copy(self)
        other.source = source
        return other

    def at(self, *moments: str) -> list[str]:
        """The named quantities that are taken at one of these moments."""
        return [name for name in self.named if set(moments) & set(quantities[name].moments)]  # type: ignore[attr-defined]

    @torch.no_grad()
    def take(self, moment: str, names: Iterable[str] | None = None) -> None:
        """Store the quantities that are taken at 'start' or 'update'. After an update, means start anew.

        Args:
            moment: The moment.
            names: The layers, by default all.
        """
        names = list(self._layers if names is None else names)
        for quantity in self.at(moment):
            values = {name: cloned(quantities[quantity](self.source, name)) for name in names}
            self.stored[quantity] = self.stored.get(quantity, {}) | values
        if moment == "update":
            self.begins |= {name for name in self.at(*AVERAGED) if not quantities[name].running}  # type: ignore[attr-defined]

    @torch.no_grad()
    def add(self, moment: str, names: Iterable[str] | None = None, count: int = 1) -> None:
        """Add a batch to the means of the quantities that are taken at 'backward', 'forward' or 'loss'.

        Args:
            moment: The moment.
            names: The layers, by default all.
            count: The weight of the batch in the mean.
        """
        names = list(self._layers if names is None else names)
        try:
            taken = {each: {name: quantities[each](self.source, name) for name in names} for each in self.at(moment)}
        finally:
            self.source.forget()
        for quantity, values in taken.items():
            if quantity in self.begins:
                self.begins.remove(quantity)
                self.stored.pop(quantity, None)
                self.counts.pop(quantity, None)
            means, counts = self.stored.setdefault(quantity, {}), self.counts.setdefault(quantity, {})
            for name, value in values.items():
                value = value.as_subclass(Tensor)  # fastai's batches give tensors of fastai's classes
                counts[name] = counts.get(name, 0) + count
                means[name] = means[name].lerp(value, count / counts[name]) if name in means else value.clone()

    def missing(self) -> str | None:
        """The first named quantity that is a mean over batches and lacks a batch for some layer; None if none does."""
        needed = self._layers.keys()
        return next((each for each in self.at(*AVERAGED) if not needed <= self.stored.get(each, {}).keys()), None)

    def value(self, quantity: str, name: str) -> Any:
        """A quantity of a layer: computed now, or the stored value.

        Raises:
            ValueError: It is a mean over batches, and no batch was seen.
        """
        function: Any = quantities[quantity]
        if "score" in function.moments:
            return function(self.source, name)
        if name not in self.stored.get(quantity, {}):
            raise ValueError(
                f"criterion {name_of(self.criterion)} needs {quantity}, but has seen no batch; call "
                f"{self.how(function.moments)} before sparsify"
            )
        value = self.stored[quantity][name].to(self._layers[name].parameter.device)
        return function.finish(value) if function.finish else value

    def values(self, name: str) -> dict[str, Any]:
        """All named quantities of a layer."""
        return {quantity: self.value(quantity, name) for quantity in self.named}

    def how(self, moments: Container[str]) -> str:
        """The calls by which users collect the quantities that are taken at these moments, for an error."""
        gradients = ", or collect_gradients() after a backward," if "backward" in moments else ""
        return f"calibrate(batches, loss_func){gradients}"

    def state(self) -> dict[str, Any]:
        """The stored values and the number of batches in each mean, for `restore`."""
        return {
            "stored": {quantity: dict(values) for quantity, values in self.stored.items()},
            "counts": {quantity: dict(counts) for quantity, counts in self.counts.items()},
            "begins": sorted(self.begins),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned, to the devices of the parameters."""
        self.stored = {
            quantity: {name: value.to(self._layers[name].parameter.device) for name, value in values.items()}
            for quantity, values in state["stored"].items()
        }
        self.counts = {quantity: dict(counts) for quantity, counts in state["counts"].items()}
        self.begins = set(state["begins"])

    @property
    def looks_at_data(self) -> bool:
        """Whether a named quantity is a mean over batches."""
        return bool(self.at(*AVERAGED))

    @property
    def compares(self) -> bool:
        """Whether a named quantity is an earlier value, such as the weight at the start."""
        return bool(self.at(*STORED))

    @property
    def _layers(self) -> Mapping[str, NamedWeight]:
        return self.source.layers
