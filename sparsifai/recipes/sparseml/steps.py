"""What each pruning modifier of SparseML becomes: steps of a recipe of this library, and notices of what is lost."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from ...support.printable import quoted
from .modifiers import Modifier, pattern
from .other_steps import OTHER_STEPS
from .parameters import StepDict, chosen, ignored, layers, masks, note_common, patterns, sparsities, times

# inter_func and update_scheduler -> schedule: x, 1 - (1 - x)^3, ...; the others have no counterpart.
_SCHEDULES = {"linear": "lin", "cubic": "agp", "cosine": "cos", "inverse_cubic": "lin"}
_OTHER_SCHEDULES = ("polynomial_decay", "polynomial", "multi_step")
# score_type -> criterion
_CRITERIA = {"magnitude": "large_final", "movement": "movement_pruning"}
# Criterion -> its options and their defaults here, which are not always those of SparseML.
_DEFAULTS = {"obs": {"damping": 1e-7, "block_size": 50}, "sparsegpt": {"damping": 0.01, "block_size": 128}}
# sparsity_strategy -> context
_CONTEXTS = {"erdos_renyi_kernel": "erk", "erdos_renyi": "er", "uniform": "local"}

# Parameters that say how the gradients of a second-order criterion are collected.
_OF_SECOND_ORDER = (
    "num_grads", "grad_sampler_kwargs", "num_recomputations", "available_devices", "available_gpus", "grads_device",
    "num_pages", "use_gradient_buffering", "mfac_options",
)  # fmt: skip
# Parameters that say how layers are visited, not what is pruned.
_OF_ONE_SHOT = ("sequential_update", "sequential_targets", "target_ids", "layer_prefix", "offload_hessians")
# The zeros that a model has rank lowest, so they stay, whatever this says.
_SILENT = ("preserve_sparsity_mask", "prunen", "prunem")


# --- Levels that rise -------------------------------------------------------------------------------------------------


def _gradual(modifier: Modifier, epochs: float | None, **changed: Any) -> list[StepDict]:
    """GMPruningModifier, and modifiers that differ from it in criterion, context or granularity."""
    score = modifier.take("score_type", changed.get("score", "magnitude"))
    if not isinstance(score, str) or score not in _CRITERIA:
        modifier.leave(
            f"score_type {quoted(str(score))} has no counterpart; known are {', '.join(map(repr, _CRITERIA))}"
        )
        return []
    is_global = modifier.take("global_sparsity", changed.get("context") == "global")
    grouped = masks(modifier, "global" if is_global is True else "local", changed.get("mask_type", "unstructured"))
    if grouped is None:
        return []
    step = {**sparsities(modifier, "final_sparsity"), **grouped, "criteria": _CRITERIA[score]}
    step |= changed.get("options", {})
    step["schedule"] = _schedule(modifier)
    step |= times(modifier, epochs)
    if modifier.take("phased", False) is not False:
        modifier.note("phased", "the masks are not lifted in turn; ACDCPruningModifier does that", lost=True)
    note_common(modifier)
    if modifier.values.get("param_groups"):
        modifier.note("param_groups", "layers are ranked one by one, not in groups of layers; left out")
    return [_with_initial(modifier, step)]


def _schedule(modifier: Modifier) -> str:
    """The schedule of inter_func or update_scheduler."""
    name, options = modifier.values.get("inter_func", "cubic"), modifier.take("scheduler_args", {})
    exponent = options.get("exponent", 2) if isinstance(options, dict) else None
    if name == "polynomial_decay" and exponent in (1, 3):
        modifier.take("inter_func")
        return "agp" if exponent == 3 else "lin"
    if name in _OTHER_SCHEDULES or str(name).startswith("calc("):
        message = f"{quoted(name)} has no counterpart; 'agp' has the same sparsity at the end"
        modifier.note("inter_func", message, lost=True)
        return "agp"
    if name == "inverse_cubic":
        modifier.note("inter_func", "1 - (1 - x)^(1/3) has no counterpart; 'lin' has the same ends")
    return chosen(modifier, "inter_func", "cubic", _SCHEDULES)


def _with_initial(modifier: Modifier, step: StepDict) -> StepDict:
    """The step with its initial sparsity, which is that of all its layers."""
    initial = modifier.take("init_sparsity")
    if initial == "__FROM_PARAM__":
        modifier.note(
            "init_sparsity", "sparsity starts at 0, and weights that are zero already are the first to be pruned"
        )
        return step
    if initial is None:
        return step
    initial = modifier.fraction("init_sparsity", initial)
    lowest = min(step["sparsity"].values()) if isinstance(step["sparsity"], dict) else step["sparsity"]
    if initial > lowest:
        modifier.note(
            "init_sparsity", f"the sparsity would fall from {initial:g} to {lowest:g}; it starts there", lost=True
        )
    return {**step, "initial_sparsity": min(initial, lowest)}


def _second_order(modifier: Modifier, epochs: float | None, context: str) -> list[StepDict]:
    """OBSPruningModifier and M-FAC: gradual pruning by the inverse of the empirical Fisher, which moves the rest.

    SparseML documents blocks of 50 weights for OBSPruningModifier; its code takes 1 where the recipe does not say.
    """
    for key in _OF_SECOND_ORDER:
        modifier.note(key, "gradients are collected as 'obs' does it; left out")
    if modifier.name == "OBSPruningModifier":
        if "fisher_block_size" not in modifier.values:
            modifier.note(
                modifier.name, "blocks have 50 weights, as documented; without fisher_block_size its code takes 1"
            )
        known: dict[str, tuple[str, float]] = {"damp": ("damping", 1e-7), "fisher_block_size": ("block_size", 50)}
    else:
        known = {"damp": ("damping", 1e-5)}
        modifier.note("fisher_block_size", "'obs' stores the blocks, which M-FAC does not; they have its 50 weights")
    criterion = _with_options(modifier, "obs", known)
    return _gradual(modifier, epochs, context=context, options={"criteria": criterion, "compensate": True})


def _with_options(modifier: Modifier, criterion: str, known: dict[str, tuple[str, float]]) -> Any:
    """A criterion with the options that differ from its defaults: {parameter: (option, default in SparseML)}."""
    given = {option: modifier.number(key, default) for key, (option, default) in known.items()}
    changed = {option: value for option, value in given.items() if value != _DEFAULTS[criterion][option]}
    return {criterion: changed} if changed else criterion


# --- Levels that are constant or alternate ----------------------------------------------------------------------------


def _ac_dc(modifier: Modifier, epochs: float | None) -> list[StepDict]:
    """ACDCPruningModifier: phases of update_frequency epochs, dense and sparse in turn; the last one is sparse.

    Phase k begins at start_epoch + k update_frequency, and is dense if k is even and it ends before end_epoch.
    """
    is_global = modifier.take("global_sparsity", True) is True
    grouped = masks(modifier, "global" if is_global else "local")
    if grouped is None:
        return []
    during = times(modifier, epochs)
    start, end, phase = during.get("start", 0), during.get("end", epochs), during.get("update_every")
    if end is None or phase is None or not end - start < 1e6 * phase:
        raise modifier.error("update_frequency", "expected the epochs of a phase, and an end of training")
    step: StepDict = {"sparsity": modifier.fraction("compression_sparsity", modifier.take("compression_sparsity"))}
    step |= {**layers(modifier), **grouped, "criteria": "large_final"}
    modifier.note(
        "momentum_buffer_reset", "the momentum of a weight is zero while it is masked; other momentum is kept"
    )
    note_common(modifier)
    last_dense = 2 * math.ceil((end - start) / phase / 2 - 0.5 - 1e-9) - 2  # the last even k with k + 1 < phases
    if last_dense < 0:
        return [{**step, "schedule": "one_shot", "start": start, "end": end}]
    share = phase / (end - start)
    options = {"warm_up": share, "phase": share, "dense": last_dense * share, "sparse": (last_dense + 1) * share}
    return [{**step, "schedule": {"ac_dc": options}, "start": start, "end": end, "update_every": phase}]


def _rigl(modifier: Modifier, epochs: float | None) -> list[StepDict]:
    """RigLPruningModifier: constant sparsity; updates prune and regrow a fraction that decays along a cosine to 0."""
    grouped = masks(modifier, chosen(modifier, "sparsity_strategy", "erdos_renyi_kernel", _CONTEXTS))
    if grouped is None:
        return []
    step = {**sparsities(modifier, "final_sparsity"), **grouped, "criteria": "large_final", "schedule": "one_shot"}
    share = modifier.fraction("init_update_fraction", modifier.take("init_update_fraction", 0.3))
    modifier.take("global_sparsity")  # the strategy says it already
    modifier.take("init_sparsity")  # SparseML sets it to final_sparsity
    during = times(modifier, epochs)
    for key in ("num_grads", "grad_sampler_kwargs"):
        modifier.note(key, "the gradients of the batches of training are used")
    modifier.note("momentum_buffer_reset", "the momentum of a weight is zero while it is masked")
    note_common(modifier)
    drop_schedule: Any = "cos"
    if epochs:
        start, end = during.get("start", 0) / epochs, min(during.get("end", epochs) / epochs, 1)
        drop_schedule = "cos" if (start, end) == (0, 1) else {"between": ["cos", start, end]}
    return [{**step, "regrow": "grad", "drop": share, "drop_schedule": drop_schedule, **during}]


def _top_kast(modifier: Modifier, epochs: float | None) -> list[StepDict]:
    """TopKASTPruningModifier: constant sparsity of weights that are ranked anew, and another one of their gradients."""
    grouped = masks(modifier, "global" if modifier.take("global_sparsity", True) is True else "local")
    if grouped is None:
        return []
    step = {**sparsities(modifier, "forward_sparsity"), **grouped, "criteria": "large_final", "schedule": "one_shot"}
    gradients = modifier.fraction("backward_sparsity", modifier.take("backward_sparsity"))
    modifier.note("active_weight_decay", "weight decay is left to fastai: wd= of the Learner or of fit; left out")
    note_common(modifier)
    return [{**step, "straight_through": True, "decay": 0, "gradient_sparsity": gradients, **times(modifier, epochs)}]


def _keep(modifier: Modifier, epochs: float | None) -> list[StepDict]:
    """ConstantPruningModifier: the zeros of the model are kept."""
    names = modifier.take("params")
    if names not in ("__ALL__", "__ALL_PRUNABLE__", None):
        patterns(modifier, "params", names)
        modifier.note("params", "all zeros of the model are kept, not only those of these parameters")
    end = modifier.number("end_epoch", -1)
    if end >= 0 and (epochs is None or end < epochs):
        modifier.note("end_epoch", "zeros are kept to the end of training")
    modifier.note("update_frequency", "zeros are kept at every step")
    if modifier.number("start_epoch", 0) > 0:
        modifier.note("start_epoch", "zeros are kept from the start of training")
    note_common(modifier)
    return [{}]


# --- Without training -------------------------------------------------------------------------------------------------


def _one_shot(modifier: Modifier, epochs: float | None, context: str) -> list[StepDict]:
    """SparseGPTModifier and WandaPruningModifier: layer by layer, on calibration data."""
    grouped = _n_of_m(modifier) or masks(modifier, context)
    if grouped is None:
        return []
    step = {**_of_targets(modifier), **ignored(modifier), **grouped, "criteria": "wanda"}
    if modifier.name == "SparseGPTModifier":
        damping = "percdamp" if "percdamp" in modifier.values else "dampening_frac"
        known = {damping: ("damping", 0.01), "block_size": ("block_size", 128)}
        step |= {"criteria": _with_options(modifier, "sparsegpt", known), "compensate": True}
    if modifier.take("sparsity_profile") is not None:
        modifier.note("sparsity_profile", "the layers have equal sparsities, not those of their outliers", lost=True)
    for key in ("owl_m", "owl_lmbda", *_SILENT):
        modifier.take(key)
    for key in _OF_ONE_SHOT:
        modifier.note(key, "it says how the layers are visited and computed; left out")
    quantizes = modifier.take("quantize", False)
    if quantizes is not False:
        message = "this modifier only prunes; a QuantizationModifier quantizes"
        modifier.note("quantize", message, lost=isinstance(quantizes, dict))
    return [step]


def _n_of_m(modifier: Modifier) -> StepDict | None:
    """Masks N:M, whose N counts the weights that are pruned, and alone says how many are. None for others."""
    structure = modifier.values.get("mask_type", f"{modifier.values.get('prunen')}:{modifier.values.get('prunem')}")
    sizes = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", str(structure))
    if not sizes:
        return None
    pruned, of = map(int, sizes.groups())
    if pruned >= of:
        raise modifier.error("mask_type", f"expected fewer pruned weights than there are, not {quoted(structure)}")
    modifier.take("mask_type")
    modifier.values["sparsity"] = pruned / of
    return {"granularity": "weight", "context": f"{of - pruned}:{of}"}


def _of_targets(modifier: Modifier) -> StepDict:
    """sparsity and layers: one fraction, or one for each of the targets."""
    names, given = modifier.values.get("params"), modifier.take("sparsity")
    if isinstance(given, list):
        if not isinstance(names, list) or len(names) != len(given) or not names:
            raise modifier.error("sparsity", "expected as many fractions as targets, or one fraction")
        modifier.take("params")
        fractions = [modifier.fraction("sparsity", each) for each in given]
        return {"sparsity": {pattern(modifier, "params", n): f for n, f in zip(names, fractions, strict=True)}}
    if names in (None, "Linear", ["Linear"]) and not modifier.values.get("ignore"):
        modifier.note(
            modifier.name,
            "layers outside of the repeated blocks, as the head of a language model, are pruned, too, which SparseML "
            "leaves dense; name them in exclude",
        )
    return sparsities(modifier, "sparsity")


# Modifier -> the kind of its steps, and a function of (modifier, epochs) that makes their options.
STEPS: dict[str, tuple[str, Callable[[Modifier, float | None], list[StepDict]]]] = {
    "GMPruningModifier": ("sparsify", _gradual),
    "MagnitudePruningModifier": ("sparsify", _gradual),
    "GlobalMagnitudePruningModifier": ("sparsify", partial(_gradual, context="global")),
    "MovementPruningModifier": ("sparsify", partial(_gradual, score="movement")),
    "StructuredPruningModifier": ("sparsify", partial(_gradual, mask_type="filter")),
    "OBSPruningModifier": ("sparsify", partial(_second_order, context="global")),
    "MFACPruningModifier": ("sparsify", partial(_second_order, context="local")),
    "MFACGlobalPruningModifier": ("sparsify", partial(_second_order, context="global")),
    "ACDCPruningModifier": ("sparsify", _ac_dc),
    "RigLPruningModifier": ("sparsify", _rigl),
    "TopKASTPruningModifier": ("sparsify", _top_kast),
    "ConstantPruningModifier": ("keep", _keep),
    "SparseGPTModifier": ("sparsify", partial(_one_shot, context="local")),
    "WandaPruningModifier": ("sparsify", partial(_one_shot, context="per_output")),
    **OTHER_STEPS,
}
for _name in ("GMPruningModifier", "MagnitudePruningModifier", "GlobalMagnitudePruningModifier", "ACDCPruningModifier",
              "MovementPruningModifier", "StructuredPruningModifier", "ConstantPruningModifier"):  # fmt: skip
    STEPS[f"Legacy{_name}"] = STEPS[_name]

# Modifiers that need no training.
WITHOUT_TRAINING = {
    "SparseGPTModifier", "WandaPruningModifier", "GPTQModifier", "QuantizationModifier", "LegacyQuantizationModifier",
    "SmoothQuantModifier", "LogarithmicEqualizationModifier", "AWQModifier", "AutoRoundModifier", "QuIPModifier",
    "SpinQuantModifier", "REAPPruningModifier",
}  # fmt: skip


def prunes(name: str) -> bool:
    """Whether a modifier prunes, as its name says, known or not.

    Args:
        name: The name of the modifier.
    """
    return "Prun" in name or STEPS.get(name, ("",))[0] in ("sparsify", "keep")
