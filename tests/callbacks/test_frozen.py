"""Layers that are frozen when a fit begins: they are pruned once they are trained, and a large part is told."""

import re

import pytest
import torch
from torch import nn

fastai = pytest.importorskip("fastai.vision.all", reason="fastai callbacks need fastai")

from conftest import follower_masks, small_net  # noqa: E402
from fastai.learner import Callback  # noqa: E402

from sparsifai.all import Sparsifier, SparsifyCallback, highest_sparsity, lottery_ticket  # noqa: E402

FROZEN = "(?s).*of the weights .* are frozen, so they stay dense until they are trained"


def body_of(model):
    """All layers but the last two that have weights."""
    return list(model.children())[:-3]


def set_trained(modules, trained):
    for module in modules:
        module.requires_grad_(trained)


def zeros(model):
    """Fraction of zeros in the weights of all convolutions and matrices."""
    weights = [each for each in model.parameters() if each.dim() > 1]
    return sum(int((each == 0).sum()) for each in weights) / sum(each.numel() for each in weights)


def unfreeze_in(epoch):
    """A callback that unfreezes the body when an epoch begins."""
    return Callback(before_epoch=lambda self: set_trained(body_of(self.model), self.epoch >= epoch))


def frozen_learner(make_learner, **options):
    model = small_net()
    return make_learner(model, steps=8, splitter=lambda model: [list(model.parameters())], **options)


@pytest.mark.parametrize("options", [
    {}, {"context": "local", "schedule": "one_shot"}, {"criteria": "movement"}, {"criteria": "snip"},
    {"regrow": "grad"}, {"granularity": "filter", "layers": None}, {"criteria": "magnitude_increase", "every": 3},
])  # fmt: skip
def test_layers_that_a_callback_unfreezes_in_the_fit_are_pruned_like_the_others(make_learner, options):
    learn, callback = frozen_learner(make_learner, opt_func=fastai.Adam), SparsifyCallback(0.8, **options)
    with pytest.warns(UserWarning, match=FROZEN):
        learn.fit(4, 0.01, cbs=[callback, unfreeze_in(1)])
    reached = callback.sparsifier.sparsity
    assert reached == pytest.approx(0.8, abs=0.1 if options.get("granularity") else 0.005)
    assert not [layer.why_dense for layer in callback.sparsifier.layers.values() if layer.why_dense == "frozen"]
    if not options.get("granularity"):
        assert zeros(learn.model) == pytest.approx(0.8, abs=0.005)
    learn.fit(1, 0.01)
    assert callback.sparsifier.sparsity == reached


def test_layers_that_are_unfrozen_after_the_ramp_are_pruned_too(make_learner):
    learn, callback = frozen_learner(make_learner), SparsifyCallback(0.8, schedule="one_shot")
    with pytest.warns(UserWarning, match=FROZEN):
        learn.fit(4, 0.01, cbs=[callback, unfreeze_in(3)])
    assert zeros(learn.model) == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("event", ["after_train", "before_validate", "after_epoch"])
@pytest.mark.parametrize("options", [{"schedule": "one_shot"}, {"every": 100}])
def test_reading_the_sparsity_in_between_does_not_hide_the_layers_that_join(make_learner, event, options):
    learn, callback = frozen_learner(make_learner), SparsifyCallback(0.8, **options)

    def unfreeze(self):
        if self.epoch == 1:
            set_trained(body_of(self.model), True)
            callback.sparsifier.report()

    reads = Callback(after_batch=lambda self: repr(callback.sparsifier))
    with pytest.warns(UserWarning, match=FROZEN):
        learn.fit(4, 0.01, cbs=[callback, Callback(before_epoch=freeze_at_first), Callback(**{event: unfreeze}), reads])
    assert zeros(learn.model) == pytest.approx(0.8, abs=0.005)


def freeze_at_first(self):
    if self.epoch == 0:
        set_trained(body_of(self.model), False)


def test_layers_that_are_unfrozen_between_two_fits_are_pruned_in_the_second(make_learner):
    learn, callback = frozen_learner(make_learner), SparsifyCallback(0.8, schedule="one_shot")
    set_trained(body_of(learn.model), False)
    with pytest.warns(UserWarning, match=FROZEN):
        learn.fit(1, 0.01, cbs=callback)
    set_trained(body_of(learn.model), True)
    learn.fit(1, 0.01, cbs=callback)
    assert zeros(learn.model) == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("criteria", ["random", "movement", "taylor", "movement_pruning", "grad", "snip", "wanda"])
def test_zeros_that_a_frozen_layer_has_count_when_it_joins(make_learner, criteria):
    if criteria == "grad":
        criteria = lambda grad: grad.abs()  # noqa: E731
    learn = frozen_learner(make_learner)
    Sparsifier(learn.model, layers=["0", "3", "5"]).sparsify(0.6)
    callback = SparsifyCallback(0.8, criteria=criteria)
    with pytest.warns(UserWarning, match=FROZEN):
        learn.fit(4, 0.01, cbs=[callback, unfreeze_in(1)])
    assert zeros(learn.model) == pytest.approx(0.8, abs=0.005)


