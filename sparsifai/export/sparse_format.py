"""Files that hold the non-zero weights of a model and where they are: safetensors files, lossless, read without pickle.

The format, version 1. The metadata of the safetensors file have `sparsifai_format`, `sparsifai` and `torch`, versions,
and `tensors`: JSON that maps each name of the model's state_dict to its form, shape, weights, zeros, sparsity and
crc32, or, of a tensor that shares its memory with an earlier one, to {"same_as": that one's name}. By form the file has

    dense    dense/NAME: the tensor
    bitmask  values/NAME: the elements that are not zero, in row-major order
             bitmask/NAME: bytes, a bit for each element, the lowest first, set if it is among the values
    index    values/NAME: as above
             index/NAME: the places of these in row-major order, in the smallest of uint8, int16, int32 and int64

Zero is an element whose bits are all zero. To read one with numpy:

    with safetensors.safe_open(path, "np") as file:
        entry = json.loads(file.metadata()["tensors"])[name]
        if entry["form"] == "dense":
            tensor = file.get_tensor(f"dense/{name}")
        else:
            values, places = file.get_tensor(f"values/{name}"), file.get_tensor(f"{entry['form']}/{name}")
            if entry["form"] == "bitmask":
                places = numpy.flatnonzero(numpy.unpackbits(places, count=entry["weights"], bitorder="little"))
            tensor = numpy.zeros(entry["shape"], values.dtype)
            tensor.flat[places] = values
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from ..support.version import __version__
from .sparse_tensor import DTYPES, StoredTensor

# What is stored by name; a tensor that is the same as another is that one, whose name it has.
Tensors = Mapping[str, StoredTensor]

_FORMAT = "1"

# Bytes of a header: of larger ones hostile JSON takes seconds and gigabytes. Enough for some twenty thousand tensors.
_LARGEST_HEADER = 2**24


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write tensors to a file at once: on an error an earlier one is still there. ValueError if they cannot be held."""
    from safetensors import __version__ as version
    from safetensors.torch import save

    entries = {
        name: stored.entry() if stored.name == name else {"same_as": stored.name} for name, stored in tensors.items()
    }
    pieces = {key: piece for stored in tensors.values() for key, piece in stored.pieces().items()}
    metadata = {
        "sparsifai_format": _FORMAT, "sparsifai": __version__, "torch": torch.__version__,
        "tensors": json.dumps(entries, separators=(",", ":")),
    }  # fmt: skip
    try:
        written = save(pieces, metadata)
    except KeyError as error:
        raise ValueError(f"{path}: safetensors {version} cannot hold {error}; update it") from None
    if _header(written) > _LARGEST_HEADER:
        raise ValueError(f"{path}: {len(tensors):,} tensors are too many for one file; save the model in parts")
    # Of its own name, as other processes may write the same file, and others' files may be called anything.
    part = path.with_name(f".{uuid4().hex}.part")
    try:
        part.write_bytes(written)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_tensors(path: Path) -> Tensors:
    """The tensors of a file, all of them checked and none expanded. ValueError if it is not as `write` makes it,
    OSError if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    if not is_safetensors(path):
        raise ValueError(f"{path} is no file of save_sparse, nor of safetensors; torch.load reads those of torch.save")
    try:
        with open(path, "rb") as file:
            header = _header(file.read(8))
        if header > min(_LARGEST_HEADER, path.stat().st_size):
            raise ValueError(f"a header of {header:,} bytes")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            version = metadata.get("sparsifai_format")
            if version == _FORMAT:
                return _tensors(file, metadata)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no file of save_sparse ({error}); get it anew") from None
    if version is None:
        raise ValueError(
            f"{path} is a dense safetensors file, none of save_sparse; load it with safetensors.torch.load_file"
        )
    raise ValueError(f"{path} has version {version[:20]!r} of the format, known is {_FORMAT!r}; update sparsifai")


def is_safetensors(path: str | os.PathLike) -> bool:
    """Whether a file begins as those of safetensors do, and no pickle nor zip does: a length, and JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _header(beginning: bytes) -> int:
    """Size of the header of a safetensors file in bytes."""
    return int.from_bytes(beginning[:8], "little")


def _tensors(file: Any, metadata: Mapping[str, str]) -> Tensors:
    pieces = dict.fromkeys(file.keys())
    try:
        entries = json.loads(metadata.get("tensors", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata are no JSON: {type(error).__name__}") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError("its metadata do not map names to forms")

    def piece(key: str) -> Any:
        if key not in pieces:
            raise ValueError(f"it has no {key}")
        del pieces[key]
        found = file.get_slice(key)
        return found.get_dtype(), found.get_shape(), lambda: file.get_tensor(key)

    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        if "same_as" not in entry:
            tensors[name] = StoredTensor.read(name, entry, piece)
        elif isinstance(entry["same_as"], str) and entry["same_as"] in tensors:
            tensors[name] = tensors[entry["same_as"]]
        else:
            raise ValueError(
                f"{name} is said to be the same as {str(entry['same_as'])[:100]!r}, which does not come before it"
            )
    if pieces:
        raise ValueError(f"it has {some_of(pieces)}, of which its metadata do not tell")
    return tensors


def dense_bytes(tensors: Tensors) -> int:
    """Size of the safetensors file of tensors, dense, header and all, without writing it."""
    order = {dtype: position for position, dtype in enumerate(DTYPES)}
    header, end = {}, 0
    distinct = [stored for name, stored in tensors.items() if stored.name == name]
    for stored in sorted(distinct, key=lambda stored: (order[stored.dtype], stored.name)):
        begin, end = end, end + stored.dense_bytes
        header[stored.name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [begin, end]}
    written = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + written + -written % 8 + end


def some_of(names: Iterable[str]) -> str:
    """The first of several names, for a message."""
    shown = [repr(name[:200]) for name in islice(names, 4)]
    return ", ".join([*shown[:3], *(["..."] if len(shown) > 3 else [])])
