"""Norm layers of torch and of other libraries, and what is behind pruned filters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsifai import Sparsifier, shrinkage
from sparsifai.model.norms import affine_names, is_norm_of_others, keeps_channels_apart


class Frozen(nn.Module):
    """As FrozenBatchNorm2d of torchvision, detectron2 and transformers: all its numbers are buffers."""

    def __init__(self, count):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(count) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


class Response(nn.Module):
    """Filter response normalization with a threshold (Singh and Krishnan, 2020)."""

    def __init__(self, count):
        super().__init__()
        self.weight, self.bias, self.tau = (nn.Parameter(torch.rand(count) + 0.5) for _ in range(3))

    def forward(self, x):
        x = x * (x.square().mean((2, 3), keepdim=True) + 1e-6).rsqrt()
        weight, bias, tau = (each.view(1, -1, 1, 1) for each in (self.weight, self.bias, self.tau))
        return torch.maximum(x * weight + bias, tau)


class OverChannels(nn.Module):
    """A LayerNorm of maps, over the axis of channels."""

    def __init__(self, count):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(count) + 0.5), nn.Parameter(torch.rand(count) + 0.5)

    def forward(self, x):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-6).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class ShiftNorm(nn.Module):
    """It shifts by one more than its bias, so zeros in it do not stop its channels."""

    def __init__(self, count):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(count)), nn.Parameter(torch.zeros(count))

    def forward(self, x):
        return x * self.weight[:, None, None] + self.bias[:, None, None] + 1


class Scale(nn.Module):
    """A scale alone keeps zeros."""

    def __init__(self, count):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count))

    def forward(self, x):
        return x * self.weight[:, None, None]


def of_timm(name, **options):
    def make(count):
        timm = pytest.importorskip("timm", reason="its norm layers are the test")
        return getattr(timm.layers, name)(count, **options)

    return make


def of_torchvision(count):
    return pytest.importorskip("torchvision", reason="its norm layer is the test").ops.FrozenBatchNorm2d(count)


def frozen_of_timm(count):
    timm = pytest.importorskip("timm", reason="its norm layers are the test")
    return timm.layers.norm_act.FrozenBatchNormAct2d(count)


# Norm layer -> names of what is masked with a filter, whether its channels stay apart.
NORMS = {
    "frozen": (Frozen, ["weight", "bias"], True),
    "torchvision": (of_torchvision, ["weight", "bias"], True),
    "frozen of timm": (frozen_of_timm, ["weight", "bias"], True),
    "response": (Response, ["weight", "bias", "tau"], True),
    "response of timm": (of_timm("FilterResponseNormTlu2d"), ["weight", "bias", "tau"], True),
    "response and relu of timm": (of_timm("FilterResponseNormAct2d"), ["weight", "bias"], True),
    "EvoNorm-B0": (of_timm("EvoNorm2dB0"), ["weight", "bias", "v"], True),
    "EvoNorm-B1": (of_timm("EvoNorm2dB1"), ["weight", "bias"], True),
    "EvoNorm-S0": (of_timm("EvoNorm2dS0", groups=2), ["weight", "bias", "v"], False),
    "over channels": (OverChannels, ["weight", "bias"], False),
}


@pytest.fixture(params=NORMS.values(), ids=NORMS)
def norm_of(request):
    make, names, apart = request.param
    torch.manual_seed(0)
    norm = make(8)
    with torch.no_grad():
        for value in (*norm.parameters(), *norm.buffers()):
            value.uniform_(0.5, 1.5)
    return norm, names, apart


def model_with(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 3)
    )


class Untraceable(nn.Module):
    """torch.fx cannot trace it, so the flow of an example is recorded."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if len(x) else x


def test_the_response_of_a_layer_tells_what_it_is(norm_of):
    norm, names, apart = norm_of
    before = copy.deepcopy(norm.state_dict())
    assert affine_names(norm) == names
    assert is_norm_of_others(norm)
    assert keeps_channels_apart(norm) == apart
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "names"),
    [(nn.BatchNorm2d(4), ["weight", "bias"]), (nn.GroupNorm(2, 4), ["weight", "bias"]), (nn.Linear(4, 4), []),
     (nn.BatchNorm2d(4, affine=False), []), (nn.Conv1d(4, 4, 1), []), (nn.LayerNorm(4), []), (ShiftNorm(4), []),
     (Scale(4), []), (nn.ReLU(), [])],
    ids=str,
)  # fmt: skip
def test_layers_of_torch_and_others(layer, names):
    assert affine_names(layer) == names
    assert not is_norm_of_others(layer)


