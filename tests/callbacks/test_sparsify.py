import pytest
import torch
from torch import nn

fastai = pytest.importorskip("fastai.vision.all", reason="the callbacks are fastai's")
pytestmark = pytest.mark.fastai

from conftest import dense_of, layers_of, levels_of, small_net  # noqa: E402
from fastai.callback.fp16 import MixedPrecision  # noqa: E402
from fastai.callback.schedule import SchedCos  # noqa: E402
from fastai.callback.training import GradientAccumulation, GradientClip  # noqa: E402
from fastai.learner import Callback, CancelFitException, CancelStepException, CancelTrainException  # noqa: E402
from watch import Watch, share  # noqa: E402

from sparsifai.all import (  # noqa: E402
    Sparsifier,
    SparsifyCallback,
    between,
    contexts,
    cos,
    granularities,
    large_final,
    schedules,
)
from sparsifai.sparsifier.model_masks import prunes  # noqa: E402


def test_a_linear_ramp_of_four_steps_ends_at_the_target(make_learner):
    learn, watch = make_learner(steps=4), Watch()
    learn.fit(1, cbs=[SparsifyCallback(0.9, schedule="lin"), watch])
    assert watch.forwards == [share(0.9 * step / 4) for step in range(4)]
    assert watch.steps == [share(0.9 * step / 4) for step in range(1, 5)]


@pytest.mark.parametrize("schedule", schedules)
def test_every_schedule_is_followed_to_its_end(make_learner, schedule):
    learn, watch, callback = make_learner(steps=5), Watch(), SparsifyCallback(0.8, schedule=schedule)
    learn.fit(2, cbs=[callback, watch])
    levels = [0.8 * schedules[schedule](step / 10) for step in range(11)]
    if schedule not in ("dsd", "ac_dc"):
        assert watch.forwards == [share(level) for level in levels[:-1]]
        assert watch.steps == [share(level) for level in levels[1:]]
        assert callback.sparsifier.sparsity == share(0.8)
    else:  # revived weights are zero until the next step
        assert max(watch.steps) == share(0.8)
        masked = not all(mask.all() for mask in callback.sparsifier.masks.values())
        assert masked == (schedule == "ac_dc")


def test_the_callback_examples_of_the_article(make_learner):
    learn = make_learner(steps=3)
    sp_cb = SparsifyCallback(sparsity=0.5, granularity="filter", context="global", criteria=large_final, schedule=cos)
    learn.fit_one_cycle(2, 1e-3, cbs=sp_cb)
    assert abs(sp_cb.sparsifier.sparsity - 0.5) < 0.1
    learn = make_learner(steps=3)
    sp_cb = SparsifyCallback(0.5, "weight", "local", large_final, schedule=SchedCos(0, 1))
    learn.fit(2, cbs=sp_cb)
    assert sp_cb.sparsifier.report().rows[0].count.sparsity == 0.5


def test_compression_ratio_is_another_name_of_sparsity(make_learner):
    callback = SparsifyCallback(compression_ratio=0.5)
    make_learner().fit(1, cbs=callback)
    assert callback.sparsifier.sparsity == share(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "nothing.*"}, "no layer with a weight to sparsify matches 'nothing"),
        ({"granularity": "filter", "layers": [nn.Embedding]}, "matches Embedding"),
    ],
)
def test_arguments_that_do_not_fit_the_model_are_refused_at_the_first_batch_and_change_nothing(
    make_learner, options, message
):
    learn = make_learner()
    before = [parameter.clone() for parameter in learn.model.parameters()]
    with pytest.raises(ValueError, match=message):
        learn.fit(1, cbs=SparsifyCallback(0.5, **options))
    assert all(torch.equal(old, new) for old, new in zip(before, learn.model.parameters(), strict=True))
    assert len(learn.metrics) == 0
    assert len(learn.validate()) == 1


