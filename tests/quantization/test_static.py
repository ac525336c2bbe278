"""quantize: the int8 model has the outputs of the rounded one, its zeros, and a sparse file that gives it back."""

import numpy as np
import pytest
import torch
from torch import nn

from sparsifai import Quantized, SparseFile, Sparsifier, load_quantized, quantize
from sparsifai.quantization.fake_quantization import FakeQuantization
from sparsifai.quantization.layers import quantized_layers

onnx = pytest.importorskip("onnx", reason="it reads int8 models")
onnxruntime = pytest.importorskip("onnxruntime", reason="it quantizes and runs models")
pytest.importorskip("onnxscript", reason="torch's exporter needs it")


class Net(nn.Module):
    """Convolutions with norm layers, a transposed and a grouped one, attention, and linear layers with three axes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.grouped, self.up = nn.Conv2d(16, 16, 3, groups=4), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.hidden, self.out = nn.Linear(8, 64), nn.Linear(64, 5)

    def forward(self, images):
        tokens = self.up(self.grouped(self.stem(images)).relu()).flatten(2).transpose(1, 2)
        tokens = self.norm(tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0])
        return self.out(self.hidden(tokens).relu().mean(1))


def images(count, seed=0):
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def outputs(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))[0]


@pytest.fixture(scope="module")
def sparse_net():
    torch.manual_seed(0)
    net = Net().train()
    for seed in range(3):
        net(2 * images(16, seed) + 1)
    Sparsifier(net, context="local").sparsify(0.8)
    return net.eval()


@pytest.fixture(scope="module")
def quantized(sparse_net, tmp_path_factory):
    batches = [(images(32, seed), torch.zeros(32)) for seed in range(2)]
    state = {name: value.clone() for name, value in sparse_net.state_dict().items()}
    made = quantize(sparse_net, batches, tmp_path_factory.mktemp("int8") / "net.onnx", exclude="out")
    assert all(torch.equal(value, sparse_net.state_dict()[name]) for name, value in state.items())
    return made


WEIGHTS = ("stem.0.weight", "grouped.weight", "up.weight", "attention.in_proj_weight", "attention.out_proj.weight",
           "hidden.weight")  # fmt: skip


def test_every_zero_of_the_weights_is_a_zero_integer(sparse_net, quantized):
    integers = quantized.weights()
    assert integers.keys() == set(WEIGHTS)
    rows = {row.name: row for row in quantized.rows}
    for name in WEIGHTS:
        weight, (values, scales) = sparse_net.get_parameter(name).detach(), integers[name]
        if values.shape != weight.shape or name == "attention.out_proj.weight":
            # MatMul has (in, out); Gemm may have either.
            values = values if torch.equal(values == 0, weight == 0) else values.t()
        assert values.dtype == torch.int8
        assert (values[weight == 0] == 0).all()
        assert (values[weight.abs() > weight.abs().max() / 2] != 0).all()
        assert int((values == 0).sum()) == rows[name].count.zeros >= int((weight == 0).sum()) > 0
        assert rows[name].scales == scales.numel()
    float_row = rows["out.weight"]
    assert (float_row.dtype, float_row.scales) == ("float32", 0)
    assert quantized.count.sparsity == pytest.approx(0.8, abs=0.03)
    assert "all int8 weights" in str(quantized)
    assert "80" in str(quantized)


def test_the_file_runs_for_any_number_of_examples_and_computes_what_training_has_rounded(sparse_net, quantized):
    layers, left = quantized_layers("test", sparse_net, exclude=["out"])
    assert left == []
    fake = FakeQuantization(sparse_net, layers)
    with torch.no_grad():
        fake.put()
        for layer in layers:
            layer.module.train()  # the ranges of the inputs
        sparse_net(images(64, 0))
        sparse_net.eval()
        rounded = sparse_net(images(8, 5))
        fake.remove()
        exact = sparse_net(images(8, 5))
    whole = outputs(quantized.path, images(8, 5))
    one = outputs(quantized.path, images(8, 5)[:1])
    assert np.allclose(whole[:1], one, atol=1e-2)
    size = exact.abs().max()
    assert 0 < np.abs(whole - exact.numpy()).max() < 0.05 * size
    assert 0 < (rounded - exact).abs().max() < 0.05 * size


def test_the_sparse_file_gives_the_onnx_file_back_bit_for_bit(quantized, tmp_path):
    table = quantized.save_sparse(tmp_path / "net.safetensors")
    assert isinstance(table, SparseFile)
    again = load_quantized(tmp_path / "net.safetensors", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == quantized.path.read_bytes()
    assert again.rows == quantized.rows == Quantized.read(quantized.path).rows
    rows = {row.name: row for row in table.rows}
    assert rows["grouped.weight_quantized"].dtype == "int8"
    assert rows["grouped.weight_quantized"].form == "bitmask"
    assert rows["grouped.weight_quantized"].bytes < 0.4 * rows["grouped.weight_quantized"].dense_bytes
    assert "grouped.weight_scale" in rows


class TwoInputs(nn.Module):
    """A tied table of words, and a mask that is given by name."""

    def __init__(self):
        super().__init__()
        self.words, self.hidden = nn.Embedding(30, 8), nn.Linear(8, 8)
        self.decoder, self.recurrent = nn.Linear(8, 30, bias=False), nn.GRU(8, 8, batch_first=True)
        self.decoder.weight = self.words.weight

    def forward(self, words, mask):
        hidden = self.recurrent(torch.tanh(self.hidden(self.words(words))) * mask[..., None])[0]
        return self.decoder(hidden)


def test_inputs_by_name_and_an_embedding_that_is_tied(tmp_path):
    net = TwoInputs().eval()
    Sparsifier(net, layers="hidden").sparsify(0.5)
    words, mask = torch.randint(30, (4, 6)), torch.ones(4, 6)
    with pytest.warns(UserWarning, match="2 weights stay float in net.onnx.*: recurrent.weight_ih_l0, recurrent.weig"):
        made = quantize(net, [{"words": words, "mask": mask}], tmp_path / "net.onnx")
    shapes = {row.shape: row.dtype for row in made.rows}
    assert shapes.items() >= {(8, 8): "int8", (8, 30): "int8", (30, 8): "float32"}.items()
    with torch.no_grad():
        expected = net(words, mask).numpy()
    assert np.abs(outputs(made.path, words, mask) - expected).max() < 0.05 * np.abs(expected).max()


def test_filters_that_are_pruned_as_a_whole_give_no_nan_and_go_with_shrink(tmp_path):
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    from sparsifai import shrink

    net = nn.Sequential(nn.Conv2d(2, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))  # fmt: skip
    Sparsifier(net, "filter", "local").sparsify(0.5)
    net.eval()
    small = shrink(net, images(2))
    sizes = []
    for number, each in enumerate((net, small)):
        made = quantize(each, [images(16)], tmp_path / f"{number}.onnx")
        result = outputs(made.path, images(4, 1))
        assert np.isfinite(result).all()
        with torch.no_grad():
            assert np.abs(result - net(images(4, 1)).numpy()).max() < 0.05
        sizes.append(made.count)
    assert sizes[0].sparsity > 0.45
    assert sizes[1].weights < 0.4 * sizes[0].weights


def resnet18():
    models = pytest.importorskip("torchvision.models", reason="the model is torchvision's")
    return models.resnet18(num_classes=10), {"x": torch.randn(4, 3, 64, 64)}


def bert():
    transformers = pytest.importorskip("transformers", reason="the model is of transformers")
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                     vocab_size=100)  # fmt: skip
    words = torch.randint(100, (4, 8))
    return transformers.BertForSequenceClassification(config), {
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("make", "count"), [(resnet18, 21), (bert, 14)])
def test_models_of_other_libraries_are_trained_and_quantized(tmp_path, make, count):
    net, inputs = make()
    Sparsifier(net, context="local").sparsify(0.8)

    def first(output):
        return getattr(output, "logits", output)

    layers, left = quantized_layers("test", net)
    fake = FakeQuantization(net, layers)
    fake.put()
    first(net(**inputs)).square().sum().backward()
    fake.remove()
    assert (len(layers), left) == (count, [])
    weights = {name: net.get_parameter(name) for layer in layers for name in layer.weights}
    assert all(each.grad.isfinite().all() and (each.grad != 0).any() for each in weights.values())
    net.eval()
    made = quantize(net, [inputs], tmp_path / "net.onnx")
    zeros = {row.name: row.count.zeros for row in made.rows if row.scales}
    assert zeros.keys() == weights.keys()
    assert all(zeros[name] >= int((weight == 0).sum()) > 0 for name, weight in weights.items())
    with torch.no_grad():
        expected = first(net(**inputs)).numpy()
    assert np.abs(outputs(made.path, *inputs.values()) - expected).max() < 0.1 * np.abs(expected).max()
