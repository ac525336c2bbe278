"""The penalty on groups of weights, and its proximal step."""

import copy
import math

import pytest
import torch
from attentions import BLOCKS, Net, weights_of
from conftest import CRITERIA, GRANULARITIES, dense_of, layers_of, small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsifai import Regularizer, criteria, magnitude_increase
from sparsifai.model.layers import find_weights

DIFFERENTIABLE = ("large_final", "squared_final", "normalized_final", "lamp", "movement", "movmag", "small_final")
WEIGHTS = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [-6.0, 0.0, 8.0]])


def linear(weights=WEIGHTS):
    """A layer with these weights, followed by the output layer."""
    model = nn.Sequential(nn.Linear(weights.shape[1], len(weights), bias=False), nn.Linear(len(weights), 2))
    model[0].weight.data.copy_(weights)
    return model


def by_hand(weight, groups):
    """Sum of sqrt(|g|) ||W_g|| over groups, each an index of the weight."""
    norms = [weight[group].double().pow(2).sum().sqrt() * math.sqrt(weight[group].numel()) for group in groups]
    return float(sum(norms))


# --- The penalty --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("weight", 3 + 4 + 1 + 2 + 2 + 6 + 8),
        ("row", math.sqrt(3) * (5 + 0 + 3 + 10)),
        ("filter", math.sqrt(3) * (5 + 0 + 3 + 10)),
        ("column", 2 * (math.sqrt(46) + math.sqrt(20) + math.sqrt(68))),
        ("layer", math.sqrt(12) * math.sqrt(134)),
        # Tiles at the border are smaller: two by two, two by one.
        ("2x2", 2 * (5 + math.sqrt(41)) + math.sqrt(2) * (0 + math.sqrt(68))),
    ],
)
def test_penalties_by_hand(granularity, expected):
    penalty = Regularizer(linear(), granularity, layers="0").penalty()
    assert penalty.shape == ()
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-6)


def test_kernels_and_filters_of_a_grouped_convolution():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 2, 1))
    weight = model[0].weight.detach()
    filters = [(out,) for out in range(6)]
    kernels = [(out, each) for out in range(6) for each in range(2)]
    # A real input channel is read by the outputs of one convolution group only.
    channels = [(slice(3 * group, 3 * group + 3), each) for group in range(2) for each in range(2)]
    for granularity, groups in (("filter", filters), ("kernel", kernels), ("channel", channels)):
        found = float(Regularizer(model, granularity, layers="0").penalty().detach())
        assert found == pytest.approx(by_hand(weight, groups), rel=1e-6), granularity


def test_the_penalty_is_the_sum_over_the_selected_layers():
    model = small_net()
    expected = sum(float(target.parameter.detach().abs().sum()) for target in find_weights(model).values())
    assert float(Regularizer(model).penalty().detach()) == pytest.approx(expected, rel=1e-5)
    last = float(model[12].weight.detach().abs().sum())
    assert float(Regularizer(model, exclude="12").penalty().detach()) == pytest.approx(expected - last, rel=1e-5)
    assert "12.weight" in dense_of(Regularizer(model, "filter").sparsifier)


def test_the_gradient_of_the_group_lasso_is_the_weight_over_its_norm():
    model = linear()
    Regularizer(model, "row", layers="0").penalty().backward()
    norms = torch.tensor([5.0, math.inf, 3.0, 10.0])[:, None]
    torch.testing.assert_close(model[0].weight.grad, math.sqrt(3) * WEIGHTS / norms)
    assert model[1].weight.grad is None


def test_the_gradient_of_the_lasso_is_the_sign():
    model = linear()
    Regularizer(model, layers="0").penalty().backward()
    assert torch.equal(model[0].weight.grad, WEIGHTS.sign())


