"""Sparse files: every bit comes back, the size is that of the information, and what is broken is refused clearly."""

import json
import math
import os
import pickle
import re
import struct
import textwrap
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_net
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparsifai import SparseFile, Sparsifier, load_sparse, save_sparse, sparse_format
from sparsifai.__main__ import main
from sparsifai.export.sparse_tensor import DTYPES

safetensors = pytest.importorskip("safetensors", reason="sparse files are safetensors files")
from safetensors.torch import load_file, save, save_file  # noqa: E402

WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = [-0.0, math.inf, -math.inf, math.nan, 5e-324, 1e-40, 0.0, 1.0]


class Holder(nn.Module):
    """A module whose state_dict has the tensors that it is given."""

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


def random_tensor(dtype, shape, density, seed, special=False):
    """Any bits, at some places; the others are zero."""
    draw, size = np.random.default_rng(seed), math.prod(shape)
    kept = draw.random(size) < density
    values = draw.integers(0, 2 if dtype == torch.bool else 256, (size, dtype.itemsize), dtype=np.uint8)
    values[~kept] = 0
    tensor = torch.from_numpy(values.reshape(-1)).view(dtype).reshape(shape)
    if special and dtype.is_floating_point and dtype.itemsize > 1 and size:
        tensor.reshape(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)[:size]
    return tensor


def blank(model):
    """The same module with other values."""
    return Holder(**{name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()})


def sparse_tensor(size, values, dtype=torch.float32):
    """As many values, spread evenly, and zeros."""
    tensor = torch.zeros(size, dtype=dtype)
    tensor[torch.arange(values) * (size // max(values, 1))] = torch.arange(1, values + 1).to(dtype)
    return tensor


# --- Every bit comes back -----------------------------------------------------------------------------------------

TENSORS = st.builds(
    random_tensor,
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 24), max_size=3).map(tuple),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    st.integers(0, 2**32),
    st.booleans(),
)
STATES = st.dictionaries(st.sampled_from(["a", "dense/a", "values/a", "bitmask/a", "__metadata__", "é\n"]), TENSORS)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STATES)
def test_every_bit_comes_back(tmp_path, state):
    path, model = tmp_path / "file", Holder(**state)
    saved = save_sparse(model, path)
    loaded = load_sparse(path, blank(model))
    assert bits(loaded) == bits(state)
    assert SparseFile.read(path) == saved
    assert saved.bytes == path.stat().st_size
    assert saved.dense_bytes == len(save({name: tensor.clone() for name, tensor in state.items()}))
    zeros = {name: bytes_of(tensor) for name, tensor in state.items()}
    for row in saved.rows:
        elements = np.frombuffer(zeros[row.name], np.uint8).reshape(-1, state[row.name].element_size())
        assert row.count.zeros == (~elements.any(1)).sum()
        assert row.bytes <= row.dense_bytes == len(zeros[row.name])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40_000), st.floats(0, 1), st.sampled_from([torch.float32, torch.float16, torch.float8_e5m2]))
def test_the_size_is_that_of_the_information(tmp_path, size, density, dtype):
    tensor = sparse_tensor(size, int(size * density), torch.float32).clamp(max=60_000).to(dtype)
    values, width = int(np.count_nonzero(tensor.float())), 1 if size <= 2**8 else 2 if size <= 2**15 else 4
    dense = size * dtype.itemsize
    bitmask, index = math.ceil(size / 8) + values * dtype.itemsize, values * (dtype.itemsize + width)
    saved = save_sparse(Holder(a=tensor), tmp_path / "file")
    assert saved.rows[0].bytes <= min(bitmask, index, dense) + 100
    assert saved.bytes <= min(bitmask, index, dense) + 900
    assert saved.rows[0].bytes == {"dense": dense, "bitmask": bitmask, "index": index}[saved.rows[0].form]


