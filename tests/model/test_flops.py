import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsifai import Sparsifier
from sparsifai.gradual.plan import plan_of
from sparsifai.model.flops import all_flops, count_flops
from sparsifai.model.layers import find_weights
from sparsifai.model.running import without_fast_path


def flops_of(model, *inputs):
    return count_flops(model, find_weights(model), inputs)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), (1, 4, 7, 6)),
        (nn.Conv1d(4, 8, 3, dilation=2), (1, 4, 9)),
        (nn.Conv3d(2, 4, 2), (1, 2, 3, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 6)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 5, 6)),
        (nn.ConvTranspose1d(4, 2, 2), (1, 4, 5)),
        (nn.Linear(4, 3), (1, 7, 4)),
    ],
)
def test_flops_are_those_of_torch_where_it_counts(layer, shape):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.zeros(shape))
    assert flops_of(layer, torch.zeros(shape)) == {"weight": counter.get_total_flops()}


def test_flops_of_attention_by_hand():
    """2 keys and values, 3 queries: of the packed projections each reads its own input."""
    queries, keys = torch.zeros(1, 3, 8), torch.zeros(1, 2, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    assert flops_of(attention, queries, keys, keys) == {
        "in_proj_weight": 2 * 64 * (3 + 2 + 2),
        "out_proj.weight": 2 * 64 * 3,
    }
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)
    assert flops_of(attention, queries, torch.zeros(1, 2, 4), torch.zeros(1, 2, 6)) == {
        "q_proj_weight": 2 * 64 * 3, "k_proj_weight": 2 * 32 * 2, "v_proj_weight": 2 * 48 * 2,
        "out_proj.weight": 2 * 64 * 3,
    }  # fmt: skip


def test_flops_of_a_transformer_layer_on_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    assert flops_of(layer, torch.zeros(1, 3, 8)) == {
        "self_attn.in_proj_weight": 2 * 3 * 192, "self_attn.out_proj.weight": 2 * 3 * 64,
        "linear1.weight": 2 * 3 * 96, "linear2.weight": 2 * 3 * 96,
    }  # fmt: skip


def test_flops_of_recurrent_layers_look_ups_and_bilinear_layers():
    sequence = torch.zeros(1, 5, 3)
    assert flops_of(nn.LSTM(3, 4, batch_first=True), sequence) == {
        "weight_ih_l0": 2 * 5 * 48, "weight_hh_l0": 2 * 5 * 64,
    }  # fmt: skip
    packed = nn.utils.rnn.pack_sequence([torch.zeros(5, 3), torch.zeros(2, 3)])
    assert flops_of(nn.RNN(3, 4), packed) == {"weight_ih_l0": 2 * 7 * 12, "weight_hh_l0": 2 * 7 * 16}
    assert flops_of(nn.GRUCell(3, 4), torch.zeros(1, 3)) == {"weight_ih": 2 * 36, "weight_hh": 2 * 48}
    assert flops_of(nn.Embedding(9, 4), torch.zeros(1, 5, dtype=torch.long)) == {"weight": 0}
    assert flops_of(nn.Bilinear(3, 4, 2), torch.zeros(1, 3), torch.zeros(1, 4)) == {"weight": 2 * 24}


def test_a_decoder_tied_to_an_embedding_multiplies():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    model[2].weight = model[0].weight
    assert flops_of(model, torch.zeros(1, 5, dtype=torch.long)) == {"0.weight": 2 * 5 * 36, "1.weight": 2 * 5 * 16}


def test_flops_are_counted_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))  # of one example, no batch in training
    assert flops_of(model, torch.zeros(1, 4)) == {"0.weight": 24, "2.weight": 12}
    assert model.training
    assert model[1].num_batches_tracked == 0


def test_flops_need_no_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert count_flops(model, find_weights(model), torch.zeros(1, 4, device="meta")) == {
        "0.weight": 64, "2.weight": 32,
    }  # fmt: skip


class Functional(nn.Module):
    """Reads the weights of its layers by functions, as Swin transformers do."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv, self.embed = nn.Linear(4, 6), nn.Conv1d(6, 8, 3), nn.Embedding(5, 4)
        self.attention, self.called = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, ids):
        x = F.linear(self.embed(ids), self.linear.weight, self.linear.bias)  # 5 positions
        x = F.conv1d(x.transpose(1, 2), self.conv.weight).transpose(1, 2)  # 3 positions
        query, key, value = (x @ self.attention.weight.t()).chunk(3, -1)
        x = F.scaled_dot_product_attention(query, key, value)
        x = self.called(x) + F.linear(x, self.called.weight)
        return x[..., :4] @ self.embed.weight.t()


def test_flops_of_weights_that_functions_read():
    model, ids = Functional(), torch.zeros(2, 5, dtype=torch.long)
    found = all_flops(model, find_weights(model), ids)
    assert found.of_weights == {
        "linear.weight": 2 * 10 * 24, "conv.weight": 2 * 6 * 144, "embed.weight": 2 * 6 * 20,
        "attention.weight": 2 * 6 * 192, "called.weight": 2 * 2 * 6 * 64,
    }  # fmt: skip
    assert found.others == 2 * 2 * (2 * 3 * 3 * 8)  # scores and their products with values, of 2 examples


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "swin_v2_t", "vit_b_16"])
def test_flops_of_models_are_those_of_torch(name):
    models = pytest.importorskip("torchvision", reason="its models are the test").models
    with torch.device("meta"):
        model = getattr(models, name)().eval()
        image = torch.zeros(1, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if name.startswith("vit"):
            with without_fast_path():
                model(image)
        else:
            model(image)
    found = all_flops(model, find_weights(model), image)
    assert sum(found.of_weights.values()) + found.others == counter.get_total_flops()
    assert sum(found.of_weights.values()) > 0.9 * counter.get_total_flops()


def test_a_plan_says_what_its_flops_leave_out():
    model = Functional()
    plan = plan_of(Sparsifier(model), 0.5, "lin", 1, 4, example_input=torch.zeros(2, 5, dtype=torch.long))
    assert plan.model.flops == 2 * (5 * 24 + 3 * 144 + 3 * 20 + 3 * 192 + 2 * 3 * 64)
    share = 288 / (288 + plan.model.flops)
    assert f"such as those of attention, are another 288, {100 * share:.2f}% of all" in str(plan)
