"""`shrink`: what is removed and why the rest is kept, and that the outputs are the same."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("torch_pruning", reason="shrink needs it")

from random_nets import RandomNet, kill  # noqa: E402

from sparsifai import Sparsifier, shrink, shrinkage  # noqa: E402


def same(model, smaller, *inputs):
    """Whether two models have the same outputs, within 1e-5 of the largest."""
    with torch.no_grad():
        for each in inputs:
            expected, got = model(each), smaller(each)
            assert got.shape == expected.shape
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    return True


def shrunk(model, example):
    """The smaller model and the table of it, without the warning."""
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


# --- What is removed --------------------------------------------------------------------------------------------------


def test_zero_filters_are_removed_with_all_that_belongs_to_them(pictures):
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


def test_the_smaller_model_is_an_ordinary_model(pictures, tmp_path):
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


def test_constants_are_added_to_biases(pictures):
    model = with_norm()
    with torch.no_grad():
        model[3].weight[2] = 0  # its bias remains, so its output is constant, and linear reads it without padding
        model[3].bias[2] = 3.0
    small = shrink(model, pictures)
    assert same(model, small, pictures, torch.randn(3, 3, 8, 8))
    assert small[3].out_channels == 5
    kept = [place for place in range(24) if place // 4 != 2]
    expected = model[7].bias + 3.0 * model[7].weight[:, 8:12].sum(1)
    torch.testing.assert_close(small[7].bias, expected)
    assert torch.equal(small[7].weight, model[7].weight[:, kept])


def test_a_layer_without_a_bias_gets_one_for_a_constant(pictures):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 5, 3, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
    small = shrink(model, pictures)
    assert same(model, small, pictures, torch.randn(3, 3, 8, 8))
    expected = torch.sigmoid(model[0].bias[1]) * model[2].weight[:, 1].sum((1, 2))
    torch.testing.assert_close(small[2].bias, expected)


def test_a_new_bias_has_the_dtype_of_the_weight(pictures):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 5, 3, bias=False)).eval().bfloat16()
    with torch.no_grad():
        model[0].weight[1] = 0
    small = shrink(model, pictures.bfloat16())
    assert small[2].bias.dtype == small[2].weight.dtype == torch.bfloat16


def test_a_constant_that_is_padded_with_zeros_is_kept(pictures):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0.25
        model[0].weight[2] = 0
        model[0].bias[2] = -1.0
    small, report = shrunk(model, pictures)
    assert report.layers[0].why == "1: constant 0.25, but 2 pads its input with zeros"
    assert small[0].out_channels == 3
    assert same(model, small, pictures)
    model[2].padding_mode = "replicate"
    small = shrink(model, pictures)
    assert small[0].out_channels == 2
    assert same(model, small, pictures)


def test_channels_that_no_layer_reads_are_removed_back_to_the_first_layer(pictures):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    with torch.no_grad():
        model[4].weight[:, 3] = 0  # so nothing reads filter 3 of the second layer
        model[2].weight[:3, 1] = 0  # and only filters 3 and 4 read filter 1 of the first
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
    """A sum of stem and branch, which couples them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.branch = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.branch(x))).mean((2, 3))


def test_filters_that_are_zero_in_one_term_of_a_sum_are_kept(pictures):
    model = Residual().eval()
    with torch.no_grad():
        model.stem.weight[:2], model.stem.bias[:2] = 0, 0
        model.branch.weight[1:4] = 0
    report = shrinkage(model, pictures)
    assert (report.zeros, report.removed, report.zeros_left) == (5, 2, 3)
    stem, branch, head = report.layers
    assert (stem.outputs, stem.zeros, stem.removed, stem.zeros_left) == (6, 2, 1, 1)
    assert stem.why == "1: coupled in stem, branch, but not zero in all of them"
    assert branch.why == "2: coupled in stem, branch, but not zero in all of them"
    assert (head.zeros, head.why) == (0, "")
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    with pytest.warns(UserWarning, match="3 of 5 zero filters"):
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
    assert "number  zero  removed  zero left  why" in lines[1]
    assert lines[4].split()[:7] == ["branch", "Conv2d", "filter", "6", "2", "0", "2"]
    assert lines[-1].split() == ["all", "filters", "16", "2", "0", "2"]
    assert "<th" in report._repr_html_()