@pytest.mark.parametrize(
    ("size", "values", "form", "pieces"),
    [
        (1000, 1000, "dense", {"dense/a": ("F32", 1000)}),
        (1000, 800, "bitmask", {"values/a": ("F32", 800), "bitmask/a": ("U8", 125)}),
        (1001, 800, "bitmask", {"values/a": ("F32", 800), "bitmask/a": ("U8", 126)}),
        (1000, 62, "index", {"values/a": ("F32", 62), "index/a": ("I16", 62)}),
        (1000, 63, "bitmask", {"values/a": ("F32", 63), "bitmask/a": ("U8", 125)}),
        (256, 10, "index", {"values/a": ("F32", 10), "index/a": ("U8", 10)}),
        (257, 10, "index", {"values/a": ("F32", 10), "index/a": ("I16", 10)}),
        (2**15, 10, "index", {"values/a": ("F32", 10), "index/a": ("I16", 10)}),
        (2**15 + 1, 10, "index", {"values/a": ("F32", 10), "index/a": ("I32", 10)}),
        (64, 0, "index", {"values/a": ("F32", 0), "index/a": ("U8", 0)}),
        (25, 0, "dense", {"dense/a": ("F32", 25)}),  # of which the names of two pieces would take more
    ],
)
def test_the_smallest_form_is_chosen(tmp_path, size, values, form, pieces):
    model = Holder(a=sparse_tensor(size, values))
    saved = save_sparse(model, tmp_path / "file")
    assert saved.rows[0].form == form
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        assert {key: (each.get_dtype(), *each.get_shape()) for key, each in slices.items()} == pieces
    assert bits(load_sparse(tmp_path / "file", blank(model))) == bits(model)


def test_minus_zero_is_a_value(tmp_path):
    model = Holder(a=torch.tensor([0.0, -0.0] * 500))
    saved = save_sparse(model, tmp_path / "file")
    assert (saved.rows[0].form, saved.count.zeros) == ("bitmask", 500)
    assert load_sparse(tmp_path / "file", blank(model)).a.signbit().sum() == 500


def test_any_layout_of_memory(tmp_path):
    base = sparse_tensor(16 * 3 * 8 * 8, 100).reshape(16, 3, 8, 8)
    strange = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 3),
        "every_second": base[::2],
        "expanded": sparse_tensor(400, 3).expand(5, 400),
        "conjugate": torch.complex(sparse_tensor(500, 9), sparse_tensor(500, 9)).conj(),
        "negative": torch.complex(sparse_tensor(500, 9), sparse_tensor(500, 9)).conj().imag,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(3, 0, 2),
    }
    save_sparse(Holder(**strange), tmp_path / "file")
    plain = Holder(**{name: torch.ones(value.shape, dtype=value.dtype) for name, value in strange.items()})
    load_sparse(tmp_path / "file", plain)
    for name, value in strange.items():
        assert torch.equal(plain.state_dict()[name], value), name


@pytest.mark.slow
def test_a_sparse_resnet50_takes_less_than_16_percent(tmp_path):
    models = pytest.importorskip("torchvision.models", reason="the ResNet-50 is torchvision's")
    model = models.resnet50(weights=None)
    Sparsifier(model, "weight", "global", "large_final").sparsify(0.9)
    saved = save_sparse(model, tmp_path / "sparse.safetensors")
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    dense = (tmp_path / "dense.safetensors").stat().st_size
    assert saved.dense_bytes == dense
    assert (tmp_path / "sparse.safetensors").stat().st_size < 0.16 * dense
    assert bits(load_sparse(tmp_path / "sparse.safetensors", models.resnet50(weights=None))) == bits(model)


# --- Models -------------------------------------------------------------------------------------------------------


def sparse_net(seed=0):
    torch.manual_seed(seed)
    model = small_net()
    model[1].num_batches_tracked += 7
    Sparsifier(model).sparsify(0.9)
    return model


