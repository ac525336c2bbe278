"""Coupled filters are pruned together, so that all zero filters can be removed."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torch_pruning", reason="what is coupled torch-pruning knows")

from conftest import dense_of, small_learner  # noqa: E402

from sparsifai import Sparsifier, SparsifyCallback, bounded, shrinkage  # noqa: E402

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """stem + branch, then head; a norm layer stands behind the sum."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.first = nn.Conv2d(3, width, 1), nn.Conv2d(width, 6, 1)
        self.branch = nn.Conv2d(6, width, 3, padding=1, bias=False)
        self.norm, self.head, self.out = nn.BatchNorm2d(width), nn.Conv2d(width, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.branch(F.relu(self.first(x)))
        return self.out(F.relu(self.head(F.relu(self.norm(x)))).mean((2, 3)))


def coupled(model, granularity="filter", context="local", criteria="large_final", **options):
    return Sparsifier(model, granularity, context, criteria, coupled=True, example_input=EXAMPLE, **options)


def alive(mask):
    return mask.flatten(1).any(1).tolist()


def test_filters_whose_outputs_are_added_are_pruned_together():
    model = Residual()
    sparsifier = coupled(model)
    assert set(sparsifier.masks) == {"stem.weight", "first.weight", "branch.weight", "head.weight"}
    assert dense_of(sparsifier) == {"out.weight": "yields the model's output"}
    for level, left in ((0.25, 6), (0.5, 4), (0.75, 2)):
        sparsifier.sparsify(level)
        assert alive(sparsifier.masks["stem.weight"]) == alive(sparsifier.masks["branch.weight"])
        assert sum(alive(sparsifier.masks["stem.weight"])) == left
        assert shrinkage(model.eval(), EXAMPLE).zeros_left == 0
    # Each context's share is of the weights: 8 channels of 3 + 54 weights are one layer.
    assert sparsifier.sparsity == pytest.approx(0.75, abs=0.02)


def test_the_score_is_the_mean_over_the_weights_of_all_coupled_filters():
    model = Residual()
    with torch.no_grad():
        for number in range(8):
            model.stem.weight[number] = 0.1 * (number + 1)  # 3 weights
            model.branch.weight[number] = 0.02 * (8 - number)  # 54 weights
        model.stem.weight[7] = 50.0
    sparsifier = coupled(model)
    sparsifier.sparsify(0.5)
    # The sums are 0.3 (n + 1) + 1.08 (8 - n), except that of channel 7: they decrease with n.
    assert alive(sparsifier.masks["stem.weight"]) == [True, True, True, False, False, False, False, True]


def test_uncoupled_filters_are_pruned_one_by_one():
    model = Residual()
    plain = Sparsifier(model, "filter", "local")
    plain.sparsify(0.5)
    assert alive(plain.masks["stem.weight"]) != alive(plain.masks["branch.weight"])
    assert shrinkage(model.eval(), EXAMPLE).zeros_left > 0
    assert "norm.weight" not in plain.all_masks


def test_a_norm_layer_behind_a_sum_is_masked_with_it():
    model = Residual()
    model.norm.bias.data.fill_(1.0)
    sparsifier = coupled(model)
    sparsifier.sparsify(0.5)
    kept = torch.tensor(alive(sparsifier.masks["stem.weight"]))
    assert torch.equal(sparsifier.all_masks["norm.weight"], kept)
    assert torch.equal(model.norm.bias != 0, kept)
    assert torch.equal(model.stem.bias != 0, kept)


class Concatenated(nn.Module):
    """Two layers side by side, and a norm layer over both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 6, 1, bias=False)
        self.norm, self.out = nn.BatchNorm2d(10), nn.Conv2d(10, 2, 3, padding=1)

    def forward(self, x):
        return self.out(F.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1))))


def test_a_norm_layer_behind_a_concatenation_is_masked():
    model = Concatenated()
    model.norm.bias.data.fill_(1.0)
    sparsifier = coupled(model)
    sparsifier.sparsify(0.5)
    kept = alive(sparsifier.masks["left.weight"]) + alive(sparsifier.masks["right.weight"])
    assert (model.norm.bias != 0).tolist() == kept
    assert sum(kept) == 5
    assert shrinkage(model.eval(), EXAMPLE).zeros_left == 0


class Gated(nn.Module):
    """Squeeze and excitation around a depthwise convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.expand, self.norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 5, 1)
        self.out = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        x = self.depthwise(F.relu(self.norm(self.expand(x))))
        x = x * self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.out(F.relu(self.project(x)))


