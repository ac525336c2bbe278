import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("torch_pruning", reason="shrink asks torch-pruning which channels go together")

from random_nets import RandomNet, kill  # noqa: E402

from sparsifai import Sparsifier, shrink, shrinkage  # noqa: E402
from sparsifai.model.channels.constants import constant_inputs, pads_alike  # noqa: E402
from sparsifai.model.channels.coupling import find_channels  # noqa: E402


def same(model, smaller, *inputs):
    """Whether two models have the same outputs, within 1e-5 of the largest."""
    with torch.no_grad():
        for each in inputs:
            expected, got = model(each), smaller(each)
            assert got.shape == expected.shape
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    return True


def shrunk(model, example):
    """The smaller model, and what was said of it, without the warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shrink(model, example), shrinkage(model, example)


def with_norm(seed=0):
    """conv - norm - relu - conv - pool - linear, with running statistics."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    with torch.no_grad():
        model[1].weight.normal_()
        model[1].bias.normal_()
    return model.eval()


@pytest.fixture
def pictures():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# --- What goes --------------------------------------------------------------------------------------------------------


def test_what_is_zeroed_goes_with_all_that_it_feeds(pictures):
    model = with_norm()
    Sparsifier(model, "filter", "local").sparsify(0.5)
    before = copy.deepcopy(model.state_dict())
    small = shrink(model, pictures)
    assert same(model, small, pictures, torch.randn(3, 3, 11, 9))
    assert small[0].weight.shape == (4, 3, 3, 3)
    assert small[1].running_var.shape == small[1].weight.shape == small[0].bias.shape == (4,)
    assert small[3].weight.shape == (3, 4, 3, 3)
    assert small[7].weight.shape == (5, 12)  # 2 x 2 places of each channel
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels, small[7].in_features) == (4, 4, 4, 12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kept = [place for place, filter_ in enumerate(model[0].weight) if filter_.any()]
    assert torch.equal(small[0].weight, model[0].weight[kept])


def test_what_is_left_is_an_ordinary_model(pictures, tmp_path):
    model = with_norm()
    Sparsifier(model, "filter", "local").sparsify(0.5)
    model[0].weight.requires_grad_(False)
    model.train()
    small = shrink(model, pictures)
    assert small.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert small.state_dict().keys() == model.state_dict().keys()
    torch.save(small, tmp_path / "small.pth")
    again = torch.load(tmp_path / "small.pth", weights_only=False)
    assert torch.equal(again.eval()(pictures), small.eval()(pictures))
    small.train()(pictures).sum().backward()
    assert small[3].weight.grad.shape == small[3].weight.shape


def test_constants_are_folded_into_biases(pictures):
    model = with_norm()
    with torch.no_grad():
        model[3].weight[2] = 0  # its bias stays: what it yields is constant, and linear reads it without padding
        model[3].bias[2] = 3.0
    small = shrink(model, pictures)
    assert same(model, small, pictures, torch.randn(3, 3, 8, 8))
    assert small[3].out_channels == 5
    kept = [place for place in range(24) if place // 4 != 2]
    expected = model[7].bias + 3.0 * model[7].weight[:, 8:12].sum(1)
    torch.testing.assert_close(small[7].bias, expected)
    assert torch.equal(small[7].weight, model[7].weight[:, kept])


def test_a_layer_without_a_bias_gets_one_where_a_constant_is_folded(pictures):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 5, 3, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
    small = shrink(model, pictures)
    assert same(model, small, pictures, torch.randn(3, 3, 8, 8))
    expected = torch.sigmoid(model[0].bias[1]) * model[2].weight[:, 1].sum((1, 2))
    torch.testing.assert_close(small[2].bias, expected)


def test_a_bias_that_is_new_is_as_its_weight(pictures):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 5, 3, bias=False)).eval().bfloat16()
    with torch.no_grad():
        model[0].weight[1] = 0
    small = shrink(model, pictures.bfloat16())
    assert small[2].bias.dtype == small[2].weight.dtype == torch.bfloat16


