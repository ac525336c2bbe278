"""The records of every table against the weights themselves, and against a plain computation."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsifai import (
    LotteryTickets,
    Quantized,
    Report,
    Sensitivity,
    Sparsifier,
    Ticket,
    save_sparse,
    semi_structured_layers,
    shrinkage,
)
from sparsifai.export.checkpoint import Checkpoint
from sparsifai.gradual.gradual_pruning import plan_of
from sparsifai.model.zeros import Count
from sparsifai.quantization.quantized import QuantizedRow


@pytest.fixture
def model():
    """Three layers, of which the first loses two filters and the second half of its weights."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 16), nn.Linear(16, 2))
    with torch.no_grad():
        net[0].weight[:2], net[0].bias[:2] = 0, 0
        net[3].weight.view(-1)[::2] = 0
    return net


def zeros(weight):
    return int((weight == 0).sum())


def check(table, rows, columns):
    """The records have these columns and rows; the frame and the printed cells are made of them."""
    records = table.records()
    assert [list(record) for record in records] == [columns] * rows
    if find_spec("pandas"):  # it comes with fastai
        assert table.to_pandas().shape == (rows, len(columns))
    json.dumps([*records, *table.totals()])
    assert all(set(total) == set(columns) for total in table.totals())
    for column in columns:
        values = [record[column] for record in records if record[column] is not None]
        for descending in (False, True):
            sorted_values = [record[column] for record in table.sort(column, descending).records()]
            assert sorted_values[: len(values)] == sorted(values, reverse=descending)
            assert set(sorted_values[len(values) :]) <= {None}
    return records


def test_a_report(model):
    records = check(Report.of(model), 3, ["layer", "kind", "shape", "weights", "zeros", "sparsity", "selected", "note"])
    for record, layer in zip(records, (model[0], model[3], model[4]), strict=True):
        weight = layer.weight
        assert (record["weights"], record["zeros"]) == (weight.numel(), zeros(weight))
        assert record["sparsity"] == zeros(weight) / weight.numel()
        assert record["shape"] == tuple(weight.shape)
        assert record["selected"]
    selected, whole = Report.of(model).totals()
    assert selected["zeros"] == sum(record["zeros"] for record in records)
    assert whole["zeros"] == sum(zeros(each) for each in model.parameters())


def test_a_report_of_what_cannot_be_counted(model):
    model.register_parameter("own", nn.Parameter(torch.ones(2, 2).to_sparse()))
    record = Report.of(model).records()[-1]
    assert (record["weights"], record["zeros"], record["sparsity"], record["selected"]) == (None, None, None, False)


def test_a_plan(model):
    plan = plan_of(Sparsifier(model, context="local", exclude="4"), 0.75, "agp", 2, 4)
    records = check(
        plan, 3,
        ["layer", "kind", "shape", "weights", "weights_left", "sparsity", "bytes", "bytes_left", "flops", "flops_left",
         "why_not_two_four", "selected", "near_collapse", "note"],
    )  # fmt: skip
    first, _, last = records
    assert (first["weights"], first["weights_left"], first["sparsity"]) == (216, 54, 0.75)
    assert (first["bytes"], first["bytes_left"], first["flops"]) == (4 * 216, 216 // 8 + 4 * 54, None)
    assert (last["selected"], last["note"], last["weights_left"]) == (False, "excluded", 32)
    assert plan.totals()[1]["weights"] == sum(each.numel() for each in model.parameters())


def test_what_shrinking_removes(model):
    pytest.importorskip("torch_pruning", reason="shrink finds coupled channels with it")
    records = check(
        shrinkage(model, torch.zeros(1, 3, 3, 3)), 3,
        ["layer", "kind", "what", "number", "zero", "removed", "zero_left", "why"],
    )  # fmt: skip
    assert [(each["number"], each["zero"], each["removed"]) for each in records] == [(8, 2, 5), (16, 0, 0), (2, 0, 0)]


def test_a_sparse_file(model, tmp_path):
    table = save_sparse(model, tmp_path / "model")
    records = check(
        table, 6, ["tensor", "shape", "dtype", "weights", "zeros", "sparsity", "form", "bytes", "dense_bytes"]
    )
    for record, (name, value) in zip(records, model.state_dict().items(), strict=True):
        assert (record["tensor"], record["zeros"], record["dense_bytes"]) == (name, zeros(value), 4 * value.numel())
    assert table.totals()[1]["bytes"] == (tmp_path / "model").stat().st_size


def test_layers_that_can_be_converted(model):
    records = check(
        semi_structured_layers(model.half()), 3,
        ["layer", "kind", "shape", "dtype", "is_two_four", "convertible", "why_not"],
    )  # fmt: skip
    assert [each["is_two_four"] for each in records] == [False, True, False]
    assert all(bool(each["why_not"]) != each["convertible"] for each in records)


def test_a_checkpoint(model):
    (table,) = Checkpoint.of(model.state_dict()).tables()
    records = check(table, 3, ["weight", "shape", "weights", "zeros", "sparsity", "note"])
    assert [each["zeros"] for each in records] == [zeros(layer.weight) for layer in (model[0], model[3], model[4])]


def test_an_int8_model():
    int8 = QuantizedRow("a", "int8", (2, 5), Count(10, 4), 2, 10)
    rows = int8, QuantizedRow("b", "float32", (3,), Count(3, 0), 0, 12)
    table = Quantized(Path("model.onnx"), rows, 100)
    records = check(table, 2, ["weight", "dtype", "shape", "weights", "zeros", "sparsity", "scales", "bytes"])
    assert [(each["sparsity"], each["scales"], each["bytes"]) for each in records] == [(0.4, 2, 10), (0.0, None, 12)]
    assert [total["bytes"] for total in table.totals()] == [10, 100]


def test_sensitivity():
    table = Sensitivity(("a", "b"), (10, 20), (0.5, 0.9), ((0.8, 0.2), (0.9, 0.7)), 0.95, "accuracy", False)
    records = check(table, 2, ["layer", "weights", "baseline", "accuracy_at_0.5", "accuracy_at_0.9"])
    assert records[0] == {
        "layer": "a", "weights": 10, "baseline": 0.95, "accuracy_at_0.5": 0.8, "accuracy_at_0.9": 0.2
    }  # fmt: skip
    assert [each["layer"] for each in table.sort("accuracy_at_0.9", descending=True).records()] == ["b", "a"]


def test_of_several_layers_the_worst_is_shown():
    names = tuple(f"blocks.{number // 2}.{number % 2}.weight" for number in range(4))
    for lower, values in (True, ["0.4", "nan"]), (False, ["0.3", "nan"]):
        table = Sensitivity(names, (10,) * 4, (0.5,), ((0.3,), (0.4,), (0.5,), (float("nan"),)), 0.1, "m", lower)
        lines = str(table.fold()).splitlines()
        assert [line.split()[-1] for line in lines[3:5]] == values
        assert "the worst" in lines[0]


def test_lottery_tickets():
    tickets = LotteryTickets(
        [Ticket({}, 0.0, {"accuracy": 0.9}), Ticket({}, 0.5, {"accuracy": 0.8}, {"random": {"accuracy": 0.7}})]
    )
    records = check(tickets, 2, ["round", "sparsity", "accuracy", "random"])
    assert records == [
        {"round": 0, "sparsity": 0.0, "accuracy": 0.9, "random": None},
        {"round": 1, "sparsity": 0.5, "accuracy": 0.8, "random": 0.7},
    ]
    assert tickets.sort("accuracy").tickets == tickets.tickets
