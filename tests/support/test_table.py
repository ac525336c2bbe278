"""Tables as text and as HTML, against tables written by hand."""

import sys
from dataclasses import dataclass

import pytest

from sparsifai.support.cells import Cells
from sparsifai.support.table import Column, Table, percent

CELLS = Cells(
    ("layer", "weights", "why"),
    [("fc", "20", "dense"), ("embedding", "1,000", "")],
    totals=[("all layers", "1,020", "")],
    left=(0, 2),
    caption="Two layers\nof a model",
    notes=["a remark", ""],
)


@dataclass(frozen=True, repr=False)
class Weights(Table):
    """A result with one row per layer."""

    counts: tuple[tuple[str, int], ...]

    def _records(self):
        return [{"layer": name, "weights": count} for name, count in self.counts]

    def _columns(self):
        return (Column("layer", left=True), Column("weights"))

    def _totals(self):
        return [{"layer": "all layers", "weights": sum(count or 0 for _, count in self.counts)}]


def test_text():
    assert CELLS.text() == (
        "Two layers\nof a model\n"
        "layer       weights  why\n"
        "--------------------------\n"
        "fc               20  dense\n"
        "embedding     1,000\n"
        "--------------------------\n"
        "all layers    1,020\n"
        "fc: a remark"
    )


def test_a_long_note_is_wrapped():
    note = "word " * 40
    *_, first, second = Cells(("form",), [("dense",)], notes=[note]).text().splitlines()
    assert first.startswith("dense: word")
    assert len(first) <= 120
    assert second.startswith("  word")


def test_html():
    left, right = 'style="text-align: left"', 'style="text-align: right"'
    assert CELLS.html() == (
        "<table><caption>Two layers<br>of a model</caption>"
        f"<thead><tr><th {left}>layer</th><th {right}>weights</th><th {left}>why</th></tr></thead>"
        f"<tbody><tr><td {left}>fc</td><td {right}>20</td><td {left}>dense</td></tr>"
        f"<tr><td {left}>embedding</td><td {right}>1,000</td><td {left}></td></tr></tbody>"
        f"<tfoot><tr><th {left}>all layers</th><th {right}>1,020</th><th {left}></th></tr></tfoot></table>"
        "<p>fc: a remark</p>"
    )


def test_long_remarks_are_wrapped_in_html():
    remark = "not constant where conv2 reads it"
    html = Cells(("layer", "why"), [(remark, remark), ("fc", "dense")], left=(0, 1), remarks=(1,)).html()
    assert html.count("white-space: normal") == 1
    assert f'white-space: normal; min-width: 14em">{remark}</td></tr>' in html


def test_html_escapes_names():
    html = Cells(("<i>",), [("a & b",)], totals=[("<b>",)], caption="1 < 2", notes=["<u>"]).html()
    assert all(escaped in html for escaped in ("&lt;i&gt;", "a &amp; b", "&lt;b&gt;", "1 &lt; 2", "&lt;u&gt;"))


def test_a_table_is_text_when_printed_and_html_in_a_notebook():
    table = Weights((("fc", 2000), ("head", None)))
    assert str(table) == repr(table)
    assert str(table).splitlines() == [
        "layer       weights",
        "-------------------",
        "fc            2,000",
        "head",
        "-------------------",
        "all layers    2,000",
    ]
    assert table._repr_html_() == (
        Cells(("layer", "weights"), [("fc", "2,000"), ("head", "")], totals=[("all layers", "2,000")]).html()
    )


def test_a_table_without_rows_shows_its_header_and_totals():
    assert str(Weights(())).splitlines()[0] == "layer       weights"


def test_records_are_raw_values_and_totals_stand_apart():
    table = Weights((("fc", 2000), ("head", None)))
    assert table.records() == [{"layer": "fc", "weights": 2000}, {"layer": "head", "weights": None}]
    assert table.totals() == [{"layer": "all layers", "weights": 2000}]


def test_sorting_makes_a_new_table_and_puts_rows_without_a_value_last():
    table = Weights((("c", 2), ("b", None), ("a", 3), ("d", 2), ("e", float("nan"))))
    for descending, expected in (False, "cdabe"), (True, "acdbe"):
        assert "".join(row["layer"] for row in table.sort("weights", descending).records()) == expected
    assert "".join(row["layer"] for row in table.sort("layer").sort("weights").records()) == "cdabe"
    assert "".join(row["layer"] for row in table.sort("layer", descending=True).sort("weights").records()) == "dcaeb"
    assert "".join(row["layer"] for row in table.records()) == "cbade"
    assert str(table.sort("layer")).splitlines()[2].startswith("a ")


def test_a_data_frame_has_the_records():
    pytest.importorskip("pandas", reason="it comes with fastai")
    frame = Weights((("fc", 2000), ("head", 20))).sort("weights").to_pandas()
    assert frame.to_dict("records") == [{"layer": "head", "weights": 20}, {"layer": "fc", "weights": 2000}]
    assert list(Weights(()).to_pandas()) == ["layer", "weights"]


def test_a_data_frame_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"Weights.to_pandas needs pandas: pip install pandas; without it, use rec"):
        Weights(()).to_pandas()


def test_sorting_by_a_column_that_there_is_not():
    with pytest.raises(ValueError, match=r"Weights.sort: no column is named 'size'; choose from layer, weights"):
        Weights((("fc", 20),)).sort("size")


def test_the_base_class_has_nothing_to_show():
    with pytest.raises(TypeError, match="abstract"):
        Table()


@pytest.mark.parametrize(
    ("fraction", "shown"), [(0, "0.00%"), (1e-9, "0.01%"), (0.12345, "12.35%"), (1 - 1e-9, "99.99%"), (1, "100.00%")]
)
def test_percent_rounds_to_nothing_and_to_everything_only_if_exact(fraction, shown):
    assert percent(fraction) == shown
