"""Compensation: the weights that stay are changed, so that the layer's error from pruning the others is smallest.

Every criterion and every context can use it, since it takes place after the masks are chosen. Criteria that sweep
through the columns of a layer, as sparsegpt does, choose masks and change weights at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..axes.context import notices_of_limits
from ..axes.curvature import curvature_of
from ..axes.quantity import UnsuitableLayerError
from ..axes.ranking.scored_layer import ScoredLayer
from ..axes.sweep import ColumnMasks, swept, width_of
from ..model.parallel import is_sharded
from ..model.running import Split
from ..support.capability import capability
from ..support.listing import in_short
from ..support.printable import printable
from ..support.registry import name_of
from ..support.table import percent
from .collection import CollectedQuantities
from .layer import Layers
from .layer_selection import Asked
from .mask_building import NewMasks
from .options import Options, reads_passes
from .passes import Passes

Calibration = tuple[Iterable, Callable | None]


def makes_passes(options: Options) -> bool:
    """Whether building masks, or changing weights, needs passes over the batches of `calibrate`."""
    return options.compensate or reads_passes(options.criteria)


def passes_need_loss(options: Options) -> bool:
    """Whether these passes need a loss."""
    return makes_passes(options) and curvature_of(options.criteria).needs_loss


def check_calibrated(options: Options, calibration: Calibration | None) -> Calibration:
    """The batches of `calibrate`.

    Raises:
        ValueError: It was not called.
    """
    if calibration is None:
        loss = ", loss_func" if curvature_of(options.criteria).needs_loss else ""
        why = f"criterion {name_of(options.criteria)}" if reads_passes(options.criteria) else "compensate=True"
        raise ValueError(
            f"{why} needs batches each time that weights are pruned; call calibrate(batches{loss}) before, also on a "
            "Sparsifier that was copied or loaded"
        )
    return calibration


def check_kept(options: Options, batches: Any) -> None:
    """Refuse batches that can be iterated over once, where they are needed again.

    Raises:
        ValueError: They are an iterator.
    """
    inner = batches.batches if isinstance(batches, Split) else batches
    if makes_passes(options) and isinstance(inner, Iterator):
        raise ValueError(
            "calibrate: the batches are run again whenever weights are pruned, and an iterator has them once; give a "
            "list or a data loader"
        )


def check_compensated(options: Options, layers: Layers) -> None:
    """Refuse layers in which nothing can be compensated, or whose curvature cannot be computed.

    Raises:
        ValueError: There are such layers.
    """
    for name, layer in layers.items():
        if is_sharded(layer.parameter):
            raise ValueError(
                f"compensate: {printable(name)} is sharded by fully_shard, and the curvature of a layer needs its "
                "whole weight in one process; prune before fully_shard, or pass compensate=False"
            )
        if layer.parameter.is_complex():
            raise ValueError(
                f"compensate: {printable(name)} is complex, and curvatures are computed of real weights alone; leave "
                "it out with exclude=, or pass compensate=False"
            )
    what = name_of(options.granularity)
    if capability(options.granularity, "joint", False) or (
        options.compensate and layers and all(layer.grouping.drops_outputs for layer in layers.values())
    ):
        raise ValueError(
            f"compensate: with granularity {what} whole outputs are pruned, of which no weight stays that could make "
            "up for the others; choose smaller groups, such as 'weight', or pass compensate=False"
        )


def inverse_curvatures(
    options: Options, collected: CollectedQuantities, calibration: Calibration | None, process_group: Any
) -> CollectedQuantities:
    """The same quantities, with what `inverse_curvature` is computed from, if the criterion names it."""
    if not reads_passes(options.criteria):
        return collected
    given, source = check_calibrated(options, calibration), collected.source

    def curvatures() -> Iterator:
        kind = curvature_of(options.criteria)
        passes = Passes(source.model, source.layers, given, kind, process_group, may_skip=collected.may_skip)
        return passes.curvatures()

    return collected.on(replace(source, curvatures=curvatures))


def compensated(
    new: NewMasks,
    layers: Layers,
    followers: Mapping[str, Tensor],
    calibration: Calibration,
    options: Options,
    model: nn.Module,
    process_group: Any = None,
    may_skip: bool = False,
) -> NewMasks:
    """New masks with the weights that make up for what they prune.

    Layers that lose nothing stay as they are. So do those whose curvature is not seen, with a notice.

    Args:
        new: The new masks.
        layers: The selected layers as they are.
        followers: Parameter name -> mask, of biases and norm layers that are masked with whole outputs.
        calibration: The batches, and the loss or None.
        options: The options of the Sparsifier.
        model: The model.
        process_group: The processes that hold replicas, or None. All get the weights of the first.
        may_skip: Whether a layer may have no gradient.
    """
    losing = {name: layer.weight for name, layer in layers.items() if _loses(layer.parameter, new.masks[name])}
    if not losing:
        return new
    kind = curvature_of(options.criteria)
    # The inputs are those of the pruned model. The gradients are those of the model as it is.
    masks = {} if kind.needs_loss else {**{name: new.masks[name] for name in layers}, **followers}
    passes = Passes(model, losing, calibration, kind, process_group, masks, may_skip)
    weights = {}
    for name, curvature in passes.curvatures():
        values = _of_first(curvature.fitted(losing[name].parameter, new.masks[name]), process_group)
        weights[name] = values if kind.needs_loss else passes.replaced(name, values)
    parameters = {name: weight.parameter for name, weight in losing.items()}
    notices = [*new.notices, *_notices_of_uncompensated(parameters, weights, layers)]
    return replace(new, notices=notices, weights=[(parameters[name], values) for name, values in weights.items()])


def swept_masks(
    layers: Layers,
    asked: Asked,
    calibration: Calibration,
    options: Options,
    collected: CollectedQuantities,
    process_group: Any = None,
) -> NewMasks:
    """The masks that a sweep through the columns of each layer chooses, and the weights that it leaves.

    Args:
        layers: The selected layers as they are.
        asked: Each sparsity that is asked for, with the names of the layers.
        calibration: The batches, and the loss or None.
        options: The options of the Sparsifier.
        collected: The criterion and its quantities.
        process_group: The processes that hold replicas, or None. All get the masks and weights of the first.

    Raises:
        UnsuitableLayerError: The inputs of a layer are not seen.
        ValueError: A score is NaN.
    """
    source, criterion = collected.source, options.criteria
    width = width_of(criterion)
    masks = {name: layer.mask for name, layer in layers.items()}
    levels = {name: layer.level for name, layer in layers.items()}
    shares = {name: sparsity for sparsity, names in asked for name in names}
    swept_layers = {name: layers[name].weight for name, share in shares.items() if share or levels[name]}
    levels.update(shares)
    kind = curvature_of(criterion)
    passes = Passes(source.model, swept_layers, calibration, kind, process_group, masks)
    weights = {}
    for name, curvature in passes.curvatures():
        layer, share = layers[name], shares[name]
        alive = curvature.form.rows(layer.mask.expand_as(layer.parameter))
        alive = torch.ones_like(alive) if share < layer.level else alive
        choice = ColumnMasks(options.context, share, alive, curvature.form.inputs, options.may_empty)
        values, kept = swept(layer.parameter, curvature, criterion, choice, width)
        masks[name] = layer.mask_of(_of_first(kept, process_group).reshape(-1))
        weights[name] = passes.replaced(name, _of_first(values * masks[name], process_group))
        if not weights[name].isfinite().all():
            raise ValueError(
                f"sparsify: the new weights of {printable(name)} leave the range of {values.dtype}; give the criterion "
                "a larger damping=, by functools.partial, or leave the layer out with exclude="
            )
    if unseen := [name for name in swept_layers if name not in weights]:
        raise UnsuitableLayerError(
            f"criterion {name_of(criterion)}: no batch shows what {in_short(unseen)} is multiplied with, as in "
            f"{layers[unseen[0]].weight.kind} or in a module that is not called; leave it out with exclude="
        )
    changed = [(layers[name].parameter, values) for name, values in weights.items()] if options.compensate else []
    notices = [each for share, names in asked for each in _notices_of_limits(layers, masks, share, names, options)]
    return NewMasks(masks, levels, source.rng.get_state(), notices, weights=changed)


def _notices_of_limits(
    layers: Layers, masks: Mapping[str, Tensor], sparsity: float, names: Sequence[str], options: Options
) -> list[str]:
    """Notice that masks miss the sparsity of some layers, as when their shapes have no whole blocks."""
    scored, all_kept = [], []
    for name in names if sparsity else ():
        kept = layers[name].grouping.gather(masks[name]).cpu().numpy()
        grid = layers[name].grouping.named_grid
        scored.append(ScoredLayer(layers[name].weight, np.zeros(len(kept)).__getitem__, np.ones_like(kept), grid=grid))
        all_kept.append(kept)
    return notices_of_limits(options.context, scored, sparsity, name_of(options.granularity), all_kept)


def _loses(parameter: Tensor, mask: Tensor) -> bool:
    """Whether a mask prunes a weight that is not zero."""
    return bool(((parameter.detach() != 0) & ~mask).any())


def _of_first(values: Tensor, process_group: Any) -> Tensor:
    """The values of the first process of a group, in all of them."""
    if process_group is None:
        return values
    sent = (values.to(torch.uint8) if values.dtype == torch.bool else values).contiguous()
    torch.distributed.broadcast(sent, torch.distributed.get_global_rank(process_group, 0), process_group)
    return sent.to(values.dtype)


def _notices_of_uncompensated(losing: Mapping[str, Tensor], done: Mapping[str, Any], layers: Layers) -> list[str]:
    """Notice that layers are pruned without compensation, because what they are multiplied with is not seen."""
    left = [name for name in losing if name not in done]
    if not left:
        return []
    share = sum(losing[name].numel() for name in left) / sum(layer.parameter.numel() for layer in layers.values())
    return [
        f"compensate: the weights that stay in {in_short(left)} are not changed ({percent(share)} of the weights of "
        "the selected layers), because no batch shows what they are multiplied with, as in an attention that reads its "
        "weights itself, an embedding, or a module that is not called"
    ]
