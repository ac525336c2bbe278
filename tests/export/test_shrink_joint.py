"""`shrink` removes attention heads and neurons: the outputs stay, and nothing that is zero does."""

import copy
import pickle
import re
import sys
import warnings
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from joint_models import MODELS, encoder, model_and_batch, output_of
from torch import nn

from sparsifai import Sparsifier, compare, register_attention, shrink, shrinkage


def same(model, small, batch):
    """Whether two models have the same outputs, within 1e-5 of the largest."""
    expected, got = output_of(model, batch), output_of(small, batch)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    return True


def pruned(name, *kinds, sparsity=0.5):
    """A model with half of the heads and neurons of each layer pruned, and a batch for it."""
    model, batch = model_and_batch(name)
    for kind in kinds or ("head", "neuron") if name != "cross attention" else ("head",):
        Sparsifier(model, kind, "local", "random", seed=1).sparsify(sparsity)
    return model, batch


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def columns(module):
    """Zero columns of all matrices of a model, by name, of embeddings apart."""
    return {
        name: int((~each.weight.any(0)).sum()) for name, each in module.named_modules() if isinstance(each, nn.Linear)
    }


@contextmanager
def warned(*messages):
    """Check that there is a warning with each message, beside those of filters that are left."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message in messages:
        assert any(re.search(message, str(each.message)) for each in caught), [str(each.message) for each in caught]


# --- Architectures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_neurons_are_removed_and_the_outputs_stay(name):
    model, batch = pruned(name)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="shrink: 1000 of ")  # the head of torchvision's ViT begins as 0
        small, table = shrink(model, batch), shrinkage(model, batch)
    assert same(model, small, batch)
    assert all(2 * row.removed == 2 * row.zeros == row.count for row in table.groups), table
    assert {row.what for row in table.groups} == ({"head"} if name == "cross attention" else {"head", "neuron"})
    assert parameters(model) - parameters(small) == MODELS[name][1] == table.parameters - table.parameters_left
    assert not any(count for layer, count in columns(small).items() if layer != "heads.head")
    assert all(torch.equal(value, before[each]) for each, value in model.state_dict().items())
    addresses = {value.data_ptr() for value in model.parameters()}
    assert not addresses & {value.data_ptr() for value in small.parameters()}
    again = pickle.loads(pickle.dumps(small))
    assert same(small, again, batch)
    small.train()
    output = output_of.__wrapped__(small, batch)
    output.sum().backward()


@pytest.mark.parametrize("name", ["llama", "gpt2", "encoder", "swin of torchvision"])
def test_what_is_smaller_can_be_pruned_and_shrunk_again(name):
    model, batch = pruned(name, "head")
    small = shrink(model, batch)
    Sparsifier(small, "neuron", "local", "random").sparsify(0.5)
    if name == "encoder":
        Sparsifier(small, "head", "local", "random").sparsify(0.5)
    smaller = shrink(small, batch)
    assert same(small, smaller, batch)
    assert parameters(smaller) < parameters(small)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "phi3", "mixtral"])
def test_generating_with_the_cache(name):
    model, batch = pruned(name)
    small = shrink(model, batch)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "decoder_start_token_id": 0}
    options = options if name == "t5" else {key: value for key, value in options.items() if "start" not in key}
    expected = model.generate(batch["input_ids"], use_cache=True, **options)
    for cache in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(small.generate(batch["input_ids"], **cache, **options), expected), cache


def test_half_precision_stays():
    model, batch = pruned("llama")
    small = shrink(model.bfloat16(), batch)
    assert {value.dtype for value in small.parameters()} == {torch.bfloat16}
    assert parameters(model) - parameters(small) == MODELS["llama"][1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_goes_through_a_smaller_encoder():
    """In evaluation mode torch hands its layers nested tensors, unless the fast path is off."""
    model, batch = pruned("encoder")
    small = shrink(model, batch)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    with torch.no_grad():
        expected, got = model(batch, src_key_padding_mask=padding), small(batch, src_key_padding_mask=padding)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1, :6], expected[1, :6], rtol=0, atol=1e-5)


def test_pictures_of_other_sizes_go_through_a_smaller_swin():
    model, batch = pruned("swin of torchvision")
    small = shrink(model, batch)
    assert same(model, small, torch.randn(1, 3, 41, 50))


# --- Random attentions ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention of any number of heads, head size and queries for each key, fused or not."""

    def __init__(self, width, groups, queries, size, bias, fused):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = groups * queries, groups, size
        sizes = [groups * queries * size, groups * size, groups * size]
        if fused:
            self.qkv = nn.Linear(width, sum(sizes), bias)
        else:
            self.q, self.k, self.v = (nn.Linear(width, each, bias) for each in sizes)
        self.out = nn.Linear(sizes[0], width)
        self.fused = fused

    def forward(self, x):
        keys = self.num_kv_heads * self.head_dim
        sizes = self.num_heads * self.head_dim, keys, keys
        projected = self.qkv(x).split(sizes, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        query, key, value = (each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in projected)
        queries = self.num_heads // self.num_kv_heads
        key, value = key.repeat_interleave(queries, 1), value.repeat_interleave(queries, 1)
        return self.out(((query @ key.mT).softmax(-1) @ value).transpose(1, 2).flatten(2))


class FusedAttention(Attention):
    pass


register_attention(Attention, query="q", key="k", value="v", output="out")
register_attention(FusedAttention, query="qkv", key="qkv", value="qkv", output="out")


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 4), queries=st.integers(1, 3), size=st.integers(1, 5), bias=st.booleans(),
    fused=st.booleans(), data=st.data(), seed=st.integers(0, 99),
)  # fmt: skip
def test_random_attentions(groups, queries, size, bias, fused, data, seed):
    pytest.importorskip("torch_pruning", reason="where no head is removed, shrink looks for filters with it")
    torch.manual_seed(seed)
    layers = [(FusedAttention if fused else Attention)(6, groups, queries, size, bias, fused) for _ in range(2)]
    model = nn.Sequential(*layers).eval()
    count = queries if groups == 1 and queries > 1 else groups  # query heads that share a key go alone
    zeros = [data.draw(st.sets(st.integers(0, count - 1))) for _ in layers]
    width = queries * groups * size // count
    with torch.no_grad():
        for layer, numbers in zip(layers, zeros, strict=True):
            for number in numbers:
                layer.out.weight[:, number * width : (number + 1) * width] = 0
    example = torch.randn(2, 4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small, table = shrink(model, example), shrinkage(model, example)
    assert same(model, small, example)
    for layer, numbers, row in zip(small, zeros, table.groups, strict=True):
        assert (row.count, row.zeros, row.removed) == (count, len(numbers), min(len(numbers), count - 1))
        assert layer.out.in_features == (count - row.removed) * width
        assert layer.num_heads == layer.out.in_features // size
        assert row.why == ("last head" if len(numbers) == count else "")


# --- What cannot be removed -------------------------------------------------------------------------------------------


def test_attentions_of_torch_that_share_a_weight_get_smaller_together():
    model, batch = encoder(batch_first=True)
    first, second = (layer.self_attn for layer in model.layers)
    second.in_proj_weight = first.in_proj_weight
    Sparsifier(model.eval(), "head").sparsify(0.5)
    small = shrink(model, batch)
    assert same(model, small, batch)
    assert [layer.self_attn.num_heads for layer in small.layers] == [2, 2]
    assert small.layers[0].self_attn.in_proj_weight is small.layers[1].self_attn.in_proj_weight


def test_one_head_and_one_neuron_of_a_module_are_kept():
    model, batch = model_and_batch("bert")
    with torch.no_grad():
        layer = model.encoder.layer[0]
        layer.attention.output.dense.weight.zero_()
        layer.output.dense.weight.zero_()
    with warned(
        r"1 of 4 zero heads cannot be removed: encoder.layer.0.attention \(last head\)", "1 of 96 zero neurons"
    ):
        small = shrink(model, batch)
    assert same(model, small, batch)
    assert small.encoder.layer[0].attention.self.query.out_features == 16
    assert small.encoder.layer[0].intermediate.dense.out_features == 1


def test_heads_with_alibi_are_kept_by_name():
    pytest.importorskip("transformers", reason="bloom is one of its models")
    from joint_models import text

    model, batch = text("BloomForCausalLM", "BloomConfig", hidden_size=64, n_layer=2, n_head=4, vocab_size=100)
    Sparsifier(model.eval(), "head", "local", "random").sparsify(0.5)
    Sparsifier(model, "neuron", "local", "random").sparsify(0.5)
    with warned("4 of 4 zero heads cannot be removed.*slopes of alibi"):
        small = shrink(model, batch)
    assert same(model, small, batch)
    assert parameters(model) - parameters(small) == 2 * 128 * 129


def test_stacked_experts_keep_a_width_that_grouped_products_can_read():
    pytest.importorskip("transformers", reason="mixtral is one of its models")
    model, batch = pruned("mixtral", "neuron", sparsity=0.45)
    with warned("stacked experts need widths that are multiples of 8; prune with round_to=8"):
        small = shrink(model, batch)
    assert same(model, small, batch)
    assert small.model.layers[0].mlp.experts.down_proj.shape == (4, 64, 56)


class FixedWidth(Attention):
    """Its forward takes the number of heads for what it was at first."""

    def forward(self, x):
        query, key, value = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in (self.q(x), self.k(x), self.v(x)))
        return self.out(((query @ key.mT).softmax(-1) @ value).transpose(1, 2).reshape(*x.shape[:2], 16))


