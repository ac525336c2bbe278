"""Wrong and hostile files of runs: a run resumes as it was saved, or the file is refused and nothing has changed."""

import random
import warnings

import numpy as np
import pytest
import torch
from mutations import damaged, mutated
from torch import nn

pytest.importorskip("fastai", reason="lottery_ticket trains a Learner")
fastai = pytest.importorskip("fastai.vision.all")


from conftest import small_learner  # noqa: E402  # isort: skip
from lottery_runs import run, same, weights_of  # noqa: E402  # isort: skip

pytestmark = pytest.mark.fastai


def tiny_learner(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    learn = small_learner(net, steps=1, opt_func=fastai.Adam, shape=(2, 2, 2), lr=0.05)
    for parameter in learn.model.parameters():
        nn.init.uniform_(parameter)
    return learn


def resumed(path):
    """Resume a run of one round in a new Learner."""
    learn = tiny_learner(1)
    return learn, run(learn, rounds=1, fit=1, path=path, sparsity=0.5)


def state_of(learn):
    """All that must not change."""
    weights, generators = weights_of(learn.model), (random.getstate(), np.random.get_state()[1].tolist())
    loader = learn.dls.train.rng.getstate()
    return weights, (*generators, torch.get_rng_state().tolist(), loader), learn.opt, [each.name for each in learn.cbs]


def check_resumed(path):
    """Resume; whether the file was refused, with its name and without a trace."""
    learn = tiny_learner(1)
    weights, *others = state_of(learn)
    try:
        tickets = run(learn, rounds=1, fit=1, path=path, sparsity=0.5)
    except ValueError as raised:
        message = str(raised)
    else:
        message = ""
    if message:
        assert str(path) in message
        now, *others_now = state_of(learn)
        assert same(now, weights)
        assert others_now == others
        return True
    assert len(tickets) == 2
    assert all((learn.model.get_parameter(name)[~mask] == 0).all() for name, mask in tickets[-1].masks.items())
    return False


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What is saved after the dense net, and at the end."""
    path, states = tmp_path_factory.mktemp("runs") / "run", []

    def fit(learn):
        if path.exists():
            states.append(torch.load(path, weights_only=True))
        learn.fit(1)

    run(tiny_learner(), rounds=1, fit=fit, path=path, sparsity=0.5)
    states.append(torch.load(path, weights_only=True))
    for state in states:
        state["run"]["settings"]["fit"] = "1"
    return states


@pytest.mark.parametrize("ended", [False, True])
def test_a_run_that_nothing_has_changed_resumes(saved, tmp_path, ended):
    torch.save(saved[ended], tmp_path / "run")
    assert not check_resumed(tmp_path / "run")


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3, 4))])
def test_changed_runs_resume_or_are_refused_and_change_nothing(saved, tmp_path, part):
    """1,000 runs with another value, key, type, shape or order, half of them ended."""
    refused, path = 0, tmp_path / "run"
    for seed in range(200 * part, 200 * (part + 1)):
        content, *change = mutated(saved[seed % 2], random.Random(seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(content, path)
        try:
            refused += check_resumed(path)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {change}") from error
    assert 100 < refused < 200


def test_damaged_files_of_runs_resume_as_they_were_or_are_refused(saved, tmp_path):
    """200 files with other bytes."""
    path, refused = tmp_path / "run", 0
    torch.save(saved[1], path)
    data, expected = path.read_bytes(), resumed(path)
    for seed in range(200):
        path.write_bytes(damaged(data, random.Random(seed)))
        if check_resumed(path):
            refused += 1
        else:
            learn, tickets = resumed(path)
            assert same(weights_of(learn.model), weights_of(expected[0].model))
            assert str(tickets) == str(expected[1])
    assert 100 < refused < 200


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_failure_while_a_run_is_restored_puts_everything_back(saved, tmp_path, monkeypatch, error, call):
    """Each time that a state_dict is loaded into the model, loading fails half-way."""
    torch.save(saved[1], tmp_path / "run")
    learn = tiny_learner(1)
    weights, *others = state_of(learn)
    real, calls = nn.Module.load_state_dict, []

    def failing(self, state, *given, **options):
        found = real(self, state, *given, **options)
        calls.append(self)
        if len(calls) == call:
            random.random(), np.random.rand(), torch.rand(1)
            raise error
        return found

    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "load_state_dict", failing)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ValueError):
            run(learn, rounds=1, fit=1, path=tmp_path / "run", sparsity=0.5)
    assert len(calls) == call + 1  # the last one puts the model back
    now, *others_now = state_of(learn)
    assert same(now, weights)
    assert others_now == others
