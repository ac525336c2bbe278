"""Pictures of masks: which weights of each layer are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..model.joint.attention import find_heads
from ..model.layers import NamedWeight, find_weights
from ..model.parallel import whole
from ..model.patterns import Pattern, as_patterns, matching_each
from ..model.zeros import Count
from ..support.checks import check_count
from ..support.printable import printable
from ..support.table import percent

# Layers that are drawn if none are chosen, and columns of them.
_MOST, _COLUMNS = 16, 4
_LEADING = ("expert",)  # axes whose entries stand above each other as whole matrices
_MOST_HEADS = 64  # more lines would hide the mask


def plot_masks(
    model: nn.Module, masks: Mapping[str, Tensor], chosen: Pattern | Iterable[Pattern] | None, pixels: int, ax: Any
) -> list[Any]:
    """Draw masks, as `Sparsifier.plot_masks` says.

    Args:
        model: The model, without wrappers.
        masks: Parameter name -> mask, which broadcasts to the weight.
        chosen: Patterns of the layers to draw; None for the first 16.
        pixels: The most pixels of an image along each side.
        ax: One or several matplotlib axes, or None for new ones.

    Returns:
        The matplotlib axes of the layers.

    Raises:
        TypeError: A pattern is none, or `pixels` is not a whole number.
        ValueError: There is no mask, a pattern matches no pruned layer, `pixels` is less than 1, or there are not as
            many axes as layers.
    """
    check_count("pixels", pixels)
    weights = {name: weight for name, weight in find_weights(model).items() if name in masks}
    if not weights:
        raise ValueError("plot_masks: there is no mask to draw, because nothing is pruned")
    names = list(weights)
    if chosen is not None:
        matched = set().union(*matching_each(as_patterns(chosen), weights, model))
        names = [name for name in names if name in matched]
    drawn = names if chosen is not None else names[:_MOST]
    axes = _axes(drawn, ax)
    heads = _heads(model)
    image = None
    for name, each in zip(drawn, axes, strict=True):
        image = _draw(weights[name], masks[name], heads.get(name, {}), pixels, each)
    figure = axes[0].figure
    if ax is None:
        figure.colorbar(image, ax=axes, label="share of the weights that are kept", shrink=0.8)
        notes = [f"the first {len(drawn)} of {len(names):,} pruned layers; layers= chooses others"]
        notes = (notes if len(drawn) < len(names) else []) + ["orange: attention heads"] * any(map(heads.get, drawn))
        figure.suptitle("\n".join(notes), fontsize="medium")
    return axes


def mask_image(mask: Tensor, axes: Sequence[str], pixels: int) -> np.ndarray:
    """The kept weights of a layer as an image, with outputs from the top to the bottom and inputs from left to right.

    The kernels of a convolution are tiles. If there are more weights than pixels along a side, each pixel is the mean
    of several: the share of weights that are kept. If there is room, a line of NaN separates kernels.

    Args:
        mask: Bool tensor in the shape of the weight.
        axes: The names of its axes; those that are neither 'out' nor 'in' span a kernel.
        pixels: The most pixels along each side.

    Returns:
        Numbers from 0 to 1, of shape (rows, columns).
    """
    order = {name: place for place, name in enumerate(axes)}
    if not {"out", "in"} <= order.keys():
        flat = mask.reshape(mask.shape[0], -1) if mask.dim() > 1 else mask.reshape(1, -1)
        return _pooled(flat, pixels)
    leading = [order[name] for name in axes if name in _LEADING]
    kernel = [order[name] for name in axes if name not in ("out", "in", *_LEADING)]
    above, beside = kernel[:-1], kernel[-1:]
    shape = mask.shape
    tiles = mask.permute(*leading, order["out"], *above, order["in"], *beside)
    rows = prod(shape[place] for place in (*leading, order["out"]))
    height, width = prod(shape[place] for place in above), prod(shape[place] for place in beside)
    tiles = tiles.reshape(rows, height, shape[order["in"]], width)
    columns = shape[order["in"]]
    if height * width > 1 and rows * (height + 1) - 1 <= pixels and columns * (width + 1) - 1 <= pixels:
        lined = torch.full((rows, height + 1, columns, width + 1), float("nan"))
        lined[:, :height, :, :width] = tiles.float()
        return lined.reshape(rows * (height + 1), columns * (width + 1))[:-1, :-1].numpy()
    return _pooled(tiles.reshape(rows * height, columns * width), pixels)


def _pooled(image: Tensor, pixels: int) -> np.ndarray:
    rows, columns = image.shape
    size = (min(rows, pixels), min(columns, pixels))
    return nn.functional.adaptive_avg_pool2d(image[None].float(), size)[0].numpy()


def _axes(names: Sequence[str], ax: Any) -> list[Any]:
    """The given matplotlib axes as a list, or new ones."""
    if ax is not None:
        axes = list(np.ravel(ax))
        if len(axes) != len(names):
            raise ValueError(
                f"plot_masks: {len(axes)} axes are given for {len(names)} layers; give one for each, or choose layers "
                "with layers="
            )
        return axes
    import matplotlib.pyplot as plt

    columns = min(len(names), _COLUMNS)
    rows = ceil(len(names) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3 * columns + 1, 3.3 * rows + 0.6), layout="constrained", squeeze=False
    )
    axes = list(grid.flat)
    for unused in axes[len(names) :]:
        figure.delaxes(unused)
    return axes[: len(names)]


def _heads(model: nn.Module) -> dict[str, dict[int, np.ndarray]]:
    """Name of a parameter -> its axis -> where another attention head begins along it."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for groups in find_heads(model):
        for part in groups.parts:
            if part.axis is not None and 1 < groups.count <= _MOST_HEADS:
                found.setdefault(part.name, {})[part.axis] = np.flatnonzero(np.diff(part.groups)) + 1
    return found


def _draw(weight: NamedWeight, mask: Tensor, heads: Mapping[int, np.ndarray], pixels: int, ax: Any) -> Any:
    mask = whole(mask).expand(weight.parameter.shape).cpu()
    names = list(weight.axes)
    image = mask_image(mask, names, pixels)
    aspect = "equal" if max(image.shape) < pixels else "auto"
    shown = ax.imshow(image, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect=aspect)
    ax.set_facecolor("0.85")
    for axis, begins in heads.items():
        is_row = names[axis] == "out"
        extent, size = image.shape[0 if is_row else 1], mask.shape[axis]
        for begin in begins:
            draw_line = ax.axhline if is_row else ax.axvline
            draw_line(begin * extent / size - 0.5, color="tab:orange", linewidth=0.8)
    shape = "x".join(map(str, mask.shape))
    ax.set_title(f"{printable(weight.name, 40)}\n{shape}, {percent(Count.of(mask).sparsity)} pruned", fontsize="small")
    ax.set_xlabel("inputs", fontsize="small")
    ax.set_ylabel("outputs", fontsize="small")
    ax.set_xticks([])
    ax.set_yticks([])
    return shown
