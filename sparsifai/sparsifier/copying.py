"""Copying a Sparsifier with its model, and sending both to another process."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any

from torch import nn

from ..support.printable import quoted
from ..support.registry import name_of

# The attributes of a module that hold what the user has hooked on it.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# The axes and options whose values can be functions.
_FUNCTIONS = ("granularity", "context", "criteria", "pool", "regrow")


class CopiedWithModel:
    """A class whose `__getstate__` says what of it is copied, and pickled if all functions in it can be."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def __copy__(self) -> Any:
        copied = type(self).__new__(type(self))
        vars(copied).update(self.__getstate__())
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        held: Any = self
        _check_can_be_pickled(vars(held.ranking.options), held.model)
        return super().__reduce_ex__(protocol)


class _Functions(pickle.Pickler):
    """A pickler that leaves out models: a hook can be a method of one, and there can be a hook on every layer."""

    def persistent_id(self, value: Any) -> str | None:
        return "model" if isinstance(value, nn.Module) else None


def _check_can_be_pickled(options: Mapping[str, Any], model: nn.Module | None) -> None:
    """Check the functions that another process has to find by their names.

    Raises:
        pickle.PicklingError: One of them cannot be found so.
    """
    for name in _FUNCTIONS:
        if (why := _why_not(options[name])) is not None:
            raise pickle.PicklingError(
                f"Sparsifier: {name}={name_of(options[name])} cannot be pickled, which is also how a Sparsifier gets "
                f"to another process ({why}); use a function that is defined by def at the top level of a module, or "
                "a functools.partial of one"
            )
    for layer, hook in _hooks_of(model):
        if (why := _why_not(hook)) is not None:
            raise pickle.PicklingError(
                f"Sparsifier: the model cannot be pickled, which is also how a Sparsifier gets to another process: it "
                f"has the hook {name_of(hook)} on {quoted(layer or 'itself')} ({why}); remove the hook before, by its "
                "handle, and register it again in the other process"
            )


def _hooks_of(model: nn.Module | None) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules() if model is not None else ():
        for kind in _HOOKS:
            for hook in getattr(module, kind).values():
                yield name, hook


def _why_not(value: Any) -> str | None:
    """Why a value cannot be pickled, None if it can be."""
    try:
        _Functions(BytesIO()).dump(value)
    except Exception as error:  # pickle.PicklingError, AttributeError, TypeError, or what an object's own code raises
        return str(error)
    return None
