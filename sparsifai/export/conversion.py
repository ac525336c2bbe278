"""What the CSR and 2:4 conversions share: checks of the model and of each converted layer, and lists of reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..support.checks import check_is_module
from ..support.listing import in_short
from ..support.printable import printable

# Rows of the random input that a converted layer is checked on. It is no multiple of 8, so that kernels that need one
# have to pad.
ROWS = 9


# Largest difference, relative to the largest output. Both results are rounded, and may be summed in different orders.
TOLERANCES = {torch.float16: 5e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}


def list_reasons(reasons: Mapping[str, str]) -> str:
    """Names grouped by reason, in one line, such as 'a, c (small); b (tied)'.

    Args:
        reasons: Name of a weight -> why it is not converted. The first five reasons are listed, with three names each.
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    shown = [f"{in_short(those, others='more')} ({reason})" for reason, those in islice(names.items(), 5)]
    more = f"; and {len(names) - 5} more reasons" if len(names) > 5 else ""
    return f"{'; '.join(shown)}{more}" if shown else "it has no weights with named axes"


def dtype_name(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


def check_for_inference(caller: str, model: nn.Module) -> None:
    """Check that a model is in evaluation mode, since converted layers cannot be trained.

    Args:
        caller: Name of the function, for the message.
        model: The model.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: It is in training mode.
    """
    check_is_module(caller, "model", model)
    if model.training:
        raise ValueError(
            f"{caller}: the model is in training mode, but a converted model cannot be trained; call model.eval() first"
        )


@torch.no_grad()
def check_same_outputs(caller: str, name: str, weight: Tensor, bias: Tensor | None, converted: Callable) -> None:
    """Check that a converted layer has the outputs of the dense one on random inputs, within `TOLERANCES`.

    Args:
        caller: Name of the function, for the message.
        name: Name of the weight, for the message.
        weight: The dense weight (out, in).
        bias: The bias (out), or None.
        converted: The converted layer.

    Raises:
        RuntimeError: The converted layer does not run, or has other outputs.
    """
    generator = torch.Generator(weight.device).manual_seed(0)
    inputs = torch.randn(ROWS, weight.shape[1], device=weight.device, dtype=weight.dtype, generator=generator)
    try:
        output = converted(inputs)
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError(f"{caller}: {printable(name)} does not run after the conversion: {error}") from error
    expected = F.linear(inputs, weight, bias)
    difference, largest = (output - expected).abs().max().item(), expected.abs().max().item()
    # `not <=` instead of `>`, so that NaN is an error too.
    if not difference <= TOLERANCES[weight.dtype] * largest:
        raise RuntimeError(
            f"{caller}: {printable(name)} has other outputs after the conversion: they differ by up to "
            f"{difference:.3g}, where the largest is {largest:.3g}"
        )