@pytest.mark.parametrize("wrap", [lambda model: model, Untraceable], ids=["traced", "recorded"])
@pytest.mark.parametrize("coupled", [False, True])
def test_pruned_filters_are_dead_behind_the_norm_layer(norm_of, wrap, coupled):
    norm, names, apart = norm_of
    inner, example = model_with(norm), torch.randn(2, 3, 8, 8)
    if coupled:
        pytest.importorskip("torch_pruning", reason="it finds coupled filters")
    model = wrap(inner)
    sparsifier = Sparsifier(model, "filter", "local", coupled=coupled, example_input=example)
    if coupled and not apart:
        why = next(iter(sparsifier.layers.values())).why_dense
        assert why == f"goes through {'inner.' * (model is not inner)}1 ({type(norm).__name__}), which mixes channels"
        return
    sparsifier.sparsify(0.5)
    prefix = "inner." if isinstance(model, Untraceable) else ""
    assert {f"{prefix}1.{name}" for name in names} <= sparsifier.all_masks.keys()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(2):
        model(example).square().mean().backward()
        sparsifier.mask_gradients()
        optimizer.step()
        sparsifier.apply_masks()
        sparsifier.mask_moments(optimizer)
    model.eval()
    outputs = inner[1](inner[0](example))
    dead = [not outputs[:, channel].any() for channel in range(8)]
    assert dead == [not kept for kept in sparsifier.masks[f"{prefix}0.weight"].flatten().tolist()]
    assert sum(dead) == 4


def test_dead_filters_are_removed_with_the_entries_of_the_norm_layer(norm_of):
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    norm, names, apart = norm_of
    model, example = model_with(norm), torch.randn(2, 3, 8, 8)
    Sparsifier(model, "filter", "local").sparsify(0.5)
    first = shrinkage(model.eval(), example).layers[0]
    assert first.removed == (4 if apart else 0)
    assert first.why == ("" if apart else f"4: goes through 1 ({type(norm).__name__}), which mixes channels")


def test_constants_behind_a_frozen_norm_layer_are_added_to_biases():
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Frozen(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        model[0].weight[:3] = 0
    assert shrinkage(model, torch.randn(2, 3, 8, 8)).removed == 3


def test_norm_layers_that_are_not_followed_are_told():
    with pytest.warns(UserWarning, match=r"unknown by which parameters 1 \(ShiftNorm\) shift their channels") as warned:
        Sparsifier(model_with(ShiftNorm(8)), "filter", "local")
    assert warned[0].filename == __file__
    Sparsifier(model_with(ShiftNorm(8)))  # single weights make no channel of zeros
    Sparsifier(model_with(Scale(8)), "filter", "local")


def test_functions_of_the_norm_layer_do_not_run_in_the_flow():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), Response(8)
            self.out = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.out(F.relu(self.norm(self.first(x) + self.second(x))))

    sparsifier = Sparsifier(Net(), "filter", "local")
    assert not any(name.startswith("norm") for name in sparsifier.all_masks)  # behind a sum


class OwnLayerNorm(nn.Module):
    """As small language models write it, to have no bias."""

    def __init__(self, size):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.randn(size))

    def forward(self, x):
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias)


class Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.words, self.norm = nn.Embedding(9, 8), norm(8)
        self.first, self.second, self.last = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 9)

    def forward(self, x):
        x = self.words(x)
        return self.last(self.norm(x + self.second(self.first(x).relu())))


def test_a_norm_layer_behind_a_sum_with_what_is_not_pruned_is_not_told_of():
    sparsifier = Sparsifier(Residual(OwnLayerNorm), "filter", "local")
    assert set(sparsifier.all_masks) == set(Sparsifier(Residual(nn.LayerNorm), "filter", "local").all_masks)


def test_directly_behind_a_pruned_layer_it_is_told_of():
    with pytest.warns(UserWarning, match=r"unknown by which parameters 1 \(OwnLayerNorm\) shift"):
        Sparsifier(nn.Sequential(nn.Linear(4, 8), OwnLayerNorm(8), nn.Linear(8, 2)), "filter", "local")