def test_a_constant_before_zero_padding_stays_and_is_named(pictures):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0.25
        model[0].weight[2] = 0
        model[0].bias[2] = -1.0
    with pytest.warns(
        UserWarning, match=r"1 of 2 filters of zeros stay: 0: 1 0\.25 where 2 pads its input with zeros\."
    ):
        small = shrink(model, pictures)
    assert small[0].out_channels == 3
    assert same(model, small, pictures)
    model[2].padding_mode = "replicate"
    small = shrink(model, pictures)
    assert small[0].out_channels == 2
    assert same(model, small, pictures)


def test_channels_that_no_layer_reads_go_through_all_that_feeds_them_alone(pictures):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    with torch.no_grad():
        model[4].weight[:, 3] = 0  # so filter 3 of the second is not read
        model[2].weight[:3, 1] = 0  # and filter 1 of the first but by that one, and by 4
        model[2].weight[4, 1] = 0
    report = shrinkage(model, pictures)
    assert [(layer.zeros, layer.removed) for layer in report.layers] == [(0, 1), (0, 1), (0, 0)]
    small = shrink(model, pictures)
    assert [small[place].out_channels for place in (0, 2, 4)] == [3, 4, 2]
    assert same(model, small, pictures)


def test_norm_layers_whose_scale_is_zero_make_a_channel_constant(pictures):
    model = with_norm()
    with torch.no_grad():
        model[1].weight[3] = 0
        model[1].bias[3] = -1
    small = shrink(model, pictures)
    assert small[0].out_channels == 7
    assert same(model, small, pictures)