def test_depthwise_convolutions_and_gates_are_coupled_with_their_inputs():
    model = Gated()
    sparsifier = coupled(model)
    sparsifier.sparsify(0.5)
    together = [alive(sparsifier.masks[f"{name}.weight"]) for name in ("expand", "depthwise", "excite")]
    assert together[0] == together[1] == together[2]
    assert sum(together[0]) == 4
    report = shrinkage(model.eval(), EXAMPLE)
    assert report.zeros_left == 0
    assert {layer.name: layer.removed for layer in report.layers}["depthwise"] == 4


def test_channels_that_pixel_shuffle_joins_are_coupled():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.PixelShuffle(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    sparsifier = coupled(model)
    sparsifier.sparsify(0.5)
    kept = torch.tensor(alive(sparsifier.masks["0.weight"])).unflatten(0, (4, 4))
    assert torch.equal(kept.all(1), kept.any(1))
    assert kept.sum() == 8
    assert shrinkage(model.eval(), EXAMPLE).zeros_left == 0


# --- What stays dense -------------------------------------------------------------------------------------------------


def test_filters_that_cannot_be_removed_stay_dense_with_the_reason():
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.free, self.same = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
            self.gate, self.out = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3, padding=1)
            self.groups = nn.GroupNorm(1, 4)

        def forward(self, x):
            x = x + self.conv(x)
            x = self.groups(self.same(F.relu(self.free(x))))
            return self.out(self.gate(x).sigmoid())

    assert dense_of(coupled(Ends())) == {
        "conv.weight": "coupled with the model's input",
        "same.weight": "goes through groups (GroupNorm), which mixes channels",
        "gate.weight": "constant 0.5, but out pads its input with zeros",
        "out.weight": "yields the model's output",
    }


def test_a_layer_that_is_coupled_with_a_dense_one_stays_dense():
    sparsifier = coupled(Residual(), exclude="stem")
    assert dense_of(sparsifier)["stem.weight"] == "excluded"
    assert dense_of(sparsifier)["branch.weight"] == "coupled with stem.weight, which stays dense"
    assert set(sparsifier.masks) == {"first.weight", "head.weight"}
    assert "coupled with stem.weight" in str(sparsifier.report())


# --- The other axes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["local", "global", "erk", "er", "lamp", "uniform_plus"])
@pytest.mark.parametrize("criteria", ["large_final", "random", "movement"])
def test_contexts_and_criteria(context, criteria):
    model = Residual(width=32)
    sparsifier = coupled(model, context=context, criteria=criteria)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    for level in (0.15, 0.3) if context == "uniform_plus" else (0.3, 0.6):  # which keeps the first layer
        sparsifier.sparsify(level)
        assert alive(sparsifier.masks["stem.weight"]) == alive(sparsifier.masks["branch.weight"])
        largest = max(3 + 54, 9 * 32)  # weights of a group: of stem and branch together, of head
        wanted = level * sum(mask.numel() for mask in expanded(sparsifier).values())
        rounding = 3 * largest if context != "global" else largest
        assert abs(zeros(sparsifier) - wanted) <= rounding / 2 + 1
    assert shrinkage(model.eval(), EXAMPLE).zeros_left == 0


def expanded(sparsifier):
    return {name: mask.expand_as(sparsifier.layers[name].parameter) for name, mask in sparsifier.masks.items()}


def zeros(sparsifier):
    return sum(int((~mask).sum()) for mask in expanded(sparsifier).values())


def test_erk_uses_the_mean_shape_of_coupled_layers():
    model = Residual(width=32)
    sparsifier = coupled(model, context="erk")
    sparsifier.sparsify(0.5)
    sizes = {"first": [(6, 32, 1, 1)], "head": [(4, 32, 3, 3)], "sum": [(32, 3, 1, 1), (32, 6, 3, 3)]}
    weights = {name: sum(torch.Size(shape).numel() for shape in shapes) for name, shapes in sizes.items()}
    relative = {name: sum(map(sum, shapes)) / weights[name] for name, shapes in sizes.items()}
    full, kept = {"first"}, 0.5 * sum(weights.values())
    scale = (kept - weights["first"]) / sum(weights[name] * relative[name] for name in weights if name not in full)
    density = 1 - scale * relative["sum"]
    pruned = 32 - sum(alive(sparsifier.masks["stem.weight"]))
    assert pruned == pytest.approx(32 * density, abs=0.5)