def test_a_layer_keeps_its_last_output(pictures):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
    report = shrinkage(model, pictures)
    assert (report.removed, report.zeros_left) == (3, 1)
    assert report.layers[0].why == "1: last output of a layer"
    with pytest.warns(UserWarning, match="last output of a layer"):
        assert same(model, shrink(model, pictures), pictures)


def test_a_dense_model_is_unchanged(pictures):
    model = with_norm()
    with pytest.warns(UserWarning, match="nothing is removed"):
        small = shrink(model, pictures)
    assert small is not model
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in small.state_dict().items())


# --- Any net ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(random=st.randoms(use_true_random=False), share=st.sampled_from([0.2, 0.5, 0.8]))
def test_any_net_keeps_its_outputs(random, share):
    model = RandomNet(random).eval()
    kill(model, random, share)
    example = torch.randn(2, 3, 8, 8)
    small, report = shrunk(model, example)
    assert same(model, small, example, torch.randn(1, 3, 8, 8), 10 * torch.randn(3, 3, 8, 8))
    for layer in report.layers:
        assert bool(layer.why) == bool(layer.zeros_left)
        # These nets have no operations that torch-pruning cannot follow.
        assert "unknown" not in layer.why, report
        assert "would change" not in layer.why, report
        module = small.get_submodule(layer.name)
        left = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        assert left == layer.outputs - layer.removed
    assert report.parameters_left == sum(parameter.numel() for parameter in small.parameters())


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(random=st.randoms(use_true_random=False), sparsity=st.sampled_from([0.3, 0.6]))
def test_in_any_net_all_filters_that_were_pruned_together_can_be_removed(random, sparsity):
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


# --- What is kept -----------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """A net that computes something across channels."""

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
def test_channels_that_are_mixed_are_kept(mixture, pictures):
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


def test_a_small_change_of_the_outputs_is_noticed(pictures):
    model = Mixing(lambda x: x.roll(-1, 1)).eval()
    with torch.no_grad():
        model.first.weight[:3] = 0
        model.first.bias[:3] = torch.tensor([1.0, 2.0, 3.0])
        model.second.weight.mul_(1e-3)  # so that a wrong input changes little beside the bias
    small, report = shrunk(model, pictures)
    assert same(model, small, pictures)
    assert "2: its removal would change the model's outputs" in report.layers[0].why