def test_modules_that_fail_are_kept_by_name_and_the_others_are_removed():
    torch.manual_seed(0)
    kinds = [Attention, FixedWidth, Attention, Attention, FixedWidth]
    model = nn.Sequential(*[kind(16, 4, 1, 4, True, False) for kind in kinds]).eval()
    Sparsifier(model, "head", "local", "random").sparsify(0.5)
    example = torch.randn(2, 5, 16)
    with warned(r"4 of 10 zero heads cannot be removed: 1 \(.*fails without it.*; 4 \("):
        small = shrink(model, example)
    assert same(model, small, example)
    assert [layer.num_heads for layer in small] == [2, 4, 2, 2, 4]


def test_the_search_for_modules_that_fail_is_bounded():
    torch.manual_seed(0)
    kinds = [FixedWidth] * 40 + [Attention] * 2
    model = nn.Sequential(*[kind(16, 4, 1, 4, True, False) for kind in kinds]).eval()
    with torch.no_grad():
        for layer in model:
            layer.out.weight[:, :8] = 0
    example = torch.randn(1, 2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = shrinkage(model, example)
    assert [row.removed for row in table.groups] == [0] * 40 + [2] * 2
    assert any(row.why.startswith("not tried: 32 trials") for row in table.groups)


def test_heads_are_removed_without_torch_pruning(monkeypatch):
    model, batch = pruned("encoder")
    with torch.no_grad():
        model.layers[0].linear2.weight[3] = 0
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with warned("filters were not looked for, because torch-pruning finds which channels"):
        small = shrink(model, batch)
    assert same(model, small, batch)
    assert parameters(model) - parameters(small) == MODELS["encoder"][1]


class Undecided(nn.Module):
    """Attention, and a choice by the values of the input, which NaN cannot make."""

    def __init__(self):
        super().__init__()
        self.attention, self.first, self.last = Attention(16, 4, 1, 4, True, False), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.first(self.attention(x)) * (1 + 0 * int(x.max())))