def test_limits_of_one_layer_hold_for_all_that_are_coupled_with_it():
    for name in ("stem", "branch"):
        sparsifier = coupled(Residual(), context=bounded("global", {name: 0.25}))
        sparsifier.sparsify(0.5)
        assert sum(alive(sparsifier.masks["stem.weight"])) == 6


def test_round_to_keeps_multiples_of_coupled_filters():
    model = Residual(width=32)
    with torch.no_grad():
        model.stem.weight.zero_()
        model.branch.weight.copy_(torch.arange(32.0).roll(5)[:, None, None, None] + 1)
    sparsifier = coupled(model, round_to=8, exclude=["first", "head"])
    sparsifier.sparsify(0.4)
    best = (torch.arange(32).roll(5) >= 16).tolist()
    assert alive(sparsifier.masks["stem.weight"]) == alive(sparsifier.masks["branch.weight"]) == best


def test_coupled_filters_are_revived_together():
    sparsifier = coupled(Residual())
    sparsifier.sparsify(0.5)
    with pytest.warns(UserWarning, match="revives"):
        sparsifier.sparsify(0.25)
    assert alive(sparsifier.masks["stem.weight"]) == alive(sparsifier.masks["branch.weight"])
    assert sum(alive(sparsifier.masks["stem.weight"])) == 6


def test_a_dictionary_must_give_coupled_layers_one_sparsity():
    sparsifier = coupled(Residual())
    with pytest.raises(ValueError, match="coupled"):
        sparsifier.sparsify({"stem": 0.5})
    assert sparsifier.sparsity == 0
    sparsifier.sparsify({lambda name, module: name in ("stem", "branch"): 0.5, "head": 0.25})
    assert [sum(alive(sparsifier.masks[name])) for name in ("stem.weight", "branch.weight", "head.weight")] == [4, 4, 3]


# --- State ------------------------------------------------------------------------------------------------------------


def test_coupling_changes_nothing_in_the_model():
    model = Residual().train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    coupled(model)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_a_coupled_sparsifier_is_copied_saved_and_recovered():
    model = Residual()
    before = dict(model.named_parameters())
    sparsifier = coupled(model)
    sparsifier.sparsify(0.25)
    state = sparsifier.state_dict()
    for again in (copy.deepcopy(sparsifier), pickle.loads(pickle.dumps(sparsifier))):
        again.sparsify(0.5)
        assert alive(again.masks["stem.weight"]) == alive(again.masks["branch.weight"])
    other = coupled(Residual())
    other.load_state_dict(state)
    assert all(torch.equal(other.masks[name], mask) for name, mask in sparsifier.masks.items())
    assert torch.equal(other.model.norm.weight != 0, sparsifier.all_masks["norm.weight"])
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    recovered = coupled(model)
    recovered.recover_masks()
    recovered.sparsify(0.5)
    assert shrinkage(model.eval(), EXAMPLE).zeros_left == 0
    assert recovered.release() is model


def test_a_filter_that_was_zero_alone_is_not_revived():
    model = Residual()
    with torch.no_grad():
        model.stem.weight[6:], model.branch.weight[:6] = 0, model.branch.weight[:6] / 100
        model.stem.weight[:6] /= 100  # so that channels 6 and 7 are the best
    sparsifier = coupled(model)
    sparsifier.recover_masks()
    sparsifier.sparsify(0.5)
    assert alive(sparsifier.masks["branch.weight"])[6:] == [True, True]
    assert alive(sparsifier.masks["stem.weight"])[6:] == [False, False]


# --- In a Learner -----------------------------------------------------------------------------------------------------


@pytest.mark.fastai
def test_after_a_fit_shrink_can_remove_all_zero_filters():
    pytest.importorskip("fastai", reason="a Learner")
    from sparsifai import SparsifyCallback

    learn = small_learner(Residual(), shape=(3, 8, 8), classes=3)
    callback = SparsifyCallback(0.5, "filter", "local", coupled=True)
    learn.fit(2, cbs=callback)
    assert alive(callback.sparsifier.masks["stem.weight"]) == alive(callback.sparsifier.masks["branch.weight"])
    learn.fit(1)  # KeepSparsity keeps the zeros, also those of the norm layer behind the sum
    kept = callback.sparsifier.all_masks["norm.weight"]
    assert kept.sum() == 4
    assert torch.equal(learn.model.norm.bias != 0, kept)
    assert shrinkage(learn.model.eval(), EXAMPLE).zeros_left == 0


