"""Hostile files, made when they are asked for: for every test that loads, reports or applies what others have written.

Each has a name that says what it does. None may run code, take more than seconds and some memory, or change anything.
"""

import io
import json
import pickle
import struct
import zipfile

import torch

HUGE = 10**12

# --- Files of torch.save ------------------------------------------------------------------------------------------


def torch_file(pickled, storages=None, compression=zipfile.ZIP_STORED, folder="archive"):
    """A file of torch.save with this pickle. storages: key -> bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(f"{folder}/data.pkl", pickled)
        archive.writestr(f"{folder}/byteorder", b"little")
        for key, data in (storages or {}).items():
            archive.writestr(f"{folder}/data/{key}", data)
        archive.writestr(f"{folder}/version", b"3\n")
    return file.getvalue()


class Call:
    """Pickled, this is a call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Storage:
    """Pickled, this is the storage of a key, with as many elements as it says."""

    def __init__(self, key, elements, kind=torch.FloatStorage):
        self.identity = ("storage", kind, key, "cpu", elements)


class Named:
    """Pickled, this is a global, such as 'os system'."""

    def __init__(self, name):
        self.name = name


class _Pickler(pickle._Pickler):
    def persistent_id(self, value):
        return value.identity if isinstance(value, Storage) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Named):
            return self.write(b"c" + value.name.replace(" ", "\n").encode() + b"\n")
        if isinstance(value, Call) and isinstance(value.function, Named):
            self.save(value.function)
            self.save(value.arguments)
            return self.write(b"R")
        return super().save(value, save_persistent_id)


def pickled(value):
    """The pickle of a value, as torch.save writes it."""
    file = io.BytesIO()
    _Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def view(storage, offset, shape, strides):
    """A tensor as torch.save writes it."""
    return Call(Named("torch._utils _rebuild_tensor_v2"), storage, offset, shape, strides, False, {})


def of_value(value, storages=None):
    """A file of torch.save with a value under the name 'weight'."""
    return torch_file(pickled({"weight": value}), storages)


def with_keys_nested(depth):
    """The keys are tuples of two times the same tuple: the file is short, but a key has 2 ** depth values to hash."""
    return torch_file(b"\x80\x02})" + b"q\x01h\x01\x86" * depth + b"Ns.")


def with_lists_nested(depth):
    """Lists in lists, to be visited by a function that calls itself."""
    return torch_file(b"\x80\x02}X\x06\x00\x00\x00weight" + b"]" * depth + b"a" * (depth - 1) + b"s.")


def with_dictionaries_nested(depth):
    """Each dictionary has the one before as its two values, so that there are 2 ** depth values to visit."""
    pair = b"}q\x02(X\x01\x00\x00\x00ah\x01X\x01\x00\x00\x00bh\x01uh\x02q\x01"
    return torch_file(b"\x80\x02}q\x01" + pair * depth + b".")


def with_calls_of(function, argument, more=b"", count=10_000):
    """The same large argument given to a function again and again. more: arguments after it, pickled."""
    call = b"h\x01(h\x02" + more + b"tR"
    begin = f"c{function}\n".replace(" ", "\n").encode() + b"q\x01" + argument + b"q\x02"
    return torch_file(b"\x80\x02](" + begin + call * count + b"e.")


def mapping_of(count):
    """A dictionary, pickled."""
    return b"}(" + b"".join(b"J" + struct.pack("<i", number) + b"N" for number in range(count)) + b"u"


def with_equal_hashes(count):
    """Keys whose hashes are all equal, so that each is compared with all before."""
    keys = (number * (2**61 - 1) for number in range(1, count + 1))
    return torch_file(b"\x80\x02}(" + b"".join(b"\x8a\x0a" + key.to_bytes(10, "little") + b"N" for key in keys) + b"u.")


def old_torch_file(value):
    """A file of torch before 1.6."""
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({}, 2)]
    return b"".join([*parts, pickled(value), pickle.dumps([], 2)])


def with_records_that_overlap():
    """Two records of the directory are the same bytes of the file."""
    data = bytearray(of_value(view(Storage("0", 9), 0, (9,), (1,)), {"0": bytes(36), "1": bytes(36)}))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        offsets = {name: archive.getinfo(f"archive/data/{name}").header_offset for name in "01"}
    place = data.rindex(b"archive/data/1") - 46
    data[place + 42 : place + 46] = struct.pack("<I", offsets["0"])
    return bytes(data)


