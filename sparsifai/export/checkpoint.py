"""The zeros of a checkpoint, whatever else it holds: what cannot be counted is left out and listed with the reason."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ..model.tensors import is_made_of_others, shape_of, size_of
from ..model.zeros import COUNTED, Count, figures, why_not_counted
from ..support.listing import in_short
from ..support.table import Column, Table

# Where learn.save and other libraries write the weights, beside the state of the optimizer and the like.
OF_MODELS = ("model", "model_state_dict", "state_dict")

# Containers that are nested deeper than this hold no weights of a model.
DEPTH = 20


@dataclass(frozen=True)
class LeftOut:
    """Entries of a checkpoint that are not counted.

    Attributes:
        shape: Shape of a tensor; () for several.
        values: Number of values.
        why: The reason.
    """

    shape: tuple[int, ...]
    values: int
    why: str


@dataclass
class Checkpoint:
    """The tensors of a checkpoint.

    Attributes:
        counted: Name -> tensor whose zeros can be counted.
        left_out: Name -> what is not counted, and why.
        others: Names of entries that are no tensors.
    """

    counted: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, state: Any) -> Checkpoint:
        """Find the tensors of a state_dict, or of what a library saves around one.

        Dictionaries and lists in it are looked through. If one is called 'model' or 'state_dict', what stands beside it
        is left out, as is the state of an optimizer anywhere.

        Args:
            state: What torch.load returned.
        """
        found, seen = cls(), set[int]()
        for key in OF_MODELS:
            if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
                for name, value in state.items():
                    if name != key:
                        found._leave_out(str(name), value, f"beside {key!r}, which is counted", seen)
                state = state[key]
        waiting = [("", state, 0)]
        while waiting:  # a loop, because others' files may be nested deeper than Python's stack is
            name, value, depth = waiting.pop()
            if isinstance(value, Tensor):
                found._add(name, value)
            elif not isinstance(value, (Mapping, list, tuple)):
                found.others += [] if value is None else [name]
            elif _is_optimizer_state(value):
                found._leave_out(name or "the whole file", value, "the state of an optimizer", seen)
            elif depth > DEPTH:
                found._leave_out(name, value, f"nested more than {DEPTH} deep", seen)
            elif id(value) not in seen:  # a container that is held twice is listed under its first name
                seen.add(id(value))
                waiting += [(inner, each, depth + 1) for inner, each in reversed([*_entries(name, value)])]
        return found

    def _add(self, name: str, tensor: Tensor) -> None:
        if why := why_not_counted(tensor, name):
            self.left_out[name] = LeftOut(shape_of(tensor), size_of(tensor), why)
        else:
            self.counted[name] = tensor

    def _leave_out(self, name: str, value: Any, why: str, seen: set[int]) -> None:
        """Leave out all tensors in an entry. seen: ids of the containers that were looked through."""
        tensors, values, waiting = 0, 0, [value]
        while waiting:
            each = waiting.pop()
            if isinstance(each, Tensor):
                tensors, values = tensors + 1, values + size_of(each)
            elif isinstance(each, (Mapping, list, tuple)) and id(each) not in seen:
                seen.add(id(each))
                waiting += each.values() if isinstance(each, Mapping) else each
        if tensors:
            shape = shape_of(value) if isinstance(value, Tensor) else ()
            self.left_out[name] = LeftOut(shape, values, why)
        elif value is not None and value not in ({}, [], ()):
            self.others.append(name)

    def tables(self) -> list[Table]:
        """The table of what is counted, and the table of what is not, if there is such."""
        return [CountedTensors(self), *([NotCounted(self)] if self.left_out or self.others else [])]


@dataclass(frozen=True, repr=False)
class CountedTensors(Table):
    """The zeros of the matrices of a checkpoint, and of all that can be counted in it.

    Attributes:
        checkpoint: The checkpoint.
    """

    checkpoint: Checkpoint

    @cached_property
    def _tied(self) -> dict[str, str]:
        return _ties(self.checkpoint.counted)

    @cached_property
    def _counts(self) -> dict[str, Count]:
        """Name -> count; a tensor that is tied to an earlier one has none."""
        return {name: Count.of(value) for name, value in self.checkpoint.counted.items() if name not in self._tied}

    def _is_matrix(self, name: str) -> bool:
        return self.checkpoint.counted[name].dim() > 1

    def _records(self) -> list[dict[str, Any]]:
        return [
            {
                "weight": name,
                "shape": tuple(value.shape),
                **figures(self._counts.get(name)),
                "note": f"tied to {self._tied[name]}" if name in self._tied else "",
            }
            for name, value in self.checkpoint.counted.items()
            if self._is_matrix(name)
        ]

    def _columns(self) -> tuple[Column, ...]:
        note = (Column("note", left=True, remark=True),) if any(map(self._is_matrix, self._tied)) else ()
        return (Column("weight", left=True), Column("shape", left=True), *COUNTED, *note)

    def _totals(self) -> list[dict[str, Any]]:
        whole = "all that are counted" if self.checkpoint.left_out else "whole file"
        matrices = [count for name, count in self._counts.items() if self._is_matrix(name)]
        return [
            {"weight": "all of these", **figures(_sum(matrices))},
            {"weight": whole, **figures(_sum(self._counts.values()))},
        ]


@dataclass(frozen=True, repr=False)
class NotCounted(Table):
    """The entries of a checkpoint that are not counted, with the reasons.

    Attributes:
        checkpoint: The checkpoint.
    """

    checkpoint: Checkpoint

    def _records(self) -> list[dict[str, Any]]:
        records = [
            {"tensor": name, "shape": each.shape, "weights": each.values, "why": each.why}
            for name, each in self.checkpoint.left_out.items()
        ]
        others = self.checkpoint.others
        why = "no tensor" if len(others) == 1 else f"{len(others)} entries, no tensors"
        return records + [{"tensor": in_short(others), "shape": None, "weights": None, "why": why}] * bool(others)

    def _columns(self) -> tuple[Column, ...]:
        names = (Column("tensor", "not counted", left=True), Column("shape", left=True))
        return (*names, Column("weights"), Column("why", left=True, remark=True))

    def _totals(self) -> list[dict[str, Any]]:
        return [{"tensor": "all of these", "weights": sum(each.values for each in self.checkpoint.left_out.values())}]


def _entries(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The entries of a container, each with its name: 'name.key', or 'name[0]' for the first of a list."""
    if isinstance(value, Mapping):
        yield from ((f"{name}.{key}" if name else str(key), each) for key, each in value.items())
    else:
        yield from ((f"{name}[{place}]", each) for place, each in enumerate(value))


def _is_optimizer_state(value: Any) -> bool:
    """Whether an entry is what the state_dict of an optimizer of torch or fastai looks like."""
    return isinstance(value, Mapping) and "state" in value and ("param_groups" in value or "hypers" in value)


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name of a tensor that is the same as an earlier one, as tied weights are -> the name of that one."""
    first: dict[Any, str] = {}
    ties = {}
    for name, tensor in tensors.items():
        plain = not is_made_of_others(tensor) and not tensor.is_quantized and tensor.numel()
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if plain else id(tensor)
        if first.setdefault(key, name) != name:
            ties[name] = first[key]
    return ties


def _sum(counts: Collection[Count]) -> Count:
    return Count(sum(count.weights for count in counts), sum(count.zeros for count in counts))
