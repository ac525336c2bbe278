"""Runs of lottery tickets that are interrupted and resumed."""

import pytest
import torch
from torch import nn

pytest.importorskip("fastai", reason="lottery_ticket trains a Learner")
fastai = pytest.importorskip("fastai.vision.all")


from conftest import small_learner  # noqa: E402  # isort: skip
from lottery_runs import run, same, weights_of  # noqa: E402  # isort: skip
from sparsifai import KeepSparsity, LotteryTickets  # noqa: E402

pytestmark = pytest.mark.fastai


def learner_that_stops(after):
    """A Learner with dropout and shuffled data, and a fit that is interrupted after some rounds."""
    torch.manual_seed(5)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(128, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    )
    fastai.set_seed(3)
    learn = small_learner(net, steps=6, lr=0.05, opt_func=fastai.Adam, metrics=fastai.accuracy)
    learn.dls.train.shuffle = True
    fits = []

    def fit(learn):
        fits.append(1)
        if len(fits) > after:
            raise KeyboardInterrupt
        learn.fit_one_cycle(2, 0.05)

    return learn, fit


@pytest.mark.parametrize("rewind_to", [0, 1])
@pytest.mark.parametrize(("after", "criteria"), [(1, "large_final"), (2, "random"), (4, "updating_movement")])
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(after, criteria, rewind_to, tmp_path):
    options = {"rewind_to": rewind_to, "controls": ["shuffled"], "controls_every": 3, "criteria": criteria}
    learn, fit = learner_that_stops(100)
    expected, weights = run(learn, fit=fit, **options), weights_of(learn.model)

    learn, fit = learner_that_stops(after)
    with pytest.raises(KeyboardInterrupt):
        run(learn, fit=fit, path=tmp_path / "run", **options)
    assert not learn._grab_cbs(KeepSparsity)
    assert len(LotteryTickets.load(tmp_path / "run")) == min(after, 3)
    learn, fit = learner_that_stops(100)
    torch.manual_seed(77)  # another process has other random states
    for parameter in learn.model.parameters():
        nn.init.uniform_(parameter)
    tickets = run(learn, fit=fit, path=tmp_path / "run", **options)
    assert len(tickets) == 4
    for one, two in zip(tickets, expected, strict=True):
        assert same(dict(one.masks), dict(two.masks))
        assert (one.metrics, one.controls) == (two.metrics, two.controls)
    assert same(weights_of(learn.model), weights)
    again = run(learner_that_stops(0)[0], fit=fit, path=tmp_path / "run", **options)  # nothing is left to train
    assert str(again) == str(expected)


@pytest.mark.filterwarnings("ignore:(?s).*are frozen, so they stay dense")
def test_a_run_with_frozen_layers_is_resumed(make_learner, tmp_path):
    fits = []

    def fit(learn):
        fits.append(1)
        if len(fits) == 2:
            raise KeyboardInterrupt
        learn.fine_tune(1)

    def frozen():
        learn = make_learner(splitter=lambda model: [list(model[:5].parameters()), list(model[5:].parameters())])
        learn.freeze()
        return learn

    with pytest.raises(KeyboardInterrupt):
        run(frozen(), fit=fit, rounds=1, path=tmp_path / "run")
    assert len(run(frozen(), fit=fit, rounds=1, path=tmp_path / "run")) == 2


def test_arguments_are_compared_by_their_meaning(make_learner, tmp_path):
    from sparsifai import bounded, large_final

    run(make_learner(), rounds=1, exclude=nn.Linear, path=tmp_path / "run")
    run(make_learner(), rounds=1, exclude=[nn.Linear], criteria=large_final, layers=None, path=tmp_path / "run")
    with pytest.raises(ValueError, match="fit=2, not 3"):
        run(make_learner(), rounds=1, exclude=nn.Linear, fit=3, path=tmp_path / "run")
    run(make_learner(), rounds=1, context=bounded("global", {"0": 0.5}), path=tmp_path / "made" / "bounded")
    with pytest.raises(ValueError, match="context=bounded"):
        run(make_learner(), rounds=1, context=bounded("global", {"0": 0.4}), path=tmp_path / "made" / "bounded")


def test_a_file_of_another_model_changes_nothing(make_learner, tmp_path):
    run(make_learner(), rounds=1, path=tmp_path / "run")
    other = make_learner(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)))
    before = weights_of(other.model)
    with pytest.raises(ValueError, match="another model"):
        run(other, rounds=1, path=tmp_path / "run")
    assert same(before, weights_of(other.model))


def test_a_missing_file_of_tickets(tmp_path):
    with pytest.raises(FileNotFoundError):
        LotteryTickets.load(tmp_path / "nothing")
