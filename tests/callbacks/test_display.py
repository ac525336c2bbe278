"""The column of the training table, the curves of the Recorder, and trackers that wait for the target sparsity."""

import pytest
import torch

fastai = pytest.importorskip("fastai.vision.all", reason="the callbacks are fastai's")
pytestmark = pytest.mark.fastai

from fastai.callback import core  # noqa: E402
from fastai.callback.tensorboard import TensorBoardCallback  # noqa: E402
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback  # noqa: E402
from fastai.learner import Callback  # noqa: E402
from soundness import assert_sound, counted, share  # noqa: E402
from watch import At, Invented, raises  # noqa: E402

from sparsifai.all import SparsifyCallback, between  # noqa: E402

# --- The column -------------------------------------------------------------------------------------------------------


def test_the_measured_column_stands_in_the_table_and_goes_with_the_fit(make_learner):
    learn = make_learner(metrics=fastai.accuracy)
    learn.fit(2, cbs=SparsifyCallback(0.6, schedule="lin"))
    assert list(learn.recorder.metric_names) == ["epoch", "train_loss", "valid_loss", "accuracy", "sparsity", "time"]
    assert [row[-1] for row in learn.recorder.values] == [share(0.3, learn.model), share(0.6, learn.model)]
    assert [metric.name for metric in learn.metrics] == ["accuracy"]
    assert len(learn.validate()) == 2


@pytest.mark.parametrize("given", ["fit", "learner"])
def test_an_interrupted_fit_leaves_no_column_behind(make_learner, given):
    class Interrupt(Callback):
        def after_step(self):
            raise KeyboardInterrupt

    callback = SparsifyCallback(0.5)
    learn = make_learner(cbs=callback if given == "learner" else None)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=[Interrupt(), *([callback] if given == "fit" else [])])
    assert len(learn.validate()) == 1
    learn.fit(1)
    assert len(learn.metrics) == 0


def test_the_column_never_shows_another_learner(make_learner):
    callback = SparsifyCallback(0.9)
    make_learner().fit(1, cbs=callback)
    other = make_learner(splitter=lambda model: fastai.L(list(model[:6].parameters()), list(model[6:].parameters())))
    other.freeze()
    other.fit(1, cbs=callback)
    assert [row[-1] for row in other.recorder.values] == [0]
    other.unfreeze()
    other.fit(1, cbs=callback)
    assert other.recorder.values[-1][-1] == share(0.9, other.model)


# --- Trackers and curves ------------------------------------------------------------------------------------------


def best_in(learn, epochs):
    """A metric that is best in the epochs that are given."""
    return Invented(learn, lambda epoch: 1.0 if epoch in epochs else 0.1 * epoch)


def tracked(make_learner, tmp_path, best, trackers, schedule="lin", given="to the fit"):
    """Fit six epochs, the target reached in the fourth by between(lin, 0, 0.66)."""
    callback = SparsifyCallback(0.8, schedule=between(schedule, 0, 0.66))
    learn = make_learner(path=tmp_path, cbs=[callback] if given == "to the Learner" else None)
    learn.metrics = [best_in(learn, best)]
    learn.fit(6, 0.1, cbs=trackers if given == "to the Learner" else [callback, *trackers])
    return learn, callback


@pytest.mark.parametrize("given", ["to the fit", "to the Learner"])
@pytest.mark.parametrize("options", [{}, {"with_opt": True}, {"reset_on_fit": False}])
def test_save_model_restores_the_best_epoch_that_has_the_target_sparsity(
    make_learner, tmp_path, given, options, capsys
):
    saver = SaveModelCallback(monitor="invented", **options)
    learn, callback = tracked(make_learner, tmp_path, best=[0, 4], trackers=[saver], given=given)
    assert saver.best == 1.0
    assert "Better model found at epoch 0" not in capsys.readouterr().out
    assert_sound(learn, callback, level=0.8)
    best = torch.load(tmp_path / "models" / "model.pth", weights_only=False)
    best = best.get("model", best)
    assert all(torch.equal(best[name], value) for name, value in learn.model.state_dict().items())
    learn.fit(1, 0.1)
    assert_sound(learn, level=0.8)


def test_save_model_saves_every_epoch_if_told_so(make_learner, tmp_path):
    tracked(make_learner, tmp_path, best=[0], trackers=[SaveModelCallback(every_epoch=True)])
    assert len(list((tmp_path / "models").glob("*.pth"))) == 6


