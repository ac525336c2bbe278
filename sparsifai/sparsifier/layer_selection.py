"""Which layers are pruned, and why the others stay dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from operator import attrgetter
from typing import Any

from torch import nn

from ..axes.granularity import Granularity
from ..axes.grouping import Grouping, grouping_of
from ..model.flow import Flow
from ..model.layers import NamedWeight, find_weights
from ..model.norms import check_fused_norms, norms_not_followed
from ..model.patterns import Pattern, as_patterns, matching_each
from ..model.prunable import unprunable
from ..model.response import computes_its_weight
from ..model.tensors import check_values
from ..model.tracing import find_flow
from ..support.listing import in_short
from ..support.printable import printable
from ..support.warning import warn
from .coupled import Asked, Coupling
from .coupled_filters import couple
from .followers import Follower, find_followers
from .joint import joint_granularity
from .layer import FROZEN, FROZEN_UNCOUPLED, Layer, Layers, selected

# Why a layer stays dense whose weight is of a type or layout in which zeros cannot be written; the reason follows.
CANNOT_BE_PRUNED = "cannot be pruned: "


def find_layers(
    model: nn.Module,
    granularity: Granularity,
    *,
    layers: Any = None,
    exclude: Any = None,
    fewest: int = 1,
    coupled: bool = False,
    example_input: Any = None,
    refuse: bool = True,
) -> tuple[dict[str, Layer], list[Follower], Coupling | None]:
    """The layers of a model, in its order, the followers of those that are pruned, and which filters are coupled.

    Args:
        model: The model, without wrappers.
        granularity: How weights are grouped.
        layers: Patterns of the layers to prune, or None for the default.
        exclude: Patterns of the layers that stay dense, or None.
        fewest: How many groups of a layer have to be kept at least; 0 if it may lose all of them.
        coupled: Whether filters that can only be removed together are pruned together.
        example_input: A batch, for models that torch.fx cannot trace, and for `coupled`.
        refuse: Whether to raise if zeros in a weight would not last; else such a weight stays dense.

    Raises:
        ValueError: A parameter has no values, a pattern matches no layer, batch norms with zeros were fused for
            quantization, the data flow is needed but cannot be found, or no layer is left.
    """
    check_values("Sparsifier", dict(model.named_parameters()))
    check_fused_norms(model)
    flow = cache(partial(find_flow, model, example_input))
    weights = find_weights(model)
    joint = joint_granularity(granularity, model, weights, example_input)
    if joint is not None and coupled:
        raise ValueError(
            f"coupled=True couples whole filters; granularity {joint.what!r} already joins what belongs together, so "
            "leave coupled= out"
        )
    groupings = (
        joint.groupings(fewest)
        if joint is not None
        else {
            name: weight.unfit or grouping_of(granularity, weight.axes, weight.convolution_groups, fewest)
            for name, weight in weights.items()
        }
    )
    fixed = {id(model.get_parameter(name)): why for name, why in unprunable(model).items()}
    # Joint groups are inside of the model, so none of their layers reads its input or yields its output.
    at_ends = joint is None
    reasons = _reasons_to_stay_dense(model, weights, groupings, flow, fixed, layers, exclude, refuse, at_ends)

    def records() -> dict[str, Layer]:
        usable = {name: each for name, each in groupings.items() if not isinstance(each, str)}
        return {name: Layer.dense(weight, usable.get(name), reasons.get(name, "")) for name, weight in weights.items()}

    found, coupling = records(), None
    if coupled or joint is not None:
        if joint is not None:
            coupling, more = joint.couple(found)
        else:
            coupling, more = couple(model, example_input, found, may_empty=not fewest)
            more |= {name: FROZEN_UNCOUPLED for name, reason in reasons.items() if reason == FROZEN}
        reasons |= more
        found = records()
    prunable = {name: layer for name, layer in found.items() if layer.is_selected or layer.why_dense == FROZEN}
    if joint is not None:
        followers = {each.name: each for each in joint.followers(prunable)}
    else:
        _warn_of_norms(model, prunable, flow)
        followers = {each.name: each for each in find_followers(model, prunable, flow)}
        if coupling is not None:  # the dependency graph sees further than the data flow
            followers |= {each.name: each for each in coupling.followers(model)}
    unfit = {name: why for name in followers if (why := fixed.get(id(attrgetter(name)(model))))}
    for name, why in unfit.items() if refuse else ():
        raise ValueError(
            f"Sparsifier: {printable(name)}, which is pruned with outputs of "
            f"{in_short(list(followers[name].producers))}, is {why}; or exclude these layers with exclude="
        )
    return found, [each for name, each in followers.items() if name not in unfit], coupling


def _warn_of_norms(model: nn.Module, layers: Layers, flow: Callable[[], Flow]) -> None:
    """Warn of norm layers that may shift the channels of pruned outputs."""
    dropping = {name: layer.weight.out for name, layer in layers.items() if layer.grouping.drops_outputs}

    def reads_them(norm: str) -> bool:
        """Whether a norm layer reads pruned outputs alone. Behind a sum with others it follows no layer anyway."""
        tensors = [f"{norm}.{name}" for name, _ in model.get_submodule(norm).named_parameters()]
        return flow().reads_only(tensors, dropping)

    norms = norms_not_followed(model, dropping.values())
    shown = [f"{name} ({kind})" for name, kind in norms.items() if reads_them(name)]
    if shown:
        warn(
            f"Sparsifier: it is unknown by which parameters {', '.join(shown[:3])}{' and others' * (len(shown) > 3)} "
            "shift their channels, so they are not pruned with the outputs before them: behind these layers a channel "
            "of zeros becomes a constant, and shrink may have to keep it; use norm layers of torch, or prune weights"
        )


def _reasons_to_stay_dense(
    model: nn.Module,
    weights: Mapping[str, NamedWeight],
    groupings: Mapping[str, Grouping | str],
    flow: Callable[[], Flow],
    fixed: Mapping[int, str],
    layers: Any = None,
    exclude: Any = None,
    refuse: bool = True,
    at_ends: bool = True,
) -> dict[str, str]:
    """Find which weights stay dense: parameter name -> reason.

    Args:
        model: The model, without wrappers.
        weights: All weights with named axes.
        groupings: Parameter name -> its grouping, or why the layer cannot have the granularity.
        flow: Gives the data flow of the model. It is called only if it is needed.
        fixed: id of a parameter that cannot be pruned -> why.
        layers: As of `find_layers`.
        exclude: As of `find_layers`.
        refuse: As of `find_layers`.
        at_ends: Whether the layers at the ends of the model stay dense if whole outputs or inputs are pruned.
    """
    patterns = [] if layers is None else as_patterns(layers)
    exclusions = [] if exclude is None else as_patterns(exclude)
    chosen = set().union(*matching_each(patterns, weights, model))
    excluded = set().union(*matching_each(exclusions, weights, model))
    named = {pattern for pattern in patterns if isinstance(pattern, str)}
    given = {id(pattern) for pattern in patterns if isinstance(pattern, nn.Module)}
    reasons, whole_outputs, whole_inputs = {}, set(), set()
    for name, weight in weights.items():
        grouping = groupings[name]
        exact = named & {*weight.names, *dict(weight.owners)} or given & {id(owner) for _, owner in weight.owners}
        if name in excluded:
            reasons[name] = "excluded"
        elif layers is not None and name not in chosen:
            reasons[name] = "not in layers"
        elif layers is None and weight.is_frozen and (isinstance(grouping, str) or weight.sources):
            reasons[name] = grouping if isinstance(grouping, str) else "computed from frozen parameters"
        elif layers is None and weight.is_embedding:
            reasons[name] = "embedding"
        elif not weight.sources and (why := fixed.get(id(weight.parameter))):
            if refuse and layers is not None:
                raise ValueError(
                    f"Sparsifier: {printable(name)} cannot be pruned, because it is {why}; or exclude it with exclude="
                )
            reasons[name] = f"{CANNOT_BE_PRUNED}{why}"
        elif why := why_zeros_do_not_last(weight, grouping):
            if refuse and not (layers is None and weight.is_frozen):
                raise ValueError(f"Sparsifier: {why}")
            reasons[name] = why
        elif isinstance(grouping, str):
            reasons[name] = grouping
        elif not exact and at_ends:
            whole_outputs |= {name} if grouping.drops_outputs else set()
            whole_inputs |= {name} if grouping.drops_inputs else set()
    ends = [(whole_outputs, "last", "yields the model's output"), (whole_inputs, "first", "reads the model's input")]
    for names, end, reason in ends:
        at_end = getattr(flow(), end)(weights) if names else set()
        if names and not at_end:
            raise ValueError(
                f"Sparsifier: the data flow of {type(model).__name__} does not show which layer {reason}, and with "
                "this granularity that layer must stay dense; name the layers to prune exactly in layers="
            )
        reasons.update(dict.fromkeys(names & at_end, reason))
    if layers is None:
        reasons = {name: FROZEN for name, weight in weights.items() if weight.is_frozen} | reasons
    if len(reasons) == len(weights):
        raise ValueError(f"Sparsifier: no layer of {type(model).__name__} is left to prune; {_summary(reasons)}")
    return {name: reasons[name] for name in weights if name in reasons}


def why_zeros_do_not_last(weight: NamedWeight, grouping: Grouping | str) -> str:
    """Why a weight cannot be pruned, and what to do; empty if it can."""
    place = weight.owners[0][0] or weight.kind
    if weight.unfit or isinstance(grouping, str):
        return weight.unfit
    if weight.sources:
        how = "the parametrization first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, ...)"
        if hasattr(weight.owners[0][1], f"{weight.attribute}_mask"):
            how = (
                f"it first: torch.nn.utils.prune.remove(module, {weight.attribute!r}) leaves the zeros; or load "
                "from_torch_prune(model.state_dict()) into a new model"
            )
        return (
            f"{weight.attribute} of {printable(place)} is computed from {printable(weight.name)} in each forward, so "
            f"zeros in it do not last; remove {how}, or exclude the layer with exclude="
        )
    if computes_its_weight(weight, lambda kept: grouping.spread(grouping.any_of(kept))):
        return (
            f"the forward of {printable(place)} ({weight.kind}) computes its own weight from {printable(weight.name)}, "
            f"and where {weight.attribute} is zero, the computed weight is not, so pruning it has no effect; replace "
            "the layer by one that uses its weight as it is, or exclude it with exclude="
        )
    return ""


def cannot_be_pruned(layers: Layers) -> dict[str, str]:
    """Name -> why, for layers that stay dense because zeros cannot be written to their weights."""
    reasons = {name: layer.why_dense for name, layer in layers.items()}
    return {name: why[len(CANNOT_BE_PRUNED) :] for name, why in reasons.items() if why.startswith(CANNOT_BE_PRUNED)}


def _summary(reasons: Mapping[str, str]) -> str:
    """Why all layers stay dense, and what to do."""
    if not reasons:
        return "it has no weights with named axes; name those of its layers: register_layer(kind, weight=('out', 'in'))"
    # That a layer has no head, for example, says nothing of why those with heads stay dense.
    telling_first = sorted(reasons.items(), key=lambda item: item[1].startswith("belongs to no "))
    shown = [f"{printable(name)}: {reason}" for name, reason in telling_first]
    more = f"; and {len(shown) - 5} more" if len(shown) > 5 else ""
    return f"{'; '.join(shown[:5])}{more}. Choose another granularity, or name layers in layers="


def scopes(sparsity: float | Mapping[Pattern, float], layers: Layers, model: nn.Module) -> Asked:
    """The selected layers of each fraction that is asked for. If several patterns match a layer, the last counts.

    Raises:
        ValueError: A pattern matches no layer, or only layers that stay dense.
    """
    pruned = selected(layers)
    if not isinstance(sparsity, Mapping):
        return [(sparsity, list(pruned))]
    weights = {name: layer.weight for name, layer in layers.items()}
    position_of: dict[str, int] = {}
    for position, (pattern, matched) in enumerate(zip(sparsity, matching_each(sparsity, weights, model), strict=True)):
        if not any(name in pruned or layers[name].why_dense == FROZEN for name in matched):
            reasons = "; ".join(f"{printable(name)}: {layers[name].why_dense}" for name in sorted(matched)[:3])
            raise ValueError(f"sparsity: {pattern!r} matches only layers that stay dense ({reasons})")
        position_of.update(dict.fromkeys(matched, position))
    parts = [[name for name in pruned if position_of.get(name) == position] for position in range(len(sparsity))]
    return [(fraction, names) for fraction, names in zip(sparsity.values(), parts, strict=True) if names]
