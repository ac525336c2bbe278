"""Passes over the batches of `calibrate`, that yield the curvature of one layer after the other.

A pass runs a copy of the model in evaluation mode, whose selected weights can be replaced. So nothing of the model
changes, whatever happens, and a layer's inputs can be those that the layers before it give when these are pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.curvature import Curvature, added, zeros_for
from ..model.hooks import hooked, input_of
from ..model.input_columns import columns_of, is_explained
from ..model.layers import CONVOLUTIONS, NamedWeight
from ..model.running import in_modes, not_drawn_from, random_restored, run, shell_of, without_fast_path
from ..model.tensors import all_finite, with_autograd
from ..support.listing import in_short
from ..support.printable import message_of, printable
from ..support.progress import progress
from .calibration import has_rows, parts_of


class _ReachedError(BaseException):
    """All calls of the layers of a pass were seen, so that the batch need not run to its end."""


@dataclass(eq=False)
class _Calls:
    """What a first pass has found out of a layer.

    Attributes:
        inputs: Number of a batch -> for each call in it, the number of the input tensor. Layers that read the same
            tensors in all calls, such as query, key and value, have the same curvature.
        unfolding: What a convolution does to its input; empty for other layers.
    """

    unfolding: str
    inputs: dict[int, list[int]] = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        """Equal for layers that have the same columns in all calls."""
        return self.unfolding, *((number, *inputs) for number, inputs in self.inputs.items())


class Passes:
    """The curvatures of layers, from the batches of `calibrate`.

    Args:
        model: The model.
        layers: Parameter name -> the weight of a layer whose curvature is asked for.
        calibration: The batches, and the loss or None.
        kind: The kind of curvature: InputCurvature or FisherCurvature.
        process_group: The processes that hold replicas of the model, whose batches count together; or None.
        masks: Parameter name -> mask, of all weights that the copy of the model has masked. Default none.
        may_skip: Whether a layer may have no gradient.

    Attributes:
        weights: Parameter name -> the weight in the copy of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, NamedWeight],
        calibration: tuple[Iterable, Callable | None],
        kind: Any,
        process_group: Any = None,
        masks: Mapping[str, Tensor] | None = None,
        may_skip: bool = False,
    ):
        self._original, self._layers, self._kind, self._group = model, layers, kind, process_group
        self._batches, self._loss_func = calibration
        self._may_skip = may_skip
        parameters = {name: layer.parameter for name, layer in layers.items()}
        masked = {name: model.get_parameter(name) for name in masks or {} if name not in parameters}
        with in_modes(), torch.inference_mode(False):
            copies = {name: each.detach() for name, each in {**masked, **parameters}.items()}
            if not kind.needs_loss:  # else they are not replaced
                copies = {name: each.clone() for name, each in copies.items()}
            for name, mask in (masks or {}).items():
                copies[name].masked_fill_(~mask.to(copies[name].device), 0)
        self.weights = {name: copies[name].requires_grad_(kind.needs_loss) for name in parameters}
        self._copy = shell_of(model, {each: copies[name] for name, each in {**masked, **parameters}.items()})
        owners: dict[int, list[nn.Module]] = {}
        for module in self._copy.modules():
            for held in module._parameters.values():
                owners.setdefault(id(held), []).append(module)
        self._owners = {name: owners.get(id(weight), []) for name, weight in self.weights.items()}

    def curvatures(self) -> Iterator[tuple[str, Curvature]]:
        """Yield parameter names and curvatures, in the order in which the layers run.

        One curvature is in memory after the other, if the caller deletes what it got. What `replaced` has given a
        layer counts for those behind it. Layers are left out whose weight is not multiplied with their input, or whose
        input is not seen.

        Raises:
            ValueError: The model fails on a batch, no gradient reaches a layer, or there is NaN or inf.
        """
        if self._layers:
            yield from self._fisher() if self._kind.needs_loss else self._of_inputs()

    def replaced(self, name: str, values: Tensor) -> Tensor:
        """Give a layer of the copy of the model other weights. Returns the tensor that holds them."""
        return self.weights[name].copy_(values)

    def _of_inputs(self) -> Iterator[tuple[str, Curvature]]:
        together: dict[tuple, list[str]] = {}
        calls = self._calls()
        for name, each in calls.items():
            together.setdefault(each.key, []).append(name)
        for names in progress(list(together.values()), "layer by layer", name=_first):
            curvature = self._from_inputs(names[0], calls[names[0]])
            for name in names:
                yield name, replace(curvature, form=self._kind.form_of(self._layers[name]))
            del curvature  # before the next one is made

    def _calls(self) -> dict[str, _Calls]:
        """The calls of all layers whose columns are seen, in the order in which they run."""
        found: dict[str, _Calls] = {}
        unexplained: set[str] = set()
        latest: list[Any] = [None, 0, 0]  # the last input, its version and its number
        present = [0]

        def hook(name: str, owner: nn.Module) -> Callable:
            def see(module: nn.Module, inputs: tuple, named: dict[str, Any], output: Any) -> None:
                value = input_of(owner, inputs, named)
                if name in unexplained or (isinstance(value, Tensor) and not value.numel()):
                    return
                if not is_explained(self._layers[name], module, value, output):
                    unexplained.add(name)
                    return
                if value is not latest[0] or value._version != latest[1]:
                    latest[:] = value, value._version, latest[2] + 1
                calls = found.setdefault(name, _Calls(_unfolding_of(module)))
                calls.inputs.setdefault(present[0], []).append(latest[2])

            return see

        def each(number: int, inputs: Any, targets: tuple) -> None:
            present[0] = number
            run(self._copy, inputs)

        with hooked(after=[(owner, hook(name, owner)) for name, owners in self._owners.items() for owner in owners]):
            self._pass(each)
        return {name: calls for name, calls in found.items() if name not in unexplained}

    def _from_inputs(self, name: str, calls: _Calls) -> Curvature:
        """The curvature of the inputs of a layer."""
        weight = self._layers[name]
        total, seen, left = zeros_for(self._kind, weight), [0], [0]

        def hook(owner: nn.Module) -> Callable:
            def see(module: nn.Module, inputs: tuple, named: dict[str, Any], output: Any) -> None:
                value = input_of(owner, inputs, named)
                if not value.numel():
                    return
                for columns in columns_of(weight, module, value):
                    added(total, columns)
                    seen[0] += columns.shape[-1]
                left[0] -= 1
                if not left[0]:
                    raise _ReachedError

            return see

        def each(number: int, inputs: Any, targets: tuple) -> None:
            left[0] = len(calls.inputs.get(number, ()))
            if left[0]:
                with suppress(_ReachedError):
                    run(self._copy, inputs)

        with hooked(after=[(owner, hook(owner)) for owner in self._owners[name]]):
            self._pass(each)
        return self._finished(name, total, seen[0], "inputs")

    def _fisher(self) -> Iterator[tuple[str, Curvature]]:
        for names in progress(self._packed(), "layer by layer", name=_first):
            totals, count = self._squares({name: zeros_for(self._kind, self._layers[name]) for name in names})
            for name in names:
                yield name, self._finished(name, totals.pop(name), count, "gradients")

    def _squares(self, totals: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Add g g^T of all batches with finite gradients to some layers' totals. Returns these, and their number."""
        reached = set()

        def each(number: int, inputs: Any, targets: tuple) -> bool:
            loss = self._loss_func(run(self._copy, inputs), *targets)  # type: ignore[misc]
            gradients = torch.autograd.grad(loss, [self.weights[name] for name in totals], allow_unused=True)
            if not all_finite(gradients):
                return False
            for (name, total), gradient in zip(totals.items(), gradients, strict=True):
                if gradient is not None:
                    reached.add(name)
                    added(total, self._kind.form_of(self._layers[name]).rows(gradient.detach().to_dense()).mT)
            return True

        count = self._pass(each)
        self._check_gradients(list(totals), reached, count)
        return totals, count

    def _packed(self) -> list[list[str]]:
        """Layers in parts, of which none takes more memory than the largest layer alone."""
        shapes = {name: self._kind.form_of(weight).shape for name, weight in self._layers.items()}
        sizes = {name: shape[0] * shape[-1] ** 2 for name, shape in shapes.items()}
        parts: list[list[str]] = []
        for name, size in sizes.items():
            if not parts or sum(map(sizes.__getitem__, parts[-1])) + size > max(sizes.values()):
                parts.append([])
            parts[-1].append(name)
        return parts

    def _check_gradients(self, names: list[str], reached: Collection[str], count: int) -> None:
        if not count:
            raise ValueError("sparsify: the gradients of all batches have inf or NaN; look for it in the model")
        if (unreached := [name for name in names if name not in reached]) and not self._may_skip:
            raise ValueError(
                f"sparsify: no gradient has reached {in_short(unreached)}: the loss of the batches of calibrate does "
                "not depend on it; leave it out with exclude=, or add batches that use it"
            )

    def _finished(self, name: str, total: Tensor, count: int, what: str) -> Curvature:
        """The curvature of a layer from sums over the batches, of all processes together."""
        if self._group is not None:
            torch.distributed.all_reduce(total, group=self._group)
            counted = torch.tensor(count, device=total.device)
            torch.distributed.all_reduce(counted, group=self._group)
            count = int(counted)
        if not total.isfinite().all():
            raise ValueError(
                f"sparsify: the {what} of {printable(name)} have inf or NaN, or are too large, in the batches of "
                "calibrate; look for it in the model, or leave the layer out with exclude="
            )
        return self._kind.finished(self._kind.form_of(self._layers[name]), total, count)

    def _pass(self, each: Callable[[int, Any, tuple], Any]) -> int:
        """Call a function with the number, the inputs and the targets of all batches; how often it returned True."""
        counted, needs_loss = 0, self._kind.needs_loss
        with (
            random_restored(self._original), not_drawn_from(self._batches), without_fast_path(),
            torch.inference_mode(False), torch.enable_grad() if needs_loss else torch.no_grad(),
        ):  # fmt: skip
            for number, batch in enumerate(progress(self._batches, "running the calibration batches"), 1):
                inputs, targets = parts_of(with_autograd(batch), needs_loss)
                if not has_rows(inputs):
                    continue
                try:
                    counted += each(number, inputs, targets) is True
                except Exception as error:
                    raise ValueError(
                        f"sparsify: batch {number} of calibrate fails in a copy of the model in evaluation mode "
                        f"({message_of(error)}); give calibrate batches that run in this mode, too"
                    ) from error
        return counted


def _first(names: list[str]) -> str:
    return names[0]


def _unfolding_of(module: Any) -> str:
    """What a convolution does to its input, in words to be compared; empty for other layers."""
    if not isinstance(module, CONVOLUTIONS):
        return ""
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
    return repr((type(module), *(getattr(module, name) for name in names)))