def test_parameters_stay_the_same_objects(tmp_path):
    model, other = sparse_net(), sparse_net(1).to(memory_format=torch.channels_last)
    other[0].weight.requires_grad_(False)
    save_sparse(model, tmp_path / "file")
    before = {name: (value, value.data_ptr(), value.stride()) for name, value in other.named_parameters()}
    assert load_sparse(tmp_path / "file", other) is other
    assert bits(other) == bits(model)
    assert int(other[1].num_batches_tracked) == 7
    for name, value in other.named_parameters():
        kept, *memory = before[name]
        assert value is kept
        assert [value.data_ptr(), value.stride()] == memory
        assert value.requires_grad == (name != "0.weight")
        assert value.is_leaf


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_are_looked_into(tmp_path, wrap):
    model, other = sparse_net(), wrap(sparse_net(1))
    save_sparse(wrap(model), tmp_path / "file")
    assert [row.name for row in SparseFile.read(tmp_path / "file").rows] == list(model.state_dict())
    assert load_sparse(tmp_path / "file", other) is other
    inner = other._orig_mod if hasattr(other, "_orig_mod") else other.module
    assert bits(inner) == bits(model)


def tied():
    model = nn.Sequential(nn.Linear(30, 30, bias=False), nn.Linear(30, 30, bias=False), nn.Linear(30, 30))
    model[1].weight = model[0].weight
    Sparsifier(model).sparsify(0.8)
    return model


def test_what_is_tied_is_stored_once_and_stays_tied(tmp_path):
    model, other = tied(), tied()
    saved = save_sparse(model, tmp_path / "file")
    assert [(row.name, row.form) for row in saved.rows][:2] == [
        ("0.weight", "bitmask"),
        ("1.weight", "same as 0.weight"),
    ]
    assert (saved.rows[1].bytes, saved.rows[1].dense_bytes, saved.rows[1].count) == (0, 0, saved.rows[0].count)
    assert saved.count.weights == 2 * 900 + 30
    assert SparseFile.read(tmp_path / "file") == saved
    load_sparse(tmp_path / "file", other)
    assert bits(other) == bits(model)
    assert other[1].weight is other[0].weight
    untied = nn.Sequential(nn.Linear(30, 30, bias=False), nn.Linear(30, 30, bias=False), nn.Linear(30, 30))
    assert bits(load_sparse(tmp_path / "file", untied)) == bits(model)
    assert untied[1].weight is not untied[0].weight
    reordered = Holder()
    for name in reversed(list(model.state_dict())):
        place, _, attribute = name.partition(".")
        if place not in reordered._modules:
            reordered.add_module(place, nn.Module())
        reordered.get_submodule(place).register_buffer(attribute, torch.ones_like(model.state_dict()[name]))
    assert list(reordered.state_dict()) == ["2.bias", "2.weight", "1.weight", "0.weight"]
    assert bits(load_sparse(tmp_path / "file", reordered)) == bits(model)


def test_what_the_model_ties_must_be_equal_in_the_file(tmp_path):
    untied, model = nn.Sequential(*(nn.Linear(30, 30, bias=False) for _ in range(2)), nn.Linear(30, 30)), tied()
    save_sparse(untied, tmp_path / "file")
    refuses(tmp_path / "file", model, "0.weight and 1.weight are one tensor in the model, and differ in .*untie")
    with torch.no_grad():
        untied[1].weight.copy_(untied[0].weight)
    save_sparse(untied, tmp_path / "file")
    assert bits(load_sparse(tmp_path / "file", model)) == bits(untied)


def test_views_that_overlap_are_stored_each_on_its_own(tmp_path):
    base = sparse_tensor(1000, 100)
    full, waves = torch.arange(1.0, 10.0), torch.complex(torch.ones(4), torch.arange(4.0))
    views = {"first": base[:600], "last": base[400:], "all": base, "matrix": base.view(10, 100)}
    views |= {"bits": base.view(torch.int32), "nine": full, "square": full.view(3, 3), "turned": full.view(3, 3).T}
    views |= {"waves": waves, "conjugate": waves.conj(), "imag": waves.imag, "negative": waves.conj().imag}
    model = Holder(**views)
    saved = save_sparse(model, tmp_path / "file")
    assert not any(row.form.startswith("same") for row in saved.rows)
    assert bits(load_sparse(tmp_path / "file", blank(model))) == bits(model)


