"""Which attentions are found in a model, and which are left out."""

import re

import numpy as np
import pytest
import torch
from attentions import Fused, Interleaved, Net, Separate
from conftest import dense_of
from torch import nn

from sparsifai import Sparsifier, register_attention
from sparsifai.model.joint.attention import find_heads
from sparsifai.model.joint.groups import TABLE


class Declarable(nn.Module):
    """A class that tests declare; its layers have names that no declared class has."""

    def __init__(self, heads=2):
        super().__init__()
        self.heads = heads
        self.ask, self.find, self.tell = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(4, 4)


def joint_of(model, granularity="head", **options):
    return Sparsifier(model, granularity, **options).report().joint


class LikeOthers(nn.Module):
    def __init__(self, **more):
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))
        for name, module in more.items():
            self.add_module(name, module)


def test_unknown_classes_with_a_number_of_heads_are_taken_for_attentions_with_a_notice():
    with pytest.warns(UserWarning, match="LikeOthers is taken for one of the attentions, because it has the"):
        assert joint_of(nn.ModuleList([LikeOthers(), LikeOthers()])) == {"0": (0, 4), "1": (0, 4)}


def test_classes_that_are_declared_need_no_notice():
    class Mine(LikeOthers):
        pass

    register_attention(Mine, query="q_proj", key="k_proj", value="v_proj", output="out_proj")
    assert joint_of(nn.Sequential(Mine())) == {"0": (0, 4)}

    class Subclass(Mine):
        pass

    assert joint_of(nn.Sequential(Subclass())) == {"0": (0, 4)}


