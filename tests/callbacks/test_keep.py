"""KeepSparsity: what keeps zeros in the fit that has made them and in later ones, and how fits hand masks to it."""

import copy
import pickle

import pytest
import torch
from torch import nn

fastai = pytest.importorskip("fastai.vision.all", reason="the callbacks are fastai's")
pytestmark = pytest.mark.fastai

from conftest import follower_masks, masked_of, picture_learner, small_net  # noqa: E402
from fastai.callback.core import CancelFitException  # noqa: E402
from fastai.callback.tracker import SaveModelCallback  # noqa: E402
from fastai.learner import Callback  # noqa: E402
from soundness import assert_sound, counted, share  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402
from watch import Invented, Watch  # noqa: E402

from sparsifai.all import FreezeCallback, KeepSparsity, Sparsifier, SparsifyCallback, between, lin  # noqa: E402

EVENTS = ("before_train", "before_batch", "before_step", "after_step", "after_batch", "after_train", "after_epoch")


class At(Callback):
    """Calls a function of the Learner in one event, in one epoch, and in one batch where the event has one."""

    def __init__(self, event, action, order=99, epoch=1, batch=1):
        self.event, self.action, self.order, self.place = event, action, order, (epoch, batch)
        setattr(self, event, self.act)

    def act(self):
        learn, (epoch, batch) = self.learn, self.place
        is_here = not learn.lock.locked() and learn.epoch == epoch
        if "batch" in self.event or "step" in self.event:
            is_here = is_here and learn.training and learn.iter == batch
        if is_here:
            self.action(learn)

    def __reduce__(self):  # what it calls cannot be pickled
        return Callback, ()


def raises(error):
    def action(learn):
        raise error

    return action


def two_groups(model):
    return fastai.L(list(model[:6].parameters()), list(model[6:].parameters()))


def zeros_of(model):
    return {name: parameter == 0 for name, parameter in model.named_parameters()}


def assert_kept(learn, callback):
    """The keeper masks what the Sparsifier masks, followers too, and nothing else, and all of it is zero."""
    sparsifier, kept = callback.sparsifier, learn.keep_sparsity.masks
    own = dict(sparsifier.all_masks)
    assert all(mask.all() or name in own for name, mask in kept.items())
    assert all(torch.equal(kept[name], mask) for name, mask in own.items())
    for parameter, mask in masked_of(sparsifier):
        assert (parameter[~mask.expand_as(parameter)] == 0).all()


# --- Followers: biases and norm parameters that are masked with whole filters --------------------------------------


def filters(**options):
    return SparsifyCallback(0.5, "filter", "local", **options)


@pytest.mark.filterwarnings("ignore:.*regrow")
@pytest.mark.parametrize("same", [True, False])
def test_regrown_filters_of_a_later_fit_have_their_biases_again(make_learner, same):
    learn = make_learner(steps=6, opt_func=fastai.Adam)
    first = filters(regrow="random", schedule="one_shot", every=2)
    learn.fit(2, 0.01, cbs=first)
    assert_kept(learn, first)
    second = first if same else filters(regrow="random", schedule="one_shot", every=2, seed=1)
    learn.fit(2, 0.01, cbs=second)
    assert_kept(learn, second)


@pytest.mark.filterwarnings("ignore:(?s).*a falling sparsity revives whole outputs")
def test_filters_that_a_falling_schedule_revives_after_an_interrupt_have_their_biases_again(make_learner):
    learn, callback = make_learner(steps=6, opt_func=fastai.Adam), filters(schedule="dsd")
    with pytest.raises(KeyboardInterrupt):
        learn.fit(4, 0.01, cbs=[callback, At("after_batch", raises(KeyboardInterrupt), epoch=1, batch=5)])
    assert_kept(learn, callback)
    assert any(not mask.all() for mask in follower_masks(callback.sparsifier).values())
    learn.fit(2, 0.01, cbs=callback)
    assert all(mask.all() for mask in callback.sparsifier.masks.values())
    assert not learn._grab_cbs(KeepSparsity)


