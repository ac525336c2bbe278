import copy
import re

import pytest
import torch
from torch import nn

from sparsifai import Sparsifier, register_layer
from sparsifai.model.layers import find_weights
from sparsifai.model.patterns import as_patterns


def test_axes_of_every_kind():
    model = nn.ModuleDict({
        "conv1d": nn.Conv1d(4, 6, 3, groups=2),
        "conv2d": nn.Conv2d(4, 6, (3, 2)),
        "conv3d": nn.Conv3d(2, 3, (1, 2, 3)),
        "up1d": nn.ConvTranspose1d(4, 6, 3, groups=2),
        "up2d": nn.ConvTranspose2d(4, 6, (3, 2)),
        "up3d": nn.ConvTranspose3d(2, 3, (1, 2, 3)),
        "linear": nn.Linear(4, 6),
        "embedding": nn.Embedding(10, 4),
        "attention": nn.MultiheadAttention(4, 2),
        "lstm": nn.LSTM(4, 5, num_layers=2, bidirectional=True, proj_size=3),
        "gru": nn.GRU(4, 5),
        "rnn": nn.RNN(4, 5),
        "cell": nn.GRUCell(4, 5),
        "norm": nn.BatchNorm2d(6),
    })  # fmt: skip
    axes = {name: target.axes for name, target in find_weights(model).items()}
    assert axes["conv1d.weight"] == {"out": 3, "in": 2, "w": 3}
    assert axes["conv2d.weight"] == {"out": 6, "in": 4, "h": 3, "w": 2}
    assert axes["conv3d.weight"] == {"out": 3, "in": 2, "d": 1, "h": 2, "w": 3}
    assert axes["up1d.weight"] == {"in": 2, "out": 3, "w": 3}
    assert axes["up2d.weight"] == {"in": 4, "out": 6, "h": 3, "w": 2}
    assert axes["up3d.weight"] == {"in": 2, "out": 3, "d": 1, "h": 2, "w": 3}
    assert axes["linear.weight"] == {"out": 6, "in": 4}
    assert axes["embedding.weight"] == {"in": 10, "out": 4}
    assert axes["attention.in_proj_weight"] == {"out": 12, "in": 4}
    assert axes["attention.out_proj.weight"] == {"out": 4, "in": 4}
    assert axes["lstm.weight_ih_l0"] == {"out": 20, "in": 4}
    assert axes["lstm.weight_hr_l1_reverse"] == {"out": 3, "in": 5}
    assert axes["gru.weight_hh_l0"] == {"out": 15, "in": 5}
    assert axes["rnn.weight_ih_l0"] == {"out": 5, "in": 4}
    assert axes["cell.weight_ih"] == {"out": 15, "in": 4}
    assert not any("bias" in name or "norm" in name for name in axes)


def make_conv1d():
    """A new class each time, since a kind stays registered: as GPT-2's in transformers, a weight of (in, out)."""

    class Conv1D(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(inputs, outputs))
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    return Conv1D


def test_a_kind_of_layer_is_registered_in_one_line():
    conv1d = make_conv1d()
    register_layer(conv1d, weight=("in", "out"))
    model = nn.Sequential(conv1d(4, 6), nn.ReLU(), conv1d(6, 3))
    sparsifier = Sparsifier(model, "filter")
    sparsifier.sparsify(0.5)
    assert sparsifier.masks["0.weight"].shape == (1, 6)
    assert ((model[0].weight == 0).all(0)).sum() == 3
    sparsifier = Sparsifier(model, "column", "local")
    assert sparsifier.masks["2.weight"].shape == (6, 1)


def test_an_unregistered_kind_is_an_error_that_names_the_remedy():
    with pytest.raises(ValueError, match=r"no weights with named axes; name those of its layers: register_layer.kind"):
        Sparsifier(nn.Sequential(make_conv1d()(4, 6)))


def test_register_layer_refuses_nonsense():
    conv1d = make_conv1d()
    with pytest.raises(TypeError, match="is not a module class"):
        register_layer("Conv1D", weight=("in", "out"))
    with pytest.raises(ValueError, match="give a tuple of different axis names"):
        register_layer(conv1d, weight=("in", "in"))
    with pytest.raises(ValueError, match="give a tuple of different axis names"):
        register_layer(conv1d, weight="in")
    register_layer(conv1d, weight=("in", "out", "h"))
    with pytest.raises(ValueError, match=r"registered with the axes .* but has the shape \(4, 6\)"):
        find_weights(conv1d(4, 6))


