"""Lottery tickets: what is pruned, what is rewound, what the controls are, and that a run can be taken up."""

from functools import partial
from statistics import mean

import pytest
import torch
from torch import nn

pytest.importorskip("fastai", reason="lottery_ticket trains a Learner")
fastai = pytest.importorskip("fastai.vision.all")

from fastai.callback.core import Callback  # noqa: E402

from conftest import small_learner  # noqa: E402  # isort: skip
from sparsifai import KeepSparsity, LotteryTickets, SparsifyCallback, lottery_ticket  # noqa: E402

pytestmark = pytest.mark.fastai


def rounded(number):
    return int(number + 0.5)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Look(Callback):
    "Notes weights, moments and learning rate before every batch that is trained on"

    order = 80
    __module__ = "fastai.look"  # known not to write

    def __init__(self):
        self.batches = []

    def before_batch(self):
        if self.learn.training:
            state = getattr(self.learn.opt, "opt", self.learn.opt).state
            moments = [
                {name: kept.clone() for name, kept in state[parameter].items() if torch.is_tensor(kept)}
                for parameter in self.learn.model.parameters()
            ]
            self.batches.append((weights_of(self.learn.model), moments, float(self.learn.opt.hypers[-1]["lr"])))


def run(learn, look=None, **options):
    options = {"sparsity": 0.8, "rounds": 3, "fit": 2, "granularity": "weight", **options}
    with learn.no_bar(), learn.no_logging(), learn.added_cbs([look] if look else []):
        return lottery_ticket(learn, **options)


# --- What is done -------------------------------------------------------------------------------------------------


def test_each_round_prunes_the_same_share_of_what_is_left(make_learner):
    tickets = run(make_learner(metrics=fastai.accuracy))
    total = sum(mask.numel() for mask in tickets[0].masks.values())
    assert [ticket.sparsity for ticket in tickets] == [
        rounded((1 - 0.2 ** (number / 3)) * total) / total for number in range(4)
    ]
    for sparser, denser in zip(tickets.tickets[1:], tickets.tickets, strict=False):
        assert all(not (mask & ~denser.masks[name]).any() for name, mask in sparser.masks.items())
    assert all(0 <= ticket.metrics["accuracy"] <= 1 and ticket.metrics["valid_loss"] > 0 for ticket in tickets)
    assert tickets.metric == "accuracy"


def test_what_falls_is_lowest_in_the_trained_net_and_what_stays_starts_as_it_did(make_learner):
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


@pytest.mark.parametrize("opt_func", [fastai.Adam, partial(fastai.OptimWrapper, opt=torch.optim.AdamW)])
@pytest.mark.parametrize(("rewind_to", "batch"), [(0, 0), (0.5, 2), (1, 4), (1.75, 7)])
def test_weights_buffers_optimizer_and_schedule_are_those_of_the_point_that_is_rewound_to(
    make_learner, rewind_to, batch, opt_func
):
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
            assert torch.allclose(kept, expected, atol=1e-12, rtol=0)  # squares are next to zero, not zero


def test_init_is_the_weight_at_the_point_that_is_rewound_to(make_learner):
    seen = []

    def look(weight, init):
        seen.append(init.clone())
        return (weight - init).abs()

    tickets = run(make_learner(lr=0.1), rounds=1, rewind_to=1, criteria=look)
    start = [tickets[0].start[name] for name in tickets[0].masks]
    assert all(map(torch.equal, seen[-len(start) :], start))


def test_a_learner_that_was_trained_before_begins_with_a_fresh_optimizer(make_learner):
    learn, look = make_learner(opt_func=fastai.Adam), Look()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    run(learn, look, rounds=1)
    for batch in (0, 8):
        kept = [value for moments in look.batches[batch][1] for value in moments.values()]
        assert all((value.abs() <= 1e-16).all() for value in kept)


def test_losses_are_of_batches_that_are_trained_on(make_learner):
    learn, losses = make_learner(lr=0.0), []

    def fit(learn):
        learn.fit(2, 0.0)
        losses.append([float(loss) for loss in learn.recorder.losses])

    run(learn, rounds=1, fit=fit, rewind_to=0.5)
    assert [len(each) for each in losses] == [8, 6]
    assert min(losses[1]) > 0.5  # nothing is averaged with losses of zero


