"""Building masks: which groups are pruned, against a slow oracle and by hand."""

import copy
import math
import warnings
from contextlib import nullcontext

import numpy as np
import oracle
import pytest
import torch
from conftest import (
    CRITERIA,
    EXAMPLE,
    GRANULARITIES,
    as_on_device,
    dense_of,
    has_ties,
    layers_of,
    levels_of,
    misses_sparsity,
    show_data,
    small_net,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from updates import moved, same_state

from sparsifai import Sparsifier, contexts, criteria
from sparsifai.axes.criterion import quantities_of
from sparsifai.sparsifier.layer import selected
from sparsifai.sparsifier.mask_building import build_masks
from sparsifai.sparsifier.regrowth import Regrowth


def expected_masks(sparsifier, scores, masks, sparsity, context):
    """The masks by the slow oracle; scores and masks: full-size arrays by parameter name."""
    table = {}
    pooled = oracle.squared_sums if sparsifier.ranking.options.criteria is criteria["taylor"] else oracle.pooled
    for name, target in layers_of(sparsifier).items():
        axes, shape = tuple(target.axes), tuple(target.parameter.shape)
        by_axes = oracle.MATRIX if len(axes) == 2 else oracle.CONVOLUTION
        indexed = by_axes[sparsifier.ranking.options.granularity.__name__]
        groups = oracle.groups_of(shape, axes, indexed, target.convolution_groups)
        table[name] = (shape, groups, [
            (score, len(group), not masks[name][group[0]])
            for score, group in zip(pooled(scores[name], groups), groups, strict=True)
        ])  # fmt: skip
    whole = sparsifier.ranking.options.granularity.__name__ == "layer"
    scopes = [[name] for name in table] if context == "local" else [list(table)]
    result = {}
    for names in scopes:
        pruned = oracle.fallen([table[name][2] for name in names], sparsity, whole)
        result.update({name: oracle.mask_of(*table[name][:2], each) for name, each in zip(names, pruned, strict=True)})
    return result


@pytest.mark.filterwarnings("ignore:taylor")
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@misses_sparsity
def test_every_combination_prunes_what_the_oracle_prunes(granularity, context, criterion):
    model = small_net()
    sparsifier = Sparsifier(model, granularity, context, criterion, example_input=EXAMPLE)
    hopeless = (granularity, context) == ("layer", "local")  # each layer is its own best group
    for sparsity in (0.3, 0.8):
        moved(model)
        sparsifier.apply_masks()
        show_data(sparsifier)
        masks = {
            name: mask.expand_as(sparsifier.layers[name].parameter).numpy() for name, mask in sparsifier.masks.items()
        }
        random = copy.deepcopy(sparsifier.collected.source.rng)
        scores = {}
        for name in layers_of(sparsifier):
            function = criteria[criterion]
            known = {key: sparsifier.collected.value(key, name) for key in quantities_of(function)}
            if "rng" in known:
                known["rng"] = random
            scores[name] = function(**known).numpy()
        sparsifier.collected.source.forget()
        expected = expected_masks(sparsifier, scores, masks, sparsity, context)
        with pytest.warns(UserWarning, match="no group can be pruned") if hopeless else nullcontext():
            sparsifier.sparsify(sparsity)
        for name, target in layers_of(sparsifier).items():
            mask = sparsifier.masks[name].expand_as(target.parameter).numpy()
            assert (mask == expected[name]).all(), name
            assert (target.parameter.detach().numpy()[~mask] == 0).all()


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


VALUES = {
    "normal": lambda shape: torch.randn(shape),
    "constant": lambda shape: torch.full(shape, 0.25),
    "zero": torch.zeros,
    "4-bit grid": lambda shape: torch.randint(-8, 8, shape) / 8,
    "infinite": lambda shape: torch.where(torch.rand(shape) < 0.3, math.inf, torch.randn(shape)),
}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3
    ),
    dtype=st.sampled_from(DTYPES),
    values=st.sampled_from(sorted(VALUES)),
    level=st.one_of(st.floats(0, 1), st.sampled_from([0, 0.5, 1])),
    context=st.sampled_from(["local", "global"]),
    granularity=st.sampled_from(["weight", "kernel", "row", "shared_weight", "vertical_slice"]),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
