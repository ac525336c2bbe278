"""Smaller models are saved and loaded: bit for bit, into models of the original size, and only from whole files."""

import copy
import json
import warnings

import pytest
import torch
from joint_models import MODELS, model_and_batch, output_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sparsifai import SparseFile, Sparsifier, load_shrunk, save_shrunk, save_sparse, shrink


def shrunk(name):
    """A smaller model, one of the original size with other weights, and a batch."""
    model, batch = model_and_batch(name)
    original, _ = model_and_batch(name, seed=1)
    for kind in ("head", "neuron") if name != "cross attention" else ("head",):
        Sparsifier(model, kind, context="global", criteria="random").sparsify(0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shrink(model, batch), original, batch


def assert_loaded(loaded, small, batch):
    assert [(name, value.shape) for name, value in loaded.named_parameters()] == [
        (name, value.shape) for name, value in small.named_parameters()
    ]
    assert all(map(torch.equal, loaded.parameters(), small.parameters()))
    assert torch.equal(output_of(loaded, batch), output_of(small, batch))


@pytest.mark.parametrize("name", MODELS)
def test_a_smaller_model_is_loaded_into_one_of_the_original_size(name, tmp_path):
    small, original, batch = shrunk(name)
    before = copy.deepcopy(original.state_dict())
    saved = save_shrunk(small, tmp_path / "file")
    loaded = load_shrunk(original, tmp_path / "file")
    assert_loaded(loaded, small, batch)
    assert saved.bytes == (tmp_path / "file").stat().st_size
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())
    assert [type(module) for module in loaded.modules()] == [type(module) for module in small.modules()]


def test_the_config_of_a_loaded_model_is_that_of_the_smaller_one(tmp_path):
    pytest.importorskip("transformers", reason="it has the config")
    for kind in ("neuron", "head"):
        model, batch = model_and_batch("bert")
        Sparsifier(model, kind, "local", "random").sparsify(0.5)
        save_shrunk(shrink(model, batch), tmp_path / "file")
        loaded = load_shrunk(model_and_batch("bert")[0], tmp_path / "file")
        if kind == "neuron":
            assert loaded.config.intermediate_size == 48
        else:
            with pytest.raises(ValueError, match="save_shrunk"):
                loaded.save_pretrained(tmp_path / "folder")


def convolutions(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, bias=bias), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    ).eval()  # fmt: skip


PICTURES = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def test_convolutions(tmp_path):
    pytest.importorskip("torch_pruning", reason="filters are followed with it")
    model = convolutions()
    Sparsifier(model, "filter", "local", coupled=True, example_input=PICTURES).sparsify(0.5)
    small = shrink(model, PICTURES)
    assert small[3].groups < 8
    save_shrunk(small, tmp_path / "file")
    loaded = load_shrunk(convolutions(), tmp_path / "file")
    assert_loaded(loaded, small, PICTURES)
    assert [str(part) for part in loaded] == [str(part) for part in small]


def test_a_bias_that_shrink_added(tmp_path):
    pytest.importorskip("torch_pruning", reason="filters are followed with it")

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 5, 3, bias=False)).eval()

    model = net()
    with torch.no_grad():
        model[0].weight[1] = 0
    small = shrink(model, PICTURES)
    assert small[2].bias is not None
    save_shrunk(small, tmp_path / "file")
    loaded = load_shrunk(net(), tmp_path / "file")
    assert_loaded(loaded, small, PICTURES)
    assert loaded[2].bias.requires_grad


def test_modes_devices_and_frozen_parameters_are_those_of_the_model(tmp_path):
    small, original, batch = shrunk("encoder")
    save_shrunk(small, tmp_path / "file")
    original.train()
    original.layers[0].linear1.weight.requires_grad_(False)
    loaded = load_shrunk(torch.compile(original), tmp_path / "file")
    assert loaded.training
    assert not loaded.layers[0].linear1.weight.requires_grad
    assert loaded.layers[1].linear1.weight.requires_grad
    output_of.__wrapped__(loaded, batch).sum().backward()


def test_the_file_can_be_read_as_a_sparse_file(tmp_path):
    small, _, _ = shrunk("encoder")
    saved = save_shrunk(small, tmp_path / "file")
    assert str(SparseFile.read(tmp_path / "file")) == str(saved)


# --- Files that are refused -------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    small, _, _ = shrunk("encoder")
    save_shrunk(small, tmp_path / "file")
    return tmp_path / "file"


def original():
    return model_and_batch("encoder", seed=1)[0]


