"""What each modifier of SparseML becomes: a step of a recipe of this library, and notices of what is lost."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from ...support.printable import quoted
from ...support.registry import close_matches
from .modifiers import Modifier, pattern

StepDict = dict[str, Any]

# inter_func -> schedule: x, 1 - (1 - x)^3, ...; inverse_cubic, 1 - (1 - x)^(1/3), has no counterpart.
_SCHEDULES = {"linear": "lin", "cubic": "agp", "cosine": "cos", "inverse_cubic": "lin"}
# score_type -> criterion
_CRITERIA = {"magnitude": "large_final", "movement": "movement_pruning"}
# sparsity_strategy -> context
_CONTEXTS = {"erdos_renyi_kernel": "erk", "erdos_renyi": "er", "uniform": "local"}

_TO_FASTAI = "learning rates are left to fastai, such as fit_one_cycle"

# Modifiers that are not converted -> what to say of them.
LEFT_OUT = {
    "LearningRateFunctionModifier": _TO_FASTAI,
    "LearningRateModifier": _TO_FASTAI,
    "SetLearningRateModifier": _TO_FASTAI,
    "SetWeightDecayModifier": "weight decay is left to fastai: wd= of the Learner or of fit",
    "QuantizationModifier": "quantization is left to torch, whose quantization-aware training works with zeros",
    "LegacyQuantizationModifier": "quantization is left to torch",
    "LayerThinningModifier": "has no counterpart: layers keep their size in training; use shrink(model) after it",
    "LayerPruningModifier": "has no counterpart: no layer is removed while training",
    "OBSPruningModifier": "has no counterpart; the nearest are a magnitude modifier and criteria 'fisher'",
    "MFACPruningModifier": "has no counterpart; the nearest are a magnitude modifier and criteria 'fisher'",
    "MFACGlobalPruningModifier": "has no counterpart; the nearest are a magnitude modifier and criteria 'fisher'",
    "SetParamModifier": "has no counterpart; set values of parameters before training",
    "GradualParamModifier": "has no counterpart; set values of parameters before training",
}

# Those of them that change neither the model nor its sparsity.
LEFT_TO_FASTAI = {name for name in LEFT_OUT if "LearningRate" in name or "WeightDecay" in name}


# --- Steps ------------------------------------------------------------------------------------------------------------


def _gradual(modifier: Modifier, epochs: int | None, **changed: str) -> StepDict | None:
    """GMPruningModifier, and modifiers that differ from it in criterion, context or granularity."""
    score = modifier.take("score_type", changed.get("score", "magnitude"))
    if not isinstance(score, str) or score not in _CRITERIA:
        modifier.leave(
            f"score_type {quoted(str(score))} has no counterpart; known are {', '.join(map(repr, _CRITERIA))}"
        )
        return None
    is_global = modifier.take("global_sparsity", changed.get("context") == "global")
    masks = _masks(modifier, "global" if is_global is True else "local", changed.get("mask_type", "unstructured"))
    if masks is None:
        return None
    if "final_sparsity" not in modifier.values:
        raise modifier.error("final_sparsity", "is missing; give the sparsity at the end")
    step = {**_sparsities(modifier), **masks, "criteria": _CRITERIA[score]}
    step["schedule"] = _chosen(modifier, "inter_func", "cubic", _SCHEDULES)
    if modifier.values.get("inter_func") == "inverse_cubic":
        modifier.note("inter_func", "1 - (1 - x)^(1/3) has no counterpart; 'lin' has the same ends")
    step |= _times(modifier, epochs)
    initial = modifier.take("init_sparsity")
    if initial == "__FROM_PARAM__":
        modifier.note(
            "init_sparsity", "sparsity starts at 0, and weights that are zero already are the first to be pruned"
        )
    elif initial is not None:
        step["initial_sparsity"] = modifier.fraction("init_sparsity", initial)
    _note_common(modifier)
    if modifier.values.get("param_groups"):
        modifier.note("param_groups", "layers are ranked one by one, not in groups of layers; left out")
    return step


def _ac_dc(modifier: Modifier, epochs: int | None) -> StepDict | None:
    """ACDCPruningModifier: phases of update_frequency epochs, dense and sparse in turn; the last one is sparse."""
    masks = _masks(modifier, "global" if modifier.take("global_sparsity", True) is True else "local", "unstructured")
    if masks is None:
        return None
    times = _times(modifier, epochs)
    start, end, phase = times.get("start", 0), times.get("end", epochs), times.get("update_every")
    if end is None or phase is None or not phase < end - start < 1e6 * phase:
        raise modifier.error("update_frequency", "expected phases short enough for two of them before end_epoch")
    # Training ends with a sparse phase: the last phase that begins, or the one before it if that is dense.
    last = math.ceil((end - start) / phase - 1e-9) - 1
    if last % 2 == 0:
        end = start + last * phase
        last -= 1
        modifier.note(
            "end_epoch", f"the last phase would be dense; it is left out, and the last sparse phase ends at {end:g}"
        )
    share = phase / (end - start)
    options = {"warm_up": share, "phase": share, "dense": (last - 1) * share, "sparse": last * share}
    step: StepDict = {"sparsity": modifier.fraction("compression_sparsity", modifier.take("compression_sparsity"))}
    step |= {**_layers(modifier, "params"), **masks, "criteria": "large_final", "schedule": {"ac_dc": options}}
    modifier.note(
        "momentum_buffer_reset", "the momentum of a weight is zero while it is masked; other momentum is kept"
    )
    _note_common(modifier)
    return {**step, "start": start, "end": end, "update_every": phase}


def _rigl(modifier: Modifier, epochs: int | None) -> StepDict | None:
    """RigLPruningModifier: from (1 - f) s to s along a cosine; updates prune and regrow a fraction f that decays."""
    masks = _masks(modifier, _chosen(modifier, "sparsity_strategy", "erdos_renyi_kernel", _CONTEXTS), "unstructured")
    if masks is None:
        return None
    sparsity = modifier.fraction("sparsity", modifier.take("sparsity"))
    share = modifier.fraction("init_update_fraction", modifier.take("init_update_fraction", 0.3))
    modifier.take("global_sparsity")  # the strategy says it already
    times = _times(modifier, epochs)
    modifier.note("init_update_fraction", f"drop {share:g} is a fraction of the remaining weights")
    _note_common(modifier)
    drop_schedule: Any = "cos"
    if epochs:
        start, end = times.get("start", 0) / epochs, min(times.get("end", epochs) / epochs, 1)
        drop_schedule = "cos" if (start, end) == (0, 1) else {"between": ["cos", start, end]}
    masks |= {"criteria": "large_final", "schedule": "cos"}
    masks |= {"regrow": "grad", "drop": share, "drop_schedule": drop_schedule}
    initial = sparsity * (1 - share)
    return {"sparsity": sparsity, **_layers(modifier, "params"), **masks, **times, "initial_sparsity": initial}


def _keep(modifier: Modifier, epochs: int | None) -> StepDict:
    """ConstantPruningModifier: the zeros of the model are kept."""
    if modifier.take("params") not in ("__ALL__", "__ALL_PRUNABLE__", None):
        modifier.note("params", "all zeros of the model are kept, not only those of these parameters")
    end = modifier.number("end_epoch", -1)
    if end >= 0 and (epochs is None or end < epochs):
        modifier.note("end_epoch", "zeros are kept to the end of training")
    modifier.note("update_frequency", "zeros are kept at every step")
    if modifier.number("start_epoch", 0) > 0:
        modifier.note("start_epoch", "zeros are kept from the start of training")
    return {}


def _freeze(modifier: Modifier, epochs: int | None) -> StepDict | None:
    """TrainableParamsModifier with trainable: False."""
    if modifier.take("trainable", True) is not False:
        modifier.leave("parameters are trained unless they are frozen")
        return None
    names = modifier.take("params")
    layers = ["*"] if names == "__ALL__" else _patterns(modifier, "params", names)
    modifier.note("params_strict", "a pattern that matches nothing is an error")
    return {"layers": layers, **_times(modifier, epochs)}


def _distil(modifier: Modifier, epochs: int | None) -> StepDict:
    """DistillationModifier: (1 - hardness) loss + hardness T^2 KL."""
    weight = modifier.fraction("hardness", modifier.take("hardness", 0.5))
    step: StepDict = {"weight": weight, "temperature": modifier.number("temperature", 2.0)}
    start, end = modifier.number("start_epoch", 0), modifier.number("end_epoch", -1)
    if start > 0 and epochs and start < epochs:
        step["schedule"] = {"between": ["one_shot", start / epochs, 1]}
    elif start > 0:
        modifier.note("start_epoch", "distillation begins at the start of training")
    if end >= 0 and (epochs is None or end < epochs):
        modifier.note("end_epoch", "distillation lasts to the end of training")
    return step


# Modifier -> the kind of its step, and a function that makes its options; it returns None if nothing is left.
STEPS: dict[str, tuple[str, Callable[[Modifier, int | None], StepDict | None]]] = {
    "GMPruningModifier": ("sparsify", _gradual),
    "MagnitudePruningModifier": ("sparsify", _gradual),
    "GlobalMagnitudePruningModifier": ("sparsify", lambda *given: _gradual(*given, context="global")),
    "MovementPruningModifier": ("sparsify", lambda *given: _gradual(*given, score="movement")),
    "StructuredPruningModifier": ("sparsify", lambda *given: _gradual(*given, mask_type="filter")),
    "ACDCPruningModifier": ("sparsify", _ac_dc),
    "RigLPruningModifier": ("sparsify", _rigl),
    "ConstantPruningModifier": ("keep", _keep),
    "TrainableParamsModifier": ("freeze", _freeze),
    "DistillationModifier": ("distil", _distil),
}


# --- Parameters that several modifiers have --------------------------------------------------------------------------


def _chosen(modifier: Modifier, key: str, default: str, known: dict[str, str]) -> str:
    """The counterpart of a parameter that is one of several names."""
    value = modifier.take(key, default)
    if not isinstance(value, str) or value not in known:
        raise modifier.error(key, f"unknown value {quoted(str(value))}; {close_matches(str(value), known)}")
    return known[value]


def _times(modifier: Modifier, epochs: int | None) -> StepDict:
    """start, end and update_every in epochs; -1 in SparseML means the start of training, its end, and every step."""
    start, end = modifier.number("start_epoch"), modifier.number("end_epoch")
    every = modifier.number("update_frequency") if "update_frequency" in modifier.values else None
    times = {} if start is None else {"start": max(start, 0)}
    if end is not None and end >= 0:
        if end <= times.get("start", 0):
            raise modifier.error("end_epoch", f"{end:g} is not after start_epoch {times.get('start', 0):g}")
        times["end"] = end
    elif epochs is not None and times.get("start", 0) >= epochs:
        raise modifier.error("start_epoch", f"{times['start']:g} is not before the end of training, {epochs}")
    if every is not None and every > 0:
        times["update_every"] = every
    return times


def _masks(modifier: Modifier, context: str, default: str) -> StepDict | None:
    """Granularity and context of a mask_type; None and a notice if it has no counterpart."""
    given = modifier.take("mask_type", default)
    sides = given if isinstance(given, list) and len(given) == 2 else [0]
    if given == "unstructured":
        return {"granularity": "weight", "context": context}
    if given in ("block", "block4"):
        return {"granularity": "1x4", "context": context}
    if all(type(side) is int and 0 < side < 10**4 for side in sides):
        return {"granularity": f"{sides[0]}x{sides[1]}", "context": context}
    if given in ("filter", "channel"):
        does = "gives the model's output" if given == "filter" else "reads the model's input"
        modifier.note("mask_type", f"the layer that {does} stays dense, unless it is named exactly")
        return {"granularity": given, "context": context, "pool": "l2"}
    if given == "tensorrt" or (isinstance(given, str) and re.fullmatch(r"[1-9]\d?:[1-9]\d?", given)):
        return {"granularity": "weight", "context": "2:4" if given == "tensorrt" else given}
    modifier.leave(f"mask_type {quoted(str(given))} has no counterpart")
    return None


def _sparsities(modifier: Modifier) -> StepDict:
    """sparsity and layers of final_sparsity, which is a fraction for params, or {fraction: names}."""
    final = modifier.take("final_sparsity")
    if not isinstance(final, dict):
        return {"sparsity": modifier.fraction("final_sparsity", final), **_layers(modifier, "params")}
    if modifier.take("params"):
        modifier.note("params", "final_sparsity names the parameters; left out")
    fractions: dict[str, float] = {}
    for fraction, names in final.items():
        for name in _patterns(modifier, "final_sparsity", names):
            fractions.setdefault(name, modifier.fraction("final_sparsity", fraction))
    if not fractions:
        raise modifier.error("final_sparsity", "expected fractions with names of parameters: {0.8: ['re:.*weight']}")
    # Of several patterns that match a layer, SparseML uses the first, and this library the last.
    return {"sparsity": dict(reversed(fractions.items()))}


def _layers(modifier: Modifier, key: str) -> StepDict:
    """layers of a parameter that names parameters or says all of them; nothing for the default layers."""
    names = modifier.take(key, "__ALL_PRUNABLE__" if modifier.name == "StructuredPruningModifier" else None)
    tokens = {str(name).upper() for name in (names if isinstance(names, list) else [names])}
    if "__ALL__" in tokens:
        modifier.note(key, "biases and norm layers are not pruned; the weights of all other layers are")
        return {"layers": ["*"]}
    if "__ALL_PRUNABLE__" in tokens:
        modifier.note(
            key,
            "the default layers are selected: convolutions and linear layers, and attention and recurrent layers too, "
            "but none that are frozen",
        )
        return {}
    return {"layers": _patterns(modifier, key, names)}


def _patterns(modifier: Modifier, key: str, names: Any) -> list[str]:
    """Patterns of names and regular expressions, in their order, each once; nested lists are flattened."""
    names = names if isinstance(names, list) else [names]
    flat = [each for name in names for each in (name if isinstance(name, list) else [name])]
    if not flat:
        raise modifier.error(key, "expected at least one name of a parameter")
    return list(dict.fromkeys(pattern(modifier, key, name) for name in flat))


def _note_common(modifier: Modifier) -> None:
    """Notices of parameters that all pruning modifiers have."""
    if modifier.take("leave_enabled", True) is not True:
        modifier.note("leave_enabled", "zeros are kept to the end of training, and in later fits by KeepSparsity")
    for key in ("log_types", "log_frequency"):
        modifier.note(key, "logging is left to fastai; left out")
