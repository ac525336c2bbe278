"""The form `sparse-bitmask` of compressed-tensors: the weights of a transformers model without their zeros.

Versions 0.9 to 0.14 of that library read it; 0.15 dropped it. A weight MODULE.weight of the shape (..., columns) is
four tensors of a safetensors file:

    MODULE.compressed   the elements whose bit is set, in row-major order
    MODULE.bitmask      (..., ceil(columns / 8)) bytes with one bit per element, the lowest bit first; every row begins
                        with a new byte
    MODULE.row_offsets  (...) int64: how many elements of `compressed` come before a row, as the library counts it:
                        over the first axis
    MODULE.shape        (dimensions,) int64

Other tensors stand under their own names. `sparse-24-bitmask`, which is only read here, has no `row_offsets`, and
`compressed` has the shape (rows, columns / 2). In a folder the config has

    {"quantization_config":
        {"quant_method": "compressed-tensors",
         "sparsity_config": {"format": "sparse-bitmask", "targets": [MODULE, ...]}}}

Here a bit is set if any bit of the element is, so that -0.0 stays as it is; the library writes it as a zero.
Source: https://github.com/vllm-project/compressed-tensors/tree/0.14.0
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..support.files import open_regular, read_bytes
from .safetensors_file import LARGEST_HEADER, SafetensorsFile, unique_json
from .sparse_tensor import DTYPES, NAMES, PIECE, StoredTensor, bits_of, is_shape, values_of

FORM, FORM_2_4 = "sparse-bitmask", "sparse-24-bitmask"

# Names of files in a folder of transformers.
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

_WEIGHT = ".weight"
_PIECES = (".compressed", ".bitmask", ".row_offsets", ".shape")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class BitmaskTensor(StoredTensor):
    """A tensor of such a file.

    Attributes:
        form: 'sparse-bitmask', 'sparse-24-bitmask' or 'dense'.
        places: The bitmask, None if dense.
    """

    @classmethod
    def of(cls, name: str, tensor: Tensor, is_tied: bool = False) -> BitmaskTensor:
        """Store a copy of a tensor: sparse if it is a matrix called `weight` and takes fewer bytes so, else dense.

        Args:
            name: Its name in the state_dict.
            tensor: A tensor of any shape, whose dtype safetensors knows.
            is_tied: Whether it is a weight of several modules. It stays dense, because readers of sparse weights
                replace the parameter of one module and would leave the others without values.
        """
        values = bits_of(tensor.detach().cpu().clone(memory_format=torch.contiguous_format))
        dense = cls(name, tuple(tensor.shape), NAMES[tensor.dtype], "dense", values)
        if is_tied or not name.endswith(_WEIGHT) or tensor.dim() < 2 or tensor.dtype not in _FLOATS:
            return dense
        is_set = (values != 0).reshape(tensor.shape)
        places = np.packbits(is_set, axis=-1, bitorder="little")
        sparse = cls(name, dense.shape, dense.dtype, FORM, values[is_set.reshape(-1)], places)
        return sparse if sparse.bytes + 3 * PIECE < dense.bytes else dense

    @classmethod
    def read_sparse(cls, name: str, pieces: Mapping[str, tuple[SafetensorsFile, str]]) -> BitmaskTensor:
        """Read a weight that is stored sparse.

        Args:
            name: Its name in the state_dict.
            pieces: '.compressed', '.bitmask' and the others -> the file that has it, and its name there.

        Raises:
            ValueError: They do not fit together.
        """
        for piece in (".compressed", ".bitmask", ".shape"):
            if piece not in pieces:
                raise ValueError(f"it has no {name.removesuffix(_WEIGHT)}{piece}")

        def read(piece: str, dtype: str | None = None) -> Tensor:
            file, key = pieces[piece]
            found = file.pieces[key].dtype
            if dtype is not None and found != dtype or found not in DTYPES:
                raise ValueError(f"{key} has the dtype {found}{'' if dtype is None else f', not {dtype}'}")
            return file.tensor(key)

        shape = read(".shape", "I64").reshape(-1)[:100].tolist()
        if not is_shape(shape) or len(shape) < 1:
            raise ValueError(f"the shape of {name} is {str(shape)[:100]}, which is not one of a matrix")
        file, key = pieces[".compressed"]
        dtype, compressed = file.pieces[key].dtype, read(".compressed")
        bitmask = read(".bitmask", "U8")
        expected = [*shape[:-1], math.ceil(shape[-1] / 8)]
        if list(bitmask.shape) != expected:
            raise ValueError(f"the bitmask of {name} has the shape {list(bitmask.shape)}, not {expected}")
        form = FORM if ".row_offsets" in pieces else FORM_2_4
        stored = cls(name, tuple(shape), dtype, form, bits_of(compressed), bitmask.numpy())
        bits = int(np.unpackbits(stored._bitmask, axis=-1).sum(dtype=np.int64))
        if bits != stored.values.size or bits != int(stored._is_set().sum(dtype=np.int64)):
            raise ValueError(f"the bitmask of {name} has {bits} bits set, but there are {stored.values.size} values")
        if form == FORM and not np.array_equal(read(".row_offsets", "I64").numpy(), stored._row_offsets()):
            raise ValueError(f"the row_offsets of {name} do not fit its bitmask")
        return stored

    @property
    def _bitmask(self) -> np.ndarray:
        assert self.places is not None
        return self.places

    def _is_set(self) -> np.ndarray:
        """Which elements are stored: bool in the shape of the weight."""
        return np.unpackbits(self._bitmask, axis=-1, count=self.shape[-1], bitorder="little").view(bool)

    def _row_offsets(self) -> np.ndarray:
        counts = self._is_set().sum(-1, dtype=np.int64)
        return np.cumsum(counts, axis=0 if counts.ndim else None, dtype=np.int64).reshape(counts.shape) - counts

    @property
    def bytes(self) -> int:
        """Bytes of all tensors that store it."""
        if self.places is None:
            return self.values.nbytes
        offsets = math.prod(self.shape[:-1]) if self.form == FORM else 0
        return self.values.nbytes + self.places.nbytes + 8 * (offsets + len(self.shape))

    def pieces(self) -> dict[str, Tensor]:
        """The tensors of the file that store it, by name."""
        values = torch.from_numpy(self.values).view(DTYPES[self.dtype])
        if self.places is None:
            return {self.name: values.reshape(self.shape)}
        found = (values, torch.from_numpy(self.places), torch.from_numpy(self._row_offsets()), torch.tensor(self.shape))
        return {self.name.removesuffix(_WEIGHT) + piece: each for piece, each in zip(_PIECES, found, strict=True)}

    def expand(self) -> Tensor:
        """The tensor with its zeros."""
        flat = self.values
        if self.places is not None:
            flat = np.zeros(math.prod(self.shape), self.values.dtype)
            flat[self._is_set().reshape(-1)] = self.values
        return torch.from_numpy(flat).view(DTYPES[self.dtype]).reshape(self.shape)


def is_sparse_bitmask(names: Iterable[str]) -> bool:
    """Whether a safetensors file with tensors of these names has weights in this form."""
    names = set(names)
    return any(f"{name.removesuffix('.bitmask')}.compressed" in names for name in names if name.endswith(".bitmask"))


def check_names(names: Iterable[str]) -> None:
    """Check that no tensor has a name that readers would take for a piece of a sparse weight.

    Raises:
        ValueError: One has.
    """
    for name in names:
        if name.endswith(_PIECES):
            raise ValueError(f"{name!r} ends with a name that sparse-bitmask files use themselves; rename it")


def read_files(files: Iterable[SafetensorsFile]) -> dict[str, StoredTensor]:
    """Read all tensors of one or several files, which may have the pieces of one weight between them.

    Args:
        files: The open files.

    Raises:
        ValueError: They are damaged, or two have tensors of one name.
    """
    where: dict[str, SafetensorsFile] = {}
    for file in files:
        if both := where.keys() & file.pieces.keys():
            raise ValueError(f"two of its files have {min(both)[:100]!r}")
        where |= dict.fromkeys(file.pieces, file)
    modules = [name.removesuffix(".bitmask") for name in where if name.endswith(".bitmask")]
    sparse = {
        module: {piece: (where[module + piece], module + piece) for piece in _PIECES if module + piece in where}
        for module in modules
        if f"{module}.compressed" in where
    }
    used = {key for pieces in sparse.values() for _, key in pieces.values()}
    tensors: dict[str, StoredTensor] = {}
    for key, file in where.items():
        module = key.rpartition(".")[0]
        if key not in used:
            dtype, shape = file.pieces[key].dtype, file.pieces[key].shape
            values = values_of(key, dtype, partial(file.tensor, key))
            tensors[key] = BitmaskTensor(key, tuple(shape), dtype, "dense", values)
        elif f"{module}{_WEIGHT}" in where:
            raise ValueError(f"it has {module}{_WEIGHT} both dense and sparse")
        elif f"{module}{_WEIGHT}" not in tensors:
            tensors[f"{module}{_WEIGHT}"] = BitmaskTensor.read_sparse(f"{module}{_WEIGHT}", sparse[module])
    return tensors


def read_folder(folder: Path) -> tuple[dict[str, StoredTensor], int]:
    """Read the weights of a folder that a transformers model was saved to.

    Args:
        folder: It has a file `model.safetensors`, or several and an index.

    Returns:
        The tensors by name, and the bytes of the files of weights.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is damaged, or the index names one outside of the folder.
    """
    with ExitStack() as stack:
        files = [SafetensorsFile.read(stack.enter_context(open_regular(path))) for path in weight_files(folder)]
        return read_files(files), sum(file.bytes for file in files)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by name."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = unique_json(read_bytes(folder / INDEX, LARGEST_HEADER, "an index of weights").decode(), "its index")
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{INDEX} does not map names of tensors to files")
    found = sorted(set(names.values()))
    for name in found:
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX} names {name[:100]!r}, which is no safetensors file of the folder")
    return [folder / name for name in found]


def config_entry(tensors: Mapping[str, StoredTensor], sparsity: float) -> dict[str, object]:
    """What `quantization_config` of the config says of such files."""
    targets = sorted(name.removesuffix(_WEIGHT) for name, stored in tensors.items() if stored.form == FORM)
    return {
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": FORM, "targets": targets, "ignore": [], "global_sparsity": sparsity,
            "sparsity_structure": "unstructured",
        },
    }  # fmt: skip


def index_text(files: Mapping[str, Iterable[str]], size: int) -> str:
    """The index of a folder with several files: file -> names of its tensors, and the bytes of all tensors."""
    places = {name: file for file, names in files.items() for name in names}
    return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"
