"""Files of torch.save: checked from the outside in, then read without running code, within limits of time and memory.

A file is a zip archive of records that are not compressed: the pickle, and each storage. torch.load would expand what
is compressed, would believe the sizes in the pickle, and compares no checksums; all that is checked before it sees the
file.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.serialization import safe_globals

from .files import open_regular
from .pickles import PickleCheck
from .warning import own_filters

# Limits, more than ten times what the checkpoint of a large language model needs.
MOST_RECORDS = 200_000
LARGEST_PICKLE = 2**26

_CHUNK = 2**20

_BEGIN_OF_OLD_FILES = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickle of a number, before torch 1.6

_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")


def load_checkpoint(path: str | os.PathLike, *, others: bool = False) -> Any:
    """Load a file of torch.save onto the CPU. No code in it is run, and no more is made than the file is large.

    Args:
        path: The file. It is opened once, so another process may replace it meanwhile.
        others: Whether files of others are read, too: of torch before 1.6, and with the numbers of numpy and the lists
            of fastcore that the state of fastai's optimizers has.

    Returns:
        What was saved.

    Raises:
        OSError: The file cannot be read, or is a folder, a device, a pipe or a socket.
        ValueError: It is not a file of torch.save, is damaged, or holds what is not read.
    """
    # Warnings: torch's, about how it stores sparse and quantized tensors, and pickletools', about damaged texts.
    with open_regular(path) as file, own_filters():
        warnings.simplefilter("ignore")
        size = os.fstat(file.fileno()).st_size
        begin = file.read(len(_BEGIN_OF_OLD_FILES))
        file.seek(0)
        if others and begin == _BEGIN_OF_OLD_FILES:
            check = PickleCheck(size, None, others)
            for _ in range(5):  # a number, the version, the system, the content, the order of the storages
                check.follow(file)
        elif begin[:4] == b"PK\x03\x04":
            _check_archive(file, size, others)
        else:
            raise ValueError("it does not begin as a file of torch.save does")
        file.seek(0)
        try:
            with safe_globals(_classes_of_others() if others else []):
                return torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch raises whatever it finds in a file
            # torch checks these after the next file that it loads, whichever that is.
            getattr(torch._utils, "_sparse_tensors_to_validate", []).clear()
            first = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"torch cannot load it, {first[:200]!r}") from None


def _classes_of_others() -> list[Any]:
    """What torch.load is to make beside tensors: none of it runs code of the file."""
    scalar = np.float64(0).__reduce__()[0]
    known = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdFD"}
    # fastai need not be installed. Then no file has its lists, or torch tells that they are unknown.
    lists = [] if find_spec("fastcore") is None else [import_module("fastcore.foundation").L]
    return [*known, np.dtype, *kinds, *lists]


@dataclass
class _Record:
    offset: int
    bytes: int
    crc32: int


def _check_archive(file: BinaryIO, size: int, others: bool) -> None:
    """Check that the records are stored as they are, and that the pickle says no other sizes."""
    records = _records(file, size)
    folder = next(iter(records), b"").partition(b"/")[0]
    pickle = records.get(folder + b"/data.pkl")
    if pickle is None:
        raise ValueError("it is a zip archive without the records of torch.save")
    if pickle.bytes > LARGEST_PICKLE:
        raise ValueError(f"its pickle has more than {LARGEST_PICKLE:,} bytes")
    data = folder + b"/data/"
    storages = {
        name[len(data) :].decode("latin1"): record.bytes for name, record in records.items() if name.startswith(data)
    }
    PickleCheck(size, storages, others).follow(BytesIO(b"".join(_content(file, pickle))))
    for name, record in records.items():  # torch compares none
        checksum = 0
        for part in _content(file, record):
            checksum = zlib.crc32(part, checksum)
        if record.crc32 not in (checksum, 0):  # 0 with torch.serialization.set_crc32_options(False)
            raise ValueError(f"the checksum of its record {name[-100:].decode('latin1')!r} is wrong")


def _records(file: BinaryIO, size: int) -> dict[bytes, _Record]:
    """The records of an archive by name, in lower case, as torch does not tell cases apart."""
    begin, end, count = _directory(file, size)
    if count > MOST_RECORDS or end - begin > 100 * LARGEST_PICKLE // 64:
        raise ValueError(f"it has {count:,} records, and the limit is {MOST_RECORDS:,}")
    directory = _read(file, begin, end - begin)
    records: dict[bytes, _Record] = {}
    place = 0
    for _ in range(count):
        entry = _unpack(_ENTRY, directory, place, b"PK\x01\x02")
        flags, method, crc32, packed, unpacked, name_bytes, extra_bytes, comment_bytes, offset = (
            entry[3], entry[4], *entry[7:13], entry[16],
        )  # fmt: skip
        place += _ENTRY.size
        name = directory[place : place + name_bytes].lower()
        extra = directory[place + name_bytes : place + name_bytes + extra_bytes]
        place += name_bytes + extra_bytes + comment_bytes
        packed, unpacked, offset = _in_64_bits(extra, unpacked, packed, offset)
        if method != 0 or packed != unpacked or flags & 1:
            raise ValueError("its records are compressed or encrypted; torch.save does neither")
        if name in records:
            raise ValueError("it has two records of one name")
        records[name] = _Record(offset, packed, crc32)
    if place != len(directory):
        raise ValueError("its directory has another length than it says")
    _check_apart(records, begin)
    return records


def _check_apart(records: Mapping[bytes, _Record], end: int) -> None:
    """Check that no two records share bytes, so that all together are no larger than the file."""
    last = 0
    for name, record in sorted(records.items(), key=lambda each: (each[1].offset, each[1].bytes)):
        if record.offset < last:
            raise ValueError("its records overlap")
        last = record.offset + _LOCAL.size + len(name) + record.bytes
    if last > end:
        raise ValueError("its records are longer than the file")


def _directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Begin and end of the directory of an archive, and how many records it has.

    Only what torch.save writes is read: the directory ends where the end record begins, and that ends the file. So
    no two readers can find two different directories.
    """
    end = size - _END.size
    tail = _read(file, max(end - _LOCATOR.size - _END_64.size, 0), size)
    if end < 0:
        raise ValueError("it is cut off")
    _, disk, first_disk, count_here, count, length, begin, comment = _unpack(
        _END, tail, len(tail) - _END.size, b"PK\x05\x06"
    )
    found = (count, length, begin)
    place = len(tail) - _END.size - _LOCATOR.size
    if tail[max(place, 0) :][:4] == b"PK\x06\x07" and place >= _END_64.size:
        _, locator_disk, where, disks = _unpack(_LOCATOR, tail, place, b"PK\x06\x07")
        end -= _LOCATOR.size + _END_64.size
        entry = _unpack(_END_64, tail, place - _END_64.size, b"PK\x06\x06")
        if (where, locator_disk, disks, entry[1], *entry[4:6]) != (end, 0, 1, _END_64.size - 12, 0, 0):
            raise ValueError("its end is damaged")
        if entry[6] != entry[7] or any(
            one not in (two, limit)
            for one, two, limit in zip(found, entry[7:], (0xFFFF, 2**32 - 1, 2**32 - 1), strict=True)
        ):
            raise ValueError("its end is damaged")
        count, length, begin = entry[7:]
    elif count_here != count:
        raise ValueError("its end is damaged")
    if disk or first_disk or comment or begin + length != end:
        raise ValueError("its end is damaged")
    return begin, end, count