def test_a_sparsity_for_a_layer_that_is_frozen_at_first_is_reached_later(make_learner):
    learn, callback = frozen_learner(make_learner), SparsifyCallback({"0": 0.8, "12": 0.5})
    with pytest.warns(UserWarning, match=FROZEN):
        learn.fit(4, 0.01, cbs=[callback, unfreeze_in(1)])
    assert zeros(learn.model[0]) == pytest.approx(0.8, abs=0.01)
    assert zeros(learn.model[12]) == pytest.approx(0.5, abs=0.05)


def test_groups_that_are_unfrozen_in_the_middle_of_a_fit_are_pruned(make_learner):
    learn = make_learner(steps=8, splitter=lambda model: [list(each.parameters()) for each in (model[:5], model[5:])])
    learn.freeze()
    callback = SparsifyCallback(0.8)
    learn.fit(4, 0.01, cbs=[callback, Callback(before_epoch=lambda self: self.epoch == 1 and self.learn.unfreeze())])
    assert zeros(learn.model) == pytest.approx(0.8, abs=0.005)


def test_what_the_optimizer_does_not_step_is_told(make_learner):
    learn = make_learner(splitter=lambda model: [list(model[12].parameters())])
    with pytest.warns(UserWarning, match="of the weights to prune .* are not in the optimizer, so they are pruned but"):
        learn.fit(1, cbs=SparsifyCallback(0.5))


class Pair(nn.Module):
    """Two nets that are trained in turns, as an adversarial pair is."""

    def __init__(self):
        super().__init__()
        self.first, self.second = small_net(), small_net()

    def forward(self, x):
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("criteria", ["large_final", "random", "movement", "snip", "taylor"])
def test_both_nets_of_a_pair_that_is_trained_in_turns_are_pruned(make_learner, criteria):
    def switch(self):
        self.model.first.requires_grad_(self.iter % 2 == 0)
        self.model.second.requires_grad_(self.iter % 2 == 1)

    learn, callback = make_learner(Pair(), steps=8), SparsifyCallback(0.8, criteria=criteria)
    with pytest.warns(UserWarning, match=FROZEN):
        learn.fit(3, 0.01, cbs=[callback, Callback(before_batch=switch)])
    assert zeros(learn.model) == pytest.approx(0.8, abs=0.005)
    assert 0.6 < zeros(learn.model.first) < 0.95
    assert 0.6 < zeros(learn.model.second) < 0.95


def test_norm_layers_behind_unfrozen_filters_are_masked_with_them():
    model = small_net()
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=FROZEN):
        sparsifier = Sparsifier(model, "filter", "local")
    before = set(follower_masks(sparsifier))
    model[0].requires_grad_(True)
    sparsifier.sparsify(0.5)
    assert set(follower_masks(sparsifier)) > before
    assert set(follower_masks(sparsifier)) == set(follower_masks(Sparsifier(small_net(), "filter", "local")))
    dead = ~sparsifier.masks["0.weight"].flatten()
    assert dead.any()
    assert (model[0].bias[dead] == 0).all()


def test_a_plain_loop_prunes_what_is_trained_by_then():
    model = small_net()
    set_trained(body_of(model), False)
    with pytest.warns(UserWarning, match=FROZEN):
        sparsifier = Sparsifier(model, criteria="magnitude_increase")
    set_trained(body_of(model), True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    sparsifier.sparsify(0.5)
    assert zeros(model) == pytest.approx(0.5, abs=0.005)
    assert sparsifier.sparsity == zeros(model)


def test_the_share_that_is_frozen_is_told(make_learner):
    model = small_net()
    set_trained(body_of(model), False)
    weights = {name: each.numel() for name, each in model.named_parameters() if each.dim() > 1}
    part = 1 - (weights["10.weight"] + weights["12.weight"]) / sum(weights.values())
    with pytest.warns(UserWarning, match=re.escape(f"{part:.2%} of the weights (")) as caught:
        Sparsifier(model)
    assert caught[0].filename == __file__
    learn = make_learner(model, metrics=fastai.accuracy, splitter=lambda model: [list(model.parameters())])
    with pytest.warns(UserWarning, match=FROZEN):
        lottery_ticket(learn, 0.5, rounds=1)
    with pytest.warns(UserWarning, match=FROZEN):
        highest_sparsity(learn, 1.0)


def test_a_small_frozen_part_and_one_that_is_named_are_not_warned_of():
    model = small_net()
    model[12].requires_grad_(False)
    Sparsifier(model)
    set_trained(body_of(model), False)
    assert len(Sparsifier(model, layers="*").masks) == len([each for each in model.parameters() if each.dim() > 1])


def test_a_fit_of_frozen_groups_that_shows_no_table_warns(make_learner):
    learn = make_learner(splitter=lambda model: [list(each.parameters()) for each in (model[:5], model[5:])])
    learn.freeze()
    with learn.no_logging(), pytest.warns(UserWarning, match="some layers are frozen, so sparsity is held at 0.00%"):
        learn.fit(1, cbs=SparsifyCallback(0.8))


def test_with_coupled_filters_frozen_layers_stay_dense_and_the_warning_says_so():
    pytest.importorskip("torch_pruning")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    model[0].requires_grad_(False)
    model[4].requires_grad_(False)
    with pytest.warns(UserWarning, match="stay dense even if they are trained later, because"):
        sparsifier = Sparsifier(model, "filter", coupled=True, example_input=torch.rand(1, 3, 12, 12))
    model.requires_grad_(True)
    sparsifier.sparsify(0.5)
    assert (model[0].weight != 0).all()
