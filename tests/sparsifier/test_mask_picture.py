"""Pictures of masks: the pixels against the masks."""

import numpy as np
import pytest
import torch
from torch import nn

from sparsifai import KeepSparsity, Sparsifier
from sparsifai.sparsifier.mask_picture import mask_image, plot_masks

matplotlib = pytest.importorskip("matplotlib", reason="the pictures are drawn with it")
matplotlib.use("Agg")
pytestmark = pytest.mark.usefixtures("closing_figures")


def pixels_of(ax):
    return ax.images[0].get_array().filled(np.nan)


def net():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 300)
    )
    sparsifier = Sparsifier(model, context="local")
    sparsifier.sparsify(0.5)
    return sparsifier


def test_a_matrix_has_a_pixel_for_each_weight():
    sparsifier = net()
    (ax,) = sparsifier.plot_masks("4")
    assert np.array_equal(pixels_of(ax), sparsifier.masks["4.weight"].float().numpy())
    assert ax.get_title() == "4.weight\n5x6, 50.00% pruned"


def test_kernels_are_tiles_with_lines_between_them():
    sparsifier = net()
    (ax,) = sparsifier.plot_masks("0")
    image, mask = pixels_of(ax), sparsifier.masks["0.weight"]
    assert image.shape == (4 * 4 - 1, 3 * 4 - 1)
    for out in range(4):
        for channel in range(3):
            tile = image[4 * out : 4 * out + 3, 4 * channel : 4 * channel + 3]
            assert np.array_equal(tile, mask[out, channel].float().numpy())
    assert np.isnan(image[3::4]).all()
    assert np.isnan(image[:, 3::4]).all()


def test_large_layers_are_pooled_to_their_density():
    mask = torch.rand(64, 32) < 0.3
    image = mask_image(mask, ("out", "in"), 16)
    assert image == pytest.approx(mask.float().view(16, 4, 16, 2).mean((1, 3)).numpy())
    kernels = torch.rand(8, 8, 2, 2) < 0.5  # tiles without lines, two of their rows and columns to a pixel
    assert mask_image(kernels, ("out", "in", "h", "w"), 8) == pytest.approx(kernels.float().mean((2, 3)).numpy())


def test_axes_are_taken_by_their_names():
    mask = torch.rand(4, 6) < 0.5
    assert np.array_equal(mask_image(mask, ("in", "out"), 128), mask.T.float().numpy())
    experts = torch.rand(2, 4, 6) < 0.5
    assert np.array_equal(mask_image(experts, ("expert", "out", "in"), 128), experts.reshape(8, 6).float().numpy())
    volume = torch.rand(2, 3, 2, 2, 2) < 0.5
    assert mask_image(volume, ("out", "in", "d", "h", "w"), 128).shape == (2 * 5 - 1, 3 * 3 - 1)


def test_a_mask_of_groups_is_shown_in_the_shape_of_the_weight():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    sparsifier = Sparsifier(model, "row", exclude="1")
    sparsifier.sparsify(0.5)
    (ax,) = sparsifier.plot_masks()
    assert pixels_of(ax).shape == (4, 6)
    assert np.array_equal(pixels_of(ax), (model[0].weight != 0).float().numpy())


def test_lines_stand_between_the_heads_of_an_attention():
    model = nn.TransformerEncoderLayer(16, 4, 32)
    sparsifier = Sparsifier(model)
    sparsifier.sparsify(0.5)
    fused, out = sparsifier.plot_masks("self_attn")
    assert [line.get_ydata()[0] for line in fused.lines] == [4 * head - 0.5 for head in range(1, 12)]
    assert [line.get_xdata()[0] for line in out.lines] == [3.5, 7.5, 11.5]
    assert fused.figure.get_suptitle() == "orange: attention heads"


def test_layers_are_chosen_by_patterns_and_of_many_the_first_are_drawn():
    sparsifier = net()
    assert [ax.get_title().split("\n")[0] for ax in sparsifier.plot_masks(["0", nn.Linear])] == [
        "0.weight", "4.weight", "5.weight",
    ]  # fmt: skip
    many = Sparsifier(nn.Sequential(*(nn.Linear(2, 2) for _ in range(20))))
    axes = many.plot_masks()
    assert len(axes) == 16
    assert axes[0].figure.get_suptitle() == "the first 16 of 20 pruned layers; layers= chooses others"
    assert len(many.plot_masks("*")) == 20


def test_given_axes_are_drawn_on():
    sparsifier = net()
    _, axes = matplotlib.pyplot.subplots(1, 2)
    assert sparsifier.plot_masks("0", ax=axes[0]) == [axes[0]]
    assert sparsifier.plot_masks(nn.Linear, ax=axes) == list(axes)


def test_mistakes():
    sparsifier = net()
    _, ax = matplotlib.pyplot.subplots()
    with pytest.raises(ValueError, match="plot_masks: 1 axes are given for 2 layers; give one for each, or choose lay"):
        sparsifier.plot_masks(nn.Linear, ax=ax)
    with pytest.raises(ValueError, match="no layer with a weight to sparsify matches 'head'"):
        sparsifier.plot_masks("head")
    with pytest.raises(ValueError, match="pixels must be a whole number of at least 1, not 0"):
        sparsifier.plot_masks(pixels=0)


@pytest.mark.fastai
def test_the_masks_that_a_learner_keeps(make_learner):
    learn = make_learner()
    with torch.no_grad():
        learn.model[0].weight[:, ::2] = 0
    learn.add_cb(KeepSparsity())
    learn.fit(1)
    (ax,) = learn.keep_sparsity.plot_masks("0")
    kept = (learn.model[0].weight != 0).float().numpy()  # 2 channels of 3x3
    assert np.array_equal(pixels_of(ax)[0], [*kept[0, 0, 0], np.nan, *kept[0, 1, 0]], equal_nan=True)


def test_without_a_mask_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match="plot_masks: there is no mask to draw, because nothing is pruned"):
        plot_masks(nn.Linear(2, 2), {}, None, 128, None)