@pytest.mark.parametrize("at_end", [False, True])
def test_save_model_in_a_fit_that_is_cut_short_of_the_target_loads_nothing(make_learner, tmp_path, at_end):
    saver = SaveModelCallback(monitor="invented", at_end=at_end)
    stop = At("after_epoch", raises(core.CancelFitException()))
    learn, callback = tracked(make_learner, tmp_path, best=[0], trackers=[saver, stop])
    assert (tmp_path / "models" / "model.pth").exists() == at_end
    assert_sound(learn, callback)
    assert 0 < counted(learn.model) < share(0.8, learn.model)


def test_early_stopping_waits_for_the_target(make_learner, tmp_path):
    learn, callback = tracked(
        make_learner, tmp_path, best=[0], trackers=[EarlyStoppingCallback(monitor="invented", patience=1)]
    )
    assert learn.epoch == 5  # 0.1 * epoch grows from the first epoch that counts, the last included
    assert_sound(learn, callback, level=0.8)
    learn, callback = tracked(
        make_learner, tmp_path, best=[3], trackers=[EarlyStoppingCallback(monitor="invented", patience=1)]
    )
    assert learn.epoch == 4
    assert_sound(learn, callback, level=0.8)


def test_reduce_lr_on_plateau_waits_for_the_target(make_learner, tmp_path):
    learn, _ = tracked(make_learner, tmp_path, best=[0], trackers=[ReduceLROnPlateau(monitor="invented")])
    assert learn.opt.hypers[-1]["lr"] == 0.1
    learn, _ = tracked(make_learner, tmp_path, best=[3], trackers=[ReduceLROnPlateau(monitor="invented")])
    assert learn.opt.hypers[-1]["lr"] == pytest.approx(0.001)


def test_trackers_work_as_ever_where_the_sparsity_does_not_move(make_learner, tmp_path):
    saver = SaveModelCallback(monitor="invented")
    learn, callback = tracked(make_learner, tmp_path, best=[0], trackers=[saver], schedule="one_shot")
    assert saver.best == 1.0
    best = torch.load(tmp_path / "models" / "model.pth", weights_only=True)
    assert all(torch.equal(best[name], value) for name, value in learn.model.state_dict().items())
    assert_sound(learn, callback, level=0.8)


def test_trackers_that_the_user_has_switched_off_stay_off(make_learner, tmp_path):
    judged = []

    class Off(EarlyStoppingCallback):
        def before_fit(self):
            super().before_fit()
            self.run = False

        def after_epoch(self):
            judged.append(self.learn.epoch)

    tracked(make_learner, tmp_path, best=[0], trackers=[Off()])
    assert judged == []


def test_the_best_epoch_of_a_denser_fit_is_not_loaded_after_a_sparse_one(make_learner, tmp_path):
    learn, saver = make_learner(path=tmp_path), SaveModelCallback(monitor="invented", reset_on_fit=False)
    learn.metrics = [best_in(learn, [0])]
    learn.fit(2, 0.1, cbs=saver)
    assert saver.best == 1.0
    learn.metrics = [best_in(learn, [])]
    callback = SparsifyCallback(0.8, schedule="one_shot")
    learn.fit(3, 0.1, cbs=[callback, saver])
    assert saver.best == 0.2
    assert_sound(learn, callback, level=0.8)


def test_the_recorder_plots_the_level_beside_the_learning_rate_and_the_measured_sparsity(make_learner):
    import matplotlib.pyplot as plt

    learn = make_learner()
    with pytest.raises(ValueError, match="no fit with a SparsifyCallback is recorded"):
        learn.recorder.plot_sparsity()
    learn.fit_one_cycle(2, 0.1, cbs=SparsifyCallback(0.8, schedule="lin"))
    assert learn.recorder.hps["sparsity"] == [pytest.approx(0.1 * step) for step in range(1, 9)]
    assert {len(values) for values in learn.recorder.hps.values()} == {8}
    learn.recorder.plot_sched()
    assert [axes.get_ylabel() for axes in plt.gcf().axes[:3]] == ["lr", "mom", "sparsity"]
    axes = learn.recorder.plot_sparsity()
    levels, measured = (line.get_ydata() for line in axes.lines)
    assert list(levels) == [pytest.approx(0.4), pytest.approx(0.8)]
    assert list(measured) == [share(0.4, learn.model), share(0.8, learn.model)]
    plt.close("all")
    learn.fit(1, cbs=SparsifyCallback(0.9, schedule="lin"))
    assert list(learn.recorder.hps) == ["sparsity"]