def test_lr_find_within_the_fit_counts_for_nothing(make_learner, tmp_path):
    def fit(learn):
        learn.lr_find(num_it=12, show_plot=False)
        learn.fit(2)

    learn, look = make_learner(path=tmp_path), Look()
    tickets = run(learn, look, rounds=1, rewind_to=1, fit=fit)
    assert len(look.batches) == 12 + 8 + 12 + 4
    assert same(dict(tickets[1].start), look.batches[12 + 4][0])
    assert all(torch.equal(look.batches[32][0][name] != 0, mask) for name, mask in tickets[1].masks.items())


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
    assert learn._grab_cbs(KeepSparsity)[0].sparsifier.sparsity == pytest.approx(0.9, abs=0.01)


def test_filters_and_per_layer_targets_and_criteria_of_data(make_learner):
    tickets = run(make_learner(), rounds=2, granularity="filter", sparsity=0.5, controls=["shuffled"])
    assert tickets[-1].sparsity == pytest.approx(0.5, abs=0.1)
    tickets = run(make_learner(), rounds=2, sparsity={"0": 0.5, "3": 0.75}, context="local")
    assert {name: float((~mask).float().mean()) for name, mask in tickets[-1].masks.items()} == pytest.approx(
        {"0.weight": 0.5, "3.weight": 0.75, **{name: 0 for name in tickets[-1].masks if name[0] not in "03"}}, abs=0.01
    )
    assert run(make_learner(), rounds=1, criteria="snip")[-1].sparsity == pytest.approx(0.8, abs=0.01)


# --- Controls -----------------------------------------------------------------------------------------------------


def test_controls_have_the_sparsity_of_the_ticket_in_every_layer(make_learner):
    learn, look = make_learner(lr=0.05), Look()
    tickets = run(learn, look, rounds=1, controls=["reinitialized", "shuffled"], rewind_to=1)
    masks, initial, start = tickets[1].masks, look.batches[0][0], look.batches[4][0]
    reinitialized, shuffled, ticket = look.batches[8][0], look.batches[16][0], look.batches[20][0]
    assert len(look.batches) == 8 + 8 + 4 + 4  # the reinitialized one is trained from the beginning
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


def test_own_reinitialization(make_learner):
    look = Look()
    fill = lambda model: nn.init.constant_(model[0].weight, 3.0)  # noqa: E731
    tickets = run(make_learner(), look, rounds=1, controls="reinitialized", reinitialize=fill)
    assert set(look.batches[8][0]["0.weight"].unique().tolist()) == {0.0, 3.0}
    assert torch.equal(look.batches[8][0]["0.weight"] != 0, tickets[1].masks["0.weight"])


def test_controls_are_trained_every_so_many_rounds_up_to_the_last(make_learner):
    tickets = run(make_learner(), rounds=3, controls=["shuffled"], controls_every=2)
    assert [list(ticket.controls) for ticket in tickets] == [[], ["shuffled"], [], ["shuffled"]]


def test_controls_do_not_change_what_the_tickets_become():
    def masks(controls):
        fastai.set_seed(2)
        learn = small_learner(lr=0.05)
        learn.dls.train.shuffle = True
        return run(learn, controls=controls)[-1].masks

    assert same(dict(masks([])), dict(masks(["reinitialized", "shuffled"])))


# --- Taken up, saved and loaded -------------------------------------------------------------------------------


def learner_that_stops(after):
    """A Learner with dropout and shuffled data, and a fit that is interrupted in a round."""
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
def test_a_run_that_was_ended_goes_on_as_if_it_had_not_been(after, criteria, rewind_to, tmp_path):
    options = {"rewind_to": rewind_to, "controls": ["shuffled"], "controls_every": 3, "criteria": criteria}
    learn, fit = learner_that_stops(100)
    expected, ended = run(learn, fit=fit, **options), weights_of(learn.model)

    learn, fit = learner_that_stops(after)
    with pytest.raises(KeyboardInterrupt):
        run(learn, fit=fit, path=tmp_path / "run", **options)
    assert not learn._grab_cbs(KeepSparsity)
    assert len(LotteryTickets.load(tmp_path / "run")) == min(after, 3)
    learn, fit = learner_that_stops(100)
    torch.manual_seed(77)  # another process is somewhere else
    for parameter in learn.model.parameters():
        nn.init.uniform_(parameter)
    tickets = run(learn, fit=fit, path=tmp_path / "run", **options)
    assert len(tickets) == 4
    for one, two in zip(tickets, expected, strict=True):
        assert same(dict(one.masks), dict(two.masks))
        assert (one.metrics, one.controls) == (two.metrics, two.controls)
    assert same(weights_of(learn.model), ended)
    again = run(learner_that_stops(0)[0], fit=fit, path=tmp_path / "run", **options)  # nothing is left to train
    assert str(again) == str(expected)


