"""Collecting the quantities that a criterion names, at the moments of training when each of them is available."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.criterion import quantities_of
from ..axes.quantity import AVERAGED, STORED, quantities
from ..model.layers import NamedWeight
from ..model.tensors import all_finite, cloned
from ..support.at_end import AtEnd
from ..support.listing import in_short
from ..support.printable import printable
from ..support.registry import name_of


@dataclass(eq=False)
class Source:
    """What quantities are computed from.

    Attributes:
        model: The model.
        layers: Parameter name -> the named weight of a selected layer, in the order of the model.
        rng: The random generator of the Sparsifier, on the CPU.
        example_input: A batch of one example, or None.
        inputs: Parameter name -> the input of the layer, while the layer runs (moment 'forward').
        loss: The loss of a batch, with its graph (moment 'loss').
        skipped: Layers that no gradient of the present batch reaches (moments 'backward' and 'loss').
        joint: With a joint granularity, parameter name -> (its `JointGroups`, its `Part` of them).
        input_grads: Parameter name -> (input, its gradient, number of examples) per call (moment 'input_grad').
        dense: The `DenseWeights` of straight-through training, from which quantities of weights are computed; or None.
        curvatures: Function that yields the curvature of every layer (moment 'passes'); None at other moments.
    """

    model: nn.Module
    layers: Mapping[str, NamedWeight]
    rng: torch.Generator
    example_input: Any = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    skipped: set[str] = field(default_factory=set)
    joint: Mapping[str, Any] = field(default_factory=dict)
    input_grads: dict[str, list[tuple[Tensor, Tensor, int]]] = field(default_factory=dict)
    dense: Any = None
    curvatures: Any = None
    _computed: dict[Callable, dict[str, Tensor]] = field(default_factory=dict)

    def once(self, compute: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return `compute(source)`, a value for each layer. It is computed once and reused until `forget`."""
        if compute not in self._computed:
            self._computed[compute] = compute(self)
        return self._computed[compute]

    def with_dense_weights(self) -> AbstractContextManager[None]:
        """Let the layers have their dense weights in a `with` block."""
        return nullcontext() if self.dense is None else self.dense.in_place()

    def apart(self) -> Source:
        """A source of the same values, whose random generator and whose `once` are its own."""
        rng = torch.Generator()
        rng.set_state(self.rng.get_state())
        return replace(self, rng=rng, _computed={})

    def forget(self) -> None:
        """Drop what `once` has computed."""
        self._computed.clear()

    def __getstate__(self) -> dict[str, Any]:
        # As bytes: a tensor that a generator makes of its state when it is pickled does not last until another process
        # has read it.
        return {**vars(self), "rng": self.rng.get_state().numpy().tobytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.rng = torch.Generator()
        self.rng.set_state(torch.frombuffer(bytearray(state["rng"]), dtype=torch.uint8))


class CollectedQuantities:
    """The quantities that a criterion names, of the selected layers.

    What is stored is never changed in place: a method computes all new attributes, and sets them by one call. So an
    error or an interrupt leaves all of them as they were, and so does `copy.copy`.

    Attributes:
        criterion: The criterion.
        source: What they are computed from.
        named: Names of the quantities.
        stored: Quantity -> parameter name -> value, for quantities that are not computed at each scoring.
        counts: Quantity -> parameter name -> the number of batches, or of values, in the mean; a tensor on a GPU, where
            the host does not know whether a gradient was finite.
        begins: Quantities whose mean starts anew with the next batch.
        unreached: Quantity -> the layers that no batch so far has reached.
        left_out: Whether a batch was left out since the last update, because its gradients are not finite.
        may_skip: Whether a layer that no batch has reached has a value of zero; else the value is missing.
        waits_for_frozen: Whether a frozen layer that lacks a mean of gradients rests until it is trained; else this is
            an error.
    """

    def __init__(self, criterion: Callable, source: Source):
        self.criterion, self.source = criterion, source
        self.named = tuple(quantities_of(criterion))
        self.stored: dict[str, dict[str, Tensor]] = {}
        self.counts: dict[str, dict[str, int | Tensor]] = {}
        self.begins: set[str] = set()
        self.unreached: dict[str, set[str]] = {}
        self.left_out, self.may_skip, self.waits_for_frozen = False, False, False

    def on(self, source: Source) -> CollectedQuantities:
        """The same quantities, with another source for those that are computed at each scoring."""
        other = copy.copy(self)
        other.source = source
        return other

    def at(self, *moments: str) -> list[str]:
        """The named quantities that are taken at one of these moments."""
        return [name for name in self.named if set(moments) & set(quantities[name].moments)]  # type: ignore[attr-defined]

    def take(self, moment: str, names: Iterable[str] | None = None) -> None:
        """Store the quantities that are taken at 'start' or 'update'. After an update, means start anew.

        Args:
            moment: The moment.
            names: The layers, by default all.
        """
        vars(self).update(self.after(moment, names))

    @torch.no_grad()
    def after(self, moment: str, names: Iterable[str] | None = None) -> dict[str, Any]:
        """The attributes that `take` sets."""
        names = list(self._layers if names is None else names)
        stored = dict(self.stored)
        for quantity in self.at(moment):
            with self.source.with_dense_weights():
                values = {name: cloned(quantities[quantity](self.source, name)) for name in names}
            stored[quantity] = stored.get(quantity, {}) | values
        if moment != "update":
            return {"stored": stored}
        begins = {name for name in self.at(*AVERAGED) if not quantities[name].running}  # type: ignore[attr-defined]
        return {"stored": stored, "begins": self.begins | begins, "left_out": False}

    def add(self, moment: str, names: Iterable[str] | None = None, count: int = 1) -> None:
        """Add a batch to the means of the quantities that are taken at 'backward', 'forward' or 'loss'.

        A layer that the batch has skipped has a gradient of zero. A batch whose gradients are not all finite is left
        out, as the step of an optimizer is by a GradScaler.

        Args:
            moment: The moment.
            names: The layers, by default all.
            count: The weight of the batch in the mean.

        Raises:
            ValueError: A layer is frozen and has no gradient.
        """
        vars(self).update(self.with_batch(moment, names, count))

    @torch.no_grad()
    def with_batch(self, moment: str, names: Iterable[str] | None = None, count: int = 1) -> dict[str, Any]:
        """The attributes that `add` sets."""
        if not self.at(moment):
            return {}
        if self.waits_for_frozen and moment in ("backward", "loss"):
            return self.trained().with_batch(moment, names, count) if self._trained else {}
        # A layer that is not trained at present, as the other net of a pair, keeps its last mean.
        names = list(names) if names is not None else [name for name in self._layers if not self._rests(name, moment)]
        self.source.skipped = set()
        at_end, is_backward = AtEnd(self.source.forget), moment == "backward"
        # At the moment 'loss' the graph of the loss is used, which holds the sparse weights.
        zeros = _zeros_for_missing(self.source, names) if is_backward else nullcontext()
        with at_end, at_end, zeros, self.source.with_dense_weights() if is_backward else nullcontext():
            finite: Any = all_finite(self._gradients(names) if is_backward else ())
            taken = {each: {name: quantities[each](self.source, name) for name in names} for each in self.at(moment)}
        if moment in ("loss", "input_grad"):
            finite = all_finite(value for values in taken.values() for value in values.values())
        # On a GPU the answer stays there, unless there is no earlier mean to fall back on.
        if _is_known(finite) or not all(self.stored.get(each, {}).keys() >= set(names) for each in taken):
            if not finite:
                return {"left_out": True}
            finite = None
        stored, counts, unreached = dict(self.stored), dict(self.counts), dict(self.unreached)
        for quantity, values in taken.items():
            # A mean stays until a batch replaces it.
            earlier = {} if quantity in self.begins else self.counts.get(quantity, {})
            stored[quantity], counts[quantity] = _with_means(
                self.stored.get(quantity, {}), earlier, values, count, finite
            )
            unreached[quantity] = unreached.get(quantity, set(self._layers)) - (set(names) - self.source.skipped)
        return {"stored": stored, "counts": counts, "unreached": unreached, "begins": self.begins - taken.keys()}

    def trained(self) -> CollectedQuantities:
        """The same quantities, of the layers that are trained at present."""
        other = self.on(replace(self.source, layers=self._trained, skipped=set(), _computed={}))
        other.waits_for_frozen = False
        return other

    @property
    def resting(self) -> set[str]:
        """The frozen layers that lack a mean of gradients, and wait until they are trained."""
        means = self.at("backward", "loss") if self.waits_for_frozen else []
        frozen = self._layers.keys() - self._trained.keys() if means else ()
        return {name for name in frozen if any(name not in self.stored.get(each, {}) for each in means)}

    @property
    def _trained(self) -> dict[str, NamedWeight]:
        return {name: layer for name, layer in self._layers.items() if not layer.is_frozen}

    def _rests(self, name: str, moment: str) -> bool:
        """Whether a layer is frozen at present and has means of earlier batches."""
        is_frozen = moment in ("backward", "loss") and self._layers[name].is_frozen
        return is_frozen and all(name in self.stored.get(each, {}) for each in self.at(moment))

    def with_gradients(self) -> dict[str, Any]:
        """The attributes after the gradients of a backward pass are added to the means.

        Raises:
            ValueError: No selected layer has a gradient, or one is frozen.
        """
        if self.waits_for_frozen and not self._trained:
            return {}
        if self.at("backward") and all(gradient is None for gradient in self._gradients(self._layers)):
            raise ValueError(
                f"collect_gradients: no gradient has reached {printable(next(iter(self._layers)))} or any other "
                "selected layer; call it after a backward of a loss that depends on them, and before zero_grad"
            )
        return self.with_batch("backward")

    def _gradients(self, names: Iterable[str]) -> list[Tensor | None]:
        return [self._layers[name].parameter.grad for name in names]

    def missing(self) -> str | None:
        """The first named quantity that is a mean over batches and lacks a batch for some layer; None if none does."""
        needed = self._layers.keys() - self.resting
        for quantity in self.at(*AVERAGED):
            stored = self.stored.get(quantity, {}).keys()
            if not stored or not (self.may_skip or needed <= stored):
                return quantity
        return None

    def value(self, quantity: str, name: str) -> Any:
        """A quantity of a layer: computed now, or the stored value.

        Raises:
            ValueError: It is a mean over batches, and no batch was seen.
        """
        function: Any = quantities[quantity]
        if {"score", "passes"} & set(function.moments):
            return function(self.source, name)
        stored, parameter = self.stored.get(quantity, {}), self._layers[name].parameter
        if name not in stored and not (stored and self.may_skip):
            finite = " with finite gradients" if self.left_out else ""
            raise ValueError(
                f"criterion {name_of(self.criterion)} needs {quantity}, but has seen no batch{finite}; call "
                f"{self.how(function.moments)} before sparsify"
            )
        if name in stored:
            value = stored[name].to(parameter.device)
        else:
            of_weights = {"backward", "loss"} & set(function.moments)
            value = torch.zeros(parameter.shape if of_weights else (1,) * parameter.dim(), device=parameter.device)
        return function.finish(value) if function.finish else value

    def values(self, name: str) -> dict[str, Any]:
        """All named quantities of a layer."""
        return {quantity: self.value(quantity, name) for quantity in self.named}

    def how(self, moments: Container[str]) -> str:
        """The calls by which users collect the quantities that are taken at these moments, for an error."""
        gradients = ", or collect_gradients() after a backward," if "backward" in moments else ""
        return f"calibrate(batches, loss_func){gradients}"

    def state(self) -> dict[str, Any]:
        """The stored values and the number of batches in each mean, for `Sparsifier.state_dict`."""
        return {
            "stored": {quantity: dict(values) for quantity, values in self.stored.items()},
            "counts": {
                quantity: {name: int(count) for name, count in counts.items()}
                for quantity, counts in self.counts.items()
            },
            "begins": sorted(self.begins),
        }

    @property
    def looks_at_data(self) -> bool:
        """Whether a named quantity is a mean over batches."""
        return bool(self.at(*AVERAGED))

    @property
    def compares(self) -> bool:
        """Whether a named quantity is an earlier value, such as the weight at the start."""
        return bool(self.at(*STORED))

    @property
    def _layers(self) -> Mapping[str, NamedWeight]:
        return self.source.layers


def notices_of_unreached(collected: CollectedQuantities, names: Container[str]) -> list[str]:
    """What the user should be warned of at an update of these layers: those that no batch has reached."""
    known = [collected.unreached.get(each, ()) for each in collected.at(*AVERAGED)]
    listed = [name for name in collected.source.layers if name in names and any(name in each for each in known)]
    if not listed:
        return []
    return [
        f"{name_of(collected.criterion)}: no batch so far has used {in_short(listed)}, so the scores are zero and "
        "these weights are pruned first; leave them out with exclude=, or score with more batches (calibration=, "
        "every=)"
    ]


def _with_means(
    means: Mapping[str, Tensor],
    counts: Mapping[str, int | Tensor],
    values: Mapping[str, Tensor],
    count: int,
    finite: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, int | Tensor]]:
    """The means with the values of a batch, and their counts. finite: None, or a flag on a GPU, not waited for."""
    means, counts = dict(means), dict(counts)
    shares: dict[int, tuple[Any, Any]] = {}  # layers have the same count, as a rule, so it is computed once
    for name, value in values.items():
        value, earlier = value.as_subclass(Tensor), counts.get(name, 0)  # fastai's batches give tensors of its own
        if id(earlier) not in shares:
            shares[id(earlier)] = _counted(earlier, count, finite)
        counts[name], share = shares[id(earlier)]
        share = share.to(value.dtype) if isinstance(share, Tensor) else share
        if finite is not None:
            means[name] = torch.where(finite, means[name].lerp(value, share), means[name])
        else:  # a share of one: what is stored is the mean of batches before the last update
            first = name not in means or (isinstance(share, float) and share == 1)
            means[name] = value.clone() if first else means[name].lerp(value, share)
    return means, counts


@contextmanager
def _zeros_for_missing(source: Source, names: Iterable[str]) -> Iterator[None]:
    """Give zeros for a gradient to the layers that the batch has skipped, and take them away at the end."""
    parameters = {name: source.layers[name].parameter for name in names}
    missing = {name: each for name, each in parameters.items() if each.grad is None and each.requires_grad}
    source.skipped = set(missing)

    def undo() -> None:
        for parameter in missing.values():
            parameter.grad = None

    at_end = AtEnd(undo)
    with at_end, at_end:
        for parameter in missing.values():
            parameter.grad = torch.zeros_like(parameter)
        yield


def _counted(earlier: Any, count: int, finite: Tensor | None) -> tuple[Any, Any]:
    """The number of values in a mean after a batch, and the share that the batch has of them."""
    if finite is None:
        return earlier + count, count / (earlier + count)
    counted = earlier + count * finite
    return counted, count * finite / counted.clamp(min=1)


def _is_known(flag: Tensor) -> bool:
    """Whether the host can read a flag without waiting for a GPU."""
    return flag.device.type == "cpu"
