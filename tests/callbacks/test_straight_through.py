"""Straight-through training in a Learner: the fit moves dense weights, and all that looks at the model sees zeros."""

import warnings

import pytest
import torch
from torch import nn

fastai = pytest.importorskip("fastai.vision.all", reason="the callbacks are fastai's")
pytestmark = pytest.mark.fastai

from conftest import small_learner, small_net  # noqa: E402
from fastai.learner import Callback  # noqa: E402
from soundness import assert_sound, counted, share  # noqa: E402
from watch import At, raises  # noqa: E402

from sparsifai.all import Sparsifier, SparsifyCallback, between, blocks  # noqa: E402


def look_after(event, function, order=99):
    callback = Callback(**{event: lambda self: function(self.learn)})
    callback.order = order
    return callback


def dense_of(callback):
    return callback.sparsifier.state_dict()["straight_through"]["values"]


def top(weights, level):
    """The masks of the largest magnitudes of all weights together."""
    values = torch.cat([weight.flatten() for weight in weights.values()]).abs()
    mask = torch.ones(len(values), dtype=torch.bool)
    mask[values.sort(stable=True).indices[: int(level * len(values) + 0.5)]] = False
    parts = mask.split([weight.numel() for weight in weights.values()])
    return {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)}


@pytest.mark.parametrize(("opt_func", "lr"), [(fastai.SGD, 0.3), (fastai.Adam, 0.05), (fastai.ranger, 0.3)])
def test_masks_after_every_step_are_a_plain_top_k_of_the_dense_weights_and_the_model_is_sparse(opt_func, lr):
    learn = small_learner(steps=6, opt_func=opt_func)
    callback, seen = SparsifyCallback(0.8, schedule="lin", straight_through=True), []

    def look(learn):
        sparsifier, dense = callback.sparsifier, dense_of(callback)
        if sparsifier.is_straight_through and dense:
            masks = top({name: dense[name] for name in sparsifier.masks}, sparsifier.level)
            for name, mask in sparsifier.masks.items():
                assert torch.equal(mask, masks[name])
                assert torch.equal(sparsifier.layers[name].parameter, dense[name] * mask)
            seen.append({name: mask.clone() for name, mask in masks.items()})

    learn.fit(3, lr, wd=0.1, cbs=[callback, look_after("after_step", look)])
    came_back = [
        int((later[name] & ~mask).sum()) for earlier, later in zip(seen, seen[1:], strict=False)
        for name, mask in earlier.items()
    ]  # fmt: skip
    assert len(seen) == 17  # all steps but the last, after which the masks are settled
    assert sum(came_back) > 0
    assert_sound(learn, callback, level=0.8)


@pytest.mark.parametrize(
    ("options", "settled"),
    [
        ({}, 0.75), ({"schedule": "lin"}, 1.0), ({"schedule": "one_shot"}, 0.75), ({"settle": 0.9}, 0.9),
        ({"schedule": between("lin", 0, 0.25), "settle": 0.5}, 0.5), ({"settle": 0.25}, 0.25),
    ],
)  # fmt: skip
def test_masks_change_until_they_are_settled_and_are_fixed_then(options, settled):
    learn = small_learner(steps=20)
    callback, changing = SparsifyCallback(0.6, straight_through=True, **options), []

    def look(learn):
        if learn.training:
            changing.append(callback.sparsifier.is_straight_through)

    learn.fit(1, 0.05, cbs=[callback, look_after("after_batch", look)])
    assert changing == [number < round(20 * settled) for number in range(1, 21)]
    masks = {name: mask.clone() for name, mask in callback.sparsifier.masks.items()}
    learn.fit(1, 0.05, cbs=callback)
    assert all(torch.equal(masks[name], mask) for name, mask in callback.sparsifier.masks.items())
    assert_sound(learn, callback, level=0.6)


def test_zeros_of_others_never_come_back():
    learn = small_learner(steps=8, opt_func=fastai.Adam)
    learn.fit(1, 0.05)
    Sparsifier(learn.model, "filter", layers="0").sparsify(0.5)
    Sparsifier(learn.model, layers="3").sparsify(0.3)
    zeros = {name: each == 0 for name, each in learn.model.named_parameters() if each.dim() > 1}
    callback = SparsifyCallback(0.7, schedule="lin", straight_through=True)

    def look(learn):
        assert all((learn.model.get_parameter(name)[zero] == 0).all() for name, zero in zeros.items())

    learn.fit(3, 0.05, wd=0.1, cbs=[callback, look_after("after_step", look, 10.3), look_after("after_batch", look)])
    assert sum(int(zero.sum()) for zero in zeros.values()) > 50
    assert_sound(learn, callback, level=0.7)


