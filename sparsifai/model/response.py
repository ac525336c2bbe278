"""Whether a layer uses its weight as it is, or computes another weight from it in its forward.

Weight standardization subtracts a mean, so zeros in the parameter are not zeros in what the layer multiplies with. No
attribute of a layer says so. So a copy of the layer is run, and what it multiplies its input with is compared with its
weight: where the weight is zero, that factor must be, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .layers import NamedWeight
from .parallel import is_sharded
from .running import copy_of, in_modes, random_restored

# Code that is known to use weights as they are. What torch's parametrizations compute is found without a run.
_KNOWN = ("torch.nn.modules.", "transformers.pytorch_utils")

# Functions of torch that multiply an input with a weight. Those of the first line take it as their second argument.
_SECOND = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_ANY = ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__")

# A value up to this fraction of the largest one is rounding.
_ROUNDING = 1e-3


def computes_its_weight(weight: NamedWeight, mask_of: Callable[[Tensor], Tensor]) -> bool:
    """Tell whether zeros of a weight do not last, because the forward of its layer computes another weight from it.

    A layer of torch, one that does not run on an input of ones, and one that multiplies with no factor of the size of
    the weight count as using their weight as it is.

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
    return _is_factor_where_pruned(weight, kernel, mask_of)


def _is_known(layer: nn.Module, method: str) -> bool:
    """Whether a method of a layer is known code, or the layer has no such method."""
    function = getattr(type(layer), method, None)
    return function is None or inspect.unwrap(function).__module__.startswith(_KNOWN)


class _Factor(TorchFunctionMode):
    """Takes what a layer multiplies its input with: the factor of the first product that has the size of its weight."""

    def __init__(self, parameter: Tensor):
        super().__init__()
        self.parameter = parameter
        self.found: Tensor | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if self.found is None and name in _SECOND:
            self._take([kwargs.get("weight", args[1] if len(args) > 1 else None)])
        elif self.found is None and name in _ANY:
            self._take([*args, *kwargs.values()])
        return function(*args, **kwargs)

    def _take(self, factors: list[Any]) -> None:
        size = self.parameter.numel()
        for factor in factors:
            if isinstance(factor, Tensor) and factor.dim() > 1 and factor.numel() == size:
                self.found = factor


@torch.no_grad()
def _is_factor_where_pruned(weight: NamedWeight, kernel: list[str], mask_of: Callable[[Tensor], Tensor]) -> bool:
    """Whether a layer multiplies its input with another factor than zero where its weight is zero."""
    try:
        probe: Any = copy_of(weight.module).eval().float()
    except ValueError:  # it cannot be copied, so it cannot be tried out
        return False
    values = getattr(probe, weight.attribute)
    sizes = [_extent(weight, axis, place) for place, axis in enumerate(kernel)]
    ones = torch.ones(1, weight.convolution_groups * weight.axes["in"], *sizes, device=values.device)

    def factor() -> Tensor | None:
        """What the input is multiplied with at present."""
        # The layer may fail, if it needs other inputs; the factor may be known by then.
        taken = _Factor(values)
        with suppress(Exception), random_restored(probe), in_modes(taken):
            probe.forward(ones)
        return taken.found

    found = factor()
    if found is None or found.untyped_storage().data_ptr() == values.untyped_storage().data_ptr():
        return False  # it is the weight itself, the most common case
    drawn = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).to(values.device)
    dense = drawn * (values.std() if values.numel() > 1 and values.std() > 0 else 1.0)
    mask = _half_pruned(weight, values, mask_of)
    if mask is None:
        return False

    def with_weights(now: Tensor) -> Tensor:
        values.copy_(now)
        used: Any = factor()
        used = used.detach().nan_to_num(0.0)  # scaling by the mean of no weights gives NaN
        if used.dim() == 2 and used.stride(0) < used.stride(1):  # it was transposed for the product
            used = used.t()
        return used.reshape(values.shape).clone()

    of_none, of_half, of_all = with_weights(torch.zeros_like(dense)), with_weights(dense * mask), with_weights(dense)
    rounding = _ROUNDING * float(torch.maximum(of_all.abs().max(), of_none.abs().max()))
    if bool(((of_half - of_none)[~mask].abs() > rounding).any()):
        return True
    # A factor without weights can come from something that is added, such as a low-rank term. It then stays the same
    # with weights of twice the size. Else zeros become other values, as with signs.
    added = of_none.abs().max() <= rounding or bool(
        ((with_weights(2 * dense) - of_none) - 2 * (of_all - of_none)).abs().max() <= 4 * rounding
    )
    return not added


def _half_pruned(weight: NamedWeight, values: Tensor, mask_of: Callable[[Tensor], Tensor]) -> Tensor | None:
    """A mask of whole groups that prunes about half of a weight; None if there is no such mask."""
    names = list(weight.axes)
    outputs, inputs = (
        torch.arange(values.shape[place], device=values.device).view([-1] + [1] * (values.dim() - 1 - place))
        for place in (names.index("out"), names.index("in"))
    )
    for halves in (outputs + inputs, outputs, inputs):
        mask = mask_of((halves % 2 == 1).expand_as(values)).expand_as(values)
        if not mask.all():
            return mask
    return None


def _extent(weight: NamedWeight, axis: str, place: int) -> int:
    """Length of an input along an axis of the kernel: enough for a kernel with its dilation, and for padding."""
    dilation = getattr(weight.module, "dilation", 1)
    dilation = dilation[place] if isinstance(dilation, tuple) else dilation
    return dilation * (weight.axes[axis] - 1) + 1 + weight.axes[axis]
