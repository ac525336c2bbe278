"""The format of sparse files: safetensors files with the nonzero weights of a model and where they are.

They are lossless and read without pickle. This is version 1 of the format.

The metadata of the safetensors file has the versions `sparsifai_format`, `sparsifai` and `torch`, and `tensors`, which
is JSON. It maps each name of the state_dict to its form, shape, weights, zeros, sparsity and crc32. A tensor that
shares its memory with an earlier one has {"same_as": NAME} instead. Depending on the form, the file has these tensors:

    dense    dense/NAME: the tensor
    bitmask  values/NAME: the elements that are not zero, in row-major order
             bitmask/NAME: bytes with one bit per element, the lowest bit first, set if the element is not zero
    index    values/NAME: as above
             index/NAME: the indices of these elements in row-major order, in the smallest of uint8, int16, int32, int64

In this format an element is zero if all its bits are zero, so -0.0 is none. To read one tensor with numpy:

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

import errno
import json
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..support.files import open_regular, write_whole
from ..support.printable import LONGEST_MESSAGE, printable, quoted
from ..support.version import __version__
from .safetensors_file import SafetensorsFile, check_header, header_bytes, unique_json
from .sparse_bitmask import INDEX, WEIGHTS, is_sparse_bitmask, read_files, read_folder
from .sparse_tensor import DTYPES, StoredTensor

# Name in the state_dict -> what is stored. A tensor that is the same as another maps to that one, under its name.
Tensors = Mapping[str, StoredTensor]

FORMAT = "1"


def write_tensors(path: Path, tensors: Tensors, more: Mapping[str, str] | None = None) -> int:
    """Write tensors to a file whole or not at all, so that an error leaves an earlier file unchanged.

    Args:
        path: The file.
        tensors: What to store.
        more: Further metadata, texts by name.

    Returns:
        Size of the file in bytes.

    Raises:
        OSError: The file cannot be written.
        ValueError: safetensors does not know a dtype, a name cannot be stored, or there are too many tensors.
    """
    from safetensors import __version__ as version
    from safetensors.torch import save

    entries = {
        name: stored.entry() if stored.name == name else {"same_as": stored.name} for name, stored in tensors.items()
    }
    pieces = {key: piece for stored in tensors.values() for key, piece in stored.pieces().items()}
    metadata = {
        "sparsifai_format": FORMAT, "sparsifai": __version__, "torch": torch.__version__,
        "tensors": json.dumps(entries, separators=(",", ":")), **(more or {}),
    }  # fmt: skip
    try:
        written = save(pieces, metadata)
    except KeyError as error:
        raise ValueError(f"{path}: safetensors {version} cannot store {error}; update safetensors") from None
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the name {quoted(error.object)} has half of a surrogate pair, which no file can store; rename the layer"
        ) from None
    try:
        check_header(written[8 : 8 + header_bytes(written[:8])])
    except ValueError:
        raise ValueError(
            f"{path}: {len(tensors):,} tensors are too many for one file; save the model in parts"
        ) from None
    write_whole(path, lambda file: file.write(written))
    return len(written)


def read_tensors(path: Path) -> tuple[Tensors, int]:
    """Read the tensors of a file, or of a folder that a transformers model was saved to.

    Args:
        path: The file or the folder.

    Returns:
        The tensors, and the size of the files in bytes.

    Raises:
        OSError: A file cannot be read, or the folder has no file of weights.
        ValueError: A file is damaged, or was not written by `save_sparse` or in the form `sparse-bitmask`.
    """
    if path.is_dir():
        if not _has_weights(path):
            raise IsADirectoryError(
                errno.EISDIR, f"it is a folder without {WEIGHTS}; pass a file, or a folder that has one", str(path)
            )
        try:
            return read_folder(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({printable(str(error), LONGEST_MESSAGE)}); get a new copy") from None
    tensors, _, size = read_with_metadata(path)
    return tensors, size


def read_with_metadata(path: Path) -> tuple[Tensors, Mapping[str, str], int]:
    """Read the tensors of a file. All of them are checked and none is expanded.

    Args:
        path: The file. It is opened once, so another process may replace it meanwhile.

    Returns:
        The tensors, the metadata, and the size of the file in bytes.

    Raises:
        OSError: The file cannot be read, or is a folder, a device, a pipe or a socket.
        ValueError: The file was not written by `write_tensors`, or is damaged.
    """
    with open_regular(path) as opened:
        if not _begins_as_safetensors(opened):
            raise ValueError(
                f"{path} was not written by save_sparse and is not a safetensors file; read files of torch.save with "
                "torch.load"
            )
        try:
            file = SafetensorsFile.read(opened)
            version = file.metadata.get("sparsifai_format")
            if version == FORMAT:
                return _tensors(file), file.metadata, file.bytes
            if version is None and is_sparse_bitmask(file.pieces):
                return read_files([file]), file.metadata, file.bytes
        except ValueError as error:
            why = printable(str(error), LONGEST_MESSAGE)
            raise ValueError(
                f"{path} is damaged, or was not written by save_sparse ({why}); get a new copy of the file"
            ) from None
    if version is None:
        raise ValueError(
            f"{path} is a dense safetensors file that was not written by save_sparse; load it with "
            "safetensors.torch.load_file"
        )
    raise ValueError(
        f"{path} has version {version[:20]!r} of the format, but only version {FORMAT!r} is known; update sparsifai"
    )


def is_safetensors(path: str | os.PathLike) -> bool:
    """Whether a file begins as safetensors files do, with a length and JSON. Pickle and zip files do not.

    Of a folder, whether a transformers model was saved to it in such files.
    """
    if _has_weights(path):
        return True
    with open_regular(path) as file:
        return _begins_as_safetensors(file)


def _has_weights(folder: str | os.PathLike) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in (WEIGHTS, INDEX))


def _begins_as_safetensors(file: BinaryIO) -> bool:
    found = file.read(9)[8:] == b"{"
    file.seek(0)
    return found


def _tensors(file: SafetensorsFile) -> Tensors:
    left = dict.fromkeys(file.pieces)
    entries = unique_json(file.metadata.get("tensors", ""), "its metadata")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError("its metadata does not map names to forms")

    def piece(key: str) -> Any:
        if key not in left:
            raise ValueError(f"it has no {key}")
        del left[key]
        found = file.pieces[key]
        return found.dtype, found.shape, lambda: file.tensor(key)

    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        if "same_as" not in entry:
            tensors[name] = StoredTensor.read(name, entry, piece)
        elif isinstance(entry["same_as"], str) and entry["same_as"] in tensors:
            tensors[name] = tensors[entry["same_as"]]
        else:
            raise ValueError(f"{name} is the same as {str(entry['same_as'])[:100]!r}, which does not come before it")
    if left:
        raise ValueError(f"it has {some_of(left)}, which its metadata does not mention")
    return tensors


def dense_bytes(tensors: Tensors) -> int:
    """Size of the safetensors file, header included, that would hold the tensors dense."""
    order = {dtype: position for position, dtype in enumerate(DTYPES)}
    header, end = {}, 0
    distinct = [stored for name, stored in tensors.items() if stored.name == name]
    for stored in sorted(distinct, key=lambda stored: (order[stored.dtype], stored.name)):
        begin, end = end, end + stored.dense_bytes
        header[stored.name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [begin, end]}
    written = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + written + -written % 8 + end


def some_of(names: Iterable[str]) -> str:
    """The first three of several names, for a message."""
    shown = [repr(name[:200]) for name in islice(names, 4)]
    return ", ".join([*shown[:3], *(["..."] if len(shown) > 3 else [])])
