"""Grouped convolutions and group norms: their channels are pruned in equal numbers or by whole groups, and removed."""

import copy
import random
import warnings
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("torch_pruning", reason="what is coupled torch-pruning knows")

from conftest import dense_of  # noqa: E402
from random_nets import RandomNet, kill  # noqa: E402

from sparsifai import Sparsifier, shrink, shrinkage  # noqa: E402

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def trained(model, seed=0):
    """A model in evaluation mode, with norm layers that are not the identity."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
    return model.eval()


def small_of(model, example=EXAMPLE):
    """The shrunk copy; it must have the same outputs, and no zero filter must be left."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = model(example)
        small = shrink(model, example)
        assert (small(example) - expected).abs().max() <= 1e-5 * expected.abs().max()
    return small


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def pruned(model, sparsity=0.5, example=EXAMPLE, **options):
    """The Sparsifier of a model whose coupled filters are pruned; all layers but the last must be pruned."""
    sparsifier = Sparsifier(model, "filter", "local", coupled=True, example_input=example, **options)
    sparsifier.sparsify(sparsity)
    return sparsifier


def alive(sparsifier, name):
    return sparsifier.masks[f"{name}.weight"].flatten(1).any(1)


class Block(nn.Module):
    """A block of ResNeXt: 1x1, grouped 3x3, 1x1, and a sum."""

    def __init__(self, width=16, groups=4, norm=nn.BatchNorm2d):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(width, width, 1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False), norm(width)
        self.conv3, self.norm3 = nn.Conv2d(width, width, 1, bias=False), norm(width)
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return self.out(F.relu(x + self.norm3(self.conv3(y))).mean((2, 3)))


# --- Grouped convolutions ---------------------------------------------------------------------------------------------


def test_every_group_of_a_convolution_loses_its_lowest_channels_and_as_many():
    model = trained(Block())
    sparsifier = pruned(model)
    assert dense_of(sparsifier) == {"out.weight": "yields the model's output"}
    for name in ("conv1", "conv2"):
        assert alive(sparsifier, name).unflatten(0, (4, 4)).sum(1).tolist() == [2, 2, 2, 2]
    # In the groups different channels are the lowest.
    assert len({tuple(kept) for kept in alive(sparsifier, "conv2").unflatten(0, (4, 4)).tolist()}) > 1
    magnitude = copy.deepcopy(trained(Block())).conv2.weight.abs().flatten(1).mean(1).unflatten(0, (4, 4))
    highest = magnitude.argsort(1, descending=True)[:, :2].sort(1).values
    assert alive(sparsifier, "conv2").unflatten(0, (4, 4)).nonzero()[:, 1].reshape(4, 2).tolist() == highest.tolist()
    small = small_of(model)
    assert (small.conv2.groups, small.conv2.in_channels, small.conv2.out_channels) == (4, 8, 8)
    assert small.conv2.weight.shape == (8, 2, 3, 3)
    small.train()(EXAMPLE).sum().backward()


def test_joined_channels_have_the_mean_score_of_their_rank():
    model = Block(width=8, groups=2)
    with torch.no_grad():
        for channel, value in enumerate([1.0, 2.0, 3.0, 4.0, 40.0, 30.0, 20.0, 10.0]):
            model.conv2.weight[channel] = value
        model.conv3.weight[:] = 15.0
    sparsifier = Sparsifier(model, "filter", "global", coupled=True, example_input=EXAMPLE, layers=["conv2", "conv3"])
    sparsifier.sparsify(0.4)
    # Ranks score 5.5, 11, 16.5 and 22 on 72 weights each; the filters of conv3, with 8 weights each, score 15. A layer
    # that is coupled with one that is not selected stays dense.
    assert dense_of(sparsifier)["conv3.weight"] == "coupled with stem.weight, which stays dense"
    assert alive(sparsifier, "conv2").tolist() == [False, False, True, True, True, True, False, False]


def test_equal_numbers_last_when_more_is_pruned_and_when_some_is_revived():
    model = trained(Block(width=32))
    sparsifier = Sparsifier(model, "filter", "local", coupled=True, example_input=EXAMPLE)
    numbers = []
    for sparsity in (0.2, 0.5, 0.75, 0.4):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*revives.*")
            sparsifier.sparsify(sparsity)
        with torch.no_grad():
            model.conv2.weight.add_(0.3 * torch.randn_like(model.conv2.weight))
            sparsifier.apply_masks()
        for name in ("conv1", "conv2"):
            counts = alive(sparsifier, name).unflatten(0, (4, 8)).sum(1)
            assert len(set(counts.tolist())) == 1
        numbers.append(int(counts[0]))
        small_of(copy.deepcopy(model))
    assert numbers == [6, 4, 2, 5]


