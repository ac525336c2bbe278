"""Convert a recipe of SparseML to a recipe of this library, with a notice for whatever has no counterpart.

Names, defaults and behaviour of the modifiers are those of neuralmagic/sparseml, src/sparseml/pytorch/sparsification.
A gradual modifier moves the sparsity from init_sparsity at start_epoch to final_sparsity at end_epoch by `interpolate`
(src/sparseml/utils/helpers.py), with an update every update_frequency epochs. It prunes each parameter by itself,
unless its sparsity is global.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from ...support.registry import close_matches
from .modifiers import Modifier, Notice
from .parsing import read_modifiers
from .steps import LEFT_OUT, LEFT_TO_FASTAI, STEPS, StepDict

__all__ = ["Notice", "convert"]


def convert(text: str) -> tuple[dict[str, Any], list[Notice]]:
    """Convert the text of a SparseML recipe. No code in it is run.

    Args:
        text: YAML, or Markdown that begins with it.

    Returns:
        The content of a recipe, {"epochs": ..., "steps": [...]}, and a notice for each modifier and each parameter that
        is left out or means something else here, in the order of lines.

    Raises:
        TypeError: `text` is not a str.
        ValueError: It is not a recipe of SparseML. The message names the line.
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
            message = LEFT_OUT.get(modifier.name) or f"is not a known modifier; {close_matches(modifier.name, known)}"
            modifier.leave(message, lost=modifier.name not in LEFT_TO_FASTAI)
    recipe: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
    recipe["steps"] = [{kind: step} for kind, step in _merged(steps, notices)]
    return recipe, sorted(notices, key=lambda notice: (notice.line, notice.key))


def _epochs(modifiers: list[Modifier], notices: list[Notice]) -> int | None:
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
        notices.append(Notice(1, "epochs", "no modifier says how many epochs there are; give epochs= or --epochs"))
        return None
    if end != math.ceil(end):
        for modifier in named:
            modifier.note("end_epoch", f"{end:g} epochs are rounded up to a whole number")
    return math.ceil(end)


# --- Several modifiers in one step ------------------------------------------------------------------------------------


def _merged(steps: list[tuple[int, str, StepDict]], notices: list[Notice]) -> Iterator[tuple[str, StepDict]]:
    """Merge sparsify steps that differ only in sparsity and layers, and steps that are equal."""
    groups: dict[str, list[tuple[int, str, StepDict]]] = {}
    for number, (line, kind, step) in enumerate(steps):
        rest = {key: value for key, value in step.items() if key not in ("sparsity", "layers")}
        same = [rest if kind == "sparsify" else step, kind, number if kind == "distil" else 0]
        groups.setdefault(json.dumps(same, sort_keys=True), []).append((line, kind, step))
    first = 0  # line of the sparsify step
    for group in groups.values():
        joined = _one_step([step for _, _, step in group]) if group[0][1] == "sparsify" else group[0][2]
        for line, kind, step in group if joined is None else [(*group[0][:2], joined)]:
            if kind == "sparsify" and first:
                message = (
                    f"a fit has one sparsify step, and this one cannot be joined with that of line {first}; left out"
                )
                notices.append(Notice(line, kind, message, lost=True))
                continue
            first = first or (line if kind == "sparsify" else 0)
            yield kind, step


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
        is_split = len(given) > 1 and step["context"] != "local" and ":" not in step["context"]
        if is_split or fractions.keys() & given.keys() or "*" in given:
            return None
        fractions |= given
    return {
        "sparsity": fractions,
        **{key: value for key, value in steps[0].items() if key not in ("sparsity", "layers")},
    }
