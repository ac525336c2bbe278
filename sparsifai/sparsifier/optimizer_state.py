"""The state that an optimizer keeps of parameters, such as their moments, also inside of wrappers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..model.parallel import is_sharded

# Attributes of optimizers that hold parameters and numbers, of which there are many.
_OWN = ("state", "param_groups", "param_lists", "slow_weights", "defaults", "hypers")


def wrapped_by(optimizer: Any) -> list[Any]:
    """The optimizers that an optimizer holds, under whatever name, also in lists, tuples and dictionaries."""
    found: list[Any] = []
    attributes = vars(optimizer) if hasattr(optimizer, "__dict__") else {}
    held = [value for name, value in attributes.items() if name not in _OWN]
    for value in held:
        if isinstance(value, MethodType):  # a wrapper may hold no more of the optimizer than its step
            value = value.__self__
        if isinstance(value, Mapping):
            held += value.values()
        elif isinstance(value, (list, tuple)):
            held += value
        elif _is_optimizer(value) and value is not optimizer and not any(value is each for each in found):
            found.append(value)
    return found


def _is_optimizer(value: Any) -> bool:
    """Whether a value has steps and parameters. A scheduler has steps only; it often refers to another optimizer."""
    if isinstance(value, (nn.Module, Tensor, type)) or not callable(getattr(value, "step", None)):
        return False
    return any(hasattr(value, name) for name in ("param_groups", "param_lists")) or bool(
        isinstance(getattr(value, "state", None), Mapping)
    )


def with_wrapped(optimizer: Any) -> list[Any]:
    """An optimizer, those that it wraps, those that they wrap, and so on."""
    found = [optimizer]
    for each in found:
        found += [inner for inner in wrapped_by(each) if not any(inner is other for other in found)]
    return found


def states_of(optimizer: Any) -> list[Mapping[Any, Any]]:
    """The states of an optimizer and of the optimizers that it wraps, each as {parameter: {name: value}}.

    Raises:
        TypeError: There is none.
    """
    states: list[Mapping[Any, Any]] = []
    slow: list[Mapping[Any, Any]] = []
    for each in with_wrapped(optimizer):
        state = getattr(each, "state", None)
        if isinstance(state, Mapping) and not any(state is other for other in states):
            states.append(state)
        if getattr(each, "slow_weights", None) is not None:  # of fastai's Lookahead, which copies them to the weights
            pairs = (zip(*both, strict=True) for both in zip(each.param_lists, each.slow_weights, strict=True))
            slow.append({parameter: {"slow": weight} for group in pairs for parameter, weight in group})
    if not states:
        raise TypeError(
            f"{type(optimizer).__name__} is no optimizer, because it has no `state` by parameter; pass an optimizer of "
            "torch or fastai"
        )
    return [*states, *slow]


def moments_of(parameter: Tensor, states: Iterable[Mapping[Any, Any]]) -> Iterator[tuple[str, Tensor]]:
    """The entries of states that have a number for each weight of a parameter, each with its name."""
    for state in states:
        entries = state.get(parameter)
        for name, value in entries.items() if isinstance(entries, Mapping) else ():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                yield name, value


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is one of numbers, and not of the codes of a quantized tensor."""
    return (type(value) is Tensor or is_sharded(value)) and (value.is_floating_point() or value.is_complex())


def check_writable(entry: str, value: Tensor, optimizer: Any) -> None:
    """Refuse a moment that cannot be changed in place.

    Args:
        entry: Its name in the state of the optimizer.
        value: The moment.
        optimizer: The optimizer.

    Raises:
        TypeError: It is sparse, its numbers share memory, or it was made under torch.inference_mode.
    """
    if value.layout != torch.strided:
        kind = "a sparse tensor"
    elif any(size > 1 and step == 0 for size, step in zip(value.shape, value.stride(), strict=True)):
        kind = "an expanded tensor"
    elif value.is_inference() and not torch.is_inference_mode_enabled():
        kind = "an inference tensor"
    else:
        return
    raise _unreachable(type(optimizer).__name__, f"keeps `{entry}` of a weight as {kind}")


def check_reachable(parameters: Iterable[nn.Parameter], optimizer: Any) -> None:
    """Refuse an optimizer that keeps moments where they cannot be masked.

    Before its first step an optimizer has no state; then nothing can be said.

    Args:
        parameters: The parameters that have masks.
        optimizer: The optimizer, or a wrapper around one.

    Raises:
        TypeError: The state is not kept by parameter, it is not found although steps were made, or it has quantized
            moments, those of several parameters in one vector, or some that cannot be changed in place.
    """
    name, states = type(optimizer).__name__, [state for state in states_of(optimizer) if state]
    if states and not any(isinstance(key, Tensor) for state in states for key in state):
        raise _unreachable(name, f"keeps its state by {type(next(iter(states[0]))).__name__}, not by parameter")
    if not states and any(_keeps_moments(group) for group in _groups_of(optimizer)) and _has_stepped(optimizer):
        raise _unreachable(name, "has made steps, but has no `state` of any parameter")
    for parameter in parameters:
        for entry, value in moments_of(parameter, states):
            if value.numel() > 1 and is_plain(value):
                check_writable(entry, value, optimizer)
            elif value.numel() > 1:
                kind = str(value.dtype) if type(value) is Tensor else type(value).__name__
                raise _unreachable(name, f"keeps `{entry}` of a weight as codes ({kind})")
    for group in _groups_of(optimizer):
        if joint := _joint_entry(group.get("params", ()), states):
            raise _unreachable(name, f"keeps `{joint}` of all weights in one vector")


def _joint_entry(parameters: Iterable[Tensor], states: Iterable[Mapping[Any, Any]]) -> str | None:
    """The name of an entry that has a number for each weight of several parameters, as the direction of LBFGS."""
    parameters = list(parameters)
    total = sum(parameter.numel() for parameter in parameters)
    for parameter in parameters:
        for state in states:
            entries = state.get(parameter)
            for name, value in entries.items() if isinstance(entries, Mapping) else ():
                if isinstance(value, Tensor) and value.shape == (total,) != parameter.shape and total > 1:
                    return name
    return None


def _unreachable(name: str, why: str) -> TypeError:
    return TypeError(
        f"mask_moments: {name} {why}, so moments of pruned weights cannot be set to zero; call apply_masks() after "
        "each step instead"
    )


def _groups_of(optimizer: Any) -> list[Mapping[str, Any]]:
    groups = [group for each in with_wrapped(optimizer) for group in getattr(each, "param_groups", ())]
    return [group for group in groups if isinstance(group, Mapping)]


def _keeps_moments(group: Mapping[str, Any]) -> bool:
    return bool(group.get("momentum")) or bool(group.get("betas"))


def _has_stepped(optimizer: Any) -> bool:
    """Whether an optimizer, or a scheduler of torch, has counted a step of it."""
    if any(getattr(each, "_opt_called", False) for each in with_wrapped(optimizer)):
        return True
    counts = (value for group in _groups_of(optimizer) for name, value in group.items() if name.endswith("step"))
    return any(isinstance(count, int) and count > 0 for count in counts)