def test_loggers_see_the_column(make_learner, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn = make_learner(path=tmp_path)
    board = TensorBoardCallback(log_dir=tmp_path / "board", trace_model=False, log_preds=False)
    learn.fit(2, cbs=[SparsifyCallback(0.8, schedule="lin"), fastai.CSVLogger(), board])
    shares = [share(0.4, learn.model), share(0.8, learn.model)]
    rows = [line.split(",") for line in (tmp_path / "history.csv").read_text().splitlines()]
    column = rows[0].index("sparsity")
    assert [float(row[column]) for row in rows[1:]] == pytest.approx(shares)
    written = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.value for event in written.Scalars("sparsity")] == pytest.approx(shares)


# --- Notices ------------------------------------------------------------------------------------------------------


def notices(capsys):
    return [
        line
        for line in capsys.readouterr().out.replace("\r", "\n").splitlines()
        if "SparsifyCallback:" in line or "ignore" in line
    ]


@pytest.mark.parametrize(
    ("trackers", "line"),
    [
        ([SaveModelCallback(monitor="invented")],
         "SaveModelCallback ignores epochs 0 to 2, before the schedule is at its target of 80.00%"),
        ([SaveModelCallback(monitor="invented"), EarlyStoppingCallback(monitor="invented", patience=9)],
         "SaveModelCallback and EarlyStoppingCallback ignore epochs 0 to 2, before the schedule is at its target of "
         "80.00%"),
        ([SaveModelCallback(every_epoch=True)], None),
        ([], None),
    ],
)  # fmt: skip
def test_epochs_that_trackers_ignore_are_told_at_the_beginning(make_learner, tmp_path, trackers, line, capsys):
    tracked(make_learner, tmp_path, best=[4], trackers=trackers)
    assert notices(capsys) == ([line] if line else [])


def test_epochs_that_trackers_ignore_where_updates_are_rare_or_masks_settle_late(make_learner, tmp_path, capsys):
    learn = make_learner(path=tmp_path)
    n_iter = len(learn.dls.train)
    saver = SaveModelCallback(monitor="valid_loss", fname="best")
    learn.fit(3, cbs=[SparsifyCallback(0.5, schedule=between("lin", 0, 0.3), every=2 * n_iter), saver])
    assert notices(capsys) == ["SaveModelCallback ignores epoch 0, before the schedule is at its target of 50.00%"]
    learn = make_learner(path=tmp_path)
    learn.fit(4, cbs=[SparsifyCallback(0.5, straight_through=True, settle=0.6), saver])
    (line,) = notices(capsys)
    assert line.endswith("ignores epochs 0 to 1, before the schedule is at its target of 50.00% and masks have settled")
    learn.fit(2, cbs=[SparsifyCallback(0.5, schedule="one_shot"), saver])
    assert notices(capsys) == []


def test_a_fit_that_begins_below_the_zeros_of_earlier_fits_says_so(make_learner, capsys):
    learn = make_learner()
    learn.fit(1, cbs=SparsifyCallback(0.5))
    assert notices(capsys) == []
    learn.fit(4, cbs=SparsifyCallback(0.6, schedule="lin"))
    (line,) = notices(capsys)
    assert line == (
        "SparsifyCallback: the schedule begins at 0.00%, below the 50.00% of zeros that are kept, and prunes more in "
        "epoch 3"
    )
    learn.fit(4, cbs=SparsifyCallback(0.9, schedule="lin", initial_sparsity=0.6))
    assert notices(capsys) == []


def test_updates_that_are_further_apart_than_a_fit_is_long_are_told(make_learner, capsys):
    learn = make_learner()
    total = len(learn.dls.train)
    learn.fit(1, cbs=SparsifyCallback(0.5, every=total + 1))
    (line,) = notices(capsys)
    assert line.startswith(f"SparsifyCallback: every={total + 1} is more than the {total} batches of the training")
    learn.fit(1, cbs=SparsifyCallback(0.6, every=total))
    assert notices(capsys) == []


def test_a_notice_has_a_line_of_its_own_in_a_terminal(open_terminal, make_learner):
    pytest.importorskip("fastprogress")
    terminal, learn = open_terminal(), make_learner()
    learn.fit(1, cbs=SparsifyCallback(0.5, every=1000))
    assert [line for line in terminal.lines() if "every=1000" in line][0].startswith("SparsifyCallback: every=1000 is")