@misses_sparsity
@has_ties
def test_random_shapes_dtypes_ties_layouts_and_levels(
    shapes, dtype, values, level, context, granularity, channels_last, seed
):
    torch.manual_seed(seed)
    model = nn.ModuleList(nn.Conv2d(inputs, out, (h, w), bias=False) for out, inputs, h, w in shapes).to(dtype)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(VALUES[values](layer.weight.shape))
    try:
        sparsifier = Sparsifier(model, granularity, context)
    except ValueError as error:
        assert "has 1 group" in str(error)  # noqa: PT017
        return
    weights = {name: target.parameter.detach().clone() for name, target in layers_of(sparsifier).items()}
    scores = {name: weight.float().abs().numpy() for name, weight in weights.items()}
    masks = {name: torch.ones(weight.shape, dtype=torch.bool).numpy() for name, weight in weights.items()}
    expected = expected_masks(sparsifier, scores, masks, level, context)
    sparsifier.sparsify(level)
    for name, target in layers_of(sparsifier).items():
        mask = sparsifier.masks[name].expand_as(target.parameter).numpy()
        assert (mask == expected[name]).all()
        kept = torch.from_numpy(expected[name])
        assert torch.equal(target.parameter, torch.where(kept, weights[name], torch.zeros((), dtype=dtype)))
        assert target.parameter.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", [0.1, 0.29, 0.5, 0.777, 0.95])
@has_ties
def test_all_equal_weights_are_counted_exactly(dtype, level):
    model = nn.Linear(37, 41, bias=False).to(dtype)
    nn.init.constant_(model.weight, 0.3)
    sparsifier = Sparsifier(model)
    sparsifier.sparsify(level)
    count = math.floor(level * 37 * 41 + 0.5)
    assert (model.weight == 0).sum() == count
    assert (model.weight.flatten()[:count] == 0).all()


@pytest.mark.slow
def test_half_of_the_weights_of_resnet18_by_filters():
    resnet = pytest.importorskip("torchvision").models.resnet18(weights=None)
    sparsifier = Sparsifier(resnet, "filter", "global")
    sparsifier.sparsify(0.5)
    selected = sparsifier.report().selected
    largest = max(target.parameter[0].numel() for target in layers_of(sparsifier).values())
    assert abs(selected.zeros - selected.weights / 2) <= largest / 2
    assert selected.weights == sum(p.numel() for p in resnet.parameters() if p.dim() == 4)
    with torch.no_grad():
        assert resnet.eval()(torch.randn(2, 3, 64, 64)).isfinite().all()


# All but those that rank within filters or reach only some sparsities.
GENERAL = [name for name in contexts if name not in ("per_output", "uniform_plus")]


@pytest.mark.filterwarnings("ignore:a falling sparsity revives whole outputs")
@pytest.mark.parametrize("granularity", ["weight", "filter", "kernel"])
@pytest.mark.parametrize("context", GENERAL)
@misses_sparsity
def test_a_rising_sparsity_only_prunes_and_a_falling_one_revives(granularity, context):
    model = small_net()
    sparsifier = Sparsifier(model, granularity, context)
    before = {name: torch.ones_like(mask) for name, mask in sparsifier.masks.items()}
    for level in (0.1, 0.2, 0.21, 0.22, 0.5, 0.5, 0.51, 0.9):
        moved(model)
        sparsifier.apply_masks()
        sparsifier.sparsify(level)
        assert all((mask <= before[name]).all() for name, mask in sparsifier.masks.items())
        before = dict(sparsifier.masks)
    for level in (0.7, 0.3, 0.0):
        sparsifier.sparsify(level)
        assert all((mask >= before[name]).all() for name, mask in sparsifier.masks.items())
        before = dict(sparsifier.masks)
    assert all(mask.all() for mask in sparsifier.masks.values())
    assert sparsifier.sparsity > 0.85  # revived weights are zero until they are trained


