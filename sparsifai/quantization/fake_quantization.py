"""Training for int8: torch's fake quantization of the weights and inputs of layers, while hooks are on them.

This is what a backend for training has to offer: `put`, `remove`, `has_rounded`, `ranges` and its state. The callback
and the part of a TrainingManager use nothing else, so this file can be replaced by one that leaves the placing to
another library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model.hooks import ForwardHooks
from ..support.printable import quoted
from .layers import QuantizedLayer

MOST = 127  # integers of weights go from -127 to 127, so that zero is in the middle
_AVERAGING = 0.01  # share of each batch in the running range of an input, torch's own


class FakeQuantization:
    """Rounds the weights and inputs of layers to what int8 can hold, in every forward from `put` to `remove`.

        weight: s round(w / s), s = max |w| / 127, the largest of each output
        input:  s (round(x / s) + z) - s z, within 0 to 255; s and z from the running range of the inputs

    A zero weight stays exactly zero. Gradients pass as if nothing was rounded, except where an input is out of its
    range (Jacob et al., 2018, https://arxiv.org/abs/1712.05877). Parameters stay the same objects under the same names:
    a layer sees the rounded weight instead of its own only while its forward runs.

    Args:
        model: The model, without wrappers.
        layers: The layers of it.

    Attributes:
        model: The model.
        is_put: Whether the hooks are on the layers.
        in_evaluation: Whether a forward in evaluation mode is rounded, too.
        has_rounded: Whether a layer has rounded. Who asks for it sets it to False.
    """

    def __init__(self, model: nn.Module, layers: Iterable[QuantizedLayer]):
        self.model, self.is_put = model, False
        self.in_evaluation, self.has_rounded = True, False
        # In evaluation mode they would hand nested tensors to their layers, which fake quantization does not take.
        self._nesting = [
            each for each in model.modules() if isinstance(each, nn.TransformerEncoder) and each.use_nested_tensor
        ]
        self._before = [_Round(layer, self) for layer in layers]
        self._hooks = ForwardHooks(
            [(each.layer.module, _Restore(each.layer)) for each in self._before],
            [(each.layer.module, each) for each in self._before],
        )

    def put(self, in_evaluation: bool = True) -> None:
        """Put the hooks on the layers, if they are not on them.

        Args:
            in_evaluation: Round in evaluation mode of the model, too. Default True.
        """
        self._hooks.remove()
        self.is_put, self.in_evaluation = True, in_evaluation
        for each in self._nesting:
            each.use_nested_tensor = False
        self._hooks.put()

    def remove(self) -> None:
        """Remove the hooks, and what an interrupted forward has left."""
        self._hooks.remove()
        self.is_put = False
        for encoder in self._nesting:
            encoder.use_nested_tensor = True
        for each in self._before:
            _restore(each.layer)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Name of a layer -> the running range of its input, for the layers that have run in training."""
        first = {each.layer.name: next(iter(each.inputs.values()), None) for each in self._before}
        return {name: (float(seen.low), float(seen.high)) for name, seen in first.items() if seen and seen.is_known}

    def state(self) -> dict[str, dict[int | str, Tensor]]:
        """What another one of the same layers needs to continue, for torch.save: the range of each input."""
        known = {
            each.layer.name: {place: seen.state() for place, seen in each.inputs.items() if seen.is_known}
            for each in self._before
        }
        return {name: inputs for name, inputs in known.items() if inputs}

    def load(self, state: Mapping[str, Mapping[int | str, Tensor]]) -> None:
        """Continue from what `state` has returned.

        Args:
            state: What `state` has returned.

        Raises:
            ValueError: It is of other layers.
        """
        if unknown := state.keys() - {each.layer.name for each in self._before}:
            raise ValueError(
                f"load_state_dict: the state has the range of the input of {quoted(min(unknown))}, which is not "
                "quantized here; give Quantize the same layers"
            )
        for each in self._before:
            each.inputs = {place: _Input.of(values) for place, values in state.get(each.layer.name, {}).items()}


def rounded_weight(weight: Tensor, axis: int) -> Tensor:
    """Round a weight to what int8 can hold, with one scale for each output and the zero point 0.

    Args:
        weight: The weight.
        axis: Its axis of outputs.
    """
    others = [each for each in range(weight.dim()) if each != axis]
    largest = weight.detach().abs().amax(others)
    # A pruned output has no range. It stays zero with any scale.
    scale = torch.where(largest < torch.finfo(largest.dtype).tiny, torch.ones_like(largest), largest / MOST)
    return torch.fake_quantize_per_channel_affine(
        weight, scale, torch.zeros_like(scale, dtype=torch.int32), axis, -MOST, MOST
    )


class _Input:
    """One input of a layer: its running range, and its rounding."""

    def __init__(self, device: torch.device):
        self.low = torch.full((1,), float("inf"), device=device)
        self.high = torch.full((1,), -float("inf"), device=device)
        self.scale = torch.ones(1, device=device)
        self.zero_point = torch.zeros(1, dtype=torch.int32, device=device)
        self.on, self.off = torch.ones(1, dtype=torch.long, device=device), torch.zeros(1, device=device).long()
        self.is_known = False

    @classmethod
    def of(cls, state: Tensor) -> _Input:
        made = cls(state.device)
        made.low, made.high, made.scale, zero_point = state.clone().split(1)
        made.zero_point, made.is_known = zero_point.to(torch.int32), True
        return made

    def state(self) -> Tensor:
        return torch.cat([self.low, self.high, self.scale, self.zero_point.float()])

    def on_device(self, device: torch.device) -> _Input:
        if self.low.device == device:
            return self
        return _Input.of(self.state().to(device)) if self.is_known else _Input(device)

    def rounded(self, value: Tensor, observes: bool) -> Tensor:
        self.is_known |= observes
        if not self.is_known:
            return value
        rounded = torch.fused_moving_avg_obs_fake_quant(
            value.float(), self.on if observes else self.off, self.on, self.low, self.high, self.scale,
            self.zero_point, _AVERAGING, 0, 255, -1, False, False,
        )  # fmt: skip
        return rounded.to(value.dtype)


class _Hook:
    """A hook of a layer. Copied or pickled with a model, it does nothing."""

    def __init__(self, layer: QuantizedLayer):
        self.layer = layer

    def __reduce__(self) -> tuple:
        return _inert, ()


class _Round(_Hook):
    """Before the forward of a layer: round its inputs and weights."""

    def __init__(self, layer: QuantizedLayer, fake: FakeQuantization):
        super().__init__(layer)
        self.fake, self.inputs = fake, dict[int | str, _Input]()

    def __call__(self, module: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not (self.fake.in_evaluation or self.fake.model.training):
            _restore(self.layer)  # a forward that was interrupted has left its weights
            return None
        self.fake.has_rounded = True
        done: dict[int, Tensor] = {}  # attention is often given one tensor as query, key and value
        count = self.layer.inputs
        first = [self._rounded(place, each, done) for place, each in enumerate(inputs[:count])]
        of_names = () if len(first) == count else ("input", "x", "query", "key", "value")
        named = {name: self._rounded(name, each, done) if name in of_names else each for name, each in named.items()}
        for holder, attribute, axis in self.layer.weights.values():
            # An attribute of the instance is found before its parameter, which stays where it is.
            vars(holder)[attribute] = rounded_weight(holder._parameters[attribute], axis)  # type: ignore[arg-type]
        return (*first, *inputs[count:]), named

    def _rounded(self, place: int | str, value: Any, done: dict[int, Tensor]) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return value
        if id(value) not in done:
            seen = self.inputs.get(place)
            self.inputs[place] = _Input(value.device) if seen is None else seen.on_device(value.device)
            done[id(value)] = self.inputs[place].rounded(value, self.layer.module.training)
        return done[id(value)]


class _Restore(_Hook):
    """After the forward of a layer: let it see its own weights."""

    def __call__(self, module: nn.Module, inputs: tuple, named: dict[str, Any], output: Any) -> None:
        _restore(self.layer)


def _restore(layer: QuantizedLayer) -> None:
    for holder, attribute, _ in layer.weights.values():
        vars(holder).pop(attribute, None)


def _inert() -> Any:
    return _nothing


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""
