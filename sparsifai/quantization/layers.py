"""The layers of a model that are quantized, and the models that cannot be."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel

from ..model.layers import CHANNEL_LAYERS, axes_of, find_weights, full_name_of, parameter_name
from ..model.parallel import is_sharded
from ..model.patterns import Places, name_matcher
from ..support.printable import printable, quoted
from ..support.registry import close_matches
from ..support.table import percent

START = 0.75  # fraction of training after which rounding begins, by default: where the default schedule of pruning ends

# Where modules and tensors of quantized models, and of those that are prepared for it, are defined.
_OF_QUANTIZED = ("torch.ao.nn.", "torch.ao.quantization.", "torchao.", "bitsandbytes.")
_NOT_OF_QUANTIZED = ("torch.ao.quantization.stubs",)  # they do nothing in a float model

_CONV1D = "transformers.pytorch_utils.Conv1D"  # a linear layer whose weight is (in, out)


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A layer whose weights and inputs are quantized.

    Attributes:
        name: Name of the module.
        module: The module whose forward uses the weights.
        weights: Parameter name -> (module that holds it, attribute, axis of the outputs).
    """

    name: str
    module: nn.Module
    weights: Mapping[str, tuple[nn.Module, str, int]]

    @property
    def inputs(self) -> int:
        """How many of the arguments of its forward are quantized."""
        return 3 if isinstance(self.module, nn.MultiheadAttention) else 1


def quantized_layers(
    caller: str, model: nn.Module, layers: Collection[str] | None = None, exclude: Collection[str] | None = None
) -> tuple[list[QuantizedLayer], list[str]]:
    """Find the layers that are quantized: linear layers, convolutions and torch's attention.

    Args:
        caller: Name of what is used, for messages.
        model: The model, without wrappers.
        layers: Names or globs of those to quantize. Default: all.
        exclude: Names or globs of those that stay float. Default: none.

    Returns:
        The layers; and the names of the other weights that stay float though nobody asked for it, without embeddings.

    Raises:
        ValueError: A pattern matches nothing, or no layer is left.
    """
    found = _candidates(model)
    named = find_weights(model)
    known = {name for layer in found for name in layer.weights} | named.keys()
    places = Places({name: [name] for name in known})
    chosen = known if layers is None else _matching(caller, layers, places)
    chosen = chosen - (set() if exclude is None else _matching(caller, exclude, places))
    kept = [
        replace(layer, weights={name: place for name, place in layer.weights.items() if name in chosen})
        for layer in found
        if chosen & layer.weights.keys()
    ]
    if not kept:
        kinds = ", ".join(sorted({weight.kind for weight in named.values()})) or "no layer with weights"
        raise ValueError(
            f"{caller}: no layer to quantize is left; linear layers, convolutions and MultiheadAttention are "
            f"quantized, and the model has {kinds}"
        )
    covered = {name for layer in kept for name in layer.weights}
    left = [
        name
        for name, weight in named.items()
        if name in chosen and not weight.is_embedding and not covered & weight.names
    ]
    return kept, left


def planned(
    model: nn.Module,
    start: float = START,
    layers: Collection[str] | None = None,
    exclude: Collection[str] | None = None,
) -> str:
    """Say what training for int8 would do to a model.

    Args:
        model: The model, without wrappers.
        start: Fraction of training after which it begins.
        layers: See `quantized_layers`.
        exclude: See `quantized_layers`.

    Raises:
        ValueError: As `quantized_layers`; or the model is quantized already.
    """
    check_float("quantize", model)
    chosen, left = quantized_layers("quantize", model, layers, exclude)
    float_weights = f"; {len(left)} other weights stay float" if left else ""
    return (
        f"quantize: from {percent(start)} of training on, the weights and inputs of {len(chosen)} layers are rounded "
        f"as in int8{float_weights}; quantize(model, calibration, path) writes the int8 model"
    )


def check_patterns(caller: str, argument: str, patterns: Any) -> list[str] | None:
    """Check names or globs of layers.

    Args:
        caller: Name of what is used, for messages.
        argument: Name of the argument.
        patterns: What was given: a name or glob, a list of them, or None.

    Returns:
        A list, or None.

    Raises:
        TypeError: They are not names.
        ValueError: A regular expression is malformed.
    """
    if patterns is None:
        return None
    listed = [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, Iterable) else []
    if not listed or not all(isinstance(each, str) for each in listed):
        raise TypeError(f"{caller}: {argument} must be names or globs of layers, or a list, not {patterns!r}")
    for each in listed:
        name_matcher(each)
    return listed


