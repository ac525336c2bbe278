"""Files of torch.save are read like torch.load reads them, and hostile ones are refused within limits."""

import io
import os
import warnings
import zipfile
from collections import defaultdict
from datetime import date
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from hostile import Call, Named, Storage, pickled, torch_file, view
from torch import nn

from sparsifai.support.checkpoints import load_checkpoint


def many_kinds():
    """What is in checkpoints."""
    tagged = nn.Parameter(torch.ones(3))
    tagged.note = "x"
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "tagged": tagged, "bytes": b"xy",
            "bytearray": bytearray(b"xy"), "complex": 1j, "size": torch.Size([1, 2]), "device": torch.device("cpu"),
            "set": {1, "a", (1, 2)},
            "dtype": torch.float32, "long": 2**70, "tuple": (1, (2.0, None, True)), (1, 2): "key", 3: "key",
            "uint16": torch.ones(2, dtype=torch.uint16), "coo": torch.eye(3).to_sparse(),
            "csr": torch.eye(3).to_sparse_csr(), "meta": torch.empty(3, device="meta"), "empty": torch.empty(0, 3),
            "float8": torch.ones(3).to(torch.float8_e4m3fn), "expanded": torch.ones(1).expand(100),
            "quantized": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
            "transposed": torch.arange(6.0).view(2, 3).T, "part": torch.arange(6.0)[2:4],
            "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "conjugate": torch.ones(2, dtype=torch.complex64).conj(), "bfloat16": torch.ones(2, dtype=torch.bfloat16),
        }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_what_torch_saves_is_loaded(tmp_path):
    path, content = tmp_path / "file", many_kinds()
    torch.save(content, path)
    assert str(load_checkpoint(path)) == str(torch.load(path, weights_only=True))
    for name in ("uint16", "float8", "coo", "csr", "nested"):  # torch itself cannot load these in that format
        content.pop(name)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert str(load_checkpoint(path, old_format=True)) == str(torch.load(path, weights_only=True))
    with pytest.raises(ValueError, match="does not begin as a file of torch.save does"):
        load_checkpoint(path)


@pytest.mark.parametrize("count", [1, 5, 66_000])
def test_archives_of_any_number_of_records_are_read(tmp_path, count):
    """More than 65,535 are counted in another place of the file."""
    weights = {str(number): torch.ones(1) * number for number in range(min(count, 5))}
    torch.save(weights, tmp_path / "file")
    if count == 66_000:
        with zipfile.ZipFile(tmp_path / "file", "a") as archive:
            for number in range(count):
                archive.writestr(f"file/extra/{number}", b"")
    loaded = load_checkpoint(tmp_path / "file")
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_a_damaged_byte_is_an_error_or_makes_no_difference(tmp_path):
    """Every third byte of a file, changed."""
    path, file = tmp_path / "file", io.BytesIO()
    content = {"weight": torch.arange(4.0), "mask": torch.tensor([True, False]), "rest": (1, 2.5, None)}
    torch.save(content, file)
    data, refused = file.getvalue(), 0
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :])
        try:
            load_checkpoint(path)
        except ValueError:
            refused += 1
    assert refused > 200


def test_a_file_that_fails_does_not_make_the_next_one_fail(tmp_path):
    """torch keeps the sparse tensors of a file that it could not load, and checks them with the next file."""
    hostile_file, good = tmp_path / "hostile", tmp_path / "good"
    parts = Call(Named("torch.serialization _get_layout"), "torch.sparse_coo"), (
        *(view(Storage(key, 3, kind), 0, shape, (3, 1)[-len(shape) :]) for key, kind, shape in
          (("0", torch.LongStorage, (1, 3)), ("1", torch.FloatStorage, (3,)))), (3,), True,
    )  # fmt: skip
    sparse = Call(Named("torch._utils _rebuild_sparse_tensor"), *parts)
    fails = Call(Named("torch.serialization _get_layout"), "no layout")
    hostile_file.write_bytes(torch_file(pickled({"weight": sparse, "rest": fails}), {"0": b"x" * 24, "1": bytes(12)}))
    torch.save({"weight": torch.ones(3)}, good)
    with pytest.raises(ValueError, match="no layout|sparse"):
        load_checkpoint(hostile_file)
    assert torch.equal(load_checkpoint(good)["weight"], torch.ones(3))
    assert torch.equal(torch.load(good, weights_only=True)["weight"], torch.ones(3))


@pytest.mark.parametrize("name", hostile.DEEP)
def test_deep_files_are_read_and_not_visited(tmp_path, name):
    (tmp_path / "file").write_bytes(hostile.DEEP[name]())
    assert type(load_checkpoint(tmp_path / "file")) is dict


@pytest.mark.parametrize("name", hostile.CHECKPOINTS)
def test_hostile_files_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(hostile.CHECKPOINTS[name]())
    with pytest.raises(ValueError, match="."):
        load_checkpoint(path, old_format=True)
    assert os.listdir(tmp_path) == ["file"]  # no code was run


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (nn.Linear(2, 2), "Linear"), (np.float64(1), "numpy"), (date(2026, 1, 1), "datetime.date"),
        (Path("a"), "Path"), (defaultdict(int), "collections.defaultdict"),
    ],
)  # fmt: skip
def test_objects_are_refused_by_their_class(tmp_path, content, kind):
    torch.save({"model": {}, "more": content}, tmp_path / "file")
    with pytest.raises(
        ValueError, match=f"it holds an object of .*{kind}.*; only tensors and plain values are read, save"
    ):
        load_checkpoint(tmp_path / "file")
