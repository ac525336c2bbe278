"""Plan: what a fit would do to a model, layer by layer and epoch by epoch, before anything is trained.

`plan_of` ranks the present weights as `Sparsifier.sparsify` would at the target, on a copy of all that this changes;
`planned.py` is what comes out.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..axes.context import contexts
from ..axes.criterion import large_final
from ..axes.grouping import Grouping, poolings, squared_sum
from ..axes.n_of_m import Blocks
from ..axes.ranking.scored_layer import all_equal
from ..axes.schedule import Schedule, progress, raised, schedules
from ..model.flops import count_flops
from ..model.layers import NamedWeight, find_weights
from ..model.linear import why_not_two_four
from ..model.patterns import as_patterns, matching
from ..model.zeros import Count
from ..sparsifier.arguments import Sparsity, check_sparsity
from ..sparsifier.collection import CollectedQuantities
from ..sparsifier.report import Report
from ..sparsifier.sparsifier import Sparsifier, first_example
from ..sparsifier.taking_part import scopes
from ..support.checks import check_count
from ..support.registry import name_of
from ..support.table import percent
from .plan_table import Plan, PlannedLayer, Size

# Points of the timeline, but for the ends of epochs.
POINTS = 1000


# With a smaller share of its weights left, a layer is near collapse.
SHARE = 0.01


NEAR_COLLAPSE = f"Near collapse: less than {SHARE:.0%} of the weights left, or fewer than outputs or inputs."


# Contexts that fix how many weights of each layer fall, whatever their scores are.
_BY_SHAPE = tuple(contexts[name] for name in ("local", "per_output", "erk", "er", "uniform_plus"))


def plan_of(
    sparsifier: Sparsifier,
    sparsity: Sparsity,
    schedule: str | Schedule,
    n_epoch: int,
    n_iter: int,
    every: int | None = None,
    example_input: Any = None,
    initial_sparsity: float = 0.0,
) -> Plan:
    """What a fit from the present weights would do to the model of a Sparsifier; nothing is changed.

    n_epoch, n_iter: of the fit, and batches in each of them. every: batches from one mask update to the next, 1 by
    default. example_input: a batch, of whose first example FLOPs are counted; as of Sparsifier. initial_sparsity: with
        which the schedule begins, in all layers.
    The layers are those at the sparsity. A criterion that cannot be scored yet is estimated by large_final where that
    matters; the notes say so. Warns of layers near collapse, and of a schedule that ends elsewhere.
    TypeError and ValueError as `sparsify` would, and if the model does not run on the example.
    """
    if not isinstance(sparsifier, Sparsifier):
        raise TypeError(f"plan_of: sparsifier is a Sparsifier, not {type(sparsifier).__name__}")
    sparsifier._check_held("plan_of")
    sparsity, schedule = check_sparsity(sparsity), schedules.resolve(schedule)
    n_epoch, n_iter = check_count("n_epoch", n_epoch), check_count("n_iter", n_iter)
    every = 1 if every is None else check_count("every", every)
    # What is found out below is put on a copy. What it shares with the original is only read.
    probe = copy.copy(sparsifier)
    probe.rng, probe._nan = torch.Generator(), {}
    probe.rng.set_state(sparsifier.rng.get_state())
    if example_input is not None:
        probe.example_input = tree_map(first_example, example_input)
    unscored = _why_unscored(probe)
    fixed = _is_fixed(probe, sparsity)
    if unscored:
        _estimate(probe)
    masks, probe.levels = probe._build_masks(sparsity)
    probe._set_masks(masks)
    probe._check_nan()
    if initial_sparsity:
        schedule = raised(schedule, min(initial_sparsity / probe.level, 1.0))
    flops = {} if example_input is None else count_flops(probe.model, probe.candidates, probe.example_input)
    layers = _layers(probe, flops)
    sizes = [layer.size for layer in layers]
    selected = Size.total([layer.size for layer in layers if not layer.why_dense])
    timeline = timeline_of(schedule, n_epoch, n_iter, every, probe.level)
    notes = [
        _title(sparsifier, probe, schedule, n_epoch, n_iter),
        _notes_of_levels(timeline),
        _note_of_scores(sparsifier, unscored, fixed),
        _note_of_zeros(probe),
        _note_of_followers(probe),
        _note_of_flops(layers) if flops else "",
        NEAR_COLLAPSE if any(layer.near_collapse for layer in layers) else "",
        "Bytes left: 1 bit per weight and the element size per weight that is left, or as dense.",
    ]
    plan = Plan(layers, selected, _whole(probe.model, sizes), timeline, tuple(filter(None, notes)))
    _warn(plan, schedule, probe.level)
    return plan


def sparsifier_for(
    model: nn.Module, sparsity: Sparsity, exclude: Any = None, example_input: Any = None, **options: Any
) -> Sparsifier:
    """A Sparsifier of which only the layers take part that a dictionary of sparsities names. options: of Sparsifier."""
    excluded = [] if exclude is None else as_patterns(exclude)
    if isinstance(sparsity, Mapping):
        targets = find_weights(model)
        wanted = set().union(*(matching(pattern, targets, model) for pattern in sparsity))
        excluded += [name for name in targets if name not in wanted]
    return Sparsifier(model, exclude=excluded or None, example_input=example_input, **options)


def every_of(every: int | None, regrows: bool, batches: int) -> int:
    """Batches from one mask update to the next in a fit of so many: by default 1, with regrow= a hundredth of them."""
    return every or (math.ceil(batches / 100) if regrows else 1)


def timeline_of(
    schedule: Schedule, n_epoch: int, n_iter: int, every: int, target: float
) -> tuple[tuple[float, float], ...]:
    """(epochs that are over, level): target x schedule(i / T) after i of T batches, i rounded down to the last update.

    Before the first batch, after every epoch, and at about 1,000 points in all.
    """
    total = n_epoch * n_iter
    points = {*range(0, total + 1, math.ceil(total / POINTS)), *range(0, total + 1, n_iter)}
    # The last batch of a fit has an update in any case.
    updates = {batch: batch if batch == total else batch // every * every for batch in sorted(points)}
    return tuple((batch / n_iter, target * progress(schedule, at / total)) for batch, at in updates.items())


def _layers(probe: Sparsifier, flops: Mapping[str, int]) -> tuple[PlannedLayer, ...]:
    """What the masks of `probe` leave of every layer."""
    measured = Report.measure(probe.model, probe.candidates, probe.dense, probe._notes())
    elements = {name: parameter.element_size() for name, parameter in probe.model.named_parameters()}
    layers = []
    for row in measured.rows:
        target, weights = probe.candidates.get(row.name), row.count.weights
        mask = probe.masks.get(row.name)
        left = weights if mask is None else weights - probe._count({row.name: mask}).zeros
        collapses = mask is not None and _is_near_collapse(probe.targets[row.name], probe.groupings[row.name], left)
        element = elements[row.name] if target is None else target.parameter.element_size()
        size = Size.of(weights, left, element, flops.get(row.name))
        refused = why_not_two_four(probe.model, target)
        layers.append(PlannedLayer(row.name, row.kind, row.shape, size, row.why_dense, row.note, refused, collapses))
    return tuple(layers)


def _is_near_collapse(target: NamedWeight, grouping: Grouping, left: int) -> bool:
    if left < SHARE * target.parameter.numel():
        return True
    inputs = target.axes.get("in", 0) * target.convolution_groups
    # Where whole outputs or inputs are to go, those that are without a weight say nothing.
    return not (grouping.drops_outputs or grouping.drops_inputs) and left < max(target.out, inputs)


def _whole(model: nn.Module, sizes: Sequence[Size]) -> Size:
    """All parameters: biases and norm layers, too, as they are."""
    layers, parameters = Size.total(sizes), list(model.parameters())
    weights = sum(parameter.numel() for parameter in parameters)
    dense = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    left, saved = weights - layers.weights + layers.left, layers.bytes - layers.bytes_left
    return Size(weights, left, dense, dense - saved, layers.flops, layers.flops_left)


def _why_unscored(probe: Sparsifier) -> str:
    """Why the criterion has no scores of the present weights, empty if it has."""
    collected = probe.collected
    if (quantity := collected.missing(probe.targets)) is not None:
        return f"looks at data ({quantity})"
    if "flow" in collected.named and probe.example_input is None:
        return "needs an example_input="
    if "weight" in collected.named and compares_with_itself(probe):
        return "compares with an earlier value, and nothing has changed since"
    return ""


def compares_with_itself(sparsifier: Sparsifier) -> bool:
    """Whether the criterion compares with an earlier value, and nothing has changed since: all scores are equal."""
    collected = sparsifier.collected
    if not {"init", "previous"}.intersection(collected.named):
        return False
    return all_equal(
        [sparsifier._score(name, mask, collected, False, False) for name, mask in sparsifier.masks.items()]
    )


def _is_fixed(probe: Sparsifier, sparsity: Sparsity) -> bool:
    """Whether shapes alone say how many weights of each layer fall."""
    context: Any = probe.context
    while hasattr(context, "limits"):  # a bounded one
        context = context.context
    ranked = scopes(sparsity, probe.targets, probe.dense, probe.candidates, probe.model)
    alone = context is contexts["global"] and all(len(names) == 1 for _, names in ranked)
    equal = all(isinstance(grouping.size, int) for grouping in probe.groupings.values())
    return equal and (alone or isinstance(context, Blocks) or context in _BY_SHAPE)


def _estimate(probe: Sparsifier) -> None:
    """Have the weights ranked by large_final."""
    probe.criteria, probe.collected = large_final, CollectedQuantities(("weight",), large_final)
    if probe.pool is squared_sum:  # which belongs to a criterion of its own
        probe.pool = poolings["mean"]


def _title(sparsifier: Sparsifier, probe: Sparsifier, schedule: Schedule, n_epoch: int, n_iter: int) -> str:
    axes = ", ".join(map(name_of, (sparsifier.granularity, sparsifier.context, sparsifier.criteria, schedule)))
    return f"Plan for {percent(probe.level)} zeros ({axes}) in {n_epoch} x {n_iter} batches; nothing is trained yet."


def _notes_of_levels(timeline: Sequence[tuple[float, float]]) -> str:
    """The level at the beginning and after up to ten epochs."""
    after = [(epoch, level) for epoch, level in timeline if epoch == int(epoch)]
    step = math.ceil((len(after) - 1) / 10) or 1
    shown = [*after[:-1:step], after[-1]]
    return f"Level after epoch {', '.join(f'{epoch:g}: {percent(level)}' for epoch, level in shown)}."


def _note_of_scores(sparsifier: Sparsifier, unscored: str, fixed: bool) -> str:
    criterion = name_of(sparsifier.criteria)
    if unscored and fixed:
        return f"{criterion} {unscored}: how many weights of each layer fall is known, which is not."
    if unscored:
        return (
            f"Estimate: {criterion} {unscored}; the split between layers is that of large_final on the present weights."
        )
    return "" if fixed else "The split between layers is that of the present weights; training changes it."


def _note_of_zeros(probe: Sparsifier) -> str:
    present = Count.of(*(target.parameter for target in probe.targets.values())).sparsity
    return f"{percent(present)} of the weights are zero already, and a fit keeps them so." if present > SHARE else ""


def _note_of_followers(probe: Sparsifier) -> str:
    masked = sum(int((~mask).sum()) for mask in probe.follower_masks.values())
    if not masked:
        return ""
    return f"Not counted: {masked:,} entries of biases and norm layers behind zeroed outputs, which go with them."


def _note_of_flops(layers: Sequence[PlannedLayer]) -> str:
    unknown = [layer.name for layer in layers if layer.size.flops is None]
    note = "FLOPs: 2 x multiply-adds with weights, per example; left is x density, which only sparse kernels keep"
    return f"{note}; not known of {_some(unknown)}." if unknown else f"{note}."


def _warn(plan: Plan, schedule: Schedule, level: float) -> None:
    if plan.collapsing:
        warnings.warn(
            f"near collapse at a sparsity of {percent(level)}: {_some(plan.collapsing)}; lower the sparsity, choose "
            "context='erk', limit them with bounded(...), or leave them out with exclude=",
            stacklevel=4,
        )
    if (end := progress(schedule, 1.0)) < 1:
        warnings.warn(
            f"schedule {name_of(schedule)} ends at a sparsity of {percent(end * level)}; the layers of the plan are "
            f"those at {percent(level)}",
            stacklevel=4,
        )


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