def with_records_of_one_name():
    """Two readers may take two different ones."""
    data = of_value(view(Storage("0", 9), 0, (9,), (1,)), {"0": bytes(36), "1": bytes(36)})
    return data.replace(b"archive/data/1", b"ARCHIVE/data/0")


def with_end(**changes):
    """An archive whose end says something else."""
    data = of_value(view(Storage("0", 9), 0, (9,), (1,)), {"0": bytes(36)})
    names = ("signature", "disk", "first", "here", "count", "length", "begin", "comment")
    end = dict(zip(names, struct.unpack("<4s4H2IH", data[-22:]), strict=True)) | changes
    return data[:-22] + struct.pack("<4s4H2IH", *end.values())


def with_two_directories():
    """A second archive in the comment of the first: which one is read depends on the reader."""
    first, second = of_value(view(Storage("0", 9), 0, (9,), (1,)), {"0": bytes(36)}), of_value(None)
    return with_end(comment=len(second))[:-22] + first[-22:-2] + struct.pack("<H", len(second)) + second


# Files that are read, since nothing in them is out of proportion, but which nobody should go through to the end.
DEEP = {
    "lists nested 100,000 deep": lambda: with_lists_nested(100_000),
    "dictionaries nested 60 deep": lambda: with_dictionaries_nested(60),
    "tuples nested 300,000 deep": lambda: torch_file(
        b"\x80\x02}X\x06\x00\x00\x00weight)" + b"q\x01h\x01\x86" * 300_000 + b"s."
    ),
}

BOMB = bytes(3 * 10**8)

# Name -> function that makes the bytes of a file.
CHECKPOINTS = {
    "a storage that is compressed": lambda: torch_file(
        pickled({"weight": view(Storage("0", 75_000_000), 0, (75_000_000,), (1,))}), {"0": BOMB}, zipfile.ZIP_DEFLATED
    ),
    "a pickle that is compressed": lambda: torch_file(pickled({"weight": "x" * 10**8}), {}, zipfile.ZIP_DEFLATED),
    "a storage of 10^12 elements": lambda: of_value(view(Storage("0", HUGE), 0, (HUGE,), (1,)), {"0": bytes(36)}),
    "a view of 10^12 elements": lambda: of_value(view(Storage("0", 9), 0, (HUGE,), (0,)), {"0": bytes(36)}),
    "a view beyond its storage": lambda: of_value(view(Storage("0", 9), 0, (HUGE,), (1,)), {"0": bytes(36)}),
    "a view at a negative offset": lambda: of_value(view(Storage("0", 9), -4, (4,), (1,)), {"0": bytes(36)}),
    "a view of negative strides": lambda: of_value(view(Storage("0", 9), 8, (9,), (-1,)), {"0": bytes(36)}),
    "a view of a negative shape": lambda: of_value(view(Storage("0", 9), 0, (-9, -1), (1, 1)), {"0": bytes(36)}),
    "a view with more axes than strides": lambda: of_value(view(Storage("0", 9), 0, (3, 3), (1,)), {"0": bytes(36)}),
    "a view of 65 axes": lambda: of_value(view(Storage("0", 1), 0, (1,) * 65, (1,) * 65), {"0": bytes(4)}),
    "thousands of views of one storage": lambda: torch_file(
        pickled({f"w{number}": view(Storage("0", 9), 0, (10**6,), (0,)) for number in range(3000)}), {"0": bytes(36)}
    ),
    "a storage that is not there": lambda: of_value(view(Storage("7", 9), 0, (9,), (1,)), {"0": bytes(36)}),
    "a bytearray of 10^12": lambda: of_value(Call(Named("__builtin__ bytearray"), HUGE)),
    "a tensor class of 10^12": lambda: of_value(Call(Named("torch Tensor"), 10**6, 10**6)),
    "a storage class of 10^12": lambda: of_value(Call(Named("torch.storage UntypedStorage"), HUGE)),
    "a tensor with attributes of 10^12": lambda: of_value(
        Call(Named("torch._tensor _rebuild_from_type_v2"), Named("__builtin__ bytearray"), None, (HUGE,), {})
    ),
    "a call of os.system": lambda: of_value(Call(Named("os system"), "touch hostile")),
    "a call of eval": lambda: of_value(Call(Named("__builtin__ eval"), "open('hostile', 'w')")),
    "keys nested 25 deep": lambda: with_keys_nested(25),
    "keys nested 60 deep": lambda: with_keys_nested(60),
    "keys of equal hashes": lambda: with_equal_hashes(100_000),
    "a set of equal hashes": lambda: torch_file(
        b"\x80\x02c__builtin__\nset\n]("
        + b"".join(b"\x8a\x0a" + (number * (2**61 - 1)).to_bytes(10, "little") for number in range(1, 100_000))
        + b"e\x85R."
    ),
    "a set made 10,000 times": lambda: with_calls_of("__builtin__ set", b"](" + b"NK\x01" * 100_000 + b"e"),
    "a counter made 10,000 times": lambda: with_calls_of("collections Counter", mapping_of(300_000)),
    "a long text encoded 10,000 times": lambda: with_calls_of(
        "_codecs encode", b"X" + struct.pack("<I", 10**6) + b"x" * 10**6, b"X\x06\x00\x00\x00latin1"
    ),
    "100,000 marks": lambda: torch_file(b"\x80\x02" + b"(" * 10**5 + b"."),
    "ten million values": lambda: torch_file(b"\x80\x02](" + b"N" * 10**7 + b"e."),
    "a pickle without end": lambda: torch_file(b"\x80\x02}"),
    "an empty pickle": lambda: torch_file(b""),
    "a pickle that takes too much": lambda: torch_file(b"\x80\x02}ssss."),
    "a pickle that takes what it never put": lambda: torch_file(b"\x80\x02h\x05."),
    "a string of 4 GB": lambda: torch_file(b"\x80\x02X\xff\xff\xff\xffabc."),
    "protocol 4": lambda: torch_file(pickle.dumps({"weight": 1}, 4)),
    "no pickle": lambda: torch_file(b"").replace(b"data.pkl", b"data.pkx"),
    "records that overlap": with_records_that_overlap,
    "records of one name": with_records_of_one_name,
    "two directories": with_two_directories,
    "65,535 records": lambda: with_end(here=65_535, count=65_535),
    "a directory at the begin": lambda: with_end(begin=0),
    "a directory beyond the end": lambda: with_end(begin=2**32 - 2),
    "a directory of 4 GB": lambda: with_end(length=2**32 - 2),
    "several disks": lambda: with_end(disk=1),
    "the begin of an archive": lambda: b"PK\x03\x04",
    "an archive of nothing": lambda: b"PK\x05\x06" + bytes(18),
    "an old file with a storage of 10^12": lambda: old_torch_file(
        {"weight": view(Storage("0", HUGE), 0, (HUGE,), (1,))}
    ),
    "an old file that calls os.system": lambda: old_torch_file({"weight": Call(Named("os system"), "touch hostile")}),
    "an old file that is cut off": lambda: old_torch_file({})[:-5],
    "nothing": lambda: b"",
    "a text": lambda: b"hello\n",
    "zeros": lambda: bytes(10**6),
    "a plain pickle of code": lambda: pickled({"weight": Call(Named("os system"), "touch hostile")}),
}  # fmt: skip