def test_equal_numbers_last_when_weights_regrow():
    model = trained(Block(width=32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier = pruned(model, regrow="random")
        before = alive(sparsifier, "conv2")
        sparsifier.sparsify(0.5, drop=0.5)
    after = alive(sparsifier, "conv2")
    assert not torch.equal(before, after)
    assert after.unflatten(0, (4, 8)).sum(1).tolist() == [4, 4, 4, 4]


def test_masks_that_are_unequal_are_shrunk_as_far_as_the_groups_stay_equal():
    model = trained(Block())
    with torch.no_grad():
        for channel in (0, 1, 4, 8, 9, 12):
            for name in ("weight", "bias"):
                getattr(model.norm2, name)[channel] = 0
            model.conv2.weight[channel] = 0
    table = shrinkage(model, EXAMPLE)
    row = next(layer for layer in table.layers if layer.name == "conv2")
    assert (row.zeros, row.removed, row.zeros_left) == (6, 4, 2)
    assert row.why == "2: coupled with conv2, whose 4 groups must keep equal sizes"
    with pytest.warns(UserWarning, match="whose 4 groups must keep equal sizes"):
        small = shrink(model, EXAMPLE)
    assert small.conv2.weight.shape == (12, 4, 3, 3)


def test_a_group_whose_outputs_are_all_zero_is_removed_with_its_inputs():
    model = trained(Block())
    with torch.no_grad():
        for channel in (*range(4, 8), 0, 9, 15):  # all of group 1, and one of each other
            model.conv2.weight[channel] = 0
            model.norm2.weight[channel] = model.norm2.bias[channel] = 0
    small = small_of(model)
    assert small.conv2.groups == 3
    assert small.conv2.weight.shape == (9, 4, 3, 3)
    assert small.conv1.out_channels == 12


def test_a_layer_that_feeds_one_group_only_must_lose_as_much_as_the_others():
    class Sides(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 12, 1)
            self.conv, self.out = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Conv2d(16, 2, 1)

        def forward(self, x):
            return self.out(F.relu(self.conv(F.relu(torch.cat([self.left(x), self.right(x)], 1)))))

    model = Sides()
    sparsifier = pruned(model)
    assert alive(sparsifier, "left").sum() == 2
    assert alive(sparsifier, "right").unflatten(0, (3, 4)).sum(1).tolist() == [2, 2, 2]
    assert small_of(model).conv.weight.shape == (8, 2, 3, 3)
    with pytest.raises(ValueError, match="both need the same sparsity"):
        pruned(Sides(), {"left": 0.5, "right": 0.25, "conv": 0.5})
    dense = dense_of(pruned(Sides(), exclude="left"))
    assert dense["right.weight"] == "coupled with conv, whose 4 groups must keep equal sizes"


def test_convolutions_with_nested_groups_are_pruned_by_the_finer_ones():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(32, 2, 1)
            self.coarse, self.fine = nn.Conv2d(16, 16, 1, groups=2), nn.Conv2d(16, 16, 1, groups=4)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.out(F.relu(torch.cat([self.coarse(x), self.fine(x)], 1)))

    model = Nested()
    sparsifier = pruned(model)
    assert alive(sparsifier, "stem").unflatten(0, (4, 4)).sum(1).tolist() == [2] * 4
    small = small_of(model)
    assert small.coarse.weight.shape == (8, 4, 1, 1)
    assert small.fine.weight.shape == (8, 2, 1, 1)


def test_groups_that_overlap_unevenly_stay_with_the_reason():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.out = nn.Conv2d(3, 12, 1), nn.Conv2d(24, 2, 1)
            self.two, self.three = nn.Conv2d(12, 12, 1, groups=2), nn.Conv2d(12, 12, 1, groups=3)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.out(F.relu(torch.cat([self.two(x), self.three(x)], 1)))

    sparsifier = pruned(Uneven())
    assert dense_of(sparsifier)["stem.weight"] == "coupled with two, whose 2 groups must keep equal sizes"
    small = small_of(sparsifier.model)
    assert (small.two.out_channels, small.three.out_channels) == (6, 6)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 16), (8, 8)])
def test_a_group_with_one_input_is_only_removed_as_a_whole(inputs, outputs):
    model = trained(
        nn.Sequential(
            nn.Conv2d(3, inputs, 1), nn.BatchNorm2d(inputs), nn.ReLU(),
            nn.Conv2d(inputs, outputs, 3, padding=1, groups=inputs), nn.ReLU(), nn.Conv2d(outputs, 2, 1),
        )
    )  # fmt: skip
    sparsifier = pruned(model)
    kept = alive(sparsifier, "3").unflatten(0, (inputs, -1))
    assert torch.equal(kept.all(1), kept.any(1))
    assert torch.equal(kept.any(1), alive(sparsifier, "0"))
    assert small_of(model)[3].weight.shape == (outputs // 2, 1, 3, 3)


def test_transposed_convolutions_with_groups():
    model = trained(
        nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, 2, groups=2), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 2, 1),
        )
    )  # fmt: skip
    pruned(model)
    small = small_of(model)
    assert small[2].weight.shape == (4, 3, 2, 2)
    assert (small[2].in_channels, small[2].out_channels) == (4, 6)


