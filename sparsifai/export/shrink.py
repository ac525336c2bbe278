"""What shrinking takes from each layer, and what of its zeros it leaves, as a table."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..model.channels.constants import reading
from ..model.channels.removal import Removal, named_tensors
from ..model.layers import outputs_of
from ..model.parallel import unwrapped
from ..model.zeros import Count
from ..support.checks import check_is_module
from ..support.table import Cells, Table, percent


def shrink(model: nn.Module, example_input: Any) -> nn.Module:
    """A copy of a model without its dead channels: dense, smaller, with the same outputs in evaluation mode.

    Filters of zeros go with all that only they feed: entries of norm layers, inputs of the next layers. A constant that
    they leave behind is folded into biases. Channels that no layer reads go, too. Outputs are the same within 1e-5 of
    the largest, in float32, as is checked on the example, on random inputs like it and on one of another size. A model
    that takes other ways by the values of its input is known only in the ways that these take.

    model: any torch model, which stays as it is; of a wrapper (compiled, data parallel), what is in it.
    example_input: a batch that it accepts, a tuple for several positional arguments, a dictionary for keywords.
    What is left trains like any other model, in a Learner of its own.
    Warns of filters of zeros that have to stay; `shrinkage` tells why. Needs torch-pruning, whose dependency graph says
    which channels go together (Fang et al., 2023, "DepGraph", arXiv:2301.12900): pip install 'sparsifai[shrink]'.
    ImportError without it; ValueError if the model does not run, or cannot be followed.
    """
    small, report = _shrunk(model, example_input)
    if report.zeros_left:
        warnings.warn(
            f"shrink: {report.zeros_left} of {report.zeros} filters of zeros stay: {report.reasons}. "
            "shrinkage(model, example_input) lists all; with coupled=True and granularity 'filter', a Sparsifier makes "
            "only such zeros as can go",
            stacklevel=2,
        )
    return small


def shrinkage(model: nn.Module, example_input: Any) -> Shrinkage:
    """What `shrink` would remove of each layer, and why the rest of its zeros stays; nothing is changed.

    Arguments and errors are those of `shrink`.
    """
    return _shrunk(model, example_input)[1]


def _shrunk(model: nn.Module, example_input: Any) -> tuple[nn.Module, Shrinkage]:
    check_is_module("shrink", "model", model)
    model = unwrapped(model)
    dtypes = {name: value.dtype for name, value in named_tensors(model)}
    work = Removal(model, example_input).done()
    small = work.model
    for (_, part), (_, given) in zip(small.named_modules(), model.named_modules(), strict=True):
        part.training = given.training
    for name, value in named_tensors(small):
        # A bias that is new is as its weight.
        value.data = value.data.to(dtypes.get(name, dtypes.get(f"{name.rpartition('.')[0]}.weight", value.dtype)))
    return small, _measured(work, model)


@dataclass(frozen=True)
class ShrinkableLayer:
    """One layer. zeros: outputs whose weights are all zero. removed: outputs that go, not only such of zeros.

    why: of the zeros that are left, how many for what reason.
    """

    name: str
    kind: str
    outputs: int
    zeros: int
    removed: int
    zeros_left: int
    why: str = ""


@dataclass(frozen=True, repr=False)
class Shrinkage(Table):
    """What shrink removes: printed, a table; in a notebook, HTML.

    parameters, parameters_left: of the whole model, before and after.
    """

    layers: tuple[ShrinkableLayer, ...]
    parameters: int
    parameters_left: int

    @property
    def zeros(self) -> int:
        """Outputs whose weights are all zero."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def removed(self) -> int:
        """Outputs that go."""
        return sum(layer.removed for layer in self.layers)

    @property
    def zeros_left(self) -> int:
        """Outputs whose weights are all zero, but that have to stay."""
        return sum(layer.zeros_left for layer in self.layers)

    @property
    def reasons(self) -> str:
        """The layers of which zeros stay, with why; the first three."""
        left = [f"{layer.name}: {layer.why}" for layer in self.layers if layer.zeros_left]
        return "; ".join(left[:3]) + (f"; and {len(left) - 3} more layers" if len(left) > 3 else "")

    def _cells(self) -> Cells:
        outputs = sum(layer.outputs for layer in self.layers)
        share = Count(self.parameters, self.parameters - self.parameters_left).sparsity
        return Cells(
            ("layer", "kind", "outputs", "zero filters", "removed", "zero filters left", "why"),
            [
                (layer.name, layer.kind,
                 *_figures(layer.outputs, layer.zeros, layer.removed, layer.zeros_left), layer.why)
                for layer in self.layers
            ],
            totals=[("all layers", "", *_figures(outputs, self.zeros, self.removed, self.zeros_left), "")],
            left=(0, 1, 6),
            caption=f"{self.parameters:,} parameters, {self.parameters_left:,} after: {percent(share)} removed",
        )  # fmt: skip


def _figures(*numbers: int) -> tuple[str, ...]:
    return tuple(f"{number:,}" for number in numbers)


def _measured(work: Removal, given: nn.Module) -> Shrinkage:
    """What has become of the outputs of the model that was given."""
    layers = []
    for name, module in given.named_modules():
        if name not in work.numbers:
            continue
        zero = {place for place, alive in enumerate(reading(module).any(2).flatten().tolist()) if not alive}
        left = zero.intersection(work.numbers[name])
        reasons = Counter(
            work.kept.get((name, number), "it is not called, or not as a layer") for number in sorted(left)
        )
        layers.append(
            ShrinkableLayer(
                name,
                type(module).__name__,
                outputs_of(module),
                len(zero),
                outputs_of(module) - len(work.numbers[name]),
                len(left),
                "; ".join(f"{count} {reason}" for reason, count in reasons.items()),
            )
        )
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (given, work.model)]
    return Shrinkage(tuple(layers), *sizes)
