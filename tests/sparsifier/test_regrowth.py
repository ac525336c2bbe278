"""Regrowth: as much comes back as has fallen, where the criterion says, at zero and with fresh moments."""

import math
from statistics import mean

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsifai import Sparsifier, contexts, granularities, schedules
from sparsifai.sparsifier.regrowth import Regrowth, sparsity_of_drop


def show_gradients(sparsifier, seed=0):
    """Made-up gradients, seen as after a backward pass."""
    generator = torch.Generator().manual_seed(seed)
    for target in sparsifier.targets.values():
        target.parameter.grad = torch.randn(target.parameter.shape, generator=generator)
    sparsifier.collect_gradients()


def alive(sparsifier):
    return torch.cat(
        [mask.expand_as(sparsifier.targets[name].parameter).flatten() for name, mask in sparsifier.masks.items()]
    )


def lowest(scores, count):
    return np.argsort(scores, kind="stable")[:count]


def rounded(number):
    return math.floor(number + 0.5)


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.integers(-4, 4), min_size=6, max_size=30),
    gradients=st.lists(st.integers(-4, 4), min_size=30, max_size=30),
    sparsity=st.floats(0.1, 0.9),
    drop=st.floats(0.05, 0.9),
)
def test_what_falls_and_comes_back_is_that_of_a_plain_computation(weights, gradients, sparsity, drop):
    count = len(weights)
    model = nn.Linear(count, 1, bias=False)
    sparsifier = Sparsifier(model, regrow="grad", may_empty=True)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights], dtype=torch.float32))
    sparsifier.sparsify(sparsity)
    before = alive(sparsifier).numpy()
    model.weight.grad = torch.tensor([gradients[:count]], dtype=torch.float32)
    sparsifier.collect_gradients()
    sparsifier.sparsify(sparsity, drop=drop)

    magnitude, gradient = np.abs(np.array(weights, float)), np.abs(np.array(gradients[:count], float))
    magnitude[~before] = -1  # what is masked falls first
    fallen = lowest(magnitude, max(rounded(sparsity_of_drop(sparsity, drop) * count), (~before).sum()))
    stays = np.ones(count, bool)
    stays[fallen] = False
    # Of what has fallen the highest come back: all but the lowest.
    remain = np.sort(fallen)[lowest(gradient[np.sort(fallen)], rounded(sparsity * count))]
    expected = np.ones(count, bool)
    expected[remain] = False
    assert np.array_equal(alive(sparsifier).numpy(), expected)
    assert (alive(sparsifier).numpy() >= stays).all()
    assert (~expected).sum() == rounded(sparsity * count)


def test_a_case_by_hand():
    model = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]]))
    sparsifier = Sparsifier(model, regrow="grad")
    sparsifier.sparsify(0.5)
    model.weight.grad = torch.tensor([[9.0, 9, 9, 0.1, 0.2, 5, -6, 0.3]])
    sparsifier.collect_gradients()
    with torch.no_grad():
        model.weight[:, 4:] = 0.5  # what a step has made of masked weights
    sparsifier.sparsify(0.5, drop=0.5)  # 6 and 5 fall; the highest gradients of zeros are those of 6, again, and -6
    assert model.weight.tolist() == [[8, 7, 6, 0, 0, 0, 0, 0]]
    assert sparsifier.masks["weight"].tolist() == [[True, True, True, False, False, False, True, False]]
    assert sparsifier.explored == 5 / 8
    assert "62% ever used" in str(sparsifier.report())


@pytest.mark.parametrize(("context", "axis"), [("blocks", "in"), ("per_output", "in"), ("blocks", "out")])
def test_within_a_block_the_highest_come_back(context, axis):
    from sparsifai import blocks

    model = nn.Linear(4, 4, bias=False)
    rows = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4], [3, 4, 1, 2], [1, 4, 3, 2]])
    gradients = torch.tensor([[0.0, 1, 9, 3], [0, 9, 1, 0], [0, 2, -3, 9], [7, 0, 5, 6]])
    with torch.no_grad():
        model.weight.copy_(rows if axis == "in" else rows.T)
    sparsifier = Sparsifier(model, context=blocks(4, axis) if context == "blocks" else context, regrow="grad")
    sparsifier.sparsify(0.5)
    model.weight.grad = gradients if axis == "in" else gradients.T.contiguous()
    sparsifier.collect_gradients()
    sparsifier.sparsify(0.5, drop=0.5)  # of each row the lower of two falls, and the highest gradient comes back
    mask = sparsifier.masks["weight"]
    assert (mask if axis == "in" else mask.T).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0]]