class Residual(nn.Module):
    """stem + branch, which are coupled."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.branch = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.branch(x))).mean((2, 3))


def test_what_cannot_go_alone_is_named_with_the_reason(pictures):
    model = Residual().eval()
    with torch.no_grad():
        model.stem.weight[:2], model.stem.bias[:2] = 0, 0
        model.branch.weight[1:4] = 0
    report = shrinkage(model, pictures)
    assert (report.zeros, report.removed, report.zeros_left) == (5, 2, 3)
    stem, branch, head = report.layers
    assert (stem.outputs, stem.zeros, stem.removed, stem.zeros_left) == (6, 2, 1, 1)
    assert stem.why == "1 coupled in stem, branch, not zero in all"
    assert branch.why == "2 coupled in stem, branch, not zero in all"
    assert (head.zeros, head.why) == (0, "")
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    with pytest.warns(UserWarning, match="3 of 5 filters of zeros stay: stem: 1 coupled in stem, branch"):
        small = shrink(model, pictures)
    assert report.parameters_left == sum(parameter.numel() for parameter in small.parameters())
    assert small.stem.out_channels == small.branch.out_channels == small.branch.in_channels == 5
    assert same(model, small, pictures)


def test_the_table(pictures):
    model = Residual().eval()
    with torch.no_grad():
        model.branch.weight[1:3] = 0
    report = shrinkage(model, pictures)
    lines = str(report).splitlines()
    assert lines[0] == f"{report.parameters:,} parameters, {report.parameters:,} after: 0.00% removed"
    assert lines[1].split("  ")[0] == "layer"
    assert "zero filters  removed  zero filters left  why" in lines[1]
    assert lines[4].split()[:6] == ["branch", "Conv2d", "6", "2", "0", "2"]
    assert lines[-1].split() == ["all", "layers", "16", "2", "0", "2"]
    assert "<th" in report._repr_html_()


def test_a_layer_keeps_its_last_output(pictures):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
    report = shrinkage(model, pictures)
    assert (report.removed, report.zeros_left) == (3, 1)
    assert report.layers[0].why == "1 the last output of a layer"
    with pytest.warns(UserWarning, match="the last output of a layer"):
        assert same(model, shrink(model, pictures), pictures)


def test_a_dense_model_stays_as_it_is(pictures):
    model = with_norm()
    small = shrink(model, pictures)
    assert small is not model
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in small.state_dict().items())


# --- Any net ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(random=st.randoms(use_true_random=False), share=st.sampled_from([0.2, 0.5, 0.8]))
def test_of_any_net_the_outputs_stay(random, share):
    model = RandomNet(random).eval()
    kill(model, random, share)
    example = torch.randn(2, 3, 8, 8)
    small, report = shrunk(model, example)
    assert same(model, small, example, torch.randn(1, 3, 8, 8), 10 * torch.randn(3, 3, 8, 8))
    for layer in report.layers:
        assert bool(layer.why) == bool(layer.zeros_left)
        # All that these nets are made of is followed: nothing has to be tried to be found wrong.
        assert "not followed" not in layer.why, report
        module = small.get_submodule(layer.name)
        left = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        assert left == layer.outputs - layer.removed
    assert report.parameters_left == sum(parameter.numel() for parameter in small.parameters())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(random=st.randoms(use_true_random=False), sparsity=st.sampled_from([0.3, 0.6]))
def test_of_any_net_all_that_falls_together_can_go(random, sparsity):
    model = RandomNet(random, constants=False).eval()
    example = torch.randn(2, 3, 8, 8)
    try:
        sparsifier = Sparsifier(model, "filter", "global", "random", coupled=True, example_input=example)
    except ValueError as error:
        assert "no layer is left whose filters can be removed" in str(error)  # noqa: PT017
        return
    sparsifier.sparsify(sparsity)
    small, report = shrunk(model, example)
    assert same(model, small, example, torch.randn(1, 3, 8, 8))
    assert report.zeros_left == 0, report
    assert {name.rpartition(".")[0] for name in sparsifier.masks} >= {each.name for each in report.layers if each.zeros}


# --- What is not followed ---------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """A net in which something is computed across channels."""

    def __init__(self, mix):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.mix = mix

    def forward(self, x):
        return self.last(F.relu(self.second(self.mix(F.relu(self.first(x))))))


MIXTURES = {
    "softmax": lambda x: x.softmax(1),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "shuffle": lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2),
    "flip": lambda x: x.flip(1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "comparison": lambda x: (x > 0).float() + x,
    "sort": lambda x: x.sort(1)[0],
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_what_is_computed_across_channels_is_left_alone_by_name(mixture, pictures):
    model = Mixing(MIXTURES[mixture]).eval()
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight[[1, 2, 6]], layer.bias[[1, 2, 6]] = 0, 0
    small, report = shrunk(model, pictures)
    assert same(model, small, pictures, 3 * torch.randn(2, 3, 5, 5))
    first, second, _ = report.layers
    assert first.zeros_left >= 1  # a flip can map zeros to zeros
    assert first.why
    assert second.zeros_left == 0
    assert small.second.out_channels == 5


def test_small_differences_are_seen(pictures):
    model = Mixing(lambda x: x.roll(-1, 1)).eval()
    with torch.no_grad():
        model.first.weight[:3] = 0
        model.first.bias[:3] = torch.tensor([1.0, 2.0, 3.0])
        model.second.weight.mul_(1e-3)  # what would be read in the wrong place is little beside the bias
    small, report = shrunk(model, pictures)
    assert same(model, small, pictures)
    assert "2 what is computed of it is not followed" in report.layers[0].why


class Flattened(nn.Module):
    """A concatenation whose channels are flattened into several features each, of which torch-pruning loses track."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Linear(40, 2)

    def forward(self, x):
        return self.out(F.adaptive_avg_pool2d(torch.cat([self.left(x), self.right(x)], 1), 2).flatten(1))


def test_places_that_torch_pruning_loses_are_left_alone(pictures):
    model = Flattened().eval()
    with torch.no_grad():
        model.left.weight[1], model.right.weight[2] = 0, 0
    small, report = shrunk(model, pictures)
    assert same(model, small, pictures, torch.randn(1, 3, 5, 5))
    assert [bool(layer.why) for layer in report.layers] == [bool(layer.zeros_left) for layer in report.layers]
    try:
        Sparsifier(Flattened(), "filter", coupled=True, example_input=pictures)
    except ValueError as error:
        assert "no layer is left whose filters can be removed" in str(error)  # noqa: PT017


def test_layers_that_take_channels_together_are_named(pictures):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    grouped = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        grouped[0].weight[1] = 0
    assert shrinkage(model, pictures).layers[0].why == "1 it goes through 1 (GroupNorm), which takes channels together"
    assert shrinkage(grouped, pictures).layers[0].why == "1 coupled with 2, whose 2 groups have to stay equal"


