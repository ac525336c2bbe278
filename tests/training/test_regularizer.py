import copy
import math

import pytest
import torch
from conftest import small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsifai import Regularizer, criteria, granularities, magnitude_increase
from sparsifai.model.layers import find_weights

DIFFERENTIABLE = ("large_final", "squared_final", "normalized_final", "lamp", "movement", "movmag", "small_final")
WEIGHTS = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [-6.0, 0.0, 8.0]])


def linear(weights=WEIGHTS):
    """A layer with these weights, behind which another yields the output."""
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


def test_the_penalty_is_summed_over_what_takes_part():
    model = small_net()
    expected = sum(float(target.parameter.detach().abs().sum()) for target in find_weights(model).values())
    assert float(Regularizer(model).penalty().detach()) == pytest.approx(expected, rel=1e-5)
    last = float(model[12].weight.detach().abs().sum())
    assert float(Regularizer(model, exclude="12").penalty().detach()) == pytest.approx(expected - last, rel=1e-5)
    assert "12.weight" in Regularizer(model, "filter").sparsifier.dense


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
    weight.data += 0.3 * torch.randn(5, 4)  # away from where it was made, and what is compared with stands
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
@pytest.mark.parametrize("granularity", [*granularities, "3x2", ("out", "h")])
def test_every_granularity_with_several_criteria(granularity, criterion):
    model = small_net()
    regularizer = Regularizer(model, granularity, criterion)
    for target in regularizer.sparsifier.targets.values():
        target.parameter.data.add_(0.1 * torch.randn_like(target.parameter))
    regularizer.penalty().backward()
    for target in regularizer.sparsifier.targets.values():
        assert target.parameter.grad.isfinite().all()
        assert target.parameter.grad.abs().sum() > 0
    expected = 0.0
    for name, target in regularizer.sparsifier.targets.items():
        values = {
            "weight": target.parameter.detach(),
            "init": regularizer.sparsifier.statistics.get("init", {}).get(name),
        }
        named = ("weight", "init") if criterion in ("movement", "movmag") else ("weight",)
        scores = criteria[criterion](**{each: values[each] for each in named})
        groups = regularizer.sparsifier.groupings[name]
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
    assert all(not each.parameter.grad.any() for each in regularizer.sparsifier.targets.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 2)).to(dtype)
    model[0].weight.data.fill_(0.5)
    for granularity in ("weight", "row", "layer"):  # 80,000 is more than float16 has
        penalty = Regularizer(model, granularity, layers="0").penalty()
        assert penalty.dtype == torch.float32
        assert float(penalty.detach()) == pytest.approx(80_000, rel=1e-5)
    (1e-3 * penalty).backward()
    assert model[0].weight.grad.dtype == dtype
    torch.testing.assert_close(model[0].weight.grad, torch.full_like(model[0].weight, 1e-3))


def test_previous_and_init_are_those_of_when_it_was_made():
    model = linear()
    regularizer = Regularizer(model, "weight", "updating_movement", layers="0")
    model[0].weight.data += 0.5
    assert float(regularizer.penalty().detach()) == pytest.approx(12 * 0.5)


def test_scores_that_can_be_negative_are_pulled_to_zero():
    model = linear()
    regularizer = Regularizer(model, "weight", magnitude_increase, layers="0")
    model[0].weight.data[0] = torch.tensor([2.0, -5.0, 0.0])  # one is smaller than it was, one larger
    penalty = regularizer.penalty()
    assert float(penalty.detach()) == pytest.approx(2.0)
    penalty.backward()
    assert model[0].weight.grad[0].tolist() == [-1.0, -1.0, 0.0]


def test_a_criterion_of_ones_own():
    def capped(weight, cap=1.0):
        return weight.abs().clamp(max=cap)

    assert float(Regularizer(linear(), "weight", capped, layers="0").penalty().detach()) == pytest.approx(7)


def test_a_criterion_cannot_change_a_weight():
    def rude(weight):
        return weight.mul_(0).abs()

    model = linear()
    Regularizer(model, "weight", rude, layers="0").penalty()
    assert torch.equal(model[0].weight, WEIGHTS)


def test_frozen_weights_are_left_alone_while_they_are():
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
    assert float(Regularizer(model, "filter").penalty().detach()) == 0  # as in the first fit of fine_tune