# --- What is taken off in a fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [-5, 10.4, 99])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kind", [KeepSparsity, SparsifyCallback, FreezeCallback])
def test_a_callback_can_be_taken_off_in_every_event(make_learner, kind, event, order):
    learn = make_learner(opt_func=fastai.Adam)
    callbacks = [SparsifyCallback(0.8, schedule="lin"), FreezeCallback("0", end=0.5)]
    remove = At(event, lambda learn: learn.remove_cb(kind), order)
    learn.fit(3, 0.1, cbs=[*callbacks, remove])
    assert not learn._grab_cbs(kind)
    assert all(parameter.requires_grad for parameter in learn.model.parameters())
    learn.fit(1, 0.1, cbs=callbacks)
    assert_sound(learn, callbacks[0], level=0.8)


# --- Several keepers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [[], [SparsifyCallback(0.8)]])
def test_a_keeper_that_is_given_to_a_fit_leaves_the_one_that_stays(make_learner, others):
    learn = make_learner()
    learn.fit(1, 0.1, cbs=SparsifyCallback(0.6, schedule="one_shot"))
    stays = learn.keep_sparsity
    learn.fit(2, 0.1, cbs=[KeepSparsity(), *others])
    assert learn.keep_sparsity is stays
    assert list(learn._grab_cbs(KeepSparsity)) == [stays]
    assert_sound(learn, level=0.8 if others else 0.6)


def test_a_keeper_of_the_learner_that_is_taken_off_leaves_the_other(make_learner):
    own = KeepSparsity()
    learn = make_learner(cbs=own)
    learn.fit(1, 0.1, cbs=SparsifyCallback(0.6, schedule="one_shot"))
    learn.remove_cb(own)
    assert_sound(learn, level=0.6)
    assert learn.keep_sparsity is learn._grab_cbs(KeepSparsity)[0]
    learn.add_cb(own)
    learn.remove_cb(KeepSparsity)
    assert not hasattr(learn, "keep_sparsity")
    make_other = make_learner(cbs=own)
    assert make_other.keep_sparsity is own


@pytest.mark.parametrize("own", [True, False])
def test_weights_regrow_beside_any_keeper(make_learner, own):
    learn = make_learner(steps=6, cbs=KeepSparsity() if own else None)
    callback = SparsifyCallback(0.6, schedule="one_shot", regrow="grad", every=1)
    for _ in range(2):
        before = zeros_of(learn.model)
        learn.fit(1, 0.1, cbs=callback if own else [callback, KeepSparsity()])
        assert_kept(learn, callback)
        after = zeros_of(learn.model)
    assert any((before[name] & ~after[name]).any() for name in before)


@pytest.mark.parametrize("first", [SparsifyCallback(0.5), KeepSparsity()])
def test_a_schedule_that_falls_revives_its_own_zeros_beside_any_keeper(make_learner, first):
    learn, callback = make_learner(steps=8), SparsifyCallback(0.8, schedule="dsd")
    learn.fit(1, 0.1, cbs=first)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(
            2, 0.1, cbs=[callback, KeepSparsity(), At("after_batch", raises(KeyboardInterrupt), epoch=0, batch=7)]
        )
    assert counted(learn.model) == share(0.8, learn.model)
    learn.fit(2, 0.1, cbs=[KeepSparsity(), callback])
    assert all(mask.all() for mask in callback.sparsifier.masks.values())
    earlier = share(0.5, learn.model) if isinstance(first, SparsifyCallback) else 0
    assert earlier <= counted(learn.model) < share(0.7, learn.model)
    kept = [mask for keeper in learn._grab_cbs(KeepSparsity) for mask in keeper.masks.values()]
    assert sum(int((~mask).sum()) for mask in kept) == earlier * 474


# --- KeepSparsity(sparsifier): the masks of a Sparsifier, whenever they are made ------------------------------------


