"""Plan a fit: what it would do to a model, layer by layer and epoch by epoch, before anything is trained.

`plan_of` builds the masks that `Sparsifier.sparsify` would build at the target sparsity; `plan_table.py` shows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..axes.changed_schedule import raised
from ..axes.criterion import large_final
from ..axes.schedule import Schedule, one_shot, progress, schedules
from ..model.flops import Flops, all_flops
from ..model.linear import why_not_two_four
from ..model.running import first_example
from ..model.zeros import Count
from ..sparsifier.collection import CollectedQuantities
from ..sparsifier.coupled import Coupling
from ..sparsifier.findings import check_found
from ..sparsifier.followers import masks_of_followers
from ..sparsifier.layer import Layer, Layers, level_of, selected
from ..sparsifier.layer_selection import Asked, scopes
from ..sparsifier.mask_building import Ranking, build_masks, compares_with_itself
from ..sparsifier.options import Options, Sparsity, check_sparsity, reads_passes
from ..sparsifier.report import Report
from ..sparsifier.sparsifier import Sparsifier
from ..support.capability import capability
from ..support.checks import check_count
from ..support.listing import in_short
from ..support.registry import name_of
from ..support.table import percent
from ..support.warning import warn
from .plan_table import Plan, PlannedLayer, Size, note_of_levels

# Points of the timeline, besides the ends of epochs.
POINTS = 1000

# A plan has a level for each epoch, and batches must be countable in floating-point numbers.
MOST_EPOCHS = 100_000
MOST_BATCHES = 10**9

# With a smaller fraction of its weights remaining, a layer is near collapse.
SHARE = 0.01

NEAR_COLLAPSE = f"Near collapse: less than {SHARE:.0%} of the weights remain, or fewer than it has outputs or inputs."


def plan_of(
    sparsifier: Sparsifier,
    sparsity: Sparsity,
    schedule: str | Schedule | None,
    n_epoch: int = 1,
    n_iter: int = 1,
    every: int | None = None,
    example_input: Any = None,
    initial_sparsity: float = 0.0,
) -> Plan:
    """Plan a fit of the model of a Sparsifier, from its present weights. Nothing is changed.

    A criterion that cannot be scored yet is replaced by large_final, and the notes say so if that matters.

    Args:
        sparsifier: A Sparsifier of the model, with the options of the fit.
        sparsity: The target sparsity. The layers of the plan are those at this sparsity.
        schedule: The schedule; None if the model is pruned at once, without training.
        n_epoch: Epochs of the fit, at most 100,000. Default 1.
        n_iter: Batches in an epoch, at most 10^9. Default 1.
        every: Batches from one mask update to the next. Default 1.
        example_input: A batch in the form that Sparsifier takes. FLOPs are those of its first example. Default: FLOPs
            are not counted.
        initial_sparsity: The sparsity of all layers at which the schedule begins. Default 0.

    Returns:
        A `Plan`.

    Raises:
        TypeError: `sparsifier` is no Sparsifier, or an argument has the wrong type.
        ValueError: As `Sparsifier.sparsify`; or the model does not run on the example.
    """
    if not isinstance(sparsifier, Sparsifier):
        raise TypeError(f"plan_of: sparsifier must be a Sparsifier, not {type(sparsifier).__name__}")
    sparsity, at_once = check_sparsity(sparsity), schedule is None
    schedule = schedules.resolve(one_shot if schedule is None else schedule)
    n_epoch, n_iter = check_count("n_epoch", n_epoch, MOST_EPOCHS), check_count("n_iter", n_iter, MOST_BATCHES)
    every = 1 if every is None else check_count("every", every)
    measured = sparsifier.report()  # raises if the model is released
    model, ranking, collected = sparsifier.model, sparsifier.ranking, sparsifier.collected
    if example_input is not None:
        example = first_example(example_input)
        collected = collected.on(replace(collected.source, example_input=example))
    pruned = selected(sparsifier.layers)
    asked = scopes(sparsity, sparsifier.layers, model)
    unscored = _why_unscored(pruned, ranking, collected)
    fixed = _is_fixed(pruned, ranking.options.context, asked)
    if unscored:
        ranking = replace(ranking, options=ranking.options.with_criteria(large_final))
        collected = CollectedQuantities(large_final, collected.source)
    new = build_masks(pruned, asked, ranking, collected)
    check_found(new.found)
    planned = {
        name: layer.with_mask(new.masks[name], new.levels[name]) if name in pruned else layer
        for name, layer in sparsifier.layers.items()
    }
    level = level_of(selected(planned).values())
    if initial_sparsity:
        schedule = raised(schedule, min(initial_sparsity / level, 1.0))
    weights = {name: layer.weight for name, layer in planned.items()}
    flops = Flops({}, 0) if example_input is None else all_flops(model, weights, collected.source.example_input)
    if ranking.coupling is not None:  # its notes say how many heads are pruned
        measured = Report.measure(model, planned, ranking.options.context, coupling=ranking.coupling, by_masks=True)
    layers = _planned_layers(model, planned, measured, flops.of_weights, ranking.coupling)
    sizes = [layer.size for layer in layers]
    total = Size.total([layer.size for layer in layers if not layer.why_dense])
    timeline = ((0.0, level),) if at_once else timeline_of(schedule, n_epoch, n_iter, every, level)
    when = "at once, without training" if at_once else f"in {n_epoch} x {n_iter} batches; nothing is trained yet"
    notes = [
        _title(sparsifier.ranking.options, level, None if at_once else schedule, when),
        note_of_levels(timeline),
        _note_of_scores(sparsifier.ranking.options, unscored, fixed, at_once),
        _note_of_zeros(pruned),
        _note_of_followers(masks_of_followers(sparsifier.all_masks.followers, planned)),
        _note_of_flops(layers, flops) if flops.of_weights else "",
        NEAR_COLLAPSE if any(layer.near_collapse for layer in layers) else "",
        "Bytes left: 1 bit per weight and the element size per remaining weight, or as dense.",
    ]
    plan = Plan(layers, total, _whole(model, sizes), timeline, tuple(filter(None, notes)))
    for notice in (*new.notices, *_notices(plan, schedule, level)):
        warn(notice)
    return plan


def every_of(every: int | None, options: Options, batches: int) -> int:
    """Batches from one mask update to the next.

    Default: 1; with regrow= a hundredth of the fit; and where an update runs the calibration data once for each layer,
    a tenth.

    Args:
        every: What the user asked for, or None.
        options: The options of the Sparsifier.
        batches: Batches of the fit.
    """
    if every is not None:
        return every
    if options.compensate or reads_passes(options.criteria):
        return math.ceil(batches / 10)
    return math.ceil(batches / 100) if options.regrow is not None else 1


def timeline_of(
    schedule: Schedule, n_epoch: int, n_iter: int, every: int, target: float
) -> tuple[tuple[float, float], ...]:
    """The levels of a fit: target x schedule(i / T) after i of T batches, with i rounded down to the last mask update.

    Returns:
        (epochs that are done, level) before the first batch, after every epoch, and at about 1,000 points in all.
    """
    total = n_epoch * n_iter
    points = {*range(0, total + 1, math.ceil(total / POINTS)), *range(0, total + 1, n_iter)}
    updates = {batch: last_update(batch, every, total) for batch in sorted(points)}
    return tuple((batch / n_iter, target * progress(schedule, at / total)) for batch, at in updates.items())


def last_update(batches: int, every: int, total: int) -> int:
    """After how many of the first batches the last mask update was. The last batch of a fit always has one.

    Args:
        batches: Batches that are done.
        every: Batches from one mask update to the next.
        total: Batches of the fit.
    """
    return batches if batches == total else batches // every * every


def _planned_layers(
    model: nn.Module, layers: Layers, measured: Report, flops: Mapping[str, int], coupling: Coupling | None
) -> tuple[PlannedLayer, ...]:
    """The layers of the plan, in the order of the report."""
    elements = {name: parameter.element_size() for name, parameter in model.named_parameters()}
    planned = []
    for row in measured.rows:
        layer = layers.get(row.name)
        is_tied = layer is None and row.name not in elements  # to a weight of another row, where it is counted
        weights = 0 if is_tied else math.prod(row.shape)
        pruned = layer is not None and layer.is_selected
        left = weights - layer.count().zeros if layer is not None and pruned else weights
        is_meant = coupling is not None and left == 0 and coupling.is_pruned_whole(row.name)
        collapses = layer is not None and pruned and not is_meant and _is_near_collapse(layer, left)
        element = elements.get(row.name, 0) if layer is None else layer.parameter.element_size()
        size = Size.of(weights, left, element, flops.get(row.name))
        refused = "tied" if is_tied else why_not_two_four(model, None if layer is None else layer.weight)
        planned.append(PlannedLayer(row.name, row.kind, row.shape, size, row.why_dense, row.note, refused, collapses))
    return tuple(planned)


def _is_near_collapse(layer: Layer, left: int) -> bool:
    weight, grouping = layer.weight, layer.grouping
    if left < SHARE * weight.parameter.numel():
        return True
    inputs = weight.axes.get("in", 0) * weight.convolution_groups
    # Where whole outputs or inputs are pruned, some of them are meant to have no weight.
    return not (grouping.drops_outputs or grouping.drops_inputs) and left < max(weight.out, inputs)


def _whole(model: nn.Module, sizes: Sequence[Size]) -> Size:
    """The size of the whole model. Parameters that are no weight of a layer, such as biases, stay dense."""
    layers, parameters = Size.total(sizes), list(model.parameters())
    weights = sum(parameter.numel() for parameter in parameters)
    dense = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    left, saved = weights - layers.weights + layers.left, layers.bytes - layers.bytes_left
    return Size(weights, left, dense, dense - saved, layers.flops, layers.flops_left)


def _why_unscored(layers: Layers, ranking: Ranking, collected: CollectedQuantities) -> str:
    """Why the criterion cannot score the present weights; empty if it can."""
    if (quantity := collected.missing()) is not None:
        return f"looks at data ({quantity})"
    if of_passes := collected.at("passes"):
        return f"looks at data ({of_passes[0]})"
    if "flow" in collected.named and collected.source.example_input is None:
        return "needs an example_input="
    if "weight" in collected.named and compares_with_itself(layers, ranking, collected):
        return "compares with an earlier value, and nothing has changed since"
    return ""


def _is_fixed(layers: Layers, context: Any, asked: Asked) -> bool:
    """Whether the shapes alone say how many weights of each layer are pruned."""
    fixes = capability(context, "fixes_counts", False)
    if fixes == "together":
        fixes = all(len(names) == 1 for _, names in asked)
    return bool(fixes) and all(isinstance(layer.grouping.size, int) for layer in layers.values())


def _title(options: Options, level: float, schedule: Schedule | None, when: str) -> str:
    values = (options.granularity, options.context, options.criteria, *filter(None, [schedule]))
    return f"Plan for {percent(level)} zeros ({', '.join(map(name_of, values))}) {when}."


def _note_of_scores(options: Options, unscored: str, fixed: bool, at_once: bool) -> str:
    criterion = name_of(options.criteria)
    if unscored and fixed:
        return f"{criterion} {unscored}: how many weights of each layer are pruned is known, which ones is not."
    if unscored:
        return (
            f"Estimate: {criterion} {unscored}; the split between layers is that of large_final on the present weights."
        )
    return "" if fixed or at_once else "The split between layers is that of the present weights; training changes it."


def _note_of_zeros(layers: Layers) -> str:
    present = Count.of(*(layer.parameter for layer in layers.values())).sparsity
    return f"{percent(present)} of the weights are zero already; a fit keeps them zero." if present > SHARE else ""


def _note_of_followers(masks: Mapping[str, Tensor]) -> str:
    masked = sum(int((~mask).sum()) for mask in masks.values())
    if not masked:
        return ""
    return f"Not counted: {masked:,} entries of biases and norm layers that are masked together with whole outputs."


def _note_of_flops(layers: Sequence[PlannedLayer], flops: Flops) -> str:
    unknown = [layer.name for layer in layers if layer.size.flops is None]
    note = "FLOPs: 2 x multiply-adds with weights, per example; left is x density, which only sparse kernels keep"
    if flops.others:
        share = percent(Count(sum(flops.of_weights.values()) + flops.others, flops.others).sparsity)
        note += (
            "; products that read none of these weights, such as those of attention, are another "
            f"{flops.others:,}, {share} of all"
        )
    return f"{note}; not known of {in_short(unknown, 5, 'more')}." if unknown else f"{note}."


def _notices(plan: Plan, schedule: Schedule, level: float) -> list[str]:
    """The warnings: layers near collapse, a schedule that ends below the target sparsity."""
    notices = []
    if plan.collapsing:
        notices.append(
            f"near collapse at a sparsity of {percent(level)}: {in_short(plan.collapsing, 5, 'more')}; lower the "
            "sparsity, choose context='erk', limit these layers with bounded(...), or exclude them with exclude="
        )
    if (end := progress(schedule, 1.0)) < 1:
        notices.append(
            f"schedule {name_of(schedule)} ends at a sparsity of {percent(end * level)}; the layers of the plan are "
            f"those at {percent(level)}"
        )
    return notices
