"""The Sparsifier: builds masks from scores and applies them. W_sparse = W * M.

The core of the library is `Sparsifier.sparsify`; what it calls are the functions of the four axes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .argument import Sparsity, check_round_to, check_seed, check_sparsity, resolve_axes
from .context import Context, ask, global_, local
from .criterion import Criterion, is_elementwise, quantities_of
from .flow import find_flow
from .follower import find_followers, masks_of_followers
from .granularity import Granularity, grouping_of
from .masking import NEXT_TO_ZERO, newly_masked, zero_gradients, zero_moments, zero_weights
from .on_device import DeviceLayer
from .parallel import agree, group_of, groups_of_shards, is_sharded, reshard, unwrapped, whole
from .registry import name_of
from .report import Count, Report
from .scoring import copied, score_layer
from .selection import ScoredLayer, all_equal, bundle, nan_message
from .state import check_state
from .statistic import quantities
from .target import find_targets, parameter_of, scopes, why_dense


class Sparsifier:
    """Makes any torch model sparse: what fraction of which weights, chosen how.

    model: any torch.nn.Module; its parameters stay the same objects under the same names, nothing is left on it.
        Several processes that train it together, with DistributedDataParallel or fully_shard, get the same masks: give
        the wrapped model, and call what reads or masks weights in all of them. Names are those within the wrapper.
    granularity: how. A name of `granularities`, a tuple of axes such as ('out', 'h'), or a function.
    context: where. A name of `contexts` or a function.
    criteria: what. A name of `criteria` or a function of named quantities.
    layers, exclude: what takes part: module classes, modules, names, globs, containers, functions of (name, module),
        or a list of these. By default all weights with named axes but frozen ones and embeddings. What `layers`
        selects takes part even so. Naming a layer exactly also lifts the rule that with a granularity of whole
        outputs (inputs) the last (first) layer stays dense.
    pool: how the scores of a group become one: 'mean', 'sum', 'max', 'l2', or a function.
    round_to: keep a multiple of this many groups in every layer, or all of them.
    seed: of the generator that random criteria draw from.
    example_input: a batch, for models that torch.fx cannot trace; needed only with granularities of whole outputs
        or inputs. A tuple is given to the model as positional arguments, a dictionary as keywords.

    ValueError and TypeError, before anything is changed, where the arguments cannot work on the model.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> sparsifier = Sparsifier(model, granularity='weight', context='local', criteria='large_final')
    >>> sparsifier.sparsify(0.5)
    >>> sparsifier.sparsity
    0.5
    """

    def __init__(
        self,
        model: nn.Module,
        granularity: str | tuple[str, ...] | Granularity = "weight",
        context: str | Context = "global",
        criteria: str | Criterion = "large_final",
        *,
        layers: Any = None,
        exclude: Any = None,
        pool: str | Callable = "mean",
        round_to: int | None = None,
        seed: int = 0,
        example_input: Any = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"Sparsifier: model is a torch.nn.Module, not {type(model).__name__}")
        self.group = group_of(model)
        self.model = model = unwrapped(model)
        self.granularity, self.context, self.criteria, self.pool = resolve_axes(granularity, context, criteria, pool)
        self.round_to = check_round_to(round_to)
        self.rng = torch.Generator().manual_seed(check_seed(seed))
        flow = cache(partial(find_flow, model, example_input))
        self.candidates = find_targets(model)
        groupings = {
            name: grouping_of(self.granularity, target.axes, target.convolution_groups, self.round_to or 1)
            for name, target in self.candidates.items()
        }
        self.dense = why_dense(model, self.candidates, groupings, flow, layers, exclude)
        self.targets = {name: target for name, target in self.candidates.items() if name not in self.dense}
        self.groupings = {
            name: each for name, each in groupings.items() if name in self.targets and not isinstance(each, str)
        }
        self.followers = find_followers(model, self.targets, self.groupings, flow)
        self.levels = dict.fromkeys(self.targets, 0.0)
        self._nan: dict[str, Tensor] = {}  # whether scores of a layer on a GPU were NaN, at the last update
        self._set_masks({name: self._mask_of(name, grouping.all_kept()) for name, grouping in self.groupings.items()})
        self.statistics: dict[str, dict[str, Any]] = {}
        self._take("start")

    # --- The core -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sparsify(self, sparsity: Sparsity | None = None, *, compression_ratio: Sparsity | None = None) -> None:
        """Build the masks for a sparsity and apply them.

        sparsity: fraction of the weights to be zero; or {pattern: fraction}, each ranked by the context on its own,
            of patterns that match a layer the last, layers that none matches left as they are.
        A rising sparsity only adds zeros. A falling one revives, with weights of zero. If anything fails, nothing
        has changed; but on a GPU, where nothing is read, NaN scores raise when `sparsity` or `report` is read next.
        """
        self._check_held("sparsify")
        wanted = check_sparsity(sparsity, compression_ratio)
        asked = scopes(wanted, self.targets, self.dense, self.candidates, self.model)
        falling = any(fraction < self.levels[name] for fraction, names in asked for name in names)
        if falling or not is_elementwise(self.criteria):
            self.apply_masks()  # so that what a step has made of masked weights has no part in scores, nor comes back
        self._update(wanted)
        self.apply_masks()
        self._take("update")

    @torch.no_grad()
    def update_masks(self, sparsity: Sparsity, optimizer: Any = None) -> None:
        """What `sparsify` and `mask_moments` do, for less: to be called where all that is masked is zero.

        So it is after `apply_masks`, or after a step before which gradients and moments were masked, of an optimizer
        that works weight by weight. Only what is newly masked is then set to zero.
        """
        self._check_held("update_masks")
        before = self.masks
        self._update(check_sparsity(sparsity))
        zero_weights(newly := self._newly_masked(before))
        if optimizer is not None:
            zero_moments(newly, optimizer, squares=NEXT_TO_ZERO)
        self._take("update")

    def _update(self, sparsity: Sparsity) -> None:
        """Build masks and take them for one's own; weights are left as they are."""
        masks, levels = self._build_masks(sparsity)
        if any(levels[name] < self.levels[name] and self.groupings[name].drops_outputs for name in levels):
            warnings.warn(
                "outputs that come back start at zero, and so does what stands behind them: behind a ReLU or a norm "
                "layer no gradient reaches them, and they stay dead; let single weights come back, or re-initialize",
                stacklevel=4,
            )
        self._set_masks(masks)
        self.levels = levels

    def check(self, sparsity: Sparsity) -> None:
        """Do all that `sparsify` does but change anything: raises what it would raise."""
        self._check_held("check")
        random, nan = self.rng.get_state(), dict(self._nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._build_masks(check_sparsity(sparsity))
        self.rng.set_state(random)
        self._nan = nan

    @torch.no_grad()
    def _build_masks(self, sparsity: Sparsity) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Score, rank, mask: the masks and levels of all layers for a sparsity."""
        random = self.rng.get_state()
        masks, levels = dict(self.masks), dict(self.levels)
        rank = self._rank_on_device if (on_device := self._on_device) else self._rank
        try:
            for fraction, names in scopes(sparsity, self.targets, self.dense, self.candidates, self.model):
                scored = [self._score(name, fraction < levels[name], on_device) for name in names]
                for layer, stays in zip(scored, rank(scored, fraction), strict=True):
                    name = layer.target.name
                    levels[name] = fraction
                    if stays is not layer.alive:
                        masks[name] = self._mask_of(name, torch.as_tensor(stays))
        except BaseException:
            self.rng.set_state(random)
            raise
        return masks, levels

    def _score(self, name: str, revives: bool, on_device: bool) -> Any:
        """Score every group of a layer, from the quantities that the criterion names."""
        values = {quantity: self._quantity(quantity, name) for quantity in quantities_of(self.criteria)}
        target, grouping, mask = self.targets[name], self.groupings[name], self.masks[name]
        return score_layer(target, grouping, mask, self.criteria, values, self.pool, revives, on_device)

    @property
    def _on_device(self) -> bool:
        """Whether the ranking can stay on a GPU: one, with a context that does not ask for arrays of the host."""
        devices = {target.parameter.device for target in self.targets.values()}
        alone = self.group is None and not any(is_sharded(target.parameter) for target in self.targets.values())
        built_in = self.context in (local, global_) and self.round_to is None
        return alone and built_in and len(devices) == 1 and devices.pop().type in ("cuda", "meta")

    def _rank_on_device(self, scored: list[DeviceLayer], fraction: float) -> list[Tensor]:
        """Ask the context which groups stay, and read nothing: NaN is told of when something is read the next time."""
        for layer in scored:
            name, nan = layer.target.name, layer.score.isnan() & (layer.alive | layer.revives)
            self._nan[name] = nan.any() | self._nan.get(name, False)
        return self.context(scored, fraction)  # type: ignore

    def _rank(self, scored: list[ScoredLayer], fraction: float) -> list[np.ndarray]:
        """Ask the context which groups stay."""
        ranked = scored
        if self.round_to is not None:
            ranked, bundles = zip(*(bundle(layer, self.round_to) for layer in scored), strict=True)
        compares = {"init", "previous"}.intersection(quantities_of(self.criteria))
        # Asked in this order, the scores are looked through at a first update only.
        if compares and fraction >= 0.01 and not any(layer.masked.any() for layer in ranked) and all_equal(ranked):
            warnings.warn(
                f"criterion {name_of(self.criteria)} compares with an earlier value, and nothing has changed since it: "
                "all scores are equal, so weights fall in index order; train before the first update",
                stacklevel=7,
            )
        stays = ask(self.context, ranked, fraction, name_of(self.granularity))
        if self.round_to is not None:
            stays = [kept[of_group] for kept, of_group in zip(stays, bundles, strict=True)]
        groups = groups_of_shards(self.model) if self.group is None else [self.group]
        return agree(stays, groups, ranked[0].target.parameter.device)

    def apply_masks(self, model: nn.Module | None = None) -> None:
        """Set the masked weights to zero, and with whole outputs what stands behind them: to be called after a step.

        model: a copy of the model to apply the masks to instead, such as its torch.optim.swa_utils.AveragedModel.
        """
        self._check_held("apply_masks")
        zero_weights(self.masked_parameters(model))

    def mask_gradients(self) -> None:
        """Set the gradients of masked weights to zero: to be called after backward, before clipping."""
        self._check_held("mask_gradients")
        zero_gradients(self.masked_parameters())

    def mask_moments(self, optimizer: Any) -> None:
        """Set what an optimizer keeps of masked weights to zero, which would move them: to be called after sparsify.

        optimizer: torch's or fastai's.
        """
        self._check_held("mask_moments")
        zero_moments(self.masked_parameters(), optimizer)

    # --- What can be seen ---------------------------------------------------------------------------------------

    @property
    def level(self) -> float:
        """The sparsity that was last asked for, averaged over the weights of the layers that take part."""
        sizes = {name: target.parameter.numel() for name, target in self.targets.items()}
        return sum(self.levels[name] * size for name, size in sizes.items()) / sum(sizes.values())

    @property
    def sparsity(self) -> float:
        """Measured: zeros over weights of the layers that take part."""
        self._check_held("sparsity")
        self._check_nan()
        return Count.of(*(target.parameter for target in self.targets.values())).sparsity

    def report(self) -> Report:
        """Measured zeros per layer and in total; text, HTML in a notebook, `.plot()`."""
        self._check_held("report")
        self._check_nan()
        return Report.measure(self.model, self.candidates, self.dense)

    def __repr__(self) -> str:
        axes = ", ".join(map(name_of, (self.granularity, self.context, self.criteria)))
        if self.model is None:
            return f"Sparsifier({axes}: released)"
        layers = f"Sparsifier({axes}: {len(self.targets)} layers"
        # Sharded, it is measured in all processes together, and a repr is often asked for in one.
        sharded = any(is_sharded(target.parameter) for target in self.targets.values())
        return f"{layers})" if sharded else f"{layers}, sparsity {self.sparsity:.4f})"

    # --- State --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks, levels, statistics and random state, keyed by parameter name; for torch.save."""
        self._check_held("state_dict")
        return {
            "masks": dict(self.masks),
            "levels": dict(self.levels),
            "statistics": {quantity: dict(values) for quantity, values in self.statistics.items()},
            "rng": self.rng.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what state_dict gave, for the same model and the same axes, and apply the masks.

        ValueError, and nothing changed, if names, shapes or statistics differ.
        """
        self._check_held("load_state_dict")
        check_state(state, self.masks, self.levels, self.statistics, name_of(self.criteria))
        self._set_masks({name: state["masks"][name].to(mask.device) for name, mask in self.masks.items()})
        self.levels = {name: float(state["levels"][name]) for name in self.targets}
        self.statistics = {
            quantity: {name: values[name].to(target.parameter.device) for name, target in self.targets.items()}
            for quantity, values in state["statistics"].items()
        }
        self.rng.set_state(state["rng"].cpu())
        self.apply_masks()

    @torch.no_grad()
    def recover_masks(self) -> None:
        """Take the masks from the zeros of the model, as after loading a bare checkpoint of a sparse model.

        A group is masked if all its weights are zero. A layer of nothing but zeros, as some are initialized, is not.
        """
        self._check_held("recover_masks")
        masks, shares = {}, {}
        for name, target in self.targets.items():
            grouping = self.groupings[name]
            kept = grouping.any_of(whole(target.parameter.detach()) != 0)
            if not kept.any():
                kept = torch.ones_like(kept)
            masks[name] = self._mask_of(name, kept)
            shares[name] = Count.of(masks[name].expand_as(target.parameter)).sparsity
        # Ranked jointly, a layer can have more or less zeros than the level that it was ranked for.
        joint = Count.of(*(masks[name].expand_as(target.parameter) for name, target in self.targets.items())).sparsity
        self.levels = {name: min(share, joint) for name, share in shares.items()}
        self._set_masks(masks)

    def adopt(self, masks: Mapping[str, Tensor]) -> None:
        """Take over the masks of another Sparsifier of the model: what they mask in whole groups is masked here too."""
        self._check_held("adopt")
        adopted = dict(self.masks)
        for name in self.masks.keys() & masks.keys():
            grouping, theirs = self.groupings[name], masks[name].expand_as(self.targets[name].parameter)
            adopted[name] = self._mask_of(name, grouping.gather(adopted[name]) & grouping.any_of(theirs))
        self._set_masks(adopted)

    def release(self) -> nn.Module:
        """Let go of the model and return it: its zeros stay, and nothing keeps them from here on."""
        self._check_held("release")
        model = self.model
        self.model = None  # type: ignore[assignment]
        self.candidates, self.targets, self.groupings, self.dense = {}, {}, {}, {}
        self.followers, self.statistics, self._nan = {}, {}, {}
        self._set_masks({})
        return model

    # --- Helpers ------------------------------------------------------------------------------------------------

    def _check_held(self, operation: str) -> None:
        if self.model is None:
            raise RuntimeError(f"{operation}: this Sparsifier has released its model; make a new one")
        reshard(self.model)

    def _check_nan(self) -> None:
        flags, self._nan = self._nan, {}
        for name, flag in flags.items():
            if flag:
                raise ValueError(nan_message(name))

    def __getstate__(self) -> dict[str, Any]:
        # A group of processes cannot be copied or pickled; a copy is alone.
        return {**vars(self), "group": None}

    def _set_masks(self, masks: dict[str, Tensor]) -> None:
        self.masks = masks
        self.follower_masks = masks_of_followers(self.followers, masks, self.targets, self.groupings)

    def masked_parameters(self, model: nn.Module | None = None) -> list[tuple[nn.Parameter, Tensor]]:
        """Every parameter with a mask, and the mask on its device. model: a copy, whose parameters are meant."""
        pairs = []
        for masks in (self.masks, self.follower_masks):
            for name, mask in masks.items():
                parameter = parameter_of(self.model if model is None else model, name, mask)
                if mask.device != parameter.device:
                    mask = mask.to(parameter.device)
                    if model is None:
                        masks[name] = mask
                pairs.append((parameter, mask))
        return pairs

    def _newly_masked(self, before: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """As masked_parameters, but of weights only those that the masks `before` did not mask. See masking.py."""
        weights = {id(self.targets[name].parameter): before[name] for name in self.masks}
        return [
            (parameter, newly_masked(parameter, weights[id(parameter)], mask) if id(parameter) in weights else mask)
            for parameter, mask in self.masked_parameters()
        ]

    def _mask_of(self, name: str, kept: Tensor) -> Tensor:
        parameter = self.candidates[name].parameter
        mask = self.groupings[name].spread(kept).to(parameter.device)
        if mask.shape == parameter.shape and not is_sharded(parameter) and mask.stride() != parameter.stride():
            # In another order of memory than its weight it would be slow to apply.
            return torch.empty_like(parameter, dtype=torch.bool).copy_(mask)
        return mask

    def _quantity(self, quantity: str, name: str) -> Any:
        """A quantity of a layer: computed now, or what is stored."""
        function = quantities[quantity]
        if "score" in function.moments:  # type: ignore[attr-defined]
            return function(self, name)
        return self.statistics[quantity][name].to(self.targets[name].parameter.device)

    def _take(self, moment: str) -> None:
        """Store the quantities that the criterion names and that are taken at this moment."""
        for quantity in quantities_of(self.criteria):
            function = quantities[quantity]
            if moment in function.moments:  # type: ignore[attr-defined]
                self.statistics[quantity] = {name: copied(function(self, name)) for name in self.targets}
