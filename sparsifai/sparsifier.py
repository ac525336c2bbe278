"""The Sparsifier: builds masks from scores and applies them. W_sparse = W * M.

The core of the library is `Sparsifier.sparsify`; what it calls are the functions of the four axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .context import Context, contexts
from .criterion import Criterion, criteria, quantities_of
from .flow import find_flow
from .follower import find_followers, masks_of_followers
from .granularity import Granularity, Grouping, UnavailableError, granularities, poolings
from .level import Sparsity, check_sparsity, scopes
from .registry import name_of
from .report import Count, Report
from .selection import ScoredLayer, bundle
from .statistic import quantities
from .target import Target, find_targets, why_dense


class Sparsifier:
    """Makes any torch model sparse: what fraction of which weights, chosen how.

    model: any torch.nn.Module; its parameters stay the same objects under the same names, nothing is left on it.
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
        or inputs.

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
        self.model = model
        self.granularity, self.context, self.criterion, self.pool = resolve_axes(granularity, context, criteria, pool)
        self.round_to = check_round_to(round_to)
        self.rng = torch.Generator().manual_seed(seed)
        flow = cache(partial(find_flow, model, example_input))
        self.candidates = find_targets(model)
        groupings = {name: self._grouping(target) for name, target in self.candidates.items()}
        self.dense = why_dense(model, self.candidates, groupings, flow, layers, exclude)
        self.targets = {name: target for name, target in self.candidates.items() if name not in self.dense}
        if not self.targets:
            raise ValueError(f"Sparsifier: no layer of {type(model).__name__} is left to sparsify; {self._reasons()}")
        self.groupings = {
            name: each for name, each in groupings.items() if name in self.targets and not isinstance(each, str)
        }
        self.followers = find_followers(model, self.targets, self.groupings, flow)

        self.levels = dict.fromkeys(self.targets, 0.0)
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
        has changed.
        """
        self._check_held("sparsify")
        wanted = check_sparsity(sparsity, compression_ratio)
        masks, levels = dict(self.masks), dict(self.levels)
        parts = scopes(wanted, self.targets, self.dense, self.candidates, self.model)
        if any(fraction < levels[name] for fraction, names in parts for name in names):
            self.apply_masks()  # what comes back comes back as zero, whatever momentum has made of it since
        for fraction, names in parts:
            scored = [self._score(name) for name in names]
            for name, falls in zip(names, self._rank(scored, fraction), strict=True):
                if fraction >= levels[name]:
                    falls = falls | ~self.groupings[name].gather(masks[name])
                masks[name], levels[name] = self._mask_of(name, ~falls), fraction
        self._set_masks(masks)
        self.levels = levels
        self.apply_masks()
        self._take("update")

    def _score(self, name: str) -> ScoredLayer:
        """Score every group of a layer, from the quantities that the criterion names."""
        target, grouping = self.targets[name], self.groupings[name]
        scores = self.criterion(
            **{quantity: self._quantity(quantity, name) for quantity in quantities_of(self.criterion)}
        )
        if not isinstance(scores, Tensor) or scores.shape != target.parameter.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"criterion {name_of(self.criterion)} must return one score per weight: for {name} a tensor of the "
                f"shape {tuple(target.parameter.shape)}, not {got}"
            )
        scores = grouping.pool(scores.to(torch.promote_types(scores.dtype, torch.float32)), self.pool)
        score = scores.cpu().numpy()
        if len(score) and np.isnan(score.min()):
            raise ValueError(
                f"criterion {name_of(self.criterion)} gives NaN scores for {name}; look for NaN or inf in its weights"
            )
        masked = ~grouping.gather(self.masks[name]).cpu().numpy()
        size = grouping.size if isinstance(grouping.size, int) else grouping.size.numpy()
        return ScoredLayer(target, score, size, masked, whole=not grouping.indexed)

    def _rank(self, scored: list[ScoredLayer], fraction: float) -> list[Tensor]:
        """Ask the context which groups fall."""
        if self.round_to is None:
            ranked, bundles = scored, None
        else:
            pairs = [bundle(layer, self.round_to) for layer in scored]
            ranked, bundles = [layer for layer, _ in pairs], [of_group for _, of_group in pairs]
        fallen = [np.asarray(falls) for falls in self.context(ranked, fraction)]
        if [(falls.dtype, falls.shape) for falls in fallen] != [
            (np.dtype(bool), layer.score.shape) for layer in ranked
        ]:
            raise ValueError(
                f"context {name_of(self.context)} must return for each layer a bool array over its groups, True where "
                f"one falls; got {[(falls.dtype.name, falls.shape) for falls in fallen]}"
            )
        if bundles is not None:
            fallen = [falls[of_group] for falls, of_group in zip(fallen, bundles, strict=True)]
        return [torch.from_numpy(falls) for falls in fallen]

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Set the masked weights to zero, and with whole outputs what stands behind them: to be called after a step."""
        for parameter, mask in self._masked_parameters():
            _set_to_zero(parameter, mask)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of masked weights to zero: to be called after backward, before clipping."""
        for parameter, mask in self._masked_parameters():
            # A sparse gradient of an embedding is left: its zeros hold because masks are applied after the step.
            if parameter.grad is not None and parameter.grad.layout == torch.strided:
                _set_to_zero(parameter.grad, mask)

    # --- What can be seen ---------------------------------------------------------------------------------------

    @property
    def has_masked(self) -> bool:
        """Whether any weight is masked."""
        return not all(bool(mask.all()) for mask in self.masks.values())

    @property
    def sparsity(self) -> float:
        """Measured: zeros over weights of the layers that take part."""
        return Count.of(*(target.parameter for target in self.targets.values())).sparsity

    def report(self) -> Report:
        """Measured zeros per layer and in total; text, HTML in a notebook, `.plot()`."""
        self._check_held("report")
        return Report.measure(self.model, self.candidates, self.dense)

    def __repr__(self) -> str:
        axes = ", ".join(map(name_of, (self.granularity, self.context, self.criterion)))
        if self.model is None:
            return f"Sparsifier({axes}: released)"
        return f"Sparsifier({axes}: {len(self.targets)} layers, sparsity {self.sparsity:.4f})"

    # --- State --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks, levels, statistics and random state, keyed by parameter name; for torch.save."""
        self._check_held("state_dict")
        return {
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "levels": dict(self.levels),
            "statistics": {
                quantity: {name: value.clone() for name, value in values.items()}
                for quantity, values in self.statistics.items()
            },
            "rng": self.rng.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what state_dict gave, for the same model and the same axes, and apply the masks.

        ValueError, and nothing changed, if names, shapes or statistics differ.
        """
        self._check_held("load_state_dict")
        missing = {"masks", "levels", "statistics", "rng"} - set(state)
        if missing:
            raise ValueError(f"load_state_dict: no {sorted(missing)[0]!r} in the state; is it a Sparsifier's?")
        shapes = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        given = {name: tuple(mask.shape) for name, mask in state["masks"].items()}
        for name in sorted(shapes.keys() | given.keys()):
            if shapes.get(name) != given.get(name):
                raise ValueError(
                    f"load_state_dict: the mask of {name} has the shape {given.get(name)} in the state and "
                    f"{shapes.get(name)} here; use the same model, granularity, layers and exclude as when it was saved"
                )
        if state["statistics"].keys() != self.statistics.keys():
            raise ValueError(
                f"load_state_dict: the state has the quantities {sorted(state['statistics'])}, the criterion "
                f"{name_of(self.criterion)} needs {sorted(self.statistics)}; use the same criterion"
            )
        self._set_masks({name: state["masks"][name].to(mask.device, copy=True) for name, mask in self.masks.items()})
        self.levels = dict(state["levels"])
        self.statistics = {
            quantity: {name: value.to(self.targets[name].parameter.device, copy=True) for name, value in values.items()}
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
        masks = {}
        for name, target in self.targets.items():
            grouping = self.groupings[name]
            kept = grouping.members((target.parameter != 0).float()).amax(1) > 0
            if not kept.any():
                kept = torch.ones_like(kept)
            masks[name] = self._mask_of(name, kept)
            self.levels[name] = Count.of(masks[name].expand_as(target.parameter)).sparsity
        self._set_masks(masks)

    def adopt(self, other: Sparsifier) -> bool:
        """Mask the groups that another Sparsifier of the model has masked whole; returns whether that was all of it."""
        masks, complete = dict(self.masks), other.followers.keys() <= self.followers.keys()
        for name in self.masks.keys() & other.masks.keys():
            theirs = other.masks[name].expand_as(self.targets[name].parameter)
            kept = self.groupings[name].members(theirs.float()).amax(1) > 0
            masks[name] = self._mask_of(name, self.groupings[name].gather(masks[name]) & kept)
            complete = complete and not bool((masks[name] & ~theirs).any())
        self._set_masks(masks)
        return complete and other.masks.keys() <= self.masks.keys()

    def release(self) -> nn.Module:
        """Let go of the model and return it: its zeros stay, and nothing keeps them from here on."""
        self._check_held("release")
        model = self.model
        self.model = None  # type: ignore[assignment]
        self.candidates, self.targets, self.groupings, self.dense = {}, {}, {}, {}
        self.followers, self.statistics = {}, {}
        self._set_masks({})
        return model

    # --- Helpers ------------------------------------------------------------------------------------------------

    def _check_held(self, operation: str) -> None:
        if self.model is None:
            raise RuntimeError(f"{operation}: this Sparsifier has released its model; make a new one")

    def _reasons(self) -> str:
        reasons = [f"{name}: {reason}" for name, reason in self.dense.items()]
        more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
        if not reasons:
            return "no weights with named axes; name those of its layers: register_layer(kind, weight=('out', 'in'))"
        return f"{'; '.join(reasons[:5])}{more}. Choose another granularity, or name layers in layers="

    def _grouping(self, target: Target) -> Grouping | str:
        """How the granularity groups the weights of a layer, or why it cannot."""
        try:
            return Grouping.of(self.granularity, target.axes, target.convolution_groups)
        except UnavailableError as error:
            return str(error)

    def _set_masks(self, masks: dict[str, Tensor]) -> None:
        self.masks = masks
        self.follower_masks = masks_of_followers(self.followers, masks, self.targets, self.groupings)

    def _masked_parameters(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Every parameter with a mask, and the mask on its device."""
        self._check_held("apply_masks")
        pairs = []
        for masks in (self.masks, self.follower_masks):
            for name, mask in masks.items():
                target = self.targets.get(name)
                parameter = target.parameter if target else attrgetter(name)(self.model)
                if mask.device != parameter.device:
                    mask = masks[name] = mask.to(parameter.device)
                pairs.append((parameter, mask))
        return pairs

    def _mask_of(self, name: str, kept: Tensor) -> Tensor:
        return self.groupings[name].spread(kept).to(self.candidates[name].parameter.device)

    def _quantity(self, quantity: str, name: str) -> Any:
        """A quantity of a layer: computed now, or a copy of what is stored, so that no criterion can change it."""
        function = quantities[quantity]
        if "score" in function.moments:  # type: ignore[attr-defined]
            return function(self, name)
        return self.statistics[quantity][name].clone()

    def _take(self, moment: str) -> None:
        """Store the quantities that the criterion names and that are taken at this moment."""
        for quantity in quantities_of(self.criterion):
            function = quantities[quantity]
            if moment in function.moments:  # type: ignore[attr-defined]
                self.statistics[quantity] = {name: function(self, name) for name in self.targets}


def resolve_axes(
    granularity: Any, context: Any, criterion: Any, pool: Any = "mean"
) -> tuple[Granularity, Context, Criterion, Callable]:
    """Names -> functions, once; past this only functions travel."""
    return (
        granularities.resolve(granularity),
        contexts.resolve(context),
        criteria.resolve(criterion),
        poolings.resolve(pool),
    )


def check_round_to(round_to: Any) -> int | None:
    """A whole number from 1 on, or None."""
    if round_to is not None and (isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1):
        raise ValueError(f"round_to is a whole number of groups from 1 on, not {round_to!r}")
    return round_to


_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _set_to_zero(tensor: Tensor, mask: Tensor) -> None:
    """tensor *= mask on the bits, by which inf and NaN become zero too; on the CPU by numpy, several times faster."""
    bits = tensor.detach().view(_INTEGER[tensor.element_size()])
    if bits.device.type == "cpu":
        array = bits.numpy()
        np.multiply(array, mask.numpy(), out=array)
        torch.autograd.graph.increment_version(tensor)  # numpy's writing is unseen by autograd
    else:
        bits.mul_(mask)
