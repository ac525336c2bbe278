"""Followers: biases and norm parameters that are masked with whole outputs."""

import pytest
import torch
from conftest import dense_of, followers_of
from torch import nn

from sparsifai import Sparsifier, register_layer
from sparsifai.sparsifier.followers import Follower


def dead_outputs(model, x):
    model.eval()
    return (model(x).flatten(2) == 0).all(2).all(0)


@pytest.mark.parametrize("granularity", ["filter", ("out",), lambda axes: {"out": 2}])
@pytest.mark.parametrize(
    ("layer", "norm"),
    [
        (nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8)),
        (nn.Conv2d(2, 8, 3, groups=2), nn.BatchNorm2d(8)),
        (nn.ConvTranspose2d(2, 8, 3, groups=2), nn.GroupNorm(2, 8)),
        (nn.Conv2d(2, 8, 3), nn.Sequential(nn.ReLU(), nn.InstanceNorm2d(8, affine=True))),
        (nn.Conv2d(2, 8, 3), nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU())),
        (nn.Conv2d(2, 8, 3), nn.Identity()),
    ],
)
def test_a_pruned_filter_gives_zeros_behind_its_norm_layer(layer, norm, granularity):
    model = nn.Sequential(layer, norm, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))
    for _ in range(3):
        model(torch.randn(4, 2, 6, 6))  # gives a batch norm statistics of its own
    sparsifier = Sparsifier(model, granularity, layers="0")
    sparsifier.sparsify(0.5)
    mask = sparsifier.all_masks["0.bias"]
    assert (~mask).sum() == 4
    assert torch.equal(dead_outputs(model[:2], torch.randn(4, 2, 6, 6)), ~mask)


def test_the_layer_norm_of_a_linear_layer_is_masked_with_it():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    sparsifier = Sparsifier(model, "row")
    sparsifier.sparsify(0.5)
    assert followers_of(sparsifier) == dict.fromkeys(["0.bias", "1.weight", "1.bias"], ("0.weight",))
    assert ((model[1].weight == 0) & (model[1].bias == 0)).sum() == 4


def test_a_layer_norm_over_the_width_is_no_follower():
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.LayerNorm(6), nn.Flatten(), nn.Linear(216, 2))
    assert list(followers_of(Sparsifier(model, "filter", layers="0"))) == ["0.bias"]


def test_a_norm_layer_of_another_size_is_no_follower():
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Flatten(), nn.BatchNorm1d(216), nn.Linear(216, 2))
    assert list(followers_of(Sparsifier(model, "filter", layers="0"))) == ["0.bias"]


class Residual(nn.Module):
    def __init__(self, shared=False):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(2, 4, 1)
        self.other = nn.Conv2d(2, 4, 1)
        self.head = nn.Linear(4, 2)
        self.shared = shared

    def forward(self, x):
        if self.shared:
            x = self.norm(self.conv(x)) + self.norm(self.other(x))
        else:
            x = self.norm(self.conv(x) + self.other(x))
        return self.head(x.amax((2, 3)))


def test_a_norm_layer_behind_a_sum_is_no_follower():
    assert set(followers_of(Sparsifier(Residual(), "filter"))) == {"conv.bias", "other.bias"}


def test_a_shared_norm_layer_is_masked_where_all_its_producers_are_pruned():
    model = Residual(shared=True)
    sparsifier = Sparsifier(model, "filter", "local")
    assert followers_of(sparsifier)["norm.weight"] == ("conv.weight", "other.weight")
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1).expand(4, 2, 1, 1))
        model.other.weight.copy_(torch.tensor([1.0, 4, 2, 3]).view(4, 1, 1, 1).expand(4, 2, 1, 1))
    sparsifier.sparsify(0.5)
    assert (model.norm.weight == 0).tolist() == [True, False, False, False]
    assert (model.conv.bias == 0).tolist() == [True, True, False, False]


