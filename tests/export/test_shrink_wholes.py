"""`shrink` removes residual blocks and experts that are zero, before heads, neurons and filters."""

import warnings

import pytest
import torch
from torch import nn

from sparsifai import Sparsifier, shrink, shrinkage

pytest.importorskip("torch_pruning", reason="shrink needs it for filters")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.outer(self.inner(x).relu())


class Mixture(nn.Module):
    """Each token goes to expert 0 or 1 by the sign of its first number; never to expert 2."""

    def __init__(self):
        super().__init__()
        self.router, self.top_k = nn.Linear(8, 3), 1
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        with torch.no_grad():
            self.router.weight.zero_()[:2, 0] = torch.tensor([1.0, -1.0])
            self.router.bias.zero_()[2] = -9

    def forward(self, x):
        chosen, output = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            output[chosen == number] = expert(x[chosen == number])
        return output


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def zero(module):
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def test_blocks_are_removed_with_filters():
    model = nn.Sequential(nn.Linear(4, 8), *(Block() for _ in range(4)), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    model.train()
    sparsifier = Sparsifier(model, "block", example_input=X)
    sparsifier.sparsify(0.5)
    zero_filters = model[5].weight[:3], model[5].bias[:3]
    with torch.no_grad():
        for each in zero_filters:
            each.zero_()
    small, table = shrink(model, X), shrinkage(model, X)
    assert [type(module).__name__ for module in small] == ["Linear", "Block", "Block", "Linear", "ReLU", "Linear"]
    assert small[3].out_features == 3
    assert all(module.training for module in small.modules())
    assert (small(X) - model(X)).abs().max() <= 1e-5
    (row,) = (row for row in table.groups if row.what == "block")
    assert (row.count, row.zeros, row.removed, row.why) == (4, 2, 2, "")
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, small)]
    assert [table.parameters, table.parameters_left] == sizes
    assert not {parameter.data_ptr() for parameter in small.parameters()} & {
        parameter.data_ptr() for parameter in model.parameters()
    }


def test_lists_without_zero_blocks_are_counted_too():
    model = nn.ModuleList([nn.Sequential(*(Block() for _ in range(depth))) for depth in (3, 2)])
    model = nn.Sequential(nn.Linear(4, 8), *model, nn.Linear(8, 2)).eval()
    zero(model[1][1])
    rows = shrinkage(model, X).groups
    assert [(row.count, row.zeros, row.removed) for row in rows if row.what == "block"] == [(3, 1, 1), (2, 0, 0)]


def test_layers_behind_removed_blocks_keep_their_types():
    class InFloat(nn.Module):
        def forward(self, x):
            return x.float()

    blocks = [Block().double() for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Linear(8, 8).double(), InFloat(), nn.Linear(8, 2)).eval()
    zero(blocks[0])
    zero(blocks[2])
    small = shrink(model, torch.randn(3, 8).double())
    assert [module.weight.dtype for module in (small[1], small[3])] == [torch.float64, torch.float32]


def test_experts_that_are_chosen_are_told():
    model = nn.Sequential(nn.Linear(4, 8), Mixture(), nn.Linear(8, 2)).eval()
    zero(model[1].experts[2])
    assert len(shrink(model, X)[1].experts) == 2
    zero(model[1].experts[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small = shrink(model, X)
    assert len(small[1].experts) == 2
    messages = [str(each.message) for each in caught]
    assert any(
        message.startswith("shrink: 1 of 2 zero experts cannot be removed: 1 (") and "tokens of the example" in message
        for message in messages
    )
    assert not any("zero filters" in message for message in messages)
    assert sum(row.zeros_left for row in shrinkage(model, X).layers) == 0


def test_nothing_to_remove_is_told():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    Sparsifier(model, "column", "local", layers="0").sparsify(0.5)
    with pytest.warns(UserWarning, match=r"nothing is removed, because no whole filter, head.* is zero. Prune with"):
        assert shrink(model, X)[0].out_features == 8


def test_a_smaller_transformer_is_saved_and_loaded(tmp_path):
    transformers = pytest.importorskip("transformers", reason="its models")
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=100,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    example = {"input_ids": torch.randint(3, 100, (2, 9))}
    Sparsifier(model, "block", criteria="random", example_input=example).sparsify(0.5)
    Sparsifier(model, "neuron", "local", layers=nn.Linear, criteria="random").sparsify(0.75)
    small = shrink(model, example)
    assert (small.config.num_hidden_layers, len(small.model.layers)) == (2, 2)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(**example).logits
        assert (loaded(**example).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    prompt = example["input_ids"]
    assert torch.equal(small.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))