def test_embeddings_take_no_part_unless_they_are_named():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 2))
    assert list(Regularizer(model).sparsifier.targets) == ["1.weight", "2.weight"]
    assert list(Regularizer(model, layers=nn.Embedding).sparsifier.targets) == ["0.weight"]
    model[1].weight = model[0].weight  # tied
    assert list(Regularizer(model).sparsifier.targets) == ["2.weight"]


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("random", "random asks for rng, through which no gradient"),
        ("snip", "snip asks for grad"),
        ("synflow", "synflow asks for flow"),
        ("wanda", "wanda asks for activation"),
        ("large_init", "large_init is not one of the weight as it is"),
        (lambda weight: (weight > 0).float(), "cannot be differentiated by the weight"),
        (lambda weight: weight.abs().sum(), "must return one real score per weight"),
        ("large_finl", "did you mean 'large_final'"),
    ],
)
def test_criteria_that_make_no_penalty_are_refused(criterion, message):
    with pytest.raises(ValueError, match=message):
        Regularizer(linear(), criteria=criterion)


def test_every_built_in_criterion_is_refused_or_works():
    for name in criteria:
        try:
            regularizer = Regularizer(linear(), criteria=name)
        except ValueError as error:
            assert "makes no penalty" in str(error)  # noqa: PT017
        else:
            assert regularizer.penalty().requires_grad


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model is a torch.nn.Module, not list"):
        Regularizer([])


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
@given(st.integers(0, 1000), st.sampled_from([*granularities, "3x2"]), st.floats(0.01, 0.3))
def test_the_proximal_step_minimizes_what_it_is_to_minimize(seed, granularity, threshold):
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
        moves = {name: 1e-3 * torch.randn_like(each.parameter) for name, each in regularizer.sparsifier.targets.items()}
        for sign in (1, -2, 1):
            for name, move in moves.items():
                regularizer.sparsifier.targets[name].parameter.data.add_(sign * move)
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


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (-1, "a threshold is a number from 0 on, not -1"),
        ("a", "not 'a'"),
        (math.nan, "not nan"),
        ({"0.wieght": 1.0}, "no weight '0.wieght' is regularized; did you mean '0.weight'"),
    ],
)
def test_wrong_thresholds_are_refused_before_anything_is_changed(threshold, message):
    model = linear()
    with pytest.raises(ValueError, match=message):
        Regularizer(model).proximal_step(threshold)
    assert torch.equal(model[0].weight, WEIGHTS)


def test_a_proximal_step_needs_large_final():
    with pytest.raises(ValueError, match="criterion large_final, not squared_final"):
        Regularizer(linear(), criteria="squared_final").proximal_step(0.1)


# --- In a Learner -------------------------------------------------------------------------------------------------


@pytest.fixture
def fastai():
    return pytest.importorskip("fastai.vision.all", reason="RegularizeCallback is fastai's")


def weights_of(model):
    return {name: target.parameter for name, target in find_weights(model).items()}


def gradients_of(learn, **options):
    """Gradients of the weights at the first step of a fit with the callback; without it, if no weight is given."""
    from fastai.learner import Callback, CancelFitException

    from sparsifai.all import RegularizeCallback

    seen = {}

    class See(Callback):
        order = 8

        def before_step(self):
            seen.update({name: each.grad.clone() for name, each in weights_of(self.learn.model).items()})
            raise CancelFitException

    callbacks = options.pop("callbacks", [])
    regularize = [RegularizeCallback(**options)] if options else []
    learn.fit(1, cbs=[*regularize, *callbacks, See()])
    return seen


@pytest.mark.fastai
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_the_callback_adds_the_penalty_to_the_gradients(make_learner, granularity):
    model = small_net()
    plain = gradients_of(make_learner(copy.deepcopy(model)))
    charged = gradients_of(make_learner(copy.deepcopy(model)), weight=0.3, granularity=granularity)
    (0.3 * Regularizer(model, granularity).penalty()).backward()
    for name, weight in weights_of(model).items():
        added = weight.grad if weight.grad is not None else torch.zeros_like(weight)
        torch.testing.assert_close(charged[name], plain[name] + added)


@pytest.mark.fastai
def test_gradient_accumulation_counts_the_penalty_once(make_learner):
    from fastai.callback.training import GradientAccumulation

    model = small_net()
    plain = gradients_of(make_learner(copy.deepcopy(model)), callbacks=[GradientAccumulation(6)])
    charged = gradients_of(make_learner(copy.deepcopy(model)), weight=0.3, callbacks=[GradientAccumulation(6)])
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(charged[name], plain[name] + 0.3 * weight.detach().sign())


