"""Regularizer: a penalty on the norms of groups of weights, which drives whole groups to zero during training.

The granularity and the criterion mean the same as for the Sparsifier. With single weights and large_final the penalty
is the lasso; with filters or attention heads it is the group lasso.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..axes.criterion import Criterion, is_elementwise, quantities_of
from ..axes.granularity import Granularity
from ..axes.grouping import Grouping
from ..axes.quantity import STORED, quantities
from ..model.layers import NamedWeight, find_weights
from ..model.parallel import own_shard, reshard, whole
from ..model.prunable import unprunable
from ..model.running import check_autograd
from ..model.tensors import check_values, cloned, widened
from ..sparsifier.layer import Layer, selected
from ..sparsifier.mask_building import checked_scores
from ..sparsifier.notices import notices_of_unprunable
from ..sparsifier.sparsifier import Sparsifier
from ..support.arguments import checks_arguments
from ..support.capability import capability
from ..support.registry import close_matches, name_of
from ..support.warning import warn_each


class Regularizer:
    """A penalty on the norms of groups of weights of a model.

    Weights that are frozen get no penalty while they are frozen.

    Args:
        model: Any torch.nn.Module.
        granularity: Which weights form a group: a name of `granularities`, a tuple of axes such as ('out', 'h'), or a
            function. Default "weight".
        criteria: The scores whose norms are penalized: a name of `criteria`, or a function of `weight`, `init` and
            `previous` through which gradients reach `weight`. `previous` equals `init` here. Default "large_final".
        layers: The layers to regularize, as for Sparsifier. Default all but embeddings.
        exclude: The layers to leave out, as for Sparsifier. Default none.
        example_input: A batch, for models that torch.fx cannot trace, as for Sparsifier. Default None.

    Raises:
        TypeError: The model is no torch.nn.Module, or an argument has the wrong type.
        ValueError: The criterion passes no gradient to the weight or does not give one score per weight; or what
            Sparsifier raises for these arguments.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> _ = nn.init.constant_(model[0].weight, 3.0)
        >>> regularizer = Regularizer(model, granularity='row', layers='0')
        >>> round(regularizer.penalty().item(), 4)  # two rows, each sqrt(2) * sqrt(3**2 + 3**2)
        12.0
    """

    @checks_arguments
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
        if isinstance(model, nn.Module):
            check_values("Regularizer", dict(model.named_parameters()))
            check_autograd("Regularizer", model)
        if isinstance(model, nn.Module) and layers is None:
            layers = _DefaultLayers(model)
        self.sparsifier = Sparsifier(
            model, granularity, "local", criteria, layers=layers, exclude=exclude, example_input=example_input
        )
        self._coupling: Any = self.sparsifier.ranking.coupling
        self._size_roots: dict[str, float | Tensor] = {}  # sqrt(|g|) of the groups g of each weight
        check_differentiable(self.sparsifier.collected.criterion)
        for name, layer in self._layers.items():
            size = layer.grouping.size
            self._size_roots[name] = size**0.5 if isinstance(size, int) else size.sqrt()
            self._check_scores(layer)
        if self._coupling:  # the size of a joint group is the sum of the sizes of its parts
            roots = {
                name: torch.as_tensor(root, dtype=torch.float64).expand(len(self._numbers(name)))
                for name, root in self._size_roots.items()
            }
            self._size_roots |= self._joint(roots)

    def penalty(self) -> Tensor:
        """The penalty: sum over groups g of sqrt(|g|) ||s_g||_2, with s the scores of the weights.

        |g| is the number of weights of the group; a group at the end of an axis may have fewer than the others. A
        group whose scores are all zero has a zero gradient. Negative scores are driven to zero as well, because the
        norm ignores the sign.

        Source: Tibshirani, 1996, "Regression Shrinkage and Selection via the Lasso", for single weights; Yuan and Lin,
        2006, "Model Selection and Estimation in Regression with Grouped Variables", for groups; Wen et al., 2016
        (arXiv:1608.03665), for filters and channels.

        Returns:
            A scalar to add to the loss, in float32 at least.
        """
        norms = {layer.name: self._norms_of(layer) for layer in self._trainable()}
        norms = self._joint(norms)
        parts = [
            (each * self._size_root(name, each)).sum().to(torch.promote_types(each.dtype, torch.float32))
            for name, each in norms.items()
        ]
        return torch.stack([part.to(parts[0]) for part in parts]).sum() if parts else torch.zeros(())

    @torch.no_grad()
    def proximal_step(self, threshold: float | Mapping[str, float]) -> None:
        """Shrink the norm of every group, and set groups with a small norm to zero. Call it after optimizer.step().

        W_g <- W_g max(0, 1 - threshold sqrt(|g|) / ||W_g||_2)

        It replaces the penalty in the loss, whose gradient brings groups close to zero, but not to zero. Zeros stay
        zeros. Only weights change: the bias and the norm parameters of a zeroed filter stay.

        Source: Parikh and Boyd, 2014, "Proximal Algorithms", section 6.5.

        Args:
            threshold: The learning rate times the factor of the penalty, at least 0. Or a dictionary {parameter name:
                threshold}, which changes the named weights only.

        Raises:
            ValueError: The criterion is not large_final, a threshold is not a finite number of at least 0, or a name
                is not that of a regularized weight.
        """
        check_proximal(self.sparsifier.collected.criterion)
        if not isinstance(threshold, Mapping):
            threshold = dict.fromkeys(self._layers, threshold)
        thresholds = {name: _check_threshold(name, value, self._size_roots) for name, value in threshold.items()}
        reshard(self.sparsifier.model)
        trainable = {layer.name: layer for layer in self._trainable()}
        norms = {
            name: _norms(each.grouping, widened(whole(each.parameter.detach()))) for name, each in trainable.items()
        }
        joint = self._joint(norms)
        for name, layer in trainable.items():
            if thresholds.get(name):
                weight, first = layer.parameter.detach(), self._first_of(name)
                of_groups = joint[first].to(weight.device)
                bounds = thresholds[name] * self._size_root(first, of_groups)
                factors = torch.where(of_groups > bounds, 1 - bounds / of_groups, 0)
                values, factors = own_shard(weight, layer.grouping.spread(self._of_layer(name, factors)))
                values.copy_(widened(values) * factors + 0.0)  # -1.0 times zero is -0.0

    @property
    def weights(self) -> dict[str, NamedWeight]:
        """The regularized weights by parameter name."""
        return {name: layer.weight for name, layer in self._layers.items()}

    @property
    def _layers(self) -> dict[str, Layer]:
        return selected(self.sparsifier.layers)

    def _trainable(self) -> list[Layer]:
        return [layer for layer in self._layers.values() if not layer.weight.is_frozen]

    def _norms_of(self, layer: Layer) -> Tensor:
        """The norm of the scores of each group of a layer."""
        return _norms(layer.grouping, self._scores(layer.name, widened(whole(layer.parameter))))

    def _first_of(self, name: str) -> str:
        """The layer under whose name the norms of the joint groups of a layer are; without such groups, itself."""
        return next(iter(self._coupling.part_of[name].channels)) if self._coupling else name

    def _numbers(self, name: str) -> Tensor:
        """For each group of a layer, the number of its joint group; the last number is that of no group."""
        part = self._coupling.part_of[name]
        return torch.from_numpy(np.where(part.channels[name] < 0, part.count, part.channels[name]))

    def _joint(self, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The norms of joint groups, from those of their parts; without such groups, the same."""
        if not self._coupling:
            return dict(norms)
        squares: dict[str, Tensor] = {}
        for name, each in norms.items():
            first = self._first_of(name)
            known = squares.get(first, each.new_zeros(self._coupling.part_of[name].count + 1))
            squares[first] = known.index_add(0, self._numbers(name).to(known.device), each.square().to(known))
        # The root has no gradient at zero, the norm has the gradient zero.
        return {
            first: torch.where(each > 0, torch.where(each > 0, each, 1).sqrt(), 0)[:-1]
            for first, each in squares.items()
        }

    def _of_layer(self, name: str, factors: Tensor) -> Tensor:
        """Factors of joint groups as those of the groups of a layer; what belongs to none has the factor 1."""
        if not self._coupling:
            return factors
        return torch.cat([factors, factors.new_ones(1)])[self._numbers(name).to(factors.device)]

    def _scores(self, name: str, weight: Tensor) -> Tensor:
        """The scores of a layer, with gradients to `weight`."""
        collected = self.sparsifier.collected
        values = {
            quantity: weight if quantity == "weight" else widened(collected.value(quantity, name))
            for quantity in collected.named
        }
        if not is_elementwise(collected.criterion):  # a user's function may change its arguments in place
            values = {quantity: cloned(value) for quantity, value in values.items()}
        return collected.criterion(**values)

    def _size_root(self, name: str, norms: Tensor) -> float | Tensor:
        """sqrt(|g|) of the groups of a layer, on the device of their norms."""
        root = self._size_roots[name]
        if isinstance(root, Tensor) and root.device != norms.device:
            root = self._size_roots[name] = root.to(norms.device)
        return root

    @torch.enable_grad()
    def _check_scores(self, layer: Layer) -> None:
        """Refuse a criterion that does not give one score per weight, or whose scores have no gradient."""
        weight = widened(whole(layer.parameter.detach())).requires_grad_()
        scores = checked_scores(self._scores(layer.name, weight), self.sparsifier.collected, layer)
        if not scores.requires_grad:
            raise ValueError(_no_penalty(self.sparsifier.collected.criterion, "returns scores without a gradient"))


