"""Several SparsifyCallbacks in one fit, each with layers of its own."""

from functools import partial

import pytest
import torch
from torch import nn

fastai = pytest.importorskip("fastai.vision.all", reason="the callbacks are fastai's")
pytestmark = pytest.mark.fastai

from attentions import WIDTH, Mlp, Net, Separate  # noqa: E402
from conftest import small_learner  # noqa: E402
from fastai.callback.core import CancelFitException  # noqa: E402
from fastai.learner import Callback  # noqa: E402
from watch import At, raises  # noqa: E402

from sparsifai.all import KeepSparsity, SparsifyCallback, between  # noqa: E402


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def fitted(*callbacks, epochs=3, **options):
    torch.manual_seed(0)
    learn = small_learner(net(), **options)
    learn.fit(epochs, 0.1, wd=0.1, cbs=list(callbacks))
    return learn


def weights(learn):
    return {name: parameter.detach().clone() for name, parameter in learn.model.named_parameters()}


def sparsities(learn):
    return [float((learn.model[position].weight == 0).float().mean()) for position in (1, 3, 5)]


class Look(Callback):
    """After each step, the fraction of zeros in each layer."""

    order = 99

    def before_fit(self):
        self.seen = []

    def after_step(self):
        self.seen.append(sparsities(self.learn))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"criteria": "movement"}, {"straight_through": True}, {"straight_through": True, "gradient_sparsity": 0.3},
        {"regrow": "grad", "every": 2}, {"granularity": "row"}, {"schedule": "ac_dc"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("opt_func", [fastai.SGD, fastai.Adam], ids=["sgd", "adam"])
def test_two_of_single_layers_are_one_with_a_dictionary(options, opt_func):
    together = fitted(SparsifyCallback({"1": 0.5, "3": 0.75}, context="local", **options), opt_func=opt_func)
    first = SparsifyCallback(0.5, context="local", layers="1", **options)
    second = SparsifyCallback(0.75, context="local", layers="3", **options)
    apart = fitted(first, second, opt_func=opt_func)
    expected = weights(together)
    for name, weight in weights(apart).items():
        assert torch.equal(weight, expected[name]), name
    assert sparsities(apart)[:2] == pytest.approx([0.5, 0.75], abs=0.07)
    assert "step" not in vars(apart.opt)
    (keeper,) = apart._grab_cbs(KeepSparsity)
    assert keeper.masks_of_gradients is None


def test_each_has_its_own_axes_and_schedule():
    look = Look()
    learn = small_learner(net())
    callbacks = [
        SparsifyCallback(0.5, "row", "local", layers="1", schedule="lin"),
        SparsifyCallback(0.75, "weight", "global", "random", layers="3", schedule="one_shot"),
        SparsifyCallback(0.5, "column", "local", "movement", layers="5", schedule="iterative"),
    ]
    learn.fit(2, 0.1, cbs=[*callbacks, look])
    first, second, third = zip(*look.seen, strict=True)
    assert first == tuple(round(16 * 0.5 * step / 8) / 16 for step in range(1, 9))
    assert set(second) == {0.75}
    assert third == pytest.approx([2 / 12] * 2 + [4 / 12] * 3 + [6 / 12] * 3)
    assert (learn.model[1].weight == 0).all(1).sum() == 8
    assert (learn.model[5].weight == 0).all(0).sum() == 6


def test_the_table_the_curves_and_the_keeper_are_those_of_all():
    learn = small_learner(net())
    pair = [SparsifyCallback(0.5, layers="1"), SparsifyCallback(0.9, layers="3")]
    learn.fit(2, 0.1, cbs=pair)
    zeros = sum(int((learn.model[position].weight == 0).sum()) for position in (1, 3))
    assert learn.recorder.metric_names == ["epoch", "train_loss", "valid_loss", "sparsity", "time"]
    assert learn.recorder.values[-1][-1] == pytest.approx(zeros / (2048 + 192))
    assert learn.recorder.hps["sparsity"][-1] == pytest.approx((0.5 * 2048 + 0.9 * 192) / 2240)
    assert len(learn.recorder.hps["sparsity"]) == 8
    assert [epoch for epoch, *_ in learn.recorder.sparsity_by_epoch] == [0, 1]
    (keeper,) = learn._grab_cbs(KeepSparsity)
    assert {name for name, mask in keeper.masks.items() if not mask.all()} == {"1.weight", "3.weight"}
    before = sparsities(learn)
    learn.fit(2, 0.1)
    assert sparsities(learn) == before
    learn.fit(2, 0.1, cbs=pair)  # again: both go on
    assert sparsities(learn) == before
    assert len(learn._grab_cbs(KeepSparsity)) == 1
    assert len(learn.metrics) == 0


def test_weights_regrow_in_the_layers_of_one_while_the_other_prunes():
    learn = small_learner(net())
    regrowing = SparsifyCallback(
        0.8, layers="1", regrow="random", schedule="one_shot", every=1, drop_schedule=between("lin", 0.9, 1)
    )
    plain = SparsifyCallback(0.9, layers="3", schedule="lin")
    learn.fit(2, 0.1, cbs=[plain, regrowing])
    masks = {**regrowing.sparsifier.masks, **plain.sparsifier.masks}
    assert [1 - float(mask.float().mean()) for mask in masks.values()] == pytest.approx([0.8, 0.9], abs=0.003)
    assert (learn.model[1].weight[~masks["1.weight"]] == 0).all()
    assert regrowing.sparsifier.report().explored > 0.5


@pytest.mark.parametrize("alone", [False, True])
def test_in_a_later_fit_the_zeros_of_one_are_not_fixed_by_the_other(alone):
    learn = small_learner(net())
    regrowing = SparsifyCallback(0.8, layers="1", regrow="random", every=1, drop_schedule=lambda t: 0.0)
    plain = SparsifyCallback(0.9, layers="3")
    learn.fit(1, 0.1, cbs=[regrowing] if alone else [regrowing, plain])
    if alone:
        learn.fit(1, 0.1, cbs=plain)  # which keeps the zeros of the other
    learn.fit(1, 0.1, cbs=[plain, regrowing])
    for callback, name in ((regrowing, "1.weight"), (plain, "3.weight")):
        assert torch.equal(learn.keep_sparsity.masks[name], callback.sparsifier.masks[name])
    assert 1 - float(learn.keep_sparsity.masks["1.weight"].float().mean()) == pytest.approx(0.8, abs=0.001)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["early first", "late first"])
