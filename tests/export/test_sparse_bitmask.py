"""Files in the form sparse-bitmask: by hand, beside compressed-tensors, and damaged ones."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_files import Holder, bits
from torch import nn

from sparsifai import SparseFile, Sparsifier, load_sparse, save_pretrained_sparse
from sparsifai.__main__ import main

transformers = pytest.importorskip("transformers", reason="its models are saved")


def config(**options):
    return transformers.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, **{"tie_word_embeddings": False, **options},
    )  # fmt: skip


def llama(dtype=torch.float32, **options):
    """A small Llama with 90 % zeros in its Linear layers but lm_head, and a weight of -0.0."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config(**options)).to(dtype)
    Sparsifier(model, context="local", exclude=None if model.config.tie_word_embeddings else "lm_head").sparsify(0.9)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, :2] = torch.tensor([-0.0, float("nan")])
    return model


def other(model):
    torch.manual_seed(1)
    return type(model)(model.config).to(model.dtype)


# A matrix of 2 rows and 10 columns, and what the file has of it: 2 bytes per row, the lowest bit first.
MATRIX = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0, 2, 0], [-0.0, 0, 0, 0, 0, 0, 0, 3, 0, 4]])
PIECES = {
    "layer.compressed": torch.tensor([1, 2, -0.0, 3, 4]),
    "layer.bitmask": torch.tensor([[0b10, 0b1], [0b10000001, 0b10]], dtype=torch.uint8),
    "layer.row_offsets": torch.tensor([0, 2]),
    "layer.shape": torch.tensor([2, 10]),
}


