"""Sparse files that are damaged or hostile: two readers read the same or both refuse, and nothing is changed."""

import json
import os
import random
import struct

import hostile
import plain_sparse_reader
import pytest
from mutations import damaged, mutated
from safetensors import safe_open
from sparse_files import bits, check_refused, example_model, other_model

from sparsifai import SparseFile, load_sparse, save_sparse
from sparsifai.__main__ import main


def plainly(data):
    """What the second reader reads, None if it refuses."""
    try:
        return {name: found[2] for name, found in plain_sparse_reader.read(data).items()}
    except ValueError:
        return None


def ours(path):
    """What is loaded, None if it is refused; then the model is unchanged."""
    model = other_model()
    before = bits(model)
    try:
        load_sparse(path, model)
    except ValueError as error:
        message = str(error)
    else:
        return {name: value for name, (_, _, value) in bits(model).items()}
    assert str(path) in message
    assert bits(model) == before
    return None


def is_read(path):
    try:
        return bool(str(SparseFile.read(path)))
    except ValueError:
        return False


def compare(path, data):
    """Whether a file is read; all readers agree on it."""
    path.write_bytes(data)
    expected, found = plainly(data), ours(path)
    assert is_read(path) == (expected is not None)
    if found is not None:  # what fits the model has the same bytes
        assert found == expected
        with safe_open(path, "pt") as file:  # and safetensors finds nothing wrong with it
            assert file.keys()
    return expected is not None


def test_readers_agree_on_damaged_files(stored):
    """3,000 files with other bytes."""
    data = stored.read_bytes()
    read = sum(compare(stored, damaged(data, random.Random(seed))) for seed in range(3000))
    assert 5 < read < 300


def split(data):
    """Header, entries and the bytes of the tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["tensors"]), data[8 + length :]


def joined(header, entries, body):
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        header = {**header, "__metadata__": {**header["__metadata__"], "tensors": json.dumps(entries)}}
    return hostile.safetensors_file(header, body)


def plain(value):
    """A value as JSON has it, as the random changes have others, too."""
    return json.loads(json.dumps(value, default=lambda other: str(other)[:20]))


@pytest.mark.parametrize("of_entries", [False, True])
def test_readers_agree_on_changed_headers(stored, of_entries):
    """1,500 files with another value, key or order in the header, and as many in the entries of the metadata."""
    header, entries, body = split(stored.read_bytes())
    read = 0
    for seed in range(1500):
        change = random.Random(seed)
        if of_entries:
            data = joined(header, plain(mutated(entries, change)[0]), body)
        else:
            data = joined(plain(mutated(header, change)[0]), entries, body)
        read += compare(stored, data)
    assert 50 < read < 700


@pytest.mark.parametrize("name", hostile.SPARSE_FILES)
def test_hostile_files_are_refused(tmp_path, name, capsys):
    path, data = tmp_path / "file", hostile.SPARSE_FILES[name]()
    path.write_bytes(data)
    check_refused(path, other_model())
    if not name.startswith("a tensor of"):
        with pytest.raises(ValueError, match=str(path)):
            SparseFile.read(path)
    assert main(["report", str(path)]) == (0 if name.startswith("a tensor of") else 2)


def test_the_file_that_the_hostile_ones_are_made_of_is_read(tmp_path):
    (tmp_path / "file").write_bytes(hostile.sparse_file())
    assert [row.name for row in SparseFile.read(tmp_path / "file").rows] == ["a"]
    assert plain_sparse_reader.read(hostile.sparse_file()) == {"a": ("U8", [2], b"\x01\x02")}


def test_a_file_is_read_whole_while_another_process_replaces_it(tmp_path):
    """Half of the reads see one model and half the other, since it is replaced between opening and reading."""
    path, one, two = tmp_path / "file", example_model(), other_model()
    save_sparse(one, path)
    real, seen = os.fstat, []

    def replacing(descriptor):
        found = real(descriptor)
        if os.path.samestat(found, os.stat(path)):
            save_sparse(two if bits(load_plain()) == bits(one) else one, path)
        return found

    def load_plain():
        os.fstat = real
        try:
            return load_sparse(path, example_model())
        finally:
            os.fstat = replacing

    os.fstat = replacing
    try:
        for _ in range(20):
            seen.append(bits(load_sparse(path, example_model())))
    finally:
        os.fstat = real
    assert all(each in (bits(one), bits(two)) for each in seen)
