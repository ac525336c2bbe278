"""`shrink` and `coupled=True` where data is hard to follow: reshapes, integers, layers of several steps.

What cannot be followed stays as it is, and the rest of the model shrinks.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torch_pruning", reason="shrink needs it")

from sparsifai import Sparsifier, SparsifyCallback, shrink, shrinkage  # noqa: E402


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def half_zero(model, *names):
    """Every second output of some layers is set to zero, with its bias."""
    with torch.no_grad():
        for layer in map(model.get_submodule, names):
            layer.weight[::2] = 0
            if layer.bias is not None:
                layer.bias[::2] = 0
    return model.eval()


def removed(model, example):
    """Layer name -> number of outputs that are removed, for layers with zero outputs; the outputs stay the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = shrink(model, example)
    inputs = example if isinstance(example, tuple) else (example,)
    with torch.no_grad():
        torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    return {layer.name: layer.removed for layer in shrinkage(model, example).layers if layer.zeros}


# --- Names of users never meet names of ours --------------------------------------------------------------------------


def named(first, last):
    model = nn.Sequential()
    model.add_module(first, nn.Linear(8, 128))
    model.add_module("relu", nn.ReLU())
    model.add_module(last, nn.Linear(128, 5))
    return model


@pytest.mark.parametrize(
    ("first", "last"),
    [("hidden", "output"), ("output", "head"), ("marks", "output"), ("model", "hidden"), ("end", "unknown"),
     ("path through the model unknown", "output")],
)  # fmt: skip
def test_layers_may_have_any_name(first, last):
    torch.manual_seed(0)
    assert removed(half_zero(named(first, last), first), drawn(4, 8)) == {first: 64}
    sparsifier = Sparsifier(named(first, last), "filter", coupled=True, example_input=drawn(4, 8))
    assert set(sparsifier.masks) == {f"{first}.weight"}