def changed(file, change):
    """The file with other metadata."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(metadata)
    save_file(tensors, file, metadata)
    return file


def with_sizes(sizes):
    return lambda metadata: metadata.update(sizes=sizes if isinstance(sizes, str) else json.dumps(sizes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_sizes("{"), "is damaged .its metadata is not JSON"),
        (with_sizes([]), "its sizes are not whole numbers"),
        (with_sizes({"layers": []}), "its sizes are not whole numbers"),
        (with_sizes({"": {"a": True}}), "its sizes are not whole numbers"),
        (with_sizes({"": {"a": 1.5}}), "its sizes are not whole numbers"),
        (with_sizes({"": {"a": 2**40}}), "its sizes are not whole numbers"),
        (with_sizes({"layers.0.linear1": {"out_features": 97}}), "out_features is 97 in .*, but 96 in the model"),
        (
            with_sizes({"layers.0.linear1": {"out_features": 3}}),
            r"linear1 in .* are .3, 64., which do not fit",
        ),
        (lambda metadata: metadata.pop("sizes"), "was not written by save_shrunk, but by save_sparse"),
        (lambda metadata: metadata.update(sparsifai_format="9"), "has version '9' of the format"),
    ],
)
def test_other_metadata(file, change, message):
    model = original()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_shrunk(model, changed(file, change))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.layers[0].linear1.out_features == 96


def test_sizes_of_what_is_not_in_the_model_change_nothing(file):
    with safe_open(file, "pt") as opened:
        sizes = json.loads(opened.metadata()["sizes"])
    sizes |= {"": {"forward": 1, "training": 0, "_modules": 1, "__class__": 2}, "layers.9": {"a": 1}}
    loaded = load_shrunk(original(), changed(file, with_sizes(sizes)))
    assert callable(loaded.forward)
    assert loaded.training is False


def test_damaged_and_foreign_files(file, tmp_path):
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[:-10], whole[:-3] + b"abc", b"\x80\x04" + whole):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|not a safetensors file"):
            load_shrunk(original(), file)
    torch.save({"model": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_shrunk(original(), file)
    save_file({"a": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="dense safetensors file"):
        load_shrunk(original(), file)
    save_sparse(original(), file)
    with pytest.raises(ValueError, match="by save_sparse; load it with that"):
        load_shrunk(original(), file)
    with pytest.raises(FileNotFoundError):
        load_shrunk(original(), tmp_path / "nothing")


def test_models_that_do_not_fit(file):
    with pytest.raises(ValueError, match=r"saved from another model than Sequential: it lacks '0.weight'.* and has '"):
        load_shrunk(nn.Sequential(nn.Linear(3, 3)), file)
    with pytest.raises(ValueError, match=r"is float32 in .*, but float64 in the model; load into a model of"):
        load_shrunk(original().double(), file)
    narrow = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 8, batch_first=True), 2)
    with pytest.raises(ValueError, match=r"linear1.weight has the shape .* in the model cannot be cut to it"):
        load_shrunk(narrow, file)
    with pytest.raises(TypeError, match="load_shrunk"):
        load_shrunk(file, original())
    with pytest.raises(TypeError, match="save_shrunk"):
        save_shrunk(file, original())
    with pytest.raises(FileNotFoundError, match="save_shrunk: the folder does not exist"):
        save_shrunk(original(), file.parent / "nothing" / "file")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, x):
        return x + self.outer(self.inner(x).relu())


def test_a_model_that_has_lost_blocks(tmp_path):
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def net(depth):
        return nn.Sequential(nn.Linear(3, 3), *(Block() for _ in range(depth)), nn.Linear(3, 2)).eval()

    model = net(4)
    Sparsifier(model, "block", example_input=rows).sparsify(0.5)
    small = shrink(model, rows)
    save_shrunk(small, tmp_path / "file")
    message = (
        r"has 4 of the 6 modules in Sequential, so if shrink removed whole blocks or experts, pass a model that was "
        r"made with as many as the smaller one, .*save_pretrained.* or with torch.save\(model, file\)"
    )
    with pytest.raises(ValueError, match=message):
        load_shrunk(net(4), tmp_path / "file")
    assert_loaded(load_shrunk(net(2), tmp_path / "file"), small, (rows,))
    stages = nn.ModuleList([nn.Linear(3, 3), nn.Sequential(Block(), Block())])
    save_shrunk(nn.ModuleList([stages[0], nn.Sequential()]), tmp_path / "file")
    with pytest.raises(ValueError, match=r"has 1 of the 2 modules in ModuleList"):
        load_shrunk(stages, tmp_path / "file")
