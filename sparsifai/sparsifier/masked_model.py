"""A model and the masks of its weights: found, applied, measured. `Sparsifier` is one that builds masks, too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.granularity import Granularity
from ..axes.grouping import grouping_of
from ..axes.ranking.scored_layer import nan_message
from ..model.layers import find_weights, parameter_of
from ..model.parallel import is_sharded, process_group_of, reshard, unwrapped, whole
from ..model.tracing import find_flow
from ..model.zeros import Count
from .coupled import Coupling, couple
from .followers import find_followers, masks_of_followers
from .masking import newly_masked, zero_gradients, zero_moments, zero_weights
from .report import Report
from .taking_part import reasons_to_stay_dense


class MaskedModel:
    """A model, which of its weights take part, and a mask for each of these.

    model, granularity, layers, exclude, example_input, coupled: as of Sparsifier. fewest: groups of a layer that stay.
    masks: parameter name -> bool tensor, False where a weight is zero; in the shape of the weight, but of size 1 along
    axes that a group spans. follower_masks: of what stands behind whole outputs that are masked.
    """

    def __init__(
        self,
        model: nn.Module,
        granularity: Granularity,
        layers: Any,
        exclude: Any,
        fewest: int,
        example_input: Any,
        coupled: bool = False,
    ):
        self.group = process_group_of(model)
        self.model = model = unwrapped(model)
        flow = cache(partial(find_flow, model, example_input))
        self.candidates = find_weights(model)
        groupings = {
            name: grouping_of(granularity, target.axes, target.convolution_groups, fewest)
            for name, target in self.candidates.items()
        }
        self.dense = reasons_to_stay_dense(model, self.candidates, groupings, flow, layers, exclude)
        self.coupling: Coupling | None = None
        if coupled:
            self.coupling, more = couple(model, example_input, self.candidates, groupings, self.dense)
            self.dense |= more
        self.targets = {name: target for name, target in self.candidates.items() if name not in self.dense}
        self.groupings = {
            name: each for name, each in groupings.items() if name in self.targets and not isinstance(each, str)
        }
        self.followers = find_followers(model, self.targets, self.groupings, flow)
        self._nan: dict[str, Tensor] = {}  # whether scores of a layer on a GPU were NaN, at the last update
        self._set_masks({name: self._mask_of(name, grouping.all_kept()) for name, grouping in self.groupings.items()})

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
        return Report.measure(self.model, self.candidates, self.dense, self._notes())

    def _notes(self) -> dict[str, str]:
        """What the report says of layers that take part, by name."""
        return {}

    def rescaled_layers(self) -> list[str]:
        """Layers whose outputs go through a batch norm, of those that lose whole outputs."""
        holders = {name: self.model.get_submodule(name.rpartition(".")[0]) for name in self.followers}
        norms = [name for name, module in holders.items() if isinstance(module, nn.modules.batchnorm._NormBase)]
        rescaled = {producer for name in norms for producer in self.followers[name]}
        return [name for name in self.targets if name in rescaled]

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
        self.followers, self._nan, self.coupling = {}, {}, None
        self._set_masks({})
        return model

    def _set_masks(self, masks: dict[str, Tensor]) -> None:
        self.masks = masks
        self.follower_masks = masks_of_followers(self.followers, masks, self.targets, self.groupings)
        if self.coupling is not None and masks:
            alive = {name: self.groupings[name].gather(mask) for name, mask in masks.items()}
            self.follower_masks |= self.coupling.masks_of_norms(alive, self.model)

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

    def newly_masked(self, before: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """As masked_parameters, but of weights only those that the masks `before` did not mask. See masking.py."""
        weights = {id(self.targets[name].parameter): before[name] for name in self.masks}
        return [
            (parameter, newly_masked(parameter, weights[id(parameter)], mask) if id(parameter) in weights else mask)
            for parameter, mask in self.masked_parameters()
        ]

    def _masks_of_zeros(self) -> dict[str, Tensor]:
        """A mask for each layer of the groups that are all zero; none for a layer that is all zero."""
        masks = {}
        for name, target in self.targets.items():
            kept = self.groupings[name].any_of(whole(target.parameter.detach()) != 0)
            masks[name] = self._mask_of(name, kept if kept.any() else torch.ones_like(kept))
        return masks

    def _count(self, masks: Mapping[str, Tensor]) -> Count:
        """Zeros of masks in the shapes of their weights."""
        return Count.of(*(mask.expand_as(self.targets[name].parameter) for name, mask in masks.items()))

    def _mask_of(self, name: str, kept: Tensor) -> Tensor:
        parameter = self.candidates[name].parameter
        mask = self.groupings[name].spread(kept).to(parameter.device)
        if mask.shape == parameter.shape and not is_sharded(parameter) and mask.stride() != parameter.stride():
            # In another order of memory than its weight it would be slow to apply.
            return torch.empty_like(parameter, dtype=torch.bool).copy_(mask)
        return mask

    def _check_held(self, operation: str) -> None:
        if self.model is None:
            raise RuntimeError(f"{operation}: this Sparsifier has released its model; make a new one")
        reshard(self.model)

    def _check_nan(self) -> None:
        flags, self._nan = self._nan, {}
        for name, flag in flags.items():
            if flag:
                raise ValueError(nan_message(name))
