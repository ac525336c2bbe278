"""Collecting the quantities that a criterion names: when they are taken, averaged, and asked for.

`Statistics` keeps them; `calibrate` runs batches through a model for those that need data, and leaves no trace of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .registry import name_of
from .statistic import AVERAGED, Source, quantities, run


class Statistics:
    """The quantities that a criterion names, of the layers of a Sparsifier.

    stored: quantity -> parameter name -> value, of those that are not computed anew each time.
    """

    def __init__(self, named: Iterable[str], criterion: Callable):
        self.named, self.criterion = tuple(named), criterion
        self.stored: dict[str, dict[str, Tensor]] = {}
        self.batches: dict[str, dict[str, int]] = {}  # that a mean is of
        self.begins: set[str] = set()  # means that begin anew with the next batch
        self.computed: dict[Callable, dict[str, Tensor]] = {}  # for all layers at once

    def at(self, *moments: str) -> list[str]:
        """The named quantities that are taken at one of these moments."""
        return [name for name in self.named if set(moments) & set(quantities[name].moments)]  # type: ignore[attr-defined]

    def take(self, moment: str, source: Source) -> None:
        """Store the quantities that are taken at 'start' or 'update'; after an update, means begin anew."""
        for quantity in self.at(moment):
            self.stored[quantity] = {name: copied(quantities[quantity](source, name)) for name in source.targets}
        if moment == "update":
            self.begins |= {name for name in self.at(*AVERAGED) if not quantities[name].running}  # type: ignore[attr-defined]

    @torch.no_grad()
    def add(self, moment: str, source: Source, names: Iterable[str]) -> None:
        """Take a batch into the means of the quantities that are taken at 'backward', 'forward' or 'loss'."""
        try:
            taken = {each: {name: quantities[each](source, name) for name in names} for each in self.at(moment)}
        finally:
            self.forget()
        for quantity, values in taken.items():
            if quantity in self.begins:
                self.begins.remove(quantity)
                self.stored.pop(quantity, None)
                self.batches.pop(quantity, None)
            means, batches = self.stored.setdefault(quantity, {}), self.batches.setdefault(quantity, {})
            for name, value in values.items():
                batches[name] = batches.get(name, 0) + 1
                means[name] = means[name].lerp(value, 1 / batches[name]) if name in means else value.clone()

    def missing(self, names: Iterable[str]) -> str | None:
        """The first named quantity that is a mean over batches, and of which no batch has been seen."""
        return next((each for each in self.at(*AVERAGED) if not set(names) <= self.stored.get(each, {}).keys()), None)

    def value(self, quantity: str, name: str, source: Source) -> Any:
        """A quantity of a layer: computed now, or what is stored. ValueError if it was never collected."""
        function: Any = quantities[quantity]
        if "score" in function.moments:
            return function(source, name)
        if name not in self.stored.get(quantity, {}):
            how = "train a batch or call calibrate" if "backward" in function.moments else "call calibrate"
            raise ValueError(
                f"criterion {name_of(self.criterion)} needs {quantity}, of which no batch was seen; {how}(batches, "
                "loss_func) before sparsify"
            )
        value = self.stored[quantity][name].to(source.targets[name].parameter.device)
        return function.finish(value) if function.finish else value

    def once(self, compute: Callable[[Any], dict[str, Tensor]], source: Source) -> dict[str, Tensor]:
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
            "batches": {quantity: dict(counts) for quantity, counts in self.batches.items()},
            "begins": sorted(self.begins),
        }

    def restore(self, state: Mapping[str, Any], source: Source) -> None:
        """Take over what `state` gave, on the devices of the parameters."""
        self.stored = {
            quantity: {name: value.to(source.targets[name].parameter.device) for name, value in values.items()}
            for quantity, values in state["stored"].items()
        }
        self.batches = {quantity: dict(counts) for quantity, counts in state["batches"].items()}
        self.begins = set(state["begins"])


def copied(value: Any) -> Any:
    """A copy of a tensor; all else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def calibrate(source: Any, statistics: Statistics, batches: Iterable, loss_func: Callable | None) -> None:
    """Run batches through the model of a Sparsifier, for the quantities that are means over them.

    Modes, buffers, gradients and the states of random generators are afterwards what they were before. ValueError, and
    nothing changed, if the model or the loss fail on a batch, or a layer sees none of it.
    """
    needs_loss = bool(statistics.at("loss", "backward"))
    if needs_loss and loss_func is None:
        quantity = statistics.at("loss", "backward")[0]
        raise TypeError(f"calibrate: {name_of(statistics.criterion)} needs {quantity}, so give it a loss_func, too")
    before, number = statistics.state(), 0
    try:
        with _untraced(source.model), torch.enable_grad():
            for number, batch in enumerate(batches, 1):
                inputs, targets = _parts_of(batch, needs_loss)
                try:
                    with _inputs_seen(source, statistics):
                        output = run(source.model, inputs)
                    loss = loss_func(output, *targets) if needs_loss and loss_func is not None else None
                except Exception as error:
                    raise ValueError(
                        f"calibrate: batch {number} fails ({error}); a batch is (input, target), (input, input, "
                        "target) or a dictionary of named inputs, and the loss is loss_func(output, target)"
                    ) from error
                if needs_loss:
                    _take_loss(source, statistics, loss, number)
                    source.model.zero_grad(set_to_none=True)
        missing = statistics.missing(source.targets)
        if not number:
            raise ValueError("calibrate: there are no batches; give it a list or a data loader that has some")
        if missing is not None:
            unseen = next(name for name in source.targets if name not in statistics.stored.get(missing, {}))
            raise ValueError(f"calibrate: {unseen} computes nothing in these batches; leave it out with exclude=")
    except BaseException:
        statistics.restore(before, source)
        raise