def test_the_masks_of_a_sparsifier_are_kept_as_they_are_at_each_step(make_learner):
    model = small_net()
    sparsifier = Sparsifier(model)
    learn = make_learner(model, opt_func=fastai.Adam, cbs=KeepSparsity(sparsifier))
    sparsifier.sparsify(0.5)
    learn.fit(1, 0.1)
    assert counted(model) == share(0.5, model)
    learn.fit(2, 0.1, cbs=At("after_batch", lambda learn: sparsifier.sparsify(0.8)))
    assert counted(model) == share(0.8, model)
    sparsifier.sparsify(0.3)
    learn.fit(2, 0.1)
    assert share(0.3, model) <= counted(model) < share(0.6, model)  # some get no gradient


# --- Trackers --------------------------------------------------------------------------------------------------------


def test_the_best_epoch_has_the_masks_of_the_end_where_weights_regrow(make_learner, tmp_path):
    callback = SparsifyCallback(0.6, schedule="one_shot", regrow="random", every=1)
    learn = make_learner(path=tmp_path)
    learn.metrics = [Invented(learn, lambda epoch: -float(epoch))]  # best in the first epoch
    learn.fit(8, 0.1, cbs=[callback, SaveModelCallback(monitor="invented")])
    assert_sound(learn, callback, level=0.6)
    assert_kept(learn, callback)


