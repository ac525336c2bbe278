"""Layers of several matrices side by side: an axis 'expert' is ranked like the groups of a grouped convolution."""

import pytest
import torch
from conftest import misses_sparsity
from torch import nn

from sparsifai import Sparsifier, register_layer
from sparsifai.model.layers import find_weights

EXPERTS, OUT, IN = 3, 4, 6


class Experts(nn.Module):
    """Every expert is a Linear of 6 inputs and 4 outputs."""

    def __init__(self, *order):
        super().__init__()
        sizes = {"expert": EXPERTS, "out": OUT, "in": IN}
        self.weight = nn.Parameter(torch.randn([sizes[axis] for axis in order]))
        self.weight_bias = nn.Parameter(torch.ones(EXPERTS, OUT))

    def forward(self, x):
        return x


class Transposed(Experts):
    def __init__(self):
        super().__init__("expert", "in", "out")


class Plain(Experts):
    def __init__(self):
        super().__init__("expert", "out", "in")


register_layer(Transposed, weight=("expert", "in", "out"))
register_layer(Plain, weight=("expert", "out", "in"))


@pytest.fixture(params=[Plain, Transposed])
def experts(request):
    return request.param()


def by_expert(experts, tensor):
    """A tensor over the weights as (expert, out, in)."""
    tensor = tensor.expand_as(experts.weight)
    return tensor if isinstance(experts, Plain) else tensor.transpose(1, 2)


@pytest.mark.parametrize(
    ("granularity", "groups"),
    [("weight", EXPERTS * OUT * IN), ("filter", EXPERTS * OUT), ("row", EXPERTS * OUT), ("channel", EXPERTS * IN),
     ("2x3", EXPERTS * 2 * 2), (("expert",), EXPERTS), ("layer", 1), (("expert", "out"), EXPERTS * OUT)],
)  # fmt: skip
def test_groups_belong_to_one_expert(experts, granularity, groups):
    grouping = Sparsifier(nn.Sequential(experts), granularity, layers="0").layers["0.weight"].grouping
    numbers = torch.arange(experts.weight.numel()).view_as(experts.weight)
    assert len(grouping.all_kept()) == groups
    for number in range(groups):
        kept = grouping.all_kept()
        kept[number] = False
        mask = grouping.spread(kept)
        assert torch.equal(grouping.gather(mask), kept)
        pruned = numbers[~mask.expand_as(numbers)]
        assert set(pruned.tolist()) == set(grouping.members(numbers.float())[number].long().tolist())
        experts_of_group = (~by_expert(experts, mask)).flatten(1).any(1).sum()
        assert experts_of_group == (EXPERTS if granularity == "layer" else 1)


def test_per_output_prunes_the_same_of_every_output_of_every_expert(experts):
    Sparsifier(nn.Sequential(experts), context="per_output").sparsify(0.5)
    assert ((by_expert(experts, experts.weight) == 0).sum(2) == IN // 2).all()


def test_blocks_run_within_an_expert(experts):
    Sparsifier(nn.Sequential(experts), context="1:2").sparsify(0.5)
    assert ((by_expert(experts, experts.weight) == 0).unflatten(2, (-1, 2)).sum(3) == 1).all()


def test_erk_takes_the_shape_of_one_expert(experts):
    model = nn.Sequential(experts, nn.Linear(20, 20))
    Sparsifier(model, context="erk").sparsify(0.5)
    densities = [(layer.weight != 0).float().mean().item() for layer in model]
    # (4 + 6) / 24 and (20 + 20) / 400, times a factor; the first would be above 1, so that layer stays dense.
    assert densities == pytest.approx([1.0, (0.5 * 472 - 72) / 400], abs=0.01)


def test_a_pruned_output_takes_the_bias_of_its_expert_with_it(experts):
    Sparsifier(nn.Sequential(experts), "filter", layers="0").sparsify(0.5)
    dead = (by_expert(experts, experts.weight) == 0).all(2)
    assert dead.sum() == EXPERTS * OUT // 2
    assert torch.equal(experts.weight_bias == 0, dead)


@misses_sparsity
def test_whole_experts_can_be_pruned(experts):
    Sparsifier(nn.Sequential(experts), ("expert",), layers="0").sparsify(0.34)
    assert (by_expert(experts, experts.weight) == 0).flatten(1).all(1).sum() == 1


def test_the_inputs_of_each_expert_are_not_seen(experts):
    sparsifier = Sparsifier(nn.Sequential(experts), criteria="wanda")
    with pytest.raises(ValueError, match="every expert of 0.weight has inputs of its own.*exclude="):
        sparsifier.calibrate([torch.randn(4, IN)])


# --- transformers -----------------------------------------------------------------------------------------------------


def mixture(name, **options):
    transformers = pytest.importorskip("transformers", reason="its mixtures of experts")
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts": 4}
    sizes |= {"num_experts_per_tok": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


# Model -> the axes of its gate and up projections, and of its down projections.
MIXTURES = {
    "Mixtral": ("expert", "out", "in"),
    "Qwen3Moe": ("expert", "out", "in"),
    "GptOss": ("expert", "in", "out"),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_experts_of_transformers_are_pruned(name):
    model = mixture(name, **({"moe_intermediate_size": 48} if name == "Qwen3Moe" else {}))
    weights = find_weights(model)
    experts = {each: weight for each, weight in weights.items() if each.rpartition(".")[2].endswith("_proj")}
    assert len(experts) == 4
    for each, weight in experts.items():
        assert tuple(weight.axes) == MIXTURES[name]
        inputs = 48 if "down_proj" in each else 32
        assert (weight.axes["expert"], weight.axes["in"]) == (4, inputs)
    sparsifier = Sparsifier(model, context="per_output")
    sparsifier.sparsify(0.5)
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    assert zeros > 0.45 * sum(parameter.numel() for parameter in model.parameters())
    model(torch.arange(8).view(1, 8))
