"""Models to files without their zeros, and back, bit for bit; and what such a file holds, as a table."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..model.parallel import is_sharded, unwrapped
from ..model.zeros import Count, figures
from ..support.checks import check_is_module
from ..support.registry import close_matches
from ..support.table import Cells, Table
from .sparse_format import Tensors, dense_bytes, read_tensors, some_of, write_tensors
from .sparse_tensor import DTYPES, NAMES, StoredTensor, bits_of


@dataclass(frozen=True)
class SparseRow:
    """One tensor of a sparse file. bytes: those of its data, none if it is the same as another."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: Count
    form: str
    bytes: int
    dense_bytes: int


@dataclass(frozen=True, repr=False)
class SparseFile(Table):
    """What a sparse file has of each tensor, and its size: printed, a table; in a notebook, HTML.

    bytes: of the whole file. dense_bytes: of a safetensors file of the same tensors, dense, those that share their
    memory once.
    """

    path: Path
    rows: tuple[SparseRow, ...]
    bytes: int
    dense_bytes: int

    @classmethod
    def read(cls, path: str | os.PathLike) -> SparseFile:
        """Of a file that `save_sparse` has written, all of which is checked, and nothing of which is expanded.

        ValueError if it is no such file or is damaged, OSError if it cannot be read.
        """
        return cls._of(Path(path), read_tensors(Path(path)))

    @classmethod
    def _of(cls, path: Path, tensors: Tensors) -> SparseFile:
        rows = []
        for name, stored in tensors.items():
            own = stored.name == name
            form, *sizes = (stored.form, stored.bytes, stored.dense_bytes) if own else (f"same as {stored.name}", 0, 0)
            rows.append(SparseRow(name, stored.shape, _plain(stored.dtype), stored.count, form, *sizes))
        return cls(path, tuple(rows), path.stat().st_size, dense_bytes(tensors))

    @property
    def ratio(self) -> float:
        """bytes / dense_bytes."""
        return self.bytes / self.dense_bytes

    @property
    def count(self) -> Count:
        """Of all tensors, those that share their memory once."""
        counts = [row.count for row in self.rows if not row.form.startswith("same as ")]
        return Count(sum(count.weights for count in counts), sum(count.zeros for count in counts))

    def _cells(self) -> Cells:
        stored, dense = sum(row.bytes for row in self.rows), sum(row.dense_bytes for row in self.rows)
        return Cells(
            ("tensor", "shape", "dtype", "weights", "zeros", "sparsity", "form", "bytes", "dense bytes"),
            [
                (row.name, "x".join(map(str, row.shape)), row.dtype, *figures(row.count), row.form, f"{row.bytes:,}",
                 f"{row.dense_bytes:,}")
                for row in self.rows
            ],
            totals=[
                ("all tensors", "", "", *figures(self.count), "", f"{stored:,}", f"{dense:,}"),
                ("file with its header", *[""] * 6, f"{self.bytes:,}", f"{self.dense_bytes:,}"),
            ],
            left=(0, 1, 2, 6),
            caption=f"{self.path.name}: {100 * self.ratio:.2f}% of the bytes that it takes dense",
        )  # fmt: skip


def save_sparse(model: nn.Module, path: str | os.PathLike) -> SparseFile:
    """Write the state_dict of a model to a file without its zeros, and return what that holds; of a wrapper of torch,
    that of the model within.

    A file that is there is replaced at once, or, on an error, left as it is. ValueError if something in the state_dict
    is no tensor that safetensors can hold, OSError if the file cannot be written.
    """
    check_is_module("save_sparse", "model", model)
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "save_sparse: is a folder; give the name of a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "save_sparse: there is no such folder; make it first", str(path.parent))
    state = _state("save_sparse", model)
    ties = _ties(state)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in state.items():
        tensors[name] = tensors[ties[name]] if name in ties else StoredTensor.of(name, tensor)
    write_tensors(path, tensors)
    return SparseFile._of(path, tensors)


