"""Building masks: every group of weights is scored, a context ranks the scores, and the lowest are pruned.

`build_masks` is a pure function. It reads layers, weights and collected quantities and returns new masks; nothing
changes until the Sparsifier takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..axes.context import ask, ask_on_device
from ..axes.criterion import is_elementwise
from ..axes.grouping import mean, squared_sum, total
from ..axes.pooling import pool_magnitudes
from ..axes.ranking.device_layer import DeviceLayer
from ..axes.ranking.scored_layer import ScoredLayer, all_equal
from ..model.parallel import agree, is_sharded, process_groups_of_shards
from ..model.tensors import check_values, cloned, computable, widened
from ..support.capability import capability
from ..support.printable import printable
from ..support.registry import name_of
from .collection import CollectedQuantities, notices_of_unreached
from .coupled import Coupling, joint_layers
from .findings import Finding, both, found_nan, found_ties, in_words
from .layer import Layer, Layers
from .layer_selection import Asked
from .options import Options
from .regrowth import Regrowth, sparsity_of_drop

REVIVED_OUTPUTS = (
    "a falling sparsity revives whole outputs from zero, and their bias and norm entries too. Behind a ReLU or a norm "
    "layer no gradient reaches them, so they stay zero; revive single weights instead, or re-initialize them"
)
REVIVED_GROUPS = (
    "a falling sparsity revives a whole {0} from zero. No gradient reaches a {0} whose weights are all zero, so it "
    "stays zero; revive single weights instead, or re-initialize it"
)
ALL_EQUAL = (
    "criterion {} compares with an earlier value, and nothing has changed since then: all scores are equal, so weights "
    "are pruned in index order; train before the first update"
)
NOTHING_REGROWS = (
    "regrow: the gradients since the last update have inf or NaN, as after an overflow in mixed precision, so nothing "
    "regrows in this update"
)


@dataclass(frozen=True)
class Ranking:
    """How scores become masks: the options of a Sparsifier, and what it has found out about the model."""

    options: Options
    coupling: Coupling | None = None
    process_group: Any = None  # of the replicas of the model, or None

    def process_groups(self, model: nn.Module) -> list:
        """The processes that need the same masks: those with replicas of the model, or with shards of it."""
        return process_groups_of_shards(model) if self.process_group is None else [self.process_group]

    def stays_on_device(self, layers: Layers) -> bool:
        """Whether scores can be ranked on the GPU that holds all layers, so that the host need not wait for it."""
        parameters = [layer.parameter for layer in layers.values()]
        devices = {parameter.device for parameter in parameters}
        alone = self.process_group is None and not any(map(is_sharded, parameters))
        groups_alone = self.options.round_to is None and self.coupling is None
        can = capability(self.options.context, "on_device", False)
        return can and alone and groups_alone and len(devices) == 1 and devices.pop().type == "cuda"


@dataclass(frozen=True)
class NewMasks:
    """What `build_masks` returns.

    Attributes:
        masks: Layer name -> mask, for every selected layer.
        levels: Layer name -> the sparsity it was pruned to.
        random: State of the random generator after the scores were drawn.
        notices: What the user should be warned of.
        found: What was found in scores on a GPU -> a tensor that says how often. Reading it waits for the GPU.
        trained: Layer name -> mask of the weights that get gradients, where these are not all weights.
        weights: Pairs of a parameter and the values that it gets, where weights that stay are changed.
    """

    masks: dict[str, Tensor]
    levels: dict[str, float]
    random: Tensor
    notices: list[str] = field(default_factory=list)
    found: dict[Finding, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    weights: Sequence[tuple[nn.Parameter, Tensor]] = ()


@torch.no_grad()
def build_masks(
    layers: Layers,
    asked: Asked,
    ranking: Ranking,
    collected: CollectedQuantities,
    regrowth: Regrowth | None = None,
    drop: float = 0.0,
) -> NewMasks:
    """Masks for a sparsity.

    Args:
        layers: The selected layers, with the masks and levels they have now.
        asked: Each sparsity that is asked for, with the names of the layers that are ranked for it together.
        ranking: The options of the Sparsifier.
        collected: The criterion and its quantities.
        regrowth: The criterion by which weights regrow, and its quantities.
        drop: Fraction of the remaining weights that is pruned first, for as many to regrow.

    Raises:
        ValueError: A weight has no values, the criterion or the context does not return what it should, or a score is
            NaN.
    """
    # Random scores are drawn from a generator of its own, so that a failure changes nothing.
    options, source = ranking.options, collected.source.apart()
    collected = collected.on(source)
    regrowing = None if regrowth is None else regrowth.on(source)
    masks = {name: layer.mask for name, layer in layers.items()}
    levels = {name: layer.level for name, layer in layers.items()}
    notices: list[str] = []
    found: dict[Finding, Tensor] = {}
    if ranking.coupling is not None:
        asked = ranking.coupling.together(asked)
    on_device = ranking.stays_on_device(layers)
    if not on_device:
        check_values("sparsify", {name: layer.parameter for name, layer in layers.items()})
    # Sums are squared when coupled groups have been joined.
    pool = total if ranking.coupling is not None and options.pool is squared_sum else options.pool
    how: Any = {"pool": pool, "may_empty": options.may_empty, "on_device": on_device}
    # The built-in contexts only rank scores; one of the user's own may read them.
    how["magnitudes"] = capability(options.context, "keeps_masked", False)
    if drop and regrowing is not None and regrowing.left_out and regrowing.missing():
        drop = 0.0
        notices.append(NOTHING_REGROWS)
    for sparsity, names in asked:
        # Layers whose sparsity falls may have pruned groups revived.
        rankings: list = [(sparsity, collected, [name for name in names if sparsity < levels[name]])]
        if drop and regrowing is not None:  # first more is pruned, then the regrowing criterion revives as much
            rankings = [(sparsity_of_drop(sparsity, drop), collected, []), (sparsity, regrowing, names)]
        for share, by, revived in rankings:
            scored = [score_layer(layers[name], masks[name], by, revives=name in revived, **how) for name in names]
            if on_device:
                if unpooled := [layer for layer in scored if layer.unpooled is not None]:
                    pool_magnitudes(unpooled, options.pool)
                kept: Any = ask_on_device(options.context, scored, share, name_of(options.granularity), notices)
                found = both(found, found_nan(scored))
            else:
                ranked, split = joint_layers(scored, ranking.coupling, options.round_to, options.pool)
                share = share if ranking.coupling is None else ranking.coupling.share(scored, share)
                notices += _notices_of_scores(ranked, share, collected)
                kept = split(ask(options.context, ranked, share, name_of(options.granularity), notices))
                kept = agree(kept, ranking.process_groups(collected.source.model), layers[names[0]].parameter.device)
            if by is collected and ALL_EQUAL.format(name_of(by.criterion)) not in notices:
                found = both(found, found_ties(layers, scored, kept, by.criterion))
            for layer, of_layer in zip(scored, kept, strict=True):
                if of_layer is not layer.alive:
                    masks[layer.target.name] = layers[layer.target.name].mask_of(torch.as_tensor(of_layer))
        levels.update(dict.fromkeys(names, sparsity))
    notices += notices_of_unreached(collected, {name for sparsity, names in asked if sparsity for name in names})
    if any(levels[name] < layer.level and layer.grouping.drops_outputs for name, layer in layers.items()):
        notices.append(notice_of_revived(ranking))
    if not on_device:
        notices += in_words(found)
        found = {}
    return NewMasks(masks, levels, source.rng.get_state(), notices, found)


def notice_of_revived(ranking: Ranking) -> str:
    """Notice that whole outputs, or groups of several layers, are revived from zero."""
    joint = ranking.coupling is not None and ranking.coupling.joint
    return REVIVED_GROUPS.format(name_of(ranking.options.granularity)) if joint else REVIVED_OUTPUTS


def _notices_of_scores(ranked: Sequence[ScoredLayer], sparsity: float, by: CollectedQuantities) -> list[str]:
    """Notice that a criterion compares with an earlier value, while nothing has changed since then."""
    # Comparing the scores comes last in this condition, so that it is done at a first update only.
    if by.compares and sparsity >= 0.01 and not any(each.masked.any() for each in ranked) and all_equal(ranked):
        return [ALL_EQUAL.format(name_of(by.criterion))]
    return []


def score_layer(
    layer: Layer,
    mask: Tensor,
    by: CollectedQuantities,
    *,
    pool: Callable,
    revives: bool = False,
    may_empty: bool = False,
    on_device: bool = False,
    magnitudes: bool = False,
) -> Any:
    """Score every group of a layer: a ScoredLayer, or a DeviceLayer on a GPU.

    A criterion that works element by element is called for one part of the layer after the other, while they are
    ranked; its scores are never all in memory. Any other criterion is called once, for the whole layer.

    Args:
        layer: The layer.
        mask: Its mask: that of the layer, or one that was just built for the same update.
        by: The criterion and its quantities.
        pool: How the scores of a group become one.
        revives: Whether groups that are pruned may be kept again.
        may_empty: Whether the layer may lose its best group, too.
        on_device: Whether everything stays on the GPU. Then the host reads no score, not even to check for NaN.
        magnitudes: Whether weights may be given in place of their magnitudes, with a mark.

    Raises:
        ValueError: The criterion does not return one real score per weight; at once or in the ranking, a score is NaN.
    """
    criterion, grouping, parameter = by.criterion, layer.grouping, layer.parameter
    options: dict[str, Any] = {"revives": revives, "may_empty": may_empty, "grid": grouping.named_grid}
    is_magnitude = capability(criterion, "numpy") is np.abs and by.named == ("weight",) and pool is not squared_sum
    if on_device and magnitudes and is_magnitude and (grouping.single or pool in (mean, total)):
        # Absolute values are taken on the way through the weights: by the ranking, or when all layers are pooled.
        weights, alive, whole = computable(parameter.detach()), grouping.gather(mask), not grouping.indexed
        given, unpooled = (weights.reshape(-1), None) if grouping.single else (weights, grouping)
        size = grouping.size_on(mask.device)
        return DeviceLayer(layer.weight, given, alive, size, whole, **options, magnitude=True, unpooled=unpooled)
    values = by.values(layer.name)
    # Complex weights can have complex scores, which are found when they are checked as a whole.
    by_element = is_elementwise(criterion) and not parameter.is_complex()
    # Single weights are not pooled. But this pooling belongs to the formula of its criterion, so it is applied.
    finished = torch.square if grouping.single and pool is squared_sum else (lambda scores: scores)
    if by_element:
        if grouping.single:
            values = {quantity: value.reshape(-1) for quantity, value in values.items()}

        def scores_of(part: slice) -> Tensor:
            return finished(criterion(**{quantity: widened(value[part]) for quantity, value in values.items()}))

    else:
        # A criterion gets copies, so that it cannot change a weight.
        scores = checked_scores(criterion(**{each: _own(value) for each, value in values.items()}), by, layer)
        all_scores = finished(scores.flatten() if grouping.single else scores)

        def scores_of(part: slice) -> Tensor:
            return all_scores[part]

    if on_device:
        alive, whole = grouping.gather(mask), not grouping.indexed
        all_of = scores_of(slice(None)) if grouping.single else grouping.pool(scores_of, pool, at_once=True)
        return DeviceLayer(layer.weight, all_of.to(mask.device), alive, grouping.size_on(mask.device), whole, **options)
    alive = grouping.gather(mask).cpu().numpy().view()
    alive.flags.writeable = False  # it can be the mask itself
    if by_element and grouping.single and mask.device.type == "cpu":
        formula = capability(criterion, "numpy") if by.named == ("weight",) and pool is not squared_sum else None
        if formula is not None and _is_plain(parameter):
            scores_of_weights = partial(_scores_of_part, formula, parameter.detach().numpy().reshape(-1))
            return ScoredLayer(layer.weight, scores_of_weights, alive, **options)
        return ScoredLayer(layer.weight, lambda part: scores_of(part).numpy(), alive, **options)
    score = (scores_of(slice(None)) if grouping.single else grouping.pool(scores_of, pool)).cpu().numpy()
    size = grouping.size if isinstance(grouping.size, int) else grouping.size.numpy()
    scored = ScoredLayer(layer.weight, score.__getitem__, alive, size, not grouping.indexed, **options)
    scored.check(score, alive)
    return scored


def checked_scores(scores: Any, by: CollectedQuantities, layer: Layer) -> Tensor:
    """The scores of a layer, at least in float32.

    Raises:
        ValueError: They are not one real score per weight.
    """
    shape = layer.parameter.shape
    if not isinstance(scores, Tensor) or scores.shape != shape or scores.is_complex():
        got = f"{tuple(scores.shape)}, {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"criterion {name_of(by.criterion)} must return one real score per weight: for {printable(layer.name)} a "
            f"tensor of the shape {tuple(shape)}, not {got}"
        )
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


@torch.no_grad()
def compares_with_itself(layers: Layers, ranking: Ranking, by: CollectedQuantities) -> bool:
    """Whether the criterion compares with an earlier value, and nothing has changed since: all scores are equal."""
    by = by.on(by.source.apart())
    pool = ranking.options.pool
    return by.compares and all_equal([score_layer(layer, layer.mask, by, pool=pool) for layer in layers.values()])


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether numpy can read the weights without a copy."""
    return parameter.element_size() >= 4 and parameter.is_contiguous() and not is_sharded(parameter)


def _scores_of_part(formula: Callable, weight: np.ndarray, part: slice) -> np.ndarray:
    """What a criterion gives, by numpy: of magnitudes, the commonest scores, in half the time."""
    return formula(weight[part])


def _own(value: Any) -> Any:
    """A copy of a tensor, in float32 if it is in half precision. Other values are returned unchanged."""
    return widened(cloned(value)) if isinstance(value, Tensor) else value