def test_a_schedule_that_fails_in_the_fit_is_named(make_learner):
    def sneaky(t):
        return 2.0 if t == 1 / 3 else t

    with pytest.raises(ValueError, match="sneaky"):
        make_learner(steps=3).fit(1, cbs=SparsifyCallback(0.5, schedule=sneaky))


def test_the_defaults_are_those_of_the_table_in_the_readme():
    callback = SparsifyCallback(0.5)
    assert callback.pruning.ramp.schedule == between("agp", 0, 0.75)
    assert callback.pruning.options.criteria is large_final
    assert callback.pruning.options.context is contexts["global"]
    assert callback.pruning.options.granularity is granularities["weight"]


def test_a_model_that_cannot_be_traced_is_read_from_the_first_batch(make_learner):
    class Branches(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() < 1e9 else 2 * x)

    callback = SparsifyCallback(0.5, "filter")
    make_learner(Branches(*small_net())).fit(1, cbs=callback)
    assert dense_of(callback.sparsifier) == {"12.weight": "yields the model's output"}


def test_a_fit_that_is_cancelled_before_its_first_batch_makes_no_sparsifier(make_learner):
    class Cancel(Callback):
        def before_train(self):
            raise CancelTrainException

    callback = SparsifyCallback(0.5)
    learn = make_learner()
    with learn.no_bar():  # which does not expect it
        learn.fit(1, cbs=[callback, Cancel()])
    assert callback.sparsifier is None


def test_per_layer_targets_by_glob(make_learner):
    callback = SparsifyCallback({"[035]": 0.5, "1*": 0.9}, context="local", exclude="12")
    make_learner().fit(1, cbs=callback)
    counts = {row.name: row.count.sparsity for row in callback.sparsifier.report().rows}
    assert counts == {"0.weight": 0.5, "3.weight": 0.5, "5.weight": 0.5, "10.weight": 43 / 48, "12.weight": 0}


def test_the_sparsifier_takes_the_same_options_in_the_same_words(make_learner):
    callback = SparsifyCallback(
        0.5, "filter", "local", "movement", "lin", layers=nn.Conv2d, exclude="5", pool="l2", round_to=2, seed=3
    )
    make_learner().fit(1, cbs=callback)
    direct = Sparsifier(
        small_net(), "filter", "local", "movement", layers=nn.Conv2d, exclude="5", pool="l2", round_to=2, seed=3
    )
    assert layers_of(callback.sparsifier).keys() == layers_of(direct).keys()
    assert callback.sparsifier.ranking.options.criteria is direct.ranking.options.criteria
    assert callback.sparsifier.ranking.options.pool is direct.ranking.options.pool
    assert callback.sparsifier.ranking.options.round_to == direct.ranking.options.round_to
    assert torch.equal(
        torch.Generator().manual_seed(3).get_state(), callback.sparsifier.collected.source.rng.get_state()
    )  # the criterion drew nothing


def test_weights_that_a_falling_schedule_revives_start_at_zero(make_learner):
    revived = []

    class Look(Callback):
        order = 12  # right after the masks

        def before_fit(self):
            self.before = None

        def after_step(self):
            sparsifier = self.learn.sparsify_callback.sparsifier
            mask = sparsifier.masks["3.weight"]
            if self.before is not None:
                revived.append(sparsifier.layers["3.weight"].parameter.detach()[mask & ~self.before])
            self.before = mask

    make_learner(steps=8, opt_func=fastai.Adam).fit(1, 0.1, cbs=[SparsifyCallback(0.5, schedule="dsd"), Look()])
    revived = torch.cat(revived)
    assert len(revived) > 20
    assert (revived == 0).all()


