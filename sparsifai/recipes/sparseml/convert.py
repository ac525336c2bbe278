"""Convert a recipe of SparseML to a recipe of this library, with a notice for whatever has no counterpart.

Names, defaults and behaviour of the modifiers are those of neuralmagic/sparseml 1.9: of
src/sparseml/pytorch/sparsification for modifiers with tags, of src/sparseml/modifiers for those without. A gradual
modifier moves the sparsity from init_sparsity at start_epoch to final_sparsity at end_epoch by `interpolate`
(src/sparseml/utils/helpers.py), with an update every update_frequency epochs. It prunes each parameter by itself,
unless its sparsity is global.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...support.checks import check_count
from ...support.printable import printable
from ...support.registry import close_matches
from ..reading import MOST_EPOCHS
from ..step import APPLICABLE
from .modifiers import Modifier, Notice
from .other_steps import LEFT_OUT, LEFT_TO_FASTAI
from .parsing import Stage, read_stages
from .steps import STEPS, WITHOUT_TRAINING, StepDict, prunes

__all__ = ["Notice", "convert"]

# Parameters and options that mean nothing without training.
_TIMES = ("start_epoch", "end_epoch", "update_frequency", "init_sparsity")
_OF_TRAINING = (
    "start", "end", "update_every", "initial_sparsity", "schedule", "regrow", "drop", "drop_schedule",
    "straight_through", "decay", "gradient_sparsity",
)  # fmt: skip


def convert(text: str, epochs: int | None = None) -> tuple[dict[str, Any], list[Notice]]:
    """Convert the text of a SparseML recipe, or of one of llm-compressor. No code in it is run.

    Args:
        text: YAML, or Markdown that begins with it.
        epochs: The number of epochs of stages that do not give it. Default None.

    Returns:
        The content of a recipe, {"epochs": ..., "steps": [...]} or {"stages": [...]}, and a notice for each modifier
        and each parameter that is left out or means something else here, in the order of lines.

    Raises:
        TypeError: `text` is not a str.
        ValueError: It is not a recipe of SparseML, or it prunes and nothing of that can be converted. The message names
            the line.
    """
    epochs = None if epochs is None else check_count("epochs", epochs, MOST_EPOCHS)
    stages, notices = read_stages(text)
    converted = [_converted(stage, epochs, notices) for stage in stages]
    notices.sort(key=lambda notice: (notice.line, notice.key))
    _check_pruning(stages, converted, notices)
    filled = [(stage, recipe) for stage, recipe in zip(stages, converted, strict=True) if recipe["steps"]]
    if len(filled) > 1:
        return {"stages": [{"name": stage.name or "default", **recipe} for stage, recipe in filled]}, notices
    return (filled[0][1] if filled else converted[0]), notices


def _check_pruning(stages: list[Stage], converted: list[dict[str, Any]], notices: list[Notice]) -> None:
    """Refuse a recipe of which nothing that prunes is left, or it would be a recipe of dense training."""
    pruning = [modifier for stage in stages for modifier in stage.modifiers if prunes(modifier.name)]
    kinds = {kind for recipe in converted for step in recipe["steps"] for kind in step}
    if pruning and not kinds & {"sparsify", "keep"}:
        why = "\n".join(["", *(str(notice) for notice in notices if notice.lost)])
        first = printable(pruning[0].name)
        raise ValueError(f"line {pruning[0].line}: {first}: nothing that prunes can be converted:{why}")


def _converted(stage: Stage, epochs: int | None, notices: list[Notice]) -> dict[str, Any]:
    """The content of a recipe for a stage."""
    training = _is_training(stage)
    number = _epochs(stage.modifiers, epochs, notices) if training else None
    steps: list[_Made] = []
    for modifier in stage.modifiers:
        if modifier.name in STEPS:
            kind, make = STEPS[modifier.name]
            made = make(modifier, number if training else math.inf)
            modifier.leave_rest()
            for key in () if training else _TIMES:
                if modifier.values.get(key) not in (None, 0, -1):
                    modifier.note(key, "this stage is applied at once, without training; left out")
            if training:
                steps += [_Made(kind, step, modifier) for step in made]
            elif kind in APPLICABLE:
                steps += [_Made(kind, _without_times(step), modifier) for step in made]
            else:
                modifier.note(modifier.name, "needs training, and this stage is applied without; left out", lost=True)
        elif modifier.name == "EpochRangeModifier":
            if not training:
                modifier.leave("this stage is applied at once, without training", lost=False)
        else:
            known = {*STEPS, *LEFT_OUT, "EpochRangeModifier"}
            message = LEFT_OUT.get(modifier.name) or f"is not a known modifier; {close_matches(modifier.name, known)}"
            modifier.leave(message, lost=modifier.name not in LEFT_TO_FASTAI)
    recipe: dict[str, Any] = {} if training else {"training": False}
    recipe |= {} if number is None else {"epochs": number}
    merged = list(_merged(steps))
    _set_apart([made for made in merged if made.kind == "sparsify"])
    return {**recipe, "steps": [{made.kind: made.step} for made in merged]}


def _is_training(stage: Stage) -> bool:
    """Whether a stage trains: as the recipe says, or unless it has modifiers that need no training and no others."""
    if stage.training is not None:
        return stage.training
    names = {modifier.name for modifier in stage.modifiers if modifier.name != "ConstantPruningModifier"}
    timed = any({"start_epoch", "end_epoch"} & modifier.values.keys() for modifier in stage.modifiers)
    return not names or timed or not names <= WITHOUT_TRAINING


def _without_times(step: StepDict) -> StepDict:
    return {key: value for key, value in step.items() if key not in _OF_TRAINING}


def _epochs(modifiers: list[Modifier], given: int | None, notices: list[Notice]) -> int | None:
    """The number of epochs: the end of the last modifier, even if EpochRangeModifier ends earlier, as in SparseML."""
    named = [modifier for modifier in modifiers if modifier.name == "EpochRangeModifier"]
    for modifier in named:
        if modifier.number("start_epoch", 0) > 0:
            modifier.note("start_epoch", "training starts at epoch 0; left out")
        modifier.take("end_epoch")
        modifier.leave_rest()
    end = max((modifier.number("end_epoch", 0) for modifier in named), default=0)
    for modifier in modifiers:
        last = modifier.check_number("end_epoch", modifier.values.get("end_epoch"))
        if last is not None and last > end:
            if named:
                modifier.note(
                    "end_epoch", f"is after the {end:g} epochs of EpochRangeModifier, so there are {last:g} epochs"
                )
            end = last
    if end <= 0:
        if given is None:
            message = "no modifier says how many epochs there are; give epochs= or --epochs"
            notices.append(Notice(min(modifier.line for modifier in modifiers), "epochs", message))
        return given
    if given is not None and given != math.ceil(end):
        message = f"the recipe says {math.ceil(end)} epochs, so epochs={given} is not used"
        notices.append(Notice(min(modifier.line for modifier in modifiers), "epochs", message))
    if end != math.ceil(end):
        for modifier in named:
            modifier.note("end_epoch", f"{end:g} epochs are rounded up to a whole number")
    return math.ceil(end)


# --- Several modifiers in one step ------------------------------------------------------------------------------------


class _Made(NamedTuple):
    """A step of a recipe, and the modifier, or the first of several, that it was made of."""

    kind: str
    step: StepDict
    modifier: Modifier


def _merged(steps: list[_Made]) -> Iterator[_Made]:
    """Merge sparsify steps that differ only in sparsity and layers, and steps that are equal; quantize comes last."""
    groups: dict[str, list[_Made]] = {}
    for number, made in enumerate(sorted(steps, key=lambda made: made.kind == "quantize")):
        kind, step, _ = made
        same: list[Any] = [kind, step]
        if kind == "sparsify":
            same[1] = {key: value for key, value in step.items() if key not in ("sparsity", "layers")}
        elif kind == "distil":
            same.append(number)
        elif kind == "quantize":
            same[1] = {}  # one step quantizes a model
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(made)
    for alike in groups.values():
        kind, each = alike[0].kind, [made.step for made in alike]
        joined = _one_step(each) if kind == "sparsify" else _united(each) if kind == "quantize" else each[0]
        if joined is None:
            yield from alike
        else:
            yield _Made(kind, joined, alike[0].modifier)


def _set_apart(steps: list[_Made]) -> None:
    """Let no two sparsify steps prune the same layers: a step of all layers leaves out those that another one names.

    Raises:
        ValueError: Two of them name the same layers, or both prune all layers.
    """
    for number, one in enumerate(steps):
        for other in steps[:number]:
            names, others = _named(one.step), _named(other.step)
            if names is None and others is None:
                raise _prune_the_same(one, other, "all layers")
            if names is None or others is None:
                _leave(*((one, other, others) if names is None else (other, one, names)))
            elif both := [name for name in names if name in others]:
                raise _prune_the_same(one, other, ", ".join(both))


def _prune_the_same(one: _Made, other: _Made, what: str) -> ValueError:
    return ValueError(
        f"line {one.modifier.line}: {one.modifier.name}: {printable(what)}: the modifier on line {other.modifier.line} "
        "prunes the same, and one training prunes each layer by one modifier; give each of them its own layers, make "
        "one modifier of them, or make two stages, with a ConstantPruningModifier in the second one"
    )


def _leave(of_all: _Made, of_named: _Made, names: Any) -> None:
    """Leave layers to the step that names them. In SparseML both prune them, so the highest sparsity counts."""
    excluded = of_all.step.get("exclude", [])
    new = [name for name in names if name not in excluded]
    if not new:
        return
    of_all.step["exclude"] = [*excluded, *new]
    fractions = of_named.step["sparsity"]
    lowest = min(fractions.values()) if isinstance(fractions, dict) else fractions
    message = f"the modifier on line {of_all.modifier.line}, which prunes all layers, leaves its layers to this one"
    of_named.modifier.note(of_named.modifier.name, message, lost=lowest < of_all.step["sparsity"])


def _named(step: StepDict) -> list[str] | None:
    """The patterns of a sparsify step; None if it prunes all layers."""
    if isinstance(step["sparsity"], dict):
        return list(step["sparsity"])
    return None if step.get("layers") in (None, ["*"]) else step["layers"]


def _united(steps: list[StepDict]) -> StepDict:
    """One step of several: from the start of the first on, with the layers of all."""
    united = {key: value for step in steps for key, value in step.items()}
    if "start" in united:
        united["start"] = min(step["start"] for step in steps)
    for key, needed in (("layers", all), ("exclude", any)):  # without `layers`, a step has all layers
        lists = [step.get(key) for step in steps]
        united.pop(key, None)
        if needed(lists):
            united[key] = list(dict.fromkeys(name for names in lists if names for name in names))
    return united


def _one_step(steps: list[StepDict]) -> StepDict | None:
    """One step with a sparsity for each pattern, from steps that differ in sparsity and layers; None if they clash."""
    if len(steps) == 1:
        return steps[0]
    fractions: dict[str, float] = {}
    for step in steps:
        given = step["sparsity"]
        if not isinstance(given, dict):
            given = dict.fromkeys(step.get("layers", ["*"]), given)
        # Layers of one global sparsity are ranked together; with a dictionary, those of each pattern are ranked apart.
        is_split = len(given) > 1 and step["context"] not in ("local", "per_output") and ":" not in step["context"]
        if is_split or "*" in given:
            return None
        # Of several modifiers for a layer, in SparseML the masks of all apply, so the highest sparsity counts.
        fractions |= {name: max(fraction, fractions.get(name, 0.0)) for name, fraction in given.items()}
    if not any(isinstance(step["sparsity"], dict) for step in steps):
        fractions = dict(sorted(fractions.items(), key=lambda item: item[1]))  # here the last pattern counts
    rest = {key: value for key, value in steps[0].items() if key not in ("sparsity", "layers")}
    if len(set(fractions.values())) == 1 and all("layers" in step for step in steps):
        return {"sparsity": max(fractions.values()), "layers": list(fractions), **rest}
    if any(name.startswith("class:") for name in fractions):
        return None
    return {"sparsity": fractions, **rest}