def test_masks_of_one_settle_before_those_of_the_other(order):
    learn, changing = small_learner(net(), opt_func=fastai.Adam), []
    early = SparsifyCallback(0.5, layers="1", straight_through=True, schedule="one_shot", settle=0.25)
    late = SparsifyCallback(0.5, layers="3", straight_through=True, schedule="one_shot", settle=0.75)
    pair = [early, late]

    class LookAtMasks(Callback):
        order = 99

        def after_step(self):
            changing.append([each.sparsifier.is_straight_through for each in pair])

    learn.fit(1, 0.1, cbs=[*pair[order], LookAtMasks()])
    assert changing == [[False, True], [False, True], [False, False], [False, False]]
    assert "step" not in vars(learn.opt)
    assert sparsities(learn) == [0.5, 0.5, 0.0]


def test_only_the_dense_weights_of_straight_through_training_move():
    learn = small_learner(net(), opt_func=partial(fastai.SGD, mom=0.9))
    plain = SparsifyCallback(0.5, layers="1", schedule="one_shot")
    changing = SparsifyCallback(0.5, layers="3", straight_through=True, schedule="one_shot", settle=1.0)
    masks, gradients = [], []

    class LookAtGradients(Callback):
        order = 10.9  # after KeepSparsity

        def before_step(self):
            masks.append(changing.sparsifier.masks["3.weight"].clone())
            moved = self.learn.model[1].weight.grad[~plain.sparsifier.masks["1.weight"]]
            gradients.append((float(moved.abs().sum()), float(self.learn.model[3].weight.grad[~masks[-1]].abs().sum())))

    learn.fit(3, 0.5, cbs=[plain, changing, LookAtGradients()])
    assert all(pruned == 0 for pruned, _ in gradients)
    assert all(dense > 0 for _, dense in gradients)
    assert any(not torch.equal(mask, masks[0]) for mask in masks)
    assert sparsities(learn) == [0.5, 0.5, 0.0]


def test_zeros_that_the_model_has_stay_unless_a_schedule_revives_them():
    model = net()
    with torch.no_grad():
        for position in (1, 3, 5):
            model[position].weight[:, :2] = 0
    learn = small_learner(model)
    falling = SparsifyCallback(0.5, layers="1", schedule=lambda t: 1 - t)
    rising = SparsifyCallback(0.5, layers="3", schedule="lin")
    learn.fit(2, 0.1, wd=0.1, cbs=[falling, rising])
    assert falling.sparsifier.masks["1.weight"].all()
    assert learn.keep_sparsity.masks["1.weight"].all()
    assert (model[3].weight[:, :2] == 0).all()
    assert (model[5].weight[:, :2] == 0).all()
    assert sparsities(learn)[1] == 0.5


