"""What users are warned of: where masks of whole outputs, or criteria, do not do what one might expect."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..axes.grouping import squared_sum
from ..support.registry import name_of
from ..support.table import percent
from .followers import Follower, rescaled_layers
from .layer import FROZEN, Layers, selected
from .layer_selection import FROZEN_UNCOUPLED
from .options import Options

REGROWN_OUTPUTS = (
    "regrow: whole outputs regrow from zero, and their bias and norm entries too. Behind a ReLU or a norm layer no "
    "gradient reaches them, so they stay zero; choose smaller groups, such as kernels or weights"
)

# If more than this fraction of the weights is frozen, the user is warned.
LARGE_PART = 0.2


def notices_of_frozen(layers: Layers) -> list[str]:
    """What the user should be warned of when a large part of the model is frozen, and so stays dense.

    Args:
        layers: All layers.
    """
    later = {FROZEN: "until they are trained", FROZEN_UNCOUPLED: "even if they are trained later, because of coupled="}
    frozen = [name for name, layer in layers.items() if layer.why_dense in later]
    weights = sum(layers[name].parameter.numel() for name in frozen)
    part = weights / max(1, sum(layer.parameter.numel() for layer in layers.values()))
    if part <= LARGE_PART:
        return []
    return [
        f"{percent(part)} of the weights ({len(frozen)} of {len(layers)} layers, such as {frozen[0]}) are frozen, so "
        f"they stay dense {later[layers[frozen[0]].why_dense]}; unfreeze them, or name them in layers= to prune them "
        "as they are"
    ]


def notices_of_outputs(options: Options, model: nn.Module, layers: Layers, followers: Sequence[Follower]) -> list[str]:
    """What the user should be warned of when whole outputs are pruned.

    Args:
        options: The options of the Sparsifier.
        model: The model.
        layers: All layers.
        followers: The biases and norm parameters that are masked with whole outputs.
    """
    notices = []
    if options.regrow is not None and any(layer.grouping.drops_outputs for layer in selected(layers).values()):
        notices.append(REGROWN_OUTPUTS)
    if options.pool is squared_sum and (rescaled := rescaled_layers(model, layers, followers)):
        notices.append(
            f"{name_of(options.criteria)}: a batch norm undoes the scale of the outputs of "
            f"{', '.join(rescaled[:3])}{' and others' if len(rescaled) > 3 else ''}, so the sum of w g over a "
            "filter is zero but for rounding; choose snip or fisher, or smaller groups such as kernels"
        )
    return notices
