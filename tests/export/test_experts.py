"""`remove_experts` removes experts that are zero, whether the router chooses them or not."""

import pytest
import torch
from torch import nn

from sparsifai import Sparsifier, remove_experts

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def mixtral():
    transformers = pytest.importorskip("transformers", reason="its mixtures of experts")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    if not hasattr(model.model.layers[0], "mlp") or not hasattr(model.model.layers[0].mlp.experts, "gate_up_proj"):
        pytest.skip("this transformers has experts of another form")
    return model


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def test_the_router_chooses_among_the_experts_that_are_left(tmp_path):
    model = mixtral()
    Sparsifier(model, "expert", "local").sparsify(0.5)
    small = remove_experts(model)
    assert size(model) - size(small) == 2 * 2 * (3 * 32 * 48 + 32)
    assert (small.config.num_local_experts, small.num_experts, model.config.num_local_experts) == (2, 2, 4)
    # As if the router of the larger model never chose the experts that are zero.
    for layer in model.model.layers:
        zero = ~layer.mlp.experts.down_proj.flatten(1).any(1)

        def banned(router, inputs, output, zero=zero):
            logits = output[0].masked_fill(zero, -torch.inf)
            values, numbers = logits.softmax(-1).topk(2)
            return logits, values / values.sum(-1, keepdim=True), numbers

        layer.mlp.gate.register_forward_hook(banned)
    expected = model(IDS).logits
    assert (small(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    small.save_pretrained(tmp_path)
    assert torch.equal(type(small).from_pretrained(tmp_path).eval()(IDS).logits, small(IDS).logits)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(small.generate(IDS[:, :4], **options), small.generate(IDS[:, :4], use_cache=False, **options))


def test_layers_may_keep_different_numbers():
    model = mixtral()
    for parameter in (model.model.layers[1].mlp.experts.gate_up_proj, model.model.layers[1].mlp.experts.down_proj):
        parameter.data[3] = 0
    small = remove_experts(model)
    assert [layer.mlp.experts.num_experts for layer in small.model.layers] == [4, 3]
    assert [layer.mlp.gate.weight.shape[0] for layer in small.model.layers] == [4, 3]
    assert small.config.num_local_experts == 4
    small(IDS).logits.sum().backward()


def test_mistakes():
    with pytest.raises(TypeError, match="remove_experts"):
        remove_experts(3)
    with pytest.raises(ValueError, match="Linear has no experts that are zero, nor any mixture of experts; prune it"):
        remove_experts(nn.Linear(2, 2))
    model = mixtral()
    with pytest.raises(ValueError, match="MixtralForCausalLM has no experts that are zero; prune it with"):
        remove_experts(model)
    Sparsifier(model, "expert", "local").sparsify(0.75)
    why = "model.layers.0.mlp: only 1 of 4 experts would be left, but its router chooses 2 for each token; prune fewer"
    with pytest.raises(ValueError, match=why):
        remove_experts(model)
    assert model.model.layers[0].mlp.experts.num_experts == 4


def test_experts_in_groups_of_which_the_router_chooses_some_are_kept():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.n_group = nn.Linear(4, 4), 2
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    model, why = Mixture(), "its router chooses among 2 groups of experts, which must be of one size"
    with pytest.raises(ValueError, match=why):
        Sparsifier(model, "expert")
    for parameter in model.experts[0].parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match=why):
        remove_experts(model)
