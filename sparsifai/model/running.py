"""Running a model on inputs, and restoring its modes, buffers, gradients and the random generators afterwards."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils._python_dispatch import _get_dispatch_stack_at, _pop_mode
from torch.utils._pytree import tree_leaves, tree_map

from ..support.at_end import AtEnd
from ..support.printable import message_of, printable
from .parallel import is_sharded, kind_of, reshard, unwrapped
from .tensors import cloned, is_fixed, shape_of, tensors_in


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and all its submodules into evaluation mode; their modes are restored at the end of the block.

    Args:
        module: The module, or a whole model.
    """
    modes = {part: part.training for part in module.modules()}

    def undo() -> None:
        for part, training in modes.items():
            part.training = training

    at_end = AtEnd(undo)
    with at_end, at_end:
        module.eval()
        yield


def copy_of(model: nn.Module) -> nn.Module:
    """Copy a model, also one that holds tensors computed in a forward, as `torch.nn.utils.spectral_norm` leaves them.

    `copy.deepcopy` refuses such tensors; the copy holds them without their graph.

    Raises:
        ValueError: It holds something that cannot be copied, as a parameter in a sparse layout, or a lock.
    """
    _check_copied(model)
    return _deepcopied(model, _detached(model))


def sharing_copy(model: nn.Module) -> nn.Module:
    """Copy a model like `copy_of`, but with parameters that share memory with those of the model.

    The parameters are other objects. Replace them in the copy to change it; writing to them changes the model.

    Raises:
        ValueError: It holds something that cannot be copied, as a parameter in a sparse layout, or a lock.
    """
    _check_copied(model)
    shared = {
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
        for parameter in model.parameters()
        if type(parameter) is nn.Parameter and parameter.layout == torch.strided and not parameter.is_inference()
    }
    return _deepcopied(model, {**_detached(model), **shared})


def _check_copied(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if why := _why_not_copied(parameter):
            raise ValueError(
                f"{printable(name)} of {kind_of(model)} cannot be copied ({why}); replace it by a plain dense tensor"
            )


def _detached(model: nn.Module) -> dict[int, Any]:
    """Tensors that the modules of a model hold from a forward, which cannot be copied, and copies without a graph."""
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return {id(value): value.detach().clone() for value in held if not value.is_leaf}


def _deepcopied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # the code of a user's class can raise anything
        raise ValueError(
            f"{kind_of(model)} cannot be copied by copy.deepcopy ({message_of(error)}), but the work is "
            "done on a copy, so that the model stays as it is; leave out what cannot be copied in __getstate__ of its "
            "module"
        ) from error


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


def shell_of(model: nn.Module, instead: Mapping[Tensor, Tensor] | None = None) -> nn.Module:
    """Copy the modules and buffers of a model, in evaluation mode and without wrappers; its parameters are shared.

    Args:
        model: The model.
        instead: Parameters and buffers -> tensors that the copy has in their place.

    Raises:
        ValueError: It holds something that cannot be copied, as a lock.
    """
    # Activations that a forward has stored on a module cannot be copied; they are shared like the parameters.
    kept = [tensor for module in model.modules() for tensor in tensors_in(vars(module)) if not tensor.is_leaf]
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *kept)}
    memo |= {id(tensor): other for tensor, other in (instead or {}).items()}
    shell = _deepcopied(model, memo).eval()
    for part in list(shell.modules()):
        for name, child in part.named_children():
            setattr(part, name, unwrapped(child))  # nothing sees into compiled modules
    return shell


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
            f"example_input does not run through {kind_of(model)} ({message_of(error)}); pass a batch that the model "
            "accepts, on its device: a tuple for several positional arguments, or for one list: ([...],); a dictionary "
            "for keywords"
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
def in_modes(*modes: Any) -> Iterator[None]:
    """Enter modes of torch, such as `torch.no_grad()` or a TorchFunctionMode, until the end of the block.

    The gradient mode and the stacks of modes of this thread are then as they were. torch's own `with` blocks leave them
    otherwise if they are interrupted at their end.

    Args:
        *modes: The modes, in the order in which they are entered.
    """
    grad, functions, operators = torch.is_grad_enabled(), _function_modes(), _len_torch_dispatch_stack()

    def undo() -> None:
        torch._C._set_grad_enabled(grad)
        if _function_modes() != functions:
            while _len_torch_function_stack():
                torch._C._pop_torch_function_stack()
            for mode in functions:
                torch._C._push_on_torch_function_stack(mode)
        while _len_torch_dispatch_stack() > operators:
            top: Any = _get_dispatch_stack_at(_len_torch_dispatch_stack() - 1)
            if top.old_dispatch_mode_flags:
                top.__exit__(None, None, None)
            else:  # that was interrupted
                _pop_mode()

    at_end = AtEnd(undo)
    with at_end, at_end:
        for mode in modes:
            mode.__enter__()
        yield


