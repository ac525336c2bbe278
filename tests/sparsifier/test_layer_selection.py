"""Which layers are pruned, and why the others stay dense."""

import math

import pytest
import torch
from conftest import dense_of
from torch import nn

from sparsifai import (
    Regularizer,
    Sparsifier,
    compare,
    register_layer,
    save_sparse,
    semi_structured_layers,
    sensitivity,
    shrink,
    shrinkage,
)
from sparsifai.gradual.plan import plan_of


@pytest.mark.filterwarnings("ignore:.*are frozen")
def test_by_default_frozen_layers_and_embeddings_stay_dense():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].requires_grad_(False)
    with pytest.warns(UserWarning, match="are frozen, so they stay dense"):
        sparsifier = Sparsifier(model)
    assert list(sparsifier.masks) == ["2.weight"]
    assert dense_of(sparsifier) == {"0.weight": "embedding", "1.weight": "frozen"}
    assert list(Sparsifier(model, layers=["0", nn.Linear]).masks) == ["0.weight", "1.weight", "2.weight"]


def test_the_last_layer_stays_dense_if_outputs_are_pruned_and_the_first_if_inputs_are(net):
    reason = {"12.weight": "yields the model's output"}
    assert dense_of(Sparsifier(net, "filter")) == reason
    assert dense_of(Sparsifier(net, "channel")) == {"0.weight": "reads the model's input"}
    assert dense_of(Sparsifier(net, "layer")) == {"0.weight": "reads the model's input", **reason}
    assert dense_of(Sparsifier(net, "kernel")) == {}
    assert dense_of(Sparsifier(net, "row")) == reason  # a row of a matrix is an output


def test_a_first_or_last_layer_is_pruned_if_it_is_named_exactly(net):
    assert list(Sparsifier(net, "filter", layers=["12", "0.weight"]).masks) == ["0.weight", "12.weight"]
    assert list(Sparsifier(net, "filter", layers=[nn.Linear]).masks) == ["10.weight"]


def test_layers_that_cannot_have_a_granularity_stay_dense_with_the_reason(net):
    dense = dense_of(Sparsifier(net, "shared_channel"))
    assert dense == {
        "10.weight": "shared_channel needs axis 'h', but the layer has only (out, in)",
        "12.weight": "shared_channel needs axis 'h', but the layer has only (out, in)",
    }


def test_a_granularity_that_no_layer_can_have_is_an_error(mlp):
    with pytest.raises(ValueError, match="no layer"):
        Sparsifier(mlp, "shared_channel")
    with pytest.raises(ValueError, match="no layer"):
        Sparsifier(nn.Linear(4, 2), "filter")


def test_a_module_given_as_pattern_names_a_layer_exactly(net):
    assert list(Sparsifier(net, "filter", layers=net[12]).masks) == ["12.weight"]


def test_a_layer_of_one_group_stays_dense_with_the_reason():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(1, 3))
    assert dense_of(Sparsifier(model, "filter")) == {
        "1.weight": "has 1 group, of which 1 must be kept",
        "2.weight": "yields the model's output",
    }


# --- What stays dense is told -----------------------------------------------------------------------------------------


class Table(nn.Module):
    """A layer that is not registered."""

    def __init__(self, *shape):
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))
        self.table_bias = nn.Parameter(torch.randn(9, 9, 9))


@pytest.mark.parametrize(
    ("shape", "example"),
    [((6, 8), r"\('out', 'in'\)"), ((2, 6, 8), r"\('expert', 'out', 'in'\)"), ((2, 1, 1, 6, 8), "")],
)
def test_a_large_share_of_weights_without_named_axes_is_told(shape, example):
    model = nn.Sequential(nn.Linear(8, 8), Table(*shape))
    model[1].table_bias = None
    share = 100 * math.prod(shape) / sum(parameter.numel() for parameter in model.parameters())
    told = f"{share:.2f}% of the parameters stay dense.*1.table of Table .{'x'.join(map(str, shape))}.*table={example}"
    with pytest.raises(UserWarning, match=told):
        Sparsifier(model)
    Sparsifier(model, layers="*")  # whoever names layers knows that others stay dense
    model[1].table.requires_grad_(False)  # as does who freezes them
    Sparsifier(model)


@pytest.mark.parametrize("shape", [(1, 784, 64), (16, 26, 26)])
def test_positions_and_norm_layers_are_not_told_of(shape):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(8, 8), nn.LayerNorm(shape)
            self.pos_embed = nn.Parameter(torch.randn(1, *shape))

    assert list(Sparsifier(Model()).masks) == ["layer.weight"]


