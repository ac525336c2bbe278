"""What the modifiers of SparseML become that do not prune: steps of a recipe, or a notice of what they are left to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from ...support.printable import quoted
from .modifiers import Modifier
from .parameters import StepDict, ignored, patterns, times

_TO_FASTAI = "learning rates are left to fastai, such as fit_one_cycle"
_SCALES = "has no counterpart: weights are not rescaled before they are quantized"

# Modifiers that are not converted -> what to say of them.
LEFT_OUT = {
    "LearningRateFunctionModifier": _TO_FASTAI,
    "LearningRateModifier": _TO_FASTAI,
    "SetLearningRateModifier": _TO_FASTAI,
    "SetWeightDecayModifier": "weight decay is left to fastai: wd= of the Learner or of fit",
    "SparsificationLoggingModifier": "logging is left to fastai",
    "LayerThinningModifier": "has no counterpart: layers keep their size in training; use shrink(model) after it",
    "LayerPruningModifier": "has no counterpart: no layer is removed while training",
    "REAPPruningModifier": "has no counterpart: no experts are removed",
    "SetParamModifier": "has no counterpart; set values of parameters before training",
    "GradualParamModifier": "has no counterpart; set values of parameters before training",
    "PowerpropagationModifier": "has no counterpart: weights are trained as they are, not their roots",
    "ASRegModifier": "has no counterpart: activations are not regularized",
    "PerLayerDistillationModifier": "has no counterpart with names; give features to a distil step",
    "SmoothQuantModifier": _SCALES,
    "LogarithmicEqualizationModifier": _SCALES,
    "SpinQuantModifier": _SCALES,
    "QuIPModifier": _SCALES,
}

# Those of them that change neither the model nor its sparsity.
LEFT_TO_FASTAI = {name for name in LEFT_OUT if re.search("LearningRate|WeightDecay|Logging", name)}

# Modifiers that quantize -> what they do that is not done here.
_METHODS = {
    "GPTQModifier": "weights are rounded to the nearest value, and the others do not make up for it",
    "AutoRoundModifier": "weights are rounded to the nearest value; how they are rounded is not trained",
    "AWQModifier": "weights are not rescaled before they are quantized",
}

# Names of schemes that are int8 for weights.
_INT8_SCHEMES = ("W8A8", "INT8", "W8A16")

# Parameters that say how a quantizer finds its ranges.
_OF_QUANTIZERS = (
    "disable_quantization_observer_epoch", "freeze_bn_stats_epoch", "num_calibration_steps", "post_oneshot_calibration",
    "sequential_update", "sequential_targets", "block_size", "dampening_frac", "percdamp", "actorder", "reduce_range",
    "offload_hessians", "mappings", "duo_scaling", "iters", "model_fuse_fn_name", "model_fuse_fn_kwargs", "strict",
)  # fmt: skip
# Parameters that say what else is quantized than weights and inputs of layers, and how.
_ALSO_QUANTIZED = (
    "exclude_module_types", "exclude_batchnorm", "quantize_linear_activations", "quantize_conv_activations",
    "quantize_embeddings", "custom_quantizable_module_types", "tensorrt", "kv_cache_scheme", "activation_bits",
)  # fmt: skip


def _freeze(modifier: Modifier, epochs: float | None) -> list[StepDict]:
    """TrainableParamsModifier with trainable: False."""
    if modifier.take("trainable", True) is not False:
        modifier.leave("parameters are trained unless they are frozen")
        return []
    names = modifier.take("params")
    layers = ["*"] if names == "__ALL__" else patterns(modifier, "params", names)
    modifier.note("params_strict", "a pattern that matches nothing is an error")
    during = {key: time for key, time in times(modifier, epochs).items() if key != "update_every"}
    return [{"layers": layers, **during}]


# --- Distillation -----------------------------------------------------------------------------------------------------


def _distil(modifier: Modifier, epochs: float | None) -> list[StepDict]:
    """DistillationModifier: (1 - hardness) loss + hardness T^2 KL."""
    weight = modifier.fraction("hardness", modifier.take("hardness", 0.5))
    step: StepDict = {"weight": weight, "temperature": _temperature(modifier, 2.0)}
    keys = modifier.take("distill_output_keys", [])
    of_logits = isinstance(keys, list) and all(str(key).endswith("logits") for key in keys)
    if keys and of_logits:
        modifier.note("distill_output_keys", "all logits of the model are compared, whose names are not needed")
    elif keys:
        several = isinstance(keys, list) and len(keys) > 1
        modifier.note("distill_output_keys", "the logits of the model are compared, or its first output", lost=several)
    modifier.note("teacher_input_keys", "the teacher is given all inputs")
    modifier.take("update_frequency")
    return [step | _during(modifier, epochs)]


def _temperature(modifier: Modifier, default: float) -> float:
    temperature = modifier.number("temperature", default)
    if not temperature > 0:
        raise modifier.error("temperature", f"expected a number above 0, not {quoted(temperature)}")
    return temperature


def _during(modifier: Modifier, epochs: float | None) -> StepDict:
    """The schedule of a distil step, from its start on."""
    start, end = modifier.number("start_epoch", 0), modifier.number("end_epoch", -1)
    if end >= 0 and (epochs is None or end < epochs):
        modifier.note("end_epoch", "distillation lasts to the end of training")
    if start > 0 and epochs and start < epochs:
        return {"schedule": {"between": ["one_shot", start / epochs, 1]}}
    if start > 0:
        modifier.note("start_epoch", "distillation begins at the start of training")
    return {}


def _distil_layers(modifier: Modifier, epochs: float | None) -> list[StepDict]:
    """OutputDistillationModifier: orig_scale loss + distill_scale times the distance of the outputs of layers."""
    own, taught = modifier.number("orig_scale", 1.0), modifier.number("distill_scale", 1.0)
    if own < 0 or taught < 0 or own + taught <= 0:
        raise modifier.error("distill_scale", "expected scales of at least 0, and one above 0")
    given = modifier.take("params", [])
    named = given if isinstance(given, list) else [given]
    pairs = [[each, each] if isinstance(each, str) else each for each in named]
    if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(e, str) for e in pair) for pair in pairs):
        raise modifier.error("params", f"expected names of layers, or pairs of names, not {quoted(given)}")
    comparison = modifier.take("comparison", "kl_divergence")
    for key in ("projection", "projection_args", "transforms", "transforms_args", "comparison_args"):
        modifier.note(key, "the outputs are compared as they are; left out", lost=True)
    modifier.take("offload_layer_output")
    if any(name.startswith("re:") or name.startswith("__") for pair in pairs for name in pair) or not pairs:
        modifier.note("params", "the outputs of the model are compared, not those of these layers", lost=True)
        return [{"weight": taught / (own + taught), **_during(modifier, epochs)}]
    if comparison != "l2_distance":
        message = f"{quoted(comparison)} is not used: the mean squared error of the layers is"
        modifier.note("comparison" if "comparison" in modifier.values else modifier.name, message, lost=True)
    if not own:
        modifier.note("orig_scale", "the loss of the labels counts, too", lost=True)
    step = {"weight": 0, "features": dict(pairs), "feature_weight": taught / own if own else taught}
    return [step | _during(modifier, epochs)]


# --- Quantization -----------------------------------------------------------------------------------------------------


def _quantize(modifier: Modifier, epochs: float | None) -> list[StepDict]:
    """QuantizationModifier and GPTQModifier: int8 from an epoch on, or at once."""
    if modifier.name == "AWQModifier" and not modifier.values.keys() & {"scheme", "config_groups"}:
        modifier.leave(_SCALES)
        return []
    start = max(modifier.number("start_epoch", 0), 0)
    if epochs is not None and start >= epochs:
        raise modifier.error("start_epoch", f"{start:g} is not before the end of training, {epochs:g}")
    if start > 0 and epochs is None:
        raise modifier.error("start_epoch", "no modifier says how many epochs there are; give epochs= or --epochs")
    if modifier.number("end_epoch", -1) >= 0:
        modifier.note("end_epoch", "the model stays quantized to the end of training")
    for key in _OF_QUANTIZERS:
        modifier.note(key, "it says how ranges are found; left out")
    if modifier.name in _METHODS:
        modifier.note(modifier.name, _METHODS[modifier.name], lost=True)
    for key in _ALSO_QUANTIZED:
        modifier.note(key, "weights and inputs of linear layers and convolutions are quantized; left out", lost=True)
    schemes = [modifier.take(key) for key in ("scheme", "scheme_overrides", "config_groups", "quantize")]
    others = sorted({found for scheme in schemes for found in _not_int8(scheme)})
    if "weight_bits" in modifier.values and modifier.number("weight_bits") != 8:
        others.append(f"{modifier.values['weight_bits']} bits")
    if others:
        modifier.note(modifier.name, f"weights become int8, not {quoted(', '.join(others))}", lost=True)
    named = {**_quantized(modifier), **ignored(modifier)}
    # Layers of a class are quantized all or not at all, as the library says.
    named = {key: [name for name in names if not name.startswith("class:")] for key, names in named.items()}
    return [{**{key: names for key, names in named.items() if names}, "start": start}]


def _quantized(modifier: Modifier) -> StepDict:
    """layers of submodules or targets; nothing for all."""
    key = "submodules" if "submodules" in modifier.values else "params"
    names = modifier.take(key)
    named = names if isinstance(names, list) else [names]
    if names is None or names == [] or any(str(name) in ("Linear", "") or str(name)[:2] == "__" for name in named):
        return {}
    return {"layers": patterns(modifier, key, names)}


def _not_int8(scheme: Any) -> Iterator[str]:
    """What a scheme says of weights that are not int8."""
    if isinstance(scheme, str):
        if scheme.upper() not in (*_INT8_SCHEMES, "DEFAULT"):
            yield scheme
    elif isinstance(scheme, list):
        for each in scheme:
            yield from _not_int8(each) if not isinstance(each, str) else ()
    elif isinstance(scheme, dict):
        for key, value in scheme.items():
            if key == "weights" and isinstance(value, dict):
                if value.get("num_bits", 8) != 8:
                    yield f"{value['num_bits']} bits"
                elif value.get("type", "int") != "int":
                    yield f"{value['type']}"
            elif isinstance(value, dict):
                yield from _not_int8(value)
            elif isinstance(value, list) and re.fullmatch(r"[A-Z]+\d+\w*", str(key)):
                yield from _not_int8(str(key))  # {W4A16: [Linear]}


# Modifier -> the kind of its steps, and a function of (modifier, epochs) that makes their options.
OTHER_STEPS: dict[str, tuple[str, Callable[[Modifier, float | None], list[StepDict]]]] = {
    "TrainableParamsModifier": ("freeze", _freeze),
    "DistillationModifier": ("distil", _distil),
    "OutputDistillationModifier": ("distil", _distil_layers),
    "QuantizationModifier": ("quantize", _quantize),
    "LegacyQuantizationModifier": ("quantize", _quantize),
    "GPTQModifier": ("quantize", _quantize),
    "AWQModifier": ("quantize", _quantize),
    "AutoRoundModifier": ("quantize", _quantize),
}
