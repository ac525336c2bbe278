"""What a recipe says about an axis: a name, or a name with options, turned into the function that it means.

A value that is added to a registry works in recipes by its name at once, and so do options that are keyword arguments
of the registered function, such as `{one_cycle: {alpha: 14}}`. A function that *makes* values of an axis, such as
`iterative(n)`, is in no registry: add it to `MAKERS` below, and to `_MAKERS_FROM_ANOTHER` if its first argument is
itself a value of the axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..axes.budget import bounded
from ..axes.changed_schedule import between, during, raised, stepped
from ..axes.context import contexts
from ..axes.criterion import criteria
from ..axes.granularity import block, granularities
from ..axes.n_of_m import blocks
from ..axes.schedule import iterative, schedules
from ..support.registry import Registry, close_matches
from ..training.distillation_loss import distillation_losses

# Option of a step -> the registry of its axis, or of what else is a function with a name.
REGISTRIES: dict[str, Registry] = {
    "granularity": granularities,
    "context": contexts,
    "criteria": criteria,
    "schedule": schedules,
    "drop_schedule": schedules,
    "regrow": criteria,
    "loss": distillation_losses,
    "feature_loss": distillation_losses,
}

# Option of a step -> functions that return a value of its axis.
MAKERS: dict[str, dict[str, Callable]] = {
    "granularity": {"block": block},
    "context": {"blocks": blocks, "bounded": bounded},
    "schedule": {"iterative": iterative, "between": between, "during": during, "raised": raised, "stepped": stepped},
}
MAKERS["drop_schedule"] = MAKERS["schedule"]

# Those of them whose first argument is another value of the axis -> its name.
_MAKERS_FROM_ANOTHER = {
    **dict.fromkeys(("between", "during", "raised", "stepped"), "schedule"),
    "bounded": "context",
}


def axis_value(axis: str, value: Any) -> Callable:
    """Turn what a recipe says about an axis into a function.

    'agp' -> agp, {'iterative': 5} -> iterative(5), {'one_cycle': {'alpha': 14}} -> one_cycle with that option.

    Args:
        axis: 'granularity', 'context', 'criteria', 'schedule', 'drop_schedule', 'regrow', 'loss' or 'feature_loss'.
        value: A name, or a mapping of one name to its options: one value, a list, or a mapping by name. For
            granularity also a list of axes.

    Returns:
        The function.

    Raises:
        ValueError: The name is unknown (the message lists close matches), or its options do not fit.

    Example:
        >>> axis_value('schedule', {'iterative': 5}).__name__
        'iterative(5)'
    """
    registry, makers = REGISTRIES[axis], MAKERS.get(axis, {})
    if isinstance(value, (list, tuple)) and axis == "granularity":
        return registry.resolve(tuple(value))
    if not isinstance(value, Mapping):
        if not isinstance(value, str):
            raise ValueError(f"{axis} must be a name, or a mapping of one name to its options, not {value!r}")
        return registry.resolve(value)
    if len(value) != 1:
        raise ValueError(f"{axis} must be one name with its options, such as {{iterative: 5}}, not {dict(value)!r}")
    ((name, options),) = value.items()
    positional, named = _arguments(options)
    if name in makers:
        another = _MAKERS_FROM_ANOTHER.get(name)
        if another and positional:
            positional = (axis_value(axis, positional[0]), *positional[1:])
        elif another and another in named:
            named[another] = axis_value(axis, named[another])
        try:
            return makers[name](*positional, **named)
        except TypeError as error:
            raise ValueError(f"{axis} {name}: {error}") from error
    if name not in registry:
        raise ValueError(f"unknown {axis} {name!r}; {close_matches(str(name), [*registry, *makers])}")
    if positional:
        raise ValueError(f"{axis} {name}: give options by name, such as {{{name}: {{option: value}}}}, not {options!r}")
    return registry.resolve(partial(registry[name], **named))


def _arguments(options: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments that the options of a name stand for."""
    if options is None:
        return (), {}
    if isinstance(options, Mapping):
        return (), dict(options)
    return (tuple(options) if isinstance(options, list) else (options,)), {}