def _take_loss(source: Any, statistics: Statistics, loss: Any, number: int) -> None:
    """The quantities of a batch that are taken from its loss."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"calibrate: loss_func must return one number, a mean over the batch; got {_shown(loss)}")
    if not loss.requires_grad:
        raise ValueError(
            "calibrate: the loss of the batch has no graph, so no gradient reaches the weights; compute it from the "
            "output of the model, outside of torch.no_grad and without detach or item"
        )
    if not torch.isfinite(loss):
        raise ValueError(f"calibrate: the loss of batch {number} is {loss.item()}")
    if statistics.at("loss"):
        source.loss = loss
        try:
            statistics.add("loss", source, source.targets)
        finally:
            source.loss = None
    if statistics.at("backward"):
        loss.backward()
        statistics.add("backward", source, source.targets)


def _parts_of(batch: Any, needs_loss: bool) -> tuple[Any, tuple]:
    """Inputs of the model, and what the loss is given beside the output."""
    if isinstance(batch, Mapping):
        return batch, (batch,)
    several = isinstance(batch, (tuple, list))
    if needs_loss and not (several and len(batch) > 1):
        raise ValueError(f"calibrate: a batch is (input, target), or a dictionary of named inputs; got {_shown(batch)}")
    if several and len(batch) > 1:
        return tuple(batch[:-1]), tuple(batch[-1:])
    return batch, ()


def _shown(value: Any) -> str:
    return f"a tensor of the shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@contextmanager
def _inputs_seen(source: Any, statistics: Statistics) -> Iterator[None]:
    """Have every layer's input taken when it computes, if a quantity is taken then."""
    handles = []

    def hook(name: str) -> Callable:
        def see(module: nn.Module, inputs: tuple) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                source.inputs[name] = inputs[0]
                statistics.add("forward", source, [name])

        return see

    try:
        if statistics.at("forward"):
            for name, target in source.targets.items():
                handles += [owner.register_forward_pre_hook(hook(name)) for _, owner in target.owners]
        yield
    finally:
        source.inputs.clear()
        for handle in handles:
            handle.remove()


@contextmanager
def _untraced(model: nn.Module) -> Iterator[None]:
    """Leave gradients, buffers and random generators as they were; gradients are absent meanwhile."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            model.zero_grad(set_to_none=True)
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer.copy_(value)
            random.setstate(states[0])
            np.random.set_state(states[1])