def _in_64_bits(extra: bytes, unpacked: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Sizes and offset of a record, of which large ones stand in the extra field."""
    values = [unpacked, packed, offset]
    if 2**32 - 1 in values:
        place = 0
        while place + 4 <= len(extra) and extra[place : place + 2] != b"\x01\x00":
            place += 4 + int.from_bytes(extra[place + 2 : place + 4], "little")
        field = extra[place + 4 :][: int.from_bytes(extra[place + 2 : place + 4], "little")]
        for number, value in enumerate(values):
            if value == 2**32 - 1:
                if len(field) < 8:
                    raise ValueError("its directory is damaged")
                values[number], field = int.from_bytes(field[:8], "little"), field[8:]
    return values[1], values[0], values[2]


def _content(file: BinaryIO, record: _Record) -> Iterator[bytes]:
    """The bytes of a record, in parts."""
    local = _unpack(_LOCAL, _read(file, record.offset, _LOCAL.size), 0, b"PK\x03\x04")
    begin = record.offset + _LOCAL.size + local[9] + local[10]
    for done in range(0, record.bytes, _CHUNK):
        yield _read(file, begin + done, min(_CHUNK, record.bytes - done))


def _read(file: BinaryIO, begin: int, count: int) -> bytes:
    file.seek(begin)
    return file.read(count)


def _unpack(of: struct.Struct, data: bytes, place: int, signature: bytes) -> tuple[Any, ...]:
    if place < 0 or data[place : place + 4] != signature or len(data) < place + of.size:
        raise ValueError("it is cut off or damaged")
    return of.unpack_from(data, place)