@pytest.mark.parametrize("granularity", ["weight", "row", "3x2"])
@pytest.mark.parametrize("criterion", [*DIFFERENTIABLE, "magnitude_increase", "updating_movement"])
def test_gradients_are_those_of_finite_differences(granularity, criterion):
    model = linear(torch.randn(5, 4)).double()
    regularizer = Regularizer(model, granularity, criterion, layers="0")
    weight = model[0].weight
    weight.data += 0.3 * torch.randn(5, 4)  # so that it differs from init and previous
    regularizer.penalty().backward()
    assert weight.grad.abs().sum() > 0
    for place in ((0, 0), (2, 1), (4, 3)):
        before, step, values = weight.data[place].item(), 1e-6, []
        for sign in (1, -1):
            weight.data[place] = before + sign * step
            values.append(float(regularizer.penalty().detach()))
        weight.data[place] = before
        assert float(weight.grad[place]) == pytest.approx((values[0] - values[1]) / 2 / step, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("criterion", DIFFERENTIABLE)
@pytest.mark.parametrize("granularity", [*GRANULARITIES, "3x2", ("out", "h")])
def test_every_granularity_with_several_criteria(granularity, criterion):
    model = small_net()
    regularizer = Regularizer(model, granularity, criterion)
    for target in layers_of(regularizer.sparsifier).values():
        target.parameter.data.add_(0.1 * torch.randn_like(target.parameter))
    regularizer.penalty().backward()
    for target in layers_of(regularizer.sparsifier).values():
        assert target.parameter.grad.isfinite().all()
        assert target.parameter.grad.abs().sum() > 0
    expected = 0.0
    for name, target in layers_of(regularizer.sparsifier).items():
        values = {
            "weight": target.parameter.detach(),
            "init": regularizer.sparsifier.collected.stored.get("init", {}).get(name),
        }
        named = ("weight", "init") if criterion in ("movement", "movmag") else ("weight",)
        scores = criteria[criterion](**{each: values[each] for each in named})
        groups = regularizer.sparsifier.layers[name].grouping
        sizes = groups.members(torch.ones(target.parameter.shape)).sum(1)
        expected += float((groups.members(scores.square()).sum(1).sqrt() * sizes.sqrt()).sum())
    assert float(regularizer.penalty().detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("criterion", DIFFERENTIABLE)
@pytest.mark.parametrize("granularity", ["weight", "filter", "kernel", "layer", "3x2"])
def test_the_gradient_of_a_group_of_zeros_is_zero(granularity, criterion):
    model = small_net()
    for target in find_weights(model).values():
        target.parameter.data.zero_()
    regularizer = Regularizer(model, granularity, criterion)
    penalty = regularizer.penalty()
    penalty.backward()
    assert penalty == 0
    assert all(not each.parameter.grad.any() for each in layers_of(regularizer.sparsifier).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 2)).to(dtype)
    model[0].weight.data.fill_(0.5)
    for granularity in ("weight", "row", "layer"):  # 80,000 is above the range of float16
        penalty = Regularizer(model, granularity, layers="0").penalty()
        assert penalty.dtype == torch.float32
        assert float(penalty.detach()) == pytest.approx(80_000, rel=1e-5)
    (1e-3 * penalty).backward()
    assert model[0].weight.grad.dtype == dtype
    torch.testing.assert_close(model[0].weight.grad, torch.full_like(model[0].weight, 1e-3))


def test_previous_and_init_are_the_weights_when_the_regularizer_was_made():
    model = linear()
    regularizer = Regularizer(model, "weight", "updating_movement", layers="0")
    model[0].weight.data += 0.5
    assert float(regularizer.penalty().detach()) == pytest.approx(12 * 0.5)


def test_negative_scores_are_driven_to_zero():
    model = linear()
    regularizer = Regularizer(model, "weight", magnitude_increase, layers="0")
    model[0].weight.data[0] = torch.tensor([2.0, -5.0, 0.0])  # one magnitude is smaller than at init, one larger
    penalty = regularizer.penalty()
    assert float(penalty.detach()) == pytest.approx(2.0)
    penalty.backward()
    assert model[0].weight.grad[0].tolist() == [-1.0, -1.0, 0.0]


def test_a_user_s_criterion():
    def capped(weight, cap=1.0):
        return weight.abs().clamp(max=cap)

    assert float(Regularizer(linear(), "weight", capped, layers="0").penalty().detach()) == pytest.approx(7)


def test_a_criterion_cannot_change_a_weight():
    def in_place(weight):
        return weight.mul_(0).abs()

    model = linear()
    Regularizer(model, "weight", in_place, layers="0").penalty()
    assert torch.equal(model[0].weight, WEIGHTS)


def test_frozen_weights_get_no_penalty():
    model = linear()
    model[0].weight.requires_grad_(False)
    regularizer = Regularizer(model)
    assert float(regularizer.penalty().detach()) == pytest.approx(float(model[1].weight.detach().abs().sum()))
    regularizer.proximal_step(100.0)
    assert torch.equal(model[0].weight, WEIGHTS)
    model[0].weight.requires_grad_()
    assert float(regularizer.penalty().detach()) == pytest.approx(26)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert float(regularizer.penalty().detach()) == 0
    assert float(Regularizer(model, "filter").penalty().detach()) == 0  # as in the frozen fit of fine_tune


def test_embeddings_are_not_regularized_unless_they_are_selected():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 2))
    assert list(layers_of(Regularizer(model).sparsifier)) == ["1.weight", "2.weight"]
    assert list(layers_of(Regularizer(model, layers=nn.Embedding).sparsifier)) == ["0.weight"]
    model[1].weight = model[0].weight  # tied
    assert list(layers_of(Regularizer(model).sparsifier)) == ["2.weight"]


def test_every_built_in_criterion_works_or_is_refused():
    for name in CRITERIA:
        try:
            regularizer = Regularizer(linear(), criteria=name)
        except ValueError as error:
            assert "cannot be a penalty" in str(error)  # noqa: PT017
        else:
            assert regularizer.penalty().requires_grad


# --- The proximal step --------------------------------------------------------------------------------------------


def test_the_proximal_step_of_rows_in_closed_form():
    model = linear()
    Regularizer(model, "row", layers="0").proximal_step(2.0)
    bound = 2 * math.sqrt(3)
    shares = torch.tensor([1 - bound / 5, 0.0, 0.0, 1 - bound / 10])[:, None]  # 3 < bound
    torch.testing.assert_close(model[0].weight.detach(), WEIGHTS * shares)
    assert (model[0].weight[2] == 0).all()


