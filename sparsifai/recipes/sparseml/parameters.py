"""Parameters that several modifiers of SparseML have, as options of a step of this library."""

from __future__ import annotations

import re
from typing import Any

from ...support.printable import quoted
from ...support.registry import close_matches
from .modifiers import Modifier, pattern

StepDict = dict[str, Any]

_CLASS = re.compile(r"[A-Z]\w*")

# Modifiers that prune the default layers unless they name targets.
_WITHOUT_TARGETS = ("SparseGPTModifier", "WandaPruningModifier")

# Classes of layers whose weights can be pruned; the others that a recipe ignores have none.
_WITH_WEIGHTS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D", "ConvTranspose2d", "Embedding")


def chosen(modifier: Modifier, key: str, default: str, known: dict[str, str]) -> str:
    """The counterpart of a parameter that is one of several names.

    Args:
        modifier: The modifier.
        key: Its parameter.
        default: The name if the recipe does not give one.
        known: Name -> counterpart.

    Raises:
        ValueError: It is another name.
    """
    value = modifier.take(key, default)
    if not isinstance(value, str) or value not in known:
        raise modifier.error(key, f"unknown value {quoted(str(value))}; {close_matches(str(value), known)}")
    return known[value]


def times(modifier: Modifier, epochs: float | None) -> StepDict:
    """start, end and update_every in epochs; -1 in SparseML means the start of training, its end, and every step.

    Args:
        modifier: The modifier.
        epochs: The number of epochs, or None if it is not known.

    Raises:
        ValueError: The end is not after the start, or the start is not within training.
    """
    start, end = modifier.number("start_epoch"), modifier.number("end_epoch")
    every = modifier.number("update_frequency") if "update_frequency" in modifier.values else None
    found = {} if start is None else {"start": max(start, 0)}
    if found.get("start") and epochs is None:
        raise modifier.error("start_epoch", "no modifier says how many epochs there are; give epochs= or --epochs")
    if end is not None and end >= 0:
        if end <= found.get("start", 0):
            raise modifier.error("end_epoch", f"{end:g} is not after start_epoch {found.get('start', 0):g}")
        found["end"] = end
    elif epochs is not None and found.get("start", 0) >= epochs:
        raise modifier.error("start_epoch", f"{found['start']:g} is not before the end of training, {epochs}")
    if every is not None and every > 0:
        found["update_every"] = every
    return found


def masks(modifier: Modifier, context: str, default: str = "unstructured") -> StepDict | None:
    """Granularity and context of a mask_type; None and a notice if it has no counterpart.

    Args:
        modifier: The modifier.
        context: The context of masks that do not prescribe one.
        default: The mask_type if the recipe does not give one.
    """
    given = modifier.take("mask_type", default)
    if isinstance(given, str) and (sizes := re.fullmatch(r"block_(\d{1,4}),(\d{1,4})", given)):
        given = [int(size) for size in sizes.groups()]
    sides = given if isinstance(given, list) and len(given) == 2 else [0]
    if given in ("unstructured", "0:0"):
        return {"granularity": "weight", "context": context}
    if given in ("block", "block4"):
        return {"granularity": "1x4", "context": context}
    if all(type(side) is int and 0 < side < 10**4 for side in sides):
        return {"granularity": f"{sides[0]}x{sides[1]}", "context": context}
    if given in ("filter", "channel"):
        does = "gives the model's output" if given == "filter" else "reads the model's input"
        modifier.note("mask_type", f"the layer that {does} stays dense, unless it is named exactly")
        return {"granularity": given, "context": context, "pool": "l2"}
    given = "2:4" if given == "tensorrt" else given
    n_of_m = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", given) if isinstance(given, str) else None
    if n_of_m and int(n_of_m[1]) < int(n_of_m[2]):
        return {"granularity": "weight", "context": given}
    modifier.leave(f"{modifier.spelled.get('mask_type', 'mask_type')} {quoted(str(given))} has no counterpart")
    return None