def check_float(caller: str, model: nn.Module) -> None:
    """Check that a model is not quantized, and not prepared for it by another library.

    Raises:
        ValueError: It is.
    """
    for name, module in model.named_modules():
        held = [type(module), *map(type, module._parameters.values())]
        of = [f"{kind.__module__}." for kind in held]
        foreign = [each for each in of if each.startswith(_OF_QUANTIZED) and not each.startswith(_NOT_OF_QUANTIZED)]
        integer = any(
            each is not None and (each.is_quantized or not (each.is_floating_point() or each.is_complex()))
            for each in module._parameters.values()
        )
        if foreign or integer:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise ValueError(
                f"{caller}: {printable(name or type(model).__name__)} is {kind}, so the model is quantized or prepared "
                "for it already; pass the float model"
            )


def check_hookable(caller: str, model: nn.Module) -> None:
    """Check that the layers of a model can be trained with fake quantization.

    Args:
        caller: Name of what is used, for messages.
        model: The model, in its wrappers.

    Raises:
        ValueError: They cannot, because of a wrapper, a device, a dtype or sharding.
    """
    for module in model.modules():
        if isinstance(module, DataParallel):
            why = "DataParallel copies the layers in every step; use DistributedDataParallel, or one device"
        elif "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            why = "a compiled model does not run what is put around its layers; fit the model before torch.compile"
        else:
            continue
        raise ValueError(f"{caller}: {why}")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(f"{caller}: the parameters are sharded; use DistributedDataParallel, or one device")
    devices = {parameter.device.type for parameter in model.parameters()}
    if others := devices - {"cpu", "cuda"}:
        raise ValueError(
            f"{caller}: torch has fake quantization for the CPU and CUDA, not for {', '.join(sorted(others))}; train "
            "there"
        )


def check_single_precision(caller: str, layers: Iterable[QuantizedLayer]) -> None:
    """Check that weights are float32, as fake quantization needs them.

    Raises:
        ValueError: A weight is not.
    """
    for layer in layers:
        for name, (holder, attribute, _) in layer.weights.items():
            dtype = getattr(holder, attribute).dtype
            if dtype != torch.float32:
                raise ValueError(
                    f"{caller}: {printable(name)} is {str(dtype).removeprefix('torch.')}, and torch's fake "
                    "quantization takes float32; keep the weights in float32, as mixed precision does "
                    "(torch.autocast, learn.to_fp16())"
                )


def _candidates(model: nn.Module) -> list[QuantizedLayer]:
    """The layers of the kinds that are quantized, whose weights are parameters."""
    found: list[QuantizedLayer] = []
    inner: set[int] = set()  # projections that attention uses without calling them
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            held_here = [each for each in module._parameters if each.endswith("proj_weight")]
            weights: list[tuple[str, nn.Module, str]] = [(name, module, each) for each in held_here]
            weights.append((parameter_name(name, "out_proj"), module.out_proj, "weight"))
            inner.add(id(module.out_proj))
        elif id(module) in inner or not (
            isinstance(module, CHANNEL_LAYERS) or _CONV1D in map(full_name_of, type(module).__mro__)
        ):
            continue
        else:
            weights = [(name, module, "weight")]
        held = {
            parameter_name(place, attribute): (holder, attribute, _axis_of_outputs(holder, attribute))
            for place, holder, attribute in weights
            if isinstance(holder._parameters.get(attribute), nn.Parameter)  # else it is computed in each forward
        }
        if held:
            found.append(QuantizedLayer(name, module, held))
    return found


def _axis_of_outputs(module: nn.Module, attribute: str) -> int:
    axes = axes_of(module, attribute)
    assert axes is not None
    return axes.index("out")


def _matching(caller: str, patterns: Iterable[str], places: Places) -> set[str]:
    found = set()
    for pattern in patterns:
        matched = places.matching(pattern)
        if not matched:
            raise ValueError(
                f"{caller}: no layer matches {quoted(pattern)}; {close_matches(pattern, list(places.known))}"
            )
        found |= matched
    return found
