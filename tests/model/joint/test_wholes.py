"""Blocks and experts that are zero are removed from a copy, if its outputs stay as they are."""

import copy

import pytest
import torch
from torch import nn

from sparsifai import Sparsifier
from sparsifai.model.joint.experts import find_experts
from sparsifai.model.joint.wholes import without_wholes

from .test_blocks import Block, Stem, made, size
from .test_blocks import X as EXAMPLE
from .test_experts import IDS, MIXTURES, Listed, of_transformers
from .test_experts import X as TOKENS


def zero(module):
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def counts(rows):
    return [(row.groups.what, row.groups.name, len(row.zeros), len(row.removed), row.why_kept) for row in rows]


@torch.no_grad()
def difference(model, other, example):
    expected = model(**example).logits
    return ((other(**example).logits - expected).abs().max() / expected.abs().max()).item()


def test_without_zeros_the_model_is_not_run():
    model = nn.Sequential(Stem(Block(), Block()), Listed(width=3))
    assert without_wholes(model, "no input") == (model, [])


def test_zero_blocks_of_several_lists_are_removed():
    model, example, _ = made("timm Swin")
    model.train()
    Sparsifier(model, "block", example_input=example).sparsify(0.6)
    before = copy.deepcopy(model.state_dict())
    small, rows = without_wholes(model, example)
    assert [row.groups.name for row in rows if row.removed] == [row.groups.name for row in rows]
    assert all(row.zeros == row.removed and row.groups.what == "block" for row in rows)
    assert size(small) < size(model)
    assert all(module.training for module in small.modules())
    model.eval(), small.eval()
    assert torch.allclose(small(example), model(example), atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_blocks_of_a_model_that_is_a_list():
    model = nn.Sequential(nn.Linear(4, 8), *(Block() for _ in range(3)), nn.Linear(8, 3)).eval()
    Sparsifier(model, "block", example_input=EXAMPLE).sparsify(0.67)
    small, rows = without_wholes(model, EXAMPLE)
    assert counts(rows) == [("block", "", 2, 2, "")]
    assert list(small._modules) == ["0", "1", "2"]
    assert torch.equal(small(EXAMPLE), model(EXAMPLE))


def test_a_list_of_which_the_model_reads_the_length_is_kept():
    class Deep(Stem):
        def forward(self, x):
            return super().forward(x) * len(self.blocks)

    model = nn.Sequential(
        Deep(*(Block() for _ in range(3))), nn.Linear(3, 4), Stem(*(Block() for _ in range(3)))
    ).eval()
    zero(model[0].blocks[1])
    zero(model[2].blocks[0])
    small, rows = without_wholes(model, EXAMPLE)
    why = "its removal would change the model's outputs"
    assert counts(rows) == [("block", "0.blocks", 1, 0, why), ("block", "2.blocks", 1, 1, "")]
    assert (len(small[0].blocks), len(small[2].blocks)) == (3, 2)
    assert torch.allclose(small(EXAMPLE), model(EXAMPLE))


def unused_expert(model, number):
    """Zero an expert of every mixture, and have the router never choose it, by what it adds to the scores."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for groups in find_experts(model):
        for part in groups.parts_in("weight", "follower"):
            tensors[part.name].data.select(part.axis, number).zero_()
        for part in groups.parts_in("table"):
            if tensors[part.name].dim() == 1:
                tensors[part.name].data[number] = -1e4


@pytest.mark.parametrize("name", ["GptOss", "DeepseekV3"])
def test_experts_that_no_token_chooses_are_removed(name, tmp_path):
    model = of_transformers(name)
    unused_expert(model, 1)
    small, rows = without_wholes(model, IDS)
    assert [(row.zeros, row.removed, row.why_kept) for row in rows] == [([1], [1], "")] * 2
    assert [each.count for each in find_experts(small)] == [3, 3]
    assert difference(model, small, IDS) <= 1e-5
    assert getattr(small.config, MIXTURES[name][1]) == 3
    assert getattr(model.config, MIXTURES[name][1]) == 4
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**IDS).logits, small(**IDS).logits)
    prompt, options = IDS["input_ids"][:1, :4], {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(small.generate(prompt, **options), model.generate(prompt, **options))


def test_experts_in_a_list_are_removed():
    model = Listed().eval()
    zero(model.experts[2])
    small, rows = without_wholes(model, TOKENS)
    assert counts(rows) == [("expert", "", 1, 1, "")]
    assert torch.equal(small(TOKENS), model(TOKENS))
    assert (small.router.out_features, small.num_experts, len(small.experts)) == (2, 2, 2)


def test_experts_that_tokens_choose_are_kept():
    model = Listed().eval()
    zero(model.experts[0])
    small, rows = without_wholes(model, TOKENS)
    ((_, _, zeros, removed, why),) = counts(rows)
    assert small is model
    assert (zeros, removed) == (1, 0)
    times = int((TOKENS[:, 0] > 0).sum())
    assert why.startswith(
        f"tokens of the example choose them {times} times, so without them the outputs would be others"
    )


def test_of_several_experts_those_go_that_no_token_chooses():
    model = Listed(4).eval()
    zero(model.experts[0]), zero(model.experts[3])
    small, (row,) = without_wholes(model, TOKENS)
    assert (row.zeros, row.removed, len(small.experts)) == ([0, 3], [3], 3)
    assert row.why_kept.startswith("tokens of the example choose them")
    assert torch.equal(small(TOKENS), model(TOKENS))


def test_too_few_experts_are_not_left():
    model = Listed().eval()
    model.top_k = 3
    zero(model.experts[2])
    ((*_, removed, why),) = counts(without_wholes(model, TOKENS)[1])
    assert removed == 0
    assert why.startswith("only 2 of 3 experts would be left, but its router chooses 3 for each token")


def test_experts_are_kept_where_the_others_would_get_other_weights():
    class Soft(Listed):
        def forward(self, x):
            return super().forward(x) * self.router(x).softmax(-1).amax(-1, keepdim=True)

    model = Soft().eval()
    nn.init.zeros_(model.router.bias)
    zero(model.experts[2])
    small, (row,) = without_wholes(model, TOKENS)
    assert small is model
    assert row.why_kept == "its removal would change the model's outputs"


def test_blocks_go_with_their_experts():
    model = of_transformers("GptOss")
    unused_expert(model, 3)
    zero(model.model.layers[0].mlp.experts)
    for name in ("q", "k", "v", "o"):
        zero(getattr(model.model.layers[0].self_attn, f"{name}_proj"))
    small, rows = without_wholes(model, IDS)
    assert counts(rows) == [("block", "model.layers", 1, 1, ""), ("expert", "model.layers.1.mlp", 1, 1, "")]
    assert len(small.model.layers) == small.config.num_hidden_layers == 1
    assert small.model.layers[0].mlp.experts.num_experts == 3
    assert difference(model, small, IDS) <= 1e-5
