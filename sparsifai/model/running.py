"""Running a model on inputs, and restoring its modes, buffers, gradients and the random generators afterwards."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .parallel import is_sharded, kind_of, reshard
from .tensors import cloned, is_fixed, shape_of


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and all its submodules into evaluation mode; their modes are restored at the end of the block.

    Args:
        module: The module, or a whole model.
    """
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def copy_of(model: nn.Module) -> nn.Module:
    """Copy a model, also one that holds tensors computed in a forward, as `torch.nn.utils.spectral_norm` leaves them.

    `copy.deepcopy` refuses such tensors; the copy holds them without their graph.

    Raises:
        ValueError: A parameter cannot be copied, as one in a sparse layout.
    """
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    for name, parameter in model.named_parameters():
        if why := _why_not_copied(parameter):
            raise ValueError(f"{name} of {kind_of(model)} cannot be copied ({why}); replace it by a plain dense tensor")
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in held if not value.is_leaf})


def _why_not_copied(parameter: Tensor) -> str:
    """The first sentence of torch's error if a parameter cannot be copied; empty if it can."""
    if parameter.layout == torch.strided and (type(parameter) is nn.Parameter or is_sharded(parameter)):
        return ""  # without a trial, which needs the memory of the copy
    try:
        copy.deepcopy(parameter)
    except RuntimeError as error:
        return str(error).partition(".")[0]
    return ""


def check_autograd(caller: str, model: nn.Module) -> None:
    """Check that autograd takes the tensors of a model.

    Args:
        caller: Name of the function that was called, for the message.
        model: The model.

    Raises:
        ValueError: They were made under `torch.inference_mode`.
    """
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"{caller}: the tensors of {type(model).__name__} were made under torch.inference_mode, which autograd "
            "refuses; make the model outside of it, or take copy.deepcopy(model) outside of it"
        )


def check_runs(model: nn.Module, example_input: Any) -> Any:
    """Run a model on the example that the user passed.

    Args:
        model: The model.
        example_input: The `inputs` of `run`.

    Returns:
        The output.

    Raises:
        ValueError: The model fails on the example.
    """
    try:
        return run(model, example_input)
    except Exception as error:
        raise ValueError(
            f"example_input does not run through {kind_of(model)} ({error}); pass a batch that the model accepts, on "
            "its device: a tuple for several positional arguments, or for one list: ([...],); a dictionary for keywords"
        ) from error


def run(model: Callable, inputs: Any) -> Any:
    """Call a model.

    Args:
        model: The model.
        inputs: One input, a tuple or list of positional inputs, or a dictionary of named inputs.

    Returns:
        The output.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))


def first_example(inputs: Any) -> Any:
    """Copy the first example of a batch: the first entry of every tensor along its first axis.

    Where that axis is not known to run over the examples, all is copied: if the tensors have different sizes along it,
    or are held by a list, as the images of a detection model are.

    Args:
        inputs: The `inputs` of `run`.
    """
    arguments = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    arguments = arguments if isinstance(arguments, (tuple, list)) else (arguments,)
    sizes = {len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()}
    whole = len(sizes - {1}) > 1 or any(_has_list(argument) for argument in arguments)

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value if whole or not value.dim() else value[:1]).detach().clone()

    return tree_map(copied, inputs)


def _has_list(value: Any) -> bool:
    """Whether a list is nested in a value."""
    if isinstance(value, Mapping):
        return any(map(_has_list, value.values()))
    return isinstance(value, list) or (isinstance(value, tuple) and any(map(_has_list, value)))


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Have torch compute attention and transformers layer by layer inside a `with` block, in evaluation mode too.

    Their fast path calls no layers, so hooks on these see nothing; and torch.nn.TransformerEncoder hands its layers a
    nested tensor of what is not padding, which they cannot handle once some of them have hooks.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def untraced(model: nn.Module) -> Iterator[None]:
    """Restore gradients, buffers and random generators at the end of the block; within it the gradients are None.

    Args:
        model: The model. Its parameters and modes are not restored; see `as_it_was` and `evaluating`.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, dict(module._buffers), [cloned(buffer) for buffer in module._buffers.values()])
        for module in model.modules()
    ]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(devices)):
        # Autocast caches casts of weights; they would be out of date once the weights are masked.
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
    """Restore the random generators of a data loader at the end of the block.

    Args:
        batches: A data loader of torch or fastai, or a `Split` of one. Other iterables have no generators.
    """
    loader: Any = batches.batches if isinstance(batches, Split) else batches
    rng: Any = getattr(loader, "rng", None)
    state = rng.getstate() if isinstance(rng, random.Random) else None
    holders = loader, getattr(loader, "sampler", None)
    generators = [getattr(holder, "generator", None) for holder in holders]
    states = [(generator, generator.get_state()) for generator in generators if isinstance(generator, torch.Generator)]
    try:
        yield
    finally:
        if state is not None:
            rng.setstate(state)
            loader.rng = rng
        for generator, earlier in states:
            generator.set_state(earlier)


class Split:
    """Batches as (*inputs, targets), where targets is a tuple.

    Args:
        batches: The batches, each a tuple or list of parts, or a single part.
        inputs: How many parts of a batch are inputs; the others are targets. None: all but the last.
    """

    def __init__(self, batches: Iterable, inputs: int | None):
        self.batches, self.inputs = batches, inputs

    def __iter__(self) -> Iterator:
        for batch in self.batches:
            parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            inputs = max(len(parts) - 1, 1) if self.inputs is None else self.inputs
            yield (*parts[:inputs], parts[inputs:])


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore parameters, buffers, gradients, modes and the random generators, bit by bit, at the end of the block.

    Parameters stay the same objects, also if the block ends with an error.

    Args:
        model: The model.
    """
    reshard(model)
    parameters = {each: (each.data, each.detach().clone(), each.requires_grad) for each in model.parameters()}
    modules = [(module, module.training, dict(module._parameters)) for module in model.modules()]
    with untraced(model):
        try:
            yield
        finally:
            reshard(model)
            for module, training, named in modules:
                module.training = training
                module._parameters.clear()
                module._parameters.update(named)
            for parameter, saved in parameters.items():
                _restore(parameter, *saved)


@torch.no_grad()
def _restore(parameter: nn.Parameter, data: Tensor, copy: Tensor, requires_grad: bool) -> None:
    # model.half() and the like give a parameter other memory.
    if (parameter.device, parameter.dtype, shape_of(parameter)) != (data.device, data.dtype, shape_of(data)):
        parameter.data = data
    if not is_fixed(parameter):
        # Outside of it torch refuses to write to such a tensor.
        with torch.inference_mode() if parameter.is_inference() else nullcontext():
            parameter.copy_(copy)
    if parameter.requires_grad != requires_grad:
        parameter.requires_grad_(requires_grad)