# Those with a few groups in a layer, of which none would move, and those of whole outputs apart.
APART = {"layer", "filter", "row", *(name for name in granularities if "slice" in name)}
CASES = [(granularity, "local") for granularity in granularities if granularity not in APART]
CASES += [("weight", context) for context in contexts] + [("kernel", "erk"), ("4x4", "global"), ("weight", "blocks")]


@pytest.mark.parametrize(("granularity", "context"), CASES)
def test_the_sparsity_is_constant_and_the_masks_move_with_every_granularity_and_context(net, granularity, context):
    from sparsifai import blocks

    context = blocks(4) if context == "blocks" else context
    sparsifier = Sparsifier(net, granularity, context, regrow="grad", example_input=torch.zeros(1, 2, 8, 8))
    sparsifier.sparsify(0.4)
    share, moved = float((~alive(sparsifier)).float().mean()), 0
    # Contexts with budgets round in every layer, to whole groups.
    groups = [(sparsifier.targets[name].parameter.numel(), mask.numel()) for name, mask in sparsifier.masks.items()]
    slack = sum(weights / count for weights, count in groups) / sum(weights for weights, _ in groups)
    for step in range(5):
        before = alive(sparsifier)
        with torch.no_grad():  # as a step does
            for name, mask in sparsifier.masks.items():
                weight = sparsifier.targets[name].parameter
                weight += mask * torch.randn(weight.shape)
        show_gradients(sparsifier, step)
        sparsifier.sparsify(0.4, drop=0.4)
        moved += int((alive(sparsifier) & ~before).sum())
        assert float((~alive(sparsifier)).float().mean()) == pytest.approx(share, abs=slack + 1e-6)
    assert moved > 0


def test_what_comes_back_starts_at_zero_with_fresh_moments_and_is_moved_by_the_next_step(mlp):
    optimizer = torch.optim.Adam(mlp.parameters(), 0.1)
    sparsifier = Sparsifier(mlp, context="local", regrow="random")
    sparsifier.sparsify(0.5)
    inputs, labels = torch.randn(32, 4), torch.randint(2, (32,))
    for step in range(6):
        optimizer.zero_grad()
        F.cross_entropy(mlp(inputs), labels).backward()
        before = dict(sparsifier.masks)
        sparsifier.sparsify(0.5, drop=0.5)
        sparsifier.mask_moments(optimizer)
        for name, mask in sparsifier.masks.items():
            weight, back = sparsifier.targets[name].parameter, mask & ~before[name]
            assert (weight[back] == 0).all()
            assert (weight[~mask] == 0).all()
            for kept in optimizer.state[weight].values():
                if kept.shape == weight.shape:
                    assert (kept[back] == 0).all()
                    assert (kept[~mask] == 0).all()
        assert any((mask & ~before[name]).any() for name, mask in sparsifier.masks.items()), step
        sparsifier.mask_gradients()
        optimizer.step()
        sparsifier.apply_masks()
        assert (~alive(sparsifier)).sum() == 24


def test_without_a_gradient_it_says_how_to_have_one_and_changes_nothing(mlp):
    sparsifier = Sparsifier(mlp, regrow="grad")
    sparsifier.sparsify(0.5)
    before = {name: parameter.clone() for name, parameter in mlp.named_parameters()}
    masks = dict(sparsifier.masks)
    with pytest.raises(ValueError, match=r"no batch was seen; call collect_gradients\(\) after a backward, before"):
        sparsifier.sparsify(0.5, drop=0.3)
    assert all(torch.equal(before[name], parameter) for name, parameter in mlp.named_parameters())
    assert all(torch.equal(masks[name], mask) for name, mask in sparsifier.masks.items())
    show_gradients(sparsifier)
    sparsifier.sparsify(0.5, drop=0.3)
    with pytest.raises(ValueError, match="no batch was seen"):  # what was seen before the update is of other masks
        sparsifier.sparsify(0.5, drop=0.3)


