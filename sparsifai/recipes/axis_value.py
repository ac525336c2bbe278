"""What a recipe says of an axis: a name, or a name with options, as the function that it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..axes.budget import bounded
from ..axes.context import contexts
from ..axes.criterion import criteria
from ..axes.granularity import block, granularities
from ..axes.n_of_m import blocks
from ..axes.schedule import between, during, iterative, raised, schedules, stepped
from ..support.registry import Registry, close_matches

_REGISTRIES: dict[str, Registry] = {
    "granularity": granularities, "context": contexts, "criteria": criteria, "schedule": schedules, "decay": schedules,
}  # fmt: skip


# What makes a value of an axis when it is called.
_MAKERS: dict[str, dict[str, Callable]] = {
    "granularity": {"block": block},
    "context": {"blocks": blocks, "bounded": bounded},
    "criteria": {},
    "schedule": {
        "iterative": iterative, "between": between, "during": during, "raised": raised, "stepped": stepped,
    },
}  # fmt: skip


_OF_ANOTHER = {**dict.fromkeys(("between", "during", "raised", "stepped"), "schedule"), "bounded": "context"}
_MAKERS["decay"] = _MAKERS["schedule"]


def axis_value(axis: str, value: Any) -> Callable:
    """'agp' -> agp, {'iterative': 5} -> iterative(5), {'one_cycle': {'alpha': 14}} -> one_cycle with that option.

    axis: 'granularity', 'context', 'criteria', 'schedule' or 'decay'. Options are one value, a list, or by name.
    ValueError that lists the close matches, for what is not known.
    """
    registry, makers = _REGISTRIES[axis], _MAKERS[axis]
    if isinstance(value, (list, tuple)) and axis == "granularity":
        return registry.resolve(tuple(value))
    if not isinstance(value, Mapping):
        if not isinstance(value, str):
            raise ValueError(f"{axis} is a name, or a mapping of one name to its options, not {value!r}")
        return registry.resolve(value)
    if len(value) != 1:
        raise ValueError(f"{axis}: one name with its options, such as {{iterative: 5}}; not {dict(value)!r}")
    ((name, options),) = value.items()
    positional, named = _given(options)
    if name in makers:
        # The first argument of some is another value of the axis, by place or by name.
        inner = _OF_ANOTHER.get(name)
        if inner and positional:
            positional = (axis_value(axis, positional[0]), *positional[1:])
        elif inner and inner in named:
            named[inner] = axis_value(axis, named[inner])
        return _called(makers[name], positional, named, axis, name)
    if name not in registry:
        raise ValueError(f"unknown {axis} {name!r}; {close_matches(str(name), [*registry, *makers])}")
    if positional:
        raise ValueError(f"{axis} {name}: options are given by name, not {options!r}")
    made = partial(registry[name], **named)
    return registry.resolve(made)


def _given(options: Any) -> tuple[tuple, dict[str, Any]]:
    if options is None:
        return (), {}
    if isinstance(options, Mapping):
        return (), dict(options)
    return (tuple(options) if isinstance(options, list) else (options,)), {}


def _called(maker: Callable, positional: tuple, named: dict[str, Any], axis: str, name: str) -> Callable:
    try:
        return maker(*positional, **named)
    except TypeError as error:
        raise ValueError(f"{axis} {name}: {error}") from error