# --- Copies and files in the middle of a fit -------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["to the fit", "to the Learner"])
@pytest.mark.parametrize("event", ["before_epoch", "after_epoch"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_learner_that_is_copied_in_the_middle_of_a_fit_goes_on(way, event, given, tmp_path):
    callback, copies = SparsifyCallback(0.6, schedule="lin"), []
    learn = picture_learner([callback] if given == "to the Learner" else None, path=tmp_path)

    def copied(learn):
        copies.append(copy.deepcopy(learn) if way == "deepcopy" else pickle.loads(pickle.dumps(learn)))

    with learn.no_bar():
        learn.fit(3, cbs=[*([callback] if given == "to the fit" else []), At(event, copied)])
        (other,) = copies
        with other.no_bar():
            other.fit(2, 0.1)
    assert_sound(learn, callback, level=0.6)
    assert_sound(other, level=0.6)


@pytest.mark.parametrize("given", ["to the fit", "to the Learner"])
@pytest.mark.parametrize("event", ["before_epoch", "after_epoch"])
def test_a_learner_that_is_exported_in_the_middle_of_a_fit_goes_on(event, given, tmp_path):
    callback = SparsifyCallback(0.6, schedule="lin")
    learn = picture_learner([callback] if given == "to the Learner" else None, path=tmp_path)
    export = At(event, lambda learn: learn.export())
    with learn.no_bar():
        learn.fit(3, cbs=[*([callback] if given == "to the fit" else []), export])
        assert_sound(learn, callback, level=0.6)
        with pytest.warns(UserWarning, match="insecure pickle"):
            loaded = fastai.load_learner(tmp_path / "export.pkl")
        assert counted(loaded.model) > 0.1
        assert loaded.predict(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy())


# --- Fits that end early, fits of frozen layers, lr_find -----------------------------------------------------------


@pytest.mark.parametrize("order", [-5, 10.4, 99])
@pytest.mark.parametrize("schedule", ["lin", "dsd"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, CancelFitException])
@pytest.mark.parametrize("event", EVENTS)
def test_a_later_fit_goes_on_after_one_that_has_ended_early_with_regrowth(make_learner, event, error, schedule, order):
    learn = make_learner(opt_func=fastai.Adam)
    callback = SparsifyCallback(0.8, schedule=schedule, regrow="grad", every=1)
    stop = At(event, raises(error()), order)
    try:
        learn.fit(3, 0.1, cbs=[callback, stop])
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    assert_kept(learn, callback)
    learn.lr_find(num_it=6, show_plot=False)
    learn.fit(2, 0.1, cbs=callback)
    if schedule == "lin":
        assert_sound(learn, callback, level=0.8)
        assert_kept(learn, callback)


def test_fine_tune_with_regrowth_over_the_zeros_of_an_earlier_fit(make_learner):
    learn = make_learner(splitter=two_groups, opt_func=fastai.Adam)
    learn.fit(2, 0.1, cbs=SparsifyCallback(0.6, schedule="one_shot"))
    before = zeros_of(learn.model)
    callback = SparsifyCallback(0.6, schedule="one_shot", regrow="random", every=1, drop_schedule=between(lin, 0, 1))
    learn.fine_tune(2, 0.1, cbs=callback)
    assert_kept(learn, callback)
    assert sum(int((~mask).sum()) for mask in callback.sparsifier.masks.values()) == round(0.6 * 474)
    after = zeros_of(learn.model)
    assert any((before[name] & ~after[name]).any() for name in before)


# --- Later fits, and models that are sparse before the first -------------------------------------------------------


def test_a_second_plain_fit_keeps_the_zeros_until_the_keeper_is_taken_off(make_learner, capsys):
    learn, watch = make_learner(), Watch()
    learn.fit(1, cbs=SparsifyCallback(0.9))
    assert "KeepSparsity keeps the 90.08% of zeros in later fits, too; learn.remove_cb" in capsys.readouterr().out
    learn.fit(2, 0.1, cbs=watch)
    assert set(watch.forwards) == set(watch.steps) == {share(0.9, learn.model)}
    learn.remove_cb(KeepSparsity)
    learn.fit(1, 0.1, cbs=watch)
    assert watch.steps[-1] < 0.7


def test_zero_filters_keep_their_zero_biases_when_weights_are_pruned_later(make_learner):
    learn = make_learner()
    filters = SparsifyCallback(0.5, granularity="filter")
    learn.fit(1, cbs=filters)
    dead = {name: ~mask for name, mask in follower_masks(filters.sparsifier).items()}
    assert any(mask.any() for mask in dead.values())
    learn.fit(1, cbs=SparsifyCallback(0.9))
    parameters = dict(learn.model.named_parameters())
    assert all((parameters[name][mask] == 0).all() for name, mask in dead.items())


def test_keep_sparsity_alone_keeps_the_zeros_of_a_sparse_model(make_learner):
    model = small_net()
    Sparsifier(model).sparsify(0.7)
    learn, watch = make_learner(model, cbs=KeepSparsity()), Watch()
    learn.fit(2, 0.1, cbs=watch)
    assert set(watch.forwards) == set(watch.steps) == {share(0.7, learn.model)}


def test_keep_sparsity_recovers_frozen_layers_too(make_learner):
    model = small_net()
    Sparsifier(model).sparsify(0.7)
    splitter = lambda model: fastai.L(list(model[:6].parameters()), list(model[6:].parameters()))  # noqa: E731
    learn, watch = make_learner(model, cbs=KeepSparsity(), splitter=splitter), Watch()
    learn.freeze()
    learn.fit(1, 0.1)
    learn.unfreeze()
    learn.fit(1, 0.1, cbs=watch)
    assert set(watch.forwards) == set(watch.steps) == {share(0.7, learn.model)}


def test_a_schedule_that_ends_dense_leaves_no_keeper(make_learner):
    learn = make_learner()
    learn.fit(1, cbs=SparsifyCallback(0.5, schedule="dsd"))
    assert not hasattr(learn, "keep_sparsity")


@pytest.mark.parametrize("second", ["dsd", "one_cycle"])
def test_no_schedule_of_a_later_fit_revives_zeros_of_an_earlier_one(make_learner, second):
    learn, watch = make_learner(), Watch()
    learn.fit(1, cbs=SparsifyCallback(0.6))
    learn.fit(2, cbs=[SparsifyCallback(0.8, schedule=second), watch])
    assert min(watch.forwards) >= share(0.6, learn.model)
    learn.fit(1, 0.1, cbs=watch)
    assert min(watch.steps) >= share(0.6, learn.model)


def test_keep_sparsity_refuses_other_models(make_learner):
    for wrong in (0.5, SparsifyCallback(0.5)):
        with pytest.raises(TypeError, match="must be a Sparsifier"):
            KeepSparsity(wrong)
    with pytest.raises(ValueError, match="another model"):
        make_learner(cbs=KeepSparsity(Sparsifier(small_net()))).fit(1)
    learn = make_learner()
    learn.fit(1, cbs=SparsifyCallback(0.5))
    learn.model = small_net()
    with pytest.raises(ValueError, match="another model"):
        learn.fit(1)


def test_a_layer_that_is_all_zeros_is_trained(make_learner):
    model = small_net()
    Sparsifier(model).sparsify(0.5)
    nn.init.zeros_(model[12].weight)
    learn = make_learner(model, cbs=KeepSparsity())
    learn.fit(1, 0.1)
    assert (model[12].weight != 0).any()


def test_pruned_weights_that_were_changed_between_fits_are_zero_at_the_first_forward(make_learner):
    learn, watch = make_learner(), Watch()
    learn.fit(1, cbs=SparsifyCallback(0.7))
    with torch.no_grad():
        for parameter in learn.model.parameters():
            parameter.add_(0.01)
    with pytest.warns(UserWarning, match="pruned weights were changed or loaded"):
        learn.fit(1, cbs=watch)
    assert watch.forwards[0] == share(0.7, learn.model)


def test_a_zero_filter_of_a_large_model_is_kept_even_if_few_weights_are_zero(make_learner):
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 1500), nn.Linear(1500, 400), nn.Linear(400, 3))
    with torch.no_grad():
        model[3].weight[1] = 0  # 400 of some 800,000 weights would be no chance in any case
        model[1].weight[0, :2] = 0
        model[3].weight[1, 3:] = 1
    learn = make_learner(model, cbs=KeepSparsity())
    learn.fit(1, 0.1)
    assert (model[3].weight[1, :3] != 0).any()
    small = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(192, 4000), nn.Linear(4000, 3))
    with torch.no_grad():
        small[0].weight[1] = 0  # 2 of some 780,000, a whole filter
    make_learner(small, cbs=KeepSparsity()).fit(1, 0.1)
    assert (small[0].weight[1] == 0).all()


