"""Which MLPs are found in a model, and which are left out."""

import pytest
from attentions import GatedMlp, Mlp, Net
from conftest import dense_of
from torch import nn

from sparsifai import Sparsifier, register_mlp


def block(**layers):
    """A module of a class of its own with these layers."""
    module = type("Block", (nn.Module,), {})()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


def joint_of(model):
    return Sparsifier(model, "neuron").report().joint


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ({"fc1": 12}, "fc2"),
        ({"up_proj": 12}, "down_proj"),
        ({"up_proj": 12, "gate_proj": 12}, "down_proj"),
        ({"gate_up_proj": 24}, "down_proj"),
        ({"w1": 12, "w3": 12}, "w2"),
        ({"w1": 12, "w2": 12}, "w3"),
        ({"w12": 24}, "w3"),
        ({"w1": 12}, "w2"),
        ({"linear1": 12}, "linear2"),
    ],
)
def test_unknown_classes_are_taken_for_mlps_by_the_names_and_sizes_of_their_layers(first, last):
    layers = {name: nn.Linear(8, outputs) for name, outputs in first.items()}
    model = nn.ModuleList([block(**layers, **{last: nn.Linear(12, 8)})])
    with pytest.warns(UserWarning, match=r"Block is taken for one of the MLPs.* register_mlp\(Block, ...\)"):
        sparsifier = Sparsifier(model, "neuron")
    assert sparsifier.report().joint == {"0": (0, 12)}
    assert set(sparsifier.masks) == {f"0.{name}.weight" for name in (*first, last)}


def test_containers_are_no_mlps():
    layers = [nn.Linear(8, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 8)]
    model = nn.ModuleList([nn.Sequential(*layers), nn.ModuleList(layers), Net(Mlp, 1)])
    assert joint_of(model) == {"2.blocks.0": (0, 4)}
    with pytest.raises(ValueError, match="no neurons are found in Sequential"):
        Sparsifier(nn.Sequential(*layers), "neuron")


def test_a_declared_class_that_lacks_a_layer_is_named_with_it():
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Linear(8, 12), nn.Linear(6, 8)

    register_mlp(Wrong, up="widen", down="narrow")
    with pytest.warns(UserWarning, match=r"1 of the MLPs, .* Wrong \(1: it has no layer 'widen'"):
        Sparsifier(nn.ModuleList([Net(Mlp), Wrong()]), "neuron")
    register_mlp(Wrong, up="wide", down="narrow")  # two outputs for each input, so it would be a gate
    assert joint_of(nn.ModuleList([Wrong()])) == {"0": (0, 6)}
    model = Wrong()
    model.narrow = nn.Linear(5, 8)
    with pytest.warns(UserWarning, match=r"first layers \(wide: 12\) do not fit the 5 inputs of narrow"):
        Sparsifier(nn.ModuleList([Net(Mlp), model]), "neuron")


def test_an_mlp_whose_neurons_are_not_found_is_named():
    class OddMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 8)

    with pytest.warns(UserWarning, match=r"1 of the MLPs, with .*% of the parameters, are left out: OddMLP \(1: "):
        Sparsifier(nn.ModuleList([Net(Mlp), OddMLP()]), "neuron")


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.LayerNorm(12), "LayerNorm"),
        (nn.Conv1d(12, 12, 3, groups=12), "Conv1d"),
        (nn.Linear(8, 12), "Linear"),
    ],
)
@pytest.mark.filterwarnings("ignore:Block is taken for one of the MLPs")
def test_a_layer_over_all_neurons_keeps_an_mlp_dense(layer, kind):
    model = nn.ModuleList([block(fc1=nn.Linear(8, 12), between=layer, fc2=nn.Linear(12, 8)), Net(Mlp)])
    sparsifier = Sparsifier(model, "neuron")
    why = f"its layer between ({kind}) is over all neurons, so it would have to change, too"
    assert dense_of(sparsifier)["0.fc1.weight"] == why
    assert set(sparsifier.report().joint) == {"1.blocks.0", "1.blocks.1"}


@pytest.mark.filterwarnings("ignore:Block is taken for one of the MLPs")
def test_convolutions_of_one_pixel_are_layers_of_an_mlp_and_grouped_ones_are_not():
    one = block(fc1=nn.Conv2d(8, 12, 1), fc2=nn.Conv2d(12, 8, 1))
    grouped = block(fc1=nn.Conv2d(8, 12, 1, groups=2), fc2=nn.Conv2d(12, 8, 1))
    assert joint_of(nn.ModuleList([one, grouped])) == {"0": (0, 12)}


def test_layers_that_are_shared_are_pruned_together():
    model = Net(GatedMlp)
    model.blocks[1].gate.weight = model.blocks[0].gate.weight
    sparsifier = Sparsifier(model, "neuron")
    sparsifier.sparsify(0.5)
    assert sparsifier.report().joint == {"blocks.0": (2, 4)}
    zero = {tuple((layer.weight == 0).all(1).tolist()) for block in model.blocks for layer in (block.up, block.gate)}
    assert len(zero) == 1


@pytest.mark.parametrize("arguments", [{"up": ""}, {"down": None}, {"gate": "a b"}])
def test_declarations_with_mistakes_are_refused(arguments):
    with pytest.raises(ValueError, match="is no path from the module to a layer or parameter; give its name"):
        register_mlp(Mlp, **{"up": "up", "down": "down", **arguments})
    with pytest.raises(TypeError, match="register_mlp: 3 is not a module class"):
        register_mlp(3, up="up", down="down")