def test_shared_weights_stay(pictures):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)).eval()
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[1] = 0
    report = shrinkage(model, pictures)
    assert report.layers[0].why == report.layers[1].why == "1 coupled with 0 and 2, which share a parameter"


def test_outputs_and_inputs_of_the_model_keep_their_channels(pictures):
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.out(x + self.conv(x))

    model = Ends().eval()
    with torch.no_grad():
        model.conv.weight[1], model.out.weight[0] = 0, 0
    report = shrinkage(model, pictures)
    assert [layer.why for layer in report.layers] == [
        "1 coupled with the input of the model",
        "1 it yields the output of the model",
    ]


# --- Kinds of models and inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_precisions(dtype, pictures):
    model = with_norm().to(dtype)
    Sparsifier(model, "filter", "local").sparsify(0.5)
    small = shrink(model, pictures.to(dtype))
    assert {value.dtype for value in small.parameters()} == {dtype}
    assert small[0].out_channels == 4
    difference = small(pictures.to(dtype)) - model(pictures.to(dtype))
    assert difference.abs().max() <= {torch.float64: 1e-12}.get(dtype, 0.05)


def test_several_inputs_and_outputs(pictures):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = nn.Linear(4, 6), nn.Linear(5, 6)
            self.first, self.second = nn.Linear(12, 3), nn.Linear(6, 2)

        def forward(self, a, b, scale=1.0):
            left, right = self.left(a).relu(), self.right(b).relu()
            return {"first": self.first(torch.cat([left, right], 1)), "second": (self.second(right * scale), 3)}

    model = Two().eval()
    with torch.no_grad():
        for layer in (model.left, model.right):
            layer.weight[:2], layer.bias[:2] = 0, -1
    a, b = torch.randn(2, 4), torch.randn(2, 5)
    for example in ((a, b), {"a": a, "b": b, "scale": 2.0}):
        small = shrink(model, example)
        assert (small.left.out_features, small.right.out_features, small.first.in_features) == (4, 4, 8)
        torch.testing.assert_close(small(a, b)["first"], model(a, b)["first"])


def test_embeddings_and_attention_are_left_alone_between_layers_that_shrink():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

        def forward(self, ids):
            x = self.embedding(ids)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))

    model = Tokens().eval()
    Sparsifier(model, "filter", "local", layers=["up", "down"]).sparsify(0.5)
    ids = torch.randint(0, 10, (2, 7))
    small, report = shrunk(model, ids)
    assert small.up.out_features == small.down.in_features == 8
    assert same(model, small, ids, torch.randint(0, 10, (3, 5)))
    assert [layer.zeros_left for layer in report.layers if layer.name == "down"] == [4]


def test_pixel_shuffle_makes_channels_of_several(pictures):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.PixelShuffle(2), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)
    ).eval()
    with torch.no_grad():
        model[0].weight[3:9], model[0].bias[3:9] = 0, 0
    small, report = shrunk(model, pictures)
    assert same(model, small, pictures)
    assert (small[0].out_channels, small[3].in_channels) == (12, 3)
    assert report.layers[0].why == "2 not constant where 3 reads it"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_transposed_convolutions_and_any_number_of_axes(count):
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[count - 1]
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[count - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[count - 1]
    torch.manual_seed(0)
    model = nn.Sequential(
        convolution(3, 6, 3, padding=1), norm(6), nn.ReLU(), transposed(6, 5, 4, 2, 1), nn.ReLU(),
        transposed(5, 5, 3, padding=1, groups=5), nn.ReLU(), transposed(5, 2, 3),
    ).eval()  # fmt: skip
    example = torch.randn(2, 3, *[6] * count)
    sparsifier = Sparsifier(model, "filter", "local", coupled=True, example_input=example)
    sparsifier.sparsify(0.4)
    small, report = shrunk(model, example)
    assert same(model, small, example, torch.randn(1, 3, *[5] * count))
    assert report.zeros_left == 0
    assert [small[place].in_channels for place in (0, 3, 5, 7)] == [3, 4, 3, 3]
    assert [small[place].out_channels for place in (0, 3, 5, 7)] == [4, 3, 3, 2]
    assert small[5].groups == 3


# --- What is constant -------------------------------------------------------------------------------------------------


def constants_of(model, example):
    return {name: value.tolist() for name, value in constant_inputs(model.eval(), example).items()}


def test_constants_are_those_that_do_not_depend_on_the_input():
    model = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 2.0
    found = constants_of(model, torch.randn(5, 3))
    assert all(map(math.isnan, found["0"]))
    assert [math.isnan(value) for value in found["2"]] == [True, False, True, True]
    assert found["2"][1] == pytest.approx(math.log1p(math.exp(2)))


class Dropping(nn.Module):
    """A function of the input between two layers, of which NaN could be lost."""

    def __init__(self, function):
        super().__init__()
        self.function, self.last = function, nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.function(x))