def test_sparsity_zero_is_training_without_the_callback(make_learner):
    def trained(callbacks):
        learn = make_learner(opt_func=fastai.Adam)
        torch.manual_seed(2)
        learn.fit(2, 1e-2, cbs=callbacks)
        return learn, torch.get_rng_state()

    (plain, random), (sparse, same_random) = trained([]), trained([SparsifyCallback(0.0, criteria="random")])
    for a, b in zip(plain.model.state_dict().values(), sparse.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(plain.opt.state_dict()["state"], sparse.opt.state_dict()["state"], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
    assert torch.equal(random, same_random)
    assert not hasattr(sparse, "keep_sparsity")


@pytest.mark.parametrize("opt_func", [fastai.SGD, fastai.Adam, fastai.RMSProp])
def test_momentum_and_weight_decay_do_not_revive(make_learner, opt_func):
    learn, watch = make_learner(opt_func=opt_func, steps=6), Watch()
    learn.fit(2, 0.05, wd=0.1, cbs=[SparsifyCallback(0.8, schedule="one_shot"), watch])
    assert set(watch.forwards) == set(watch.steps) == {share(0.8)}


def test_gradients_are_masked_before_clipping(make_learner):
    norms = []

    class Norm(Callback):
        order = 10.9

        def before_step(self):
            sparsifier = self.learn.sparsify_callback.sparsifier
            for name, mask in sparsifier.masks.items():
                gradient = sparsifier.layers[name].parameter.grad
                norms.append(float(gradient[~mask.expand_as(gradient)].norm()))

    make_learner().fit(1, cbs=[SparsifyCallback(0.8, schedule="one_shot"), Norm(), GradientClip(1.0)])
    assert norms
    assert set(norms) == {0.0}


def test_accumulated_gradients_and_a_last_batch_without_a_step_still_reach_the_target(make_learner):
    learn, callback = make_learner(steps=5), SparsifyCallback(0.9, schedule="lin")
    learn.fit(1, cbs=[callback, GradientAccumulation(4)])  # 2 batches of 2 a step: the fifth batch has none
    assert callback.sparsifier.sparsity == share(0.9)


def test_a_skipped_step_and_mixed_precision_on_the_cpu(make_learner):
    class Skip(Callback):
        order = 20

        def before_step(self):
            raise CancelStepException

    callback = SparsifyCallback(0.9, schedule="lin")
    make_learner().fit(1, cbs=[callback, Skip()])
    assert callback.sparsifier.sparsity == share(0.9)

    class MixedPrecisionOnCPU(MixedPrecision):
        def before_fit(self):
            self.autocast, self.scaler = torch.autocast("cpu", torch.bfloat16), torch.amp.GradScaler("cpu")
            self.learn.scaler, self.scales = self.scaler, []

    callback = SparsifyCallback(0.9, schedule="lin")
    make_learner(cbs=MixedPrecisionOnCPU()).fit(1, cbs=callback)
    assert callback.sparsifier.sparsity == share(0.9)


def test_a_cancelled_fit_keeps_the_sparsity_that_it_reached(make_learner):
    class Cancel(Callback):
        def after_batch(self):
            if self.training and self.iter == 1:
                raise CancelFitException

    learn, callback = make_learner(steps=4), SparsifyCallback(0.8, schedule="lin")
    learn.fit(1, cbs=[callback, Cancel()])
    assert callback.sparsifier.sparsity == share(0.4)
    assert prunes(learn.keep_sparsity.masks, callback.sparsifier.masks)


# --- What else a Learner does: no harm ----------------------------------------------------------------------------


def state_of(learn):
    return [parameter.clone() for parameter in learn.model.parameters()]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("given", ["fit", "learner"])
def test_lr_find_validate_and_get_preds_change_nothing(make_learner, when, given, capsys, tmp_path):
    callback = SparsifyCallback(0.5)
    learn = make_learner(cbs=[callback] if given == "learner" else None, path=tmp_path)
    if when == "after":
        learn.fit(1, cbs=callback if given == "fit" else None)
    before, level = state_of(learn), callback.sparsifier and levels_of(callback.sparsifier)
    capsys.readouterr()
    with learn.no_bar():
        learn.lr_find(num_it=6, show_plot=False)
        assert len(learn.validate()) == 1
        assert len(learn.get_preds()) == 2
    assert all(torch.equal(old, new) for old, new in zip(before, state_of(learn), strict=True))
    assert (callback.sparsifier and levels_of(callback.sparsifier)) == level
    assert "parsity" not in capsys.readouterr().out
    assert len(learn.metrics) == 0


def test_the_same_callback_in_a_second_fit_keeps_the_sparsity_that_it_reached(make_learner):
    learn, watch = make_learner(cbs=SparsifyCallback(0.9)), Watch()
    learn.fit(1)
    learn.fit(1, cbs=watch)
    assert set(watch.forwards) == set(watch.steps) == {share(0.9)}


@pytest.mark.parametrize("criteria", ["large_final", "small_final", "movement"])
def test_a_second_callback_goes_on_from_the_zeros_of_the_first(make_learner, criteria):
    learn, watch = make_learner(), Watch()
    first, second = SparsifyCallback(0.5, criteria=criteria), SparsifyCallback(0.8, criteria=criteria, schedule="lin")
    learn.fit(1, cbs=first)
    learn.fit(1, cbs=[second, watch])
    assert min(watch.forwards) == share(0.5)
    assert watch.steps[-1] == share(0.8)
    assert all((second.sparsifier.masks[name] <= mask).all() for name, mask in first.sparsifier.masks.items())


def test_fine_tune_keeps_the_sparsity_while_layers_are_frozen_and_says_so(make_learner, capsys):
    splitter = lambda model: fastai.L(list(model[:6].parameters()), list(model[6:].parameters()))  # noqa: E731
    learn, watch = make_learner(splitter=splitter), Watch()
    callback = SparsifyCallback(0.8, schedule=between("lin", 0, 1))
    learn.fine_tune(2, freeze_epochs=1, cbs=[callback, watch])
    assert "some layers are frozen, so sparsity is held at 0.00% in this fit" in capsys.readouterr().out
    assert watch.forwards == [share(0.8 * step / 8) for step in range(8)]  # the unfrozen fit, from its start
    assert callback.sparsifier.sparsity == share(0.8)
    assert dense_of(callback.sparsifier) == {}


def test_a_fit_with_start_epoch_starts_the_schedule_there(make_learner):
    learn, watch = make_learner(steps=2), Watch()
    learn.fit(4, start_epoch=2, cbs=[SparsifyCallback(0.8, schedule="lin"), watch])
    assert watch.forwards == [share(0.8 * step / 8) for step in range(4, 8)]
    assert watch.steps[-1] == share(0.8)


def test_without_default_callbacks_bar_and_logging_nothing_is_printed(make_learner, capsys):
    from fastai.callback.core import TrainEvalCallback

    learn = make_learner(default_cbs=False, cbs=[TrainEvalCallback()])
    callback = SparsifyCallback(0.5)
    with learn.no_logging(), learn.no_bar():
        learn.fit(1, cbs=callback)
    assert callback.sparsifier.sparsity == share(0.5)
    assert capsys.readouterr().out == ""


def test_learn_save_and_load_stay_strict(make_learner, tmp_path):
    learn = make_learner(path=tmp_path)
    learn.fit(1, cbs=SparsifyCallback(0.5))
    learn.save("sparse")
    other = make_learner(path=tmp_path).load("sparse")
    assert all(torch.equal(a, b) for a, b in zip(learn.model.parameters(), other.model.parameters(), strict=True))


def test_nothing_of_the_constructor_is_changed_by_a_fit(make_learner):
    callback = SparsifyCallback({"0": 0.5, "3": 0.9}, context="local", schedule="cos")
    before = {
        key: value for key, value in vars(callback).items() if key in SparsifyCallback.__init__.__code__.co_varnames
    }
    make_learner().fit(1, cbs=callback)
    assert {key: vars(callback)[key] for key in before} == before
    assert callback.pruning.ramp.sparsity == {"0": 0.5, "3": 0.9}


# --- Zeros that must not be lost between fits ---------------------------------------------------------------------


class Raise(Callback):
    """Raises in one event of one step."""

    def __init__(self, error, event, order=99, iteration=2):
        self.error, self.iteration, self.order = error, iteration, order
        setattr(self, event, self._raise)

    def _raise(self):
        if self.training and self.iter == self.iteration:
            raise self.error


@pytest.mark.parametrize("given", ["fit", "learner"])
@pytest.mark.parametrize("event", ["after_pred", "after_backward", "before_step", "after_step", "after_batch"])
@pytest.mark.parametrize("error", [KeyboardInterrupt("now"), ZeroDivisionError("now")])
def test_the_sparsity_that_an_interrupted_fit_reached_is_kept(make_learner, error, event, given):
    callback = SparsifyCallback(0.8, schedule="lin")
    learn, watch = make_learner(opt_func=fastai.Adam, cbs=callback if given == "learner" else None), Watch()
    with pytest.raises(type(error)):
        learn.fit(1, cbs=[Raise(error, event), *([callback] if given == "fit" else [])])
    reached = share(0.8 * (3 if event in ("after_step", "after_batch") else 2) / 4)
    learn.remove_cbs([callback] if given == "learner" else [])
    learn.fit(2, 0.1, cbs=watch)
    assert set(watch.forwards) == set(watch.steps) == {reached}


def test_an_interrupt_inside_the_step_of_the_optimizer(make_learner):
    learn, watch = make_learner(opt_func=fastai.Adam), Watch()
    callback = SparsifyCallback(0.8, schedule="one_shot")
    calls = []

    class Break(Callback):
        def before_step(self):
            calls.append(1)
            if len(calls) == 3:
                step = self.learn.opt.step

                def interrupted():
                    step()
                    self.learn.opt.step = step
                    raise KeyboardInterrupt

                self.learn.opt.step = interrupted

    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, 0.1, cbs=[callback, Break()])
    assert callback.sparsifier.sparsity == share(0.8)
    learn.fit(1, cbs=watch)
    assert set(watch.forwards) == {share(0.8)}


def test_start_epoch_in_a_later_fit_does_not_lower_the_sparsity(make_learner):
    learn, watch = make_learner(cbs=SparsifyCallback(0.9)), Watch()
    learn.fit(2)
    learn.fit(4, start_epoch=2, cbs=watch)
    assert set(watch.forwards) == set(watch.steps) == {share(0.9)}


def test_a_fit_without_any_step_still_follows_the_schedule_at_its_ends(make_learner):
    learn, watch, callback = make_learner(steps=4), Watch(), SparsifyCallback(0.8, schedule="lin")
    learn.fit(1, cbs=[callback, watch, GradientAccumulation(1000)])
    assert set(watch.forwards) == {0}
    assert callback.sparsifier.sparsity == share(0.8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": {"nothing.*": 0.5}}, "no layer with a weight to sparsify matches 'nothing"),
        ({"sparsity": 0.5, "criteria": lambda weight: weight.sum()}, "must return one real score per weight"),
        ({"sparsity": 0.5, "context": lambda layers, sparsity: None}, "must return a list with"),
        ({"sparsity": 0.5, "pool": lambda grouping, scores: scores, "granularity": "kernel"}, "one score per group"),
    ],
)
def test_mistakes_show_before_the_first_forward(make_learner, arguments, message):
    learn, watch = make_learner(), Watch()
    with pytest.raises(ValueError, match=message):
        learn.fit(1, cbs=[SparsifyCallback(**arguments, schedule=between("agp", 0.5, 1)), watch])
    assert watch.forwards == []


