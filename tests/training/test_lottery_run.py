"""The rounds of lottery tickets: what is pruned, and what the controls are."""

import pytest
import torch
from torch import nn

pytest.importorskip("fastai", reason="lottery_ticket trains a Learner")
fastai = pytest.importorskip("fastai.vision.all")


from conftest import small_learner  # noqa: E402  # isort: skip
from lottery_runs import Look, run, same, weights_of  # noqa: E402  # isort: skip

pytestmark = pytest.mark.fastai


def rounded(number):
    return int(number + 0.5)


# --- Rounds -------------------------------------------------------------------------------------------------------


def test_each_round_prunes_the_same_share_of_the_remaining_weights(make_learner):
    tickets = run(make_learner(metrics=fastai.accuracy))
    total = sum(mask.numel() for mask in tickets[0].masks.values())
    assert [ticket.sparsity for ticket in tickets] == [
        rounded((1 - 0.2 ** (number / 3)) * total) / total for number in range(4)
    ]
    for sparser, denser in zip(tickets.tickets[1:], tickets.tickets, strict=False):
        assert all(not (mask & ~denser.masks[name]).any() for name, mask in sparser.masks.items())
    assert all(0 <= ticket.metrics["accuracy"] <= 1 and ticket.metrics["valid_loss"] > 0 for ticket in tickets)
    assert tickets.metric == "accuracy"


def test_the_lowest_trained_weights_are_pruned_and_the_others_are_rewound(make_learner):
    learn, look = make_learner(opt_func=fastai.Adam), Look()
    trained = []
    tickets = run(
        learn, look, rounds=2, fit=lambda learn: (learn.fit(2, 0.05), trained.append(weights_of(learn.model)))
    )
    first = look.batches[0][0]
    assert same(dict(tickets[0].start), first)
    for number in (1, 2):
        start = look.batches[8 * number][0]
        for name, value in start.items():
            mask = tickets[number].masks.get(name)
            assert torch.equal(value, first[name] if mask is None else first[name] * mask)
        masks = tickets[number].masks
        magnitudes = torch.cat([trained[number - 1][name].abs().flatten() for name in masks])
        kept = torch.cat([mask.expand_as(first[name]).flatten() for name, mask in masks.items()])
        assert magnitudes[~kept].max() <= magnitudes[kept].min()


def test_init_is_the_weight_at_the_rewinding_point(make_learner):
    seen = []

    def look(weight, init):
        seen.append(init.clone())
        return (weight - init).abs()

    tickets = run(make_learner(lr=0.1), rounds=1, rewind_to=1, criteria=look)
    start = [tickets[0].start[name] for name in tickets[0].masks]
    assert all(map(torch.equal, seen[-len(start) :], start))


def test_filters_sparsities_by_layer_and_criteria_of_data(make_learner):
    tickets = run(make_learner(), rounds=2, granularity="filter", sparsity=0.5, controls=["shuffled"])
    assert tickets[-1].sparsity == pytest.approx(0.5, abs=0.1)
    tickets = run(make_learner(), rounds=2, sparsity={"0": 0.5, "3": 0.75}, context="local")
    assert {name: float((~mask).float().mean()) for name, mask in tickets[-1].masks.items()} == pytest.approx(
        {"0.weight": 0.5, "3.weight": 0.75, **{name: 0 for name in tickets[-1].masks if name[0] not in "03"}}, abs=0.01
    )
    assert run(make_learner(), rounds=1, criteria="snip")[-1].sparsity == pytest.approx(0.8, abs=0.01)


def test_data_loaders_of_torch():
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.randn(16, 2, 8, 8), torch.randint(3, (16,)))
    learn = small_learner()
    learn.dls = fastai.DataLoaders(DataLoader(data, batch_size=4), DataLoader(data, batch_size=8))
    assert run(learn, rounds=1, criteria="snip", rewind_to=1)[-1].sparsity == pytest.approx(0.8, abs=0.01)


# --- Controls -----------------------------------------------------------------------------------------------------


def test_controls_have_as_many_weights_in_every_layer_as_the_ticket(make_learner):
    learn, look = make_learner(lr=0.05), Look()
    tickets = run(learn, look, rounds=1, controls=["reinitialized", "shuffled"], rewind_to=1)
    masks, initial, start = tickets[1].masks, look.batches[0][0], look.batches[4][0]
    reinitialized, shuffled, ticket = look.batches[8][0], look.batches[16][0], look.batches[20][0]
    assert len(look.batches) == 8 + 8 + 4 + 4  # the reinitialized net is trained from the beginning
    for name, mask in masks.items():
        assert torch.equal(reinitialized[name] != 0, mask)
        assert not torch.equal(reinitialized[name], initial[name] * mask)
        of_initial = set(initial[name].flatten().tolist())
        assert set(reinitialized[name][mask].tolist()) <= of_initial
        moved = shuffled[name] != 0
        assert int(moved.sum()) == int(mask.sum())
        assert mask.numel() < 40 or not torch.equal(moved, mask)
        assert torch.equal(shuffled[name], start[name] * moved)
        assert torch.equal(ticket[name], start[name] * mask)
    assert set(tickets[1].controls) == {"reinitialized", "shuffled"}
    assert torch.equal(reinitialized["1.running_mean"], initial["1.running_mean"])


def test_a_user_s_reinitialization(make_learner):
    look = Look()
    fill = lambda model: nn.init.constant_(model[0].weight, 3.0)  # noqa: E731
    tickets = run(make_learner(), look, rounds=1, controls="reinitialized", reinitialize=fill)
    assert set(look.batches[8][0]["0.weight"].unique().tolist()) == {0.0, 3.0}
    assert torch.equal(look.batches[8][0]["0.weight"] != 0, tickets[1].masks["0.weight"])


def test_controls_every_counts_back_from_the_last_round(make_learner):
    tickets = run(make_learner(), rounds=3, controls=["shuffled"], controls_every=2)
    assert [list(ticket.controls) for ticket in tickets] == [[], ["shuffled"], [], ["shuffled"]]


def test_controls_do_not_change_the_tickets():
    def masks(controls):
        fastai.set_seed(2)
        learn = small_learner(lr=0.05)
        learn.dls.train.shuffle = True
        return run(learn, controls=controls)[-1].masks

    assert same(dict(masks([])), dict(masks(["reinitialized", "shuffled"])))