@pytest.mark.parametrize("level", [0.1, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("context", GENERAL)
@misses_sparsity
def test_round_to_keeps_multiples_in_every_layer(level, context, net):
    sparsifier = Sparsifier(net, "filter", context, round_to=4)
    sparsifier.sparsify(level)
    assert dense_of(sparsifier)["10.weight"] == "has 6 groups, of which 4 must be kept"
    assert all(int(mask.sum()) in (4, 8) for mask in sparsifier.masks.values())
    thirds = Sparsifier(small_net(), "filter", context, round_to=3)
    thirds.sparsify(level)
    assert all(int(mask.sum()) in (3, 6, mask.numel()) for mask in thirds.masks.values())  # or all 8
    with pytest.raises(ValueError, match="has 8 groups"):
        Sparsifier(small_net(), "filter", round_to=5)


@misses_sparsity
def test_with_round_to_pruned_groups_stay_pruned_while_scores_change():
    model = small_net()
    sparsifier = Sparsifier(model, "filter", round_to=2)
    before = dict(sparsifier.masks)
    for level in (0.2, 0.4, 0.6, 0.8):
        moved(model)
        sparsifier.sparsify(level)
        assert all((mask <= before[name]).all() for name, mask in sparsifier.masks.items())
        assert all(int(mask.sum()) % 2 == 0 for mask in sparsifier.masks.values())
        before = dict(sparsifier.masks)


def test_the_pooling_decides_the_score_of_a_group():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 0], [2, 2]]))
    for pool, pruned in (("mean", 0), ("max", 1), ("sum", 0), ("l2", 1)):
        layer = copy.deepcopy(model)
        Sparsifier(layer, "row", layers="weight", pool=pool).sparsify(0.5)
        assert (layer.weight[pruned] == 0).all(), pool
        assert (layer.weight[1 - pruned] != 0).any(), pool


def test_the_seed_decides_which_weights_random_prunes():
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        sparsifier = Sparsifier(small_net(), criteria="random", seed=seed)
        torch.manual_seed(len(masks))  # torch's own generator must not matter
        sparsifier.sparsify(0.5)
        masks.append(torch.cat([mask.flatten() for mask in sparsifier.masks.values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_weights_in_half_precision_are_scored_in_float32():
    model = nn.Linear(4, 4).to(torch.bfloat16)
    seen = []
    Sparsifier(model, criteria=lambda weight, init: seen.append((weight.dtype, init.dtype)) or weight.abs()).sparsify(
        0.5
    )
    assert seen == [(torch.float32, torch.float32)]


def test_weights_in_float64_are_ranked_in_float64():
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(1 + torch.tensor([[3.0, 1, 2, 0]], dtype=torch.float64) * 1e-12)
    Sparsifier(model).sparsify(0.5)
    assert (model.weight == 0).tolist() == [[False, True, False, True]]


def test_a_context_of_your_own_is_a_function(net):
    def only_the_first(layers, sparsity):
        import numpy as np

        return [
            contexts["local"]([layers[0]], sparsity)[0],
            *(np.ones(len(layer.score), bool) for layer in layers[1:]),
        ]

    sparsifier = Sparsifier(net, context=only_the_first)
    sparsifier.sparsify(0.5)
    assert [row.count.sparsity for row in sparsifier.report().rows] == [0.5, 0, 0, 0, 0]


def test_no_context_revives_weights_while_the_sparsity_rises(net):
    def always_the_last(layers, sparsity):
        kept = [np.zeros(len(layer.score), bool) for layer in layers]
        for each in kept:
            each[-1 if sparsity < 0.7 else 0] = True
            each[1] = True
        return kept

    sparsifier = Sparsifier(net, context=always_the_last)
    sparsifier.sparsify(0.5)
    sparsifier.sparsify(0.9)
    assert all(mask.flatten().nonzero().tolist() == [[1]] for mask in sparsifier.masks.values())
    sparsifier.sparsify(0.6)
    assert all(mask.sum() == 2 for mask in sparsifier.masks.values())


def masked_share(sparsifier):
    """The sparsity of the masks; revived weights are zero until they are trained."""
    masks = [mask.float().mean() * mask.numel() for mask in sparsifier.masks.values()]
    return 1 - float(sum(masks)) / sum(mask.numel() for mask in sparsifier.masks.values())


@pytest.mark.parametrize("on_device", [False, True])
def test_a_falling_global_sparsity_is_exact_if_some_layers_were_below_it(on_device):
    for levels, lower in (((0.9, 0.3), 0.4), ((0.9, 0.1), 0.3)):
        sparsifier = Sparsifier(nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 40)))
        if on_device:
            as_on_device(sparsifier)
        sparsifier.sparsify({"0": levels[0], "1": levels[1]})
        before = sparsifier.masks
        sparsifier.sparsify(lower)
        assert masked_share(sparsifier) == pytest.approx(lower)
        assert torch.equal(sparsifier.masks["1.weight"], before["1.weight"])
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 40))
    Sparsifier(model).sparsify({"0": 0.75, "1": 0.25})
    sparsifier = Sparsifier(model)
    sparsifier.recover_masks()
    sparsifier.sparsify(0.4)
    assert masked_share(sparsifier) == pytest.approx(0.4)


