"""Tables in a narrow terminal: nothing is wider, no number is cut, and names stay distinct."""

import io
import sys
from dataclasses import replace

import pytest

from sparsifai import Report
from sparsifai.model.zeros import Count
from sparsifai.sparsifier.report import Row
from sparsifai.support.cells import Cells

NAMES = [f"model.layers.{number}.self_attn.{name}_proj.weight" for number in (1, 11) for name in ("q", "output")]
TABLE = Cells(
    ("layer", "shape", "weights", "zeros", "note"),
    [
        (name, "4096x4096", "16,777,216", f"{number:,}", "a remark of several words")
        for number, name in enumerate(NAMES)
    ],
    totals=[("whole model", "", "67,108,864", "6", "")],
    left=(0, 1, 4),
    remarks=(4,),
)


def test_what_fits_is_as_it_is():
    assert TABLE.text(200) == TABLE.text()


def test_remarks_are_wrapped_first():
    wide = max(map(len, TABLE.text().splitlines()))
    lines = replace(TABLE, rows=[(*row[:4], "word " * 20) for row in TABLE.rows]).text(wide).splitlines()
    assert max(map(len, lines)) <= wide
    assert sum(line.count("word") for line in lines) == 4 * 20
    assert all(any(line.startswith(name) for line in lines) for name in NAMES)


def test_names_are_shortened_in_the_middle_and_stay_distinct():
    lines = TABLE.text(85).splitlines()
    assert max(map(len, lines)) <= 85
    names = [line.split()[0] for line in lines[2:6]]
    assert len(set(names)) == 4
    assert all("..." in name and name[-8:] == full[-8:] for name, full in zip(names[1::2], NAMES[1::2], strict=True))
    assert [line.split()[2] for line in lines[2:6]] == ["16,777,216"] * 4


@pytest.mark.parametrize("width", [20, 40, 60, 80])
def test_columns_stand_below_each_other_and_no_number_is_cut(width):
    text = TABLE.text(width)
    assert text.count("16,777,216") == 4
    assert text.count("4096x4096") == 4
    assert text.count("67,108,864") == 1
    least = max(map(len, NAMES)) + 2 + len("16,777,216")  # the narrowest part, if no name can be shortened
    assert max(map(len, text.splitlines())) <= max(width, 24 + least)


def test_exact_text_of_two_parts():
    cells = Cells(
        ("layer", "weights", "bytes", "note"),
        [("fc", "1,000", "4,000", ""), ("out", "20", "80", "dense")],
        totals=[("all", "1,020", "4,080", "")],
        left=(0, 3),
        remarks=(3,),
        caption="Sizes of two layers",
    )
    assert cells.text(16) == (
        "Sizes of two\n  layers\n"
        "layer  weights\n--------------\nfc       1,000\nout         20\n--------------\nall      1,020\n\n"
        "layer  bytes\n------------\nfc     4,000\nout       80\n------------\nall    4,080\n\n"
        "layer  note\n------------\nout    dense"
    )


class Terminal(io.StringIO):
    """Standard output that is a terminal."""

    def isatty(self):
        return True


def test_printing_fits_the_terminal_and_a_file_gets_it_all(monkeypatch):
    rows = tuple(Row(name, "Linear", (4096, 4096), Count(16_777_216, 1), "", "a remark " * 5) for name in NAMES)
    report = Report(rows, Count(67_108_864, 4), Count(67_108_864, 4))
    wide = max(map(len, str(report).splitlines()))
    assert wide > 120
    monkeypatch.setattr(sys, "stdout", Terminal())
    for columns in (80, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(map(len, str(report).splitlines())) <= columns
    monkeypatch.setenv("COLUMNS", "300")
    assert max(map(len, str(report).splitlines())) == wide


def test_bars_in_html():
    rows = [("a", "25.00%"), ("b", ""), ("c", "0.00%")]
    bars = {1: [0.25, None, 0.0, 1.0]}
    html = Cells(("layer", "sparsity"), rows, totals=[("all", "100.00%")], bars=bars).html()
    assert html.count("linear-gradient") == 2
    assert '#4682b466 25.0%, transparent 0); text-align: right">25.00%</td>' in html
    assert '#4682b466 100.0%, transparent 0); text-align: right">100.00%</th>' in html
    assert html.startswith('<table style="-webkit-print-color-adjust: exact; print-color-adjust: exact">')
