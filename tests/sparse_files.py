"""Models with tensors of each form, sparse files of them, and files that are damaged or made to mislead."""

import json
import math
import pickle
import struct
import zlib

import pytest
import torch
from conftest import small_net
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from sparsifai import Sparsifier, load_sparse

WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Holder(nn.Module):
    """A module with some tensors in its state_dict."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def bits(state):
    """Name -> dtype, shape and bytes of each tensor."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), bytes_of(tensor))
        for name, tensor in (state.state_dict() if isinstance(state, nn.Module) else state).items()
    }


def bytes_of(tensor):
    flat = tensor.detach().contiguous().clone().reshape(-1)
    return flat.view(WIDTHS[tensor.element_size()]).numpy().tobytes()


def blank(model):
    """A model with the same tensors, but other values."""
    return Holder(**{name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()})


def sparse_tensor(size, values, dtype=torch.float32):
    """Zeros, and a number of values that are spread evenly."""
    tensor = torch.zeros(size, dtype=dtype)
    tensor[torch.arange(values) * (size // max(values, 1))] = torch.arange(1, values + 1).to(dtype)
    return tensor


def sparse_net(seed=0):
    """A small net with 90 % zeros and a buffer of integers."""
    torch.manual_seed(seed)
    model = small_net()
    model[1].num_batches_tracked += 7
    Sparsifier(model).sparsify(0.9)
    return model


def check_refused(path, model, *parts):
    """Check that loading raises a ValueError that has the path and these parts, and changes nothing."""
    before = bits(model)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        load_sparse(path, model)
    for part in (str(path), *parts):
        assert part in str(raised.value)
    assert bits(model) == before


def example_model():
    """A model with a tensor of each form, and two tensors that are tied."""
    model = Holder(
        mask=sparse_tensor(203, 60), index=sparse_tensor(2000, 5), counter=torch.tensor(7), dense=torch.arange(3.0)
    )
    model.register_buffer("tie", model.mask)
    return model


def other_model():
    """The same model with other values."""
    model = Holder(**{name: torch.full_like(value, 9) for name, value in example_model().state_dict().items()})
    model.tie = model.mask
    return model


def read_plainly(path):
    """The bytes of each tensor of a file, read in a slow and plain way without checks."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    widths = {"F32": 4, "I64": 8}

    def raw(key):
        begin, end = header[key]["data_offsets"]
        return body[begin:end]

    tensors = {}
    for name, entry in json.loads(header["__metadata__"]["tensors"]).items():
        if "same_as" in entry:
            tensors[name] = tensors[entry["same_as"]]
        elif entry["form"] == "dense":
            tensors[name] = raw(f"dense/{name}")
        else:
            width, size = widths[header[f"values/{name}"]["dtype"]], math.prod(entry["shape"])
            places = raw(f"{entry['form']}/{name}")
            if entry["form"] == "bitmask":
                where = [place for place in range(size) if places[place // 8] >> place % 8 & 1]
            else:
                where = [place for (place,) in struct.iter_unpack("<h", places)]
            elements, values = [bytes(width)] * size, raw(f"values/{name}")
            for number, place in enumerate(where):
                elements[place] = values[number * width : (number + 1) * width]
            tensors[name] = b"".join(elements)
    return tensors


def edit(path, change, checksums=True):
    """Change the tensors of a file, the entries of its metadata or the metadata, and correct the checksums."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    pieces, entries = {key: value.clone() for key, value in load_file(path).items()}, json.loads(metadata["tensors"])
    change(pieces, entries, metadata)
    for name, entry in entries.items() if checksums else ():
        if isinstance(entry, dict) and "form" in entry:
            parts = [pieces.get(f"{prefix}/{name}") for prefix in ("bitmask", "index", "values", "dense")]
            entry["crc32"] = zlib.crc32(b"".join(bytes_of(part) for part in parts if part is not None))
    if isinstance(metadata, dict) and "tensors" in metadata and metadata["tensors"] is not None:
        metadata["tensors"] = json.dumps(entries)
    path.write_bytes(save(pieces, {key: value for key, value in metadata.items() if value is not None}))


def piece(name, change):
    """An edit of one tensor of the file."""
    return lambda pieces, entries, metadata: pieces.update({name: change(pieces[name])})


def entry(name, **values):
    """An edit of one entry of the metadata; keys whose value is None are removed."""

    def change(pieces, entries, metadata):
        entries[name] = {key: value for key, value in {**entries[name], **values}.items() if value is not None}

    return change


def with_element(place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


# Name of a change to a file -> an edit of it. A file with such a change must be refused.
CHANGES = {
    "a bit more": piece("bitmask/mask", with_element(0, 255)),
    "a value more": piece("values/mask", lambda values: torch.cat([values, values[:1]])),
    "trailing bits": piece(
        "bitmask/mask", lambda mask: with_element(25, 128)(with_element(0, mask[0] & (mask[0] - 1))(mask))
    ),
    "a short bitmask": piece("bitmask/mask", lambda mask: mask[:-1].clone()),
    "a bitmask of bools": piece("bitmask/mask", lambda mask: mask.bool()),
    "a zero among the values": piece("values/mask", with_element(3, 0.0)),
    "values in two axes": piece("values/mask", lambda values: values.view(6, 10)),
    "a place outside": piece("index/index", with_element(4, 2000)),
    "a place below": piece("index/index", with_element(0, -1)),
    "a place twice": piece("index/index", with_element(1, 0)),
    "places in disorder": piece("index/index", lambda places: places.flip(0)),
    "wider places": piece("index/index", lambda places: places.long()),
    "a place less": piece("index/index", lambda places: places[:-1].clone()),
    "no places": lambda pieces, *_: pieces.pop("index/index"),
    "no values": lambda pieces, *_: pieces.pop("values/mask"),
    "no dense": lambda pieces, *_: pieces.pop("dense/dense"),
    "a piece more": lambda pieces, *_: pieces.update({"values/x": torch.ones(1)}),
    "another form": entry("mask", form="zip"),
    "a form that is a list": entry("mask", form=["dense"]),
    "no form": entry("mask", form=None),
    "no shape": entry("mask", shape=None),
    "a shape below zero": entry("mask", shape=[-203, -1]),
    "a shape in words": entry("mask", shape="203"),
    "a fraction of a shape": entry("mask", shape=[203.0]),
    "a shape too large": entry("index", shape=[0, 2**40, 2**40]),
    "another dense shape": entry("dense", shape=[1, 3]),
    "zeros that are none": entry("mask", zeros=3),
    "a sparsity that is none": entry("mask", sparsity=1.0),
    "weights that are none": entry("counter", weights=2),
    "an alias of none": entry("tie", same_as="nothing"),
    "an alias of itself": entry("tie", same_as="tie"),
    "an alias of a list": entry("tie", same_as=["mask"]),
    "an entry that is none": lambda p, entries, m: entries.update(mask=3),
    "no metadata": lambda p, e, metadata: metadata.update(sparsifai_format=None),
    "a later version": lambda p, e, metadata: metadata.update(sparsifai_format="2"),
    "no tensors": lambda p, e, metadata: metadata.update(tensors=None),
}


class WithState(nn.Linear):
    """A layer whose state_dict has something that is not a tensor."""

    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass


def shard():
    model = Holder(a=torch.zeros(3))
    model.a.full_tensor = lambda: None
    model.state_dict = lambda: {"a": model.a}
    return model


# Name of a model that a sparse file cannot store -> the model.
UNSTORABLE = {
    "extra state": lambda: WithState(2, 2),
    "meta": lambda: nn.Linear(2, 2, device="meta"),
    "lazy": lambda: nn.LazyLinear(2),
    "nested": lambda: Holder(a=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    "sparse": lambda: Holder(a=torch.eye(3).to_sparse()),
    "quantized": lambda: Holder(a=torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)),
    "dtype": lambda: Holder(a=torch.zeros(3, dtype=torch.complex128)),
    "shard": shard,
}


def inference_model():
    with torch.inference_mode():
        return Holder(weight=torch.ones(3), bias=torch.zeros(2))


def saved_model():
    """The model whose file does not fit the models of `MISFITS`."""
    return Holder(weight=torch.zeros(3), bias=torch.ones(2))


# Name of a model that the file of `saved_model` does not fit -> the model.
MISFITS = {
    "a name less": lambda: Holder(weight=torch.ones(3)),
    "a name more": lambda: Holder(weight=torch.ones(3), bias=torch.zeros(2), c=torch.ones(1)),
    "a misspelt name": lambda: Holder(weigth=torch.ones(3), bias=torch.zeros(2)),
    "other names": lambda: Holder(**{f"n{number}": torch.ones(1) for number in range(9)}),
    "another shape": lambda: Holder(weight=torch.ones(3, 1), bias=torch.zeros(2)),
    "another dtype": lambda: Holder(weight=torch.ones(3).half(), bias=torch.zeros(2)),
    "expanded": lambda: Holder(weight=torch.ones(1).expand(3), bias=torch.zeros(2)),
    "inference": inference_model,
}


# Name of a file that save_sparse has not written -> its bytes.
OTHER_FILES = {
    "empty": b"",
    "text": b"text\n",
    "pickle": pickle.dumps({"a": torch.zeros(3)}),
    "zip": b"PK\x03\x04 broken",
    "no JSON": struct.pack("<Q", 100) + b"{" * 100,
    "deep JSON": struct.pack("<Q", 10_000) + b'{"a":' * 2000,
    "large header": struct.pack("<Q", 2**62) + b"{}",
    "safetensors": save({"a": torch.zeros(3)}),
}
