import copy
import functools
import gc
import io
import math
import pickle
import warnings
import weakref
from contextlib import nullcontext

import numpy as np
import oracle
import pytest
import torch
from conftest import EXAMPLE, dense_of, layers_of, levels_of, show_data, small_net
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sparsifai import Sparsifier, contexts, criteria, granularities, quantities, schedules, taken
from sparsifai.axes.criterion import quantities_of


def moved(model):
    """As after some training: every parameter somewhere else."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


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
        falls = oracle.fallen([table[name][2] for name in names], sparsity, whole)
        result.update({name: oracle.mask_of(*table[name][:2], fell) for name, fell in zip(names, falls, strict=True)})
    return result


@pytest.mark.filterwarnings("ignore:taylor")
@pytest.mark.parametrize("criterion", criteria)
@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("granularity", granularities)
def test_every_combination_meets_its_target_as_the_oracle_counts(granularity, context, criterion):
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
        assert "has 1 group, of which 1 must stay" in str(error)  # noqa: PT017
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


# Not of filters, and not of every level.
GENERAL = [name for name in contexts if name not in ("per_output", "uniform_plus")]


@pytest.mark.filterwarnings("ignore:a falling sparsity revives whole outputs")
@pytest.mark.parametrize("granularity", ["weight", "filter", "kernel"])
@pytest.mark.parametrize("context", GENERAL)
def test_rising_only_adds_zeros_and_falling_revives(granularity, context):
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


@pytest.mark.parametrize("schedule", [name for name in schedules if name != "dsd"])
def test_a_loop_over_every_schedule_ends_at_the_target(schedule, mlp):
    sparsifier = Sparsifier(mlp)
    for step in range(1, 8):
        sparsifier.sparsify(0.9 * schedules[schedule](step / 7))
    assert sparsifier.report().selected.zeros == 43  # 43.2 of 48


def test_a_dictionary_ranks_each_part_on_its_own_and_leaves_the_rest(net):
    sparsifier = Sparsifier(net, context="local")
    untouched = net[10].weight.clone()
    sparsifier.sparsify({"[0-5]": 0.5, "5": 0.25, nn.Linear: 0.9, "10": 0.0})
    rows = {row.name: row.count for row in sparsifier.report().rows}
    assert rows["0.weight"].sparsity == rows["3.weight"].sparsity == 0.5
    assert rows["5.weight"].sparsity == 0.25
    assert rows["12.weight"].zeros == 16  # 16.2 of 18
    assert torch.equal(net[10].weight, untouched)
    sparsifier.sparsify({"10": 0.5})
    assert rows["12.weight"].zeros == (net[12].weight == 0).sum()
    assert (net[10].weight == 0).sum() == 24
    jointly = Sparsifier(small_net())
    jointly.sparsify({"[035]": 0.5})
    joint = [row.count for row in jointly.report().rows[:3]]
    assert sum(count.zeros for count in joint) == math.floor(sum(count.weights for count in joint) / 2 + 0.5)


def test_a_pattern_of_a_dictionary_that_means_no_sparse_layer_is_an_error(net):
    sparsifier = Sparsifier(net, exclude="10")
    with pytest.raises(ValueError, match="matches 'nothing'"):
        sparsifier.sparsify({"0": 0.5, "nothing": 0.5})
    with pytest.raises(ValueError, match="'10' matches only layers that stay dense .10.weight: excluded."):
        sparsifier.sparsify({"0": 0.5, "10": 0.5})
    assert all(mask.all() for mask in sparsifier.masks.values())


@pytest.mark.parametrize("level", [0.1, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("context", GENERAL)
def test_round_to_keeps_multiples_in_every_layer(level, context, net):
    sparsifier = Sparsifier(net, "filter", context, round_to=4)
    sparsifier.sparsify(level)
    assert dense_of(sparsifier)["10.weight"] == "has 6 groups, of which 4 must stay"
    assert all(int(mask.sum()) in (4, 8) for mask in sparsifier.masks.values())
    thirds = Sparsifier(small_net(), "filter", context, round_to=3)
    thirds.sparsify(level)
    assert all(int(mask.sum()) in (3, 6, mask.numel()) for mask in thirds.masks.values())  # or all 8
    with pytest.raises(ValueError, match="has 8 groups, of which 5 must stay"):
        Sparsifier(small_net(), "filter", round_to=5)


@pytest.mark.parametrize("round_to", [0, -2, 1.5, True])
def test_round_to_is_a_whole_number(mlp, round_to):
    with pytest.raises(ValueError, match="round_to must be a whole number of groups, at least 1"):
        Sparsifier(mlp, round_to=round_to)


def test_pool_changes_what_a_group_scores():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 0], [2, 2]]))
    for pool, fallen in (("mean", 0), ("max", 1), ("sum", 0), ("l2", 1)):
        layer = copy.deepcopy(model)
        Sparsifier(layer, "row", layers="weight", pool=pool).sparsify(0.5)
        assert (layer.weight[fallen] == 0).all(), pool
        assert (layer.weight[1 - fallen] != 0).any(), pool


def test_gradients_of_masked_weights_are_zero_even_when_not_finite(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.5)
    mlp(torch.randn(3, 4)).sum().backward()
    mlp[0].weight.grad[0] = math.inf
    mlp[0].weight.grad[1] = math.nan
    before = mlp[0].weight.grad.clone()
    sparsifier.mask_gradients()
    mask = sparsifier.masks["0.weight"]
    assert (mlp[0].weight.grad[~mask] == 0).all()
    assert torch.equal(mlp[0].weight.grad[mask].nan_to_num(7), before[mask].nan_to_num(7))


def test_masks_are_applied_to_what_is_not_finite(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.5)
    with torch.no_grad():
        mlp[0].weight.fill_(math.inf)
        mlp[2].weight.fill_(math.nan)
    sparsifier.apply_masks()
    assert sparsifier.sparsity == 0.5


def test_a_sparse_gradient_of_an_embedding_does_not_break_masking():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2))
    sparsifier = Sparsifier(model, layers=["0", "2"])
    sparsifier.sparsify(0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randint(10, (3, 2))).sum().backward()
    sparsifier.mask_gradients()
    optimizer.step()
    sparsifier.apply_masks()
    assert sparsifier.sparsity == 0.5


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_plain_loop_keeps_the_zeros(net, optimizer):
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    step = optimizer(net.parameters(), 0.05, weight_decay=0.1, **options)
    sparsifier = Sparsifier(net, "filter")
    sparsifier.sparsify(0.5)
    before, followed = sparsifier.report().selected.zeros, dict(sparsifier.follower_masks)
    assert any(not mask.all() for mask in followed.values())
    for _ in range(5):
        step.zero_grad()
        nn.functional.cross_entropy(net(torch.randn(8, 2, 8, 8)), torch.randint(3, (8,))).backward()
        sparsifier.mask_gradients()
        step.step()
        sparsifier.apply_masks()
        assert sparsifier.report().selected.zeros == before
        parameters = dict(net.named_parameters())
        assert all((parameters[name][~mask] == 0).all() for name, mask in followed.items())


def test_nothing_is_left_on_the_model(net):
    keys, objects = list(net.state_dict()), {name: id(parameter) for name, parameter in net.named_parameters()}
    sparsifier = Sparsifier(net, "filter", criteria="magnitude_increase")
    moved(net)
    sparsifier.sparsify(0.5)
    assert list(net.state_dict()) == keys
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == objects
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in net.modules()
    )
    assert all(not parameter._backward_hooks for parameter in net.parameters())
    assert len(list(net.buffers())) == len(list(small_net().buffers()))
    copied = copy.deepcopy(net)
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), net.parameters(), strict=True))
    pickle.loads(pickle.dumps(net)).load_state_dict(net.state_dict(), strict=True)


@pytest.mark.parametrize("criterion", ["large_final", "random", "updating_movement", "magnitude_increase"])
def test_state_dict_resumes_bit_for_bit(criterion):
    def run(sparsifier, model, levels):
        for level in levels:
            moved(model)
            sparsifier.apply_masks()
            sparsifier.sparsify(level)

    model = small_net()
    sparsifier = Sparsifier(model, "kernel", criteria=criterion)
    run(sparsifier, model, (0.2, 0.4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "sparsifier": sparsifier.state_dict()}, file)
    torch.manual_seed(5)
    run(sparsifier, model, (0.6, 0.8))

    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = small_net()
    resumed.load_state_dict(state["model"])
    again = Sparsifier(resumed, "kernel", criteria=criterion)
    again.load_state_dict(state["sparsifier"])
    torch.manual_seed(5)
    run(again, resumed, (0.6, 0.8))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(mask, again.masks[name]) for name, mask in sparsifier.masks.items())
    assert levels_of(again) == levels_of(sparsifier)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(net):
    sparsifier = Sparsifier(net)
    state = Sparsifier(small_net(), "kernel").state_dict()
    with pytest.raises(
        ValueError,
        match="the mask of 0.weight is bools of the shape .8, 2, 1, 1. in the state and bools of",
    ):
        sparsifier.load_state_dict(state)
    with pytest.raises(
        ValueError, match="quantities .'init'., the criterion large_final needs ..; use the same criterion"
    ):
        sparsifier.load_state_dict(Sparsifier(small_net(), criteria="movement").state_dict())
    for foreign in ({"masks": {}}, None):
        with pytest.raises(ValueError, match="lacks the masks, levels, statistics or rng of a Sparsifier"):
            sparsifier.load_state_dict(foreign)
    good = Sparsifier(small_net()).state_dict()
    for key, value, message in (
        ("levels", {}, "the level of 0.weight is absent in the state and a number here"),
        ("masks", {**good["masks"], "0.weight": good["masks"]["0.weight"].float()}, "is numbers of the shape"),
        ("masks", {**good["masks"], "else": good["masks"]["0.weight"]}, "the mask of else is bools .* and absent here"),
    ):
        with pytest.raises(ValueError, match=message):
            sparsifier.load_state_dict({**good, key: value})
    with pytest.raises(RuntimeError, match="RNG state"):
        sparsifier.load_state_dict({**good, "rng": torch.zeros(3, dtype=torch.uint8)})
    assert all(mask.all() for mask in sparsifier.masks.values())


@pytest.mark.parametrize("granularity", ["weight", "filter", "channel", lambda axes: {"out": 2}])
def test_masks_are_recovered_from_the_zeros_of_a_checkpoint(granularity):
    model = small_net()
    sparsifier = Sparsifier(model, granularity)
    sparsifier.sparsify(0.6)
    loaded = small_net()
    loaded.load_state_dict(model.state_dict())
    recovered = Sparsifier(loaded, granularity)
    recovered.recover_masks()
    for name, mask in sparsifier.masks.items():
        assert torch.equal(recovered.masks[name], mask)
    assert sorted(recovered.follower_masks) == sorted(sparsifier.follower_masks)
    shares = {name: float((~mask).float().mean()) for name, mask in sparsifier.masks.items()}
    assert levels_of(recovered) == pytest.approx(
        {name: min(share, recovered.sparsity) for name, share in shares.items()}
    )


def test_a_layer_of_nothing_but_zeros_is_not_taken_for_a_masked_one(mlp):
    nn.init.zeros_(mlp[2].weight)
    sparsifier = Sparsifier(mlp)
    sparsifier.recover_masks()
    assert sparsifier.masks["2.weight"].all()


@pytest.mark.parametrize("granularity", ["weight", "filter"])  # the latter with what stands behind whole outputs
def test_release_gives_the_model_back_and_ends_all_calls(mlp, granularity):
    sparsifier = Sparsifier(mlp, granularity)
    sparsifier.sparsify(0.5)
    assert sparsifier.release() is mlp
    assert (mlp[0].weight == 0).any()
    for call in ("apply_masks", "mask_gradients", "report", "state_dict", "release", "recover_masks"):
        with pytest.raises(RuntimeError, match="this Sparsifier has released its model; make a new one"):
            getattr(sparsifier, call)()
    with pytest.raises(RuntimeError, match="has released its model"):
        sparsifier.sparsify(0.5)
    assert "released" in repr(sparsifier)


def test_a_failure_half_way_changes_nothing(net):
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


def test_own_context_is_a_function(net):
    def only_the_first(layers, sparsity):
        import numpy as np

        return [
            contexts["local"]([layers[0]], sparsity)[0],
            *(np.ones(len(layer.score), bool) for layer in layers[1:]),
        ]

    sparsifier = Sparsifier(net, context=only_the_first)
    sparsifier.sparsify(0.5)
    assert [row.count.sparsity for row in sparsifier.report().rows] == [0.5, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "wrong", [lambda layers, sparsity: [], lambda layers, sparsity: [layer.score for layer in layers]]
)
def test_what_is_no_answer_of_a_context_is_an_error(net, wrong):
    with pytest.raises(
        ValueError, match="must return a list with, for each layer, a bool array over its groups, True where one stays"
    ):
        Sparsifier(net, context=wrong).sparsify(0.5)


@pytest.mark.parametrize(
    ("sparsity", "error", "message"),
    [
        (50, ValueError, "sparsity 50 is a percentage, not a fraction; pass 0.5 for 50 %"),
        (1.5, ValueError, "pass 0.015 for 1.5 %"),
        (-0.1, ValueError, "sparsity -0.1 is not a fraction from 0 to 1"),
        (101, ValueError, "sparsity 101.0 is not a fraction from 0 to 1"),
        (math.nan, ValueError, "sparsity nan is not a fraction from 0 to 1"),
        (np.bool_(True), TypeError, "a number from 0 to 1, or a dictionary of them by layer, not"),
        (True, TypeError, "a number from 0 to 1, or a dictionary of them by layer, not True"),
        ("0.5", TypeError, "not '0.5'"),
        ([0.5, 0.5], TypeError, "not .0.5, 0.5."),
        ({}, ValueError, "the dictionary of sparsities is empty"),
        ({"0": 50}, ValueError, "pass 0.5 for 50 %"),
        (None, TypeError, "two names of one number; pass one of them: neither is given"),
    ],
)
def test_what_is_no_sparsity_is_refused(mlp, sparsity, error, message):
    sparsifier = Sparsifier(mlp)
    with pytest.raises(error, match=message):
        sparsifier.sparsify(sparsity)
    assert all(mask.all() for mask in sparsifier.masks.values())


def test_compression_ratio_is_another_name_of_sparsity(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(compression_ratio=torch.tensor(0.5))
    assert sparsifier.sparsity == 0.5
    with pytest.raises(TypeError, match="both are given"):
        sparsifier.sparsify(0.5, compression_ratio=0.5)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"granularity": "filters"}, "unknown granularity 'filters'; did you mean 'filter'"),
        ({"context": "globl"}, "unknown context 'globl'; did you mean 'global'"),
        ({"criteria": "larg_final"}, "unknown criterion 'larg_final'; did you mean 'large_final'"),
        ({"pool": "average"}, "unknown pooling 'average'; choose from 'l2', 'max', 'mean', 'squared_sum', 'sum'"),
    ],
)
def test_unknown_names_are_answered_with_close_matches(mlp, axes, message):
    with pytest.raises(ValueError, match=message):
        Sparsifier(mlp, **axes)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model is a torch.nn.Module, not Tensor"):
        Sparsifier(torch.zeros(3))


def test_deepcopy_of_model_and_sparsifier_together(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.5)
    model, copied = copy.deepcopy((mlp, sparsifier))
    assert copied.model is model
    copied.sparsify(0.9)
    assert sparsifier.sparsity == 0.5
    for granularity in ("weight", "filter", ("out", "in")):
        sparsifier = Sparsifier(small_net(), granularity, criteria="movement")
        moved(sparsifier.model)
        sparsifier.sparsify(0.5)
        restored = pickle.loads(pickle.dumps(sparsifier))
        restored.sparsify(0.8)
        assert torch.equal(restored.masks["0.weight"] | sparsifier.masks["0.weight"], sparsifier.masks["0.weight"])


def test_the_seed_decides_what_random_takes():
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        sparsifier = Sparsifier(small_net(), criteria="random", seed=seed)
        torch.manual_seed(len(masks))  # torch's own generator has no part in it
        sparsifier.sparsify(0.5)
        masks.append(torch.cat([mask.flatten() for mask in sparsifier.masks.values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("seed", ["a", 1.5, True, None])
def test_a_seed_is_a_whole_number(mlp, seed):
    with pytest.raises(TypeError, match="seed must be a whole number"):
        Sparsifier(mlp, seed=seed)


def test_loading_a_state_applies_its_masks_and_levels(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.5)
    state = sparsifier.state_dict()
    other = copy.deepcopy(mlp)
    with torch.no_grad():
        other[0].weight.fill_(1)
    loaded = Sparsifier(other)
    loaded.load_state_dict(state)
    assert torch.equal(other[0].weight != 0, sparsifier.masks["0.weight"])
    assert levels_of(loaded) == levels_of(sparsifier)
    loaded.sparsify(0.25)  # a falling level, which only the levels tell
    assert sum(int((~mask).sum()) for mask in loaded.masks.values()) == 12


def test_previous_is_the_value_at_the_last_update(mlp):
    sparsifier = Sparsifier(mlp, criteria="updating_movement", context="local")
    start = mlp[0].weight.detach().clone()
    assert torch.equal(sparsifier.collected.stored["previous"]["0.weight"], start)
    with torch.no_grad():
        mlp[0].weight.add_(1)
    sparsifier.sparsify(0.25)
    updated = sparsifier.collected.stored["previous"]["0.weight"]
    assert torch.equal(updated, mlp[0].weight)
    assert not torch.equal(updated, start)
    assert set(sparsifier.collected.stored) == {"previous"}


def test_adopted_masks_are_masked_and_never_dropped_by_a_rising_level(net):
    earlier = Sparsifier(net, "kernel", criteria="small_final")
    earlier.sparsify(0.3)
    for granularity in ("weight", "kernel"):
        later = Sparsifier(net, granularity)
        later.recover_masks(earlier.masks)
        later.sparsify(0.1)
        for name, mask in earlier.masks.items():
            assert torch.equal(later.masks[name].expand_as(later.layers[name].parameter),
                               mask.expand_as(later.layers[name].parameter))  # fmt: skip
    rows = Sparsifier(net, "filter")
    rows.recover_masks(earlier.masks)
    whole = (earlier.masks["3.weight"] == 0).flatten(1).all(1)
    assert torch.equal(~rows.masks["3.weight"].flatten(), whole)


def test_what_momentum_has_moved_is_zero_again_when_a_falling_level_revives_it(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.8)
    before = dict(sparsifier.masks)
    with torch.no_grad():
        mlp[0].weight.add_(0.1)  # as a step does, and nobody called apply_masks
    sparsifier.sparsify(0.2)
    revived = sparsifier.masks["0.weight"] & ~before["0.weight"]
    assert revived.any()
    assert (mlp[0].weight[revived] == 0).all()


def test_half_precision_is_scored_in_single():
    model = nn.Linear(4, 4).to(torch.bfloat16)
    seen = []
    Sparsifier(model, criteria=lambda weight, init: seen.append((weight.dtype, init.dtype)) or weight.abs()).sparsify(
        0.5
    )
    assert seen == [(torch.float32, torch.float32)]


def test_under_a_rising_level_no_context_lets_anything_come_back(net):
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
    """Of masks: what has come back is zero until it is trained."""
    masks = [mask.float().mean() * mask.numel() for mask in sparsifier.masks.values()]
    return 1 - float(sum(masks)) / sum(mask.numel() for mask in sparsifier.masks.values())


@pytest.mark.parametrize("on_device", [False, True])
def test_a_joint_target_that_falls_is_exact_where_some_layers_were_below_it(on_device):
    for levels, lower in (((0.9, 0.3), 0.4), ((0.9, 0.1), 0.3)):
        sparsifier = Sparsifier(nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 40)))
        if on_device:
            sparsifier.__class__ = type("OnDevice", (Sparsifier,), {"_on_device": True})
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


def test_warnings_point_at_the_line_that_calls():
    masked = Sparsifier(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "filter")
    masked.sparsify(0.5)
    net = nn.Sequential(nn.Linear(4, 4))
    cases = {
        "revives whole outputs": lambda: masked.sparsify(0.2),
        "train before the first update": lambda: Sparsifier(net, criteria="movement").sparsify(0.5),
        "no group can be pruned": lambda: Sparsifier(net, "layer", "local", layers=["0"]).sparsify(0.5),
    }
    for message, call in cases.items():
        with pytest.warns(UserWarning, match=message) as caught:
            call()
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="revives whole outputs") as caught:
        masked.update_masks(0.1)
    assert caught[0].filename == __file__


def test_a_context_that_empties_a_layer_is_an_error(net):
    def nothing(layers, sparsity):
        return [np.zeros(len(layer.score), bool) for layer in layers]

    with pytest.raises(ValueError, match="context nothing empties 0.weight; a layer keeps its best group"):
        Sparsifier(net, context=nothing).sparsify(0.5)


def test_autograd_sees_that_a_weight_was_written(mlp):
    sparsifier = Sparsifier(mlp)
    output = mlp(torch.randn(2, 4)).square().sum()
    sparsifier.sparsify(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_init_stays_what_it_was_when_the_sparsifier_was_made(mlp):
    start = mlp[0].weight.detach().clone()
    sparsifier = Sparsifier(mlp, criteria="movement")
    for level in (0.2, 0.4):
        moved(mlp)
        sparsifier.sparsify(level)
    assert torch.equal(sparsifier.collected.stored["init"]["0.weight"], start)


def test_a_comparison_with_an_earlier_value_before_any_training_is_told_of(mlp):
    sparsifier = Sparsifier(mlp, criteria="movement")
    sparsifier.check(0.5)
    with pytest.warns(UserWarning, match="criterion movement compares with an earlier value, and nothing has changed"):
        sparsifier.sparsify(0.5)


def test_arguments_in_the_wrong_place_are_told_of(mlp):
    with pytest.raises(
        ValueError, match=r"granularity cos fails on the axes .*; a granularity is a function of a layer"
    ):
        Sparsifier(mlp, schedules["cos"])
    with pytest.raises(ValueError, match=r"context large_final is not a function of \(layers, sparsity\)"):
        Sparsifier(mlp, "weight", criteria["large_final"])


def test_masked_weights_that_a_step_made_nan_do_not_matter(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.5)
    with torch.no_grad():
        mlp[0].weight[~sparsifier.masks["0.weight"]] = math.nan
    sparsifier.sparsify(0.6)
    assert sparsifier.report().selected.zeros == 29  # 28.8 of 48


def test_sparsifying_recovered_masks_at_the_same_level_revives_nothing():
    for seed in range(30):
        torch.manual_seed(seed)
        model = small_net()
        sparsifier = Sparsifier(model, "filter")
        sparsifier.sparsify(0.4)
        recovered = Sparsifier(model, "filter")
        recovered.recover_masks()
        before = dict(recovered.masks)
        recovered.sparsify(sparsifier.sparsity)
        assert all((mask <= before[name]).all() for name, mask in recovered.masks.items())


def test_a_partly_zero_group_is_not_recovered_as_masked(net):
    with torch.no_grad():
        net[3].weight[0, 0] = 0
    sparsifier = Sparsifier(net, "filter")
    sparsifier.recover_masks()
    assert sparsifier.masks["3.weight"].all()


def test_rounded_groups_nest_while_scores_change():
    model = small_net()
    sparsifier = Sparsifier(model, "filter", round_to=2)
    before = dict(sparsifier.masks)
    for level in (0.2, 0.4, 0.6, 0.8):
        moved(model)
        sparsifier.sparsify(level)
        assert all((mask <= before[name]).all() for name, mask in sparsifier.masks.items())
        assert all(int(mask.sum()) % 2 == 0 for mask in sparsifier.masks.values())
        before = dict(sparsifier.masks)


def test_double_precision_is_ranked_in_double():
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(1 + torch.tensor([[3.0, 1, 2, 0]], dtype=torch.float64) * 1e-12)
    Sparsifier(model).sparsify(0.5)
    assert (model.weight == 0).tolist() == [[False, True, False, True]]


def test_outputs_that_come_back_are_warned_of_and_weights_are_not():
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    sparsifier = Sparsifier(model, "filter")
    sparsifier.sparsify(0.5)
    with pytest.warns(UserWarning, match="revives whole outputs from zero"):
        sparsifier.sparsify(0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.sparsify(0.5)
        for level in (0.5, 0.2):
            Sparsifier(model).sparsify(level)


def test_a_pickle_holds_neither_patterns_nor_a_whole_batch(net):
    batch = torch.zeros(1000, 2, 8, 8)
    sparsifier = Sparsifier(net, "filter", layers=lambda name, module: name == "0", example_input=batch)
    assert len(pickle.dumps(sparsifier)) < batch.numel()


def test_a_released_model_is_held_by_nothing(net):
    sparsifier, first = Sparsifier(net, layers=[net[0]]), weakref.ref(net[0])
    net = sparsifier.release()
    del net[0]
    gc.collect()
    assert first() is None


def test_a_quantity_of_the_update_holds_no_graph(mlp):
    @quantities.register
    @taken("update")
    def squared(sparsifier, name):
        return sparsifier.layers[name].parameter ** 2

    try:
        sparsifier = Sparsifier(mlp, criteria=lambda weight: weight.abs(), regrow=lambda squared: squared)
        sparsifier.sparsify(0.5)
        copy.deepcopy(sparsifier)  # of a tensor with a graph it fails
    finally:
        quantities._functions.pop("squared")


def test_with_warnings_as_errors_nothing_has_changed(net):
    sparsifier = Sparsifier(net, "filter")
    sparsifier.sparsify(0.5)
    for update in (sparsifier.sparsify, sparsifier.update_masks):  # in these tests, warnings are errors
        with pytest.raises(UserWarning, match="revives whole outputs"):
            update(0.2)
    assert sparsifier.level == pytest.approx(0.5)


def test_previous_is_zero_where_a_step_has_moved_what_is_masked(mlp):
    sparsifier = Sparsifier(mlp, criteria="updating_movement")
    with torch.no_grad():
        mlp[0].weight.add_(1)
    sparsifier.sparsify(0.5)
    with torch.no_grad():
        mlp[0].weight.add_(1)  # what is masked, too
    sparsifier.update_masks(0.5)  # no weight is newly masked
    previous = sparsifier.state_dict()["statistics"]["stored"]["previous"]
    assert all((previous[name][~mask] == 0).all() for name, mask in sparsifier.masks.items())


def test_a_pattern_that_means_no_sparse_layer_is_an_error_in_steps_too(net):
    with pytest.raises(ValueError, match="matches only layers that stay dense"):
        Sparsifier(net, exclude="0").sparsify({"0": 0.5}, steps=2)


def test_a_criterion_of_ones_own_that_declares_that_it_is_elementwise():
    sizes = []

    def distance(weight):
        sizes.append(weight.numel())
        return (weight - 1).abs()

    model = nn.Linear(1000, 300)
    torch.manual_seed(0)
    plain = Sparsifier(copy.deepcopy(model), criteria=distance)
    plain.sparsify(0.5)
    assert set(sizes) == {300_000}
    distance.elementwise = True
    sizes.clear()
    by_parts = Sparsifier(model, criteria=distance)
    by_parts.sparsify(0.5)
    assert max(sizes) < 300_000
    assert torch.equal(plain.masks["weight"], by_parts.masks["weight"])

    @functools.wraps(distance)
    def of_the_layer(weight):
        return distance(weight) - weight.mean()

    sizes.clear()
    Sparsifier(model, criteria=of_the_layer).sparsify(0.5)
    assert set(sizes) == {300_000}  # a wrapper has to declare it itself


def test_a_criterion_of_ones_own_with_a_formula_for_numpy(mlp):
    called = []

    def negative(weight):
        return -weight

    negative.elementwise, negative.numpy = True, lambda weight: called.append(1) or -weight
    declared, plain = (
        Sparsifier(mlp, criteria=negative),
        Sparsifier(copy.deepcopy(mlp), criteria=lambda weight: -weight),
    )
    for sparsifier in (declared, plain):
        sparsifier.sparsify(0.5)
    assert called
    assert all(torch.equal(mask, declared.masks[name]) for name, mask in plain.masks.items())
