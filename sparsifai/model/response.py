"""Whether a layer uses its weight as it is, or computes another weight from it in its forward.

Weight standardization subtracts a mean, so zeros in the parameter are not zeros in what the layer multiplies with. No
attribute of a layer says so, but its response to a unit input does: with W[o, i] = 0, output o must not depend on
input i.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .layers import NamedWeight
from .parallel import is_sharded
from .running import copy_of

# Code that is known to use weights as they are. What torch's parametrizations compute is found without a response.
_KNOWN = ("torch.nn.modules.", "transformers.pytorch_utils")

# A response up to this fraction of the largest one is rounding.
_ROUNDING = 1e-3


def computes_its_weight(weight: NamedWeight, mask_of: Callable[[Tensor], Tensor]) -> bool:
    """Tell whether zeros of a weight do not last, because the forward of its layer computes another weight from it.

    A copy of the layer is run on a unit input. A layer of torch, or one that does not run on it, counts as using its
    weight as it is.

    Args:
        weight: The weight.
        mask_of: Bool per weight -> the mask of the groups in which any weight is kept.
    """
    layer = weight.module
    kernel = [axis for axis in weight.axes if axis not in ("out", "in")]
    if all(_is_known(layer, method) for method in ("forward", "_conv_forward")):
        return False
    if not {"out", "in"} <= weight.axes.keys() or not {"d", "h", "w"}.issuperset(kernel):
        return False
    if is_sharded(weight.parameter) or weight.parameter.is_meta or not weight.parameter.is_floating_point():
        return False
    try:
        return _responds_where_pruned(weight, kernel, mask_of)
    except Exception:  # of the layer, which may need other inputs
        return False


def _is_known(layer: nn.Module, method: str) -> bool:
    """Whether a method of a layer is known code, or the layer has no such method."""
    function = getattr(type(layer), method, None)
    return function is None or inspect.unwrap(function).__module__.startswith(_KNOWN)


@torch.no_grad()
def _responds_where_pruned(weight: NamedWeight, kernel: list[str], mask_of: Callable[[Tensor], Tensor]) -> bool:
    """Whether an output of the layer responds to an input although all weights between them are zero."""
    probe: Any = copy_of(weight.module).eval().float()
    values = getattr(probe, weight.attribute)
    drawn = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    dense = drawn.to(values.device) * (values.std() if values.numel() > 1 and values.std() > 0 else 1.0)
    mask, kept = _half_pruned(weight, values, kernel, mask_of)
    if mask is None:
        return False
    number = int((~kept).any(0).nonzero()[0])  # an input with pruned weights
    pruned = ~kept[:, number]

    sizes = [_extent(weight, axis, place) for place, axis in enumerate(kernel)]
    zeros = torch.zeros(1, weight.convolution_groups, weight.axes["in"], *sizes, device=values.device)
    ones = zeros.clone()
    ones[:, :, number] = 1

    def response(now: Tensor) -> Tensor:
        """What the input changes in every output, in the shape (outputs, places)."""
        values.copy_(now)
        with torch.random.fork_rng(devices=[]):
            change = probe.forward(ones.flatten(1, 2)) - probe.forward(zeros.flatten(1, 2))
        return change.reshape(weight.out, -1).nan_to_num(0.0)  # scaling by the mean of no weights gives NaN

    of_none, of_half, of_all = response(torch.zeros_like(dense)), response(dense * mask), response(dense)
    rounding = _ROUNDING * float(torch.maximum(of_all.abs().max(), of_none.abs().max()))
    if bool(((of_half - of_none)[pruned].abs() > rounding).any()):
        return True
    # A response without weights can come from something that is added, such as a low-rank term. It then stays the same
    # with weights of twice the size. Else zeros become other values, as with signs.
    added = of_none.abs().max() <= rounding or bool(
        ((response(2 * dense) - of_none) - 2 * (of_all - of_none)).abs().max() <= 4 * rounding
    )
    return not added


def _half_pruned(
    weight: NamedWeight, values: Tensor, kernel: list[str], mask_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor | None, Tensor]:
    """A mask of whole groups that prunes every weight between some outputs and inputs, and which pairs it keeps.

    The pairs are bools in the shape (all outputs, inputs of one convolution group). None if there is no such mask.
    """
    names, groups = list(weight.axes), weight.convolution_groups
    outputs, inputs = (
        torch.arange(values.shape[place], device=values.device).view([-1] + [1] * (values.dim() - 1 - place))
        for place in (names.index("out"), names.index("in"))
    )
    kept = torch.ones((), dtype=torch.bool)
    for halves in (outputs + inputs, outputs, inputs):
        mask = mask_of((halves % 2 == 1).expand_as(values)).expand_as(values)
        by_pair = mask.unflatten(0, (groups, -1)).movedim(
            [1 + names.index(axis) for axis in ("out", "in", *kernel)], list(range(1, values.dim() + 1))
        )
        kept = by_pair.reshape(weight.out, weight.axes["in"], -1).any(2)
        if not kept.all():
            return mask, kept
    return None, kept


def _extent(weight: NamedWeight, axis: str, place: int) -> int:
    """Length of an input along an axis of the kernel: enough for a kernel with its dilation, and for padding."""
    dilation = getattr(weight.module, "dilation", 1)
    dilation = dilation[place] if isinstance(dilation, tuple) else dilation
    return dilation * (weight.axes[axis] - 1) + 1 + weight.axes[axis]