def test_granularities_that_do_not_drop_outputs_have_no_followers(net):
    for granularity in ("weight", "kernel", "channel", "shared_weight"):
        assert followers_of(Sparsifier(net, granularity)) == {}


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5)
        self.attention = nn.MultiheadAttention(5, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x, _ = self.lstm(x)
        x, _ = self.attention(x, x, x)
        return self.head(x)


def test_biases_of_attention_and_recurrent_weights_are_followers():
    model = Reads()
    sparsifier = Sparsifier(model, "filter", "local")
    sparsifier.sparsify(0.5)
    assert dense_of(sparsifier) == {"head.weight": "yields the model's output"}
    assert followers_of(sparsifier) == {
        "lstm.bias_ih_l0": ("lstm.weight_ih_l0",),
        "lstm.bias_hh_l0": ("lstm.weight_hh_l0",),
        "attention.in_proj_bias": ("attention.in_proj_weight",),
        "attention.out_proj.bias": ("attention.out_proj.weight",),
    }
    assert torch.equal(model.lstm.bias_hh_l0 == 0, (model.lstm.weight_hh_l0 == 0).all(1))


def test_the_bias_of_a_registered_layer_is_a_follower():
    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.bias = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.ones(8))

        def forward(self, x):
            return x @ self.kernel + self.bias

    from sparsifai.model import layers as target

    register_layer(Kernel, kernel=("in", "out"))
    try:
        model = nn.Sequential(Kernel(), nn.ReLU(), nn.Linear(8, 2))
        assert followers_of(Sparsifier(model, "filter")) == {"0.bias": ("0.kernel",)}
    finally:
        del target._AXES_OF_KIND[Kernel]


def bools(text):
    return torch.tensor([letter == "1" for letter in text])


def pairs(outputs, entries):
    return torch.tensor(outputs), torch.tensor(entries)


@pytest.mark.parametrize(
    ("producers", "kept", "expected"),
    [
        ({"left": None}, {"left": "101"}, "101"),
        ({"left": None, "right": None}, {"left": "100", "right": "001"}, "101"),
        # The outputs of two layers side by side; no output acts on the last entry.
        (
            {"left": pairs([0, 1], [0, 1]), "right": pairs([0, 1], [2, 3])},
            {"left": "10", "right": "01"},
            "10011",
        ),
        # One output acts on two entries, as behind an upsampling, and in another order.
        ({"left": pairs([1, 1, 0, 0], [0, 1, 2, 3])}, {"left": "01"}, "1100"),
        # An entry is kept if any of its outputs is.
        ({"left": pairs([0, 1], [0, 1]), "right": None}, {"left": "10", "right": "001"}, "101"),
    ],
)
def test_the_mask_of_a_follower_by_hand(producers, kept, expected):
    follower = Follower("norm.weight", len(expected), producers)
    mask = follower.mask({name: bools(text) for name, text in kept.items()})
    assert mask.dtype == torch.bool
    assert torch.equal(mask, bools(expected))


# --- Vectors with a named axis are no outputs -------------------------------------------------------------------------


class WithBias(nn.Linear):
    """A Linear whose bias can be pruned, too."""


register_layer(WithBias, weight=("out", "in"), bias=("out",))


class Shifted(nn.Conv2d):
    """A convolution whose bias can be pruned, too."""


register_layer(Shifted, weight=("out", "in", "h", "w"), bias=("out",))


@pytest.mark.parametrize("granularity", ["weight", "filter", ("out",)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(WithBias(4, 8), nn.LayerNorm(8), nn.ReLU(), WithBias(8, 4)),
        lambda: nn.Sequential(Shifted(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Shifted(8, 4, 3)),
    ],
)
def test_biases_that_are_pruned_by_themselves_leave_the_norm_layer_alone(make, granularity):
    model = make()
    for layer in (model[0], model[3]):
        nn.init.normal_(layer.bias)
    sparsifier = Sparsifier(model, granularity, layers="*.bias")
    sparsifier.sparsify(0.5)
    assert list(sparsifier.masks) == ["0.bias", "3.bias"]
    assert not followers_of(sparsifier)
    assert (model[1].weight == 1).all()
    assert int((model[0].bias == 0).sum() + (model[3].bias == 0).sum()) == 6


def test_a_bias_that_is_pruned_by_itself_also_follows_its_weight():
    model = nn.Sequential(WithBias(4, 8), nn.ReLU(), WithBias(8, 4))
    nn.init.normal_(model[0].bias)
    sparsifier = Sparsifier(model, "filter", layers=["0.weight", "0.bias"])
    sparsifier.sparsify({"0.weight": 0.5, "0.bias": 0.25})
    dead = (model[0].weight == 0).all(1)
    assert dead.sum() == 4
    own = ~sparsifier.masks["0.bias"]
    assert own.sum() == 2
    assert torch.equal(model[0].bias == 0, own | dead)
