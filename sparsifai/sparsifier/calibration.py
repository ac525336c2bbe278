"""Running batches through a model for the quantities that need data, without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.quantity import UnsuitableLayerError
from ..model.hooks import hooked
from ..model.parallel import is_sharded
from ..model.running import not_drawn_from, run, untraced
from ..support.registry import name_of
from .collection import CollectedQuantities


def calibrate(source: Any, statistics: CollectedQuantities, batches: Iterable, loss_func: Callable | None) -> None:
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


def _take_loss(source: Any, statistics: CollectedQuantities, loss: Any, number: int) -> None:
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
def _inputs_seen(source: Any, statistics: CollectedQuantities) -> Iterator[None]:
    """Have every layer's input taken when it computes, if a quantity is taken then."""

    def hook(name: str) -> Callable:
        def see(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                source.inputs[name] = inputs[0]
                statistics.add("forward", source, [name], count=inputs[0].numel())

        return see

    targets = source.targets.items() if statistics.at("forward") else ()
    try:
        with hooked(before=[(owner, hook(name)) for name, target in targets for _, owner in target.owners]):
            yield
    finally:
        source.inputs.clear()