@pytest.mark.parametrize("ask", [lambda learn: learn.validate(), lambda learn: learn.get_preds()])
def test_validating_inside_a_fit_stops_nothing(make_learner, ask):
    counts = []

    class Asks(Callback):
        order = 70

        def after_epoch(self):
            if not self.learn.lock.locked():
                counts.append(len(ask(self.learn)))

    learn, callback = make_learner(), SparsifyCallback(0.8, schedule="lin")
    learn.fit(3, cbs=[callback, Asks()])
    assert callback.sparsifier.sparsity == share(0.8)
    assert counts == [len(ask(learn))] * 3
    assert len(learn.metrics) == 0


def test_a_dictionary_of_targets_follows_the_schedule(make_learner):
    levels = []

    class Look(Callback):
        order = 99

        def after_step(self):
            report = self.learn.sparsify_callback.sparsifier.report()
            levels.append([row.count.zeros for row in report.rows[:2]])

    make_learner(steps=4).fit(1, cbs=[SparsifyCallback({"0": 0.5, "3": 0.25}, schedule="lin"), Look()])
    assert levels == [[18, 12], [36, 24], [54, 36], [72, 48]]


def test_a_frozen_fit_shows_the_zeros_that_are_there(make_learner, capsys):
    model = small_net()
    Sparsifier(model).sparsify(0.7)
    splitter = lambda model: fastai.L(list(model[:6].parameters()), list(model[6:].parameters()))  # noqa: E731
    learn = make_learner(model, splitter=splitter)
    learn.freeze()
    learn.fit(1, 0.0, wd=0, cbs=SparsifyCallback(0.9))
    assert "sparsity is held at 70.04% in this fit" in capsys.readouterr().out
    assert learn.recorder.values[-1][-1] == share(0.7)