def test_constants_that_a_grouped_convolution_reads_are_added_to_its_bias():
    model = trained(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.Conv2d(8, 2, 1))
    )
    with torch.no_grad():
        model[0].weight[[1, 6]] = 0
    small = small_of(model)
    assert small[2].weight.shape == (8, 3, 3, 3)
    added = torch.cat([
        model[0].bias[1].sigmoid() * model[2].weight[:4, 1].sum((1, 2)),
        model[0].bias[6].sigmoid() * model[2].weight[4:, 2].sum((1, 2)),
    ])  # fmt: skip
    torch.testing.assert_close(small[2].bias, added)


def test_several_inputs_for_each_output_of_a_group_are_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=4), nn.ReLU(), nn.Conv2d(4, 6, 1))
    with pytest.raises(ValueError, match="coupled with 2, which has several inputs for each output"):
        pruned(model)


# --- Group norms ------------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """A U-Net with group norms, transposed convolutions and concatenations."""

    def __init__(self, width=16, groups=4):
        super().__init__()
        torch.manual_seed(0)

        def block(inputs, outputs):
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(groups, outputs), nn.SiLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(groups, outputs), nn.SiLU(),
            )  # fmt: skip

        self.down1, self.down2, self.middle = block(3, width), block(width, 2 * width), block(2 * width, 2 * width)
        self.up, self.last = nn.ConvTranspose2d(2 * width, width, 2, 2), block(3 * width, width)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x):
        x = self.down2(self.down1(x))
        return self.out(self.last(torch.cat([self.up(self.middle(F.max_pool2d(x, 2))), x], 1)))


def test_a_unet_loses_whole_groups_of_its_group_norms():
    model = trained(UNet())
    sparsifier = pruned(model)
    assert dense_of(sparsifier) == {"out.weight": "yields the model's output"}
    kept = alive(sparsifier, "down1.0").unflatten(0, (4, 4))
    assert torch.equal(kept.all(1), kept.any(1))
    assert torch.equal(sparsifier.all_masks["down1.1.bias"], alive(sparsifier, "down1.0"))
    before = parameters(model)
    small = small_of(model)
    assert (small.down1[1].num_groups, small.down1[1].num_channels, small.down1[1].weight.shape) == (2, 8, (8,))
    assert parameters(small) < 0.3 * before
    assert isinstance(small.down1[1](torch.randn(2, 8, 4, 4)), torch.Tensor)
    small.train()(EXAMPLE).sum().backward()


def test_a_norm_group_with_a_channel_that_is_not_zero_is_kept():
    model = trained(nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 2, 1)))
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(model[0], name)[[0, 1, 2, 4, 5, 6, 7]] = 0
            getattr(model[1], name)[[0, 1, 2, 4, 5, 6, 7]] = 0
    with pytest.warns(
        UserWarning, match="3 of 7 zero filters.* in one group of 1 .GroupNorm. with channels that are not"
    ):
        small = shrink(model, EXAMPLE)
    assert (small[1].num_groups, small[1].num_channels) == (2, 8)
    expected = model(EXAMPLE)
    assert (small(EXAMPLE) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("norm_groups", [2, 4, 8, 16])
@pytest.mark.parametrize("groups", [2, 4, 8])
def test_group_norms_behind_grouped_convolutions(groups, norm_groups):
    model = trained(Block(groups=groups, norm=lambda width: nn.GroupNorm(norm_groups, width)))
    sparsifier = pruned(model)
    assert dense_of(sparsifier) == {"out.weight": "yields the model's output"}
    small = small_of(model)
    assert (small.norm2.num_channels, small.norm2.num_groups) == (8, norm_groups // 2)
    assert small.stem.out_channels == small.conv2.out_channels == small.conv2.in_channels == 8
    assert small.conv2.groups == (groups if norm_groups > groups else groups // 2)


# --- Whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regnet_y_400mf", "regnet_x_400mf", "resnext50_32x4d"])
def test_models_of_torchvision_are_pruned_in_all_layers(name):
    models = pytest.importorskip("torchvision", reason="its models are the test").models
    torch.manual_seed(0)
    model = trained(getattr(models, name)(num_classes=10))
    example = torch.randn(2, 3, 64, 64)
    sparsifier = pruned(model, example=example)
    assert list(dense_of(sparsifier).values()) == ["yields the model's output"]
    before = parameters(model)
    assert parameters(small_of(model, example)) < 0.3 * before


@pytest.mark.slow
@given(seed=st.integers(0, 10**6), sparsity=st.floats(0.2, 0.8), share=st.floats(0, 0.6))
@settings(max_examples=25, deadline=None)
def test_random_nets(seed, sparsity, share):
    net = RandomNet(random.Random(seed), constants=False).eval()
    example = torch.randn(2, 3, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(ValueError):  # if no layer can be pruned
            pruned(net, sparsity, example)
        expected = net(example)
        assert (shrink(net, example)(example) - expected).abs().max() <= 1e-5 * expected.abs().max()
        kill(net, random.Random(seed), share)
        expected = net(example)
        assert (shrink(net, example)(example) - expected).abs().max() <= 1e-5 * expected.abs().max()