# --- Sparse files -------------------------------------------------------------------------------------------------


def safetensors_file(header, data=b"", length=None):
    """A safetensors file. header: a text, or what JSON makes one of. length: of the header, as the file says it."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"form": "dense", "shape": [2], "weights": 2, "zeros": 0, "sparsity": 0.0, "crc32": 3066839698}
PIECE = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
VALUES = b"\x01\x02"


def metadata(tensors):
    """The metadata of a sparse file. tensors: a text, or what JSON makes one of."""
    text = tensors if isinstance(tensors, str) else json.dumps(tensors)
    return {"sparsifai_format": "1", "tensors": text}


def sparse_file(tensors=None, data=VALUES, **pieces):
    """A sparse file with a tensor named a, and pieces that replace its own."""
    tensors = {"a": ENTRY} if tensors is None else tensors
    return safetensors_file({"__metadata__": metadata(tensors), **(pieces or {"dense/a": PIECE})}, data)


def entries_of(text):
    """A header with this text among its pieces."""
    return safetensors_file(f'{{"__metadata__": {json.dumps(metadata({"a": ENTRY}))}, {text}}}', VALUES)


def claim(elements):
    """An index file without values that says how many elements there are."""
    entry = {"form": "index", "shape": [elements], "weights": elements, "zeros": elements, "sparsity": 1.0, "crc32": 0}
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    return sparse_file({"a": entry}, b"", **{"values/a": empty, "index/a": {**empty, "dtype": "I64"}})


PIECE_TEXT = json.dumps(PIECE)

SPARSE_FILES = {
    "a tensor of 10^12 elements": lambda: claim(HUGE),
    "a tensor of 2^62 elements": lambda: claim(2**62),
    "a header of 2^63 bytes": lambda: safetensors_file("{}", length=2**63),
    "a header of 10^12 bytes": lambda: safetensors_file("{}", length=HUGE),
    "a header longer than the file": lambda: safetensors_file("{}", length=3),
    "a header of 8 million lists": lambda: safetensors_file('{"a":[' + "[]," * 5_000_000 + "[]]}"),
    "a header nested 100,000 deep": lambda: safetensors_file('{"a":' + "[" * 100_000),
    "a header of a long number": lambda: safetensors_file('{"a":' + "9" * 10**6 + "}"),
    "metadata of 5 million lists": lambda: sparse_file("[" + "[]," * 4_000_000 + "[]]"),
    "metadata nested 100,000 deep": lambda: sparse_file("[" * 100_000),
    "metadata of a long number": lambda: sparse_file("9" * 10**6),
    "one piece twice": lambda: entries_of(f'"dense/a": {PIECE_TEXT}, "dense/a": {PIECE_TEXT}'),
    "one piece twice, written otherwise": lambda: entries_of(f'"dense/a": {PIECE_TEXT}, "dense/\\u0061": {PIECE_TEXT}'),
    "one entry twice": lambda: sparse_file(f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}'),
    "one key of an entry twice": lambda: sparse_file(json.dumps({"a": ENTRY}).replace("}}", ', "zeros": 0}}')),
    "the metadata twice": lambda: entries_of(f'"dense/a": {PIECE_TEXT}, "__metadata__": {{}}'),
    "negative offsets": lambda: sparse_file(**{"dense/a": {**PIECE, "data_offsets": [-2, 0]}}),
    "offsets backwards": lambda: sparse_file(**{"dense/a": {**PIECE, "data_offsets": [2, 0]}}),
    "offsets beyond the end": lambda: sparse_file(**{"dense/a": {**PIECE, "data_offsets": [1, 3]}}),
    "offsets of 2^64": lambda: sparse_file(**{"dense/a": {**PIECE, "data_offsets": [2**64, 2**64 + 2]}}),
    "offsets that are no numbers": lambda: sparse_file(**{"dense/a": {**PIECE, "data_offsets": [0, 2.0]}}),
    "offsets that are true": lambda: sparse_file(**{"dense/a": {**PIECE, "data_offsets": [False, 2]}}),
    "one offset": lambda: sparse_file(**{"dense/a": {**PIECE, "data_offsets": [0]}}),
    "pieces that overlap": lambda: sparse_file(
        {"a": ENTRY, "b": ENTRY}, **{"dense/a": PIECE, "dense/b": PIECE}
    ),
    "bytes of no piece": lambda: sparse_file(data=VALUES + b"x"),
    "bytes of no piece in front": lambda: sparse_file(
        data=b"x" + VALUES, **{"dense/a": {**PIECE, "data_offsets": [1, 3]}}
    ),
    "a shape larger than the bytes": lambda: sparse_file(**{"dense/a": {**PIECE, "shape": [3]}}),
    "a shape that overflows": lambda: sparse_file(**{"dense/a": {**PIECE, "shape": [2**32, 2**32]}}),
    "a negative shape": lambda: sparse_file(**{"dense/a": {**PIECE, "shape": [-1, -2]}}),
    "a shape of a text": lambda: sparse_file(**{"dense/a": {**PIECE, "shape": "2"}}),
    "an unknown dtype": lambda: sparse_file(**{"dense/a": {**PIECE, "dtype": "F3"}}),
    "a dtype of a list": lambda: sparse_file(**{"dense/a": {**PIECE, "dtype": ["U8"]}}),
    "a piece with another key": lambda: sparse_file(**{"dense/a": {**PIECE, "more": 1}}),
    "a piece that is no mapping": lambda: sparse_file(**{"dense/a": [1]}),
    "a header that is a list": lambda: safetensors_file("[]"),
    "metadata that is no text": lambda: safetensors_file({"__metadata__": {"sparsifai_format": "1", "tensors": {}}}),
    "a name of a half character": lambda: entries_of(f'"dense/\\ud800": {PIECE_TEXT}'),
    "a name that is no UTF-8": lambda: sparse_file().replace(b"dense/a", b"dense/\xff"),
    "NaN in the header": lambda: entries_of('"dense/a": NaN'),
    "an entry that is the same as itself": lambda: sparse_file({"a": {"same_as": "a"}}, b"", **{}),
    "a safetensors file of nothing": lambda: safetensors_file(""),
    "the first 8 bytes": lambda: struct.pack("<Q", 2),
}  # fmt: skip