def test_clear_errors_in_the_constructor_and_in_the_call(mlp, net):
    with pytest.raises(ValueError, match="unknown criterion 'gradient'; did you mean 'grad'"):
        Sparsifier(mlp, regrow="gradient")
    with pytest.raises(ValueError, match="regrow=wanda needs activation, which no backward pass gives; choose 'grad'"):
        Sparsifier(mlp, regrow="wanda")
    with pytest.raises(ValueError, match=r"more than 2:4 allows for has to fall .* context=blocks\(4\)"):
        Sparsifier(mlp, context="2:4", regrow="grad")
    with pytest.warns(UserWarning, match="whole outputs that come back start at zero"):
        Sparsifier(net, "filter", regrow="grad")
    sparsifier = Sparsifier(mlp)
    with pytest.raises(ValueError, match="nothing says what comes back; make the Sparsifier with regrow="):
        sparsifier.sparsify(0.5, drop=0.3)
    with pytest.raises(ValueError, match="explored: what was ever used is noted with regrow= only"):
        _ = sparsifier.explored
    sparsifier = Sparsifier(mlp, regrow="random")
    for drop in (-0.1, 1, 30, True, "much", float("nan")):
        with pytest.raises(ValueError, match="drop is the share of what is left that falls"):
            sparsifier.sparsify(0.5, drop=drop)
    with pytest.raises(ValueError, match="steps= and drop= do not go together"):
        sparsifier.sparsify(0.5, drop=0.3, steps=2)


def test_a_target_that_rises_meanwhile_is_reached_exactly(mlp):
    sparsifier = Sparsifier(mlp, regrow="random")
    for step in range(1, 10):
        sparsifier.sparsify(step / 12, drop=0.3)
        assert (~alive(sparsifier)).sum() == rounded(step / 12 * 48)


def test_saved_and_restored_it_goes_on_as_if_nothing_had_been(mlp):
    def run(sparsifier, steps):
        for step in steps:
            show_gradients(sparsifier, step)
            with torch.no_grad():
                for name, mask in sparsifier.masks.items():
                    sparsifier.targets[name].parameter.add_(mask * 0.1)
            sparsifier.sparsify(0.6, drop=0.3)

    def increase(weight, init, grad):
        return (weight - init).abs() + grad.abs()

    first = Sparsifier(mlp, context="local", regrow=increase)
    run(first, range(3))
    weights, state = {name: value.clone() for name, value in mlp.state_dict().items()}, first.state_dict()
    run(first, range(3, 6))
    expected, explored = alive(first), first.explored
    mlp.load_state_dict(weights)
    second = Sparsifier(mlp, context="local", regrow=increase)
    second.load_state_dict(state)
    run(second, range(3, 6))
    assert torch.equal(alive(second), expected)
    assert second.explored == explored
    with pytest.raises(ValueError, match="use the same regrow="):
        Sparsifier(mlp, context="local").load_state_dict(state)
    with pytest.raises(ValueError, match="use the same criterion"):
        Sparsifier(mlp, context="local", regrow="random").load_state_dict(state)
    with pytest.raises(ValueError, match="does not tell what was ever used"):
        second.load_state_dict({**state, "regrowth": {k: v for k, v in state["regrowth"].items() if k != "used"}})
    state["regrowth"]["used"] = {"0.weight": torch.ones(3)}
    with pytest.raises(ValueError, match=r"the used mask of 0\.weight is numbers of the shape \(3,\)"):
        second.load_state_dict(state)


# --- In a Learner ---------------------------------------------------------------------------------------------


def counting(callback_of, masks, counts):
    """A callback that counts zeros after every step, and keeps the masks."""
    from fastai.callback.core import Callback

    class Watch(Callback):
        order = 70

        def after_step(self):
            sparsifier = callback_of().sparsifier
            masks.append(alive(sparsifier))
            counts.append(sum(int((target.parameter == 0).sum()) for target in sparsifier.targets.values()))

    Watch.__module__ = "fastai.watching"  # known not to write
    return Watch()