def written_in_place(x):
    y = torch.zeros(4, 3)
    y[x > 0] = 5.0
    return y


@pytest.mark.parametrize(
    "function",
    [
        written_in_place,
        lambda x: torch.where(x > 0, 1.0, 2.0).expand_as(x),
        lambda x: (x > 10).float(),
        lambda x: torch.nan_to_num(x),
        lambda x: x.clone().nan_to_num_(),
        lambda x: torch.fmax(x, torch.zeros(())),
        lambda x: x.clone().masked_fill_(x.isnan(), 0.0),
        lambda x: torch.zeros_like(x).index_add_(0, torch.arange(4), x),
        lambda x: torch.heaviside(x, torch.zeros(())),
        lambda x: x**0 + x.sign(),
        lambda x: F.one_hot(x.argmax(1), 3).float(),
        lambda x: x.clamp(0, 1),
        lambda x: F.hardswish(x) * 2,
    ],
)
def test_what_would_drop_nan_is_still_of_the_input(function):
    torch.manual_seed(0)
    # On this example all are constant: that they are of the input can be seen by NaN alone.
    found = constants_of(Dropping(function), torch.zeros(4, 3))
    assert all(map(math.isnan, found["last"]))


def test_what_is_looked_up_is_of_the_input():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    assert all(map(math.isnan, constants_of(model, torch.zeros(2, 5, dtype=torch.long))["1"]))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(3, 4, 3, padding="valid"),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, 1, padding="same"),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, 1, padding=1),
        nn.Conv2d(3, 4, (1, 3), padding=(0, 1), stride=2),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"),
        nn.ConvTranspose2d(3, 4, 3),
        nn.ConvTranspose2d(3, 4, 2, stride=2),
        nn.Linear(9, 4),
    ],
    ids=str,
)
def test_a_constant_input_adds_the_same_everywhere_but_where_padding_differs(layer):
    with torch.no_grad():
        output = layer(torch.ones(1, 3, 9, 9))
    assert pads_alike(layer) == bool((output - output[..., :1, :1]).abs().max() < 1e-5 or isinstance(layer, nn.Linear))


def test_zeros_annihilate_what_they_are_multiplied_with():
    found = constants_of(Dropping(lambda x: x * torch.tensor([0.0, 1.0, 0.0])), torch.randn(4, 3))
    assert found["last"][0] == found["last"][2] == 0
    assert math.isnan(found["last"][1])


# --- Wrong calls ------------------------------------------------------------------------------------------------------


def test_wrong_calls_say_what_to_do(pictures, monkeypatch):
    model = with_norm()
    with pytest.raises(ValueError, match="example_input does not run through Sequential .*pass a batch"):
        shrink(model, torch.randn(2, 4, 8, 8))

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return F.dropout(self.conv(x))

    with pytest.raises(ValueError, match="Noisy gives two outputs for the same input in evaluation mode"):
        shrink(Noisy(), pictures)
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'sparsifai\[shrink\]'"):
        shrink(model, pictures)


# --- Found by use -----------------------------------------------------------------------------------------------------


def test_a_constant_that_depends_on_the_size_of_the_input_is_none():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)
    ).eval()
    with torch.no_grad():
        model[0].weight[1] = 0  # constant, but zero in the padding of the next layer
        model[1].weight[2] = 0
        model[1].weight[2, 1] = 1.0  # which reads it alone, so that the mean is that of edges and middle
    found = constants_of(model, torch.randn(2, 3, 8, 8))
    assert all(map(math.isnan, found["4"]))
    small, _ = shrunk(model, torch.randn(2, 3, 8, 8))
    assert same(model, small, torch.randn(2, 3, 5, 5))