def mixed_precision(dtype=torch.float16, **options):
    """MixedPrecision on the CPU."""
    from fastai.callback.fp16 import MixedPrecision

    class OnTheCpu(MixedPrecision):
        def before_fit(self):
            self.autocast = torch.autocast("cpu", dtype=dtype)
            self.learn.scaler, self.scales = torch.amp.GradScaler("cpu", **options), []

    return OnTheCpu()


@pytest.mark.fastai
def test_mixed_precision_scales_the_penalty_with_the_loss(make_learner):
    model = small_net()
    options = {"init_scale": 1024.0}
    plain = gradients_of(make_learner(copy.deepcopy(model)), callbacks=[mixed_precision(**options)])
    charged = gradients_of(make_learner(copy.deepcopy(model)), weight=0.3, callbacks=[mixed_precision(**options)])
    for name, weight in weights_of(model).items():
        # See comes before MixedPrecision unscales.
        difference = (charged[name] - plain[name]) / 1024
        torch.testing.assert_close(difference, 0.3 * weight.detach().sign(), atol=1e-2, rtol=0)


@pytest.mark.fastai
def test_the_shown_losses_know_nothing_of_the_penalty(make_learner):
    from sparsifai.all import RegularizeCallback

    plain, charged, callback = make_learner(), make_learner(), RegularizeCallback(1e3, "filter")
    plain.fit(1, 0.0)
    charged.fit(1, 0.0, cbs=callback)
    assert charged.recorder.values == plain.recorder.values
    assert charged.recorder.losses == plain.recorder.losses
    assert float(callback.penalty) == pytest.approx(
        1e3 * float(Regularizer(charged.model, "filter").penalty().detach()), rel=1e-5
    )
    assert not callback.penalty.requires_grad
    assert callback.regularizer is None


@pytest.mark.fastai
def test_the_schedule_is_followed_over_the_whole_fit(make_learner):
    from fastai.learner import Callback

    from sparsifai.all import RegularizeCallback

    seen, callback = [], RegularizeCallback(1.0, schedule="lin")

    class See(Callback):
        def after_batch(self):
            if self.training:
                seen.append(float(callback.penalty))

    learn = make_learner(steps=4)
    learn.fit(2, 0.0, cbs=[callback, See()])
    whole = float(Regularizer(learn.model).penalty().detach())
    assert seen == pytest.approx([whole * step / 8 for step in range(8)])


@pytest.mark.fastai
def test_the_proximal_step_follows_the_step_with_the_rate_of_each_group(make_learner):
    from sparsifai.all import RegularizeCallback

    def halves(model):
        layers = list(model)
        return [[p for each in part for p in each.parameters()] for part in (layers[:4], layers[4:])]

    torch.manual_seed(5)
    model = small_net()
    plain = make_learner(copy.deepcopy(model), steps=1, splitter=halves)
    plain.fit(1, [0.0, 0.1])
    charged, callback = (
        make_learner(copy.deepcopy(model), steps=1, splitter=halves),
        RegularizeCallback(0.5, "filter", proximal=True),
    )
    charged.fit(1, [0.0, 0.1], cbs=callback)
    regularizer = Regularizer(plain.model, "filter")
    rates = {name: 0.0 if name.startswith(("0", "3")) else 0.1 for name in regularizer.sparsifier.targets}
    assert set(rates.values()) == {0.0, 0.1}
    regularizer.proximal_step({name: 0.5 * rate for name, rate in rates.items()})
    for expected, found in zip(plain.model.parameters(), charged.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(callback.penalty, 0.5 * regularizer.penalty().detach())


@pytest.mark.fastai
def test_with_an_optimizer_of_torch(make_learner, fastai):
    from functools import partial

    from sparsifai.all import RegularizeCallback

    learn = make_learner(opt_func=partial(fastai.OptimWrapper, opt=torch.optim.SGD))
    learn.fit(1, 0.5, cbs=RegularizeCallback(10.0, proximal=True))
    assert all(not weight.any() for weight in weights_of(learn.model).values())


@pytest.mark.fastai
def test_no_proximal_step_after_a_step_that_was_not_taken(make_learner):
    from fastai.learner import Callback, CancelStepException

    from sparsifai.all import RegularizeCallback

    class Skip(Callback):
        order = -5
        steps = 0

        def before_step(self):
            self.steps += 1
            if self.steps != 2:
                raise CancelStepException

    callback, taken = RegularizeCallback(0.01, proximal=True), []
    learn = make_learner(steps=3)
    step = Regularizer.proximal_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Regularizer, "proximal_step", lambda self, each: (taken.append(1), step(self, each)))
        learn.fit(1, 0.1, cbs=[callback, Skip()])
    assert len(taken) == 1


