"""Collecting the quantities that a criterion names: when they are taken, averaged, and asked for.

`Statistics` keeps them; `calibrate` runs batches through a model for those that need data, and leaves no trace of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..axes.quantity import AVERAGED, Source, UnsuitableLayerError, quantities, run
from ..model.parallel import is_sharded
from ..support.registry import name_of


class Statistics:
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

    def take(self, moment: str, source: Source) -> None:
        """Store the quantities that are taken at 'start' or 'update'; after an update, means begin anew."""
        for quantity in self.at(moment):
            self.stored[quantity] = {name: copied(quantities[quantity](source, name)) for name in source.targets}
        if moment == "update":
            self.begins |= {name for name in self.at(*AVERAGED) if not quantities[name].running}  # type: ignore[attr-defined]

    @torch.no_grad()
    def add(self, moment: str, source: Source, names: Iterable[str], count: int = 1) -> None:
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

    def value(self, quantity: str, name: str, source: Source) -> Any:
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
            "counts": {quantity: dict(counts) for quantity, counts in self.counts.items()},
            "begins": sorted(self.begins),
        }

    def restore(self, state: Mapping[str, Any], source: Source) -> None:
        """Take over what `state` gave, on the devices of the parameters."""
        self.stored = {
            quantity: {name: value.to(source.targets[name].parameter.device) for name, value in values.items()}
            for quantity, values in state["stored"].items()
        }
        self.counts = {quantity: dict(counts) for quantity, counts in state["counts"].items()}
        self.begins = set(state["begins"])


def copied(value: Any) -> Any:
    """A copy of a tensor; all else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def calibrate(source: Any, statistics: Statistics, batches: Iterable, loss_func: Callable | None) -> None:
    """Run batches through the model of a Sparsifier, for the quantities that are means over them.

    Modes, buffers, gradients and the states of random generators are afterwards what they were before. ValueError, and
    nothing changed, if the model or the loss fail on a batch, or a layer sees none of it. What a model keeps elsewhere
    than in buffers, such as the hidden state of AWD_LSTM, is not put back.
    """
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"calibrate: batches are a list or a data loader of several, not {_shown(batches)}")
    needs_loss = bool(statistics.at("loss", "backward"))
    if needs_loss and loss_func is None:
        quantity = statistics.at("loss", "backward")[0]
        raise TypeError(f"calibrate: {name_of(statistics.criterion)} needs {quantity}, so give it a loss_func, too")
    before, number = statistics.state(), 0
    try:
        with untraced(source.model), not_drawn_from(batches), torch.enable_grad():
            for number, batch in enumerate(batches, 1):
                inputs, targets = _parts_of(batch, needs_loss)
                try:
                    with _inputs_seen(source, statistics):
                        output = run(source.model, inputs)
                    loss = loss_func(output, *targets) if needs_loss and loss_func is not None else None
                except UnsuitableLayerError:
                    raise
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
            unseen = [name for name in source.targets if name not in statistics.stored.get(missing, {})]
            raise ValueError(
                f"calibrate: {', '.join(unseen)}: computes nothing by itself in these batches, as a projection that "
                "attention uses itself; leave it out with exclude="
            )
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
        _backward(source, loss)
        statistics.add("backward", source, source.targets)


def _backward(source: Any, loss: Tensor) -> None:
    """Put the gradients of the weights that take part where they belong; nothing else sees them."""
    parameters = [target.parameter for target in source.targets.values() if target.parameter.requires_grad]
    if any(map(is_sharded, parameters)):
        loss.backward()  # which sums up over processes
        return
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


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
                statistics.add("forward", source, [name], count=inputs[0].numel())

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
def untraced(model: nn.Module) -> Iterator[None]:
    """Leave gradients, buffers and random generators as they were; gradients are absent meanwhile."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, dict(module._buffers), [copied(buffer) for buffer in module._buffers.values()])
        for module in model.modules()
    ]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(devices)):
        # What autocast has cast of weights is not that of weights that are masked since.
        torch.clear_autocast_cache()
        try:
            model.zero_grad(set_to_none=True)
            yield
        finally:
            torch.clear_autocast_cache()
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for module, named, values in buffers:
                    module._buffers.clear()
                    module._buffers.update(named)
                    for buffer, value in zip(named.values(), values, strict=True):
                        if buffer is not None and value is not None:
                            buffer.copy_(value)
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def not_drawn_from(batches: Any) -> Iterator[None]:
    """Leave the random generators of a data loader, torch's or fastai's, as they were."""
    loader: Any = batches.batches if isinstance(batches, Split) else batches
    rng: Any = getattr(loader, "rng", None)
    state = rng.getstate() if isinstance(rng, random.Random) else None
    generators = [getattr(each, "generator", None) for each in (loader, getattr(loader, "sampler", None))]
    states = [(each, each.get_state()) for each in generators if isinstance(each, torch.Generator)]
    try:
        yield
    finally:
        if state is not None:
            rng.setstate(state)
            loader.rng = rng
        for generator, earlier in states:
            generator.set_state(earlier)


class Split:
    """Batches whose first `inputs` parts, or all but the last, are inputs, and whose others, together, the target."""

    def __init__(self, batches: Iterable, inputs: int | None):
        self.batches, self.inputs = batches, inputs

    def __iter__(self) -> Iterator:
        for batch in self.batches:
            parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            inputs = max(len(parts) - 1, 1) if self.inputs is None else self.inputs
            yield (*parts[:inputs], parts[inputs:])