def sparsities(modifier: Modifier, key: str) -> StepDict:
    """sparsity and layers of a parameter that is a fraction for params, or {fraction: names}.

    Args:
        modifier: The modifier.
        key: The parameter that has the sparsity.

    Raises:
        ValueError: It is missing, or has other values.
    """
    if key not in modifier.values:
        raise modifier.error(key, "is missing; give the sparsity at the end")
    final = modifier.take(key)
    if not isinstance(final, dict):
        return {"sparsity": modifier.fraction(key, final), **layers(modifier)}
    if modifier.take("params"):
        modifier.note("params", f"{key} names the parameters; left out")
    fractions: dict[str, float] = {}
    for fraction, names in final.items():
        for name in patterns(modifier, key, names):
            fractions.setdefault(name, modifier.fraction(key, fraction))
    if not fractions:
        raise modifier.error(key, "expected fractions with names of parameters: {0.8: ['re:.*weight']}")
    # Of several patterns that match a layer, SparseML uses the first, and this library the last.
    return {"sparsity": dict(reversed(fractions.items()))}


def layers(modifier: Modifier) -> StepDict:
    """layers of `params`, which names parameters or says all of them; nothing for the default layers.

    Args:
        modifier: The modifier.

    Raises:
        ValueError: It has other values than names.
    """
    names = modifier.take("params", "__ALL_PRUNABLE__" if modifier.name == "StructuredPruningModifier" else None)
    tokens = {str(name).upper() for name in (names if isinstance(names, list) else [names])}
    if "__ALL__" in tokens:
        modifier.note("params", "biases and norm layers are not pruned; the weights of all other layers are")
        return {"layers": ["*"]}
    if "__ALL_PRUNABLE__" in tokens:
        modifier.note(
            "params",
            "the default layers are selected: convolutions and linear layers, and attention and recurrent layers too, "
            "but none that are frozen",
        )
        return {}
    if names is None and modifier.name in _WITHOUT_TARGETS:
        return {}
    return {"layers": patterns(modifier, "params", names)}


def ignored(modifier: Modifier) -> StepDict:
    """exclude of `ignore`, without the classes of layers that have no weights to prune.

    Args:
        modifier: The modifier.

    Raises:
        ValueError: It has other values than names.
    """
    names = modifier.take("ignore", [])
    named = [names] if isinstance(names, str) else names
    if not isinstance(named, list):
        raise modifier.error("ignore", f"expected names of layers, not {quoted(named)}")
    kept = [name for name in named if not _is_class(name) or name in _WITH_WEIGHTS]
    if not kept:
        return {}
    modifier.note("ignore", "a name that matches no layer is an error when the recipe is used")
    return {"exclude": patterns(modifier, "ignore", kept, classes=True)}


def patterns(modifier: Modifier, key: str, names: Any, classes: bool = False) -> list[str]:
    """Patterns of names and regular expressions, in their order, each once; nested lists are flattened.

    Args:
        modifier: The modifier, for errors.
        key: Its parameter. In `targets` a name may be that of a class.
        names: A name, or a list of names and lists.
        classes: Whether a name may be that of a class, whatever the parameter is called. Default False.

    Raises:
        ValueError: There is no name, or one is no string.
    """
    names = names if isinstance(names, list) else [names]
    flat = [each for name in names for each in (name if isinstance(name, list) else [name])]
    if not flat:
        raise modifier.error(key, "expected at least one name of a parameter")
    classes = classes or modifier.spelled.get(key) == "targets"
    return list(
        dict.fromkeys(f"class:{name}" if classes and _is_class(name) else pattern(modifier, key, name) for name in flat)
    )


def _is_class(name: Any) -> bool:
    return isinstance(name, str) and bool(_CLASS.fullmatch(name))


def note_common(modifier: Modifier) -> None:
    """Notices of parameters that all pruning modifiers have.

    Args:
        modifier: The modifier.
    """
    if modifier.take("leave_enabled", True) is not True:
        modifier.note("leave_enabled", "zeros are kept to the end of training, and in later fits by KeepSparsity")
    for key in ("log_types", "log_frequency"):
        modifier.note(key, "logging is left to fastai; left out")