def _function_modes() -> list[TorchFunctionMode]:
    return [torch._C._get_function_stack_at(place) for place in range(_len_torch_function_stack())]


def without_fast_path() -> AbstractContextManager[None]:
    """Have torch compute attention and transformers layer by layer inside a `with` block, in evaluation mode too.

    Their fast path calls no layers, so hooks on these see nothing; and torch.nn.TransformerEncoder hands its layers a
    nested tensor of what is not padding, which they cannot handle once some of them have hooks. torch does not take the
    fast path in a thread that has a mode of torch functions, so other threads are not affected.
    """
    return in_modes(BaseTorchFunctionMode())


@contextmanager
def random_restored(model: nn.Module) -> Iterator[None]:
    """Restore the random generators of Python, NumPy and torch at the end of the block.

    Args:
        model: A model, on whose devices the generators are restored, too.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    states_on_devices = {device: torch.cuda.get_rng_state(device) for device in devices}

    def undo() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for device, state in states_on_devices.items():
            torch.cuda.set_rng_state(state, device)

    at_end = AtEnd(undo)
    with at_end, at_end:
        yield


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

    def undo() -> None:
        torch.clear_autocast_cache()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for module, named, values in buffers:
                _set_items(module._buffers, named)
                for buffer, value in zip(named.values(), values, strict=True):
                    if buffer is not None and value is not None:
                        buffer.copy_(value)

    at_end = AtEnd(undo)
    with random_restored(model), in_modes(), at_end, at_end:
        # Autocast caches casts of weights; they would be out of date once the weights are masked.
        torch.clear_autocast_cache()
        model.zero_grad(set_to_none=True)
        yield


def _set_items(held: dict, items: Mapping) -> None:
    """Give a dictionary these items and no others, in this order."""
    held.clear()
    held.update(items)


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

    def undo() -> None:
        if state is not None:
            rng.setstate(state)
            loader.rng = rng
        for generator, earlier in states:
            generator.set_state(earlier)

    at_end = AtEnd(undo)
    with at_end, at_end:
        yield


def check_no_batch(name: str, batches: Any) -> None:
    """Check that what should be several batches is not a single one, whose tensors would be taken for batches.

    Args:
        name: What the batches are called, for the message.
        batches: What the user passed.

    Raises:
        TypeError: It is a tuple of tensors, or a list of tensors of several kinds, as inputs and targets are.
    """
    several = isinstance(batches, (tuple, list)) and len(batches) > 1
    if not several or not all(isinstance(each, Tensor) for each in batches):
        return
    if isinstance(batches, tuple) or len({(each.dim(), each.dtype) for each in batches}) > 1:
        raise TypeError(
            f"{name} is a list of batches, and this is one batch of {len(batches)} tensors; put it in a list, "
            "[(inputs, targets)]. Batches of inputs alone are a list of tensors like each other, [first, second]"
        )


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

    def undo() -> None:
        reshard(model)
        for module, training, named in modules:
            module.training = training
            _set_items(module._parameters, named)
        for parameter, saved in parameters.items():
            _restore(parameter, *saved)

    at_end = AtEnd(undo)
    with untraced(model), at_end, at_end:
        yield


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