def test_layers_that_a_dictionary_does_not_name_stay_dense(make_learner):
    callback = SparsifyCallback({"0": 0.5, "3": 0.25}, context="local", schedule="lin")
    learn = make_learner()
    learn.fit(1, cbs=callback)
    assert list(callback.sparsifier.masks) == ["0.weight", "3.weight"]
    assert learn.recorder.values[-1][-1] == callback.sparsifier.sparsity == 120 / (144 + 192)


def test_a_last_epoch_that_is_cancelled_half_way_does_not_jump_to_the_target(make_learner):
    class Cancel(Callback):
        def after_batch(self):
            if self.training and self.iter == 1:
                raise CancelTrainException

    callback = SparsifyCallback(0.8, schedule="lin")
    make_learner(steps=4).fit(1, cbs=[callback, Cancel()])
    assert callback.sparsifier.sparsity == share(0.4)


@pytest.mark.parametrize("every", [1, 3, 5, 100])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_masks_are_updated_every_so_many_batches_and_end_at_the_target(make_learner, every, accumulated):
    changes = []

    class Look(Callback):
        order = 99

        def before_fit(self):
            self.before = None

        def after_batch(self):
            if self.training:
                level = self.learn.sparsify_callback.sparsifier.level
                if level != self.before:
                    changes.append(self.learn.epoch * self.learn.n_iter + self.learn.iter + 1)
                self.before = level

    callback = SparsifyCallback(0.8, schedule="lin", every=every)
    learn = make_learner(steps=4)
    learn.fit(2, 0.1, cbs=[callback, Look(), GradientAccumulation(2 * accumulated)])
    assert callback.sparsifier.sparsity == share(0.8)
    # A step is made every `accumulated` batches, and an update at the first step after every `every` batches.
    steps = range(accumulated, 9, accumulated)
    expected = [step for step in steps if step // every > (step - accumulated) // every or step == 8]
    assert changes[-len(expected) :] == expected
    assert len(changes) - len(expected) == (expected[0] != 1)  # where the fit starts, at the first batch


class Stop(Callback):
    """Interrupts a fit after a batch. batch: its number in the fit."""

    def __init__(self, batch):
        self.batch = batch

    def after_batch(self):
        if self.learn.train_iter == self.batch:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:a falling sparsity revives")
def test_followers_of_filters_that_a_second_fit_revives_are_revived(make_learner):
    callback = SparsifyCallback(0.5, "filter", "local", schedule=lambda t: 1 - abs(2 * t - 1))
    learn, pruned = make_learner(cbs=callback), []
    for batch in (4, 7):  # at the top, and far down the other side
        with pytest.raises(KeyboardInterrupt):
            learn.fit(2, cbs=Stop(batch))
        masks = learn.keep_sparsity.masks
        kept = learn.sparsify_callback.sparsifier.masks["0.weight"].flatten()
        for follower in ("0.bias", "1.weight", "1.bias"):
            assert torch.equal(masks[follower], kept)
        pruned.append(int((~kept).sum()))
    assert pruned[0] > pruned[1]


class Branching(nn.Module):
    """Of this model, the data flow is found by running it."""

    forwards = 0

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        Branching.forwards += 1
        return self.net(x) if x.sum() < 1e9 else self.net(x / 2)


def test_a_later_fit_needs_no_data_flow_to_keep_the_zeros_of_filters(make_learner):
    learn = make_learner(Branching())
    learn.fit(1, cbs=SparsifyCallback(0.5, "filter", layers="net.0"))
    Branching.forwards = 0
    learn.fit(1)
    assert Branching.forwards == len(learn.dls.train) + len(learn.dls.valid)


def test_after_an_interrupted_fit_the_next_one_says_what_keeps_the_zeros(make_learner, capsys):
    learn = make_learner(cbs=SparsifyCallback(0.5))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=Stop(6))
    learn.fit(1)
    assert capsys.readouterr().out.count("of zeros in later fits") == 1
    learn.fit(1)
    assert "of zeros in later fits" not in capsys.readouterr().out