@pytest.mark.parametrize("again", ["same", "new"])
def test_a_later_fit_tells_of_masks_that_cannot_change_their_mind(again, capsys):
    learn, callback = small_learner(), SparsifyCallback(0.5, straight_through=True)
    learn.fit(1, cbs=callback)
    masks = {name: mask.clone() for name, mask in callback.sparsifier.masks.items()}
    later = callback if again == "same" else SparsifyCallback(0.5, straight_through=True)
    learn.fit(1, cbs=later)
    assert ("settled in an earlier fit" if again == "same" else "zero before this fit") in capsys.readouterr().out
    assert all(torch.equal(later.sparsifier.masks[name], mask) for name, mask in masks.items())


def test_trackers_ignore_epochs_before_the_masks_are_settled(tmp_path):
    learn = small_learner(steps=4, path=tmp_path)
    saved = []
    tracker = fastai.SaveModelCallback(monitor="valid_loss", fname="best")
    look = look_after("after_epoch", lambda learn: saved.append((learn.path / "models" / "best.pth").exists()))
    callback = SparsifyCallback(0.6, schedule=between("lin", 0, 0.25), straight_through=True, settle=0.5)
    learn.fit(4, 0.05, cbs=[callback, tracker, look])
    assert saved == [False, True, True, True]  # the target is reached in the first epoch, but masks still change
    assert_sound(learn, callback, level=0.6)


@pytest.mark.parametrize("given", ["to the fit", "to the Learner"])
def test_an_interrupted_fit_goes_on_from_its_dense_weights(given):
    callback = SparsifyCallback(0.8, schedule="lin", straight_through=True)
    learn = small_learner(steps=4, opt_func=fastai.Adam, cbs=callback if given == "to the Learner" else None)
    stop = At("after_step", raises(KeyboardInterrupt), epoch=1, batch=2)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, 0.05, cbs=[stop] if given == "to the Learner" else [callback, stop])
    dense, masks = dense_of(callback), callback.sparsifier.masks
    assert any((dense[name][~mask] != 0).any() for name, mask in masks.items())
    assert_sound(learn, callback)
    learn.fit(2, 0.05, cbs=[] if given == "to the Learner" else callback)
    assert any((callback.sparsifier.masks[name] & ~mask).any() for name, mask in masks.items())
    assert_sound(learn, callback, level=0.8)


def test_zeros_of_an_interrupted_fit_are_kept_by_a_plain_one():
    callback = SparsifyCallback(0.8, schedule="lin", straight_through=True)
    learn = small_learner(steps=4, opt_func=fastai.Adam)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, 0.05, cbs=[callback, At("after_step", raises(KeyboardInterrupt), epoch=1, batch=2)])
    zeros = counted(learn.model)
    learn.fit(2, 0.05, wd=0.1)
    assert counted(learn.model) == zeros > 0.5
    assert "step" not in vars(learn.opt)


@pytest.mark.parametrize("options", [{"straight_through": True}, {"straight_through": True, "gradient_sparsity": 0.3},
                                     {"criteria": "movement_pruning"}, {"regrow": "grad", "every": 2},
                                     {"straight_through": True, "every": 3}, {"every": 3},
                                     {"regrow": "random", "every": 4}])  # fmt: skip
@pytest.mark.parametrize("settled", [False, True])
def test_a_fit_resumes_exactly_from_what_the_callback_and_the_learner_save(options, settled, tmp_path):
    if settled and "straight_through" in options:
        options = options | {"settle": 0.4}

    def begin():
        learn = small_learner(path=tmp_path, steps=4, opt_func=fastai.Adam)
        return learn, SparsifyCallback(0.8, schedule=between("lin", 0, 0.4 if settled else 1), **options)

    def save(learn):
        if learn.epoch == 1:
            learn.save("half")
            torch.save(callback.state_dict(), tmp_path / "callback")
        note(callback)(learn)

    dense = []

    def note(callback):
        def look(learn):
            if learn.epoch == 2 and "straight_through" in options:
                dense.append(dense_of(callback))

        return look

    learn, callback = begin()
    learn.fit(4, 0.02, cbs=[callback, look_after("after_epoch", save)])
    other, resumed = begin()
    other.create_opt()
    other.load("half")
    resumed.load_state_dict(torch.load(tmp_path / "callback", weights_only=True))
    other.fit(4, 0.02, start_epoch=2, cbs=[resumed, look_after("after_epoch", note(resumed))])
    assert all(torch.equal(value, dense[1][name]) for first in dense[:1] for name, value in first.items())
    for name, value in learn.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert all(torch.equal(mask, resumed.sparsifier.masks[name]) for name, mask in callback.sparsifier.masks.items())


def test_masks_settle_with_an_update_though_none_is_due():
    learn = small_learner(steps=10)
    callback = SparsifyCallback(0.6, schedule="lin", straight_through=True, every=7, settle=0.75)
    levels = []
    look = look_after("after_batch", lambda learn: levels.append(callback.sparsifier.level) if learn.training else None)
    learn.fit(1, 0.05, cbs=[callback, look])
    assert levels == pytest.approx([0] * 6 + [0.42] + [0.48] * 2 + [0.6])
    assert_sound(learn, callback, level=0.6)