@pytest.mark.parametrize("name", ["marks", "hidden", "model"])
def test_containers_may_have_any_name(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 1))
    model.add_module(name, nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
    model.add_module("out", nn.Conv2d(8, 2, 1))
    assert removed(half_zero(model, "0"), drawn(2, 3, 8, 8)) == {"0": 4}


# --- Attention with rotary embeddings, shared keys and a cache --------------------------------------------------------


class Rotary(nn.Module):
    """One layer of attention as in Llama: rotary embeddings, two heads that share one key and one value."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.query, self.key, self.value = (nn.Linear(8, size, bias=False) for size in (8, 4, 4))
        self.project, self.up, self.gate, self.down = (
            nn.Linear(i, o, bias=False) for i, o in ((8, 8), (8, 16), (8, 16), (16, 8))
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.embed(x)
        query, key, value = (
            layer(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        query, key = map(self.rotated, (query, key))
        key, value = (
            each[:, :, None].expand(len(x), 1, 2, x.shape[1], 4).reshape(len(x), 2, -1, 4) for each in (key, value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(*x.shape[:2], -1))
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))

    @staticmethod
    def rotated(x):
        angles = torch.outer(torch.arange(x.shape[2]), 1 / 100 ** torch.arange(0, 1, 0.5)).repeat(1, 2)
        first, second = x[..., :2], x[..., 2:]
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def test_attention_with_rotary_embeddings_and_shared_keys_ends():
    model, example = half_zero(Rotary(), "up", "gate"), torch.randint(10, (2, 6))
    assert removed(model, example) == {"up": 8, "gate": 8}
    sparsifier = Sparsifier(Rotary(), "filter", coupled=True, example_input=example)
    assert set(sparsifier.masks) == {"up.weight", "gate.weight"}
    whys = {name: layer.why_dense for name, layer in sparsifier.layers.items() if layer.why_dense}
    assert whys["key.weight"] == "path through the model unknown"


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral"])
@pytest.mark.parametrize("cache", [False, True])
def test_language_models_of_transformers(kind, cache):
    transformers = pytest.importorskip("transformers", reason="its models are the test")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=cache, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model, example = getattr(transformers, f"{kind}ForCausalLM")(config), {"input_ids": torch.randint(16, (2, 5))}
    mlps = [f"model.layers.{number}.mlp.{name}" for number in (0, 1) for name in ("up_proj", "gate_proj")]
    report = shrinkage(half_zero(model, *mlps), example)
    assert {layer.name: layer.removed for layer in report.layers if layer.removed} == dict.fromkeys(mlps, 8)
    sparsifier = Sparsifier(model, "filter", coupled=True, example_input=example)
    assert set(sparsifier.masks) == {f"{name}.weight" for name in mlps}


# --- Layers of several steps ------------------------------------------------------------------------------------------


class Between(nn.Module):
    """Two convolutions, a layer over positions, two Linear layers."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.narrow = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 6, 1)
        self.layer, self.hidden, self.out = layer, nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.layer(F.relu(self.narrow(F.relu(self.conv(x)))).transpose(1, 2))
        return self.out(F.relu(self.hidden(x[0] if isinstance(x, tuple) else x))).mean(1)


class Loop(nn.Module):
    """Calls a cell, or a function with its own weights, for each position."""

    def __init__(self, cell=None):
        super().__init__()
        self.cell, self.weight = cell, nn.Parameter(torch.randn(18, 6))

    def forward(self, x):
        state, outputs = x.new_zeros(len(x), 6), []
        for each in x.unbind(1):
            state = self.cell(each, state) if self.cell else torch.gru_cell(each, state, self.weight, self.weight)
            outputs.append(state)
        return torch.stack(outputs, 1)


RECURRENT = {
    "GRU": lambda: nn.GRU(6, 6, batch_first=True),
    "two layers": lambda: nn.GRU(6, 6, 2, batch_first=True),
    "both directions": lambda: nn.GRU(6, 3, batch_first=True, bidirectional=True),
    "RNN": lambda: nn.RNN(6, 6, batch_first=True),
    "LSTM": lambda: nn.LSTM(6, 6, batch_first=True),
    "cell": lambda: Loop(nn.GRUCell(6, 6)),
    "function": Loop,
}


@pytest.mark.parametrize("layer", RECURRENT.values(), ids=RECURRENT)
@pytest.mark.filterwarnings("ignore:.*their axes have no names")
def test_recurrent_layers_stay_and_the_rest_shrinks(layer):
    example = drawn(2, 3, 7)
    model = half_zero(Between(layer()), "conv", "narrow", "hidden")
    assert removed(model, example) == {"conv": 4, "narrow": 0, "hidden": 4}
    kind = type(model.layer.cell if getattr(model.layer, "cell", None) else model.layer).__name__
    with pytest.warns(UserWarning, match=rf"narrow \(3: goes through layer\S* \({kind}\), which mixes channels\)"):
        shrink(model, example)
    sparsifier = Sparsifier(Between(layer()), "filter", coupled=True, example_input=example)
    assert set(sparsifier.masks) == {"conv.weight", "hidden.weight"}


class Unknown(nn.Module):
    """A part with layers of its own, and a loop that torch-pruning cannot follow."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.weight = nn.Linear(6, 6), nn.Linear(6, 6), nn.Parameter(torch.randn(18, 6))

    def forward(self, x):
        x, state, outputs = F.relu(self.first(x)), x.new_zeros(len(x), 6), []
        for position in range(x.shape[1]):
            state = torch.gru_cell(x[:, position], state, self.weight, self.weight)
            outputs.append(state)
        return self.last(torch.stack(outputs, 1))


def test_layers_inside_a_part_that_cannot_be_followed_stay_with_a_reason():
    model = half_zero(Between(Unknown()), "conv", "layer.first", "hidden")
    assert removed(model, drawn(2, 3, 7)) == {"conv": 4, "layer.first": 0, "hidden": 4}
    whys = {layer.name: layer.why for layer in shrinkage(model, drawn(2, 3, 7)).layers}
    assert whys["layer.first"] == "3: inside layer (Unknown), which torch-pruning cannot follow"


@pytest.mark.parametrize("mask", [None, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])], ids=["all", "padded"])
def test_transformers_with_padding(mask):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder, self.out = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

        def forward(self, x, mask=None):
            return self.out(self.encoder(x, src_key_padding_mask=mask)[:, 0])

    layers = ["encoder.layers.0.linear1", "encoder.layers.1.linear1"]
    example = drawn(2, 5, 8) if mask is None else (drawn(2, 5, 8), mask)
    model = half_zero(Encoder(), *layers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        assert removed(model, example) == dict.fromkeys(layers, 8)
        flops = SparsifyCallback(0.5).plan(model, 1, 4, example)
    assert torch.backends.mha.get_fastpath_enabled()
    assert flops is not None


# --- Strides ----------------------------------------------------------------------------------------------------------


class Moved(nn.Module):
    """Between two layers the channels are moved to the last axis, in one of several ways."""

    def __init__(self, move):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear, self.out, self.move = nn.Conv2d(3, 8, 1), nn.Linear(8, 6), nn.Linear(6, 3), move

    def forward(self, x):
        return self.out(F.relu(self.linear(self.move(F.relu(self.conv(x)))))).mean(1)


def last(x):
    return x.permute(0, 2, 3, 1)


WAYS = {
    "contiguous": lambda x: last(x).contiguous().view(len(x), -1, x.shape[1]),
    "clone": lambda x: last(x).clone(memory_format=torch.contiguous_format).view(len(x), -1, x.shape[1]),
    "scaled": lambda x: (last(x).contiguous() * 2).view(len(x), -1, x.shape[1]),
    "in place": lambda x: last(x).contiguous().mul_(2).view(len(x), -1, x.shape[1]),
    "relu": lambda x: F.relu(last(x).contiguous()).view(len(x), -1, x.shape[1]),
    "channels last": lambda x: last(x.contiguous(memory_format=torch.channels_last)).view(len(x), -1, x.shape[1]),
    "twice": lambda x: last(last(x).contiguous().permute(0, 3, 1, 2).sigmoid() * x).reshape(len(x), -1, x.shape[1]),
    "movedim": lambda x: torch.movedim(x, 1, -1).contiguous().view(len(x), -1, x.shape[1]),
    "transpose": lambda x: x.flatten(2).transpose(1, 2).contiguous().view(len(x), -1, x.shape[1]),
}


@pytest.mark.parametrize("side", [8, 6], ids=["as many positions as channels", "fewer"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_strides_are_those_of_the_model(way, side):
    model = half_zero(Moved(way), "conv", "linear")
    assert removed(model, drawn(2, 3, side, side)) == {"conv": 4, "linear": 3}


def test_a_model_in_channels_last_memory():
    model = half_zero(Moved(lambda x: last(x).view(len(x), -1, x.shape[1])), "conv")
    model = model.to(memory_format=torch.channels_last)
    assert removed(model, drawn(2, 3, 6, 6).to(memory_format=torch.channels_last)) == {"conv": 4}


# --- Integers and bools -----------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A function between two layers that also reads a bool per position, which does not depend on the input."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out, self.function = nn.Linear(8, 8), nn.Linear(8, 3), function
        self.register_buffer("mask", torch.tensor([False, True, False, True])[:, None])

    def forward(self, x):
        return self.out(self.function(F.relu(self.hidden(x)), self.mask))


def written(x, mask):
    x = x.clone()
    x[mask[:, 0]] = 0.0
    return x


USES = {
    "masked_fill": lambda x, mask: x.masked_fill(mask, 0.0),
    "where": lambda x, mask: torch.where(mask, 0.0, x),
    "product": lambda x, mask: x * mask,
    "integers": lambda x, mask: x * torch.arange(x.shape[-2])[:, None],
    "floats of integers": lambda x, mask: x * torch.arange(x.shape[-2])[:, None].float(),
    "index": lambda x, mask: x[..., torch.arange(3), :],
    "index_select": lambda x, mask: x.index_select(-2, torch.arange(3)),
    "written": written,
    "like": lambda x, mask: x * torch.ones_like(x, dtype=torch.int32),
    "tril": lambda x, mask: x * torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()[:, :1],
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_integers_and_bools_that_do_not_depend_on_the_input(use):
    assert removed(half_zero(Masked(use), "hidden"), drawn(4, 8)) == {"hidden": 4}


@pytest.mark.parametrize("length", [8, 9, 12])
@pytest.mark.parametrize("kind", ["T5EncoderModel", "T5Model"])
def test_relative_positions(kind, length):
    transformers = pytest.importorskip("transformers", reason="its model is the test")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
        relative_attention_num_buckets=16,
    )  # fmt: skip
    ids = torch.randint(16, (2, length))
    model = getattr(transformers, kind)(config)
    example = {"input_ids": ids} if kind == "T5EncoderModel" else {"input_ids": ids, "decoder_input_ids": ids}
    half_zero(model, "encoder.block.0.layer.1.DenseReluDense.wi")
    assert shrinkage(model, example).removed == 8


# --- Tensors made under inference_mode --------------------------------------------------------------------------------


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


@torch.inference_mode()
def made_under_inference_mode():
    return drawn(2, 3, 8, 8)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"input": x}], ids=["one", "tuple", "keyword"])
def test_examples_made_under_inference_mode(wrap):
    example = wrap(made_under_inference_mode())
    model = convolutions()
    Sparsifier(model, "filter", coupled=True, example_input=example).sparsify(0.5)
    assert shrinkage(model.eval(), example).removed == 4
    assert SparsifyCallback(0.5, "filter", coupled=True).plan(model, 1, 4, example).selected.left


def test_shrinking_inside_of_inference_mode_gives_a_model_that_trains():
    model = half_zero(convolutions(), "0")
    with torch.inference_mode():
        small = shrink(model, drawn(2, 3, 8, 8))
        assert set(Sparsifier(model, "filter", coupled=True, example_input=drawn(2, 3, 8, 8)).masks) == {"0.weight"}
    assert small[0].out_channels == 4
    small.train()(drawn(2, 3, 8, 8)).sum().backward()
    assert small[3].weight.grad.any()
