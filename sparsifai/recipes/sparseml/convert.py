"""Recipes of SparseML as recipes of this library: `convert` says what a text means here, and what of it does not.

Names, defaults and behaviour of the modifiers are those of neuralmagic/sparseml, src/sparseml/pytorch/sparsification:
a gradual modifier takes its parameters from init_sparsity at start_epoch to final_sparsity at end_epoch by
`interpolate` (src/sparseml/utils/helpers.py), anew every update_frequency epochs, and each parameter alone, unless its
sparsity is global.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from ...support.registry import close_matches
from .modifiers import Modifier, Notice, read_modifiers
from .steps import LEFT_OUT, LEFT_TO_FASTAI, STEPS, StepDict

__all__ = ["Notice", "convert"]


def convert(text: str) -> tuple[dict[str, Any], list[Notice]]:
    """A recipe of SparseML, YAML or Markdown with it in front, as {"epochs": ..., "steps": [...]}, and notices.

    Each modifier, and each of its parameters, that is not carried over or means something else here has a notice.
    ValueError, with the line, for a text that is no such recipe; no text makes anything run.
    """
    modifiers, notices = read_modifiers(text)
    epochs = _epochs(modifiers, notices)
    steps: list[tuple[int, str, StepDict]] = []
    for modifier in modifiers:
        if modifier.name in STEPS:
            kind, make = STEPS[modifier.name]
            step = make(modifier, epochs)
            modifier.leave_rest()
            if step is not None:
                steps.append((modifier.line, kind, step))
        elif modifier.name != "EpochRangeModifier":
            known = {*STEPS, *LEFT_OUT, "EpochRangeModifier"}
            message = LEFT_OUT.get(modifier.name) or f"is not known here; {close_matches(modifier.name, known)}"
            modifier.leave(message, lost=modifier.name not in LEFT_TO_FASTAI)
    recipe: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
    recipe["steps"] = [{kind: step} for kind, step in _merged(steps, notices)]
    return recipe, sorted(notices, key=lambda notice: (notice.line, notice.key))


def _epochs(modifiers: list[Modifier], notices: list[Notice]) -> int | None:
    """The end of the last modifier: where one ends after EpochRangeModifier, that counts, as in SparseML."""
    named = [modifier for modifier in modifiers if modifier.name == "EpochRangeModifier"]
    for modifier in named:
        if modifier.number("start_epoch", 0) > 0:
            modifier.note("start_epoch", "training begins at 0; left out")
        modifier.take("end_epoch")
        modifier.leave_rest()
    end = max((modifier.number("end_epoch", 0) for modifier in named), default=0)
    for modifier in modifiers:
        last = modifier.check_number("end_epoch", modifier.values.get("end_epoch"))
        if last is not None and last > end:
            if named:
                modifier.note(
                    "end_epoch", f"is after the {end:g} epochs of EpochRangeModifier: there are {last:g} epochs"
                )
            end = last
    if end <= 0:
        notices.append(Notice(1, "epochs", "no modifier says how many epochs there are; give epochs yourself"))
        return None
    if end != math.ceil(end):
        for modifier in named:
            modifier.note("end_epoch", f"{end:g} epochs are rounded up to whole ones")
    return math.ceil(end)


# --- Several modifiers in one step ------------------------------------------------------------------------------------


def _merged(steps: list[tuple[int, str, StepDict]], notices: list[Notice]) -> Iterator[tuple[str, StepDict]]:
    """Steps of which one is enough taken together: those that sparsify alike, and the same ones."""
    groups: dict[str, list[tuple[int, str, StepDict]]] = {}
    for number, (line, kind, step) in enumerate(steps):
        rest = {key: value for key, value in step.items() if key not in ("sparsity", "layers")}
        alike = [rest if kind == "sparsify" else step, kind, number if kind == "distil" else 0]
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append((line, kind, step))
    first = 0
    for group in groups.values():
        joined = _one_step([step for _, _, step in group]) if group[0][1] == "sparsify" else group[0][2]
        for line, kind, step in group if joined is None else [(*group[0][:2], joined)]:
            if kind == "sparsify" and first:
                message = f"in one fit there is one, and this one cannot be joined with that of line {first}; left out"
                notices.append(Notice(line, kind, message, lost=True))
                continue
            first = first or (line if kind == "sparsify" else 0)
            yield kind, step


def _one_step(steps: list[StepDict]) -> StepDict | None:
    """Steps that differ in sparsity and layers as one with a sparsity for each pattern; None if that is another."""
    if len(steps) == 1:
        return steps[0]
    fractions: dict[str, float] = {}
    for step in steps:
        given = step["sparsity"]
        if not isinstance(given, dict):
            given = dict.fromkeys(step.get("layers", ["*"]), given)
        # Patterns of one global sparsity are ranked together, those of a dictionary are not.
        is_split = len(given) > 1 and step["context"] != "local" and ":" not in step["context"]
        if is_split or fractions.keys() & given.keys() or "*" in given:
            return None
        fractions |= given
    return {
        "sparsity": fractions,
        **{key: value for key, value in steps[0].items() if key not in ("sparsity", "layers")},
    }