def test_a_run_is_taken_up_with_the_same_arguments_and_model_only(make_learner, tmp_path):
    run(make_learner(), rounds=1, path=tmp_path / "run")
    with pytest.raises(ValueError, match="was written with rounds=1, not 2; give the same arguments"):
        run(make_learner(), rounds=2, path=tmp_path / "run")
    with pytest.raises(ValueError, match="was written with criteria=large_final, not movement"):
        run(make_learner(), rounds=1, criteria="movement", path=tmp_path / "run")
    other = make_learner(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)))
    before = weights_of(other.model)
    with pytest.raises(ValueError, match="the model is not that of the ticket"):
        run(other, rounds=1, path=tmp_path / "run")
    assert same(before, weights_of(other.model))
    tickets = run(make_learner(), rounds=1)
    tickets.save(tmp_path / "tickets")
    with pytest.raises(ValueError, match="has tickets, but no run to go on with"):
        run(make_learner(), rounds=1, path=tmp_path / "tickets")
    (tmp_path / "text").write_text("no")
    with pytest.raises(ValueError, match="is no file of lottery tickets"):
        run(make_learner(), rounds=1, path=tmp_path / "text")
    torch.save({"weight": torch.ones(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="it has not the tickets"):
        LotteryTickets.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        LotteryTickets.load(tmp_path / "nothing")


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
    with pytest.raises(ValueError, match="the model is not that of the ticket"):
        loaded[-1].apply(wrong)
    assert torch.equal(wrong.weight, before)


def test_a_run_with_frozen_layers_is_taken_up(make_learner, tmp_path):
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


def test_settings_are_the_same_if_they_mean_the_same(make_learner, tmp_path):
    from sparsifai import bounded, large_final

    run(make_learner(), rounds=1, exclude=nn.Linear, path=tmp_path / "run")
    run(make_learner(), rounds=1, exclude=[nn.Linear], criteria=large_final, layers=None, path=tmp_path / "run")
    with pytest.raises(ValueError, match="was written with fit=2, not 3"):
        run(make_learner(), rounds=1, exclude=nn.Linear, fit=3, path=tmp_path / "run")
    run(make_learner(), rounds=1, context=bounded("global", {"0": 0.5}), path=tmp_path / "made" / "bounded")
    with pytest.raises(ValueError, match="was written with context=bounded"):
        run(make_learner(), rounds=1, context=bounded("global", {"0": 0.4}), path=tmp_path / "made" / "bounded")


# --- Other callbacks and data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rewind_to", [0, 1, 1.5])
@pytest.mark.parametrize("kind", ["SaveModelCallback", "EarlyStoppingCallback", "ReduceLROnPlateau", "CSVLogger"])
def test_trackers_and_loggers_see_whole_epochs_of_training_only(make_learner, kind, rewind_to, tmp_path):
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


def test_autocast_is_left_where_batches_are_skipped(make_learner):
    class Autocast(Callback):
        order = 10  # of MixedPrecision, which does the same on a GPU

        def before_batch(self):
            self.context = torch.autocast("cpu", torch.bfloat16)
            self.context.__enter__()

        def after_loss(self):
            self.context.__exit__(None, None, None)

    run(make_learner(), Autocast(), rounds=1, rewind_to=0.5)
    assert not torch.is_autocast_enabled("cpu")


def test_data_loaders_of_torch():
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.randn(16, 2, 8, 8), torch.randint(3, (16,)))
    learn = small_learner()
    learn.dls = fastai.DataLoaders(DataLoader(data, batch_size=4), DataLoader(data, batch_size=8))
    assert run(learn, rounds=1, criteria="snip", rewind_to=1)[-1].sparsity == pytest.approx(0.8, abs=0.01)


# --- What is shown --------------------------------------------------------------------------------------------


def test_table_html_parts_and_plot(make_learner):
    import matplotlib.pyplot as plt

    tickets = run(make_learner(metrics=[fastai.accuracy, fastai.error_rate]), rounds=2, controls=["shuffled"])
    lines = str(tickets).splitlines()
    assert lines[0].split() == ["round", "sparsity", "accuracy", "shuffled"]
    assert lines[2].split()[:2] == ["0", "0.00%"]
    assert float(lines[-1].split()[-1]) == pytest.approx(tickets[-1].controls["shuffled"]["accuracy"], abs=1e-4)
    assert tickets._repr_html_().count("<tr>") == 4
    assert len(tickets[1:]) == 2
    assert LotteryTickets(tickets.tickets, "error_rate").values() == [each.metrics["error_rate"] for each in tickets]
    with pytest.raises(ValueError, match="there is no metric 'error'; did you mean 'error_rate'"):
        LotteryTickets(tickets.tickets, "error")
    ax = tickets.plot()
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"ticket", "shuffled", "dense"}
    ax = tickets.plot(tickets, ax=ax)
    with pytest.raises(ValueError, match="have as many rounds each"):
        tickets.plot(tickets[1:])
    plt.close("all")


