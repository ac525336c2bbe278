"""What commands print: drawn tables in a terminal, plain text in a pipe, JSON, and the values of the axes."""

import io
import json
import re
import sys

import pytest
import torch

from sparsifai import contexts, criteria, granularities, schedules
from sparsifai.command_line.main import main
from sparsifai.command_line.output import print_json, print_table
from sparsifai.support.table import Column, Table


class Sizes(Table):
    """A table with long names, long numbers and reasons."""

    def __init__(self, count=3):
        self.count = count

    def _records(self):
        numbers = {f"number {each}": 10**each for each in range(6, 12)}
        return [
            {"layer": f"encoder.layer.{each}.weight", **numbers, "why": "reason " * 20} for each in range(self.count)
        ]

    def _columns(self):
        return [
            Column("layer", left=True),
            *(Column(f"number {each}") for each in range(6, 12)),
            Column("why", left=True, remark=True),
        ]


class Terminal(io.StringIO):
    """Standard output of a terminal."""

    def isatty(self):
        return True


def in_terminal(width, monkeypatch, *arguments):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(*arguments)
    return terminal.getvalue()


@pytest.mark.parametrize("width", [60, 80, 140, 300])
def test_a_terminal_of_any_width_shows_every_number(width, monkeypatch):
    shown = in_terminal(width, monkeypatch, Sizes())
    assert max(map(len, shown.splitlines())) <= width
    assert all(f"{10**each:,}" in shown for each in range(6, 12))
    assert shown.count("reason") == 60
    if width == 300:
        assert shown.count("encoder.layer.0.weight") == 1


def test_a_long_table_is_folded_in_a_terminal_alone(monkeypatch, capsys):
    print_table(Sizes(50))
    everything = capsys.readouterr().out
    assert everything == f"{Sizes(50).unfold()}\n"
    folded = in_terminal(300, monkeypatch, Sizes(50))
    assert folded.endswith("\n50 rows in 1 line; --all shows all.\n")
    assert in_terminal(300, monkeypatch, Sizes(50), True) == everything


def test_a_command_shows_all_rows_if_it_is_told(folder, monkeypatch, capsys):
    torch.save({f"layer.{each}.weight": torch.ones(2, 2) for each in range(50)}, "many.pth")
    for more in ([], ["--all"]):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main(["report", "many.pth", *more]) == 0
        assert (len(terminal.getvalue().splitlines()) > 50) == bool(more)


def test_json_has_no_number_that_others_cannot_read(capsys):
    print_json({"nan": float("nan"), "inf": float("inf"), "shape": (1, 2), "other": io.StringIO, "half": 0.5, 3: None})
    found = json.loads(capsys.readouterr().out)
    other = found.pop("other")
    assert found == {"nan": None, "inf": None, "shape": [1, 2], "half": 0.5, "3": None}
    assert other == str(io.StringIO)


def test_list_has_every_value_and_every_form(capsys):
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"granularity", "context", "criteria", "schedule"}
    for axis, registry in zip(found, (granularities, contexts, criteria, schedules), strict=True):
        names = [row["name"] for row in found[axis]]
        assert set(registry) <= set(names)
        assert all(row["what"] for row in found[axis])
    assert {"4x4", "out,h"} <= {row["name"] for row in found["granularity"]}
    assert {"2:4", "{bounded: ...}"} <= {row["name"] for row in found["context"]}
    assert {"name": "filter", "what": "The mask is indexed by (out)."} in found["granularity"]
    wanda = next(row for row in found["criteria"] if row["name"] == "wanda")
    assert wanda["needs"] == ["weight", "activation"]
    assert wanda["what"].startswith("|w| ||x||")


def test_list_shows_one_axis(capsys):
    for word in ("criterion", "criteria"):
        assert main(["list", word]) == 0
        out = capsys.readouterr().out
        assert re.search(r"(?m)^wanda +weight, activation +\|w\| \|\|x\|\|", out)
        assert "erk" not in out
