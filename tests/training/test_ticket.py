"""Tickets: saved, loaded, applied to a model, shown."""

import pytest
import torch
from torch import nn

pytest.importorskip("fastai", reason="lottery_ticket trains a Learner")
fastai = pytest.importorskip("fastai.vision.all")


from lottery_runs import run, same  # noqa: E402  # isort: skip
from sparsifai import LotteryTickets  # noqa: E402

pytestmark = pytest.mark.fastai


def test_tickets_are_saved_loaded_and_applied_to_another_model(make_learner, tmp_path):
    learn = make_learner(metrics=fastai.accuracy)
    tickets = run(learn, controls=["shuffled"], rewind_to=1)
    tickets.save(tmp_path / "tickets")
    assert [path.name for path in tmp_path.iterdir()] == ["tickets"]
    loaded = LotteryTickets.load(tmp_path / "tickets")
    assert str(loaded) == str(tickets)
    for one, two in zip(loaded, tickets, strict=True):
        assert same(dict(one.masks), dict(two.masks))
        assert same(dict(one.start), dict(two.start))
        assert (one.sparsity, one.metrics, one.controls) == (two.sparsity, two.metrics, two.controls)
    other = make_learner()
    model = loaded[-1].apply(other.model)
    assert model is other.model
    for name, value in model.state_dict().items():
        mask = tickets[-1].masks.get(name)
        assert torch.equal(value, tickets[0].start[name] * (1 if mask is None else mask))
    wrong = nn.Linear(3, 3)
    before = wrong.weight.clone()
    with pytest.raises(ValueError, match="another model"):
        loaded[-1].apply(wrong)
    assert torch.equal(wrong.weight, before)


def test_table_html_slices_and_plot(make_learner):
    import matplotlib.pyplot as plt

    tickets = run(make_learner(metrics=[fastai.accuracy, fastai.error_rate]), rounds=2, controls=["shuffled"])
    lines = str(tickets).splitlines()
    assert lines[0].split() == ["round", "sparsity", "accuracy", "shuffled"]
    assert lines[2].split()[:2] == ["0", "0.00%"]
    assert float(lines[-1].split()[-1]) == pytest.approx(tickets[-1].controls["shuffled"]["accuracy"], abs=1e-4)
    assert tickets._repr_html_().count("<tr>") == 4
    assert len(tickets[1:]) == 2
    assert LotteryTickets(tickets.tickets, "error_rate").values() == [each.metrics["error_rate"] for each in tickets]
    ax = tickets.plot()
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"ticket", "shuffled", "dense"}
    ax = tickets.plot(tickets, ax=ax)
    plt.close("all")
