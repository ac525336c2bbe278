"""Calibration: running batches through a model for the quantities that need data, without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.quantity import UnsuitableLayerError
from ..model.hooks import hooked, input_of
from ..model.parallel import is_sharded
from ..model.running import check_autograd, check_no_batch, not_drawn_from, run, untraced
from ..model.tensors import tensors_in, with_autograd
from ..support.at_end import AtEnd
from ..support.listing import in_short
from ..support.printable import message_of
from ..support.progress import progress
from ..support.registry import name_of
from ..support.warning import warn
from .collection import CollectedQuantities, Source
from .reading import Read, inputs_recorded, readers_of

# Moments at which a quantity needs the loss.
_OF_LOSS = ("loss", "backward", "input_grad")


def calibrated(
    collected: CollectedQuantities, batches: Iterable, loss_func: Callable | None, of_passes: bool = False
) -> dict[str, Any]:
    """Run batches through the model, for the quantities that are means over batches.

    Modes, buffers, gradients and random generators are restored. What a model keeps elsewhere, such as the hidden
    state of AWD_LSTM, is not. Batches without rows are skipped, and batches whose gradients are not finite left out.

    Args:
        collected: The quantities, which are not changed.
        batches: Batches: (input, target), (input, input, target), or dictionaries of named inputs.
        loss_func: A function of (output, target), or of (output, dictionary). Only quantities that are taken from a
            gradient or from the loss need it.
        of_passes: Whether later passes over these batches need the loss.

    Returns:
        The attributes of `collected` that have these batches in their means.

    Raises:
        TypeError: `batches` is not a list of batches, or a loss is needed and missing.
        ValueError: The model or the loss fails on a batch, or no batch reaches a layer, unless `collected.may_skip`.
    """
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"calibrate: batches is a list or a data loader of batches, not {_shown(batches)}")
    check_no_batch("calibrate: batches", batches)
    of_loss, source = [*collected.at(*_OF_LOSS), *(["gradients"] if of_passes else [])], collected.source
    needs_loss = bool(of_loss)
    if needs_loss and loss_func is None:
        quantity = of_loss[0]
        raise TypeError(f"calibrate: {name_of(collected.criterion)} needs {quantity}; give it a loss_func")
    check_autograd("calibrate", source.model)
    # The means are collected in a copy, so that a batch that fails changes nothing.
    unreached, number, used, infinite = collected.unreached, 0, 0, 0
    collected = copy(collected)
    collected.unreached = {}

    def forget() -> None:
        source.inputs.clear()
        source.input_grads.clear()
        source.loss = None
        source.forget()

    at_end = AtEnd(forget)
    # Within inference_mode no graph is recorded. It is left, and so is no_grad.
    modes = torch.inference_mode(False), torch.enable_grad()
    with at_end, at_end, untraced(source.model), not_drawn_from(batches), modes[0], modes[1]:
        for number, batch in enumerate(progress(batches, "calibrating"), 1):
            inputs, targets = parts_of(with_autograd(batch), needs_loss)
            if not has_rows(inputs):
                continue
            try:
                with _inputs_seen(collected), _inputs_recorded(collected, inputs) as read:
                    output = run(source.model, inputs)
                loss = loss_func(output, *targets) if needs_loss and loss_func is not None else None
            except UnsuitableLayerError:
                raise
            except Exception as error:
                raise ValueError(
                    f"calibrate: batch {number} fails ({message_of(error)}); a batch is (input, target), (input, "
                    "input, target) or a dictionary of named inputs, and the loss is loss_func(output, target)"
                ) from error
            used += 1
            if needs_loss:
                infinite += not _take_loss(collected, loss, number, read)
                source.model.zero_grad(set_to_none=True)
    if not used:
        empty = ", or all are without rows" if number else ""
        raise ValueError(f"calibrate: there are no batches{empty}; give it a list or a data loader that has some")
    if infinite == used:
        raise ValueError("calibrate: the gradients of all batches have inf or NaN; look for it in the model")
    for quantity, layers in collected.unreached.items():
        collected.unreached[quantity] = layers & unreached.get(quantity, layers)
    collected.unreached = {**unreached, **collected.unreached}
    if not collected.may_skip:
        _check_reached(collected)
    if infinite:
        warn(f"calibrate: {infinite} of {used} batches are left out, because their gradients have inf or NaN")
    return {name: getattr(collected, name) for name in ("stored", "counts", "begins", "unreached", "left_out")}


def _check_reached(collected: CollectedQuantities) -> None:
    """Raise a ValueError if no batch has used a layer."""
    layers = [name for name in collected.source.layers if name not in collected.resting]
    for quantity in collected.at("backward", "loss"):
        if unused := [name for name in layers if name in collected.unreached.get(quantity, ())]:
            raise ValueError(
                f"calibrate: no gradient has reached {in_short(unused)}: the loss does not depend on it, or all of "
                "these batches skip it; leave it out with exclude=, or add batches that use it"
            )
    if (missing := collected.missing()) is not None:
        unseen = [name for name in layers if name not in collected.stored.get(missing, {})]
        raise ValueError(
            f"calibrate: {in_short(unseen)}: the module is not called in these batches, or only with inputs that have "
            "no rows (attention, for instance, reads the weights of its projections itself); exclude the layer with "
            "exclude=, or add batches that use it"
        )


def _take_loss(collected: CollectedQuantities, loss: Any, number: int, read: Read) -> bool:
    """Collect the quantities that are taken from the loss of a batch, or from its gradients.

    Returns:
        Whether all gradients are finite. A batch where they are not is left out.
    """
    source, earlier = collected.source, collected.left_out
    collected.left_out = False
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"calibrate: loss_func must return one number, a mean over the batch; got {_shown(loss)}")
    if not loss.requires_grad:
        raise ValueError(
            "calibrate: the loss of the batch has no graph, so no gradient reaches the weights; compute it from the "
            "output of the model, outside of torch.no_grad and without detach or item"
        )
    if not torch.isfinite(loss):
        raise ValueError(f"calibrate: the loss of batch {number} is {loss.item()}")
    if collected.at("loss"):
        source.loss = loss
        collected.add("loss")
        source.loss = None
    if collected.at("input_grad"):
        _add_input_gradients(collected, loss, read)
    if collected.at("backward"):
        _backward(source, loss)
        collected.add("backward")
    finite = not collected.left_out
    collected.left_out |= earlier
    return finite


def _add_input_gradients(collected: CollectedQuantities, loss: Tensor, read: Read) -> None:
    """Collect the quantities that are taken from the gradients of inputs."""
    source = collected.source
    seen = [(name, value, rows) for name, several in read.items() for value, rows in several]
    values = [value for _, value, _ in seen]
    gradients = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True) if values else ()
    for (name, value, rows), gradient in zip(seen, gradients, strict=True):
        gradient = torch.zeros_like(value) if gradient is None else gradient
        source.input_grads.setdefault(name, []).append((value.detach(), gradient, rows))
    groups = {id(source.joint[name][0]) for name in read}
    names = [name for name in source.layers if id(source.joint[name][0]) in groups]
    collected.add("input_grad", names, count=max((rows for _, _, rows in seen), default=1))
    source.input_grads.clear()


def _backward(source: Source, loss: Tensor) -> None:
    """Compute the gradients of the selected layers, and of nothing else."""
    parameters = [layer.parameter for layer in source.layers.values() if layer.parameter.requires_grad]
    if any(map(is_sharded, parameters)):
        loss.backward()  # which sums over processes
        return
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def parts_of(batch: Any, needs_loss: bool) -> tuple[Any, tuple]:
    """The inputs of the model, and the arguments of the loss beside the output."""
    if isinstance(batch, Mapping):
        return batch, (batch,)
    several = isinstance(batch, (tuple, list))
    if needs_loss and not (several and len(batch) > 1):
        raise ValueError(f"calibrate: a batch is (input, target), or a dictionary of named inputs; got {_shown(batch)}")
    if several and len(batch) > 1:
        return tuple(batch[:-1]), tuple(batch[-1:])
    return batch, ()


def has_rows(inputs: Any) -> bool:
    """Whether any tensor of the inputs has a number in it, or there is none."""
    tensors = tensors_in(inputs)
    return not tensors or any(tensor.numel() for tensor in tensors)


def _shown(value: Any) -> str:
    return f"a tensor of the shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _inputs_recorded(collected: CollectedQuantities, inputs: Any) -> Any:
    """Record the inputs whose gradients a quantity needs, if there is one."""
    if not collected.at("input_grad"):
        return nullcontext({})
    tensors = [tensor for tensor in tensors_in(inputs) if tensor.dim()]
    source = collected.source
    return inputs_recorded(source.model, readers_of(source), len(tensors[0]) if tensors else 1)


@contextmanager
def _inputs_seen(collected: CollectedQuantities) -> Iterator[None]:
    """Collect from the input of every layer when it runs, if a quantity is taken then."""
    source = collected.source

    def hook(name: str, owner: nn.Module) -> Callable:
        def see(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
            value = input_of(owner, inputs, named)
            if isinstance(value, Tensor) and value.numel():
                source.inputs[name] = value
                collected.add("forward", [name], count=value.numel())

        return see

    layers = source.layers.items() if collected.at("forward") else ()
    with hooked(before=[(owner, hook(name, owner)) for name, layer in layers for _, owner in layer.owners]):
        yield
    source.inputs.clear()