def test_nothing_else_changes(pictures):
    model = with_norm().train()
    Sparsifier(model, "filter", "local").sparsify(0.5)
    model(pictures).sum().backward()
    gradient, before = model[0].weight.grad, copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    small = shrink(model, pictures)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert model[0].weight.grad is gradient
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in small.parameters())


def test_infinities_and_whole_numbers_among_the_outputs(pictures):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = with_norm()

        def forward(self, x):
            scores = self.net(x)
            return scores.masked_fill(torch.arange(5) > 3, -math.inf), scores.argmax(1), scores * math.nan

    model = Masked().eval()
    Sparsifier(model.net, "filter", "local").sparsify(0.5)
    small = shrink(model, pictures)
    assert small.net[0].out_channels == 4


def test_a_layer_that_is_called_twice(pictures):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.again, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.out(F.relu(self.again(F.relu(self.again(x)))))

    model = Twice().eval()
    with torch.no_grad():
        model.stem.weight[2], model.stem.bias[2], model.again.weight[2], model.again.bias[2] = 0, 0, 0, 0
        model.again.weight[4], model.again.bias[4] = 0, 0
    small, report = shrunk(model, pictures)
    assert same(model, small, pictures)
    assert [layer.removed for layer in report.layers] == [1, 1, 0]


def test_layers_whose_outputs_nobody_uses(pictures):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.aside, self.never = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)
            self.out = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = F.relu(self.stem(x))
            self.aside(x)
            return self.out(x)

    model = Aside().eval()
    with torch.no_grad():
        model.stem.weight[2], model.stem.bias[2], model.aside.weight[1], model.never.weight[0] = 0, 0, 0, 0
    small, report = shrunk(model, pictures)
    assert same(model, small, pictures)
    assert small.aside.in_channels == 5
    assert [layer.why for layer in report.layers if layer.zeros_left] == [
        "1 it yields the output of the model",
        "1 it is not called, or not as a layer",
    ]


def test_a_learner_is_no_model(pictures):
    with pytest.raises(TypeError, match=r"shrink: model is a torch.nn.Module, not SimpleNamespace; of a Learner"):
        shrink(__import__("types").SimpleNamespace(model=with_norm()), pictures)


def test_a_value_that_the_example_does_not_have_is_none():
    """What a model makes of NaN itself is no constant."""
    found = constants_of(
        Dropping(lambda x: torch.full((4, 3), 7.0 if bool(x.isnan().any()) else 5.0)), torch.ones(4, 3)
    )
    assert all(map(math.isnan, found["last"]))


def test_channels_behind_a_shuffle_are_coupled_with_those_they_are_added_to(pictures):
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fine, self.shuffle, self.coarse = nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(3, 4, 1)
            self.out = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.out(self.shuffle(self.fine(x)) + self.coarse(F.interpolate(x, scale_factor=2)))

    found = find_channels(Added().eval(), pictures)
    fine = [[place for name, place in channel.outputs if name == "fine"] for channel in found]
    coarse = [[place for name, place in channel.outputs if name == "coarse"] for channel in found]
    assert fine[:4] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert coarse[:4] == [[0], [1], [2], [3]]
    assert [channel.inputs for channel in found[:4]] == [(("out", place),) for place in range(4)]


SIZED = {
    "padded average": lambda x: F.avg_pool2d(x, 3, 2, 1).mean((2, 3)),
    "padding": lambda x: F.pad(x, (1, 1, 1, 1)).mean((2, 3)),
    "sum": lambda x: x.sum((2, 3)),
    "ramp": lambda x: (x * torch.linspace(0, 1, x.shape[-1]) ** 2).mean((2, 3)),
    "softmax": lambda x: x.flatten(2).softmax(2).mean(2),
    "sum over the batch": lambda x: x.mean((2, 3)) + x.mean((2, 3)).sum(0, keepdim=True),
}


