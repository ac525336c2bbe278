"""What QuantizeCallback and Quantize do alike: they check their arguments and a model, and find its layers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from ..model.parallel import unwrapped
from ..support.checks import check_fraction
from ..support.printable import printable
from .fake_quantization import FakeQuantization
from .layers import check_float, check_hookable, check_single_precision, quantized_layers


def check_start(caller: str, start: Any) -> float:
    """Check the fraction of a training after which rounding begins.

    Args:
        caller: Name of what is used, for messages.
        start: What was given.

    Raises:
        ValueError: It is not from 0 to below 1.
    """
    checked = check_fraction(start, f"{caller}: start")
    if checked == 1:
        raise ValueError(f"{caller}: start must be below 1, so that some of the training is left; give 0.75")
    return checked


def fake_quantization_of(
    caller: str, model: nn.Module, layers: Collection[str] | None, exclude: Collection[str] | None
) -> tuple[FakeQuantization, str]:
    """Make the fake quantization of a model, whose layers do not round yet.

    Args:
        caller: Name of what is used, for messages.
        model: The model, in its wrappers.
        layers: See `quantized_layers`.
        exclude: See `quantized_layers`.

    Returns:
        The fake quantization; and a message of the weights that stay float though nobody asked for it, or "".

    Raises:
        ValueError: A name matches no layer, or the model cannot be trained with fake quantization, or is quantized.
    """
    bare = unwrapped(model)
    check_float(caller, bare)
    check_hookable(caller, model)
    chosen, left = quantized_layers(caller, bare, layers, exclude)
    check_single_precision(caller, chosen)
    shown = ", ".join(map(printable, left[:3])) + ", ..." * (len(left) > 3)
    message = f"{caller}: {len(left)} weights stay float, since their kind of layer is not quantized: {shown}"
    return FakeQuantization(bare, chosen), message if left else ""