def test_a_model_without_tensors(tmp_path):
    saved = save_sparse(nn.ReLU(), tmp_path / "file")
    assert (saved.rows, saved.count.weights) == ((), 0)
    assert "all tensors" in str(saved)
    load_sparse(tmp_path / "file", nn.ReLU())


# --- What a file cannot hold --------------------------------------------------------------------------------------


class WithState(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WithState(2, 2), "_extra_state of WithState is no tensor but dict; keep it in a file of its own"),
        (
            lambda: nn.Linear(2, 2, device="meta"),
            "weight of Linear is on the device meta, without values; use",
        ),
        (lambda: nn.LazyLinear(2), "weight of LazyLinear is not initialized yet; run the model on a batch first"),
        (
            lambda: Holder(a=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
            "a of Holder is a Tensor of the layout torch.strided; make it a plain tensor",
        ),
        (lambda: Holder(a=torch.eye(3).to_sparse()), "a of Holder is a Tensor of the layout torch.sparse_coo; make it"),
        (
            lambda: Holder(a=torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)),
            "a of Holder is quantized; dequantize it",
        ),
        (
            lambda: Holder(a=torch.zeros(3, dtype=torch.complex128)),
            "a of Holder is complex128, which safetensors files have not; store it as another dtype",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_named(tmp_path, make, message):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    with pytest.raises(ValueError, match=f"^save_sparse: {re.escape(message)}"):
        save_sparse(make(), path)
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(ValueError, match=f"^load_sparse: {re.escape(message)}"):
        load_sparse(path, make())


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match="save_sparse: model is a torch.nn.Module, not dict; of a Learner, learn.model"):
        save_sparse({}, tmp_path / "file")
    # The order of torch.save, and that of safetensors.
    with pytest.raises(TypeError, match="save_sparse: model is a torch.nn.Module, not str"):
        save_sparse("file", nn.ReLU())
    with pytest.raises(TypeError, match="load_sparse: model is a torch.nn.Module, not str"):
        load_sparse(nn.ReLU(), "file")


def test_shards_are_refused(tmp_path):
    model = Holder(a=torch.zeros(3))
    model.a.full_tensor = lambda: None
    model.state_dict = lambda: {"a": model.a}
    with pytest.raises(ValueError, match="a of Holder is a shard; give a plain model what .*get_model_state_dict"):
        save_sparse(model, tmp_path / "file")


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_a_failed_save_leaves_the_earlier_file(tmp_path, monkeypatch, method):
    path, model = tmp_path / "file", sparse_net()
    save_sparse(model, path)

    def full(self, *given):
        if method == "write_bytes":
            open(self, "wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, method, full)
    with pytest.raises(OSError, match="No space left"):
        save_sparse(sparse_net(1), path)
    assert os.listdir(tmp_path) == ["file"]
    assert bits(load_sparse(path, sparse_net(2))) == bits(model)


def test_a_place_that_is_none_is_said_to_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder; make it first.*none"):
        save_sparse(nn.ReLU(), tmp_path / "none" / "file")
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        save_sparse(nn.ReLU(), tmp_path)
    with pytest.raises(IsADirectoryError):
        load_sparse(tmp_path, nn.ReLU())
    with pytest.raises(FileNotFoundError, match="none"):
        load_sparse(tmp_path / "none", nn.ReLU())


def test_what_lies_beside_a_file_is_left(tmp_path, monkeypatch):
    """Others may be writing the same file, and may call theirs anything."""
    (tmp_path / "file.part").write_bytes(b"another's")
    written = []
    write_bytes = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: written.append(self) or write_bytes(self, data))
    for _ in range(2):
        save_sparse(nn.ReLU(), tmp_path / "file")
    assert len(set(written)) == 2
    assert sorted(os.listdir(tmp_path)) == ["file", "file.part"]
    assert (tmp_path / "file.part").read_bytes() == b"another's"
    save_sparse(nn.ReLU(), tmp_path / ("a" * 255))