def test_a_sparsity_that_a_context_of_ones_own_cannot_reach_is_refused_at_once():
    def half(layers, sparsity):
        return contexts["local"](layers, sparsity)

    half.highest_sparsity = 0.5
    SparsifyCallback(0.5, context=half)
    with pytest.raises(ValueError, match="context half prunes at most 0.5 of the weights"):
        SparsifyCallback(0.6, context=half)
    with pytest.raises(ValueError, match="regrowth first prunes more than context half allows"):
        SparsifyCallback(0.5, context=half, regrow="grad")


@pytest.mark.parametrize("event", ["after_pred", "after_loss", "before_backward"])
def test_a_callback_that_is_taken_off_within_a_step_leaves_the_step_whole(make_learner, event):
    def take_off(self):
        if self.training and (self.epoch, self.iter) == (0, 3) and hasattr(self.learn, "sparsify_callback"):
            self.learn.remove_cb(SparsifyCallback)

    learn, callback = make_learner(steps=6, opt_func=fastai.Adam), SparsifyCallback(0.8, schedule="lin")
    learn.fit(2, 0.01, cbs=[callback, Callback(**{event: take_off})])
    assert learn.keep_sparsity.report().selected.sparsity == share(0.8 * 3 / 12)


@pytest.mark.parametrize(("context", "told"), [("global", 1), ("local", 0)])
def test_a_layer_with_hardly_any_weights_left_is_told(make_learner, capsys, context, told):
    """A new layer on pretrained ones has smaller weights than they, so one ranking of all leaves it none."""
    model = nn.Sequential(small_net(), nn.Linear(3, 16), nn.Linear(16, 3))
    with torch.no_grad():
        model[2].weight.mul_(1e-4)
    learn = make_learner(model=model)
    learn.fit(1, 0.0, cbs=SparsifyCallback(0.5, context=context, schedule="one_shot"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "fewer than its 3 outputs" in line]
    assert len(lines) == told
    if told:
        assert lines[0].startswith("context global leaves 1 of 48 weights of 2.weight, fewer than its 3 outputs.")
