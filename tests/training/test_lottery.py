"""lottery_ticket: its arguments, what it leaves on the Learner, and what it is for."""

from functools import partial
from statistics import mean

import pytest
import torch
from torch import nn

pytest.importorskip("fastai", reason="lottery_ticket trains a Learner")
fastai = pytest.importorskip("fastai.vision.all")


from lottery_runs import run, weights_of  # noqa: E402  # isort: skip
from sparsifai import KeepSparsity, SparsifyCallback  # noqa: E402

pytestmark = pytest.mark.fastai


def test_the_learner_ends_with_the_last_ticket_and_keeps_its_zeros(make_learner):
    learn = make_learner(lr=0.05)
    tickets = run(learn)
    state = weights_of(learn.model)
    assert all((state[name][~mask.expand_as(state[name])] == 0).all() for name, mask in tickets[-1].masks.items())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    state = weights_of(learn.model)
    assert all((state[name][~mask.expand_as(state[name])] == 0).all() for name, mask in tickets[-1].masks.items())
    assert [type(callback) for callback in learn.cbs if isinstance(callback, KeepSparsity)] == [KeepSparsity]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=SparsifyCallback(0.9))
    assert learn.keep_sparsity.report().selected.sparsity == pytest.approx(0.9, abs=0.01)


def test_checking_the_arguments_does_not_change_the_random_state(make_learner):
    learn = make_learner()
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        run(learn, fit=lambda learn: 1 / 0)
    assert torch.equal(state, torch.get_rng_state())


def digits_learner(seed):
    """A multilayer perceptron of 64-300-100-10 on the digits, with a quick loader: a batch is one look-up."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))

    def loader(chosen, **options):
        return fastai.DataLoader(
            range(len(chosen)), create_batch=lambda batch: (images[chosen[batch]], labels[chosen[batch]]), **options
        )

    fastai.set_seed(seed, reproducible=True)
    dls = fastai.DataLoaders(
        loader(order[360:], bs=64, shuffle=True, drop_last=True), loader(order[:360], bs=360), device="cpu"
    )
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    adam = partial(fastai.OptimWrapper, opt=partial(torch.optim.Adam, fused=True))
    return fastai.Learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=adam, metrics=fastai.accuracy)


@pytest.mark.slow
def test_on_the_digits_tickets_win_at_two_percent_of_the_weights():
    pytest.importorskip("sklearn", reason="trains on scikit-learn's digits")
    runs = [
        run(
            digits_learner(seed), sparsity=0.98, rounds=6, fit=lambda learn: learn.fit(10, 3e-3), seed=seed,
            controls=["reinitialized", "shuffled"], controls_every=6,
        )
        for seed in range(2)
    ]  # fmt: skip
    ticket, reinitialized, shuffled = (
        mean(tickets.values(kind)[-1] for tickets in runs) for kind in ("ticket", "reinitialized", "shuffled")
    )
    assert runs[0][-1].sparsity == pytest.approx(0.98, abs=1e-4)
    # Of three seeds 0.931 to 0.944, 0.739 to 0.836, and 0.417 to 0.486.
    assert ticket >= 0.92
    assert ticket > reinitialized + 0.03
    assert reinitialized > shuffled + 0.1