def test_lazy_layers_are_refused_until_they_have_a_shape():
    with pytest.raises(ValueError, match="is lazy and has no shape yet; run one batch through the model first"):
        Sparsifier(nn.Sequential(nn.LazyLinear(3)))


def test_by_default_frozen_layers_and_embeddings_stay_dense():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].requires_grad_(False)
    sparsifier = Sparsifier(model)
    assert list(sparsifier.masks) == ["2.weight"]
    assert sparsifier.dense == {"0.weight": "embedding", "1.weight": "frozen"}
    assert list(Sparsifier(model, layers=["0", nn.Linear]).masks) == ["0.weight", "1.weight", "2.weight"]


def test_tied_weights_are_counted_once_and_masked_in_both_places():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    sparsifier = Sparsifier(model)
    sparsifier.sparsify(0.5)
    assert list(sparsifier.masks) == ["0.weight"]
    assert sparsifier.report().selected.weights == 16
    assert (model[2].weight == 0).sum() == 8
    assert list(Sparsifier(model, layers="2").masks) == ["0.weight"]


def test_an_embedding_tied_with_a_decoder_is_an_embedding():
    model = nn.ModuleDict({"encoder": nn.Embedding(10, 4), "hidden": nn.Linear(4, 4), "decoder": nn.Linear(4, 10)})
    model["decoder"].weight = model["encoder"].weight
    assert Sparsifier(model).dense == {"encoder.weight": "embedding"}
    sparsifier = Sparsifier(model, layers="decoder")
    sparsifier.sparsify(0.5)
    assert (model["encoder"].weight == 0).sum() == 20


def body_and_head():
    return nn.ModuleDict({
        "body": nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))),
        "head": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
    })  # fmt: skip


EVERYTHING = ["body.0.weight", "body.1.0.weight", "body.1.1.weight", "head.0.weight", "head.1.weight"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (nn.Conv2d, EVERYTHING[:3]),
        ([nn.Linear, "body.0"], [EVERYTHING[0], *EVERYTHING[3:]]),
        ("head", EVERYTHING[3:]),
        ("body.1", EVERYTHING[1:3]),
        ("body.*.0", [EVERYTHING[1]]),
        ("*.0", [EVERYTHING[0], EVERYTHING[1], EVERYTHING[3]]),
        ("head.1.weight", EVERYTHING[4:]),
        (lambda name, module: getattr(module, "kernel_size", 0) == (1, 1), [EVERYTHING[2]]),
        (lambda name, module: name.endswith("1"), [EVERYTHING[2], EVERYTHING[4]]),
    ],
)
def test_layers_and_exclude_take_the_same_patterns(layers, expected):
    model = body_and_head()
    assert list(Sparsifier(model, layers=layers).masks) == expected
    assert list(Sparsifier(model, exclude=layers).masks) == [name for name in EVERYTHING if name not in expected]


def test_a_module_itself_is_a_pattern():
    model = body_and_head()
    assert list(Sparsifier(model, layers=model["body"]).masks) == EVERYTHING[:3]
    assert list(Sparsifier(model, exclude=[model["body"][1], model["head"][0]]).masks) == [EVERYTHING[0], EVERYTHING[4]]


def test_exclude_wins_over_layers():
    assert list(Sparsifier(body_and_head(), layers=nn.Conv2d, exclude="body.1").masks) == EVERYTHING[:1]