class OddAttention(nn.Module):
    """Its layers have names of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)


def test_attentions_whose_heads_are_not_found_are_named_with_their_share():
    model = nn.ModuleList([Net(Separate, 1), OddAttention(), OddAttention()])
    left = sum(each.numel() for each in model[1:].parameters()) / sum(each.numel() for each in model.parameters())
    with pytest.warns(
        UserWarning,
        match=rf"2 of the attentions, with {left:.2%} of the parameters, are left out: OddAttention \(2: its layers "
        r"have other names or sizes .*; declare their parts: register_attention\(OddAttention, ...\)",
    ):
        Sparsifier(model, "head")


def test_a_declared_class_that_lacks_a_layer_is_named_with_it():
    class Wrong(Declarable):
        pass

    register_attention(Wrong, query="ask", key="find_me", value="find", output="tell")
    with pytest.warns(UserWarning, match=r"Wrong \(1: it has no layer 'find_me' whose weight has the axes"):
        Sparsifier(nn.ModuleList([Net(Separate, 1), Wrong()]), "head")

    class Misfit(Declarable):
        pass

    register_attention(Misfit, query="ask", key="find", value="find", output="tell")
    assert joint_of(nn.ModuleList([Misfit()])) == {"0": (0, 2)}
    with pytest.warns(
        UserWarning, match="it has no attribute such as num_heads or head_dim .*, so set self.num_heads in"
    ):
        Sparsifier(nn.ModuleList([Net(Separate, 1), Misfit(heads=3)]), "head")
    register_attention(Misfit, query="find", key="ask", value="ask", output="tell")
    register_attention(Misfit, query="find", key="tell", value="ask", output="tell")
    odd = Misfit()
    odd.ask = nn.Linear(4, 5)
    with pytest.warns(UserWarning, match=r"its projections \(find: 8, tell: 4, ask: 5\) do not fit 2 heads of 2"):
        Sparsifier(nn.ModuleList([Net(Separate, 1), odd]), "head")


def test_numbers_of_heads_that_contradict_each_other_leave_an_attention_out():
    odd = LikeOthers()
    odd.head_dim = 1
    with pytest.warns(UserWarning, match=re.escape("(0: its layers have other names or sizes")):
        assert joint_of(nn.ModuleList([odd, Separate()])) == {"1": (0, 3)}  # and not 8 heads of which two make one

    class Known(Declarable):
        head_dim = 1

    register_attention(Known, query="ask", key="find", value="find", output="tell")
    match = "the model itself: 2 heads of 1, as its attributes say, do not make the 4 inputs of its output"
    with pytest.warns(UserWarning, match=match), pytest.raises(ValueError, match="no class in it is a known attention"):
        Sparsifier(Known(), "head")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"also": ("gate",)}, "it has no layer 'gate' with outputs for each of its 2 heads"),
        ({"also": ("odd",)}, "it has no layer 'odd' with outputs for each of its 2 heads"),
        ({"per_head": {"bias": 0}}, "it has no table 'bias' with 2 places along axis 0, one for each head"),
        ({"per_head": {"table": 1}}, "it has no table 'table' with 2 places along axis 1"),
        ({"per_head": {"table": 2}}, "it has no table 'table' with 2 places along axis 2"),
        ({"per_head": {"table": -2}}, ""),
        ({"per_head": {"table": 0}}, ""),
    ],
)
def test_declared_layers_and_tables_have_to_be_there(arguments, match):
    class Whole(Declarable):
        def __init__(self):
            super().__init__()
            self.odd, self.table = nn.Linear(4, 3), nn.Parameter(torch.randn(2, 7))

    register_attention(Whole, query="ask", key="find", value="find", output="tell", **arguments)
    model = nn.ModuleList([Net(Separate, 1), Whole()])
    if match:
        with pytest.warns(UserWarning, match=match):
            assert set(joint_of(model)) == {"0.blocks.0"}
    else:
        assert joint_of(model)["1"] == (0, 2)
        table = find_heads(model)[-1].parts_in(TABLE)
        assert [(each.name, each.axis) for each in table] == [("1.table", 0)]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"query": ""}, ValueError, "register_attention: query='' is no path from the module to a layer"),
        ({"query": None}, ValueError, "register_attention: query=None is no path"),
        ({"output": "out proj"}, ValueError, "output='out proj' is no path"),
        ({"key": "self..key"}, ValueError, "key='self..key' is no path"),
        ({"also": "gate"}, TypeError, r"also='gate' must be a tuple of names, such as \('gate',\)"),
        ({"also": ("",)}, ValueError, "also='' is no path"),
        ({"norms": None}, TypeError, r"norms=None must be a tuple of names, such as \('name',\)"),
        ({"per_head": "table"}, TypeError, "per_head='table' must be a dictionary, such as {'table': 0}"),
        ({"per_head": ("table",)}, TypeError, "must be a dictionary"),
        ({"per_head": {"table": "first"}}, ValueError, "must give an axis, a whole number"),
    ],
)
def test_declarations_with_mistakes_are_refused(arguments, error, match):
    paths = {"query": "ask", "key": "find", "value": "find", "output": "tell"}
    with pytest.raises(error, match=match):
        register_attention(Declarable, **{**paths, **arguments})
    with pytest.raises(TypeError, match="is not a module class; pass a class, or its full name"):
        register_attention("Declarable", **paths)


@pytest.mark.parametrize(
    ("path", "size", "is_over_all"), [("q_norm", 8, True), ("k_norm", 8, True), ("q_norm", 2, False)]
)
def test_a_norm_over_all_heads_keeps_an_attention_dense(path, size, is_over_all):
    class Normed(LikeOthers):
        pass

    register_attention(Normed, query="q_proj", key="k_proj", value="v_proj", output="out_proj")
    model = nn.ModuleList([Normed(**{path: nn.LayerNorm(size)}), Normed()])
    sparsifier = Sparsifier(model, "head")
    assert set(sparsifier.report().joint) == ({"1"} if is_over_all else {"0", "1"})
    why = f"its norm layer {path} is over all heads, so a head that is removed changes the others"
    assert dense_of(sparsifier).get("0.v_proj.weight") == (why if is_over_all else None)


def test_modules_that_are_shared_are_one_attention():
    attention = Separate()
    model = nn.ModuleList([attention, nn.ModuleList([attention])])
    assert joint_of(model) == {"0": (0, 3)}


def test_attentions_that_share_a_weight_have_the_same_heads():
    model = Net(Separate)
    model.blocks[1].k.weight = model.blocks[0].k.weight
    sparsifier = Sparsifier(model, "head")
    sparsifier.sparsify(0.3)
    assert sparsifier.report().joint == {"blocks.0": (1, 3)}
    weights = [getattr(block, name).weight for block in model.blocks for name in "qkv"]
    zero = {tuple((weight == 0).all(1).tolist()) for weight in weights}
    assert len(zero) == 1
    assert sparsifier.sparsity == pytest.approx(1 / 3)


def test_a_weight_that_is_shared_by_different_heads_keeps_both_attentions_dense():
    model = nn.ModuleList([Separate(4), Separate(4, 2), Net(Separate, 1)])
    model[1].q.weight = model[0].q.weight
    sparsifier = Sparsifier(model, "head")
    why = "q.weight is shared by modules in which it belongs to different heads"
    assert dense_of(sparsifier)["0.k.weight"].endswith(why)
    assert dense_of(sparsifier)["1.k.weight"].endswith(why)
    assert set(sparsifier.report().joint) == {"2.blocks.0"}


def test_the_class_decides_how_a_fused_projection_is_read():
    """Both nets have the same weights; in one of them the outputs of head 0 are the first six."""
    fused, interleaved = Net(Fused, 1), Net(Interleaved, 1)
    interleaved.load_state_dict(fused.state_dict())
    for model in (fused, interleaved):
        model.blocks[0].proj.weight.data[:, :2] = 1e-6
        nn.init.ones_(model.blocks[0].qkv.weight)
        Sparsifier(model, "head").sparsify(0.3)
    rows = [np.flatnonzero((model.blocks[0].qkv.weight == 0).all(1)).tolist() for model in (fused, interleaved)]
    assert rows == [[0, 1, 6, 7, 12, 13], [0, 1, 2, 3, 4, 5]]


def test_a_gate_beside_the_query_is_declared_as_interleaved():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.head_dim = 2
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(5, 12), nn.Linear(5, 6), nn.Linear(5, 6)
            self.o_proj = nn.Linear(6, 5)

    register_attention(Gate, query="q_proj", key="k_proj", value="v_proj", output="o_proj")
    with pytest.warns(UserWarning, match="do not fit 3 heads of 2"):
        Sparsifier(nn.ModuleList([Gate(), Net(Separate, 1)]), "head")
    register_attention(Gate, query="q_proj", key="k_proj", value="v_proj", output="o_proj", interleaved=True)
    model = nn.ModuleList([Gate()])
    model[0].o_proj.weight.data[:, 2:4] = 1e-6
    nn.init.ones_(model[0].q_proj.weight)
    sparsifier = Sparsifier(model, "head")
    sparsifier.sparsify(0.3)
    assert np.flatnonzero((model[0].q_proj.weight == 0).all(1)).tolist() == [4, 5, 6, 7]


def test_a_table_with_a_column_for_each_head_is_no_weight_of_it():
    class Table(Separate):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 3)

    register_attention(Table, query="q", key="k", value="v", output="o", per_head={"table.weight": 1})
    model = nn.ModuleList([Table()])
    sparsifier = Sparsifier(model, "head")
    sparsifier.sparsify(0.3)
    assert dense_of(sparsifier)["0.table.weight"] == "embedding"
    assert torch.count_nonzero(model[0].table.weight) == 21


def _transformers():
    """Class of transformers -> its config, and how many heads and neurons each of its attentions and MLPs has."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    small = {**vision, "vocab_size": 30}
    vision |= {"image_size": 8, "patch_size": 4}
    decoder = {**small, "pad_token_id": 0}
    grouped = {**decoder, "num_key_value_heads": 2}
    gpt = {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 30}
    return {
        "Bert": (small, [4], [24]),
        "Roberta": (decoder, [4], [24]),
        "Albert": ({**small, "embedding_size": 8}, [4], [24]),
        "DistilBert": ({"dim": 16, "n_layers": 1, "n_heads": 4, "hidden_dim": 24, "vocab_size": 30}, [4], [24]),
        "ModernBert": (decoder, [4], [24]),
        "DebertaV2": ({**small, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, [4], [24]),
        "ViT": (vision, [4], [24]),
        "CLIPVision": (vision, [4], [24]),
        "Swin": ({"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2},
                 [2], [32]),
        "Llama": (grouped, [2], [24]),
        "Mistral": (grouped, [2], [24]),
        "Qwen2": (grouped, [2], [24]),
        "Qwen3": ({**grouped, "head_dim": 4}, [2], [24]),
        "Gemma3Text": ({**grouped, "head_dim": 4}, [2], [24]),
        "Phi": (decoder, [4], [24]),
        "Phi3": (grouped, [2], [24]),
        "GPTNeoX": (decoder, [4], [24]),
        "GPT2": (gpt, [4], [64]),
        "GPTBigCode": (gpt, [4], [64]),
        "OPT": ({"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 24, "vocab_size": 30,
                 "word_embed_proj_dim": 16}, [4], [24]),
        "T5": ({"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 30},
               [4, 4, 4], [24, 24, 24, 24]),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(_transformers()))
def test_heads_and_neurons_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    options, heads, neurons = _transformers()[name]
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))
    assert [count for _, count in joint_of(model).values()] == heads
    assert [count for _, count in joint_of(model, "neuron").values()] == neurons


@pytest.mark.parametrize(("name", "heads", "neurons"), [
    ("vit_tiny_patch16_224", [3], [768]),
    ("deit3_small_patch16_224", [6], [1536]),
    ("eva02_tiny_patch14_224", [3], [512]),
])  # fmt: skip
def test_heads_and_neurons_of_timm(name, heads, neurons):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, depth=1, img_size=28)
    assert [count for _, count in joint_of(model).values()] == heads
    assert [count for _, count in joint_of(model, "neuron").values()] == neurons


def test_norms_over_all_heads_or_neurons_of_timm_keep_them_dense():
    timm = pytest.importorskip("timm")
    model = timm.create_model("eva02_tiny_patch14_224", depth=1, img_size=28, scale_mlp=True, scale_attn_inner=True)
    with pytest.raises(ValueError, match="its norm layer norm is over all heads"):
        Sparsifier(model, "head", layers="blocks.*")
    with pytest.raises(ValueError, match=r"its layer norm \(LayerNorm\) is over all neurons"):
        Sparsifier(model, "neuron", layers="blocks.*.mlp")


def test_heads_and_neurons_of_torchvision():
    torchvision = pytest.importorskip("torchvision")
    vit = torchvision.models.VisionTransformer(8, 4, 1, 4, 16, 24)
    swin = torchvision.models.SwinTransformer([2, 2], 8, [1, 1], [2, 4], [2, 2])
    for model, heads, neurons in ((vit, [4], [24]), (swin, [2, 4], [32, 64])):
        assert [count for _, count in joint_of(model).values()] == heads
        assert [count for _, count in joint_of(model, "neuron").values()] == neurons
