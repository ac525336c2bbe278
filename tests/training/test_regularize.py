"""The penalty in a fastai Learner."""

import copy

import pytest
import torch
from conftest import layers_of, small_net
from torch import nn

from sparsifai import Regularizer
from sparsifai.model.layers import find_weights


@pytest.fixture
def fastai():
    return pytest.importorskip("fastai.vision.all", reason="RegularizeCallback is fastai's")


def weights_of(model):
    return {name: target.parameter for name, target in find_weights(model).items()}


def gradients_of(learn, **options):
    """Gradients of the weights in the first step of a fit.

    options: of RegularizeCallback, which is left out without them; and `callbacks`, other callbacks.
    """
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
        # See runs before MixedPrecision unscales the gradients.
        difference = (charged[name] - plain[name]) / 1024
        torch.testing.assert_close(difference, 0.3 * weight.detach().sign(), atol=1e-2, rtol=0)


@pytest.mark.fastai
def test_the_shown_losses_are_without_the_penalty(make_learner):
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
def test_the_proximal_step_uses_the_learning_rate_of_each_parameter_group(make_learner):
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
    rates = {name: 0.0 if name.startswith(("0", "3")) else 0.1 for name in layers_of(regularizer.sparsifier)}
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
def test_no_proximal_step_after_a_cancelled_step(make_learner):
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
def test_with_sparsify_callback_the_sparsity_is_exact_and_zeros_stay(
    make_learner, fastai, proximal, granularity, optimizer
):
    from sparsifai.all import RegularizeCallback, SparsifyCallback
    from sparsifai.callbacks.others import are_all_known

    seen = []

    class Watch(fastai.Callback):
        __module__ = "fastai.watch"  # so that KeepSparsity trusts it not to change weights
        order = 99

        def after_step(self):
            masks = self.learn.sparsify_callback.sparsifier.masks
            seen.append(all(not weights[name][~mask.expand_as(weights[name])].any() for name, mask in masks.items()))
            alone.append(are_all_known(self.learn))

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
def test_a_validation_inside_the_fit_keeps_the_regularizer(make_learner, fastai):
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
def test_a_fit_with_another_model_after_an_interrupted_one(make_learner, fastai):
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
def test_fine_tune_when_the_head_has_no_such_groups(make_learner):
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
def test_exported_learners_and_state_dicts_include_nothing_of_it(tmp_path, fastai):
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
def test_errors_that_depend_on_the_model_come_before_the_first_step(make_learner, fastai):
    from sparsifai.all import RegularizeCallback

    learn = make_learner()
    before = [parameter.clone() for parameter in learn.model.parameters()]
    for options, message in (
        ({"exclude": "nothing.*"}, "nothing"),
        ({"criteria": lambda weight: (weight > 0).float()}, "gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            learn.fit(1, cbs=RegularizeCallback(1.0, **options))
    learn.create_opt()
    learn.opt.param_lists = fastai.L(fastai.L([nn.Parameter(torch.zeros(2))]))
    with pytest.raises(ValueError, match="optimizer"):
        learn.fit(1, cbs=RegularizeCallback(1.0, proximal=True))
    assert all(torch.equal(old, new) for old, new in zip(before, learn.model.parameters(), strict=True))


@pytest.mark.fastai
@pytest.mark.slow
def test_the_group_lasso_zeroes_whole_filters_and_the_lasso_does_not(fastai):
    """With the same weight on the digits: 11 to 14 of 80 filters and accuracy 0.96 to 0.98; the lasso zeroes none."""
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