@pytest.mark.fastai
@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("granularity", ["weight", "filter"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_beside_sparsify_callback_the_target_is_exact_and_zeros_stay(
    make_learner, fastai, proximal, granularity, optimizer
):
    from sparsifai.all import RegularizeCallback, SparsifyCallback

    seen = []

    class Watch(fastai.Callback):
        __module__ = "fastai.watch"  # a callback that is known, as the others are
        order = 99

        def after_step(self):
            masks = self.learn.sparsify.sparsifier.masks
            seen.append(all(not weights[name][~mask.expand_as(weights[name])].any() for name, mask in masks.items()))
            alone.append(self.learn.keep_sparsity.is_alone())

    learn, alone = make_learner(steps=5, opt_func=getattr(fastai, optimizer)), []
    weights = weights_of(learn.model)
    sparsify = SparsifyCallback(0.6, schedule="lin")
    learn.fit(2, 1e-2, cbs=[RegularizeCallback(0.05, granularity, proximal=proximal), sparsify, Watch()])
    total = sum(mask.numel() for mask in sparsify.sparsifier.masks.values())
    masked = sum(int((~mask).sum()) for mask in sparsify.sparsifier.masks.values())
    assert masked == int(0.6 * total + 0.5)
    assert seen == [True] * 10
    assert all(alone)
    learn.fit(1, 1e-2, cbs=RegularizeCallback(0.05, granularity, proximal=proximal))
    assert sparsify.sparsifier.sparsity >= masked / total


@pytest.mark.fastai
def test_two_in_one_fit_are_the_sparse_group_lasso(make_learner):
    from sparsifai.all import RegularizeCallback

    model = small_net()
    first, second = RegularizeCallback(0.1), RegularizeCallback(0.2, "filter")
    plain = gradients_of(make_learner(copy.deepcopy(model)))
    learn = make_learner(copy.deepcopy(model))
    both = gradients_of(learn, callbacks=[first, second])
    (0.1 * Regularizer(model).penalty() + 0.2 * Regularizer(model, "filter").penalty()).backward()
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(both[name], plain[name] + weight.grad)
    assert not [each for each in learn.cbs if isinstance(each, RegularizeCallback)]


@pytest.mark.fastai
def test_validate_get_preds_and_lr_find_change_nothing(make_learner):
    from sparsifai.all import RegularizeCallback

    for proximal in (False, True):
        learn = make_learner(cbs=RegularizeCallback(0.1, "filter", proximal=proximal), metrics=[])
        before = [parameter.clone() for parameter in learn.model.parameters()]
        learn.validate()
        learn.get_preds()
        learn.lr_find(num_it=20, show_plot=False)
        assert all(torch.equal(old, new) for old, new in zip(before, learn.model.parameters(), strict=True))
        assert learn.regularize.regularizer is None
        learn.fit(1)
        assert learn.regularize.penalty > 0


@pytest.mark.fastai
def test_a_validation_inside_the_fit_takes_nothing_away(make_learner, fastai):
    from sparsifai.all import RegularizeCallback

    class Look(fastai.Callback):
        def after_batch(self):
            if self.training:
                self.learn.validate()
                self.learn.model.train()
                self.learn.training = True
                seen.append(self.learn.regularize.regularizer)

    seen = []
    make_learner().fit(1, cbs=[RegularizeCallback(0.1), Look()])
    assert seen[0] is not None
    assert len(set(map(id, seen))) == 1


@pytest.mark.fastai
def test_an_interrupted_fit_and_another_model_after_it(make_learner, fastai):
    from sparsifai.all import RegularizeCallback

    class Stop(fastai.Callback):
        def after_loss(self):
            raise KeyboardInterrupt

    learn = make_learner(cbs=RegularizeCallback(0.1, proximal=True))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Stop())
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(128, 3))
    learn.opt = None
    learn.fit(1, 0.5)
    assert float(learn.regularize.penalty) == pytest.approx(
        0.1 * float(learn.model[1].weight.detach().abs().sum()), rel=1e-4
    )