@pytest.mark.parametrize("argument", ["layers", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("heed.*", "no layer with a weight to sparsify matches 'heed.*'; did you mean 'head"),
        (nn.Conv3d, "no layer with a weight to sparsify matches Conv3d"),
        (lambda name, module: False, "no layer with a weight to sparsify matches <lambda>"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(argument, pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sparsifier(body_and_head(), **{argument: pattern})


def test_what_is_no_pattern_is_an_error():
    with pytest.raises(TypeError, match="3 selects no layers: give a module class, a module, a name or glob"):
        Sparsifier(body_and_head(), layers=3)


def test_output_layer_stays_dense_where_whole_outputs_go_and_input_layer_where_whole_inputs_go(net):
    reason = {"12.weight": "yields the model's output"}
    assert Sparsifier(net, "filter").dense == reason
    assert Sparsifier(net, "channel").dense == {"0.weight": "reads the model's input"}
    assert Sparsifier(net, "layer").dense == {"0.weight": "reads the model's input", **reason}
    assert Sparsifier(net, "kernel").dense == {}
    assert Sparsifier(net, "row").dense == reason  # of a matrix, a row is an output


def test_naming_a_layer_exactly_lifts_the_rule(net):
    assert list(Sparsifier(net, "filter", layers=["12", "0.weight"]).masks) == ["0.weight", "12.weight"]
    assert list(Sparsifier(net, "filter", layers=[nn.Linear]).masks) == ["10.weight"]


def test_a_granularity_that_some_layers_cannot_have_leaves_them_dense_and_says_why(net):
    dense = Sparsifier(net, "shared_channel").dense
    assert dense == {
        "10.weight": "shared_channel needs axis 'h', has only (out, in)",
        "12.weight": "shared_channel needs axis 'h', has only (out, in)",
    }


def test_a_granularity_that_no_layer_can_have_is_an_error(mlp):
    with pytest.raises(
        ValueError, match="no layer of Sequential is left to sparsify; 0.weight: shared_channel needs axis"
    ):
        Sparsifier(mlp, "shared_channel")
    with pytest.raises(ValueError, match="weight: yields the model's output"):
        Sparsifier(nn.Linear(4, 2), "filter")


def test_a_parameter_is_looked_up_anew_so_that_assigned_ones_are_masked(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.5)
    fresh = copy.deepcopy(mlp.state_dict())
    fresh["0.weight"] = torch.ones(8, 4)
    mlp.load_state_dict(fresh, assign=True)
    sparsifier.apply_masks()
    assert torch.equal(mlp[0].weight != 0, sparsifier.masks["0.weight"])


def test_a_module_of_several_names_is_meant_by_any_of_them():
    model = body_and_head()
    model["box"] = nn.Sequential(model["head"])
    assert list(Sparsifier(model, layers="box").masks) == EVERYTHING[3:]
    assert list(Sparsifier(model, layers=model["box"]).masks) == EVERYTHING[3:]
    assert list(Sparsifier(model).masks) == EVERYTHING


def test_a_module_itself_names_a_layer_exactly(net):
    assert list(Sparsifier(net, "filter", layers=net[12]).masks) == ["12.weight"]


def test_a_layer_of_one_group_stays_dense_and_says_so():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(1, 3))
    assert Sparsifier(model, "filter").dense == {
        "1.weight": "has 1 group, of which 1 must stay",
        "2.weight": "yields the model's output",
    }


def test_a_dictionary_is_no_list_of_patterns(mlp):
    with pytest.raises(TypeError, match="a dictionary of sparsities is the first argument"):
        Sparsifier(mlp, layers={"0": 1})


@pytest.mark.parametrize("key", [3, ("a", "b")])
def test_keys_of_a_dictionary_are_checked_before_the_model_is_known(key):
    pytest.importorskip("fastai", reason="the callback needs fastai")
    from sparsifai import SparsifyCallback

    with pytest.raises(TypeError, match="selects no layers"):
        SparsifyCallback({key: 0.5})


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("re:.*weight", EVERYTHING),
        ("re:head", EVERYTHING[3:]),
        (r"re:body\..*", EVERYTHING[:3]),
        ("re:(body|head).*", EVERYTHING),
    ],
)
def test_a_regular_expression_means_the_names_that_it_fits_as_a_whole(pattern, names):
    assert list(Sparsifier(body_and_head(), layers=pattern).masks) == names


def test_a_regular_expression_that_fits_a_part_of_a_name_means_nothing():
    with pytest.raises(ValueError, match="no layer with a weight to sparsify matches 're:bod'; did you mean 'body'"):
        Sparsifier(body_and_head(), layers="re:bod")


@pytest.mark.parametrize("argument", [{"layers": "re:(head"}, {"exclude": ["head", "re:*"]}])
def test_no_regular_expression_is_an_error(argument):
    with pytest.raises(ValueError, match=r"'re:.*' is no regular expression: .*; after 're:' comes one of Python's"):
        Sparsifier(body_and_head(), **argument)
    with pytest.raises(ValueError, match="is no regular expression"):  # before the model is known
        as_patterns(["head", "re:("])


def test_fractions_by_regular_expression():
    sparsifier = Sparsifier(body_and_head())
    sparsifier.sparsify({"re:body.*": 0.5, "re:head.*": 0.25})
    assert sparsifier.masks[EVERYTHING[-1]].float().mean() == pytest.approx(0.75, abs=0.05)