# --- Errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 80}, ValueError, "is a percentage"),
        ({"rounds": 0}, ValueError, "rounds is a whole number from 1 on"),
        ({"fit": "five"}, ValueError, "fit is a whole number from 1 on"),
        ({"rewind_to": -1}, ValueError, "rewind_to is an epoch from 0 on"),
        ({"rewind_to": "1"}, ValueError, "rewind_to is an epoch from 0 on"),
        ({"controls": ["reinitialised"]}, ValueError, "unknown control 'reinitialised'; did you mean 'reinitialized'"),
        ({"controls_every": 0}, ValueError, "controls_every is a whole number"),
        ({"granularity": "filters"}, ValueError, "unknown granularity 'filters'"),
        ({"criteria": "large"}, ValueError, "unknown criterion 'large'"),
        ({"layer": "0"}, TypeError, "layer"),
        ({"rewind_to": float("inf")}, ValueError, "rewind_to is an epoch from 0 on"),
        (
            {"criteria": "snip", "sparsity": {"foo": 0.5}},
            ValueError,
            "no layer with a weight to sparsify matches 'foo'",
        ),
        ({"criteria": "snip", "calibration": 3}, TypeError, "calibration is a list or a data loader of batches"),
        ({"regrow": "grad"}, TypeError, "masks of tickets do not move"),
        ({"sparsity": 0.9, "context": "2:4"}, ValueError, "makes 0.5 of the weights zero at most"),
    ],
)
def test_bad_arguments_are_told_of_before_anything_is_trained(make_learner, options, error, message):
    learn = make_learner()
    before = weights_of(learn.model)
    with pytest.raises(error, match=message):
        run(learn, **options)
    assert same(before, weights_of(learn.model))
    assert not learn._grab_cbs(KeepSparsity)


def test_a_point_after_the_end_and_callbacks_that_sparsify_themselves(make_learner):
    with pytest.raises(ValueError, match="rewind_to=3 is after the end of the fit, which had 8 batches, 4 in an epoch"):
        run(make_learner(), rewind_to=3)
    for callback in (SparsifyCallback(0.5), KeepSparsity()):
        learn = make_learner(cbs=callback)
        with pytest.raises(ValueError, match=r"take the other off before with learn.remove_cb\("):
            run(learn)


def test_a_learner_that_cannot_measure_is_told_so(make_learner):
    learn = make_learner()
    learn.dls = fastai.DataLoaders(learn.dls.train)
    with pytest.raises(ValueError, match="the Learner needs data to validate with and a Recorder"):
        run(learn)
    learn = make_learner(default_cbs=False)
    with pytest.raises(ValueError, match="the Learner needs data to validate with and a Recorder"):
        lottery_ticket(learn, 0.5, 1)


def test_the_random_states_are_left_alone_by_looking_at_the_arguments(make_learner):
    learn = make_learner()
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        run(learn, fit=lambda learn: 1 / 0)
    assert torch.equal(state, torch.get_rng_state())


# --- What it is for -------------------------------------------------------------------------------------------


def digits_learner(seed):
    """The digits for a multilayer perceptron of 64-300-100-10, made quickly: a batch is a look-up."""
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
            digits_learner(seed), sparsity=0.98, rounds=8, fit=lambda learn: learn.fit(25, 1.2e-3), seed=seed,
            controls=["reinitialized", "shuffled"], controls_every=8,
        )
        for seed in range(2)
    ]  # fmt: skip
    ticket, reinitialized, shuffled = (
        mean(tickets.values(kind)[-1] for tickets in runs) for kind in ("ticket", "reinitialized", "shuffled")
    )
    assert runs[0][-1].sparsity == pytest.approx(0.98, abs=1e-4)
    assert ticket >= 0.93
    assert ticket > reinitialized + 0.03
    assert reinitialized > shuffled + 0.1