def test_a_small_share_is_not_told_nor_are_biases():
    Sparsifier(nn.Sequential(nn.Linear(80, 80), Table(6, 8)))


@pytest.mark.fastai
def test_the_callback_and_its_plan_tell_it_too():
    pytest.importorskip("fastai", reason="the callback is fastai's")
    from sparsifai import SparsifyCallback

    model = nn.Sequential(nn.Linear(8, 8), Table(60, 8))
    with pytest.warns(UserWarning, match="1.table of Table"):
        SparsifyCallback(0.5).plan(model, 1, 2)


def test_a_kind_with_two_kernel_ranks_can_be_left_out_or_named_by_a_function():
    class Kernel(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape))

        def forward(self, x):
            return x

    model = nn.Sequential(Kernel(4, 4), Kernel(4, 4, 3), nn.Linear(4, 4))
    register_layer(Kernel, weight=("out", "in"))
    with pytest.raises(ValueError, match=r"but has the shape \(4, 4, 3\)"):
        Sparsifier(model)
    for options in ({"exclude": "1"}, {"exclude": model[1]}, {"layers": ["0", "2"]}):
        assert list(Sparsifier(model, **options).masks) == ["0.weight", "2.weight"]
    assert list(Sparsifier(model, exclude=Kernel).masks) == ["2.weight"]
    model[1].weight.requires_grad_(False)
    assert list(Sparsifier(model).masks) == ["0.weight", "2.weight"]
    model[1].weight.requires_grad_(True)

    register_layer(Kernel, weight=lambda layer: ("out", "in", "w")[: layer.weight.dim()])
    sparsifier = Sparsifier(model, "filter", layers=["0", "1"])
    assert [mask.shape for mask in sparsifier.masks.values()] == [(4, 1), (4, 1, 1)]


def test_a_function_that_names_no_axes_is_an_error():
    class Wrong(nn.Linear):
        pass

    register_layer(Wrong, weight=lambda layer: "out")
    with pytest.raises(ValueError, match="weight='out' does not name the axes"):
        Sparsifier(Wrong(2, 2))


# --- Errors of a few lines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["layers", "exclude"])
@pytest.mark.parametrize("pattern", ["encoderblock_*", "re:block[0-9]+", "x" * 40, "layers.24.linear1"])
def test_a_pattern_that_matches_nothing_in_a_large_model_gives_a_short_error(argument, pattern):
    layer = nn.TransformerEncoderLayer(32, 4, batch_first=True)
    model = nn.TransformerEncoder(layer, 24)
    with pytest.raises(ValueError, match=r"nearest names are 'layers|did you mean 'layers") as raised:
        Sparsifier(model, **{argument: pattern})
    assert len(str(raised.value)) < 400
    with pytest.raises(ValueError, match=r"nearest names are 'layers|did you mean 'layers") as raised:
        Sparsifier(model).sparsify({pattern: 0.5})
    assert len(str(raised.value)) < 400


# --- Weights without values -------------------------------------------------------------------------------------------


def offloaded():
    """A model of which one layer has its values elsewhere."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].to("meta")
    return model


EXAMPLE = torch.zeros(2, 8)
USES = {
    "Sparsifier": lambda model: Sparsifier(model),
    "Sparsifier of other layers": lambda model: Sparsifier(model, layers="0"),
    "plan": lambda model: plan_of(Sparsifier(model), 0.5, "lin", 1, 2),
    "shrink": lambda model: shrink(model, EXAMPLE),
    "shrinkage": lambda model: shrinkage(model, EXAMPLE),
    "compare": lambda model: compare(nn.Linear(8, 8), model, EXAMPLE),
    "save_sparse": lambda model: save_sparse(model, "unused"),
    "semi_structured_layers": semi_structured_layers,
    "sensitivity": lambda model: sensitivity(model, lambda model: 1.0, progress=False),
    "Regularizer": Regularizer,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_model_without_values_is_refused(use):
    with pytest.raises(ValueError, match="2.weight.* is on the meta device, without values.*; (load|call)"):
        use(offloaded())


@pytest.mark.parametrize(
    "use",
    [lambda each: each.sparsify(0.5), lambda each: each.sparsity, lambda each: each.report(),
     lambda each: each.recover_masks(), lambda each: each.check(0.5)],
)  # fmt: skip
def test_values_that_are_taken_away_later_are_told_of(use):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    sparsifier = Sparsifier(model)
    sparsifier.sparsify(0.2)
    model[2].to("meta")
    with pytest.raises(ValueError, match="on the meta device, without values"):
        use(sparsifier)
