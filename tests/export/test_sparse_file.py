"""Saving to sparse files and loading them: models of any kind, and what is refused."""

import os

import pytest
import torch
from safetensors.torch import save, save_file
from sparse_files import (
    MISFITS,
    UNSTORABLE,
    Holder,
    bits,
    blank,
    check_refused,
    example_model,
    saved_model,
    sparse_net,
    sparse_tensor,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparsifai import SparseFile, Sparsifier, load_sparse, save_sparse


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
def test_the_model_in_a_wrapper_is_saved_and_loaded(tmp_path, wrap):
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


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
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


def test_tensors_that_the_model_ties_must_be_equal_in_the_file(tmp_path):
    untied, model = nn.Sequential(*(nn.Linear(30, 30, bias=False) for _ in range(2)), nn.Linear(30, 30)), tied()
    save_sparse(untied, tmp_path / "file")
    check_refused(tmp_path / "file", model, "one tensor")
    with torch.no_grad():
        untied[1].weight.copy_(untied[0].weight)
    save_sparse(untied, tmp_path / "file")
    assert bits(load_sparse(tmp_path / "file", model)) == bits(untied)


def test_views_that_overlap_are_stored_one_by_one(tmp_path):
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


# --- What cannot be stored ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", UNSTORABLE)
def test_a_model_that_a_file_cannot_store_is_refused(tmp_path, name):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    with pytest.raises(ValueError, match="^save_sparse: "):
        save_sparse(UNSTORABLE[name](), path)
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(ValueError, match="^load_sparse: "):
        load_sparse(path, UNSTORABLE[name]())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_earlier_file(tmp_path, monkeypatch, step):
    path, model = tmp_path / "file", sparse_net()
    save_sparse(model, path)

    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, step, full)
        with pytest.raises(OSError, match="No space left"):
            save_sparse(sparse_net(1), path)
    assert os.listdir(tmp_path) == ["file"]
    assert bits(load_sparse(path, sparse_net(2))) == bits(model)


def test_other_files_in_the_folder_are_unchanged(tmp_path):
    (tmp_path / "file.part").write_bytes(b"another's")
    for name in ("file", "file", "a" * 255):
        save_sparse(nn.ReLU(), tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["a" * 255, "file", "file.part"]
    assert (tmp_path / "file.part").read_bytes() == b"another's"


def test_the_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    save_sparse(nn.ReLU(), tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


# --- Files of other models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MISFITS)
def test_a_file_of_another_model_is_refused(tmp_path, name):
    save_sparse(saved_model(), tmp_path / "file")
    check_refused(tmp_path / "file", MISFITS[name]())


# --- The table ----------------------------------------------------------------------------------------------------


def test_the_table(stored):
    text = str(SparseFile.read(stored)).splitlines()
    size = stored.stat().st_size
    dense = len(save({name: value for name, value in example_model().state_dict().items() if name != "tie"}))
    assert text[0] == f"file: {100 * size / dense:.2f}% of the bytes of the dense file"
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