def test_a_criterion_that_fails_late_changes_nothing(net):
    calls = []

    def fails_late(weight):
        calls.append(weight)
        if len(calls) > 8:
            raise ZeroDivisionError("late")
        return weight.abs()

    sparsifier = Sparsifier(net, "kernel", "local", fails_late)
    sparsifier.sparsify(0.3)
    before, masks, levels = [p.clone() for p in net.parameters()], dict(sparsifier.masks), dict(levels_of(sparsifier))
    with pytest.raises(ZeroDivisionError, match="late"):
        sparsifier.sparsify(0.6)
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    assert sparsifier.masks == masks
    assert levels_of(sparsifier) == levels


def test_nan_in_pruned_weights_does_not_matter(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.5)
    with torch.no_grad():
        mlp[0].weight[~sparsifier.masks["0.weight"]] = math.nan
    sparsifier.sparsify(0.6)
    assert sparsifier.report().selected.zeros == 29  # 28.8 of 48


def test_a_criterion_that_compares_warns_before_any_training(mlp):
    sparsifier = Sparsifier(mlp, criteria="movement")
    sparsifier.check(0.5)
    with pytest.warns(UserWarning, match="compares"):
        sparsifier.sparsify(0.5)


def test_revived_outputs_give_a_warning_and_revived_weights_do_not():
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    sparsifier = Sparsifier(model, "filter")
    sparsifier.sparsify(0.5)
    with pytest.warns(UserWarning, match="revives"):
        sparsifier.sparsify(0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.sparsify(0.5)
        for level in (0.5, 0.2):
            Sparsifier(model).sparsify(level)


def snapshot(sparsifier):
    """All that a Sparsifier and its model hold, copied; and the masks and weights themselves."""
    held = [*sparsifier.masks.values(), *sparsifier.model.parameters()]
    return copy.deepcopy((sparsifier.state_dict(), sparsifier.model.state_dict())), held


def assert_unchanged(sparsifier, before):
    (state, weights), held = before
    assert all(one is other for one, other in zip(held, snapshot(sparsifier)[1], strict=True))
    assert same_state(sparsifier.state_dict(), state)
    assert same_state(sparsifier.model.state_dict(), weights)


def centred(weight):
    """Works on the whole layer, and in place."""
    return weight.sub_(weight.mean()).abs_()


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("criterion", ["large_final", "random", "movement", "snip", "synflow", centred])
@pytest.mark.parametrize("granularity", ["weight", "kernel"])
def test_build_masks_returns_new_masks_and_changes_nothing(granularity, criterion, drop, net):
    sparsifier = Sparsifier(net, granularity, criteria=criterion, regrow="random", example_input=EXAMPLE)
    moved(net)
    show_data(sparsifier)
    sparsifier.sparsify(0.3)
    moved(net)  # pruned weights included, as by a step
    before = snapshot(sparsifier)
    layers = selected(sparsifier.layers)
    regrowth = Regrowth(criteria["random"], sparsifier.collected.source)
    asked = [(0.6, list(layers))]
    new, again = (
        build_masks(layers, asked, sparsifier.ranking, sparsifier.collected, regrowth, drop) for _ in range(2)
    )
    assert_unchanged(sparsifier, before)
    assert new.levels == dict.fromkeys(layers, 0.6)
    share = 1 - sum(int(mask.expand_as(layers[name].parameter).sum()) for name, mask in new.masks.items()) / sum(
        layer.parameter.numel() for layer in layers.values()
    )
    assert share == pytest.approx(0.6, abs=0.01)
    assert all(torch.equal(mask, again.masks[name]) for name, mask in new.masks.items())
    draws = criterion == "random" or drop > 0
    assert torch.equal(new.random, sparsifier.collected.source.rng.get_state()) is not draws


def test_build_masks_restores_the_generator_if_it_fails(net):
    def draws_and_fails(weight, rng):
        torch.rand(3, generator=rng)
        raise ZeroDivisionError("drawn")

    sparsifier = Sparsifier(net, criteria=draws_and_fails)
    before = snapshot(sparsifier)
    layers = selected(sparsifier.layers)
    with pytest.raises(ZeroDivisionError, match="drawn"):
        build_masks(layers, [(0.5, list(layers))], sparsifier.ranking, sparsifier.collected)
    assert_unchanged(sparsifier, before)
