"""Collecting the quantities that a criterion names: when they are taken, averaged, and asked for.

`Statistics` keeps them; `calibrate` runs batches through a model for those that need data, and leaves no trace of it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..axes.quantity import AVERAGED, QuantitySource, quantities
from ..model.tensors import cloned
from ..support.registry import name_of


class CollectedQuantities:
    """The quantities that a criterion names, of the layers of a Sparsifier.

    stored: quantity -> parameter name -> value, of those that are not computed anew each time.
    """

    def __init__(self, named: Iterable[str], criterion: Callable):
        self.named, self.criterion = tuple(named), criterion
        self.stored: dict[str, dict[str, Tensor]] = {}
        self.counts: dict[str, dict[str, int]] = {}  # of what a mean is of: batches, or numbers of a channel
        self.begins: set[str] = set()  # means that begin anew with the next batch
        self.computed: dict[Callable, dict[str, Tensor]] = {}  # for all layers at once

    def at(self, *moments: str) -> list[str]:
        """The named quantities that are taken at one of these moments."""
        return [name for name in self.named if set(moments) & set(quantities[name].moments)]  # type: ignore[attr-defined]

    def take(self, moment: str, source: QuantitySource) -> None:
        """Store the quantities that are taken at 'start' or 'update'; after an update, means begin anew."""
        for quantity in self.at(moment):
            self.stored[quantity] = {name: cloned(quantities[quantity](source, name)) for name in source.targets}
        if moment == "update":
            self.begins |= {name for name in self.at(*AVERAGED) if not quantities[name].running}  # type: ignore[attr-defined]

    @torch.no_grad()
    def add(self, moment: str, source: QuantitySource, names: Iterable[str], count: int = 1) -> None:
        """Take a batch into the means of the quantities that are taken at 'backward', 'forward' or 'loss'.

        count: what it counts for in the mean.
        """
        try:
            taken = {each: {name: quantities[each](source, name) for name in names} for each in self.at(moment)}
        finally:
            self.forget()
        for quantity, values in taken.items():
            if quantity in self.begins:
                self.begins.remove(quantity)
                self.stored.pop(quantity, None)
                self.counts.pop(quantity, None)
            means, counts = self.stored.setdefault(quantity, {}), self.counts.setdefault(quantity, {})
            for name, value in values.items():
                value = value.as_subclass(Tensor)  # fastai's batches make tensors of fastai's
                counts[name] = counts.get(name, 0) + count
                means[name] = means[name].lerp(value, count / counts[name]) if name in means else value.clone()

    def missing(self, names: Iterable[str]) -> str | None:
        """The first named quantity that is a mean over batches, and of which no batch has been seen."""
        return next((each for each in self.at(*AVERAGED) if not set(names) <= self.stored.get(each, {}).keys()), None)

    def value(self, quantity: str, name: str, source: QuantitySource) -> Any:
        """A quantity of a layer: computed now, or what is stored. ValueError if it was never collected."""
        function: Any = quantities[quantity]
        if "score" in function.moments:
            return function(source, name)
        if name not in self.stored.get(quantity, {}):
            raise ValueError(
                f"criterion {name_of(self.criterion)} needs {quantity}, of which no batch was seen; call "
                f"{self.how(function.moments)} before sparsify"
            )
        value = self.stored[quantity][name].to(source.targets[name].parameter.device)
        return function.finish(value) if function.finish else value

    def how(self, moments: Container[str]) -> str:
        """How to have what is taken at these moments collected."""
        gradients = ", or collect_gradients() after a backward," if "backward" in moments else ""
        return f"calibrate(batches, loss_func){gradients}"

    def once(self, compute: Callable[[Any], dict[str, Tensor]], source: QuantitySource) -> dict[str, Tensor]:
        """What `compute` gives, computed at the first layer of a moment only; `forget` ends the moment."""
        if compute not in self.computed:
            self.computed[compute] = compute(source)
        return self.computed[compute]

    def forget(self) -> None:
        """Let go of what was computed once for all layers."""
        self.computed.clear()

    def state(self) -> dict[str, Any]:
        """What is stored, and of how many batches."""
        return {
            "stored": {quantity: dict(values) for quantity, values in self.stored.items()},
            "counts": {quantity: dict(counts) for quantity, counts in self.counts.items()},
            "begins": sorted(self.begins),
        }

    def restore(self, state: Mapping[str, Any], source: QuantitySource) -> None:
        """Take over what `state` gave, on the devices of the parameters."""
        self.stored = {
            quantity: {name: value.to(source.targets[name].parameter.device) for name, value in values.items()}
            for quantity, values in state["stored"].items()
        }
        self.counts = {quantity: dict(counts) for quantity, counts in state["counts"].items()}
        self.begins = set(state["begins"])