def test_n_of_m_by_sr_ste_ends_with_n_of_every_m():
    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 3))
    learn = small_learner(net, steps=8)
    callback = SparsifyCallback(0.5, context=blocks(4), schedule="one_shot", straight_through=True, decay=2e-2)
    learn.fit(2, 0.05, cbs=callback)
    for layer in (net[1], net[3]):
        assert ((layer.weight != 0).view(-1, 4).sum(1) == 2).all()


def test_frozen_fits_hold_the_masks_and_fine_tune_ends_at_the_target():
    learn = small_learner(steps=4, splitter=lambda model: fastai.L(list(model[:6].parameters()),
                                                                  list(model[6:].parameters())))  # fmt: skip
    callback = SparsifyCallback(0.7, straight_through=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fine_tune(3, 0.05, cbs=callback)
    assert not callback.sparsifier.is_straight_through
    assert_sound(learn, callback, level=0.7)


def test_a_step_that_a_user_has_put_on_the_optimizer_is_used_and_stays():
    learn, steps = small_learner(steps=4), []
    learn.create_opt()
    own = learn.opt.step
    learn.opt.step = mine = lambda: (steps.append(counted(learn.model)), own())
    callback = SparsifyCallback(0.6, schedule="lin", straight_through=True)
    learn.fit(2, 0.05, cbs=callback, reset_opt=False)
    assert len(steps) == 8
    assert steps[-1] < 0.01  # the dense weights
    assert learn.opt.step is mine
    assert_sound(learn, callback, level=0.6)


def test_dictionaries_of_sparsities_and_zero_are_ranked_anew():
    learn = small_learner(steps=6)
    callback = SparsifyCallback({"0": 0.5, "3": 0.75, "5": 0.0}, schedule="lin", straight_through=True)
    learn.fit(2, 0.05, cbs=callback)
    layers = callback.sparsifier.layers
    assert [float((layers[f"{name}.weight"].parameter == 0).float().mean()) for name in (0, 3, 5)] == [0.5, 0.75, 0.0]


def test_the_step_of_the_optimizer_is_its_own_after_a_fit_that_fails_at_once():
    callback = SparsifyCallback(0.8, schedule="lin", straight_through=True)
    learn = small_learner(small_net(), steps=2, cbs=callback)
    with pytest.raises(ZeroDivisionError):
        learn.fit(1, cbs=At("after_pred", raises(ZeroDivisionError("now")), epoch=0, batch=0))
    learn.remove_cb(callback)
    assert "step" not in vars(learn.opt)
    assert share(0, learn.model) == 0


def test_a_state_is_loaded_once():
    first, callback, states = small_learner(steps=2), SparsifyCallback(0.6, schedule="lin", straight_through=True), []
    first.fit(2, 0.1, cbs=[callback, look_after("after_epoch", lambda learn: states.append(callback.state_dict()))])
    resumed = SparsifyCallback(0.6, schedule="lin", straight_through=True)
    resumed.load_state_dict(states[0])
    small_learner(steps=2).fit(2, 0.1, start_epoch=1, cbs=resumed)
    again = small_learner(steps=2)  # another model, with which the callback begins anew
    again.fit(2, 0.1, cbs=resumed)
    assert all(map(torch.equal, first.model.parameters(), again.model.parameters()))


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_masks_that_are_settled_from_the_start_change_in_no_step(start_epoch):
    learn, seen = small_learner(steps=4), []
    callback = SparsifyCallback(0.6, schedule="one_shot", straight_through=True, settle=0.5 * start_epoch)
    look = look_after("before_backward", lambda learn: seen.append(callback.sparsifier.is_straight_through))
    learn.fit(2, 0.05, start_epoch=start_epoch, cbs=[callback, look])
    assert seen
    assert not any(seen)
    assert_sound(learn, callback, level=0.6)


def test_weights_that_a_callback_clamps_through_data_stay_clamped():
    learn, seen = small_learner(steps=6, opt_func=fastai.Adam), []
    callback = SparsifyCallback(0.6, schedule="lin", straight_through=True)

    def clamp(learn):
        for parameter in learn.model.parameters():
            parameter.data.clamp_(-0.05, 0.05)

    def look(learn):
        weights = [parameter.detach() for parameter in learn.model.parameters() if parameter.dim() > 1]
        seen.append(max(float(weight.abs().max()) for weight in weights))

    learn.fit(2, 1e-3, cbs=[callback, look_after("after_batch", clamp), look_after("after_step", look)])
    assert max(seen[1:]) < 0.06
    assert_sound(learn, callback, level=0.6)


def test_an_optimizer_that_steps_copies_is_refused():
    learn = small_learner(steps=4)

    def copied(learn):
        learn.opt = fastai.SGD([nn.Parameter(each.detach().clone()) for each in learn.model.parameters()], 0.1)

    before = counted(learn.model)
    callback = SparsifyCallback(0.8, schedule="one_shot", straight_through=True)
    with pytest.raises(ValueError, match="straight_through: the optimizer steps copies of the weights"):
        learn.fit(1, 0.1, cbs=[callback, look_after("before_fit", copied, 10)])
    assert counted(learn.model) == before
