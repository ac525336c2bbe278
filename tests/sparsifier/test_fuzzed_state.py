"""Thousands of damaged states: each is loaded and says what was loaded, or is a ValueError and nothing has changed."""

import copy
import random
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from faults import state_of
from torch import nn
from updates import moved, same_state, show_gradients

from sparsifai import Sparsifier

pytestmark = pytest.mark.filterwarnings(
    "ignore:straight_through. no gradient reaches whole outputs",
    "ignore:straight_through. mask_gradients was not called",
)


def net(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 2))


def made(model=None, regrow=None, first=0.4, **options):
    """A Sparsifier with masks, means and random numbers drawn."""
    sparsifier = Sparsifier(net() if model is None else model, regrow=regrow, **options)
    if sparsifier.collected.looks_at_data:
        inputs, labels = torch.randn(6, 4), torch.randint(2, (6,))
        sparsifier.calibrate([(inputs, labels)], F.cross_entropy)
    moved(sparsifier.model)
    if regrow == "grad":
        show_gradients(sparsifier)
    if first:
        sparsifier.sparsify(first, drop=0.3 if regrow else 0)
        with sparsifier.dense_weights():
            moved(sparsifier.model)
        if regrow == "grad":
            show_gradients(sparsifier, seed=1)
    sparsifier.apply_masks()
    return sparsifier


KINDS = {
    "weights": {},
    "filters": {"granularity": "filter", "context": "local"},
    "blocks": {"granularity": "4x1", "criteria": "random"},
    "means": {"criteria": "snip"},
    "regrowth": {"criteria": "updating_movement", "regrow": "grad"},
    "dense weights": {"straight_through": True},
    "dense weights of which some are trained": {
        "straight_through": True,
        "gradient_sparsity": 0.2,
        "granularity": "filter",
        "context": "local",
    },
}

JUNK = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.1, 1.5, float("nan"), float("inf"), 10**400, 2**63, 1j, "", "high", "init",
    b"\0", [], [1], (), {}, {"0.weight": 0.5}, {1: 2}, set(), object(), int, len, torch.tensor(0.5), torch.tensor(True),
    torch.zeros(0), torch.ones(3), torch.ones(8, 4, dtype=torch.bool), torch.ones(8, 4), torch.zeros(2, 2).to_sparse(),
    torch.zeros(8, 4, device="meta"), nn.Linear(4, 8),
]  # fmt: skip


def places_in(table, path=()):
    """Every place in nested dictionaries, as keys from the outside in."""
    for key, value in table.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places_in(value, (*path, key))


def damaged(state, chance, other):
    """The state with one to three things wrong. other: the state of another model, for parts that are exchanged."""
    state = copy.deepcopy(state)
    for _ in range(chance.choice([1, 1, 2, 3])):
        places = list(places_in(state))
        if not places:
            return chance.choice(JUNK)
        *path, key = chance.choice(places)
        inner = state
        for each in path:
            inner = inner[each]
        value = inner[key]
        with suppress(IndexError, RuntimeError, TypeError):  # what was damaged already cannot always be changed again
            DAMAGES[chance.choice([*DAMAGES])](inner, key, value, chance, (other, places))
    return state


def delete(inner, key, value, chance, others):
    del inner[key]


def rename(inner, key, value, chance, others):
    del inner[key]
    inner[chance.choice([f"{key}x", "module.0.weight", "2.weight", "", 3, None, ("a",), "grad"])] = value


def add(inner, key, value, chance, others):
    inner[chance.choice(["new", 7, "4.weight", "regrowth", "used"])] = value


def replace(inner, key, value, chance, others):
    inner[key] = copy.deepcopy(chance.choice(JUNK))


def nest(inner, key, value, chance, others):
    inner[key] = chance.choice([{key: value}, [value], (value, value), {"0.weight": {"0.weight": value}}])


def exchange(inner, key, value, chance, others):
    other, places = others
    *path, last = chance.choice(places)
    for each in path:
        other = other.get(each, {}) if isinstance(other, dict) else {}
    inner[key] = copy.deepcopy(other.get(last, other) if isinstance(other, dict) else other)


