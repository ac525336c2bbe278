"""Norm layers: those of torch, and those of other libraries, which their response to inputs shows.

A norm layer shifts and scales each channel by entries of its own. Where these entries are zero its output is zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..support.printable import printable

NORMS_OVER_CHANNELS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


NORMS_OVER_LAST_AXIS = (nn.LayerNorm, nn.RMSNorm)


def affine_names(module: nn.Module) -> list[str]:
    """Names of the tensors by which a norm layer scales and shifts channels, one entry for each channel.

    They are the parameters of torch's norm layers over channels. For a layer of another library, such as
    FilterResponseNorm, they are its parameters, or the buffers `weight` and `bias` where they are frozen, as in
    FrozenBatchNorm2d of torchvision.

    Args:
        module: Any module.

    Returns:
        The names; empty if the module is no such layer.
    """
    if isinstance(module, NORMS_OVER_CHANNELS):
        return [name for name, _ in module.named_parameters(recurse=False)]
    names = _candidates(module)
    return names if names and _is_zero_where_these_are(module, names) else []


def is_norm_of_others(module: nn.Module) -> bool:
    """Tell whether a module is a norm layer over channels that is not of torch."""
    return not isinstance(module, NORMS_OVER_CHANNELS) and bool(affine_names(module))


@torch.no_grad()
def keeps_channels_apart(module: nn.Module) -> bool:
    """Tell whether each channel of the output of a norm layer depends on the same channel of its input alone."""
    count = getattr(module, affine_names(module)[0]).numel()
    given = _input(count, module)
    given[:, 0] = float("nan")
    is_nan = copy.deepcopy(module).eval()(given).isnan().transpose(0, 1).flatten(1)
    return bool(is_nan[0].all()) and not is_nan[1:].any()


def check_fused_norms(model: nn.Module) -> None:
    """Refuse a model whose batch norms were fused for quantization-aware training, if a scale of them is zero.

    Args:
        model: The model.

    Raises:
        ValueError: A scale is zero, as that of a pruned filter is. The fused layers divide by it, which gives NaN.
    """
    fused = {
        name: norm
        for name, module in model.named_modules()
        if type(module).__module__.startswith("torch.ao.nn.intrinsic.qat")
        and isinstance(norm := getattr(module, "bn", None), NORMS_OVER_CHANNELS)
    }
    zeros = {name: int((norm.weight == 0).sum()) for name, norm in fused.items() if norm.weight is not None}
    if divided := [f"{printable(name)} ({count})" for name, count in zeros.items() if count]:
        shown = f"{', '.join(divided[:3])}{' and others' * (len(divided) > 3)}"
        raise ValueError(
            "quantization-aware training divides by the scales of the batch norms that are fused into "
            f"{type(model).__name__}, and some are zero, those of pruned filters: {shown}. "
            "The outputs would be NaN; call shrink(model, example_input) before fuse_modules_qat, which removes them; "
            "with coupled=True in the Sparsifier it can remove all"
        )


def norms_not_followed(model: nn.Module, sizes: Iterable[int]) -> dict[str, str]:
    """Find norm layers that shift their channels in a way that is not known.

    Args:
        model: The model.
        sizes: Numbers of channels; layers with other numbers are left out.

    Returns:
        Name of the layer -> name of its class.
    """
    sizes = set(sizes)
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and not isinstance(module, NORMS_OVER_CHANNELS + NORMS_OVER_LAST_AXIS)
        and isinstance(bias := getattr(module, "bias", None), Tensor)
        and bias.numel() in sizes
        and not affine_names(module)
    }


def _candidates(module: nn.Module) -> list[str]:
    """Names of the parameters of a module, or of its frozen weight and bias, if they have one entry per channel."""
    if type(module).__module__.startswith("torch.nn.") or any(
        True for child in module.children() for _ in child.parameters()
    ):
        return []
    if isinstance(module, NORMS_OVER_LAST_AXIS):  # subclasses of it move the axes around torch's function
        return []
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False)) or {
        name: buffer for name, buffer in module.named_buffers(recurse=False) if name in ("weight", "bias")
    }
    bias = own.get("bias")
    if bias is None or "weight" not in own or bias.numel() < 2 or not bias.is_floating_point():
        return []
    return list(own) if all(each.shape == (bias.numel(),) for each in own.values()) else []


@torch.no_grad()
def _is_zero_where_these_are(module: nn.Module, names: Iterable[str]) -> bool:
    """Whether a channel of the output of a module is zero if the entries of these tensors are, and only then."""
    try:
        norm = copy.deepcopy(module).eval()
        for name in names:
            getattr(norm, name).fill_(0.5)[0] = 0
        given = _input(len(norm.bias), norm)  # type: ignore[arg-type]
        output = norm(given.clone())
        return output.shape == given.shape and not output[:, 0].any() and bool(output[:, 1].any())
    except Exception:  # it takes other inputs
        return False


def _input(channels: int, module: nn.Module) -> Tensor:
    """An input of two maps, the same at every call."""
    bias = module.bias
    assert isinstance(bias, Tensor)
    return torch.linspace(-2, 3, 2 * channels * 16, dtype=bias.dtype, device=bias.device).reshape(2, channels, 4, 4)
