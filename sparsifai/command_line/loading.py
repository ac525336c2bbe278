"""A model with the weights of a checkpoint: names and shapes are compared before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..export.shrunk_file import load_shrunk
from ..support.printable import quoted
from .model import ModelName, implied_name
from .state import State, metadata_of, read_state


class _OtherClassesError(ValueError):
    """Only the last layer differs, in its number of outputs."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def model_of(model: str | None, checkpoint: Path | None) -> nn.Module:
    """Make a model, in evaluation mode, and load a checkpoint into it if one is given.

    If only the last layer of a model of torchvision or timm has another number of outputs, the model is made with that
    number of classes.

    Args:
        model: What --model says. None if the checkpoint is a folder of save_pretrained, which implies it.
        checkpoint: The checkpoint, or None.

    Returns:
        The model.

    Raises:
        OSError: The checkpoint cannot be read.
        ValueError: The model cannot be made, or the checkpoint does not fit it.
    """
    name = implied_name(checkpoint) if model is None else ModelName.of(model)
    if name is None:
        raise ValueError("give --model, such as torchvision:resnet50; only a folder of save_pretrained implies it")
    state = None if checkpoint is None or _is_shrunk(checkpoint) else read_state(checkpoint)
    made = name.make()
    if checkpoint is not None and state is None:
        made = load_shrunk(made, checkpoint)
    elif state is not None:
        try:
            load_state(made, state, checkpoint)
        except _OtherClassesError as error:
            if not name.takes_classes:
                raise
            made = name.with_classes(error.number).make()
            load_state(made, state, checkpoint)
    return made.eval()


def _is_shrunk(checkpoint: Path) -> bool:
    return "sizes" in metadata_of(checkpoint)


@torch.no_grad()
def load_state(model: nn.Module, state: State, source: Any) -> None:
    """Load weights into a model. A prefix that all names of the model have in the checkpoint is removed.

    Args:
        model: The model; its tensors get the dtypes of the checkpoint.
        state: Name -> tensor.
        source: The checkpoint, for messages.

    Raises:
        ValueError: Names or shapes differ. Nothing has changed then.
    """
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    prefix = _prefix(own, state)
    fitting = {name: state[f"{prefix}{name}"] for name in own if f"{prefix}{name}" in state}
    left_out = _check_names(model, own, state, prefix, source)
    _check_shapes(own, fitting, source)
    if left_out:
        warnings.warn(f"{source}: {_some(left_out)} left out; the model is what begins with {prefix!r}", stacklevel=2)
    for name, value in fitting.items():
        if own[name].is_floating_point() and value.is_floating_point():
            own[name].data = own[name].data.to(value.dtype)
        own[name].data.copy_(value)


def _prefix(own: Iterable[str], state: State) -> str:
    """What stands before the names of the model in a checkpoint, such as 'module.': whatever fits most of them."""
    own = list(own)
    found = {""}
    for name in own[:1] + own[-1:]:
        ends = (each.removesuffix(name) for each in state if each.endswith(name))
        found.update(prefix for prefix in ends if prefix.endswith("."))
    return max(sorted(found), key=lambda prefix: sum(f"{prefix}{name}" in state for name in own))


def _check_names(model: nn.Module, own: Mapping[str, Tensor], state: State, prefix: str, source: Any) -> list[str]:
    """Check that a checkpoint has the names of a model. Returns names that do not begin with the prefix of these."""
    present = {id(own[name]) for name in own if f"{prefix}{name}" in state}  # of tied weights one is enough
    missing = [name for name, tensor in own.items() if id(tensor) not in present]
    buffers = {f"{prefix}{name}" for name, _ in model.named_buffers()}  # which a model may compute itself
    others = [name for name in state if name.removeprefix(prefix) not in own and name not in buffers]
    unexpected = [name for name in others if name.startswith(prefix)]
    if missing or unexpected:
        what = [f"lacks {_some(missing)} of the {len(own):,} tensors of the model"] if missing else []
        what += [f"has {_some(unexpected)} that the model does not have"] if unexpected else []
        raise ValueError(
            f"{source} is of another model than {type(model).__name__}: it {' and '.join(what)}; give the --model that "
            "it was saved from"
        )
    return others


def _check_shapes(own: Mapping[str, Tensor], fitting: State, source: Any) -> None:
    other = [name for name, value in fitting.items() if value.shape != own[name].shape]
    if not other:
        return
    name = other[0]
    shapes = tuple(fitting[name].shape), tuple(own[name].shape)
    message = f"{source}: {quoted(name)} has the shape {shapes[0]}, but {shapes[1]} in the model"
    if len(other) > 1:
        message += f", and {len(other) - 1:,} more differ"
    last = [each for each, value in own.items() if value.dim() > 1][-1:]
    numbers = {(fitting[each].shape[:1], own[each].shape[:1]) for each in other}
    only_outputs = all(fitting[each].shape[1:] == own[each].shape[1:] for each in other)
    if set(last) & set(other) and only_outputs and len(numbers) == 1:
        number = fitting[last[0]].shape[0]
        advice = f"it has {number} classes; make the model with num_classes={number}"
        raise _OtherClassesError(f"{message}: {advice}", number)
    raise ValueError(f"{message}; make the model as it was when it was saved")


def _some(names: list[str]) -> str:
    shown = ", ".join(map(quoted, names[:3]))
    return f"{len(names):,} ({shown}{', ...' if len(names) > 3 else ''})"


def batch_of(given: tuple[bool, tuple[int, ...]] | None, model: nn.Module) -> Tensor | None:
    """A batch of a shape: random numbers, or token ids for a model that takes them. None if no shape is given.

    Args:
        given: Whether it has whole numbers, and its shape, as --input says.
        model: The model.
    """
    if given is None:
        return None
    is_whole, shape = given
    if is_whole or getattr(model, "main_input_name", "") in ("input_ids", "decoder_input_ids"):
        return torch.zeros(shape, dtype=torch.long)
    kinds = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    batch = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return batch.to(kinds[0]) if kinds else batch


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """A copy of a model in which the zeros of its matrices and kernels are small random numbers."""
    copy, generator = deepcopy(model), torch.Generator().manual_seed(0)
    for parameter in copy.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            values = 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.copy_(torch.where(parameter == 0, values, parameter))
    return copy
