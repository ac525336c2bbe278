"""The format of sparse files: others can read it, and damaged or misleading files are refused."""

import json
import os
import struct
import textwrap
import tracemalloc

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from sparse_files import (
    CHANGES,
    OTHER_FILES,
    bits,
    check_refused,
    edit,
    example_model,
    other_model,
    piece,
    read_plainly,
    sparse_net,
    with_element,
)

from sparsifai import SparseFile, load_sparse, save_sparse
from sparsifai.export import safetensors_file, sparse_format


def test_a_plain_reader_reads_the_same(stored):
    assert read_plainly(stored) == {name: value for name, (_, _, value) in bits(example_model()).items()}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_files_are_refused(stored, name):
    edit(stored, CHANGES[name])
    check_refused(stored, other_model())
    with pytest.raises(ValueError, match=str(stored)):
        SparseFile.read(stored)


def test_editing_alone_breaks_nothing(stored):
    edit(stored, lambda *_: None)
    assert bits(load_sparse(stored, other_model())) == bits(example_model())


def test_a_changed_value_is_noticed(stored):
    edit(stored, piece("values/mask", with_element(3, 5.0)), checksums=False)
    check_refused(stored, other_model(), "crc32")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "3", '{"a": {}', "9" * 10_000, '{"mask": NaN}'])
def test_metadata_without_a_table_is_refused(stored, text):
    with safetensors.safe_open(stored, "pt") as file:
        metadata = file.metadata()
    stored.write_bytes(save(load_file(stored), {**metadata, "tensors": text}))
    check_refused(stored, other_model(), "its metadata ")


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_refused(tmp_path, name):
    (tmp_path / "file").write_bytes(OTHER_FILES[name])
    check_refused(tmp_path / "file", other_model())


def test_a_huge_header_is_not_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", 2**26) + b"{")
    os.truncate(path, 2**27)  # takes no space on the disk
    check_refused(path, other_model(), "header")


def test_a_header_that_is_too_large_to_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "LARGEST_HEADER", 1000)
    with pytest.raises(ValueError, match="too many"):
        save_sparse(sparse_net(), tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_a_claim_of_a_petabyte_takes_no_memory(stored):
    edit(
        stored,
        lambda pieces, entries, metadata: (
            pieces.update({"index/index": pieces["index/index"].long()}),
            entries["index"].update(shape=[2**50], weights=2**50, zeros=2**50 - 5, sparsity=1.0),
        ),
    )
    tracemalloc.start()
    try:
        check_refused(stored, other_model(), "index has the shape (1125899906842624,)")
        assert "1,125,899,906,842,624" in str(SparseFile.read(stored))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def damaged(data, positions, values, kind):
    """Bytes of which some are changed, removed or added, or whose end is cut off."""
    changed = bytearray(data)
    for position, value in zip(positions, values, strict=True):
        place = int(position * len(changed))
        if kind == "flip" and changed:
            changed[min(place, len(changed) - 1)] ^= value
        elif kind == "digit":  # in numbers and names of the header, which may still be valid then
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
    save_sparse(example_model(), stored)
    path = stored.with_name("damaged")
    path.write_bytes(damaged(stored.read_bytes(), *zip(*places, strict=True), kind))
    model = other_model()
    before = bits(model)
    try:
        load_sparse(path, model)
    except ValueError:
        assert bits(model) == before
    else:
        loaded = {name: value for name, (_, _, value) in bits(model).items()}
        assert loaded == read_plainly(path)
        assert bits(model) == bits(example_model())


def test_the_metadata(stored):
    with safetensors.safe_open(stored, "np") as file:
        metadata = file.metadata()
    assert metadata["sparsifai_format"] == "1"
    assert metadata["torch"] == torch.__version__
    entries = json.loads(metadata["tensors"])
    assert list(entries) == list(example_model().state_dict())
    mask = {key: value for key, value in entries["mask"].items() if key != "crc32"}
    assert mask == {"form": "bitmask", "shape": [203], "weights": 203, "zeros": 143, "sparsity": 0.704433}
    assert entries["tie"] == {"same_as": "mask"}


@pytest.mark.parametrize("name", ["mask", "index", "dense", "counter"])
def test_the_numpy_example_of_the_documentation_reads_a_tensor(stored, name):
    lines = sparse_format.__doc__[sparse_format.__doc__.index("    with safetensors") :]
    names = {"safetensors": safetensors, "json": json, "numpy": np, "path": stored, "name": name}
    exec(textwrap.dedent(lines), names)  # noqa: S102
    assert np.array_equal(names["tensor"], example_model().state_dict()[name].numpy())
