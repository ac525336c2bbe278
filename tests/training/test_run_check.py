"""Wrong and hostile files of tickets: each is loaded as it is, or refused by name, and then nothing has changed."""

import random
import warnings
from copy import deepcopy
from dataclasses import replace

import hostile
import pytest
import torch
from mutations import damaged, mutated
from torch import nn

from sparsifai import LotteryTickets, Sparsifier, Ticket


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


def some_tickets(rounds=2):
    """The tickets of a dense net and two rounds."""
    model, tickets = small_model(), []
    sparsifier = Sparsifier(model, context="local")
    start = deepcopy(model.state_dict())
    for number in range(rounds + 1):
        sparsifier.sparsify(0.3 * number)
        metrics, controls = {"valid_loss": 1.0, "accuracy": 0.5}, {"shuffled": {"valid_loss": 2.0, "accuracy": 0.4}}
        masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
        tickets.append(Ticket(masks, sparsifier.sparsity, metrics, controls if number else {}, start))
    return LotteryTickets(tickets)


def bits_of(model):
    """The bytes of all values."""
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def use(path, model):
    """Load tickets and use all that is in them; the tickets, or the error."""
    try:
        tickets = LotteryTickets.load(path)
        for ticket in tickets:
            ticket.apply(model)
        assert str(tickets)
    except ValueError as error:
        return error
    return tickets


def check_used(path, content):
    """Use a file of tickets: an error names the file or the entry, and changes nothing. Whether it was refused."""
    model, before = small_model(1), torch.random.get_rng_state()
    old = bits_of(model)
    found = use(path, model)
    if isinstance(found, LotteryTickets):
        expected = dict(content["start"])
        for name, mask in content["tickets"][-1]["masks"].items() if content["tickets"] else ():
            assert mask.dtype == torch.bool
            expected[name] = expected[name].masked_fill(~mask, 0)
        if content["tickets"]:
            assert bits_of(model) == {name: value.numpy().tobytes() for name, value in expected.items()}
    else:
        assert str(path) in str(found) or str(found).startswith("Ticket.apply: ")
        # With several tickets, those before the wrong one have been applied: each is applied alone.
        if str(found).startswith("Ticket.apply: "):
            check_each_alone(path)
        else:
            assert bits_of(model) == old
    assert torch.equal(torch.random.get_rng_state(), before)
    return not isinstance(found, LotteryTickets)


