"""Weights of Linear layers that another form can take the place of: which they are, and whether it gives the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..support.checks import check_is_module

# Of the input that a converted layer is tried on: no multiple of 8, so that it is filled up for kernels that want one.
ROWS = 9


# Of the largest output. Both results are rounded once, and may be summed in another order.
TOLERANCES = {torch.float16: 5e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}


def listed(reasons: Mapping[str, str]) -> str:
    """The first names with each reason, in one line."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    shown = [
        f"{', '.join(those[:3])}{f' and {len(those) - 3} more' if len(those) > 3 else ''} ({reason})"
        for reason, those in islice(names.items(), 5)
    ]
    more = f"; and {len(names) - 5} more reasons" if len(names) > 5 else ""
    return f"{'; '.join(shown)}{more}" if shown else "it has no weights with named axes"


def dtype_name(dtype: torch.dtype) -> str:
    """'float32' of torch.float32."""
    return str(dtype).removeprefix("torch.")


def check_converts(caller: str, model: nn.Module) -> None:
    """TypeError for what is no module, ValueError in training mode: what is converted is no longer trained."""
    check_is_module(caller, "model", model)
    if model.training:
        raise ValueError(
            f"{caller}: the model is in training mode, and what is converted cannot be trained; call model.eval()"
        )


@torch.no_grad()
def check_alike(caller: str, name: str, weight: Tensor, bias: Tensor | None, converted: Callable) -> None:
    """RuntimeError, naming the layer, if a converted layer gives something else than the dense one on random inputs.

    The largest difference may be a part of the largest output, as of TOLERANCES.
    """
    generator = torch.Generator(weight.device).manual_seed(0)
    inputs = torch.randn(ROWS, weight.shape[1], device=weight.device, dtype=weight.dtype, generator=generator)
    try:
        output = converted(inputs)
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError(f"{caller}: {name} does not run in its new form: {error}") from error
    expected = F.linear(inputs, weight, bias)
    difference, largest = (output - expected).abs().max().item(), expected.abs().max().item()
    # So written, NaN is an error too.
    if not difference <= TOLERANCES[weight.dtype] * largest:
        raise RuntimeError(
            f"{caller}: {name} gives something else in its new form: outputs up to {largest:.3g} differ by up to "
            f"{difference:.3g}"
        )
