"""The Sparsifier: builds masks from scores and applies them. W_sparse = W * M.

The core of the library is `Sparsifier.sparsify`; what it calls are the functions of the four axes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..axes.context import Context, ask, global_, local
from ..axes.criterion import Criterion, is_elementwise, quantities_of
from ..axes.granularity import Granularity
from ..axes.grouping import squared_sum
from ..axes.ranking.device_layer import DeviceLayer
from ..axes.ranking.scored_layer import ScoredLayer, all_equal
from ..model.parallel import agree, is_sharded, process_groups_of_shards
from ..support.checks import check_count, check_round_to, check_seed
from ..support.registry import name_of
from .arguments import Sparsity, check_sparsity, resolve_axes
from .calibration import calibrate
from .collection import CollectedQuantities
from .coupled import joint_layers
from .mask_building import score_layer
from .masked_model import MaskedModel
from .masking import NEXT_TO_ZERO, zero_moments, zero_weights
from .regrowth import Regrowth, check_drop, sparsity_of_drop
from .saved_state import check_state
from .steps import sparsify_in_steps
from .taking_part import scopes


class Sparsifier(MaskedModel):
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
    pool: how the scores of a group become one: 'mean', 'sum', 'max', 'l2', or a function; None for that of the
        criterion's definition, which is 'mean' but for taylor.
    may_empty: whether a layer may lose its best group, too.
    regrow: what comes back where sparsify is told to drop, highest scores first: 'grad' as in RigL, 'random' as in
        SET, or another criterion.
    round_to: keep a multiple of this many groups in every layer, or all of them.
    coupled: whether filters that can only be removed together, such as those whose outputs are added, are ranked and
        fall together, so that `shrink` can remove all that is zero. Needs torch-pruning and example_input.
    seed: of the generator that random criteria draw from.
    example_input: a batch, for models that torch.fx cannot trace; needed only with granularities of whole outputs
        or inputs, by synflow and by coupled. A tuple is given as positional arguments, a dictionary as keywords.

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
        pool: str | Callable | None = None,
        may_empty: bool = False,
        regrow: str | Criterion | None = None,
        round_to: int | None = None,
        coupled: bool = False,
        seed: int = 0,
        example_input: Any = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"Sparsifier: model is a torch.nn.Module, not {type(model).__name__}")
        self.granularity, self.context, self.criteria, self.pool = resolve_axes(granularity, context, criteria, pool)
        self.round_to, self.may_empty = check_round_to(round_to), bool(may_empty)
        self.rng = torch.Generator().manual_seed(check_seed(seed))
        super().__init__(model, self.granularity, layers, exclude, self.round_to or 1, example_input, bool(coupled))
        if self.pool is squared_sum and (rescaled := self.rescaled_layers()):
            warnings.warn(
                f"{name_of(self.criteria)}: a batch norm undoes the scale of the outputs of {', '.join(rescaled[:3])}"
                f"{' and others' if len(rescaled) > 3 else ''}, so the sum of w g over a filter is zero but for "
                "rounding and says nothing; choose snip or fisher, or smaller groups such as kernels",
                stacklevel=2,
            )
        self.levels = dict.fromkeys(self.targets, 0.0)
        self.example_input = tree_map(first_example, example_input)
        self.inputs: dict[str, Tensor] = {}  # of layers that compute, while calibrate looks
        self.loss: Tensor | None = None  # of a batch of calibrate
        self.collected = CollectedQuantities(quantities_of(self.criteria), self.criteria)
        self.collected.take("start", self)
        self.regrowth = None if regrow is None else Regrowth(regrow)
        if self.regrowth is not None:
            self.regrowth.check(self.context, any(each.drops_outputs for each in self.groupings.values()))
            self.regrowth.take("start", self)
        self._calibration: tuple[Iterable, Callable | None] | None = None

    # --- The core -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sparsify(
        self,
        sparsity: Sparsity | None = None,
        *,
        compression_ratio: Sparsity | None = None,
        steps: int = 1,
        drop: float = 0.0,
    ) -> None:
        """Build the masks for a sparsity and apply them.

        sparsity: fraction of the weights to be zero; or {pattern: fraction}, each ranked by the context on its own,
            of patterns that match a layer the last, layers that none matches left as they are.
        steps: in so many, with scores anew in each, and from one to the next the same share of what is left falls.
        drop: share of what is left that falls first, for as much to come back by `regrow`.
        A rising sparsity only adds zeros. A falling one revives, with weights of zero. If anything fails, nothing
        has changed; but on a GPU, where nothing is read, NaN scores raise when `sparsity` or `report` is read next.
        """
        self._check_held("sparsify")
        wanted = check_sparsity(sparsity, compression_ratio)
        check_drop(drop, self.regrowth is not None)
        if check_count("steps", steps) > 1:
            if drop:
                raise ValueError("sparsify: steps= and drop= do not go together; drop after the steps")
            sparsify_in_steps(self, wanted, steps)
            return
        asked = scopes(wanted, self.targets, self.dense, self.candidates, self.model)
        falling = any(fraction < self.levels[name] for fraction, names in asked for name in names)
        if drop or falling or not is_elementwise(self.criteria):
            self.apply_masks()  # so that what a step has made of masked weights has no part in scores, nor comes back
        self._update(wanted, drop)
        self.apply_masks()
        self._take_update()

    def calibrate(self, batches: Iterable, loss_func: Callable | None = None) -> None:
        """Run batches through the model for a criterion that looks at data, and leave no other trace.

        batches: (input, target), (input, input, target), or dictionaries of named inputs. loss_func: of (output,
            target), or of (output, dictionary); needed by criteria of gradients.
        Modes, buffers, gradients and random generators are as before. ValueError, and nothing changed, if the model or
        the loss fail, or no gradient or input reaches a layer that takes part.
        """
        self._check_held("calibrate")
        calibrate(self, self.collected, batches, loss_func)
        self._calibration = batches, loss_func

    def collect_gradients(self) -> None:
        """Have a criterion that looks at gradients see those that are there: after backward, before they are masked.

        `mask_gradients` does so itself. ValueError if none has reached a layer that takes part.
        """
        self._check_held("collect_gradients")
        for statistics in filter(None, (self.collected, self.regrowth)):
            statistics.add("backward", self, self.targets)

    def mask_gradients(self) -> None:
        """Set the gradients of masked weights to zero: to be called after backward, before clipping.

        A criterion that looks at gradients sees them first, if every layer that takes part has one.
        """
        looks = bool(self.collected.at("backward"))
        if looks and all(target.parameter.grad is not None for target in self.targets.values()):
            self.collect_gradients()
        super().mask_gradients()

    @torch.no_grad()
    def update_masks(self, sparsity: Sparsity, optimizer: Any = None, *, drop: float = 0.0) -> None:
        """What `sparsify` and `mask_moments` do, for less: to be called where all that is masked is zero.

        So it is after `apply_masks`, or after a step before which gradients and moments were masked, of an optimizer
        that works weight by weight. Only what is newly masked is then set to zero.
        """
        self._check_held("update_masks")
        before = self.masks
        check_drop(drop, self.regrowth is not None)
        self._update(check_sparsity(sparsity), drop)
        zero_weights(newly := self.newly_masked(before))
        if optimizer is not None:
            zero_moments(newly, optimizer, squares=NEXT_TO_ZERO)
        self._take_update()

    def _take_update(self) -> None:
        """Have the quantities taken that are taken after an update."""
        self.collected.take("update", self)
        if self.regrowth is not None:
            self.regrowth.take("update", self)

    def _update(self, sparsity: Sparsity, drop: float = 0.0) -> None:
        """Build masks and take them for one's own; weights are left as they are."""
        masks, levels = self._build_masks(sparsity, drop)
        if any(levels[name] < self.levels[name] and self.groupings[name].drops_outputs for name in levels):
            warnings.warn(
                "outputs that come back start at zero, and so does what stands behind them: behind a ReLU or a norm "
                "layer no gradient reaches them, and they stay dead; let single weights come back, or re-initialize",
                stacklevel=4,
            )
        self._set_masks(masks)
        self.levels = levels
        if self.regrowth is not None:
            self.regrowth.note(masks)

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
    def _build_masks(self, sparsity: Sparsity, drop: float = 0.0) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Score, rank, mask: the masks and levels of all layers for a sparsity."""
        random = self.rng.get_state()
        masks, levels = dict(self.masks), dict(self.levels)
        try:
            for fraction, names in scopes(sparsity, self.targets, self.dense, self.candidates, self.model):
                if drop and self.regrowth is not None:
                    self._rank_into(masks, names, sparsity_of_drop(fraction, drop), self.collected)
                    self._rank_into(masks, names, fraction, self.regrowth, revive=names)
                else:
                    falling = [name for name in names if fraction < levels[name]]
                    self._rank_into(masks, names, fraction, self.collected, revive=falling)
                levels.update(dict.fromkeys(names, fraction))
        except BaseException:
            self.rng.set_state(random)
            raise
        finally:
            self.collected.forget()
        return masks, levels

    def _rank_into(
        self,
        masks: dict[str, Tensor],
        names: list[str],
        fraction: float,
        by: CollectedQuantities,
        revive: Container[str] = (),
    ) -> None:
        """Rank the layers of a scope and put what stays into `masks`. by: a criterion and its quantities.

        revive: layers of which groups that are zero may come back.
        """
        on_device = self._on_device
        rank = self._rank_on_device if on_device else self._rank
        scored = [self._score(name, masks[name], by, name in revive, on_device) for name in names]
        for layer, stays in zip(scored, rank(scored, fraction), strict=True):
            if stays is not layer.alive:
                masks[layer.target.name] = self._mask_of(layer.target.name, torch.as_tensor(stays))

    def _score(self, name: str, mask: Tensor, by: CollectedQuantities, revives: bool, on_device: bool) -> Any:
        """Score every group of a layer, from the quantities that the criterion names."""
        values = {quantity: by.value(quantity, name, self) for quantity in by.named}
        target, grouping = self.targets[name], self.groupings[name]
        options = {"revives": revives, "may_empty": self.may_empty}
        return score_layer(target, grouping, mask, by.criterion, values, self.pool, on_device, **options)

    @property
    def _on_device(self) -> bool:
        """Whether the ranking can stay on a GPU: one, with a context that does not ask for arrays of the host."""
        devices = {target.parameter.device for target in self.targets.values()}
        alone = self.group is None and not any(is_sharded(target.parameter) for target in self.targets.values())
        built_in = self.context in (local, global_) and self.round_to is None and self.coupling is None
        return alone and built_in and len(devices) == 1 and devices.pop().type in ("cuda", "meta")

    def _rank_on_device(self, scored: list[DeviceLayer], fraction: float) -> list[Tensor]:
        """Ask the context which groups stay, and read nothing: NaN is told of when something is read the next time."""
        stays = self.context(scored, fraction)  # type: ignore
        # Of all layers at once: each of these is a launch.
        names, nan = [layer.target.name for layer in scored], torch.stack([layer.nan for layer in scored])  # type: ignore
        earlier = torch.stack([self._nan.get(name, flag) for name, flag in zip(names, nan, strict=True)])
        self._nan.update(zip(names, (nan | earlier).unbind(), strict=True))
        return stays  # type: ignore

    def _rank(self, scored: list[ScoredLayer], fraction: float) -> list[np.ndarray]:
        """Ask the context which groups stay."""
        ranked, split = joint_layers(scored, self.coupling, self.round_to)
        compares = {"init", "previous"}.intersection(self.collected.named)
        # Asked in this order, the scores are looked through at a first update only.
        if compares and fraction >= 0.01 and not any(layer.masked.any() for layer in ranked) and all_equal(ranked):
            warnings.warn(
                f"criterion {name_of(self.criteria)} compares with an earlier value, and nothing has changed since it: "
                "all scores are equal, so weights fall in index order; train before the first update",
                stacklevel=8,
            )
        stays = split(ask(self.context, ranked, fraction, name_of(self.granularity)))
        groups = process_groups_of_shards(self.model) if self.group is None else [self.group]
        return agree(stays, groups, scored[0].target.parameter.device)

    # --- What can be seen ---------------------------------------------------------------------------------------

    @property
    def level(self) -> float:
        """The sparsity that was last asked for, averaged over the weights of the layers that take part."""
        sizes = {name: target.parameter.numel() for name, target in self.targets.items()}
        return sum(self.levels[name] * size for name, size in sizes.items()) / sum(sizes.values())

    def __repr__(self) -> str:
        axes = ", ".join(map(name_of, (self.granularity, self.context, self.criteria)))
        if self.model is None:
            return f"Sparsifier({axes}: released)"
        layers = f"Sparsifier({axes}: {len(self.targets)} layers"
        # Sharded, it is measured in all processes together, and a repr is often asked for in one.
        sharded = any(is_sharded(target.parameter) for target in self.targets.values())
        return f"{layers})" if sharded else f"{layers}, sparsity {self.sparsity:.4f})"

    @property
    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """What is stored of the quantities that the criterion names: quantity -> parameter name -> value."""
        return self.collected.stored

    def once(self, compute: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        """For quantities: what `compute` gives of this Sparsifier, for all layers, computed at the first of them."""
        return self.collected.once(compute, self)

    @property
    def explored(self) -> float:
        """Share of the weights that were ever used: not masked since the first update. Needs regrow=.

        Liu et al., 2021, "Do We Actually Need Dense Over-Parameterization?" (arXiv:2102.02887).
        """
        if self.regrowth is None:
            raise ValueError("explored: what was ever used is noted with regrow= only; make the Sparsifier with it")
        return self._count({**self.masks, **self.regrowth.used}).density

    def _notes(self) -> dict[str, str]:
        noted = getattr(self.context, "note", None)
        notes = {} if noted is None else {name: noted(each.named_grid) for name, each in self.groupings.items()}
        if self.regrowth is not None:
            notes = {name: "; ".join(filter(None, (notes.get(name), self.regrowth.share(name)))) for name in self.masks}
        return notes

    # --- State --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks, levels, statistics and random state, keyed by parameter name; for torch.save."""
        self._check_held("state_dict")
        return {
            "masks": dict(self.masks),
            "levels": dict(self.levels),
            "statistics": self.collected.state(),
            **({} if self.regrowth is None else {"regrowth": self.regrowth.state()}),
            "rng": self.rng.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what state_dict gave, for the same model and the same axes, and apply the masks.

        ValueError, and nothing changed, if names, shapes or statistics differ.
        """
        self._check_held("load_state_dict")
        check_state(state, self.masks, self.levels, self.collected, self.regrowth)
        self._set_masks({name: state["masks"][name].to(mask.device) for name, mask in self.masks.items()})
        self.levels = {name: float(state["levels"][name]) for name in self.targets}
        self.collected.restore(state["statistics"], self)
        if self.regrowth is not None:
            self.regrowth.restore(state["regrowth"], self)
        self.rng.set_state(state["rng"].cpu())
        self.apply_masks()

    @torch.no_grad()
    def recover_masks(self) -> None:
        """Take the masks from the zeros of the model, as after loading a bare checkpoint of a sparse model.

        A group is masked if all its weights are zero. A layer of nothing but zeros, as some are initialized, is not.
        """
        self._check_held("recover_masks")
        masks = self._masks_of_zeros()
        # Ranked jointly, a layer can have more or less zeros than the level that it was ranked for.
        joint = self._count(masks).sparsity
        self.levels = {name: min(self._count({name: mask}).sparsity, joint) for name, mask in masks.items()}
        self._set_masks(masks)

    def release(self) -> nn.Module:
        """Let go of the model and return it: its zeros stay, and nothing keeps them from here on."""
        model = super().release()
        self._calibration, self.collected, self.regrowth = None, CollectedQuantities((), self.criteria), None
        return model

    # --- Helpers ------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # A group of processes cannot be copied or pickled; a copy is alone.
        return {**vars(self), "group": None, "_calibration": None}


def first_example(value: Any) -> Any:
    """The first example of a batch."""
    return value[:1].detach().clone() if isinstance(value, Tensor) and value.dim() else value
