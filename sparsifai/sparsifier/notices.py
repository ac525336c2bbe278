"""What users are warned of: where options do not do what one might expect, or cost much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..axes.context import contexts
from ..axes.criterion import quantities_of
from ..axes.granularity import granularities
from ..axes.grouping import poolings, squared_sum
from ..model.parallel import kind_of
from ..model.tensors import shape_of
from ..support.capability import capability
from ..support.listing import in_short
from ..support.printable import printable
from ..support.registry import name_of
from ..support.table import percent
from .followers import Follower, rescaled_layers
from .layer import FROZEN, Layers, selected
from .layer_selection import FROZEN_UNCOUPLED
from .options import Options, resolve_axes

REGROWN_OUTPUTS = (
    "regrow: whole outputs regrow from zero, and their bias and norm entries too. Behind a ReLU or a norm layer no "
    "gradient reaches them, so they stay zero; choose smaller groups, such as kernels or weights"
)

UNMOVED_OUTPUTS = (
    "straight_through: no gradient reaches whole outputs that are zero, with their bias and norm entries, in front of "
    "a ReLU or a norm layer, so they are kept again only where others shrink; choose smaller groups, such as kernels "
    "or weights"
)

UNMOVED_GROUPS = (
    "straight_through: no gradient reaches a {} that is pruned, because all of its weights are zero, so it is kept "
    "again only where others shrink; choose smaller groups, such as weights"
)

# If more than this fraction of the weights is frozen, the user is warned.
LARGE_PART = 0.2

# If at least this fraction of the parameters has no named axes, the user is warned.
UNNAMED_PART = 0.1

# Number of axes -> how they may be called, for messages.
_EXAMPLES = {2: ("out", "in"), 3: ("expert", "out", "in"), 4: ("out", "in", "h", "w")}


def notice_of_unstepped(layers: Layers, parameters: Iterable[Tensor]) -> str:
    """What the user should be warned of when a large part of what is pruned is never trained; else nothing.

    Args:
        layers: All layers.
        parameters: The parameters that the optimizer steps.
    """
    stepped, pruned = {id(each) for each in parameters}, selected(layers)
    left = [name for name, layer in pruned.items() if id(layer.parameter) not in stepped]
    part = sum(pruned[name].parameter.numel() for name in left) / sum(
        each.parameter.numel() for each in pruned.values()
    )
    if part <= LARGE_PART:
        return ""
    return (
        f"{percent(part)} of the weights to prune ({in_short(left)}) are not in the optimizer, so they are pruned but "
        "never trained"
    )


def notices_of_frozen(layers: Layers) -> list[str]:
    """What the user should be warned of when a large part of the model is frozen, and so stays dense.

    Args:
        layers: All layers.
    """
    later = {
        FROZEN: "until they are trained",
        FROZEN_UNCOUPLED: "even if they are trained later, because what is pruned together is found once",
    }
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


def notices_of_starved(layers: Layers, context: Any) -> list[str]:
    """What the user should be warned of when a ranking of several layers has left hardly any weights in some of them.

    That happens to a new layer on top of pretrained ones, whose weights are much smaller than theirs. A layer with
    fewer weights than outputs has outputs that no input reaches.

    Args:
        layers: All layers.
        context: The context by which they were ranked.
    """
    left = {name: layer.parameter.numel() - layer.count().zeros for name, layer in selected(layers).items()}
    starved = [
        name
        for name, weights in left.items()
        if not (layers[name].grouping.drops_outputs or layers[name].grouping.drops_inputs)
        and weights < layers[name].weight.out
        # Had it been pruned as much as all layers, it would have a weight for each output.
        and (1 - layers[name].level) * layers[name].parameter.numel() >= layers[name].weight.out
    ]
    if not starved:
        return []
    name, first = starved[0], layers[starved[0]]
    others = f"; {in_short(starved[1:])} too" if len(starved) > 1 else ""
    return [
        f"context {name_of(context)} leaves {left[name]:,} of {first.parameter.numel():,} weights of "
        f"{printable(name)}, fewer than its {first.weight.out:,} outputs{others}. A new layer on pretrained ones has "
        "small weights, which rank lowest: leave it out with exclude=, or rank each layer by itself (context 'erk' or "
        "'local')"
    ]


def notices_of_unprunable(caller: str, reasons: Mapping[str, str], total: int) -> list[str]:
    """What the user should be warned of when layers stay dense, because zeros cannot be written to their weights.

    Args:
        caller: Name of the class that was called, for the message.
        reasons: Name of a weight -> why it cannot be pruned, as the end of 'it is ...'.
        total: Number of all weights with named axes.
    """
    if not reasons:
        return []
    shown = in_short([f"{name} is {why}" for name, why in reasons.items()])
    return [
        f"{caller}: {len(reasons)} of {total} layers stay dense, because their weights cannot be pruned: "
        f"{shown}; or leave them out with exclude="
    ]


def notices_of_host(options: Options, layers: Layers) -> list[str]:
    """What the user should be warned of when layers on a GPU are ranked on the host.

    Args:
        options: The options of the Sparsifier.
        layers: All layers.
    """
    weights = [layer.parameter for layer in selected(layers).values()]
    devices = {weight.device for weight in weights}
    if not any(device.type == "cuda" for device in devices):
        return []
    count = sum(weight.numel() for weight in weights)
    notices = []
    if "rng" in quantities_of(options.criteria):
        notices.append(
            f"criterion {name_of(options.criteria)}: {count} random scores are drawn on the host and sent to the GPU "
            "at every update, and training waits for them; update less often, or use a criterion that is computed from "
            "weights or gradients"
        )
    reasons = [f"context {name_of(options.context)}"] * (not capability(options.context, "on_device", False))
    if capability(options.granularity, "joint", False):
        reasons.append(f"granularity {name_of(options.granularity)}")
    reasons += ["round_to="] * (options.round_to is not None) + ["coupled="] * options.coupled
    reasons += [f"layers on {len(devices)} devices"] * (len(devices) > 1)
    if reasons:
        stay = ", ".join(name for name in contexts if capability(contexts[name], "on_device", False))
        notices.append(
            f"{' and '.join(reasons)}: the model is on a GPU, but its {count} weights are scored there, sent to the "
            "host and ranked by it, and training waits for it at every update; update less often, or use what stays on "
            f"the GPU: contexts {stay}, blocks(n) and N:M such as 2:4, on one device, without round_to= and coupled="
        )
    return notices


def notices_of_unused(options: Options) -> list[str]:
    """What the user should be warned of when options were given that do nothing beside the others.

    Args:
        options: The options of the Sparsifier.
    """
    notices = []
    usual = resolve_axes(options.granularity, options.context, options.criteria)[3]
    is_squared = squared_sum in (options.pool, usual)  # single weights are squared, too, which can change their order
    if options.granularity is granularities["weight"] and options.pool is not usual and not is_squared:
        notices.append(
            f"pool={poolings.name_of(options.pool)} does nothing: with granularity 'weight' each weight has its own "
            "score; leave it out, or choose larger groups, such as 'filter'"
        )
    highest = capability(options.context, "highest_sparsity")
    is_of_each_layer = capability(options.context, "fixes_counts") is True
    if options.may_empty and is_of_each_layer and highest is not None and highest < 1:
        notices.append(
            f"may_empty=True empties no layer: context {name_of(options.context)} prunes {percent(highest)} of a layer "
            "at most; leave it out"
        )
    return notices


def notices_of_unnamed(model: nn.Module, layers: Layers) -> list[str]:
    """Notice that a large part of a model stays dense, because the axes of its weights have no names.

    Args:
        model: The model, without wrappers.
        layers: Parameter name -> layer.
    """
    known = {name for layer in layers.values() for name in layer.weight.names}
    unnamed = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.requires_grad and name not in known and not _is_no_matrix(model, name)
    }
    share = sum(map(Tensor.numel, unnamed.values())) / sum(map(Tensor.numel, model.parameters()))
    if share < UNNAMED_PART:
        return []
    name, largest = max(unnamed.items(), key=lambda item: item[1].numel())
    holder, _, attribute = name.rpartition(".")
    kind = kind_of(model.get_submodule(holder))
    others = f" and {len(unnamed) - 1} others" if len(unnamed) > 1 else ""
    return [
        f"Sparsifier: {percent(share)} of the parameters stay dense, because their axes have no names: {name} of "
        f"{kind} ({'x'.join(map(str, shape_of(largest)))}){others}. Embeddings, positions and learned inputs rightly "
        f"stay dense; if a layer multiplies with it, name its axes, as in register_layer({kind}, "
        f"{attribute}={_EXAMPLES.get(largest.dim(), '(...)')}); or say which layers are pruned with layers="
    ]


def _is_no_matrix(model: nn.Module, name: str) -> bool:
    """Whether a parameter is a bias, belongs to a norm layer, or has one entry for all examples, as positions have."""
    holder = kind_of(model.get_submodule(name.rpartition(".")[0])).lower()
    return "bias" in name or "norm" in holder or shape_of(model.get_parameter(name))[:1] == (1,)


def notices_of_outputs(options: Options, model: nn.Module, layers: Layers, followers: Sequence[Follower]) -> list[str]:
    """What the user should be warned of when whole outputs are pruned.

    Args:
        options: The options of the Sparsifier.
        model: The model.
        layers: All layers.
        followers: The biases and norm parameters that are masked with whole outputs.
    """
    notices = []
    if capability(options.granularity, "joint", False):
        return [UNMOVED_GROUPS.format(name_of(options.granularity))] if options.straight_through else []
    if any(layer.grouping.drops_outputs for layer in selected(layers).values()):
        notices += [REGROWN_OUTPUTS] if options.regrow is not None else []
        notices += [UNMOVED_OUTPUTS] if options.straight_through else []
    if options.pool is squared_sum and (rescaled := rescaled_layers(model, layers, followers)):
        notices.append(
            f"{name_of(options.criteria)}: a batch norm undoes the scale of the outputs of "
            f"{', '.join(rescaled[:3])}{' and others' if len(rescaled) > 3 else ''}, so the sum of w g over a "
            "filter is zero but for rounding; choose snip or fisher, or smaller groups such as kernels"
        )
    return notices