def check_each_alone(path):
    for ticket in LotteryTickets.load(path):
        model = small_model(1)
        old = bits_of(model)
        try:
            ticket.apply(model)
        except ValueError:
            assert bits_of(model) == old


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))])
def test_changed_tickets_are_used_as_they_are_or_refused(tmp_path, part):
    """2,000 tickets with another value, key, type, shape or order."""
    state, path, refused = some_tickets().state(), tmp_path / "tickets", 0
    for seed in range(500 * part, 500 * (part + 1)):
        content, *_ = mutated(state, random.Random(seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(content, path)
        refused += check_used(path, content)
    assert 200 < refused < 400


def test_damaged_files_of_tickets_are_refused_or_as_they_were(tmp_path):
    """1,000 files with other bytes. The records have checksums, so what is loaded is what was saved."""
    tickets, path, refused = some_tickets(), tmp_path / "tickets", 0
    tickets.save(path)
    data = path.read_bytes()
    for seed in range(1000):
        path.write_bytes(damaged(data, random.Random(seed)))
        refused += check_used(path, tickets.state())
    assert 700 < refused < 1000


@pytest.mark.parametrize("name", [*hostile.CHECKPOINTS, *hostile.DEEP])
def test_hostile_files_are_no_tickets(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tickets"
    path.write_bytes({**hostile.CHECKPOINTS, **hostile.DEEP}[name]())
    with pytest.raises(ValueError, match=f"{path} is not a file of lottery tickets"):
        LotteryTickets.load(path)
    assert [each.name for each in tmp_path.iterdir()] == ["tickets"]


# --- What is refused, by name -------------------------------------------------------------------------------------


def with_mask(change):
    return lambda ticket: replace(ticket, masks={**ticket.masks, "0.weight": change(ticket.masks["0.weight"])})


def with_start(name, change):
    return lambda ticket: replace(ticket, start={**ticket.start, name: change(ticket.start[name])})


def nan_at(place):
    def change(value):
        value = value.clone()
        value.view(-1)[place] = torch.nan
        return value

    return change


WRONG_TICKETS = {
    "a uint8 mask of 3": (with_mask(lambda mask: mask.to(torch.uint8) * 3), "masks['0.weight'] is a tensor of uint8"),
    "a uint8 mask of 1": (with_mask(lambda mask: mask.to(torch.uint8)), "convert it with .bool() if it holds 0 and 1"),
    "a float mask": (with_mask(torch.Tensor.float), "masks['0.weight'] is a tensor of float32, and a mask is bool"),
    "a list for a mask": (with_mask(torch.Tensor.tolist), "masks['0.weight'] is of type list, and should be a bool"),
    "a mask of another shape": (with_mask(lambda mask: mask[:2]), "masks['0.weight'] has the shape (2, 4), and its"),
    "a mask of more axes": (with_mask(lambda mask: mask[None]), "masks['0.weight'] has the shape (1, 3, 4), and its"),
    "a mask of no parameter": (
        lambda ticket: replace(ticket, masks={"1.running_mean": torch.ones(3, dtype=torch.bool)}),
        "masks['1.running_mean'] belongs to no parameter of Sequential",
    ),
    "a mask of a method": (
        lambda ticket: replace(ticket, masks={"__class__": torch.ones(3, dtype=torch.bool)}),
        "masks['__class__'] belongs to no parameter",
    ),
    "masks that are a list": (lambda ticket: replace(ticket, masks=[1]), "masks is of type list, and should be a dict"),
    "NaN": (with_start("3.weight", nan_at(2)), "start['3.weight'] has values that are inf or NaN"),
    "another dtype": (
        with_start("3.weight", torch.Tensor.double),
        "start['3.weight'] is float64, and float32 in the model; convert the model first, with model.to(torch.float64)",
    ),
    "another shape": (
        with_start("3.bias", lambda value: value[:1]),
        "another model, with other names or shapes in its state_dict; pass a model that is built like the one that the "
        "ticket was found with: '3.bias' has the shape (1,) in start and (2,) in the model",
    ),
    "another name": (
        lambda ticket: replace(ticket, start={**ticket.start, "4.bias": torch.ones(2)}),
        "'4.bias' has the shape (2,) in start and absent in the model",
    ),
    "a number for a tensor": (with_start("3.bias", lambda value: 3), "'3.bias' has the shape none in start"),
    "a sparse tensor": (with_start("3.weight", torch.Tensor.to_sparse), "start['3.weight'] is a Tensor of float32 in"),
    "no start": (lambda ticket: replace(ticket, start=None), "start is of type NoneType, and should be a dictionary"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TICKETS)
def test_a_wrong_ticket_is_refused_by_name_and_changes_nothing(name):
    change, message = WRONG_TICKETS[name]
    model = small_model(1)
    before = bits_of(model)
    with pytest.raises(ValueError, match="^Ticket.apply: ") as raised:
        change(some_tickets()[-1]).apply(model)
    assert message in str(raised.value)
    assert bits_of(model) == before


def test_buffers_may_be_infinite():
    """Attention masks are buffers with -inf."""
    model = small_model(1)
    ticket = with_start("1.running_mean", lambda value: torch.full_like(value, -torch.inf))(some_tickets()[-1])
    assert ticket.apply(model)[1].running_mean.eq(-torch.inf).all()


def test_a_model_that_cannot_be_loaded_into_is_unchanged():
    class Locked(nn.BatchNorm1d):
        def _load_from_state_dict(self, *given):
            raise RuntimeError("locked")

    model = small_model(1)
    model[1] = Locked(3)
    before = bits_of(model)
    with pytest.raises(RuntimeError, match="locked"):
        some_tickets()[-1].apply(model)
    assert bits_of(model) == before
