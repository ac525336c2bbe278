"""The Sparsifier builds masks from scores and applies them: W_sparse = W * M.

The core of the library is `Sparsifier.sparsify`. It calls `build_masks`, which asks the functions of the four axes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.context import Context
from ..axes.criterion import Criterion, is_elementwise
from ..axes.granularity import Granularity
from ..axes.quantity import CALIBRATED
from ..model.parallel import is_sharded, kind_of, process_group_of, unwrapped
from ..model.patterns import Pattern
from ..model.running import first_example
from ..model.zeros import Count
from ..support.arguments import checks_arguments
from ..support.checks import check_count
from ..support.foreign_names import ForeignAttributes
from ..support.registry import name_of
from ..support.table import percent
from ..support.warning import warn_each
from .calibration import calibrated
from .change import Change
from .collection import CollectedQuantities, Source
from .compensation import (
    Calibration,
    check_calibrated,
    check_compensated,
    check_kept,
    compensated,
    inverse_curvatures,
    makes_passes,
    passes_need_loss,
    swept_masks,
)
from .copying import CopiedWithModel
from .dense_checks import check_can_be_kept
from .findings import both
from .given_masks import check_masks
from .layer import Layers, level_of, selected, unfrozen
from .layer_selection import Asked, cannot_be_pruned, find_layers, scopes
from .mask_building import NewMasks, Ranking, build_masks, notice_of_revived
from .mask_picture import plot_masks
from .masking import NEXT_TO_ZERO, masked_parameters, moments_to_zero, newly_changed, newly_masked
from .notices import (
    notices_of_frozen,
    notices_of_host,
    notices_of_outputs,
    notices_of_unnamed,
    notices_of_unprunable,
    notices_of_unused,
)
from .options import Options, Sparsity, check_sparsity, is_swept
from .reading import check_read
from .regrowth import Regrowth, check_drop
from .report import Report
from .saved_state import read_state
from .steps import check_repeatable, sparsity_at
from .straight_through import StraightThroughModel


# Large, because it is the face of the core: a third of it are docstrings for its users.
class Sparsifier(CopiedWithModel, StraightThroughModel, ForeignAttributes):
    """Makes any torch model sparse. The options say which weights are pruned and how they are chosen.

    A layer that is frozen joins the selected layers when it is trained.

    Args:
        model: Any torch.nn.Module. Its parameters stay the same objects under the same names, and nothing is added to
            it. Several processes that train it together, with DistributedDataParallel or fully_shard, get the same
            masks: pass the wrapped model, and call every method in all processes. Names are those inside the wrapper.
        granularity: How weights are grouped: a name of `granularities`, a tuple of axes such as ('out', 'h'), or a
            function. Default 'weight', every weight by itself. Groups of some, such as 'head', have weights in
            several layers.
        context: Where scores are ranked: a name of `contexts` or a function. Default 'global', all layers together.
        criteria: How weights are scored: a name of `criteria` or a function of named quantities. The groups with
            the lowest scores are pruned. Default 'large_final', the magnitude.
        layers: Which layers are pruned: module classes, modules, names, globs, containers, functions of (name,
            module), or a list of these. Default: all weights with named axes, except frozen ones, embeddings, and with
            a warning those that cannot be pruned, as quantized ones. With a granularity of whole outputs (inputs) the
            last (first) layer stays dense, unless it is named exactly.
        exclude: Which layers stay dense, in the same form. Default none.
        pool: How the scores of a group become one: 'mean', 'sum', 'max', 'l2', or a function. Default: the pooling of
            the criterion's definition, which is 'mean' except for taylor.
        may_empty: Whether a layer may lose all its groups. By default it keeps its best one.
        regrow: The criterion by which pruned weights regrow, highest scores first, when `sparsify` is called with
            `drop`: 'grad' as in RigL, 'random' as in SET, or another criterion. Not with groups of several layers.
        round_to: Keep a multiple of this many groups in every layer, or all of them.
        coupled: Whether filters that can only be removed together (such as those whose outputs are added) are ranked
            and pruned together, so that `shrink` can remove every zero filter. Needs torch-pruning and example_input.
        seed: Seed of the generator that random criteria draw from. Default 0.
        straight_through: Whether dense weights are kept beside the sparse ones, so that masks can change their mind:
            see `dense_weights`. Costs 4 bytes a weight. Default False.
        decay: With straight_through, how strongly pruned weights are pulled towards zero: `mask_gradients` adds decay
            times the dense weight to their gradient (SR-STE; Zhou et al., 2021, arXiv:2102.04010). Default 2e-4.
        gradient_sparsity: With straight_through, the fraction of the weights whose gradients are zero, those that rank
            lowest (Top-KAST; Jayakumar et al., 2021, arXiv:2106.03517). At most the present sparsity counts, so 1 lets
            only the weights that are kept learn, as in movement pruning as published. Default 0: all weights learn.
        compensate: Whether the weights that stay are changed, layer by layer, so that the squared error of the layer's
            outputs on the batches of `calibrate` is smallest: see `Sparsifier.calibrate`. Any criterion can use it.
            Default: what the method of the criterion does, which is True for obs and sparsegpt and False for others.
        example_input: A batch, for models that torch.fx cannot trace; needed only with granularities of whole outputs
            or inputs, by synflow, and by coupled. A tuple holds positional arguments, a dictionary keywords.

    Attributes:
        layers: Parameter name -> `Layer`: for every weight with named axes its grouping, its mask, the level it was
            pruned to, or why it stays dense.
        ranking: How scores become masks: the options as functions, and which filters are coupled.
        collected: The criterion's quantities that are collected in training or by `calibrate`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The arguments cannot work on this model. Nothing has changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sparsifier = Sparsifier(model, granularity='weight', context='local', criteria='large_final')
        >>> sparsifier.sparsify(0.5)
        >>> sparsifier.sparsity
        0.5
    """

    @checks_arguments
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
        straight_through: bool = False,
        decay: float | None = None,
        gradient_sparsity: float | None = None,
        compensate: bool | None = None,
        example_input: Any = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"Sparsifier: model is a torch.nn.Module, not {type(model).__name__}")
        options = Options.of(
            granularity, context, criteria, layers=layers, exclude=exclude, pool=pool, may_empty=may_empty,
            regrow=regrow, round_to=round_to, coupled=coupled, seed=seed, straight_through=straight_through,
            decay=decay, gradient_sparsity=gradient_sparsity, compensate=compensate,
        )  # fmt: skip
        inner = unwrapped(model)
        found, followers, coupling = find_layers(
            inner, options.granularity, layers=options.layers, exclude=options.exclude,
            fewest=0 if options.may_empty else options.round_to or 1,
            coupled=options.coupled, example_input=example_input,
        )  # fmt: skip
        super().__init__(inner, found, followers, options.decay)
        # The layers are found. Patterns, which can be modules and lambdas, would hold on to the model and not pickle.
        self.ranking = Ranking(replace(options, layers=None, exclude=None), coupling, process_group_of(model))
        weights = {name: layer.weight for name, layer in self._selected.items()}
        rng = torch.Generator().manual_seed(options.seed)
        if options.straight_through:
            for layer in self._selected.values():
                check_can_be_kept(layer.name, layer.parameter)
        example = first_example(example_input)
        joint = {} if coupling is None else coupling.joint
        source = Source(inner, weights, rng, example, dense=self._dense, joint=joint)
        self.collected = CollectedQuantities(options.criteria, source)
        check_read(self.collected)
        if makes_passes(options):
            check_compensated(options, self._selected)
        self._regrowth = None if options.regrow is None else Regrowth(options.regrow, source)
        for each in self._all_collected:
            each.take("start")
        self._calibration: Calibration | None = None
        self._has_ranked = False
        warn_each(notices_of_unused(options))
        warn_each(notices_of_outputs(options, inner, self.layers, self.all_masks.followers))
        warn_each(notices_of_unprunable("Sparsifier", cannot_be_pruned(found), len(found)))
        warn_each(notices_of_frozen(self.layers))
        if options.layers is None:  # who says which layers are pruned knows that others stay dense
            warn_each(notices_of_unnamed(inner, self.layers))

    # --- Building masks -----------------------------------------------------------------------------------------

    @checks_arguments
    def sparsify(
        self,
        sparsity: Sparsity | None = None,
        *,
        compression_ratio: Sparsity | None = None,
        steps: int = 1,
        drop: float = 0.0,
    ) -> None:
        """Build the masks for a sparsity and apply them.

        A rising sparsity only prunes more. A falling one revives weights, which start at zero. With straight_through,
        all weights are ranked anew, by their dense values, until `settle`.

        Args:
            sparsity: Fraction of the weights to be zero, 0.5 for 50 %; or {pattern: fraction}. Then the layers of
                each pattern are ranked by themselves; if several patterns match a layer, the last counts; layers that
                none matches stay as they are.
            compression_ratio: Another name of `sparsity`, the same number.
            steps: Number of steps in which the sparsity is reached, with new scores in each. From one step to the
                next the same fraction of the remaining weights is pruned. Default 1.
            drop: Fraction of the remaining weights that is pruned first, for as many to regrow. Needs regrow=.

        Raises:
            ValueError: The sparsity cannot be reached, or the criterion gives no usable scores. Nothing has changed
                then. On a GPU, NaN scores raise when `sparsity` or `report` is read next, because nothing is read
                before.
        """
        self._check_held("sparsify")
        wanted = check_sparsity(sparsity, compression_ratio)
        check_drop(drop, self._regrowth is not None)
        if check_count("steps", steps) > 1 and drop:
            raise ValueError("sparsify: steps= and drop= do not go together; drop after the steps")
        self._dense.refresh(by_value=True)
        if steps > 1:
            warn_each(self._sparsify_in_steps(wanted, steps))
            return
        new = self._new_masks(wanted, drop)
        warn_each(new.notices)  # before anything has changed, for those who make errors of warnings
        self._take(self._change_to(new))

    def update_masks(self, sparsity: Sparsity, optimizer: Any = None, *, drop: float = 0.0) -> None:
        """Do what `sparsify` and `mask_moments` do, at less cost: only newly pruned weights are set to zero.

        Weights that were pruned before are zero after `apply_masks`. They stay zero in a step that gradients and
        moments were masked for, of an optimizer that works weight by weight.

        Args:
            sparsity: As of `sparsify`.
            optimizer: torch's or fastai's, whose moments of newly pruned weights are set to zero; or None. With
                straight_through they stay, until `settle`.
            drop: As of `sparsify`.

        Raises:
            ValueError: As `sparsify`.
        """
        self._check_held("update_masks")
        check_drop(drop, self._regrowth is not None)
        new = self._new_masks(check_sparsity(sparsity), drop)
        warn_each(new.notices)
        change = self._change_to(new)
        earlier = {id(layer.parameter): layer.mask for layer in self._selected.values()}
        now = masked_parameters(self.model, {**new.masks, **(change.followers or {})})
        if change.from_dense:
            if optimizer is not None:
                moments_to_zero(now, optimizer)  # raises now what `settle` would raise much later
            known = [(parameter, mask, earlier[id(parameter)]) for parameter, mask in now if id(parameter) in earlier]
            self._take(change, {id(each): newly_changed(each, before, mask) for each, mask, before in known})
            return
        newly_pruned = [
            (parameter, newly_masked(parameter, earlier[id(parameter)], mask) if id(parameter) in earlier else mask)
            for parameter, mask in now
        ]
        if optimizer is not None:
            change = replace(change, moments=moments_to_zero(newly_pruned, optimizer, squares=NEXT_TO_ZERO))
        self._take(change, newly_pruned)

    @torch.no_grad()
    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the masks of some layers, and set the weights that they prune to zero. Other layers stay as they are.

        `sparsify` goes on from there: a higher sparsity prunes more, a lower one lets weights come back.

        Args:
            masks: Parameter name -> tensor of bools, or of zeros and ones, that broadcasts to the weight; False or 0
                where it is pruned. Prefixes of wrappers, such as 'module.', are left out.

        Raises:
            TypeError: `masks` is no dictionary of tensors.
            ValueError: A name is not that of a selected layer, or a mask has another shape, other values, or prunes
                parts of a group. Nothing has changed then.
        """
        self._check_held("set_masks")
        kept = check_masks(masks, self.layers, self.ranking.options.may_empty)
        layers = self._with_masks({name: self.layers[name].mask_of(groups) for name, groups in kept.items()})
        masks = {**self.masks, **{name: layer.mask for name, layer in layers.items()}}
        self._take(self._written(Change(layers, self.all_masks.followers_of(layers), self._noted(masks), zeroes=True)))

    def check(self, sparsity: Sparsity) -> None:
        """Raise what `sparsify` would raise, and change nothing.

        Args:
            sparsity: As of `sparsify`.
        """
        self._check_held("check")
        self.select_unfrozen()
        asked = self._without(self.resting(), scopes(check_sparsity(sparsity), self.layers, self.model))
        with self._dense.in_place():
            self._built(asked)

    def select_unfrozen(self) -> list[str]:
        """Select the layers that were frozen and are trained now. Building masks and collecting data do it themselves.

        Returns:
            Names of the layers that join.
        """
        self._finish()
        joining = self._joining()
        if joining.layers:
            self._take(joining)
        return list(joining.layers)

    def _joining(self) -> Change:
        """The layers that were frozen and are trained now, as a change that selects them."""
        names, coupling = unfrozen(self.layers), self.ranking.coupling
        names = names if coupling is None else coupling.complete(names, self.layers)
        layers = {name: self.layers[name].as_selected() for name in names}
        if not layers:
            return Change()
        weights = {name: layer.weight for name, layer in selected({**self.layers, **layers}).items()}
        source = replace(self.collected.source, layers=weights)
        taken = [(each, each.on(source).after("start", layers)) for each in self._all_collected]
        attributes = [(self.collected.source, {"layers": weights}), *taken]
        return Change(layers, self.all_masks.followers_of(layers), attributes)

    def _new_masks(self, sparsity: Sparsity, drop: float = 0.0) -> NewMasks:
        """Build masks. Weights that are pruned already are set to zero before, where their values would matter."""
        self.select_unfrozen()
        asked = self._without(self.resting(drop), scopes(sparsity, self.layers, self.model))
        if not self._has_ranked:  # not when it is made: a model is often moved to a GPU later
            self._has_ranked = True
            warn_each(notices_of_host(self.ranking.options, self.layers))
        if self.is_straight_through:
            return self._masks_of_dense(asked)
        options = self.ranking.options
        falling = any(fraction < self.layers[name].level for fraction, names in asked for name in names)
        by_element = is_elementwise(options.criteria) and not options.compensate
        if drop or falling or not by_element or self.collected.at("update"):
            # A step may have moved pruned weights. Their values must not reach a score, now or later, nor be revived.
            self.apply_masks()
        new = self._built(asked, drop)
        if not options.compensate or is_swept(options.criteria):
            return new
        layers = {name: layer.with_mask(new.masks[name], new.levels[name]) for name, layer in self._selected.items()}
        return compensated(
            new, self._selected, self.all_masks.followers_of(layers), check_calibrated(options, self._calibration),
            options, self.model, self.ranking.process_group, self.collected.may_skip,
        )  # fmt: skip

    def _built(self, asked: Asked, drop: float = 0.0) -> NewMasks:
        """Build masks from the weights as they are, or by a sweep that changes them."""
        options, group = self.ranking.options, self.ranking.process_group
        if makes_passes(options):
            check_compensated(options, self._selected)  # it may have been sharded since
            calibration = check_calibrated(options, self._calibration)
            if is_swept(options.criteria):
                return swept_masks(self._selected, asked, calibration, options, self.collected, group)
        collected = inverse_curvatures(options, self.collected, self._calibration, group)
        return build_masks(self._ranked(asked), asked, self.ranking, collected, self._regrowth, drop)

    def _masks_of_dense(self, asked: Asked) -> NewMasks:
        """Build masks from the dense weights: those of the weights, and of those that get gradients."""
        layers, lowest = self._ranked(asked), self.ranking.options.gradient_sparsity or 0.0
        with self._dense.in_place():
            new = build_masks(layers, asked, self.ranking, self.collected)
            # What is kept again has its dense value, so it is no dead output.
            revived = notice_of_revived(self.ranking)
            new = replace(new, notices=[notice for notice in new.notices if notice != revived])
            if not lowest:
                return new
            fewer = [(min(sparsity, lowest), names) for sparsity, names in asked]
            wider = new if fewer == asked else build_masks(layers, fewer, self.ranking, self.collected)
        names = self._names_of(asked)
        trained = {name: wider.masks[name] | mask for name, mask in new.masks.items() if name in names}
        return replace(new, trained={**self._dense.trained, **trained})

    def _ranked(self, asked: Asked) -> Layers:
        """The selected layers as they are ranked. With straight_through, pruned weights can be kept again."""
        if not self.is_straight_through:
            return self._selected
        names, widest = self._names_of(asked), self.all_masks.widest
        return {
            name: layer.with_mask(widest(layer), layer.level) if name in names else layer
            for name, layer in self._selected.items()
        }

    def _names_of(self, asked: Asked) -> set[str]:
        """The layers that are ranked for what is asked for, with those that they are coupled with."""
        coupling = self.ranking.coupling
        asked = asked if coupling is None else coupling.together(asked)
        return {name for _, several in asked for name in several}

    def wait_for_frozen(self) -> None:
        """From now on, leave out of an update the frozen layers that lack the gradients that it needs."""
        for each in self._all_collected:
            each.waits_for_frozen = True

    def resting(self, drop: float = 0.0) -> set[str]:
        """The layers that an update leaves out, with the masks that they have: see `wait_for_frozen`.

        Args:
            drop: As of `sparsify`. Weights only regrow in a layer that gradients reach, if they regrow by gradients.

        Returns:
            Names of these layers.
        """
        resting = set().union(*(each.resting for each in self._all_collected[: 2 if drop else 1]))
        coupling = self.ranking.coupling
        if coupling is None:
            return resting
        coupled = {coupling.part_of[name] for name in resting}
        return {name for name in self._selected if coupling.part_of[name] in coupled}

    @staticmethod
    def _without(resting: Collection[str], asked: Asked) -> Asked:
        """What is asked for, without some layers."""
        left = [(sparsity, [name for name in names if name not in resting]) for sparsity, names in asked]
        return [(sparsity, names) for sparsity, names in left if names]

    def _sparsify_in_steps(self, sparsity: Sparsity, steps: int) -> list[str]:
        """Build and apply masks in several steps; returns the notices. If a step fails, nothing has changed."""
        calibration, notices = self._calibration, []
        check_repeatable(self.collected, calibration)
        scopes(sparsity, self.layers, self.model)  # raises if a pattern matches no selected layer
        levels = {name: layer.level for name, layer in self._selected.items()}
        before = self._as_it_is()
        try:
            for step in range(1, steps + 1):
                if self.collected.looks_at_data and (step > 1 or self.collected.begins):
                    self.calibrate(*calibration)  # type: ignore[misc]
                new = self._new_masks(sparsity_at(step / steps, sparsity, levels, self.layers, self.model))
                notices += new.notices
                self._take(self._change_to(new))
        except BaseException:
            self._take(before)
            raise
        return list(dict.fromkeys(notices))

    def _change_to(self, new: NewMasks) -> Change:
        """The change to new masks, levels and random state, which are applied to the weights."""
        layers = {name: layer.with_mask(new.masks[name], new.levels[name]) for name, layer in self._selected.items()}
        # What was found in earlier updates may not have been read yet.
        attributes = [(self, {"_found": both(self._found, new.found)}), *self._noted(new.masks)]
        followers = self.all_masks.followers_of(layers)
        if self.is_straight_through:
            attributes.append((self._dense, {"trained": new.trained}))
        change = Change(layers, followers, attributes, new.random, new.weights, zeroes=True, is_update=True)
        return self._written(change)

    def _noted(self, masks: Mapping[str, Tensor]) -> list[tuple[Any, dict[str, Any]]]:
        """The attributes that count what these masks keep as used, for a Change."""
        return [] if self._regrowth is None else [(self._regrowth, {"used": self._regrowth.used_with(masks)})]

    def _as_it_is(self) -> Change:
        """The change that restores all that `sparsify` and `calibrate` change."""
        holders = [*self._all_collected, self.collected.source]
        attributes: list[tuple[Any, dict[str, Any]]] = [
            (self, {"_found": self._found, "_calibration": self._calibration})
        ]
        attributes += [(holder, dict(vars(holder))) for holder in holders]
        attributes.append((self._dense, self._dense.as_it_is()))
        parameters = map(self.model.get_parameter, self.all_masks)
        return Change(
            dict(self.layers), dict(self.all_masks.of_followers), attributes, self.collected.source.rng.get_state(),
            [(parameter, parameter.detach().clone()) for parameter in parameters],
        )  # fmt: skip

    def _carry_out(self, change: Change, newly: Any = None) -> None:
        super()._carry_out(change, newly)
        if change.random is not None:
            self.collected.source.rng.set_state(change.random)
        if change.is_update:
            for each in self._all_collected:
                each.take("update")

    def _all_with(self, change: Change) -> list[Any]:
        """Copies of the quantities as a change leaves them: those of the criterion, and those of regrowth or None."""
        copies = []
        for each in (self.collected, self._regrowth):
            copies.append(copy(each))
            for holder, attributes in change.attributes:
                if holder is each:
                    vars(copies[-1]).update(attributes)
        return copies

    @property
    def _all_collected(self) -> list[CollectedQuantities]:
        """The quantities of the criterion, and those of the criterion by which weights regrow."""
        return [self.collected] if self._regrowth is None else [self.collected, self._regrowth]

    # --- Data ---------------------------------------------------------------------------------------------------

    @checks_arguments
    def calibrate(self, batches: Iterable, loss_func: Callable | None = None) -> None:
        """Run batches through the model, to collect what the criterion needs of data.

        Modes, buffers, gradients and random generators are restored. With compensate, and for obs and sparsegpt, the
        batches are kept, and run again through a copy of the model in evaluation mode whenever weights are pruned: a
        pass for each layer, or for several that have the same input. One layer's curvature is in memory at a time.

        Args:
            batches: Batches: (input, target), (input, input, target), or dictionaries of named inputs.
            loss_func: A function of (output, target), or of (output, dictionary). Criteria of gradients need it.

        Raises:
            TypeError: `batches` is not a list of batches, or a loss is needed and missing.
            ValueError: The model or the loss fails, or no gradient or input reaches a selected layer. Nothing has
                changed then.
        """
        means = self._run(batches, loss_func)
        self._take(Change(attributes=[(self.collected, means), (self, {"_calibration": (batches, loss_func)})]))

    def keep_batches(self, batches: Iterable, loss_func: Callable | None = None) -> None:
        """Keep batches for compensate, obs and sparsegpt as `calibrate` does, but do not count them in any mean.

        For training loops whose gradients are collected already: movement is to sum up those of all steps.

        Args:
            batches: As of `calibrate`.
            loss_func: As of `calibrate`.

        Raises:
            TypeError: As `calibrate`.
            ValueError: As `calibrate`.
        """
        self._run(batches, loss_func)
        self._take(Change(attributes=[(self, {"_calibration": (batches, loss_func)})]))

    def _run(self, batches: Iterable, loss_func: Callable | None) -> dict[str, Any]:
        """The attributes of the collected quantities that have these batches in their means."""
        self._check_held("calibrate")
        self.select_unfrozen()
        options = self.ranking.options
        check_kept(options, batches)
        return calibrated(self.collected, batches, loss_func, passes_need_loss(options))

    def means_are_short(self, anew: bool = False) -> bool:
        """Whether the criterion needs batches of `calibrate`, since gradients of past steps are not enough.

        Args:
            anew: Whether these are not enough in any case, because layers have joined. Default False.

        Returns:
            Whether it does.
        """
        collected = self.collected
        return collected.looks_at_data and (anew or bool(collected.at(*CALIBRATED)) or collected.missing() is not None)

    @property
    def looks_at_data(self) -> bool:
        """Whether masks, or the weights that stay, depend on batches, so that `calibrate` is called for them."""
        return self.collected.looks_at_data or self.runs_batches

    @property
    def runs_batches(self) -> bool:
        """Whether the batches of `calibrate` are run whenever weights are pruned, by the criterion or to compensate."""
        return makes_passes(self.ranking.options)

    def collect_gradients(self) -> None:
        """Collect the gradients for a criterion that needs them. Call it after backward, before they are masked.

        `mask_gradients` calls it, so a plain training loop need not. Regrowth by gradients needs it before `sparsify`.

        A layer without a gradient, as one that the batch has skipped, counts as zero. A batch whose gradients are not
        all finite, as after an overflow under a GradScaler, is left out.

        Raises:
            ValueError: No selected layer has a gradient, or one is frozen.
        """
        self._check_held("collect_gradients")
        self.select_unfrozen()
        self._take(self._with_gradients())

    def _with_gradients(self) -> Change:
        """The gradients of a batch, as a change of the means."""
        return Change(attributes=[(each, each.with_gradients()) for each in self._all_collected])

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero. Call it after backward and before gradient clipping.

        With a GradScaler, call `scaler.unscale_(optimizer)` before. A criterion that needs gradients collects them
        first, if a selected layer has one. So call it once a step, also if several backward passes add up.

        With straight_through the gradients of pruned weights stay, because they move the dense weights: decay times the
        dense weight is added to them, and gradient_sparsity sets the lowest ones to zero.

        Raises:
            ValueError: With straight_through and a decay, a gradient is a sparse tensor.
        """
        self._check_held("mask_gradients")
        parameters = [layer.parameter for layer in self._selected.values()]
        seen = Change()
        if self.collected.at("backward") and any(parameter.grad is not None for parameter in parameters):
            self.select_unfrozen()
            seen = self._with_gradients()
        super().mask_gradients()
        self._take(seen)  # last, because a call that fails is made again, and no batch may count twice

    # --- What is measured ---------------------------------------------------------------------------------------

    @property
    def level(self) -> float:
        """The sparsity that was last asked for, averaged over the weights of the selected layers."""
        return level_of(self._selected.values())

    def report(self) -> Report:
        """Count the zeros of each layer and of the whole model.

        Returns:
            A table; its `plot` draws it.
        """
        self._check_held("report")
        self._check_found()
        return Report.measure(
            self.model, self.layers, self.ranking.options.context, self._regrowth, self.ranking.coupling
        )

    def plot_masks(
        self, layers: Pattern | Iterable[Pattern] | None = None, pixels: int = 128, ax: Any = None
    ) -> list[Any]:
        """Draw the masks of layers as images: what is kept is blue, what is pruned is white.

        Outputs are rows and inputs are columns. The kernels of a convolution are tiles, and orange lines separate the
        attention heads. In a layer that is larger than the image, a pixel is the share of its weights that are kept.

        Args:
            layers: Patterns of the layers to draw, as `layers=` of the Sparsifier takes them. Default: the first 16.
            pixels: The most pixels of an image along each side. Default 128.
            ax: One matplotlib axes, or as many as there are layers. Default: those of a new figure.

        Returns:
            The matplotlib axes, one for each layer.

        Raises:
            TypeError: A pattern is none, or `pixels` is not a whole number.
            ValueError: A pattern matches no pruned layer, `pixels` is less than 1, or there are not as many axes as
                layers.
        """
        self._check_held("plot_masks")
        return plot_masks(unwrapped(self.model), self.masks, layers, pixels, ax)

    def __repr__(self) -> str:
        options = self.ranking.options
        axes = ", ".join(map(name_of, (options.granularity, options.context, options.criteria)))
        if self.model is None:
            return f"Sparsifier without a model, which was released; {axes}"
        return f"Sparsifier of {kind_of(self.model)}: {len(self._selected)} layers, {self._in_words()}; {axes}"

    def _in_words(self) -> str:
        if self._change is not None:  # to measure would end the call, but a debugger that shows this changes nothing
            return "in an unfinished call"
        if self._dense.is_in_place:
            return "with dense weights"
        parameters = [layer.parameter for layer in self._selected.values()]
        weights = f"{sum(each.numel() for each in parameters):,} weights"
        # Sharded weights are measured by all processes together, but a repr is often asked for in one of them.
        if any(is_sharded(each) or each.is_meta for each in parameters):
            return weights
        return f"{percent(Count.of(*parameters).sparsity)} of {weights} are zero"

    # --- State --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Collect all that another Sparsifier of the same model and options needs to continue.

        Returns:
            Masks, levels, collected quantities and dense weights by parameter name, and the random state; for
            torch.save.
        """
        self._check_held("state_dict")
        return {
            "masks": self.masks,
            "levels": {name: layer.level for name, layer in self._selected.items()},
            "statistics": self.collected.state(),
            **({} if self._regrowth is None else {"regrowth": self._regrowth.state()}),
            "rng": self.collected.source.rng.get_state(),
            **({} if self._dense.decay is None else {"straight_through": self._dense.state()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, for the same model and the same options, and apply the masks.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: It is no such state, or names, shapes, types or quantities differ. Nothing has changed then.
        """
        self._check_held("load_state_dict", finish=False)  # what is unfinished is replaced
        joining = self._joining()
        layers = selected({**self.layers, **joining.layers})
        collected, regrowth = self._all_with(joining)
        loaded = read_state(state, layers, collected, regrowth, self._dense)
        weights = {name: layer.weight for name, layer in layers.items()}
        attributes: list[tuple[Any, dict[str, Any]]] = [
            (self.collected.source, {"layers": weights}), (self.collected, loaded.quantities)
        ]  # fmt: skip
        if self._regrowth is not None:
            attributes.append((self._regrowth, loaded.of_regrowth))
        if loaded.of_dense:
            attributes.append((self._dense, loaded.of_dense))
        followers = self.all_masks.followers_of(loaded.layers)
        self._take(Change(loaded.layers, followers, attributes, loaded.random, zeroes=True))

    def release(self) -> nn.Module:
        """Drop all references to the model. Its zeros stay until it is trained further.

        Returns:
            The model.
        """
        model, options = super().release(), self.ranking.options
        self.ranking, self._calibration, self._regrowth = Ranking(options), None, None
        self.collected = CollectedQuantities(options.criteria, Source(None, {}, self.collected.source.rng))  # type: ignore[arg-type]
        return model

    def __getstate__(self) -> dict[str, Any]:
        self._check_sparse("copy")
        self._finish()
        # A process group cannot be copied or pickled, so a copy works alone.
        return {**vars(self), "ranking": replace(self.ranking, process_group=None), "_calibration": None}