def test_keep_sparsity_alone_keeps_the_biases_of_zero_filters_zero(make_learner):
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 3), nn.GELU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    sparsifier = Sparsifier(model, "filter")
    sparsifier.sparsify(0.5)
    dead = {name: ~mask for name, mask in follower_masks(sparsifier).items() if not mask.all()}
    assert "3.bias" in dead
    make_learner(model, cbs=KeepSparsity()).fit(2, 0.1)
    parameters = dict(model.named_parameters())
    assert all((parameters[name][mask] == 0).all() for name, mask in dead.items())
    assert (model[3].bias != 0).any()


def test_an_average_of_the_model_can_be_kept_sparse(make_learner):
    class Average(Callback):
        def before_fit(self):
            self.averaged = AveragedModel(self.model)

        def after_batch(self):
            if self.training:
                self.averaged.update_parameters(self.model)
                self.learn.keep_sparsity.apply_masks(self.averaged)

    learn, callback, average = make_learner(), SparsifyCallback(0.8, schedule="lin"), Average()
    learn.fit(3, 0.1, cbs=[callback, average])
    assert counted(average.averaged.module) == share(0.8, learn.model)
    averaged = AveragedModel(small_net())
    callback.sparsifier.apply_masks(averaged)
    assert counted(averaged.module) == share(0.8, learn.model)
    with pytest.raises(ValueError, match="Linear is not a copy of the masked model"):
        callback.sparsifier.apply_masks(nn.Linear(2, 2))
