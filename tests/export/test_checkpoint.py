"""Checkpoints: what is counted, what is left out and why, and that the numbers of the rest are right."""

import warnings

import pytest
import torch
from torch import nn

from sparsifai.export.checkpoint import DEPTH, Checkpoint

WEIGHT = torch.tensor([[0.0, -0.0, 1.0], [2.0, 0.0, -3.0]])


def figures_of(state):
    """The last total of the first table: what is counted, its weights and zeros."""
    total = Checkpoint.of(state).tables()[0].totals()[-1]
    return total["weight"], total["weights"], total["zeros"]


DTYPES = [
    getattr(torch, name)
    for name in (
        "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
        "complex64", "bool", "uint8", "int8", "int64", "uint16", "uint32", "uint64",
    )
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_every_type_are_counted(dtype):
    unsigned = str(dtype).startswith("torch.uint")
    assert figures_of({"weight": (WEIGHT.abs() if unsigned else WEIGHT).to(dtype)}) == ("whole file", 6, 3)


def training():
    """A model after a step, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model.weight.copy_(WEIGHT)
        model.bias.fill_(1)
    return model.state_dict(), optimizer.state_dict()


# Two moments for each of eight parameters, and a number of steps for both tensors.
MOMENTS = 2 * 8 + 2


def test_a_training_checkpoint_is_looked_through():
    weights, moments = training()
    found = Checkpoint.of({"epoch": 3, "net": weights, "optimizer": moments, "best": torch.tensor(0.5), "note": None})
    assert list(found.counted) == ["net.weight", "net.bias", "best"]
    assert {name: (each.values, each.why) for name, each in found.left_out.items()} == {
        "optimizer": (MOMENTS, "the state of an optimizer")
    }
    assert found.others == ["epoch"]
    counted, left_out = found.tables()
    assert counted.totals()[-1] == {
        "weight": "all that are counted", "shape": None, "weights": 9, "zeros": 3, "sparsity": 3 / 9, "note": None,
    }  # fmt: skip
    assert left_out.records() == [
        {"tensor": "optimizer", "shape": (), "weights": MOMENTS, "why": "the state of an optimizer"},
        {"tensor": "epoch", "shape": None, "weights": None, "why": "no tensor"},
    ]
    assert left_out.totals() == [{"tensor": "all of these", "shape": None, "weights": MOMENTS, "why": None}]


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_what_stands_beside_a_model_is_left_out(key):
    weights, moments = training()
    average = {"weight": torch.zeros(4, 4), "steps": 3}
    found = Checkpoint.of({key: weights, "opt": moments, "average": average, "args": {"lr": 0.1}, "empty": {}})
    assert list(found.counted) == ["weight", "bias"]
    why = f"beside {key!r}, which is counted"
    assert {name: (each.values, each.why) for name, each in found.left_out.items()} == {
        "opt": (MOMENTS, why), "average": (16, why),
    }  # fmt: skip
    assert found.others == ["args"]


def test_the_state_of_an_optimizer_alone_has_no_weights():
    found = Checkpoint.of(training()[1])
    assert not found.counted
    assert found.left_out["the whole file"].values == MOMENTS


def test_tied_tensors_count_once_in_the_totals():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    counted = Checkpoint.of(model.state_dict()).tables()[0]
    assert [(row["weight"], row["weights"], row["note"]) for row in counted.records()] == [
        ("0.weight", 9, ""), ("1.weight", None, "tied to 0.weight"),
    ]  # fmt: skip
    assert [total["weights"] for total in counted.totals()] == [9, 9]


def test_nested_tensors_are_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, once in a process
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    found = Checkpoint.of({"weight": WEIGHT, "nested": nested})
    assert list(found.counted) == ["weight"]
    assert (found.left_out["nested"].shape, found.left_out["nested"].values) == ((), 5)
    assert found.left_out["nested"].why.startswith("a nested tensor")


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="torch is older than this type")
def test_a_type_without_a_zero_is_left_out():
    found = Checkpoint.of({"weight": WEIGHT, "scale": torch.ones(2, 2).to(torch.float8_e8m0fnu)})
    assert list(found.counted) == ["weight"]
    assert "float8_e8m0fnu" in found.left_out["scale"].why


def test_containers_that_hold_themselves_or_are_nested_deep_are_looked_through_once():
    state = {"weight": WEIGHT}
    state["self"] = state
    several = [WEIGHT, WEIGHT.clone()]
    for _ in range(DEPTH - 2):
        several = [several, several]  # a million entries, if each were looked through
    state["several"] = several
    deep = inner = {}
    for _ in range(5000):
        inner["inner"] = inner = {}
    inner["weight"] = WEIGHT
    state["deep"] = deep
    found = Checkpoint.of(state)
    assert len(found.counted) == 3
    assert [(each.values, each.why) for each in found.left_out.values()] == [(6, f"nested more than {DEPTH} deep")]
