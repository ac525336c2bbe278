"""Which layers are pruned and which stay dense, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..axes.grouping import Grouping
from ..model.flow import Flow
from ..model.layers import NamedWeight
from ..model.patterns import Pattern, as_patterns, matching


def reasons_to_stay_dense(
    model: nn.Module,
    candidates: Mapping[str, NamedWeight],
    groupings: Mapping[str, Grouping | str],
    flow: Callable[[], Flow],
    layers: Any = None,
    exclude: Any = None,
) -> dict[str, str]:
    """Which candidates stay dense, and why: parameter name -> reason. ValueError if the flow does not show an end,
    or no layer is left.

    groupings: of every candidate, or why the granularity cannot be had. flow: the data flow, asked for only if needed.
    """
    patterns = [] if layers is None else as_patterns(layers)
    exclusions = [] if exclude is None else as_patterns(exclude)
    selected = set().union(*(matching(pattern, candidates, model) for pattern in patterns))
    excluded = set().union(*(matching(pattern, candidates, model) for pattern in exclusions))
    named = {pattern for pattern in patterns if isinstance(pattern, str)}
    given = {id(pattern) for pattern in patterns if isinstance(pattern, nn.Module)}
    dense, whole_outputs, whole_inputs = {}, set(), set()
    for name, target in candidates.items():
        grouping = groupings[name]
        exact = named & {*target.names, *dict(target.owners)} or given & {id(owner) for _, owner in target.owners}
        if name in excluded:
            dense[name] = "excluded"
        elif layers is not None and name not in selected:
            dense[name] = "not in layers"
        elif layers is None and target.is_frozen:
            dense[name] = "frozen"
        elif layers is None and target.is_embedding:
            dense[name] = "embedding"
        elif isinstance(grouping, str):
            dense[name] = grouping
        elif target.sources:
            raise ValueError(
                f"Sparsifier: {target.attribute} of {target.owners[0][0] or target.kind} is computed from {name} in "
                "each forward, so zeros in it do not last; remove that first (torch.nn.utils.parametrize."
                "remove_parametrizations, remove_weight_norm, ...), or leave the layer out with exclude="
            )
        elif not exact:
            whole_outputs |= {name} if grouping.drops_outputs else set()
            whole_inputs |= {name} if grouping.drops_inputs else set()
    ends = [(whole_outputs, "last", "yields the model's output"), (whole_inputs, "first", "reads the model's input")]
    for names, end, reason in ends:
        at_end = getattr(flow(), end)(candidates) if names else set()
        if names and not at_end:
            raise ValueError(
                f"Sparsifier: the data flow of {type(model).__name__} does not show which layer {reason}, and with "
                "this granularity that one must stay dense; name the layers to sparsify exactly in layers="
            )
        dense.update(dict.fromkeys(names & at_end, reason))
    if len(dense) == len(candidates):
        raise ValueError(f"Sparsifier: no layer of {type(model).__name__} is left to sparsify; {_reasons(dense)}")
    return {name: dense[name] for name in candidates if name in dense}


def _reasons(dense: Mapping[str, str]) -> str:
    """Why all layers stay dense, and what to do."""
    if not dense:
        return "no weights with named axes; name those of its layers: register_layer(kind, weight=('out', 'in'))"
    reasons = [f"{name}: {reason}" for name, reason in dense.items()]
    more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    return f"{'; '.join(reasons[:5])}{more}. Choose another granularity, or name layers in layers="


def scopes(
    sparsity: float | Mapping[Pattern, float],
    targets: Mapping[str, NamedWeight],
    dense: Mapping[str, str],
    candidates: Mapping[str, NamedWeight],
    model: nn.Module,
) -> list[tuple[float, list[str]]]:
    """The layers of each fraction that is asked for; of several patterns that match a layer the last counts."""
    if not isinstance(sparsity, Mapping):
        return [(sparsity, list(targets))]
    of_layer: dict[str, int] = {}
    for position, pattern in enumerate(sparsity):
        matched = matching(pattern, candidates, model)
        if not matched & targets.keys():
            reasons = "; ".join(f"{name}: {dense[name]}" for name in sorted(matched)[:3])
            raise ValueError(f"sparsity: {pattern!r} matches only layers that stay dense ({reasons})")
        of_layer.update(dict.fromkeys(matched, position))
    parts = [[name for name in targets if of_layer.get(name) == position] for position in range(len(sparsity))]
    return [(fraction, names) for fraction, names in zip(sparsity.values(), parts, strict=True) if names]