@pytest.mark.fastai
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_in_a_learner_the_zeros_are_constant_at_every_step_and_move(make_learner, optimizer, known):
    import fastai.optimizer

    from sparsifai import SparsifyCallback

    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 32), nn.Tanh(), nn.Linear(32, 3))
    learn = make_learner(net, steps=20, opt_func=getattr(fastai.optimizer, optimizer), lr=0.01)
    callback = SparsifyCallback(0.9, context="erk", schedule="one_shot", regrow="grad", every=4)
    masks, counts = [], []
    counter = counting(lambda: callback, masks, counts)
    if not known:
        type(counter).__module__ = "elsewhere"
    learn.fit(2, cbs=[callback, counter])
    wanted = rounded(0.9 * (128 * 32 + 96))
    assert all(abs(int((~mask).sum()) - wanted) <= 1 for mask in masks)
    assert all(abs(count - wanted) <= 1 for count in counts)
    moved = [step for step in range(1, 40) if not torch.equal(masks[step], masks[step - 1])]
    # Every fourth step in the first three quarters of training, after which the share that falls is none.
    assert moved == [step for step in range(3, 30, 4) if step in moved]
    assert len(moved) >= 6
    assert 0.1 < callback.sparsifier.explored < 0.5


@pytest.mark.fastai
@pytest.mark.parametrize("criteria", ["large_final", "snip"])
def test_dense_gradients_are_looked_at_in_steps_that_update_the_masks_only(make_learner, monkeypatch, criteria):
    from sparsifai import SparsifyCallback

    steps, add = [], Regrowth.add
    monkeypatch.setattr(Regrowth, "add", lambda self, *given: (steps.append(learn.iter), add(self, *given)))
    learn = make_learner(steps=12)
    learn.fit(1, cbs=SparsifyCallback(0.5, criteria=criteria, schedule="one_shot", regrow="grad", every=3))
    assert steps == [2, 5, 8]


@pytest.mark.fastai
def test_criteria_of_activations_see_the_batch_of_every_update(make_learner, monkeypatch):
    from sparsifai import SparsifyCallback

    steps, calibrate = [], Sparsifier.calibrate
    monkeypatch.setattr(
        Sparsifier, "calibrate", lambda self, *given: (steps.append(learn.iter), calibrate(self, *given))
    )
    learn = make_learner(steps=12)
    learn.fit(1, cbs=SparsifyCallback(0.5, criteria="wanda", schedule="one_shot", regrow="random", every=3))
    assert set(steps) == {0, 2, 5, 8}