def test_other_people_may_read_the_file_as_others_that_are_written(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    save_sparse(nn.ReLU(), tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


# --- Files of other models ----------------------------------------------------------------------------------------


def refuses(path, model, message):
    """Loading raises a ValueError with the path and the message, and changes nothing; so does what it reads it with."""
    before = bits(model)
    with pytest.raises(ValueError, match=message) as raised:
        load_sparse(path, model)
    assert str(path) in str(raised.value)
    assert bits(model) == before
    return str(raised.value)


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "file"
    save_sparse(Holder(weight=torch.zeros(3), bias=torch.ones(2)), path)
    refuses(path, Holder(weight=torch.ones(3)), "is of another model than Holder: it has 'bias', which the model has n")
    refuses(path, Holder(weight=torch.ones(3), bias=torch.zeros(2), c=torch.ones(1)), "Holder: it lacks 'c'$")
    refuses(
        path,
        Holder(weigth=torch.ones(3), bias=torch.zeros(2)),
        "it lacks 'weigth' and has 'weight', which the model has not; did you mean 'weigth'",
    )
    message = refuses(path, Holder(**{f"n{number}": torch.ones(1) for number in range(9)}), "'n0', 'n1', 'n2', ... and")
    assert "'n3', '" in message  # all names that are known, if none is alike
    refuses(path, Holder(weight=torch.ones(3, 1), bias=torch.zeros(2)), r"weight has the shape \(3,\) in .*\(3, 1\)")
    refuses(
        path,
        Holder(weight=torch.ones(3).half(), bias=torch.zeros(2)),
        r"weight is float32 in .* and float16 in the model, and casts lose bits; .*model.to\(torch.float32\), and cast",
    )
    refuses(path, Holder(weight=torch.ones(1).expand(3), bias=torch.zeros(2)), "weight of the model cannot take values")
    with torch.inference_mode():
        model = Holder(weight=torch.ones(3), bias=torch.zeros(2))
    refuses(path, model, "weight of the model cannot take values")


# --- Broken and hostile files -------------------------------------------------------------------------------------


def example():
    """Tensors of each form, and a tie."""
    model = Holder(
        mask=sparse_tensor(203, 60), index=sparse_tensor(2000, 5), counter=torch.tensor(7), dense=torch.arange(3.0)
    )
    model.register_buffer("tie", model.mask)
    return model


def other():
    model = Holder(**{name: torch.full_like(value, 9) for name, value in example().state_dict().items()})
    model.tie = model.mask
    return model


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "file"
    saved = save_sparse(example(), path)
    assert [row.form for row in saved.rows] == ["bitmask", "index", "dense", "dense", "same as mask"]
    return path


def read_plainly(path):
    """What an honest reader makes of a file: the bytes of each tensor. Slow and plain."""
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


def test_the_plain_reader_agrees(stored):
    assert read_plainly(stored) == {name: value for name, (_, _, value) in bits(example()).items()}


def edit(path, change, checksums=True):
    """Change the pieces, the entries and the metadata of a file, and make the checksums right again."""
    with safetensors.safe_open(path, "pt") as file:
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
    """An edit of one piece."""
    return lambda pieces, entries, metadata: pieces.update({name: change(pieces[name])})


def entry(name, **values):
    """An edit of one entry; what is None is left out."""

    def change(pieces, entries, metadata):
        entries[name] = {key: value for key, value in {**entries[name], **values}.items() if value is not None}

    return change


def with_element(place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


HOSTILE = {
    "a bit more": (piece("bitmask/mask", with_element(0, 255)), "the bitmask of mask has 65 bits set, for 60 values"),
    "a value more": (
        piece("values/mask", lambda values: torch.cat([values, values[:1]])),
        "the bitmask of mask has 60 bits set, for 61 values",
    ),
    "trailing bits": (
        piece("bitmask/mask", lambda mask: with_element(25, 128)(with_element(0, mask[0] & (mask[0] - 1))(mask))),
        "the bitmask of mask has bits set beyond its 203 elements",
    ),
    "a short bitmask": (
        piece("bitmask/mask", lambda mask: mask[:-1].clone()),
        r"the bitmask of mask has the dtype U8 and the shape \[25\], of \[60\] values; expected are U8 and \[26\]",
    ),
    "a bitmask of bools": (piece("bitmask/mask", lambda mask: mask.bool()), "the bitmask of mask has the dtype BOOL"),
    "a zero among the values": (piece("values/mask", with_element(3, 0.0)), "there are zeros among the values of mask"),
    "values in two axes": (piece("values/mask", lambda values: values.view(6, 10)), r"of \[6, 10\] values; expected"),
    "a place outside": (
        piece("index/index", with_element(4, 2000)),
        "the places of index are not ascending",
    ),
    "a place below": (
        piece("index/index", with_element(0, -1)),
        "the places of index are not ascending",
    ),
    "a place twice": (
        piece("index/index", with_element(1, 0)),
        "the places of index are not ascending",
    ),
    "places in disorder": (
        piece("index/index", lambda places: places.flip(0)),
        "the places of index are not ascending",
    ),
    "wider places": (
        piece("index/index", lambda places: places.long()),
        "the index of index has the dtype I64 and the",
    ),
    "a place less": (piece("index/index", lambda places: places[:-1].clone()), r"the shape \[4\], of \[5\] values"),
    "no places": (lambda pieces, *_: pieces.pop("index/index"), "it has no index/index"),
    "no values": (lambda pieces, *_: pieces.pop("values/mask"), "it has no values/mask"),
    "no dense": (lambda pieces, *_: pieces.pop("dense/dense"), "it has no dense/dense"),
    "a piece more": (
        lambda pieces, *_: pieces.update({"values/x": torch.ones(1)}),
        "it has 'values/x', of which its metadata do not tell",
    ),
    "another form": (entry("mask", form="zip"), "mask is stored as 'zip', which is none of dense, bitmask and index"),
    "a form that is a list": (entry("mask", form=["dense"]), r"""mask is stored as "\['dense'\]", which is none of"""),
    "no form": (entry("mask", form=None), "mask is stored as 'None', which is none of"),
    "no shape": (entry("mask", shape=None), "the shape of mask is None"),
    "a shape below zero": (entry("mask", shape=[-203, -1]), r"the shape of mask is \[-203, -1\]"),
    "a shape in words": (entry("mask", shape="203"), "the shape of mask is 203"),
    "a fraction of a shape": (entry("mask", shape=[203.0]), r"the shape of mask is \[203.0\]"),
    "a shape too large": (entry("index", shape=[0, 2**40, 2**40]), r"the shape of index is \[0, 1099511627776, 1099"),
    "another dense shape": (
        entry("dense", shape=[1, 3]),
        r"dense is of the shape \[1, 3\] in the metadata, and of \[3\]",
    ),
    "zeros that are none": (entry("mask", zeros=3), "the zeros of mask is 143 and not 3, as the metadata has it"),
    "a sparsity that is none": (entry("mask", sparsity=1.0), "the sparsity of mask is 0.704433 and not 1.0, as"),
    "weights that are none": (entry("counter", weights=2), "the weights of counter is 1 and not 2, as the metadata"),
    "an alias of none": (
        entry("tie", same_as="nothing"),
        "tie is said to be the same as 'nothing', which does not come",
    ),
    "an alias of itself": (
        entry("tie", same_as="tie"),
        "tie is said to be the same as 'tie', which does not come before",
    ),
    "an alias of a list": (
        entry("tie", same_as=["mask"]),
        r"""the same as "\['mask'\]", which does not come before it""",
    ),
    "an entry that is none": (lambda p, entries, m: entries.update(mask=3), "its metadata do not map names to forms"),
    "no metadata": (
        lambda p, e, metadata: metadata.update(sparsifai_format=None),
        "is a dense safetensors file, none of save_sparse; load it with safetensors.torch.load_file",
    ),
    "a later version": (
        lambda p, e, metadata: metadata.update(sparsifai_format="2"),
        "has version '2' of the format, known is '1'; update sparsifai",
    ),
    "no tensors": (lambda p, e, metadata: metadata.update(tensors=None), "its metadata are no JSON: JSONDecodeError"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(stored, case):
    change, message = HOSTILE[case]
    edit(stored, change)
    refuses(stored, other(), message)
    with pytest.raises(ValueError, match=message):
        SparseFile.read(stored)


def test_editing_alone_breaks_nothing(stored):
    edit(stored, lambda *_: None)
    assert bits(load_sparse(stored, other())) == bits(example())


def test_a_flipped_value_is_noticed(stored):
    edit(stored, piece("values/mask", with_element(3, 5.0)), checksums=False)
    refuses(
        stored, other(), r"is damaged, .*\(the crc32 of mask is \d+ and not \d+, as the metadata has it\); get it anew"
    )


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "3", '{"a": {}', "9" * 10_000, '{"mask": NaN}'])
def test_metadata_that_are_no_table_are_refused(stored, text):
    with safetensors.safe_open(stored, "pt") as file:
        metadata = file.metadata()
    stored.write_bytes(save(load_file(stored), {**metadata, "tensors": text}))
    refuses(stored, other(), "its metadata (are no JSON|do not map names to forms)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no file of save_sparse, nor of safetensors; torch.load reads those of torch.save"),
        (b"text\n", "is no file of save_sparse, nor of safetensors"),
        (pickle.dumps({"a": torch.zeros(3)}), "is no file of save_sparse, nor of safetensors"),
        (b"PK\x03\x04 broken", "is no file of save_sparse, nor of safetensors"),
        (struct.pack("<Q", 100) + b"{" * 100, r"is damaged, or no file of save_sparse \(.*deseriali"),
        (struct.pack("<Q", 10_000) + b'{"a":' * 2000, r"is damaged, or no file of save_sparse \(.*deseriali"),
        (struct.pack("<Q", 2**62) + b"{}", "a header of 4,611,686,018,427,387,904 bytes"),
        (save({"a": torch.zeros(3)}), "is a dense safetensors file, none of save_sparse; load it with safetensors.to"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    refuses(tmp_path / "file", other(), message)


def test_a_huge_header_is_not_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", 2**26) + b"{")
    os.truncate(path, 2**27)  # which takes no space
    refuses(path, other(), r"a header of 67,108,864 bytes")


def test_a_header_that_would_not_be_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_format, "_LARGEST_HEADER", 1000)
    with pytest.raises(ValueError, match="17 tensors are too many for one file; save the model in parts"):
        save_sparse(sparse_net(), tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_a_dtype_that_an_old_safetensors_has_not(tmp_path, monkeypatch):
    def old(*given):
        raise KeyError(torch.uint16)

    monkeypatch.setattr("safetensors.torch.save", old)
    with pytest.raises(ValueError, match=r"safetensors [\d.]+ cannot hold torch.uint16; update it"):
        save_sparse(Holder(a=torch.zeros(3, dtype=torch.uint16)), tmp_path / "file")


def test_a_claim_of_a_petabyte_costs_nothing(stored):
    edit(
        stored,
        lambda pieces, entries, metadata: (
            pieces.update({"index/index": pieces["index/index"].long()}),
            entries["index"].update(shape=[2**50], weights=2**50, zeros=2**50 - 5, sparsity=1.0),
        ),
    )
    tracemalloc.start()
    try:
        refuses(stored, other(), r"index has the shape \(1125899906842624,\) in .* and \(2000,\) in the model")
        assert "1,125,899,906,842,624" in str(SparseFile.read(stored))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def damaged(data, positions, values, kind):
    """A file with some bytes changed, left out or added, or cut off."""
    changed = bytearray(data)
    for position, value in zip(positions, values, strict=True):
        place = int(position * len(changed))
        if kind == "flip" and changed:
            changed[min(place, len(changed) - 1)] ^= value
        elif kind == "digit":  # numbers and names of the header, so that it may still be one
            digits = [number for number, byte in enumerate(changed) if chr(byte) in "0123456789"]
            changed[digits[int(position * (len(digits) - 1))]] = ord("0") + value % 10
        elif kind == "cut":
            del changed[place:]
        elif kind == "remove":
            del changed[place : place + value]
        else:
            changed[place:place] = bytes([value])
    return bytes(changed)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3),
    st.sampled_from(["flip", "digit", "cut", "remove", "add"]),
)
def test_damage_is_noticed_and_changes_nothing(stored, places, kind):
    save_sparse(example(), stored)
    path = stored.with_name("damaged")
    path.write_bytes(damaged(stored.read_bytes(), *zip(*places, strict=True), kind))
    model = other()
    before = bits(model)
    try:
        load_sparse(path, model)
    except ValueError:
        assert bits(model) == before
    else:
        loaded = {name: value for name, (_, _, value) in bits(model).items()}
        assert loaded == read_plainly(path)
        assert bits(model) == bits(example())


# --- What it tells ------------------------------------------------------------------------------------------------


def test_the_table(stored):
    text = str(SparseFile.read(stored)).splitlines()
    size = stored.stat().st_size
    dense = len(save({name: value for name, value in example().state_dict().items() if name != "tie"}))
    assert text[0] == f"file: {100 * size / dense:.2f}% of the bytes that it takes dense"
    assert text[1].split("  ")[0] == "tensor"
    lines = [line.split() for line in text[3:]]
    assert lines[0] == ["mask", "203", "float32", "203", "143", "70.44%", "bitmask", "266", "812"]
    assert lines[1] == ["index", "2000", "float32", "2,000", "1,995", "99.75%", "index", "30", "8,000"]
    assert lines[2] == ["counter", "int64", "1", "0", "0.00%", "dense", "8", "8"]
    assert lines[4] == ["tie", "203", "float32", "203", "143", "70.44%", "same", "as", "mask", "0", "0"]
    assert lines[6] == ["all", "tensors", "2,207", "2,139", "96.92%", "316", "8,832"]
    assert lines[7] == ["file", "with", "its", "header", f"{size:,}", f"{dense:,}"]
    html = SparseFile.read(stored)._repr_html_()
    assert html.count("<tr>") == 8
    assert "same as mask" in html


def test_the_metadata_can_be_read_by_anyone(stored):
    with safetensors.safe_open(stored, "np") as file:
        metadata = file.metadata()
    assert metadata["sparsifai_format"] == "1"
    assert metadata["torch"] == torch.__version__
    entries = json.loads(metadata["tensors"])
    assert list(entries) == list(example().state_dict())
    mask = {key: value for key, value in entries["mask"].items() if key != "crc32"}
    assert mask == {"form": "bitmask", "shape": [203], "weights": 203, "zeros": 143, "sparsity": 0.704433}
    assert entries["tie"] == {"same_as": "mask"}


@pytest.mark.parametrize("name", ["mask", "index", "dense", "counter"])
def test_the_lines_of_numpy_in_the_documentation_read_it(stored, name):
    lines = sparse_format.__doc__[sparse_format.__doc__.index("    with safetensors") :]
    names = {"safetensors": safetensors, "json": json, "numpy": np, "path": stored, "name": name}
    exec(textwrap.dedent(lines), names)  # noqa: S102
    assert np.array_equal(names["tensor"], example().state_dict()[name].numpy())


def test_the_command_line_reports_it(stored, capsys):
    assert main(["report", str(stored)]) == 0
    assert capsys.readouterr().out == f"{SparseFile.read(stored)}\n"
    stored.write_bytes(stored.read_bytes()[:-1])
    assert main(["report", str(stored)]) == 2
    assert "sparsifai report: " in (error := capsys.readouterr().err)
    assert "is damaged" in error
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "sparsifai report sparse.safetensors" in capsys.readouterr().out
