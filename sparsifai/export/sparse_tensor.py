"""One tensor of a sparse file: dense, or its nonzero values and where they are, whichever is smallest.

Elements are handled as integers of the same width, so that every bit is kept. An element is zero if none of its bits is
set: -0.0 and NaN are stored as values.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.tensors import computable
from ..model.zeros import Count, has_zero

# safetensors' names of torch's dtypes, in the order in which it writes tensors to a file.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype)
    for name, dtype in (
        ("U64", "uint64"), ("I64", "int64"), ("F64", "float64"), ("C64", "complex64"), ("F32", "float32"),
        ("U32", "uint32"), ("I32", "int32"), ("BF16", "bfloat16"), ("F16", "float16"), ("U16", "uint16"),
        ("I16", "int16"), ("F8_E5M2FNUZ", "float8_e5m2fnuz"), ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
        ("F8_E8M0", "float8_e8m0fnu"), ("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2"), ("I8", "int8"),
        ("U8", "uint8"), ("BOOL", "bool"),
    )
    if hasattr(torch, dtype)
}  # fmt: skip


NAMES = {dtype: name for name, dtype in DTYPES.items()}

# A tensor of the file: its dtype, its shape, and a function that reads it.
Piece = tuple[str, list[int], Callable[[], Tensor]]

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# Integers for indices: those that safetensors 0.4 knows too.
_PLACES: dict[np.dtype[Any], str] = {
    np.dtype(name): kind for name, kind in (("u1", "U8"), ("i2", "I16"), ("i4", "I32"), ("i8", "I64"))
}


_BITS_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)

# Bytes of the header that one more tensor of the file takes, about. A sparse form has one more than the dense form, so
# it must save more than this.
PIECE = 100


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in one of three forms.

    Attributes:
        name: Its name in the state_dict.
        shape: Its shape.
        dtype: Its dtype, as safetensors names it.
        form: 'dense', 'bitmask' or 'index'.
        values: The elements that are stored, as integers in one dimension, in row-major order: all of them if dense,
            else those that are not zero.
        places: Where the values are. bitmask: one bit per element, the lowest bit of a byte first, set for values.
            index: the index of each value, ascending. None if dense.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    form: str
    values: np.ndarray
    places: np.ndarray | None = None

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> StoredTensor:
        """Store a copy of a tensor in the form that takes the fewest bytes.

        Args:
            name: Its name in the state_dict.
            tensor: A tensor of any shape, whose dtype safetensors knows.
        """
        # Cloned, because a conjugate or negative view has its values only in a copy.
        values = bits_of(tensor.detach().cpu().clone(memory_format=torch.contiguous_format))
        is_set = values != 0
        width = _width(values.size)
        sparse = np.count_nonzero(is_set) * values.itemsize + PIECE
        sizes = {
            "dense": values.nbytes,
            "bitmask": sparse + math.ceil(values.size / 8),
            "index": sparse + np.count_nonzero(is_set) * width.itemsize,
        }
        form = min(sizes, key=sizes.__getitem__)
        stored = (name, tuple(tensor.shape), NAMES[tensor.dtype], form)
        if form == "dense":
            return cls(*stored, values)
        places = np.packbits(is_set, bitorder="little") if form == "bitmask" else np.flatnonzero(is_set).astype(width)
        return cls(*stored, values[is_set], places)

    @classmethod
    def read(cls, name: str, entry: Any, piece: Callable[[str], Piece]) -> StoredTensor:
        """Read a tensor from a file. Only as much memory is allocated as the file itself has bytes.

        Args:
            name: Its name in the state_dict.
            entry: Its entry in the metadata.
            piece: Gives a tensor of the file by its name.

        Raises:
            ValueError: The entry and the file are not as `of` makes them.
        """
        shape = entry.get("shape")
        if not is_shape(shape):
            raise ValueError(f"the shape of {name} is {str(shape)[:100]}, which is not a shape")
        form, weights = entry.get("form"), math.prod(shape)
        if form == "dense":
            dtype, found, read = piece(f"dense/{name}")
            if found != shape:
                raise ValueError(f"{name} has the shape {shape} in the metadata, but {str(found)[:100]} in the data")
            stored = cls(name, tuple(shape), dtype, form, values_of(name, dtype, read))
        elif form in ("bitmask", "index"):
            dtype, found, read = piece(f"values/{name}")
            of_places, *expected = (
                ("U8", math.ceil(weights / 8)) if form == "bitmask" else (_PLACES[_width(weights)], math.prod(found))
            )
            kind, there, read_places = piece(f"{form}/{name}")
            if (kind, there) != (of_places, expected) or len(found) != 1:
                raise ValueError(
                    f"the {form} of {name} has the dtype {kind} and the shape {str(there)[:100]}, for values of shape "
                    f"{str(found)[:100]}; expected are {of_places} and {expected}"
                )
            stored = cls(name, tuple(shape), dtype, form, values_of(name, dtype, read), read_places().numpy())
            stored._check_places(weights)
        else:
            raise ValueError(f"{name} is stored as {str(form)[:100]!r}, not as dense, bitmask or index")
        for key, value in stored.entry().items():
            if entry.get(key) != value:
                raise ValueError(f"the {key} of {name} is {value}, but {str(entry.get(key))[:100]} in the metadata")
        return stored

    def _check_places(self, weights: int) -> None:
        assert self.places is not None
        places, values = self.places, self.values.size
        if not self.values.all():
            raise ValueError(f"the values of {self.name} have zeros among them")
        if self.form == "bitmask":
            bits = int(_BITS_SET[places].sum(dtype=np.int64))
            if bits != values:
                raise ValueError(f"the bitmask of {self.name} has {bits} bits set, but there are {values} values")
            if weights % 8 and places[-1] >> weights % 8:
                raise ValueError(f"the bitmask of {self.name} has bits set beyond its {weights} elements")
        elif values and not (places[0] >= 0 and places[-1] < weights and (places[1:] > places[:-1]).all()):
            raise ValueError(f"the indices of {self.name} are not ascending from 0 to at most {weights - 1}")

    @property
    def count(self) -> Count:
        """Elements, and how many of them are zero: 0.0 or -0.0."""
        weights, dtype = math.prod(self.shape), DTYPES[self.dtype]
        if not has_zero(dtype):
            return Count(weights, 0)
        return Count(weights, weights - int(torch.count_nonzero(computable(torch.from_numpy(self.values).view(dtype)))))

    @property
    def unset(self) -> Count:
        """Elements, and how many of them have no bit set."""
        weights = math.prod(self.shape)
        return Count(weights, weights - int(np.count_nonzero(self.values)))

    @property
    def bytes(self) -> int:
        """Bytes of the values and of where they are."""
        return self.values.nbytes + (0 if self.places is None else self.places.nbytes)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.values.itemsize

    def entry(self) -> dict[str, Any]:
        """Its entry in the metadata. The crc32 is over the bytes of `places`, if there are any, and of `values`."""
        count, checksum = self.unset, 0 if self.places is None else zlib.crc32(self.places.data)
        return {
            "form": self.form, "shape": list(self.shape), "weights": count.weights, "zeros": count.zeros,
            "sparsity": round(count.sparsity, 6), "crc32": zlib.crc32(self.values.data, checksum),
        }  # fmt: skip

    def pieces(self) -> dict[str, Tensor]:
        """The tensors of the file that store it, by name. The names begin with the form, so they are unique."""
        values = torch.from_numpy(self.values).view(DTYPES[self.dtype])
        if self.places is None:
            return {f"dense/{self.name}": values.reshape(self.shape)}
        return {f"{self.form}/{self.name}": torch.from_numpy(self.places), f"values/{self.name}": values}

    def expand(self) -> Tensor:
        """The tensor with its zeros."""
        flat = self.values
        if self.places is not None:
            flat = np.zeros(math.prod(self.shape), self.values.dtype)
            bitmask = self.form == "bitmask"
            where = np.unpackbits(self.places, count=flat.size, bitorder="little") if bitmask else self.places
            flat[where.view(bool) if bitmask else where] = self.values
        return torch.from_numpy(flat).view(DTYPES[self.dtype]).reshape(self.shape)


def bits_of(tensor: Tensor) -> np.ndarray:
    """The elements of a tensor as integers, in one dimension."""
    return tensor.reshape(-1).view(_INTEGER[tensor.element_size()]).numpy()


def _width(weights: int) -> np.dtype:
    """The smallest integers that can number so many elements."""
    return next(width for width in _PLACES if weights <= np.iinfo(width).max + 1)


def is_shape(shape: Any) -> bool:
    """Whether this is a shape that torch can have. Axes of length 0 count as 1, as their strides can overflow too."""
    whole = isinstance(shape, list) and len(shape) <= 64 and all(type(size) is int and size >= 0 for size in shape)
    return whole and math.prod(max(size, 1) for size in shape) < 2**63


def values_of(name: str, dtype: str, read: Callable[[], Tensor]) -> np.ndarray:
    """The elements that a function reads, as integers in one dimension; ValueError if torch lacks their dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"{name} has the dtype {dtype}, which torch {torch.__version__} does not have")
    return bits_of(read())
