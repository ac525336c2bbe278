import copy

import pytest
import torch
from conftest import dense_of
from torch import nn

from sparsifai import Sparsifier, register_layer
from sparsifai.model.layers import find_weights


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
    assert dense_of(Sparsifier(model)) == {"encoder.weight": "embedding"}
    sparsifier = Sparsifier(model, layers="decoder")
    sparsifier.sparsify(0.5)
    assert (model["encoder"].weight == 0).sum() == 20


def test_a_parameter_is_looked_up_anew_so_that_assigned_ones_are_masked(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.5)
    fresh = copy.deepcopy(mlp.state_dict())
    fresh["0.weight"] = torch.ones(8, 4)
    mlp.load_state_dict(fresh, assign=True)
    sparsifier.apply_masks()
    assert torch.equal(mlp[0].weight != 0, sparsifier.masks["0.weight"])