@pytest.mark.fastai
@pytest.mark.parametrize("schedule", ["lin", "agp"])
def test_while_sparsity_rises_what_comes_back_outlives_the_step(make_learner, schedule):
    from sparsifai import SparsifyCallback

    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 32), nn.Tanh(), nn.Linear(32, 3))
    learn, masks, counts = make_learner(net, steps=40, lr=0.01), [], []
    callback = SparsifyCallback(0.9, schedule=schedule, regrow="grad", every=4)
    learn.fit(1, cbs=[callback, counting(lambda: callback, masks, counts)])
    back = [int((after & ~before).sum()) for before, after in zip(masks, masks[1:], strict=False)]
    assert sum(number > 0 for number in back) >= 5
    wanted = [rounded(0.9 * schedules[schedule](4 * (step // 4) / 40) * (128 * 32 + 96)) for step in range(1, 41)]
    assert [int((~mask).sum()) for mask in masks] == wanted


@pytest.mark.fastai
def test_moments_of_what_comes_back_are_fresh_in_a_learner(make_learner):
    from fastai.callback.core import Callback
    from fastai.optimizer import Adam

    from sparsifai import SparsifyCallback

    seen = []

    class Look(Callback):
        order = 12  # after the masks have moved, before the step

        def before_step(self):
            for name, mask in self.learn.sparsify.sparsifier.masks.items():
                parameter = self.learn.sparsify.sparsifier.targets[name].parameter
                back = mask & ~earlier.get(name, mask)
                earlier[name] = mask
                if back.any():
                    state = self.opt.state[parameter]
                    seen.append(max(float(state[kept][back].abs().max()) for kept in ("grad_avg", "sqr_avg")))
                    assert (parameter[back] == 0).all()

    Look.__module__, earlier = "fastai.look", {}
    learn = make_learner(steps=24, opt_func=Adam, lr=0.01)
    learn.fit(1, cbs=[SparsifyCallback(0.5, schedule="one_shot", regrow="random", every=4), Look()])
    assert seen
    assert max(seen) <= 1e-16


@pytest.mark.fastai
def test_an_interrupted_fit_leaves_nothing_that_moves_masks_in_lr_find(make_learner, tmp_path):
    from fastai.callback.core import Callback

    from sparsifai import SparsifyCallback

    def stop(self):
        if self.iter == 9:
            raise KeyboardInterrupt

    callback = SparsifyCallback(0.5, schedule="one_shot", regrow="grad", every=2)
    learn = make_learner(steps=12, cbs=callback, path=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Callback(after_step=stop))
    before, explored = alive(callback.sparsifier), callback.sparsifier.explored
    learn.lr_find(num_it=12, show_plot=False)
    assert torch.equal(before, alive(callback.sparsifier))
    assert explored == callback.sparsifier.explored
    learn.fit(1)
    assert not torch.equal(before, alive(callback.sparsifier))


def test_limits_hold_whatever_the_gradients_are():
    from sparsifai import bounded

    net = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    sparsifier = Sparsifier(net, context=bounded("global", {"0": (0.5, 0.9)}), regrow="grad")
    sparsifier.sparsify(0.6)
    for _ in range(3):
        # Zeros of the first layer would all come back.
        first, drawn = sparsifier.masks["0.weight"], torch.rand(40, 40)
        net[0].weight.grad, net[1].weight.grad = torch.where(first, drawn * 1e-3, drawn + 5), torch.rand(40, 40)
        sparsifier.collect_gradients()
        sparsifier.sparsify(0.6, drop=0.3)
        with torch.no_grad():
            for name, mask in sparsifier.masks.items():
                sparsifier.targets[name].parameter.add_(mask * torch.randn(40, 40))
        assert float((~sparsifier.masks["0.weight"]).float().mean()) >= 0.5
        assert int((~alive(sparsifier)).sum()) == 1920


@pytest.mark.fastai
def test_alternating_phases_alternate_in_a_second_fit_too(make_learner):
    from sparsifai import SparsifyCallback

    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 32), nn.Tanh(), nn.Linear(32, 3))
    callback, masks, counts = SparsifyCallback(0.75, schedule="ac_dc"), [], []
    learn = make_learner(net, steps=20, lr=0.01, cbs=[callback, counting(lambda: callback, masks, counts)])
    learn.fit(1)
    learn.fit(1)
    assert [bool(mask.all()) for mask in masks[:20]] == [bool(mask.all()) for mask in masks[20:]]
    assert any(mask.all() for mask in masks[20:])
    assert callback.sparsifier.sparsity == pytest.approx(0.75, abs=1e-3)


@pytest.mark.fastai
def test_by_default_masks_move_a_hundred_times_in_a_fit(make_learner):
    from sparsifai import SparsifyCallback

    callback = SparsifyCallback(0.5, schedule="one_shot", regrow="random", decay=lambda t: 0.0)
    masks, counts = [], []
    learn = make_learner(steps=25, lr=0.1)
    learn.fit(8, cbs=[callback, counting(lambda: callback, masks, counts)])
    moved = [step + 1 for step in range(1, 200) if not torch.equal(masks[step], masks[step - 1])]
    assert moved == list(range(2, 201, 2))


@pytest.mark.fastai
def test_zeros_of_an_earlier_fit_are_moved_too(make_learner):
    from sparsifai import KeepSparsity, SparsifyCallback

    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 32), nn.Tanh(), nn.Linear(32, 3))
    learn = make_learner(net, steps=20, lr=0.01)
    first = SparsifyCallback(0.8)
    learn.fit(1, cbs=first)
    before, masks, counts = alive(first.sparsifier), [], []
    second = SparsifyCallback(0.8, schedule="one_shot", regrow="grad", every=2)
    learn.fit(1, cbs=[second, counting(lambda: second, masks, counts)])
    assert torch.equal(masks[0], before)
    assert (masks[-1] & ~before).any()
    assert set(counts) == {rounded(0.8 * (128 * 32 + 96))}
    learn.fit(1)
    assert second.sparsifier.sparsity == pytest.approx(0.8, abs=1e-3)
    assert len(learn._grab_cbs(KeepSparsity)) == 1
    assert not any(keeper.looks for keeper in learn._grab_cbs(KeepSparsity))


