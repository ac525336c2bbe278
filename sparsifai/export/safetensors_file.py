"""Reading a safetensors file that others may have made: its header first, then one tensor after the other.

The format: 8 bytes with the length of the header, the header, which is JSON, and the bytes of all tensors, without
gaps. Source: https://github.com/huggingface/safetensors#format. Unlike other readers, this one refuses a name that
stands twice in the header, and reads from an open file, without mapping it to memory: a mapped file that another
process cuts off ends the process that reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .sparse_tensor import DTYPES

# Limits of the header, enough for some twenty thousand tensors: bytes, and commas and brackets. Malicious JSON beyond
# could take seconds and gigabytes to read.
LARGEST_HEADER = 2**24
MOST_VALUES = 2 * 10**6


@dataclass(frozen=True)
class Piece:
    """A tensor of a file: what its header says, and where its bytes are.

    Attributes:
        dtype: Its dtype, as safetensors names it.
        shape: Its shape.
        begin: Its first byte in the file.
        bytes: How many bytes it has.
    """

    dtype: str
    shape: list[int]
    begin: int
    bytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file that is open.

    Attributes:
        file: The open file.
        bytes: Size of the whole file.
        metadata: The metadata of the header, texts by name.
        pieces: The tensors by name.
    """

    file: BinaryIO
    bytes: int
    metadata: Mapping[str, str]
    pieces: Mapping[str, Piece]

    @classmethod
    def read(cls, file: BinaryIO) -> SafetensorsFile:
        """Read the header of an open file, and check that all of it fits together.

        Args:
            file: The file, at its begin.

        Raises:
            ValueError: It is not a safetensors file, is damaged, or its header is too large.
        """
        size = os.fstat(file.fileno()).st_size
        length = header_bytes(file.read(8))
        if length > min(LARGEST_HEADER, size - 8):
            raise ValueError(f"its header has {length:,} bytes")
        header = file.read(length)
        check_header(header)
        try:
            entries = unique_json(header.decode(), "its header")
        except UnicodeDecodeError:
            raise ValueError("its header is not UTF-8") from None
        if not isinstance(entries, dict):
            raise ValueError("its header does not map names to tensors")
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are not texts")
        pieces = {name: _piece(name, entry, 8 + length) for name, entry in entries.items()}
        end = 8 + length
        for name, piece in sorted(pieces.items(), key=lambda each: (each[1].begin, each[1].bytes)):
            if piece.begin != end:
                raise ValueError(f"there is a gap or an overlap before {name[:100]!r}")
            end += piece.bytes
        if end != size:
            raise ValueError(f"its tensors end at byte {end:,}, and the file at {size:,}")
        return cls(file, size, metadata, pieces)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor, whose dtype torch must have.

        Raises:
            ValueError: Its bytes are not there any more, or its shape and dtype need other bytes.
        """
        piece = self.pieces[name]
        dtype = DTYPES[piece.dtype]
        if prod(piece.shape) * dtype.itemsize != piece.bytes:
            raise ValueError(f"{name} has {piece.bytes:,} bytes, not those of {piece.shape} of {piece.dtype}")
        tensor = torch.empty(piece.shape, dtype=dtype)
        self.file.seek(piece.begin)
        if self.file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != piece.bytes:  # type: ignore[attr-defined]
            raise ValueError("it is cut off")
        return tensor


def header_bytes(begin: bytes) -> int:
    """The length of the header of a safetensors file in bytes, from its first 8 bytes."""
    if len(begin) < 8:
        raise ValueError("it has less than 8 bytes")
    return int.from_bytes(begin[:8], "little")


def check_header(header: bytes) -> None:
    """Check that a header is not too large to read.

    Raises:
        ValueError: It is.
    """
    if len(header) > LARGEST_HEADER or sum(map(header.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"its header has {len(header):,} bytes and too many values")


def unique_json(text: str, what: str) -> Any:
    """Read JSON in which no name stands twice in a mapping.

    Args:
        text: The JSON.
        what: What it is, for the message, such as 'its header'.

    Raises:
        ValueError: It is not JSON, a name stands twice, or a text has half a character.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError(f"{what} is not JSON: a name stands twice")
        for name in found:
            name.encode()  # a surrogate alone, as in "\\ud800", is no character
        return found

    def whole_number(digits: str) -> int:
        if len(digits) > 20:
            raise ValueError(f"{what} is not JSON: a number has {len(digits):,} digits")
        return int(digits)

    def refuse(constant: str) -> None:
        raise ValueError(f"{what} is not JSON: it has {constant}")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_int=whole_number, parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeEncodeError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {type(error).__name__}") from None


def _piece(name: str, entry: Any, begin: int) -> Piece:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:100]!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name[:100]!r} has a wrong dtype, shape or data_offsets")
    if offsets[0] > offsets[1]:
        raise ValueError(f"{name[:100]!r} ends before it begins")
    return Piece(dtype, shape, begin + offsets[0], offsets[1] - offsets[0])


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 64 and all(type(each) is int and 0 <= each < 2**63 for each in value)
    )