@pytest.mark.fastai
def test_coupled_in_a_recipe_and_in_a_plan(tmp_path):
    pytest.importorskip("fastai", reason="recipes plan fits of a Learner")
    from sparsifai import Recipe, SparsifyCallback

    file = tmp_path / "recipe.yaml"
    file.write_text(
        "epochs: 2\nsteps:\n  - sparsify:\n      sparsity: 0.5\n      granularity: filter\n"
        "      context: local\n      coupled: true\n"
    )
    (callback, *_) = Recipe.load(file).callbacks()
    assert callback.pruning.options.coupled
    sparsifier = Recipe.load(file).apply(Residual(), example_input=EXAMPLE)
    assert alive(sparsifier.masks["stem.weight"]) == alive(sparsifier.masks["branch.weight"])
    plan = SparsifyCallback(0.5, "filter", "local", coupled=True).plan(Residual(), 2, 4, EXAMPLE)
    left = {layer.name: layer.size.left for layer in plan.layers}
    assert left["stem.weight"] == 3 * 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bad = file.with_name("bad.yaml")
        bad.write_text(file.read_text().replace("true", "perhaps"))
        with pytest.raises(ValueError, match="coupled"):
            Recipe.load(bad)


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("order", [["stem", "branch", "head"], ["head", "branch", "stem"]])
def test_coupled_layers_may_be_asked_for_by_several_keys_with_the_same_sparsity(context, order):
    model, both = Residual(), Residual()
    sparsifier = coupled(model, context=context)
    sparsifier.sparsify(dict.fromkeys(order, 0.5))
    expected = coupled(both, context=context)
    expected.sparsify({"re:stem|branch": 0.5, "head": 0.5})
    assert all(torch.equal(mask, expected.masks[name]) for name, mask in sparsifier.masks.items())
    assert sum(alive(sparsifier.masks["stem.weight"])) == 4
    assert alive(sparsifier.masks["stem.weight"]) == alive(sparsifier.masks["branch.weight"])
    assert {name: sparsifier.layers[name].level for name in expected.masks} == {
        name: layer.level for name, layer in expected.layers.items() if layer.is_selected
    }


def test_equal_sparsities_by_key_in_steps_and_in_a_learner():
    model = Residual()
    sparsifier = coupled(model)
    sparsifier.sparsify({"stem": 0.75, "branch": 0.75}, steps=3)
    assert sum(alive(sparsifier.masks["stem.weight"])) == 2
    assert alive(sparsifier.masks["stem.weight"]) == alive(sparsifier.masks["branch.weight"])
    callback = SparsifyCallback({"stem": 0.5, "branch": 0.5}, "filter", "local", coupled=True)
    plan = callback.plan(Residual(), 1, 4, EXAMPLE)
    assert {row.name: row.size.sparsity for row in plan.layers if row.size.sparsity} == {
        "stem.weight": 0.5,
        "branch.weight": 0.5,
    }


def test_different_sparsities_of_coupled_layers_are_refused():
    sparsifier = coupled(Residual())
    with pytest.raises(ValueError, match=r"their filters are coupled, so both need the same sparsity"):
        sparsifier.sparsify({"stem": 0.5, "branch": 0.25})
    assert all(mask.all() for mask in sparsifier.masks.values())


@pytest.mark.parametrize("options", [{}, {"coupled": True, "example_input": EXAMPLE}], ids=["plain", "coupled"])
@pytest.mark.parametrize("round_to", [None, 2])
def test_a_layer_of_one_filter_may_be_emptied(options, round_to):
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU(), nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    sparsifier = Sparsifier(model, "filter", "local", may_empty=True, round_to=round_to, **options)
    sparsifier.sparsify(1.0)
    assert {name: int(mask.sum()) for name, mask in sparsifier.masks.items()} == {"0.weight": 0, "2.weight": 0}
    kept = Sparsifier(model, "filter", "local", round_to=round_to, **options)
    assert kept.layers["0.weight"].why_dense.startswith("has 1 group")


def test_a_single_input_channel_may_be_emptied():
    model = nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 4))
    sparsifier = Sparsifier(model, "channel", "local", may_empty=True, layers="2")
    sparsifier.sparsify(1.0)
    assert not model[2].weight.any()
