"""Running a model without leaving a trace on it: modes, buffers, gradients, random generators."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .parallel import kind_of, reshard
from .tensors import cloned


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Have a module and all within it in evaluation mode for a while."""
    parts = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, training in parts.items():
            part.training = training


def copy_of(model: nn.Module) -> nn.Module:
    """A copy, of models too that hold tensors computed in a forward, as with torch.nn.utils.spectral_norm."""
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in held if not value.is_leaf})


def check_runs(model: nn.Module, example_input: Any) -> Any:
    """The output for an example. ValueError if there is none."""
    try:
        return run(model, example_input)
    except Exception as error:
        raise ValueError(
            f"example_input does not run through {kind_of(model)} ({error}); pass a batch that the model accepts, on "
            "its device: a tuple for several positional arguments, a dictionary for keywords"
        ) from error


def run(model: Callable, inputs: Any) -> Any:
    """The output for inputs: one, a tuple of positional ones, or a dictionary of named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))


@contextmanager
def untraced(model: nn.Module) -> Iterator[None]:
    """Leave gradients, buffers and random generators as they were; gradients are absent meanwhile."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, dict(module._buffers), [cloned(buffer) for buffer in module._buffers.values()])
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


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Leave a model as it was, bit by bit: parameters, buffers, gradients, modes, and also the random generators.

    Parameters stay the same objects, whatever is done to them meanwhile and however it ends.
    """
    reshard(model)
    parameters = {each: (each.data, each.detach().clone(), each.requires_grad) for each in model.parameters()}
    parts = [(part, part.training, dict(part._parameters)) for part in model.modules()]
    with untraced(model):
        try:
            yield
        finally:
            reshard(model)
            for part, training, named in parts:
                part.training = training
                part._parameters.clear()
                part._parameters.update(named)
            for parameter, saved in parameters.items():
                _put_back(parameter, *saved)


@torch.no_grad()
def _put_back(parameter: nn.Parameter, data: Tensor, copy: Tensor, requires_grad: bool) -> None:
    if (parameter.device, parameter.dtype, parameter.shape) != (data.device, data.dtype, data.shape):  # model.half()
        parameter.data = data
    parameter.copy_(copy)
    parameter.requires_grad_(requires_grad)