def check_differentiable(criterion: Criterion) -> None:
    """Refuse a criterion whose named quantities pass no gradient to the weight.

    Args:
        criterion: A function of named quantities. It must name `weight`; all others must be stored values.

    Raises:
        ValueError: The criterion does not name `weight`, or names a quantity such as grad or activation.
    """
    named = quantities_of(criterion)
    if "weight" not in named:
        raise ValueError(_no_penalty(criterion, "does not use the present weight"))
    for each in named:
        if each != "weight" and not set(quantities[each].moments) <= set(STORED):  # type: ignore[attr-defined]
            raise ValueError(_no_penalty(criterion, f"uses {each}, through which no gradient reaches the weight"))


def check_proximal(criterion: Criterion) -> None:
    """Refuse a criterion whose penalty has no known proximal step.

    Args:
        criterion: The criterion of the penalty. It must declare `proximal`, as large_final does.

    Raises:
        ValueError: The criterion is another.
    """
    if not capability(criterion, "proximal", False):
        raise ValueError(
            f"a proximal step needs the criterion large_final, not {name_of(criterion)}; for other criteria, add the "
            "penalty to the loss instead"
        )


def _norms(grouping: Grouping, scores: Tensor) -> Tensor:
    """The l2 norm of every group."""
    return scores.abs().flatten() if grouping.single else torch.linalg.vector_norm(grouping.members(scores), dim=1)


