"""Saving a model to a file without its zeros and loading it bit for bit; the table of what such a file stores."""

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
from ..model.tensors import is_fixed
from ..model.zeros import COUNTED, Count, figures
from ..support.arguments import checks_arguments
from ..support.checks import check_is_module
from ..support.printable import printable
from ..support.progress import progress
from ..support.registry import close_matches
from ..support.table import Column, Table
from .sparse_format import Tensors, dense_bytes, read_tensors, some_of, write_tensors
from .sparse_tensor import DTYPES, NAMES, StoredTensor, bits_of


@dataclass(frozen=True)
class SparseRow:
    """One tensor of a sparse file.

    Attributes:
        name: Its name in the state_dict.
        shape: Its shape.
        dtype: Its dtype, as torch names it.
        count: Its elements and zeros.
        form: How it is stored: 'dense', 'bitmask', 'index', or 'same as NAME' if it shares memory with that tensor; of
            `save_pretrained_sparse`, 'dense' or 'sparse-bitmask'.
        bytes: Bytes of its data in the file, 0 if it is the same as another.
        dense_bytes: Bytes of all its elements, 0 if it is the same as another.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: Count
    form: str
    bytes: int
    dense_bytes: int


@dataclass(frozen=True, repr=False)
class SparseFile(Table):
    """What a sparse file stores of each tensor, and its size. Prints as a table; in a notebook it is HTML.

    Attributes:
        path: The file.
        rows: One row per tensor.
        bytes: Size of the whole file.
        dense_bytes: Size of a safetensors file with the same tensors, all dense. Tensors that share memory count once.

    Example:
        >>> model = nn.Linear(100, 100)
        >>> Sparsifier(model).sparsify(0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stored = save_sparse(model, f'{folder}/model.safetensors')
        >>> [(row.name, row.form) for row in stored.rows]
        [('weight', 'bitmask'), ('bias', 'dense')]
    """

    path: Path
    rows: tuple[SparseRow, ...]
    bytes: int
    dense_bytes: int

    @classmethod
    def read(cls, path: str | os.PathLike) -> SparseFile:
        """Read what a file of `save_sparse` or a folder of `save_pretrained_sparse` stores.

        All of it is checked; no tensor is expanded.

        Args:
            path: The file, or the folder. Files of compressed-tensors in the form sparse-bitmask are read, too.

        Returns:
            The table, one row per tensor.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file was not written by `save_sparse`, or is damaged.
        """
        return cls._of(Path(path), *read_tensors(Path(path)))

    @classmethod
    def _of(cls, path: Path, tensors: Tensors, size: int) -> SparseFile:
        rows = []
        for name, stored in tensors.items():
            is_own = stored.name == name
            form, *sizes = (
                (stored.form, stored.bytes, stored.dense_bytes)
                if is_own
                else (f"same as {printable(stored.name)}", 0, 0)
            )
            rows.append(SparseRow(name, stored.shape, _torch_name(stored.dtype), stored.count, form, *sizes))
        return cls(path, tuple(rows), size, dense_bytes(tensors))

    @property
    def ratio(self) -> float:
        """`bytes / dense_bytes`."""
        return self.bytes / self.dense_bytes

    @property
    def count(self) -> Count:
        """Elements and zeros of all tensors. Tensors that share memory count once."""
        counts = [row.count for row in self.rows if not row.form.startswith("same as ")]
        return Count(sum(count.weights for count in counts), sum(count.zeros for count in counts))

    def _records(self) -> list[dict[str, Any]]:
        return [
            {
                "tensor": row.name,
                "shape": row.shape,
                "dtype": row.dtype,
                **figures(row.count),
                "form": row.form,
                "bytes": row.bytes,
                "dense_bytes": row.dense_bytes,
            }
            for row in self.rows
        ]

    def _columns(self) -> tuple[Column, ...]:
        texts = [Column(name, left=True) for name in ("tensor", "shape", "dtype")]
        return (*texts, *COUNTED, Column("form", left=True, remark=True), Column("bytes"), Column("dense_bytes"))

    def _totals(self) -> list[dict[str, Any]]:
        stored, dense = sum(row.bytes for row in self.rows), sum(row.dense_bytes for row in self.rows)
        return [
            {"tensor": "all tensors", **figures(self.count), "bytes": stored, "dense_bytes": dense},
            {"tensor": "file with its header", "bytes": self.bytes, "dense_bytes": self.dense_bytes},
        ]

    def _caption(self) -> str:
        return f"{self.path.name}: {100 * self.ratio:.2f}% of the bytes of the dense file"


@checks_arguments
def save_sparse(model: nn.Module, path: str | os.PathLike) -> SparseFile:
    """Save the state_dict of a model to a file without its zeros.

    It is a safetensors file, without pickle. Each tensor is stored dense, or as its nonzero values and where they are,
    whichever is smaller. An existing file is replaced at once; after an error it is unchanged.

    Args:
        model: Any torch model. Of a wrapper (compiled, data parallel) the model inside is saved.
        path: The file to write.

    Returns:
        What the file stores of each tensor.

    Raises:
        OSError: The file cannot be written.
        TypeError: `model` is not a torch.nn.Module.
        ValueError: The state_dict has something that a safetensors file cannot store.

    Example:
        >>> model = nn.Linear(100, 100)
        >>> _ = Sparsifier(nn.Sequential(model), layers='0').sparsify(0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_sparse(model, f'{folder}/model.safetensors')
        ...     loaded = load_sparse(f'{folder}/model.safetensors', nn.Linear(100, 100))
        >>> saved.ratio < 0.2, torch.equal(loaded.weight, model.weight)
        (True, True)
    """
    check_is_module("save_sparse", "model", model)
    return write_state("save_sparse", path, state_of("save_sparse", model))


def write_state(
    operation: str, path: str | os.PathLike, state: Mapping[str, Tensor], more: Mapping[str, str] | None = None
) -> SparseFile:
    """Write tensors to a file without their zeros.

    Args:
        operation: Name of the function that was called, for messages.
        path: The file.
        state: The tensors by name.
        more: Further metadata of the file.

    Raises:
        OSError: The file cannot be written.
        ValueError: A tensor cannot be stored.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{operation}: path is a folder; pass the name of a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"{operation}: the folder does not exist; create it first", str(path.parent)
        )
    ties = ties_of(state)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in progress(state.items(), "compressing"):
        tensors[name] = tensors[ties[name]] if name in ties else StoredTensor.of(name, tensor)
    return SparseFile._of(path, tensors, write_tensors(path, tensors, more))


@torch.no_grad()
@checks_arguments
def load_sparse(path: str | os.PathLike, model: nn.Module) -> nn.Module:
    """Load a file of `save_sparse`, or a folder of `save_pretrained_sparse`, into a model, bit for bit.

    Parameters stay the same objects on the same devices. After an error the model is unchanged.

    Args:
        path: The file, or the folder. Files of compressed-tensors in the form sparse-bitmask are read, too.
        model: A model with the same names, shapes and dtypes as the saved one. Of a wrapper (compiled, data parallel)
            the model inside is loaded into.

    Returns:
        The model.

    Raises:
        OSError: The file cannot be read.
        TypeError: `model` is not a torch.nn.Module.
        ValueError: The file was not written by `save_sparse`, is damaged, or does not fit the model.

    Example:
        >>> model = nn.Linear(100, 100)
        >>> Sparsifier(model).sparsify(0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_sparse(model, f'{folder}/model.safetensors')
        ...     loaded = load_sparse(f'{folder}/model.safetensors', nn.Linear(100, 100))
        >>> torch.equal(loaded.weight, model.weight)
        True
    """
    check_is_module("load_sparse", "model", model)
    path, state = Path(path), state_of("load_sparse", model)
    tensors, _ = read_tensors(path)
    if path.is_dir():
        tensors = _with_ties(tensors, ties_of(state))
    _check_names(path, model, state, tensors)
    for name, tensor in state.items():
        _check_fits(path, name, tensor, tensors[name])
    expanded = {name: stored.expand() for name, stored in progress(tensors.items(), "reading") if stored.name == name}
    values = {name: expanded[tensors[name].name] for name in state}
    for name, first in ties_of(state).items():
        if not np.array_equal(bits_of(values[name]), bits_of(values[first])):
            raise ValueError(
                f"load_sparse: {printable(first)} and {printable(name)} are one tensor in the model, but differ in "
                f"{path}; untie them first"
            )
    unwrapped(model).load_state_dict(values)
    return model


def state_of(operation: str, model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a model, checked for what a file cannot store."""
    return check_storable(operation, model, dict(unwrapped(model).state_dict()))


def check_storable(operation: str, model: nn.Module, state: dict[str, Any]) -> dict[str, Tensor]:
    """The same tensors, if a file can store them; ValueError if not."""
    for name, value in state.items():
        why = _why_not_storable(value)
        if why:
            raise ValueError(f"{operation}: {printable(name)} of {type(unwrapped(model)).__name__} is {why}")
    return state


def _why_not_storable(value: Any) -> str:
    """Why a file cannot store an entry of a state_dict, and what to do; empty if it can."""
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}, not a tensor; keep it out of the state_dict, in a file of its own"
    if is_lazy(value):
        return "not initialized yet; run the model on a batch first"
    if is_sharded(value):
        return (
            "a shard; gather the tensors with torch.distributed.checkpoint.state_dict.get_model_state_dict and "
            "StateDictOptions(full_state_dict=True), load them into a plain model, and pass that"
        )
    if value.is_meta:
        return "on the meta device, without values; call model.to_empty(device='cpu') and initialize it first"
    if value.is_quantized:
        return "quantized; dequantize it first"
    if value.layout != torch.strided or value.is_nested or hasattr(value, "__tensor_flatten__"):
        return (
            f"a {type(value).__name__} of layout {value.layout}; convert it to a plain tensor, for example with "
            "to_dense()"
        )
    if value.dtype not in NAMES:
        return f"{str(value.dtype).removeprefix('torch.')}, which safetensors cannot store; convert it to another dtype"
    return ""


def ties_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name of a tensor -> name of an earlier one in the same memory with the same layout."""
    first: dict[tuple, str] = {}
    ties = {}
    for name, tensor in state.items():
        if tensor.numel():
            memory = (tensor.device, tensor.data_ptr(), tensor.is_conj(), tensor.is_neg())
            layout = (*memory, tensor.dtype, tensor.shape, tensor.stride())
            if first.setdefault(layout, name) != name:
                ties[name] = first[layout]
    return ties


def _with_ties(tensors: Tensors, ties: Mapping[str, str]) -> Tensors:
    """The tensors of a folder, and for each name that it lacks the one that is tied to it in the model.

    transformers saves tied weights under one of their names.
    """
    found = dict(tensors)
    for name, first in ties.items():
        for lacking, other in ((first, name), (name, first)):
            if lacking not in found and other in found:
                found[lacking] = found[other]
    return found


def _check_names(path: Path, model: nn.Module, state: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Check that the file has the names of the model, and no others."""
    missing = [name for name in state if name not in tensors]
    unexpected = [name for name in tensors if name not in state]
    if not missing and not unexpected:
        return
    found = [f"lacks {some_of(missing)}"] if missing else []
    found += [f"has {some_of(unexpected)}, which the model does not have"] if unexpected else []
    hint = f"; {close_matches(unexpected[0][:200], list(state))}" if unexpected and state else ""
    raise ValueError(
        f"load_sparse: {path} was saved from another model than {type(unwrapped(model)).__name__}: it "
        f"{' and '.join(found)}{hint}"
    )


def _check_fits(path: Path, name: str, tensor: Tensor, stored: StoredTensor) -> None:
    """Check that a tensor of the model can take the stored values."""
    dtype, own = _torch_name(stored.dtype), _torch_name(NAMES[tensor.dtype])
    if stored.shape != tensor.shape:
        raise ValueError(
            f"load_sparse: {printable(name)} has the shape {stored.shape} in {path}, but {tuple(tensor.shape)} in the "
            "model; build the model as it was when it was saved"
        )
    if dtype != own:
        raise ValueError(
            f"load_sparse: {printable(name)} is {dtype} in {path}, but {own} in the model, and a cast would lose bits; "
            f"load into a model of that dtype, as model.to(torch.{dtype}) gives, and cast it afterwards"
        )
    if tensor.is_inference() or is_fixed(tensor):
        raise ValueError(
            f"load_sparse: the values in {path} cannot be written to {printable(name)} of the model, which was made in "
            "inference mode or has elements that share memory; replace it with a copy, such as clone() gives"
        )


def _torch_name(dtype: str) -> str:
    """torch's name of a dtype of safetensors."""
    return str(DTYPES[dtype]).removeprefix("torch.")