def test_heads_are_removed_where_filters_cannot_be_looked_for():
    pytest.importorskip("torch_pruning", reason="it raises the error that is told")
    torch.manual_seed(0)
    model, example = Undecided().eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        model.first.weight[3] = 0
    with pytest.raises(ValueError, match="cannot find the constant channels"):
        shrink(model, example)
    Sparsifier(model, "head", "local", "random").sparsify(0.5)
    with warned("filters were not looked for, because cannot find the constant"):
        small = shrink(model, example)
    assert same(model, small, example)
    assert small.attention.num_heads == 2
    assert "filters were not looked for" in str(shrinkage(model, example))


# --- The table, compare and Learner -----------------------------------------------------------------------------------


def test_the_table_has_rows_for_heads_and_neurons():
    model, batch = pruned("encoder")
    table = shrinkage(model, batch)
    lines = str(table).splitlines()
    row = next(line.split() for line in lines if line.startswith("layers.0.self_attn "))
    assert row == ["layers.0.self_attn", "MultiheadAttention", "head", "4", "2", "2", "0"]
    assert ["all", "heads", "8", "4", "4", "0"] in [line.split() for line in lines]
    assert ["all", "neurons", "192", "96", "96", "0"] in [line.split() for line in lines]
    first = next(layer for layer in table.layers if layer.name == "layers.0.linear1")
    assert (first.outputs, first.zeros, first.removed, first.zeros_left) == (96, 48, 48, 0)


def test_filters_and_heads_are_removed_together():
    model, batch = pruned("encoder", "head")
    with torch.no_grad():
        model.layers[0].linear1.weight[:5] = 0
        model.layers[0].linear1.bias[:5] = -1
    pytest.importorskip("torch_pruning", reason="filters are followed with it")
    small = shrink(model, batch)
    assert same(model, small, batch)
    assert small.layers[0].linear1.out_features == 91


def test_compare_has_a_shrunk_form():
    model, batch = pruned("encoder")
    dense, _ = model_and_batch("encoder")
    result = compare(dense, model, batch, repeats=3)
    form = next(form for form in result.forms if form.name == "shrunk")
    assert form.parameters == parameters(shrink(model, batch))
    assert form.flops < next(form for form in result.forms if form.name == "dense").flops


def test_a_learner_goes_on_with_the_smaller_model():
    pytest.importorskip("fastai", reason="a Learner is fastai's")
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    import sparsifai.all  # noqa: F401

    model, _ = pruned("encoder")
    pairs = [(torch.randn(9, 64), torch.randn(9, 64)) for _ in range(8)]
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)
    learn = Learner(DataLoaders(loader, loader), model, loss_func=nn.functional.mse_loss)
    table = learn.shrink(torch.randn(2, 9, 64))
    assert table.parameters - table.parameters_left == MODELS["encoder"][1]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert parameters(learn.model) == table.parameters_left