class Flattened(nn.Module):
    """A concatenation whose channels become several features each, which torch-pruning loses track of."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Linear(40, 2)

    def forward(self, x):
        return self.out(F.adaptive_avg_pool2d(torch.cat([self.left(x), self.right(x)], 1), 2).flatten(1))


def test_channels_that_torch_pruning_loses_track_of_are_kept(pictures):
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


def test_layers_that_mix_channels_are_named(pictures):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    grouped = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        grouped[0].weight[1] = 0
    assert shrinkage(model, pictures).layers[0].why == "1: goes through 1 (GroupNorm), which mixes channels"
    assert shrinkage(grouped, pictures).layers[0].why == "1: coupled with 2, whose 2 groups must keep equal sizes"


def test_shared_weights_are_kept(pictures):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)).eval()
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[1] = 0
    report = shrinkage(model, pictures)
    assert report.layers[0].why == report.layers[1].why == "1: coupled with 0 and 2, which share a parameter"


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
        "1: coupled with the model's input",
        "1: yields the model's output",
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


def test_embeddings_and_attention_are_kept_between_layers_that_shrink():
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


def test_pixel_shuffle_turns_several_channels_into_one(pictures):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.PixelShuffle(2), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)
    ).eval()
    with torch.no_grad():
        model[0].weight[3:9], model[0].bias[3:9] = 0, 0
    small, report = shrunk(model, pictures)
    assert same(model, small, pictures)
    assert (small[0].out_channels, small[3].in_channels) == (12, 3)
    assert report.layers[0].why == "2: not constant where 3 reads it"


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


# --- Special cases ----------------------------------------------------------------------------------------------------


def test_an_edge_that_differs_is_not_a_constant():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)
    ).eval()
    with torch.no_grad():
        model[0].weight[1] = 0  # constant, but the next layer pads it with zeros
        model[1].weight[2] = 0
        model[1].weight[2, 1] = 1.0  # reads only that channel, so the mean over positions depends on their number
    small, _ = shrunk(model, torch.randn(2, 3, 8, 8))
    assert same(model, small, torch.randn(2, 3, 5, 5))


def test_the_given_model_and_the_random_generator_are_unchanged(pictures):
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


def test_layers_whose_outputs_are_not_used(pictures):
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
        "1: yields the model's output",
        "1: layer never called, or not as a module",
    ]


SIZED = {
    "padded average": lambda x: F.avg_pool2d(x, 3, 2, 1).mean((2, 3)),
    "padding": lambda x: F.pad(x, (1, 1, 1, 1)).mean((2, 3)),
    "sum": lambda x: x.sum((2, 3)),
    "ramp": lambda x: (x * torch.linspace(0, 1, x.shape[-1]) ** 2).mean((2, 3)),
    "softmax": lambda x: x.flatten(2).softmax(2).mean(2),
    "sum over the batch": lambda x: x.mean((2, 3)) + x.mean((2, 3)).sum(0, keepdim=True),
}


class Between(nn.Module):
    """A convolution, a function of its outputs, and a Linear layer."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.function, self.last = nn.Conv2d(3, 6, 1), function, nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.function(self.conv(x)))


@pytest.mark.parametrize("function", SIZED)
def test_a_value_that_depends_on_the_size_of_the_input_is_not_a_constant(function, pictures):
    model = Between(SIZED[function]).eval()
    with torch.no_grad():
        model.conv.weight[1:3], model.conv.bias[1:3] = 0, 1.0
    small, _ = shrunk(model, pictures)
    assert same(model, small, pictures, torch.randn(1, 3, 12, 10), torch.randn(3, 3, 6, 6))


def test_a_value_that_depends_on_the_sign_of_the_input_is_not_a_constant(pictures):
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


def test_weights_that_hooks_compute_are_kept(pictures):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.utils.spectral_norm(nn.Conv2d(6, 4, 1)), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model.eval()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0
        model[1].weight_orig[2] = 0
    model(pictures)  # its weight is now of a graph, which deepcopy refuses
    small, report = shrunk(model, pictures)
    assert same(model, small, pictures)
    assert report.layers[1].why == "1: coupled with 1, whose weight is computed from other parameters"


@pytest.mark.slow
def test_reshapes_that_torch_pruning_misreads_end():
    models = pytest.importorskip("torchvision.models", reason="a Swin transformer")
    torch.manual_seed(0)
    model = models.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], num_classes=4).eval()
    with torch.no_grad():
        for block in (*model.features[1], *model.features[3]):
            block.mlp[0].weight[:3], block.mlp[0].bias[:3] = 0, 0
    small, report = shrunk(model, torch.randn(2, 3, 16, 16))
    assert same(model, small, torch.randn(2, 3, 16, 16))
    assert small.features[1][1].mlp[0].out_features == 32 - 3
    assert {layer.why for layer in report.layers if layer.zeros_left} == {"3: path through the model unknown"}