def _no_penalty(criterion: Criterion, reason: str) -> str:
    return (
        f"criterion {name_of(criterion)} {reason}, so it cannot be a penalty; choose one that uses only weight, init "
        "and previous, such as large_final, movement or magnitude_increase"
    )


def _check_threshold(name: str, value: Any, known: Mapping[str, Any]) -> float:
    if name not in known:
        raise ValueError(f"proximal_step: {name!r} is not a regularized weight; {close_matches(name, known)}")
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)) or not 0 <= float(value) < float("inf"):
        raise ValueError(f"proximal_step: a threshold must be a finite number of at least 0, not {value!r}")
    return float(value)


class _DefaultLayers:
    """Selects the layers that are regularized by default: frozen ones too, since they may be trained later."""

    def __init__(self, model: nn.Module):
        named, fixed = find_weights(model), unprunable(model)
        reasons = {name: fixed[own] for name, weight in named.items() for own in weight.names & fixed.keys()}
        warn_each(notices_of_unprunable("Regularizer", reasons, len(named)))
        weights = [weight for name, weight in named.items() if not weight.is_embedding and name not in reasons]
        # Selecting a weight that is computed from others is an error; a frozen one can be left out without a loss.
        chosen = [weight for weight in weights if not (weight.sources and weight.is_frozen)]
        self.modules = {id(module) for weight in chosen for _, module in weight.owners}

    def __call__(self, name: str, module: nn.Module) -> bool:
        return id(module) in self.modules
