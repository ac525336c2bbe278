"""What was asked for in a training, as it is written in a call: for the repr of callbacks and parts."""

from __future__ import annotations

from typing import Any

from ..axes.context import contexts
from ..axes.criterion import criteria
from ..axes.granularity import granularities
from ..axes.grouping import poolings
from ..axes.schedule import schedules
from ..sparsifier.options import Options
from ..support.printable import printable, quoted
from ..support.registry import Registry
from .gradual_pruning import GradualPruning
from .ramp import default_schedule, settle_of

_AXES: dict[str, Registry] = {
    "granularity": granularities,
    "context": contexts,
    "criteria": criteria,
    "schedule": schedules,
    "drop_schedule": schedules,
    "pool": poolings,
    "regrow": criteria,
}
_LONGEST = 40  # characters of a value


def in_words(pruning: GradualPruning) -> str:
    """The arguments that are not the defaults, as they are written in a call of SparsifyCallback.

    Args:
        pruning: What is pruned, how, and when.
    """
    options, ramp = pruning.options, pruning.ramp
    schedule = default_schedule(options.straight_through)
    usual = {**vars(Options.of(straight_through=options.straight_through)), "straight_through": False}
    of_criterion = Options.of(options.granularity, options.context, options.criteria)
    usual |= {name: getattr(of_criterion, name) for name in ("pool", "compensate")}
    given = {name: value for name, value in vars(options).items() if value != usual[name]}
    if ramp.schedule != schedule:
        given["schedule"] = ramp.schedule
    if ramp.initial:
        given["initial_sparsity"] = ramp.initial
    plainly = GradualPruning.of(ramp.sparsity)
    if pruning.regrows:
        changing = {
            "drop": (pruning.drop, plainly.drop),
            "drop_schedule": (pruning.drop_schedule, plainly.drop_schedule),
        }
        given |= {name: value for name, (value, other) in changing.items() if value != other}
    if pruning.settle is not None and pruning.settle != settle_of(ramp):
        given["settle"] = pruning.settle
    if pruning.every is not None:
        given["every"] = pruning.every
    sparsity = quoted(ramp.sparsity, _LONGEST)
    return ", ".join([sparsity, *(f"{name}={_written(name, value)}" for name, value in given.items())])


def _written(name: str, value: Any) -> str:
    if name in ("layers", "exclude"):
        several = ", ".join(repr(each) if isinstance(each, str) else _kind(each) for each in value)
        return printable(f"[{several}]", _LONGEST)
    if name not in _AXES:
        return quoted(value, _LONGEST)
    known = _AXES[name].name_of(value)
    try:
        _AXES[name].resolve(known)
    except (TypeError, ValueError):  # a function of the user's own, or one that another one has made
        return _kind(value) if known.startswith("<") else printable(known, _LONGEST)
    return repr(known)


def _kind(value: Any) -> str:
    """What stands for a value that has no form of its own: the name of a class or function, else that of its class."""
    return printable(getattr(value, "__name__", type(value).__name__), _LONGEST)