def test_the_proximal_step_of_single_weights_is_soft_thresholding():
    model = linear()
    Regularizer(model, layers="0").proximal_step(2.0)
    torch.testing.assert_close(model[0].weight.detach(), WEIGHTS.sign() * (WEIGHTS.abs() - 2).clamp(min=0))
    assert int((model[0].weight == 0).sum()) == 8


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([*GRANULARITIES, "3x2"]), st.floats(0.01, 0.3))
def test_the_proximal_step_minimizes_its_objective(seed, granularity, threshold):
    """||W - V||^2 / 2 + threshold * penalty(W): no small move from the result is better."""
    torch.manual_seed(seed)
    model = small_net().double()
    before = copy.deepcopy(model)
    regularizer = Regularizer(model, granularity)
    regularizer.proximal_step(threshold)

    def objective():
        pairs = zip(model.parameters(), before.parameters(), strict=True)
        distance = sum(float((new - old).detach().square().sum()) for new, old in pairs)
        return distance / 2 + threshold * float(regularizer.penalty().detach())

    best = objective()
    for _ in range(5):
        moves = {
            name: 1e-3 * torch.randn_like(each.parameter) for name, each in layers_of(regularizer.sparsifier).items()
        }
        for sign in (1, -2, 1):
            for name, move in moves.items():
                regularizer.sparsifier.layers[name].parameter.data.add_(sign * move)
            assert objective() >= best - 1e-9


def test_the_proximal_step_of_a_grouped_convolution_zeroes_real_channels():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 2, 1))
    model[0].weight.data[:3, 1] *= 1e-3  # the second channel of the first group
    Regularizer(model, "channel", layers="0").proximal_step(0.01)
    zero = model[0].weight == 0
    assert zero[:3, 1].all()
    assert not zero[3:].any()
    assert not zero[:3, 0].any()


def test_a_threshold_of_each_weight():
    model = linear()
    last = model[1].weight.detach().clone()
    regularizer = Regularizer(model, exclude=None)
    regularizer.proximal_step({"0.weight": 100.0})
    assert not model[0].weight.any()
    assert torch.equal(model[1].weight, last)
    regularizer.proximal_step({"1.weight": 0})
    assert torch.equal(model[1].weight, last)
    regularizer.proximal_step(0.0)  # of zeros, too
    assert not model[0].weight.any()


def test_a_proximal_step_in_half_precision():
    model = linear().to(torch.bfloat16)
    Regularizer(model, "row", layers="0").proximal_step(1.0)
    shares = torch.tensor([1 - math.sqrt(3) / 5, 0.0, 1 - math.sqrt(3) / 3, 1 - math.sqrt(3) / 10])[:, None]
    assert torch.equal(model[0].weight, (WEIGHTS * shares).to(torch.bfloat16))  # rounded once


def test_proximal_steps_train_a_torch_model_to_whole_rows_of_zeros():
    torch.manual_seed(3)
    x, model = torch.randn(200, 6), nn.Sequential(nn.Linear(6, 1, bias=False))
    y = 2 * x[:, :1] - 3 * x[:, 1:2]
    regularizer, opt = Regularizer(model, "column", layers="0"), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(100):
        opt.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        opt.step()
        regularizer.proximal_step(0.1 * 0.5)
    assert (model[0].weight[0] != 0).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("kind", ["separate", "fused multi-query", "interleaved grouped", "fused gated mlp"])
def test_the_groups_of_heads_and_neurons_span_several_layers(kind):
    make, granularity, groups, _ = BLOCKS[kind]
    model = Net(make)
    rows = {name: parameter[6:10].clone() for name, parameter in model.named_parameters() if "qkv" in name}
    regularizer = Regularizer(model, granularity)

    def norms():
        return torch.stack([
            torch.cat([each.flatten() for each in weights_of(model, block, group).values()]).norm()
            for block in range(2) for group in groups
        ])  # fmt: skip

    size = sum(each.numel() for each in weights_of(model, 0, groups[0]).values())
    assert regularizer.penalty().item() == pytest.approx(size**0.5 * norms().sum().item(), rel=1e-5)
    regularizer.penalty().backward()
    name, (axis, at) = next(iter(groups[0].items()))
    weight = model.blocks[0].get_parameter(name)
    part = weight.grad.index_select(axis, torch.tensor(at))
    assert torch.allclose(part, size**0.5 * weight.detach().index_select(axis, torch.tensor(at)) / norms()[0])
    before, threshold = norms(), 0.5 * norms().min().item() / size**0.5
    regularizer.proximal_step(threshold)
    assert torch.allclose(norms(), (before - threshold * size**0.5).clamp(min=0), atol=1e-5)
    regularizer.proximal_step(norms().median().item() / size**0.5)
    if kind == "fused multi-query":  # the rows of the key and the value belong to no head
        assert all(torch.equal(model.get_parameter(name)[6:10], those) for name, those in rows.items())
    assert 0 < (norms() == 0).sum() < len(before)
    regularizer.penalty().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