def test_heads_and_neurons_in_one_fit():
    learn = small_learner(Net(lambda: nn.Sequential(Separate(6), Mlp())), shape=(4, WIDTH))
    heads, neurons = SparsifyCallback(0.5, "head"), SparsifyCallback(0.5, "neuron")
    learn.fit(2, 1e-3, cbs=[heads, neurons])
    for callback, what in ((heads, "head"), (neurons, "neuron")):
        report = callback.sparsifier.report()
        assert report.what == what
        assert report.selected.sparsity == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("second", [SparsifyCallback(0.8, "row"), SparsifyCallback(0.8, layers=["3", "5"])])
def test_a_layer_that_two_prune_is_refused_and_nothing_changes(second):
    learn, first = small_learner(net()), SparsifyCallback(0.5, layers=["1", "3"])
    before = weights(learn)
    with pytest.raises(ValueError, match="two SparsifyCallbacks both prune .*3.weight; give each of them its"):
        learn.fit(1, cbs=[first, second])
    assert all(torch.equal(weight, before[name]) for name, weight in weights(learn).items())
    assert learn._grab_cbs(KeepSparsity) == []
    assert len(learn.metrics) == 0


def test_trackers_ignore_epochs_before_the_slower_one_has_reached_its_target():
    pair = [SparsifyCallback(0.5, layers="1", schedule="one_shot"), SparsifyCallback(0.9, layers="3", schedule="lin")]
    tracker = Tracker()
    fitted(*pair, tracker)
    assert tracker.compared == [2]


class Tracker(fastai.TrackerCallback):
    def before_fit(self):
        super().before_fit()
        self.compared = []

    def after_epoch(self):
        self.compared.append(self.epoch)


@pytest.mark.parametrize("error", [KeyboardInterrupt, CancelFitException])
@pytest.mark.parametrize("through", [False, True])
def test_a_fit_that_ends_early_leaves_a_sparse_model_and_a_whole_learner(error, through):
    learn, look = small_learner(net()), Look()
    pair = [
        SparsifyCallback(0.5, layers="1", straight_through=through), SparsifyCallback(0.9, layers="3", schedule="lin")
    ]  # fmt: skip
    stop = At("after_step", raises(error), epoch=1, batch=2)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            learn.fit(2, 0.1, cbs=[*pair, look, stop])
    else:
        learn.fit(2, 0.1, cbs=[*pair, look, stop])
    assert sparsities(learn) == look.seen[-1]
    assert "step" not in vars(learn.opt)
    assert len(learn.metrics) == 0
    assert "sparsify_callback" not in vars(learn)
    (keeper,) = learn._grab_cbs(KeepSparsity)
    assert keeper.masks_of_gradients is None
    learn.fit(1, 0.1)
    assert sparsities(learn) == look.seen[-1]


def test_one_that_is_removed_in_the_middle_leaves_its_zeros_and_the_other_goes_on():
    learn, look = small_learner(net()), Look()
    first = SparsifyCallback(0.5, layers="1", schedule="lin")
    second = SparsifyCallback(0.8, layers="3", schedule="lin")
    learn.fit(2, 0.1, cbs=[first, second, look, At("after_batch", lambda: learn.remove_cb(first), epoch=0, batch=3)])
    assert sparsities(learn) == pytest.approx([0.25, 0.8, 0.0], abs=0.003)
    assert look.seen[3][0] == look.seen[-1][0]


def test_the_dense_weights_of_one_that_is_removed_in_the_middle_do_not_move_any_more():
    learn, dense = small_learner(net(), opt_func=partial(fastai.SGD, mom=0.9)), []
    first, second = (SparsifyCallback(0.5, layers=layer, straight_through=True, schedule="one_shot") for layer in "13")

    def remove():
        learn.remove_cb(first)
        dense.append(dense_of(first))

    learn.fit(2, 0.1, cbs=[first, second, At("after_batch", remove, epoch=0, batch=2)])
    assert torch.equal(dense[0], dense_of(first))
    assert sparsities(learn) == [0.5, 0.5, 0.0]
    assert "step" not in vars(learn.opt)


def dense_of(callback):
    """The dense values of what is pruned."""
    sparsifier = callback.sparsifier
    return sparsifier.state_dict()["straight_through"]["values"]["1.weight"][~sparsifier.masks["1.weight"]]


def test_the_name_in_the_learner_stays_with_the_other_one():
    first, second = SparsifyCallback(0.5, layers="1"), SparsifyCallback(0.5, layers="3")
    learn = small_learner(net(), cbs=[first, second])
    assert learn.sparsify_callback is second
    learn.remove_cb(second)
    assert learn.sparsify_callback is first
    learn.remove_cb(first)
    assert "sparsify_callback" not in vars(learn)