@pytest.mark.fastai
def test_with_accumulated_and_with_clipped_gradients(make_learner):
    from fastai.callback.training import GradientAccumulation, GradientClip

    from sparsifai import SparsifyCallback

    learn = make_learner(steps=24, lr=0.05)
    callback, masks, counts = SparsifyCallback(0.5, schedule="one_shot", regrow="grad", every=4), [], []
    learn.fit(1, cbs=[callback, GradientAccumulation(4), GradientClip(0.1), counting(lambda: callback, masks, counts)])
    assert len(masks) == 12
    assert len({int((~mask).sum()) for mask in masks}) == 1
    assert any(not torch.equal(masks[step], masks[step - 1]) for step in range(1, 12))


@pytest.mark.fastai
def test_limits_that_leave_no_room_for_what_falls_are_told_of_before_the_first_step(make_learner):
    from sparsifai import SparsifyCallback, bounded

    learn = make_learner()
    before = [parameter.clone() for parameter in learn.model.parameters()]
    callback = SparsifyCallback(0.5, context=bounded("global", {"*": (0, 0.6)}), schedule="one_shot", regrow="grad")
    with pytest.raises(ValueError, match="sparsity 0.65 cannot be had: the limits allow 0.6 at most"):
        learn.fit(1, cbs=callback)
    assert all(map(torch.equal, before, learn.model.parameters()))


@pytest.mark.fastai
def test_the_constructor_checks_what_it_is_given():
    pytest.importorskip("fastai", reason="the callback needs fastai")
    from sparsifai import SparsifyCallback, bounded

    for options, message in (
        ({"regrow": "grd"}, "unknown criterion 'grd'; did you mean 'grad'"),
        ({"regrow": "wanda"}, "no backward pass gives"),
        ({"regrow": "grad", "context": "2:4"}, "has to fall before as much comes back"),
        ({"regrow": "grad", "drop": 1.5}, "drop is the share"),
        ({"drop": 0.5}, "drop=0.5: nothing says what comes back; give regrow="),
        ({"regrow": "grad", "context": bounded("2:4", {"0": 0.25})}, "has to fall before as much comes back"),
        ({"regrow": "grad", "decay": "cosine"}, "unknown schedule 'cosine'; did you mean 'cos'"),
    ):
        with pytest.raises(ValueError, match=message):
            SparsifyCallback(0.5, **options)


@pytest.mark.fastai
def test_alternating_phases_end_sparse_and_bring_weights_back_on_the_way(make_learner):
    from sparsifai import SparsifyCallback

    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 32), nn.Tanh(), nn.Linear(32, 3))
    learn, masks, counts = make_learner(net, steps=20, lr=0.01), [], []
    callback = SparsifyCallback(0.75, schedule="ac_dc")
    learn.fit(2, cbs=[callback, counting(lambda: callback, masks, counts)])
    shares = [float((~mask).float().mean()) for mask in masks]
    dense = [step + 1 for step, share in enumerate(shares) if share == 0]
    # Of 40 steps: after step n the level is that of n / 40.
    assert dense == [1, 2, 3, *(6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27), *range(30, 34)]
    assert all(share == pytest.approx(0.75, abs=0.005) for share in shares if share)
    assert callback.sparsifier.sparsity == pytest.approx(0.75, abs=0.005)
    assert counts[31] == 0  # what came back is trained; inputs of a unit without outputs a step later


@pytest.mark.fastai
@pytest.mark.slow
def test_on_the_digits_growing_by_gradient_beats_growing_at_random_and_both_beat_masks_that_stay():
    pytest.importorskip("fastai", reason="trains a Learner")
    from fastai.vision.all import CrossEntropyLossFlat, Learner, accuracy, set_seed

    from examples.digits import accuracy_of, conv_net, digits_loaders
    from sparsifai import SparsifyCallback

    def trained(seed, regrow):
        set_seed(seed, reproducible=True)
        learn = Learner(digits_loaders(seed), conv_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
        callback = SparsifyCallback(0.95, context="erk", schedule="one_shot", regrow=regrow)
        with learn.no_bar(), learn.no_logging():
            learn.fit(10, 3e-3, cbs=callback)
        assert callback.sparsifier.sparsity == pytest.approx(0.95, abs=1e-4)
        return accuracy_of(learn)

    static, at_random, by_gradient = (
        mean(trained(seed, regrow) for seed in range(5)) for regrow in (None, "random", "grad")
    )
    assert static < at_random < by_gradient