class Layer(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.layer = Holder(weight=weight)


def read(path, pieces):
    save_file({name: piece.contiguous() for name, piece in pieces.items()}, path)
    model = Layer(torch.ones(2, 10))
    load_sparse(path, model)
    return model.layer.weight


def test_a_file_by_hand(tmp_path):
    assert bits({"a": read(tmp_path / "file", PIECES)}) == bits({"a": MATRIX})
    (row,) = SparseFile.read(tmp_path / "file").rows
    assert (row.name, row.shape, row.form, row.count.zeros) == ("layer.weight", (2, 10), "sparse-bitmask", 16)
    assert row.bytes == 5 * 4 + 4 + 2 * 8 + 2 * 8
    assert row.dense_bytes == 80


def test_the_form_of_2_4_is_read(tmp_path):
    pieces = {
        "layer.compressed": torch.tensor([[1.0, 2.0], [3.0, 0.0]]),
        "layer.bitmask": torch.tensor([[0b1010], [0b11]], dtype=torch.uint8),
        "layer.shape": torch.tensor([[2], [4]]),
    }
    save_file(pieces, tmp_path / "file")
    model = Layer(torch.ones(2, 4))
    load_sparse(tmp_path / "file", model)
    assert model.layer.weight.tolist() == [[0, 1, 0, 2], [3, 0, 0, 0]]
    (row,) = SparseFile.read(tmp_path / "file").rows
    assert (row.form, row.count.zeros) == ("sparse-24-bitmask", 5)


def test_what_is_written_is_that_form(tmp_path):
    model = llama()
    save_pretrained_sparse(model, tmp_path / "new")
    found, name = load_file(tmp_path / "new" / "model.safetensors"), "model.layers.0.mlp.up_proj"
    weight = model.get_parameter(f"{name}.weight").detach()
    is_set = (weight != 0) | torch.signbit(weight)
    assert f"{name}.weight" not in found
    assert bits({"a": found[f"{name}.compressed"]}) == bits({"a": weight[is_set]})
    unpacked = np.unpackbits(found[f"{name}.bitmask"].numpy(), axis=-1, bitorder="little")
    assert np.array_equal(unpacked, is_set.numpy())
    counts = is_set.sum(1)
    assert torch.equal(found[f"{name}.row_offsets"], counts.cumsum(0) - counts)
    assert found[f"{name}.shape"].tolist() == [64, 64]
    assert found[f"{name}.shape"].dtype == torch.int64
    said = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors"
    assert said["sparsity_config"]["format"] == "sparse-bitmask"
    assert name in said["sparsity_config"]["targets"]
    assert "lm_head" not in said["sparsity_config"]["targets"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_is_read_bit_for_bit(tmp_path, dtype):
    model = llama(dtype)
    saved = save_pretrained_sparse(model, tmp_path / "new")
    assert bits(load_sparse(tmp_path / "new", other(model))) == bits(model)
    assert saved == SparseFile.read(tmp_path / "new")
    assert saved.bytes == (tmp_path / "new" / "model.safetensors").stat().st_size
    forms = {row.name: row.form for row in saved.rows}
    assert forms["model.layers.0.mlp.up_proj.weight"] == "sparse-bitmask"
    assert forms["lm_head.weight"] == forms["model.norm.weight"] == "dense"
    assert saved.count.zeros == sum(int((value == 0).sum()) for value in model.state_dict().values())
    assert saved.ratio < 0.75


def test_the_command_line_reports_a_folder(tmp_path, capsys):
    save_pretrained_sparse(llama(), tmp_path / "new")
    assert main(["report", str(tmp_path / "new")]) == 0
    assert "sparse-bitmask" in capsys.readouterr().out


def test_a_model_in_several_files(tmp_path):
    model = llama()
    save_pretrained_sparse(model, tmp_path / "new", max_shard_size=40_000)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())["weight_map"]
    for path in (tmp_path / "new").glob("*.safetensors"):
        assert {name for name, file in index.items() if file == path.name} == load_file(path).keys()
    assert bits(load_sparse(tmp_path / "new", other(model))) == bits(model)


def test_tied_weights_are_stored_once_and_dense(tmp_path):
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight.data[:, 8:] = 0
    saved = save_pretrained_sparse(model, tmp_path / "new")
    assert [row.form for row in saved.rows if row.shape == (40, 64)] == ["dense"]
    loaded = load_sparse(tmp_path / "new", other(model))
    assert bits(loaded) == bits(model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_dense_model_is_told(tmp_path):
    model = transformers.LlamaForCausalLM(config())
    with pytest.warns(UserWarning, match="no weight of LlamaForCausalLM has enough zeros .* prune the model first"):
        save_pretrained_sparse(model, tmp_path / "new")
    assert bits(type(model).from_pretrained(tmp_path / "new")) == bits(model)


def test_after_an_error_nothing_is_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsifai.export.pretrained_sparse.write_whole", full)
    with pytest.raises(OSError, match="No space"):
        save_pretrained_sparse(llama(), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def changed(**pieces):
    named = {f"layer.{name}": piece for name, piece in pieces.items()}
    return {name: piece for name, piece in {**PIECES, **named}.items() if piece is not None}


DAMAGED = {
    "a value less": (changed(compressed=torch.ones(4)), "has 5 bits set, but there are 4 values"),
    "a bit in the padding": (changed(bitmask=torch.tensor([[2, 1], [129, 128]], dtype=torch.uint8)), "has 5 bits set"),
    "a narrower bitmask": (changed(bitmask=torch.tensor([[2], [129]], dtype=torch.uint8)), r"\[2, 1\], not \[2, 2\]"),
    "another kind of bitmask": (changed(bitmask=PIECES["layer.bitmask"].int()), "bitmask has the dtype I32, not U8"),
    "other offsets": (changed(row_offsets=torch.tensor([0, 3])), "row_offsets of layer.weight do not fit"),
    "a negative size": (changed(shape=torch.tensor([-2, 10])), "the shape of layer.weight is"),
    "a huge shape": (changed(shape=torch.tensor([2**40, 2**40])), "the shape of layer.weight is"),
    "no shape": (changed(shape=None), "it has no layer.shape"),
    "the weight, too": (changed(weight=MATRIX), "it has layer.weight both dense and sparse"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused(tmp_path, name):
    pieces, message = DAMAGED[name]
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "file", pieces)


INDEXES = {
    "outside": ('{"weight_map": {"a": "../file.safetensors"}}', "names '../file.safetensors', which is no"),
    "a list": ("[]", "does not map names of tensors to files"),
    "two files": ('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}', "two of its files have 'a'"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_wrong_indexes_are_refused(tmp_path, name):
    text, message = INDEXES[name]
    (tmp_path / "model.safetensors.index.json").write_text(text)
    for file in ("one", "two"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(ValueError, match=message):
        load_sparse(tmp_path, Holder(a=torch.ones(1)))


def a_file_is_there(folder):
    (folder / "new").mkdir()
    (folder / "new" / "notes.txt").write_text("mine")
    save_pretrained_sparse(llama(), folder / "new")


def quantized(folder):
    model = llama()
    model.config.quantization_config = {"quant_method": "gptq"}
    save_pretrained_sparse(model, folder / "new")


def adapters(folder):
    model = llama()
    model.save_pretrained = lambda folder: None
    save_pretrained_sparse(model, folder / "new")


def a_reserved_name(folder):
    model = llama()
    model.model.register_buffer("shape", torch.ones(1))
    save_pretrained_sparse(model, folder / "new")


REFUSED = {
    "files": (a_file_is_there, FileExistsError, "there are files already; choose another folder"),
    "no parent": (lambda folder: save_pretrained_sparse(llama(), folder / "a" / "b"), FileNotFoundError,
                  "the folder around it does not exist; create it first"),
    "another model": (lambda folder: save_pretrained_sparse(nn.Linear(2, 2), folder / "new"), TypeError,
                      r"Linear is not a model of transformers, .* save it with save_sparse\(model, file\)"),
    "quantized": (quantized, ValueError, "LlamaForCausalLM is quantized"),
    "adapters": (adapters, ValueError, "writes no safetensors file of a whole model; merge adapters"),
    "reserved": (a_reserved_name, ValueError, "'model.shape' ends with a name that sparse-bitmask files use"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved(tmp_path, name):
    mistake, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        mistake(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == (["new", "notes.txt"] if name == "files" else [])


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(IsADirectoryError, match="a folder without model.safetensors"):
        SparseFile.read(tmp_path)


# --- compressed-tensors -----------------------------------------------------------------------------------------------


def library():
    """The compressor of the library, in a version that has it."""
    found = pytest.importorskip("compressed_tensors", reason="its readers are tried")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    if not hasattr(compressors, "BitmaskCompressor"):
        pytest.skip(f"compressed-tensors {found.__version__} has no sparse-bitmask any more; 0.14 has")
    return compressors.BitmaskCompressor(config=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_library_reads_what_is_written(tmp_path, dtype):
    compressor, model = library(), llama(dtype)
    save_pretrained_sparse(model, tmp_path / "new", max_shard_size=40_000)
    found = dict(compressor.decompress(str(tmp_path / "new")))
    assert bits(found) == {name: bits(model)[name] for name in found}
    assert found.keys() == model.state_dict().keys()


def test_what_the_library_writes_is_read(tmp_path):
    compressor, model = library(), llama()
    state = {name: value.detach().clone() + 0.0 for name, value in model.state_dict().items()}  # -0.0 + 0.0 is 0.0
    save_file(compressor.compress(state, {"model.layers.0.mlp.up_proj", "lm_head"}), tmp_path / "file")
    loaded = load_sparse(tmp_path / "file", other(model))
    assert bits(loaded) == bits(state)


def test_the_header_is_one_of_transformers(tmp_path):
    """transformers reads only files whose metadata say that they are of torch."""
    save_pretrained_sparse(llama(), tmp_path / "new")
    data = (tmp_path / "new" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header["__metadata__"] == {"format": "pt"}
