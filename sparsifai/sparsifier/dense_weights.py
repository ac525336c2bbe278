"""Straight-through training: dense weights are kept beside the sparse ones, and only the optimizer's step moves them.

    sparse weights:  W * M, with which the model computes    dense weights:  W, which are ranked for the next masks

The gradients are taken at the sparse weights and move the dense ones, as if the mask were not there. So a pruned weight
goes on learning, and is kept again once it ranks high enough. A parameter of the model holds the sparse weights, in its
own memory. Only for a step of the optimizer, and while weights are ranked, it gets the memory of the dense ones.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..support.at_end import AtEnd
from ..support.printable import printable
from ..support.warning import warn
from .dense_checks import BACKWARD_INSIDE, MOVED_ELSEWHERE, UNPREPARED, check_can_be_kept, check_can_be_pulled
from .masking import add_pull, is_masked_zero, write_masked, zero_masked
from .model_masks import ModelMasks

# The pull of pruned weights towards zero of Zhou et al., 2021, who chose it for the training of N:M sparse networks.
DECAY = 2e-4


class DenseWeights:
    """The dense weights of a model, from the first pruning on, until the masks are settled.

    Where a weight is kept, the parameter of the model has its value, so that a checkpoint can be loaded into the model.
    Where it is pruned, its value is here.

    Attributes:
        model: The model.
        masks: Parameter name -> mask, a live view of the masks of the Sparsifier.
        decay: The strength of the pull of pruned weights towards zero. None without straight-through training.
        is_settled: Whether the masks are fixed, and no dense weights are kept any more.
        values: Parameter name -> the dense weight. Empty if none are kept.
        trained: Parameter name -> mask of the weights that get gradients, where these are not all weights.
        is_whole: Whether `values` are right where weights are kept, too, while the parameters are not: in the middle of
            a step or of a change.
        is_prepared: Whether the gradients were prepared for the next step.
    """

    def __init__(self, model: nn.Module | None, masks: ModelMasks, decay: float | None = None):
        self.model: Any = model
        self.masks, self.decay, self.is_settled = masks, decay, False
        self.values: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}
        self.is_whole = self.is_prepared = False
        self._seen: dict[str, tuple[int, int]] = {}  # the version of each parameter when it last had the sparse weights
        self._own: dict[str, Tensor] = {}  # the memory of each parameter that has the memory of the dense weights

    @property
    def are_ranked(self) -> bool:
        """Whether masks are ranked from dense weights."""
        return self.decay is not None and not self.is_settled

    @property
    def is_in_place(self) -> bool:
        """Whether the parameters have the memory of the dense weights."""
        return bool(self._own)

    def pairs(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Each parameter whose dense weight is kept: its name, the parameter, its mask."""
        for name in self.values:
            parameter = self._parameter(name)
            yield name, parameter, self.masks[name].to(parameter.device)

    def _parameter(self, name: str) -> nn.Parameter:
        layer = self.masks.layers.get(name)
        return attrgetter(name)(self.model) if layer is None else layer.parameter

    @torch.inference_mode(False)  # what is made in this mode could not be changed outside of it
    @torch.no_grad()
    def take_up(self) -> None:
        """Keep the weights as they are now, of the parameters whose dense weights are not kept yet.

        Raises:
            ValueError: A parameter is sharded, or was made in inference mode.
        """
        missing = {name: self._parameter(name) for name in self.masks if name not in self.values}
        for name, parameter in missing.items():
            check_can_be_kept(name, parameter)
        self.values.update({name: parameter.detach().clone() for name, parameter in missing.items()})

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self, by_value: bool = False) -> bool:
        """Take over what has changed in the parameters since they last had the sparse weights, as by a checkpoint.

        Args:
            by_value: Whether to look at all values. torch does not count what is written through `.data`, as by the
                optimizers of fastai. Default: only at the parameters in which torch has counted a change.

        Returns:
            Whether torch has counted none.
        """
        if self.is_in_place:
            return True
        changed, uncounted = [], []
        for each in self.pairs():
            name, parameter, _ = each
            if (self.values[name].device, self.values[name].dtype) != (parameter.device, parameter.dtype):
                self.values[name] = self.values[name].to(parameter)
            if self.is_whole:
                continue
            if self._seen.get(name) != _version_of(parameter):
                changed.append(each)
            elif by_value:
                uncounted.append(each)
        if self.is_whole:  # the sparse weights could not be written
            self.write()
        # The host would wait for a GPU to read values, so it does that only where there is a change.
        read = changed + [each for each in uncounted if not each[1].is_cuda]
        if not is_masked_zero([(parameter, mask) for _, parameter, mask in read]):
            warn(MOVED_ELSEWHERE)
        for name, parameter, mask in changed + uncounted:
            if self.values[name].stride() != parameter.stride():
                self.values[name] = torch.empty_like(parameter.detach()).copy_(self.values[name])
            self.values[name].copy_(torch.where(mask, parameter.detach(), self.values[name]))
            zero_masked(parameter, mask)
            self._seen[name] = _version_of(parameter)
        return not changed

    @torch.no_grad()
    def write(self, changed: Mapping[int, Sequence[Tensor]] | None = None) -> None:
        """Write the sparse weights, W * M, into the parameters.

        Args:
            changed: `id` of a parameter -> the weights that are newly pruned and those that are newly kept, as
                `newly_masked` gives them. Default: all are written.
        """
        for name, parameter, mask in self.pairs():
            pruned, kept = (changed or {}).get(id(parameter), (mask, mask))
            if pruned.dtype == kept.dtype == torch.long:
                memory = parameter.detach().view(-1)
                memory[pruned] = 0
                memory[kept] = self.values[name].view(-1)[kept]
            else:
                write_masked(parameter, self.values[name], mask)
            self._seen[name] = _version_of(parameter)
        self.is_whole = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the parameters the memory of the dense weights in a `with` block, to be read."""
        if not self.values or self.is_in_place:
            yield
            return
        self.refresh()
        at_end = AtEnd(self._put_back)
        with at_end, at_end:
            self._put_in()
            yield

    @contextmanager
    def stepped(self) -> Iterator[None]:
        """The same, for a step of the optimizer, which moves the dense weights. The sparse weights are written then.

        Raises:
            RuntimeError: A backward pass is made in the block.
        """
        if not self.values:
            yield
            return
        with self.in_place():
            self.is_whole = True
            learning = [(name, parameter) for name, parameter, _ in self.pairs() if parameter.requires_grad]
            hooks = [each.register_post_accumulate_grad_hook(partial(self._refuse, name)) for name, each in learning]
            versions = [each._version for _, each in learning]
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()
            moved = versions != [each._version for _, each in learning]
        if moved:
            is_prepared, self.is_prepared = self.is_prepared, False
            if (self.decay or self.trained) and not is_prepared:
                warn(UNPREPARED)

    def _refuse(self, name: str, _: Tensor) -> None:
        if self.is_in_place:  # or an interrupt has kept the hook from being removed
            raise RuntimeError(BACKWARD_INSIDE.format(printable(name)))

    def _put_in(self) -> None:
        for name, parameter, _ in self.pairs():
            self._own[name] = parameter.data  # before the parameter is changed, for `_put_back`
            parameter.data = self.values[name]

    def _put_back(self) -> None:
        for name, memory in self._own.items():
            self._parameter(name).data = memory
        self._own = {}
        if self.is_whole:  # after a step
            self.write()

    @torch.no_grad()
    def mask_gradients(self, names: Container[str]) -> None:
        """Pull pruned weights towards zero, g + decay (1 - M) W; zero the gradients of weights that are not trained.

        Args:
            names: Names of the parameters that are pulled.

        Raises:
            ValueError: There is a pull, and a gradient is a sparse tensor.
        """
        self.is_prepared = True
        self.refresh()
        graded = [(*each, each[1].grad) for each in self.pairs() if each[1].grad is not None]
        if self.decay:
            check_can_be_pulled({name: gradient for name, _, _, gradient in graded})
        for name, parameter, mask, gradient in graded:
            if self.decay and name in names:
                add_pull(gradient, self.values[name], parameter, self.decay)
            if name in self.trained and gradient.layout == torch.strided:
                # Masks that were given since the weights were ranked can keep others. What is kept learns.
                zero_masked(gradient, self.trained[name].to(parameter.device) | mask)

    @staticmethod
    def changed(
        values: dict[str, Tensor] | None = None, trained: dict[str, Tensor] | None = None, settled: bool = False
    ) -> dict[str, Any]:
        """The attributes that keep these values where weights are pruned, by default none, for a Change."""
        kept = {"values": values or {}, "trained": trained or {}}
        return {**kept, "is_settled": settled, "is_whole": False, "_seen": {}}

    @torch.inference_mode(False)
    @torch.no_grad()
    def state(self) -> dict[str, Any]:
        """The dense weights, what of them gets gradients, and whether masks are settled, for `state_dict`."""
        self.refresh(by_value=True)
        values = {name: value.as_subclass(Tensor).clone() for name, value in self.values.items()}
        return {"values": values, "trained": dict(self.trained), "settled": self.is_settled}

    def as_it_is(self) -> dict[str, Any]:
        """The attributes as they are now, for a Change."""
        return self.changed(**self.state())


def _version_of(parameter: Tensor) -> tuple[int, int]:
    """What changes with the memory and the values of a parameter."""
    return parameter.data_ptr(), parameter._version
