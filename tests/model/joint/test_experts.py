"""Experts of mixtures as groups: which are found, how they are pruned, and models without them."""

import numpy as np
import pytest
import torch
from conftest import dense_of, follower_masks, misses_sparsity
from torch import nn

from sparsifai import Sparsifier, register_layer
from sparsifai.model.joint.experts import choosing_tokens, find_experts
from sparsifai.model.joint.removal import removable_groups

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}  # fmt: skip
# Class -> further options of its config, and the name under which that keeps the number of experts.
MIXTURES = {
    "Mixtral": ({"num_local_experts": 4}, "num_local_experts"),
    "Qwen2Moe": ({"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48}, "num_experts"),
    "Qwen3Moe": ({"num_experts": 4, "moe_intermediate_size": 48}, "num_experts"),
    "GptOss": ({"num_local_experts": 4, "head_dim": 8}, "num_local_experts"),
    "DeepseekV3": ({"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
                    "num_key_value_heads": 4,
                    "first_k_dense_replace": 0, "moe_intermediate_size": 48}, "n_routed_experts"),
    "Olmoe": ({"num_experts": 4}, "num_experts"),
    "JetMoe": ({"num_local_experts": 4, "kv_channels": 8}, "num_local_experts"),
}  # fmt: skip
IDS = {"input_ids": torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))}


def of_transformers(name):
    transformers = pytest.importorskip("transformers", reason="its mixtures of experts")
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MIXTURES[name][0]})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if not find_experts(model):
        pytest.skip("this transformers has experts of another form")
    return model


def switch():
    transformers = pytest.importorskip("transformers", reason="its mixtures of experts")
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_experts=4,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


class Listed(nn.Module):
    """A mixture of experts in a list, of which each token chooses one; tokens go to expert 0 or 1 by their sign."""

    def __init__(self, count=3, width=4):
        super().__init__()
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, width)) for _ in range(count)
        )
        self.num_experts, self.top_k = count, 1
        with torch.no_grad():
            self.router.weight.zero_()[:2, 0] = torch.tensor([1.0, -1.0])
            self.router.bias.zero_()[2:] = -9

    def forward(self, x):
        chosen, output = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            output[chosen == number] = expert(x[chosen == number])
        return output


X = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))


def zero_experts(model):
    return {groups.name: np.flatnonzero(removable_groups(model, groups)).tolist() for groups in find_experts(model)}


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_pruned_as_a_whole(name):
    model = of_transformers(name)
    sparsifier = Sparsifier(model, "expert", "local", "random")
    sparsifier.sparsify(0.5)
    found, zero = find_experts(model), zero_experts(model)
    assert len(found) == (4 if name == "JetMoe" else 2)
    for groups in found:
        assert (groups.count, len(zero[groups.name])) == (4, 2)
        for part in groups.parts_in("weight", "table"):
            entries = (model.get_parameter(part.name) if "bias" not in part.name else torch.ones(4)) != 0
            is_kept = entries.movedim(part.axis, 0).flatten(1).any(1) if entries.dim() > 1 else entries
            # The router is left alone, also what it has for experts that are zero.
            expected = zero[groups.name] if part.role == "weight" else []
            assert (~is_kept).nonzero().flatten().tolist() == expected
    others = {each for each in dense_of(sparsifier) if "self_attn" in each}
    assert all(dense_of(sparsifier)[each] == "belongs to no expert" for each in others)


def test_the_biases_of_an_expert_are_pruned_with_it():
    model = of_transformers("GptOss")
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            nn.init.normal_(parameter)
    sparsifier = Sparsifier(model, "expert", "local", "random")
    sparsifier.sparsify(0.25)
    for name, (number,) in zero_experts(model).items():
        for each in ("gate_up_proj_bias", "down_proj_bias"):
            is_zero = ~model.get_parameter(f"{name}.experts.{each}").any(1)
            assert is_zero.nonzero().flatten().tolist() == [number]
    listed = nn.Sequential(Listed(), nn.Linear(4, 2))
    sparsifier = Sparsifier(listed, "expert", criteria="random")
    sparsifier.sparsify(0.34)
    ((number,),) = zero_experts(listed).values()
    assert [name for name, mask in follower_masks(sparsifier).items() if not mask.any()] == [
        f"0.experts.{number}.{layer}.bias" for layer in (0, 2)
    ]


def test_the_experts_of_the_lowest_mean_go():
    model = nn.Sequential(Listed(4), Listed(4))
    means = [
        (torch.cat([expert[0].weight.flatten(), expert[2].weight.flatten()]).abs().mean().item(), place, number)
        for place, mixture in enumerate(model)
        for number, expert in enumerate(mixture.experts)
    ]
    Sparsifier(model, "expert").sparsify(0.375)
    lowest = sorted(means)[:3]
    assert zero_experts(model) == {
        str(place): sorted(number for _, where, number in lowest if where == place) for place in (0, 1)
    }


@misses_sparsity
def test_one_expert_of_each_mixture_stays():
    model = nn.Sequential(Listed(), Listed())
    Sparsifier(model, "expert").sparsify(1.0)
    assert [len(numbers) for numbers in zero_experts(model).values()] == [2, 2]


def test_tokens_that_choose_an_expert_are_counted():
    model = Listed()
    (tokens,) = choosing_tokens(model, find_experts(model), X)
    positive = int((X[:, 0] > 0).sum())
    assert tokens.tolist() == [positive, 7 - positive, 0]
    (tokens, _) = choosing_tokens(mixtral := of_transformers("Mixtral"), find_experts(mixtral), IDS)
    logits = mixtral(**IDS, output_router_logits=True).router_logits[0]
    assert tokens.tolist() == torch.bincount(logits.topk(2).indices.flatten(), minlength=4).tolist()


def test_stacked_experts_of_ones_own():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, 4))

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(4, 3), Stack()

    with pytest.raises(ValueError, match="no experts are found in Mixture; a mixture is a module with experts and"):
        Sparsifier(Mixture(), "expert")
    register_layer(Stack, weight=("expert", "out", "in"))
    model = Mixture()
    Sparsifier(model, "expert").sparsify(0.34)
    assert list(map(len, zero_experts(model).values())) == [1]


def test_a_mixture_of_transformers_in_a_dictionary():
    model = switch()
    Sparsifier(model, "expert", "local").sparsify(0.5)
    assert list(map(len, zero_experts(model).values())) == [2, 2]