def change(inner, key, value, chance, others):
    """Change a tensor, or another value a little."""
    if isinstance(value, torch.Tensor):
        inner[key] = chance.choice(OF_TENSORS)(value, chance)
    elif isinstance(value, (int, float)) and abs(value) < 2**64:
        inner[key] = chance.choice([-value - 1, value * 1e9, float(value) / 3, str(value), value * float("nan")])
    elif isinstance(value, dict):
        inner[key] = chance.choice([list(value.items()), list(value), {**value, 1: 2}, dict(reversed(value.items()))])


def with_one(value, number):
    value = value.clone()
    if value.numel():
        value.view(-1)[value.numel() // 2] = number
    return value


OF_TENSORS = [
    lambda value, chance: value.to(chance.choice([torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool])),
    lambda value, chance: value.to(torch.complex64),
    lambda value, chance: value.unsqueeze(0),
    lambda value, chance: value.flatten(),
    lambda value, chance: value.t() if value.dim() == 2 else value[:-1],
    lambda value, chance: value[:-1],
    lambda value, chance: value[:0],
    lambda value, chance: torch.zeros((), dtype=value.dtype).expand(value.shape),
    lambda value, chance: with_one(value, float("nan") if value.is_floating_point() else 1),
    lambda value, chance: with_one(value, float("inf") if value.is_floating_point() else 0),
    lambda value, chance: ~value if value.dtype == torch.bool else -value if value.is_signed() else 255 - value,
    lambda value, chance: value.tolist(),
    lambda value, chance: value.numpy(),
    lambda value, chance: value.to("meta"),
    lambda value, chance: value.to_sparse(),
    lambda value, chance: nn.Parameter(value.float()),
    lambda value, chance: value[list(reversed(range(len(value))))],
]  # fmt: skip
DAMAGES = {each.__name__: each for each in (delete, rename, add, replace, nest, exchange, change)}


def refusal(sparsifier, state):
    """The message of the ValueError that a state gives; empty if it is loaded."""
    try:
        sparsifier.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return ""


def check_loaded(sparsifier, state, before):
    """Check what was loaded against a plain reading of the state."""
    masks = sparsifier.masks
    assert list(masks) == list(before["masks"])
    assert state["masks"].keys() == state["levels"].keys() == masks.keys()
    parameters = dict(sparsifier.model.named_parameters())
    for name, mask in state["masks"].items():
        assert mask.dtype == torch.bool
        assert mask.shape == masks[name].shape
        assert torch.equal(masks[name], mask)
        level = state["levels"][name]
        assert type(level) in (int, float)
        assert 0 <= level <= 1
        assert sparsifier.layers[name].level == level
        assert torch.equal(parameters[name], torch.where(mask, before["weights"][name], 0))
        if sparsifier.ranking.options.granularity.__name__ == "block":
            assert torch.equal(mask.view(-1, 4, mask.shape[1]).all(1), mask.view(-1, 4, mask.shape[1]).any(1))
    for part, collected in (("statistics", sparsifier.collected), ("regrowth", sparsifier._regrowth)):
        assert (part in state) == (collected is not None)
        if collected is not None:
            now, saved = collected.state(), state[part]
            assert now.keys() == saved.keys()
            assert now["counts"] == saved["counts"]
            assert all(type(count) is int and count >= 0 for each in now["counts"].values() for count in each.values())
            assert now["begins"] == sorted(saved["begins"])
            for key in now.keys() - {"counts", "begins"}:
                assert same_state(now[key], saved[key])
            assert not any(value.isnan().any() for each in now["stored"].values() for value in each.values())
    assert torch.equal(sparsifier.collected.source.rng.get_state(), state["rng"])
    assert ("straight_through" in state) == sparsifier.ranking.options.straight_through
    if "straight_through" in state:
        check_dense_weights(sparsifier, state, before)


def check_dense_weights(sparsifier, state, before):
    """Check the dense weights that were loaded: those of the model where weights are kept, else those of the state."""
    saved, now = state["straight_through"], sparsifier.state_dict()["straight_through"]
    assert saved.keys() == now.keys() == {"values", "trained", "settled"}
    assert now["settled"] is saved["settled"]
    assert sparsifier.is_straight_through == (not saved["settled"])
    assert same_state(now["trained"], saved["trained"])
    assert now["values"].keys() == saved["values"].keys()
    assert not (saved["settled"] and saved["values"])
    for name, value in now["values"].items():
        mask, loaded = sparsifier.all_masks[name], saved["values"][name].to(value.dtype)
        assert torch.equal(value, torch.where(mask, before["weights"][name], loaded))
        assert not value.isnan().any()
        assert not value.requires_grad
    pruned = {name for name, mask in sparsifier.all_masks.items() if not mask.all()}
    assert not now["values"] or pruned <= now["values"].keys()
    before_step = {name: each.detach().clone() for name, each in sparsifier.model.named_parameters()}
    with sparsifier.dense_weights():
        pass
    assert all(torch.equal(each, before_step[name]) for name, each in sparsifier.model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:(?s)Sparse CSR", "ignore:(?s).*non-writable", "ignore:(?s)Casting complex")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_state_is_loaded_as_it_is_or_refused_and_nothing_changes(kind, seed, record_property):
    chance = random.Random(f"{kind} {seed}")
    options = KINDS[kind]
    saved, sparsifier = made(**options), made(**options, first=0)
    state, others = saved.state_dict(), [made(net(12), **options).state_dict(), made(criteria="movement").state_dict()]
    start, before = sparsifier.state_dict(), state_of(sparsifier)
    weights = {name: value.clone() for name, value in sparsifier.model.state_dict().items()}
    counts = {"loaded": 0, "refused": 0}
    for _ in range(1200):
        given = damaged(state, chance, chance.choice(others))
        message = refusal(sparsifier, given)
        counts["refused" if message else "loaded"] += 1
        if message:
            assert message.startswith("load_state_dict: ")
            assert ";" in message  # what to do
            assert same_state(state_of(sparsifier), before)
            assert all(torch.equal(value, weights[name]) for name, value in sparsifier.model.state_dict().items())
        else:
            check_loaded(sparsifier, given, {"weights": weights, "masks": start["masks"]})
            sparsifier.model.load_state_dict(weights)
            sparsifier.load_state_dict(start)
            sparsifier.model.load_state_dict(weights)
    record_property("counts", counts)
    assert min(counts.values()) > 10, counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_loaded_does_not_change_with_the_saved_one(kind):
    saved, sparsifier = made(**KINDS[kind]), made(**KINDS[kind], first=0)
    state = saved.state_dict()
    masks = {name: mask.clone() for name, mask in state["masks"].items()}
    sparsifier.load_state_dict(state)
    sparsifier.model.load_state_dict(saved.model.state_dict())
    dense = copy.deepcopy(state.get("straight_through"))
    for mask in state["masks"].values():
        mask.fill_(True)
    for part in ("values", "trained") if dense else ():
        assert state["straight_through"][part] or part == "trained"
        for value in state["straight_through"][part].values():
            value.fill_(1)
    assert same_state(sparsifier.masks, masks)
    assert same_state(sparsifier.state_dict().get("straight_through"), dense)


@pytest.mark.filterwarnings("ignore:.*are frozen")
def test_frozen_layers_join_only_if_the_state_is_loaded():
    model = net()
    model[0].requires_grad_(False)
    sparsifier = Sparsifier(model)
    alone = sparsifier.state_dict()
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="mask of 0.weight is absent"):
        sparsifier.load_state_dict(alone)
    assert list(sparsifier.masks) == ["2.weight", "4.weight"]
    sparsifier.load_state_dict(made().state_dict())
    assert list(sparsifier.masks) == ["0.weight", "2.weight", "4.weight"]