@pytest.mark.fastai
def test_fine_tune_with_a_head_that_has_no_such_groups(make_learner):
    from sparsifai.all import RegularizeCallback

    def splitter(model):
        return [[p for each in list(model)[:12] for p in each.parameters()], list(model[12].parameters())]

    learn = make_learner(splitter=splitter, cbs=RegularizeCallback(0.1, "filter"))
    learn.freeze()
    learn.fit(1)
    assert learn.regularize.penalty == 0
    learn.unfreeze()
    learn.fit(1)
    assert learn.regularize.penalty > 0


@pytest.mark.fastai
def test_exported_learners_and_state_dicts_know_nothing_of_it(tmp_path, fastai):
    from conftest import packages_of, picture_learner

    from sparsifai.all import RegularizeCallback

    learn = picture_learner(RegularizeCallback(0.1, "filter"), path=tmp_path)
    keys = set(learn.model.state_dict())
    learn.fit(1)
    learn.export()
    packages = packages_of(tmp_path / "export.pkl")
    assert "fastai" in packages
    assert "sparsifai" not in packages
    assert set(learn.model.state_dict()) == keys
    assert not any(module._forward_hooks for module in learn.model.modules())


@pytest.mark.fastai
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": -1}, ValueError, "weight, that of the penalty, is a number from 0 on, not -1"),
        ({"weight": math.inf}, ValueError, "not inf"),
        ({"weight": "filter"}, ValueError, "not 'filter'"),
        ({"weight": True}, ValueError, "not True"),
        ({"weight": 1, "granularity": "filtr"}, ValueError, "did you mean 'filter'"),
        ({"weight": 1, "criteria": "random"}, ValueError, "random asks for rng"),
        ({"weight": 1, "criteria": "snip"}, ValueError, "snip asks for grad"),
        ({"weight": 1, "criteria": "large_init"}, ValueError, "not one of the weight"),
        ({"weight": 1, "criteria": "movement", "proximal": True}, ValueError, "large_final, not movement"),
        ({"weight": 1, "schedule": "linear"}, ValueError, "did you mean 'lin'"),
        ({"weight": 1, "layers": 3}, TypeError, "3 selects no layers"),
    ],
)
def test_wrong_arguments_of_the_callback_are_refused_in_the_constructor(fastai, arguments, error, message):
    from sparsifai.all import RegularizeCallback

    with pytest.raises(error, match=message):
        RegularizeCallback(**arguments)


@pytest.mark.fastai
def test_what_only_the_model_can_refute_is_refused_before_the_first_step(make_learner, fastai):
    from sparsifai.all import RegularizeCallback

    learn = make_learner()
    before = [parameter.clone() for parameter in learn.model.parameters()]
    for options, message in (
        ({"exclude": "nothing.*"}, "matches 'nothing"),
        ({"criteria": lambda weight: (weight > 0).float()}, "cannot be differentiated"),
    ):
        with pytest.raises(ValueError, match=message):
            learn.fit(1, cbs=RegularizeCallback(1.0, **options))
    learn.create_opt()
    learn.opt.param_lists = fastai.L(fastai.L([nn.Parameter(torch.zeros(2))]))
    with pytest.raises(ValueError, match="the optimizer steps none of the weights"):
        learn.fit(1, cbs=RegularizeCallback(1.0, proximal=True))
    assert all(torch.equal(old, new) for old, new in zip(before, learn.model.parameters(), strict=True))


@pytest.mark.fastai
def test_the_group_lasso_of_filters_yields_whole_filters_of_zeros_and_the_lasso_does_not(fastai):
    """Of equal weight, on the digits: 11 to 14 of 80 filters, and 0.96 to 0.98 right; the lasso none, at 65 % zeros."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    from examples.digits import accuracy_of, conv_net, digits_loaders
    from sparsifai.all import RegularizeCallback

    found = {}
    for granularity in ("filter", "weight"):
        fastai.set_seed(0, reproducible=True)
        learn = fastai.Learner(
            digits_loaders(), conv_net(), loss_func=fastai.CrossEntropyLossFlat(), metrics=fastai.accuracy
        )
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(8, 1e-2, cbs=RegularizeCallback(0.45, granularity, proximal=True))
        weights = [weight for weight in weights_of(learn.model).values() if weight.dim() == 4]
        filters = sum(int((weight == 0).flatten(1).all(1).sum()) for weight in weights)
        zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
        found[granularity] = filters, zeros
        assert accuracy_of(learn) > 0.9
    assert found["filter"][0] >= 6
    assert found["weight"][0] == 0
    assert found["weight"][1] > 0.5
