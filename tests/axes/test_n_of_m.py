"""N:M and tiles: exact counts in every block, also with ties and in a shorter last block."""

import math

import numpy as np
import pytest
import torch
from conftest import has_ties, layers_of, misses_sparsity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsifai import Sparsifier, blocks, is_nm


def expected_mask(score, alive, size, count, axis):
    """Block by block: the `count` lowest of each are pruned, masked ones first, ties in index order."""
    moved, alive = np.moveaxis(score, axis, -1), np.moveaxis(alive, axis, -1)
    kept = np.ones(moved.shape, bool)
    for place in np.ndindex(moved.shape[:-1]):
        for start in range(0, moved.shape[-1], size):
            block = slice(start, start + size)
            values, was = moved[place][block], alive[place][block]
            order = np.lexsort((values, was))
            pruned = max(count - (size - len(values)), 0)
            kept[place][start + order[:pruned]] = False
    return np.moveaxis(kept, -1, axis)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(2, 9), st.integers(2, 20)),
        st.tuples(st.integers(2, 6), st.integers(2, 11), st.integers(1, 3), st.integers(1, 3)),
    ),
    size=st.integers(2, 12),
    axis=st.sampled_from([0, 1]),
    levels=st.lists(st.floats(0, 1), min_size=1, max_size=3).map(sorted),
    ties=st.booleans(),
    part=st.sampled_from([10, 10**6]),
    seed=st.integers(0, 99),
)
@misses_sparsity
@has_ties
def test_blocks_against_a_loop_over_them(shape, size, axis, levels, ties, part, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2:])
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape))
        if ties:
            layer.weight.mul_(2).round_()
    sparsifier = Sparsifier(nn.Sequential(layer), context=blocks(size, axis=("out", "in")[axis]), layers=[layer])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsifai.axes.n_of_m.CHUNK", part)
        for level in levels:
            alive = sparsifier.masks["0.weight"].numpy().copy()
            score = layer.weight.detach().abs().numpy().copy()
            sparsifier.sparsify(level)
            count = min(math.floor(level * size + 0.5), size - 1)
            assert (sparsifier.masks["0.weight"].numpy() == expected_mask(score, alive, size, count, axis)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_two_of_four_in_every_dtype_and_layout(dtype, layout):
    layer = nn.Conv2d(16, 8, 3).to(dtype=dtype, memory_format=layout)
    sparsifier = Sparsifier(nn.Sequential(layer), context="2:4", layers=[layer])
    sparsifier.sparsify(0.5)
    assert is_nm(layer.weight, 2, 4)
    assert not is_nm(layer.weight, 1, 4)
    assert (layer.weight.detach().unflatten(1, (4, 4)) != 0).sum(2).eq(2).all()


def test_a_rising_sparsity_reaches_two_of_four_in_whole_steps():
    model = nn.Sequential(nn.Linear(8, 4))
    sparsifier = Sparsifier(model, context="2:4", layers=["0"])
    seen = []
    for level in np.linspace(0, 0.5, 9):
        sparsifier.sparsify(float(level))
        seen.append(sparsifier.sparsity)
    assert seen == [0, 0, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="prunes at most 0.5"):
        sparsifier.sparsify(0.6)
    sparsifier.sparsify(0.25)
    assert is_nm(sparsifier.masks["0.weight"], 3, 4)
    assert not is_nm(sparsifier.masks["0.weight"], 2, 4)


@misses_sparsity
def test_a_shorter_last_block_is_filled_up_with_zeros_and_reported():
    layer = nn.Linear(6, 5)
    sparsifier = Sparsifier(nn.Sequential(layer), context="2:4", layers=[layer])
    sparsifier.sparsify(0.5)
    assert (layer.weight[:, :4] != 0).sum(1).eq(2).all()
    assert (layer.weight[:, 4:] != 0).all()
    assert is_nm(layer.weight, 2, 4)
    assert "6 along 'in' is no multiple of 4: the last block has 2" in str(sparsifier.report())
    assert "multiple" not in str(Sparsifier(nn.Sequential(nn.Linear(8, 5)), context="2:4", layers=["0"]).report())


def test_kernels_and_rows_make_blocks_of_groups():
    layer = nn.Conv2d(8, 6, 3)
    sparsifier = Sparsifier(nn.Sequential(layer), "kernel", "2:4", layers=[layer])
    sparsifier.sparsify(0.5)
    assert sparsifier.masks["0.weight"].squeeze().unflatten(1, (2, 4)).sum(2).eq(2).all()
    along_outputs = Sparsifier(nn.Sequential(nn.Linear(5, 8)), "row", blocks(4, axis="out"), layers=["0"])
    along_outputs.sparsify(0.75)
    assert along_outputs.masks["0.weight"].flatten().view(2, 4).sum(1).eq(1).all()


def test_a_falling_sparsity_revives_the_best_of_each_block():
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 1.0, 3.0, 2.0]]))
    sparsifier = Sparsifier(nn.Sequential(layer), context=blocks(4), layers=[layer])
    for level, kept in ((0.5, [1, 0, 1, 0]), (0.75, [1, 0, 0, 0]), (0.5, [1, 0, 0, 1])):
        sparsifier.sparsify(level)
        # Revived weights are zero; of equal scores the later ranks higher.
        assert sparsifier.masks["0.weight"].int().tolist() == [kept]


@pytest.mark.parametrize(
    "granularity", ["4x2", (lambda axes: {"out": 4, "in": 2, **dict.fromkeys(axes.keys() - {"out", "in"}, 1)})]
)
def test_tiles_of_outputs_by_inputs(granularity):
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Linear(6, 8))
    sparsifier = Sparsifier(model, granularity, "local", layers=["0", "1"])
    weights = {name: target.parameter.detach().clone() for name, target in layers_of(sparsifier).items()}
    sparsifier.sparsify(0.5)
    for name, weight in weights.items():
        tiles = weight.abs().double().unflatten(0, (2, 4)).unflatten(2, (3, 2)).mean((1, 3))
        order = tiles.flatten().argsort()
        expected = torch.ones(tiles.numel(), dtype=torch.bool)
        expected[order[: tiles.numel() // 2]] = False
        kept = sparsifier.masks[name].unflatten(0, (2, 4)).unflatten(2, (3, 2))
        assert torch.equal(kept.all(3).all(1), kept.any(3).any(1))
        assert torch.equal(kept.all(3).all(1).flatten(), expected)
