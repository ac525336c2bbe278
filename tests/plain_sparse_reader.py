"""A second reader of sparse files, written from the documented format alone, to compare the first one with.

Slow and plain: it looks at one element after the other, and shares no code with the package.
"""

import json
import math
import struct
import zlib

WIDTHS = {
    "U64": 8, "I64": 8, "F64": 8, "C64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2, "I16": 2,
    "F8_E5M2FNUZ": 1, "F8_E4M3FNUZ": 1, "F8_E8M0": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


def expect(condition):
    """Refuse the file unless this is so."""
    if not condition:
        raise ValueError


def unique(pairs):
    for number, (name, _) in enumerate(pairs):
        expect(name not in [other for other, _ in pairs[:number]])
        name.encode()
    return dict(pairs)


def no_constant(_):
    raise ValueError


def parsed(text):
    """JSON without names that stand twice."""
    return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)


def whole(value, least=0):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def pieces_of(data):
    """The metadata, and name -> (dtype, shape, bytes) of the tensors of a safetensors file."""
    expect(len(data) >= 9 and data[8:9] == b"{")
    (length,) = struct.unpack("<Q", data[:8])
    expect(8 + length <= len(data))
    header = parsed(data[8 : 8 + length].decode("utf-8"))
    metadata = header.pop("__metadata__", {})
    expect(isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values()))
    body, found, spans = data[8 + length :], {}, []
    for name, entry in header.items():
        expect(isinstance(entry, dict) and sorted(entry) == ["data_offsets", "dtype", "shape"])
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        expect(isinstance(dtype, str) and dtype in WIDTHS and isinstance(shape, list) and all(map(whole, shape)))
        expect(isinstance(offsets, list) and len(offsets) == 2 and all(map(whole, offsets)))
        expect(offsets[1] - offsets[0] == WIDTHS[dtype] * math.prod(shape))
        spans.append(offsets)
        found[name] = (dtype, shape, body[offsets[0] : offsets[1]])
    end = 0
    for begin, stop in sorted(spans):
        expect(begin == end)
        end = stop
    expect(end == len(body))
    return metadata, found


def read(data):
    """Name -> (dtype, shape, bytes of all elements) of a sparse file; a ValueError if it is not one."""
    metadata, pieces = pieces_of(data)
    expect(metadata.get("sparsifai_format") == "1")
    entries, tensors = parsed(metadata.get("tensors", "")), {}
    expect(isinstance(entries, dict))
    for name, entry in entries.items():
        expect(isinstance(entry, dict))
        if "same_as" in entry:
            expect(isinstance(entry["same_as"], str) and entry["same_as"] in tensors)
            tensors[name] = tensors[entry["same_as"]]
            continue
        shape, form = entry.get("shape"), entry.get("form")
        expect(isinstance(shape, list) and all(map(whole, shape)) and form in ("dense", "bitmask", "index"))
        elements = math.prod(shape)
        if form == "dense":
            dtype, stored_shape, values = pieces.pop(f"dense/{name}", (None, None, b""))
            expect(dtype is not None and stored_shape == shape)
            width = WIDTHS[dtype]
            full, checksum = values, zlib.crc32(values)
            nonzero = sum(any(values[place : place + width]) for place in range(0, len(values), width))
        else:
            dtype, stored_shape, values = pieces.pop(f"values/{name}", (None, None, b""))
            kind, places_shape, places = pieces.pop(f"{form}/{name}", (None, None, b""))
            expect(dtype is not None and kind is not None and len(stored_shape) == 1 and len(places_shape) == 1)
            where = places_of(form, kind, places, elements)
            width, nonzero = WIDTHS[dtype], stored_shape[0]
            expect(len(where) == nonzero)
            full = bytearray(elements * width)
            for number, place in enumerate(where):
                element = values[number * width : (number + 1) * width]
                expect(any(element))
                full[place * width : (place + 1) * width] = element
            checksum = zlib.crc32(values, zlib.crc32(places))
        expect(entry.get("weights") == elements and entry.get("zeros") == elements - nonzero)
        expect(entry.get("crc32") == checksum)
        expect(entry.get("sparsity") == round((elements - nonzero) / elements if elements else 0.0, 6))
        tensors[name] = (dtype, shape, bytes(full))
    expect(not pieces)
    return tensors


def places_of(form, kind, places, elements):
    """Where the values are, in row-major order."""
    if form == "bitmask":
        expect(kind == "U8" and len(places) == math.ceil(elements / 8))
        bits = [place for place in range(8 * len(places)) if places[place // 8] >> place % 8 & 1]
        expect(all(place < elements for place in bits))
        return bits
    limits = {"U8": (2**8, "B"), "I16": (2**15, "h"), "I32": (2**31, "i"), "I64": (2**63, "q")}
    expect(elements <= 2**63)
    smallest = next(name for name, (limit, _) in limits.items() if elements <= limit)
    expect(kind == smallest)
    where = [place for (place,) in struct.iter_unpack(f"<{limits[kind][1]}", places)]
    expect(all(0 <= place < elements for place in where))
    expect(all(one < two for one, two in zip(where, where[1:], strict=False)))
    return where
