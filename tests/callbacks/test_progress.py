"""Progress bars of the long work of a Learner, which `learn.no_bar()` switches off."""

import pytest
from conftest import small_learner

pytest.importorskip("fastai", reason="bars of a Learner")

from fastai.callback.core import Callback  # noqa: E402

from sparsifai import SparsifyCallback, highest_sparsity, lottery_ticket, sensitivity  # noqa: E402

pytestmark = pytest.mark.fastai


def fit(learn):
    with learn.no_logging():
        learn.fit(1, cbs=SparsifyCallback(0.5, "filter", coupled=True))


WORK = {
    "finding filters that go together": fit,
    "joining filters that go together": lambda learn: learn.shrink(),
    "sensitivity: ": lambda learn: sensitivity(learn, levels=[0.5]),
    "highest sparsity ": lambda learn: highest_sparsity(learn, 0.1, precision=0.2),
    "lottery tickets ": lambda learn: lottery_ticket(learn, 0.5, rounds=1, fit=lambda learn: learn.fit(1)),
}


@pytest.mark.filterwarnings("ignore:shrink. nothing is removed")
@pytest.mark.parametrize("what", WORK)
def test_long_work_of_a_learner_shows_itself_as_its_fits_do(what, open_terminal):
    if "together" in what:
        pytest.importorskip("torch_pruning", reason="needs pip install 'sparsifai[shrink]'")
    terminal, learn = open_terminal(), small_learner()
    with learn.no_bar():
        WORK[what](learn)
    assert what not in terminal.read()
    assert "|" not in terminal.text
    WORK[what](small_learner())
    assert what in terminal.read()
    assert terminal.lines()[-1] == ""


def test_updates_of_a_fit_leave_the_line_to_the_bar_of_the_fit(open_terminal):
    terminal, learn, before = open_terminal(), small_learner(), []
    note = Callback(after_pred=lambda _: before.append(terminal.read()))
    with learn.no_logging():
        learn.fit(1, cbs=[SparsifyCallback(0.5, "weight", "local", "sparsegpt", every=1), note])
    assert "layer by layer" in before[0]  # what is tried once, before the first batch
    after = terminal.read().removeprefix(before[0])
    assert "[4/4 " in after
    assert "layer by layer" not in after