@pytest.mark.parametrize("function", SIZED)
def test_a_constant_of_a_size_of_the_input_is_none(function, pictures):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Dropping(SIZED[function])).eval()
    model[1].last = nn.Linear(6, 2)
    with torch.no_grad():
        model[0].weight[1:3], model[0].bias[1:3] = 0, 1.0
    small, _ = shrunk(model, pictures)
    assert same(model, small, pictures, torch.randn(1, 3, 12, 10), torch.randn(3, 3, 6, 6))


def test_a_constant_of_a_sign_of_the_input_is_none(pictures):
    class Signed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 3)

        def forward(self, x):
            return self.out(F.relu(self.conv(x)) + (1 if x.mean() > 0 else 2))

    model = Signed().eval()
    with torch.no_grad():
        model.conv.weight[1:3] = 0
    small, _ = shrunk(model, pictures - 3)
    assert same(model, small, pictures - 3, pictures + 3)


def test_inputs_of_layers_by_keyword(pictures):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 3)

        def forward(self, x):
            return self.out(input=self.conv(input=x).relu())

    model = Named().eval()
    with torch.no_grad():
        model.conv.weight[1:3] = 0
    small = shrink(model, pictures)
    assert small.conv.out_channels == 4
    assert same(model, small, pictures)


def test_what_decides_by_values_of_the_input_is_refused(pictures):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Dropping(lambda x: x.mean((2, 3)) * int(x.sum()))).eval()
    with pytest.raises(ValueError, match="what in Sequential does not depend on the input cannot be told: .* NaN"):
        shrink(model, pictures)


def test_what_remembers_earlier_inputs_is_refused(pictures):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.count = nn.Conv2d(3, 4, 1), 0

        def forward(self, x):
            self.count += 1
            return self.conv(x) * self.count

    with pytest.raises(ValueError, match="turn off what is random in it, or what it remembers"):
        shrink(Counting(), pictures)


def test_weights_that_hooks_compute_stay_by_name(pictures):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.utils.spectral_norm(nn.Conv2d(6, 4, 1)), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model.eval()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0
        model[1].weight_orig[2] = 0
    model(pictures)  # its weight is now of a graph, which deepcopy refuses
    small, report = shrunk(model, pictures)
    assert same(model, small, pictures)
    assert report.layers[1].why == "1 coupled with 1, whose weights are computed from others"


def test_reshapes_that_are_misread_do_not_go_on_for_ever():
    models = pytest.importorskip("torchvision.models", reason="a Swin transformer")
    torch.manual_seed(0)
    model = models.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], num_classes=4).eval()
    with torch.no_grad():
        for block in (*model.features[1], *model.features[3]):
            block.mlp[0].weight[:3], block.mlp[0].bias[:3] = 0, 0
    small, report = shrunk(model, torch.randn(2, 3, 16, 16))
    assert same(model, small, torch.randn(2, 3, 16, 16))
    assert small.features[1][1].mlp[0].out_features == 32 - 3
    assert {layer.why for layer in report.layers if layer.zeros_left} == {"3 what is computed of it is not followed"}


def test_a_layer_of_which_all_inputs_would_go_is_tried_like_others(pictures):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GLU(1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    small, report = shrunk(model, pictures)
    assert same(model, small, pictures)
    assert "is not followed" in report.layers[0].why


def test_doubles_beside_halves_lose_nothing(pictures):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = with_norm().half()
            self.register_buffer("scale", torch.tensor([1 / 3], dtype=torch.float64))

        def forward(self, x):
            return self.net(x) * self.scale.to(x.dtype)

    model = Scaled().eval()
    small = shrink(model, pictures.half())
    assert torch.equal(small.scale, model.scale)
    assert small.scale.dtype == torch.float64


def test_what_is_mixed_is_seen_where_saturation_hides_it(pictures):
    class Saturated(nn.Module):
        """The mean over the channels has a part in what is read, but is not seen on inputs of this size."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = self.first(x)
            return self.second((x - x.mean(1, keepdim=True) + 100).clamp(max=1))

    model = Saturated().eval()
    with torch.no_grad():
        model.second.weight[:, 2] = 0  # it is not read, but has a part in the mean
    small, report = shrunk(model, pictures)
    assert report.removed == 0
    assert same(model, small, 1000 * pictures)
