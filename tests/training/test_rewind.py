"""Rewinding: what is restored, and what other callbacks see of the skipped batches."""

from functools import partial

import pytest
import torch

pytest.importorskip("fastai", reason="lottery_ticket trains a Learner")
fastai = pytest.importorskip("fastai.vision.all")

from fastai.callback.core import Callback  # noqa: E402

from sparsifai import lottery_ticket  # noqa: E402  # isort: skip

from lottery_runs import Look, run, same  # noqa: E402  # isort: skip

pytestmark = pytest.mark.fastai


@pytest.mark.parametrize("opt_func", [fastai.Adam, partial(fastai.OptimWrapper, opt=torch.optim.AdamW)])
@pytest.mark.parametrize(("rewind_to", "batch"), [(0, 0), (0.5, 2), (1, 4), (1.75, 7)])
def test_rewinding_restores_weights_buffers_optimizer_and_schedule(make_learner, rewind_to, batch, opt_func):
    learn, look = make_learner(opt_func=opt_func, lr=0.01), Look()
    tickets = run(learn, look, rounds=1, fit=lambda learn: learn.fit_one_cycle(2, 0.05), rewind_to=rewind_to)
    seen = look.batches
    assert len(seen) == 8 + 8 - batch
    then, again = seen[batch], seen[8]
    assert then[2] == again[2]
    masks = tickets[1].masks
    for name, value in again[0].items():
        assert torch.equal(value, then[0][name] * masks[name] if name in masks else then[0][name])
    assert same(dict(tickets[1].start), then[0])
    for (name, _), before, now in zip(learn.model.named_parameters(), then[1], again[1], strict=True):
        assert before.keys() == now.keys()
        for kind, kept in now.items():
            masked = kept.shape == before[kind].shape == masks[name].shape if name in masks else False
            expected = before[kind] * masks[name] if masked else before[kind]
            assert torch.allclose(kept, expected, atol=1e-12, rtol=0)  # squared gradients are close to zero, not zero


def test_epochs_are_skipped_under_a_progress_bar(make_learner):
    learn, look = make_learner(), Look()
    learn.create_mbar = True
    lottery_ticket(learn, 0.5, rounds=1, fit=lambda learn: learn.fit(2, cbs=look), rewind_to=1)
    assert len(look.batches) == 8 + 4


def test_a_trained_learner_starts_with_a_fresh_optimizer(make_learner):
    learn, look = make_learner(opt_func=fastai.Adam), Look()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    run(learn, look, rounds=1)
    for batch in (0, 8):
        kept = [value for moments in look.batches[batch][1] for value in moments.values()]
        assert all((value.abs() <= 1e-16).all() for value in kept)


def test_the_recorder_has_no_losses_of_skipped_batches(make_learner):
    learn, losses = make_learner(lr=0.0), []

    def fit(learn):
        learn.fit(2, 0.0)
        losses.append([float(loss) for loss in learn.recorder.losses])

    run(learn, rounds=1, fit=fit, rewind_to=0.5)
    assert [len(each) for each in losses] == [8, 6]
    assert min(losses[1]) > 0.5  # not averaged with zeros


def test_batches_of_lr_find_are_not_counted(make_learner, tmp_path):
    def fit(learn):
        learn.lr_find(num_it=12, show_plot=False)
        learn.fit(2)

    learn, look = make_learner(path=tmp_path), Look()
    tickets = run(learn, look, rounds=1, rewind_to=1, fit=fit)
    assert len(look.batches) == 12 + 8 + 12 + 4
    assert same(dict(tickets[1].start), look.batches[12 + 4][0])
    assert all(torch.equal(look.batches[32][0][name] != 0, mask) for name, mask in tickets[1].masks.items())


@pytest.mark.parametrize("rewind_to", [0, 1, 1.5])
@pytest.mark.parametrize("kind", ["SaveModelCallback", "EarlyStoppingCallback", "ReduceLROnPlateau", "CSVLogger"])
def test_trackers_and_loggers_see_only_epochs_that_are_trained(make_learner, kind, rewind_to, tmp_path):
    from fastai.callback.all import CSVLogger, EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback

    callback = {
        "SaveModelCallback": lambda: SaveModelCallback(monitor="accuracy"),
        "EarlyStoppingCallback": lambda: EarlyStoppingCallback(patience=5),
        "ReduceLROnPlateau": lambda: ReduceLROnPlateau(patience=5),
        "CSVLogger": lambda: CSVLogger(append=True),
    }[kind]()
    learn = make_learner(metrics=fastai.accuracy, cbs=callback, path=tmp_path)
    tickets = run(learn, rounds=1, rewind_to=rewind_to)
    assert len(tickets) == 2
    assert callback.run
    if kind == "CSVLogger":
        rows = (tmp_path / "history.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows if not row.startswith("epoch")] == ["0", "1", *"01"[int(rewind_to) :]]


def test_autocast_does_not_leak_from_skipped_batches(make_learner):
    class Autocast(Callback):
        order = 10  # of MixedPrecision, which does the same on a GPU

        def before_batch(self):
            self.context = torch.autocast("cpu", torch.bfloat16)
            self.context.__enter__()

        def after_loss(self):
            self.context.__exit__(None, None, None)

    run(make_learner(), Autocast(), rounds=1, rewind_to=0.5)
    assert not torch.is_autocast_enabled("cpu")