@torch.no_grad()
def load_sparse(path: str | os.PathLike, model: nn.Module) -> nn.Module:
    """Give the parameters and buffers of a model, or of the model in a wrapper of torch, the values that `save_sparse`
    has written, bit for bit, and return it. Parameters stay the same objects, on their devices.

    ValueError, and nothing changed, if the file is none of `save_sparse`, is damaged, or is of another model: names,
    shapes and dtypes are the same, and what the model ties is equal. OSError if it cannot be read.
    """
    check_is_module("load_sparse", "model", model)
    path, state = Path(path), _state("load_sparse", model)
    tensors = read_tensors(path)
    _check_names(path, model, state, tensors)
    for name, tensor in state.items():
        stored = tensors[name]
        dtype, own = _plain(stored.dtype), _plain(NAMES[tensor.dtype])
        if stored.shape != tensor.shape:
            raise ValueError(
                f"load_sparse: {name} has the shape {stored.shape} in {path} and {tuple(tensor.shape)} in the model; "
                "make the model as when it was saved"
            )
        if dtype != own:
            raise ValueError(
                f"load_sparse: {name} is {dtype} in {path} and {own} in the model, and casts lose bits; load into a "
                f"model of that dtype, as by model.to(torch.{dtype}), and cast it then"
            )
        if _is_fixed(tensor):
            raise ValueError(
                f"load_sparse: {name} of the model cannot take values from {path}, made in inference mode, or "
                "with elements that share their memory; make it a copy, as by clone()"
            )
    expanded = {name: stored.expand() for name, stored in tensors.items() if stored.name == name}
    values = {name: expanded[tensors[name].name] for name in state}
    for name, first in _ties(state).items():
        if not np.array_equal(bits_of(values[name]), bits_of(values[first])):
            raise ValueError(
                f"load_sparse: {first} and {name} are one tensor in the model, and differ in {path}; untie them first"
            )
    unwrapped(model).load_state_dict(values)
    return model


def _state(operation: str, model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a model. ValueError if a file cannot hold something in it."""
    state = dict(unwrapped(model).state_dict())
    for name, value in state.items():
        why = _why_not(value)
        if why:
            raise ValueError(f"{operation}: {name} of {type(unwrapped(model)).__name__} is {why}")
    return state


def _why_not(value: Any) -> str:
    """Why a file cannot hold something of a state_dict, and what to do; '' if it can."""
    if not isinstance(value, Tensor):
        return f"no tensor but {type(value).__name__}; keep it in a file of its own, and out of the state_dict"
    if is_lazy(value):
        return "not initialized yet; run the model on a batch first"
    if is_sharded(value):
        return (
            "a shard; give a plain model what torch.distributed.checkpoint.state_dict.get_model_state_dict gathers, "
            "with StateDictOptions(full_state_dict=True)"
        )
    if value.is_meta:
        return "on the device meta, without values; use model.to_empty(device='cpu') and initialize it"
    if value.is_quantized:
        return "quantized; dequantize it"
    if value.layout != torch.strided or value.is_nested or hasattr(value, "__tensor_flatten__"):
        return f"a {type(value).__name__} of the layout {value.layout}; make it a plain tensor, as by to_dense()"
    if value.dtype not in NAMES:
        return f"{str(value.dtype).removeprefix('torch.')}, which safetensors files have not; store it as another dtype"
    return ""


def _ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Tensors that are an earlier one by another name, in the same memory with the same layout -> that one's name."""
    first: dict[tuple, str] = {}
    ties = {}
    for name, tensor in state.items():
        if tensor.numel():
            memory = (tensor.device, tensor.data_ptr(), tensor.is_conj(), tensor.is_neg())
            place = (*memory, tensor.dtype, tensor.shape, tensor.stride())
            if first.setdefault(place, name) != name:
                ties[name] = first[place]
    return ties


def _is_fixed(tensor: Tensor) -> bool:
    """Whether a tensor cannot be written to: made in inference mode, or with elements that share their memory."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.is_inference() or any(size > 1 and step == 0 for size, step in steps)


def _check_names(path: Path, model: nn.Module, state: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    missing = [name for name in state if name not in tensors]
    unexpected = [name for name in tensors if name not in state]
    if not missing and not unexpected:
        return
    found = [f"lacks {some_of(missing)}"] if missing else []
    found += [f"has {some_of(unexpected)}, which the model has not"] if unexpected else []
    hint = f"; {close_matches(unexpected[0][:200], list(state))}" if unexpected and state else ""
    raise ValueError(f"load_sparse: {path} is of another model than {type(unwrapped(model)).__name__}: it "
                     f"{' and '.join(found)}{hint}")  # fmt: skip


def _plain(dtype: str) -> str:
    """What torch calls a dtype of safetensors."""
    return str(DTYPES[dtype]).removeprefix("torch.")
