"""The Regularizer: norms of groups of weights as a penalty, which drives whole groups to zero while a model trains.

How and what are those of the Sparsifier: with single weights and large_final the penalty is the lasso's, with filters
the group lasso's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.criterion import Criterion, is_elementwise, large_final, quantities_of
from ..axes.granularity import Granularity
from ..axes.grouping import Grouping
from ..axes.quantity import STORED, quantities
from ..model.layers import NamedWeight, find_weights
from ..model.parallel import own_shard, reshard, whole
from ..model.tensors import cloned, widened
from ..sparsifier.sparsifier import Sparsifier
from ..support.registry import close_matches, name_of


class Regularizer:
    """Charges a model for the norms of groups of its weights.

    model, layers, exclude, example_input: as of Sparsifier; but weights that are frozen are left alone while they are.
    granularity: how. A name of `granularities`, a tuple of axes such as ('out', 'h'), or a function.
    criteria: what. A name of `criteria` or a function that can be differentiated by `weight`, and names nothing else
        but what is fixed: `init`, and `previous`, which is the same here.

    ValueError and TypeError where the arguments cannot work on the model.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> _ = nn.init.constant_(model[0].weight, 3.0)
    >>> regularizer = Regularizer(model, granularity='row', layers='0')
    >>> round(regularizer.penalty().item(), 4)  # of each row the root of 2 times the root of 3^2 + 3^2
    12.0
    """

    def __init__(
        self,
        model: nn.Module,
        granularity: str | tuple[str, ...] | Granularity = "weight",
        criteria: str | Criterion = "large_final",
        *,
        layers: Any = None,
        exclude: Any = None,
        example_input: Any = None,
    ):
        if isinstance(model, nn.Module) and layers is None:
            layers = _ByDefault(model)
        self.sparsifier = Sparsifier(
            model, granularity, "local", criteria, layers=layers, exclude=exclude, example_input=example_input
        )
        self._roots: dict[str, float | Tensor] = {}  # of the sizes of groups
        check_differentiable(self.sparsifier.criteria)
        for name, target in self.sparsifier.targets.items():
            size = self.sparsifier.groupings[name].size
            self._roots[name] = size**0.5 if isinstance(size, int) else size.sqrt()
            self._check_scores(name, target)

    def penalty(self) -> Tensor:
        """Sum over groups g of sqrt(|g|) ||s_g||_2, s being the scores of the weights: a scalar to add to the loss.

        |g|: weights of the group, fewer in those at the end of an axis. It is computed in float32 at least. The
        gradient of a group whose scores are all zero is zero. Scores that can be negative are pulled to zero, too, for
        their norm does not know their sign.

        Tibshirani, 1996, of single weights; Yuan and Lin, 2006, of groups; Wen et al., 2016 (arXiv:1608.03665), of
        filters, channels and more.
        """
        parts = [self._penalty_of(name, target) for name, target in self._trained()]
        return torch.stack([part.to(parts[0]) for part in parts]).sum() if parts else torch.zeros(())

    @torch.no_grad()
    def proximal_step(self, threshold: float | Mapping[str, float]) -> None:
        """W_g <- W_g max(0, 1 - threshold sqrt(|g|) / ||W_g||), which makes whole groups exactly zero; after a step.

        threshold: the learning rate times the weight of the penalty; or {parameter name: threshold}, others left alone.
        It takes the place of the penalty in the loss, whose gradient leaves groups near zero. Zeros stay zeros. Only
        weights change: a filter that has become zero keeps its bias and its part in a norm layer.

        ValueError with a criterion other than large_final. Parikh and Boyd, 2014, "Proximal Algorithms", section 6.5.
        """
        check_proximal(self.sparsifier.criteria)
        if not isinstance(threshold, Mapping):
            threshold = dict.fromkeys(self.sparsifier.targets, threshold)
        thresholds = {name: _check_threshold(name, value, self._roots) for name, value in threshold.items()}
        reshard(self.sparsifier.model)
        for name, target in self._trained():
            if thresholds.get(name):
                grouping = self.sparsifier.groupings[name]
                norms = _norms(grouping, widened(whole(target.parameter.detach())))
                bounds = thresholds[name] * self._root_of(name, norms)
                share = torch.where(norms > bounds, 1 - bounds / norms, 0)
                weights, share = own_shard(target.parameter.detach(), grouping.spread(share))
                weights.copy_(widened(weights) * share)

    def _trained(self) -> Iterator[tuple[str, NamedWeight]]:
        return ((name, target) for name, target in self.sparsifier.targets.items() if not target.is_frozen)

    def _penalty_of(self, name: str, target: NamedWeight) -> Tensor:
        norms = _norms(self.sparsifier.groupings[name], self._scores(name, widened(whole(target.parameter))))
        return (norms * self._root_of(name, norms)).sum().to(torch.promote_types(target.parameter.dtype, torch.float32))

    def _scores(self, name: str, weight: Tensor) -> Tensor:
        """The scores of a layer, through which gradients reach `weight`."""
        collected, criterion = self.sparsifier.collected, self.sparsifier.criteria
        values = {
            quantity: weight if quantity == "weight" else widened(collected.value(quantity, name, self.sparsifier))
            for quantity in collected.named
        }
        if not is_elementwise(criterion):  # of which one could change what it is given
            values = {quantity: cloned(value) for quantity, value in values.items()}
        return criterion(**values)

    def _root_of(self, name: str, norms: Tensor) -> float | Tensor:
        """The root of the sizes of the groups of a layer, on its device."""
        root = self._roots[name]
        if isinstance(root, Tensor) and root.device != norms.device:
            root = self._roots[name] = root.to(norms.device)
        return root

    @torch.enable_grad()
    def _check_scores(self, name: str, target: NamedWeight) -> None:
        """ValueError unless there is one score per weight, and it can be differentiated by the weight."""
        criterion = self.sparsifier.criteria
        scores = self._scores(name, widened(whole(target.parameter.detach())).requires_grad_())
        if not isinstance(scores, Tensor) or scores.shape != target.parameter.shape or scores.is_complex():
            got = f"{tuple(scores.shape)}, {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"criterion {name_of(criterion)} must return one real score per weight: for {name} a tensor of the "
                f"shape {tuple(target.parameter.shape)}, not {got}"
            )
        if not scores.requires_grad:
            raise ValueError(_message(criterion, "gives scores that cannot be differentiated by the weight"))


def _norms(grouping: Grouping, scores: Tensor) -> Tensor:
    """The l2 norm of every group."""
    return scores.abs().flatten() if grouping.single else torch.linalg.vector_norm(grouping.members(scores), dim=1)


def check_differentiable(criterion: Criterion) -> None:
    """ValueError unless the criterion is one of the weight and of what is fixed."""
    named = quantities_of(criterion)
    if "weight" not in named:
        raise ValueError(_message(criterion, "is not one of the weight as it is"))
    for each in named:
        if each != "weight" and not set(quantities[each].moments) <= set(STORED):  # type: ignore[attr-defined]
            raise ValueError(_message(criterion, f"asks for {each}, through which no gradient reaches the weight"))


def check_proximal(criterion: Criterion) -> None:
    """ValueError unless the proximal step of the penalty of this criterion is known."""
    if criterion is not large_final:
        raise ValueError(
            f"a proximal step is one of the norms of weights, so of criterion large_final, not {name_of(criterion)}; "
            "add the penalty to the loss instead"
        )


def _message(criterion: Criterion, reason: str) -> str:
    return (
        f"criterion {name_of(criterion)} {reason}, so it makes no penalty; choose one of weight, init, previous, such "
        "as large_final, movement or magnitude_increase"
    )


def _check_threshold(name: str, value: Any, known: Mapping[str, Any]) -> float:
    if name not in known:
        raise ValueError(f"proximal_step: no weight {name!r} is regularized; {close_matches(name, known)}")
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)) or not 0 <= float(value) < float("inf"):
        raise ValueError(f"proximal_step: a threshold is a number from 0 on, not {value!r}")
    return float(value)


class _ByDefault:
    """Selects what takes part by default, and what is frozen, for it may be trained later."""

    def __init__(self, model: nn.Module):
        targets = [target for target in find_weights(model).values() if not target.is_embedding]
        chosen = [target for target in targets if not (target.sources and target.is_frozen)]
        self.modules = {id(module) for target in chosen for _, module in target.owners}

    def __call__(self, name: str, module: nn.Module) -> bool:
        return id(module) in self.modules