def test_a_layer_keeps_its_inputs_if_all_would_be_removed(pictures):
    class Maxout(nn.Module):
        def forward(self, x):
            return x.unfold(1, 2, 2).amax(-1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Maxout(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    small, report = shrunk(model, pictures)
    assert same(model, small, pictures)
    assert "4: its removal would change the model's outputs" in report.layers[0].why


def test_float64_beside_float16_is_unchanged(pictures):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = with_norm().half()
            self.register_buffer("scale", torch.tensor([1 / 3], dtype=torch.float64))

        def forward(self, x):
            return self.net(x) * self.scale.to(x.dtype)

    model = Scaled().eval()
    with pytest.warns(UserWarning, match="nothing is removed"):
        small = shrink(model, pictures.half())
    assert torch.equal(small.scale, model.scale)
    assert small.scale.dtype == torch.float64


def test_mixed_channels_are_noticed_where_saturation_hides_the_change(pictures):
    class Saturated(nn.Module):
        """The mean over channels changes the outputs only for inputs larger than the example."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = self.first(x)
            return self.second((x - x.mean(1, keepdim=True) + 100).clamp(max=1))

    model = Saturated().eval()
    with torch.no_grad():
        model.second.weight[:, 2] = 0  # not read, but part of the mean
    small, report = shrunk(model, pictures)
    assert report.removed == 0
    assert same(model, small, 1000 * pictures)


# --- Models of torchvision and fastai, with coupled filters and without -----------------------------------------------

NAMES = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "vgg11_bn", "efficientnet_b0")


def models_of_torchvision():
    return pytest.importorskip("torchvision.models", reason="the models are torchvision's")


def densenet():
    """DenseNet-121 with fewer layers, because its many concatenations take long."""
    return models_of_torchvision().DenseNet(
        growth_rate=12, block_config=(3, 4, 3), num_init_features=24, num_classes=10
    )


def build(name):
    if name == "densenet":
        return densenet()
    if name.startswith("xresnet"):
        xresnet = pytest.importorskip("fastai.vision.models.xresnet", reason="the model is fastai's")
        return getattr(xresnet, name)(n_out=10)
    if name == "unet":
        vision = pytest.importorskip("fastai.vision.all", reason="the model is fastai's")
        return vision.DynamicUnet(vision.create_body(models_of_torchvision().resnet18(weights=None)), 3, (64, 64))
    model = getattr(models_of_torchvision(), name)(weights=None, num_classes=10)
    if name.startswith("vgg"):  # its classifier of 120 million weights takes long
        model.classifier = nn.Sequential(nn.Linear(25088, 16), nn.ReLU(), nn.Linear(16, 10))
    return model


def check_outputs(model, small):
    for shape in ((2, 3, 64, 64), (1, 3, 96, 96)):
        example = torch.randn(shape)
        with torch.no_grad():
            expected, got = model(example), small(example)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def trained_a_little(model):
    """A model whose norm layers have biases that are not zero, and running statistics that fit."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "densenet", "xresnet18", "unet"])
def test_all_filters_that_were_pruned_together_are_removed(name):
    torch.manual_seed(0)
    model = trained_a_little(build(name))
    example = torch.randn(1, 3, 64, 64)
    Sparsifier(model, "filter", "local", coupled=True, example_input=example).sparsify(0.5)
    small = shrink(model, example)  # without a warning: all zero filters are removed
    before, after = (sum(parameter.numel() for parameter in each.parameters()) for each in (model, small))
    assert after < 0.55 * before
    check_outputs(model, small)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "xresnet18"])
def test_zero_filters_that_cannot_be_removed_are_named(name):
    torch.manual_seed(0)
    model = trained_a_little(build(name))
    example = torch.randn(1, 3, 64, 64)
    Sparsifier(model, "filter", "local").sparsify(0.5)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small = shrink(model, example)
    check_outputs(model, small)
    report = shrinkage(model, example)
    assert str(caught[0].message).startswith(
        f"shrink: {report.zeros_left} of {report.zeros} zero filters cannot be removed: "
    )
    assert report.removed > 0
    assert all(bool(layer.why) == bool(layer.zeros_left) for layer in report.layers)
    assert not any("unknown" in layer.why or "would change" in layer.why for layer in report.layers), report
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
