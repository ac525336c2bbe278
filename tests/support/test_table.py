"""Tables as text and as HTML, against tables written by hand."""

from dataclasses import dataclass

import pytest

from sparsifai.support.table import Cells, Table, percent

CELLS = Cells(
    ("layer", "weights", "why"),
    [("fc", "20", "dense"), ("embedding", "1,000", "")],
    totals=[("all layers", "1,020", "")],
    left=(0, -1),
    caption="Two layers\nof a model",
    notes=["a remark", ""],
)


@dataclass(frozen=True, repr=False)
class Weights(Table):
    """A result with one row per layer."""

    counts: tuple[tuple[str, int], ...]

    def _cells(self):
        return Cells(("layer", "weights"), [(name, str(count)) for name, count in self.counts])


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
        "<table><caption>Two layers of a model</caption>"
        f"<thead><tr><th {left}>layer</th><th {right}>weights</th><th {left}>why</th><th {left}>note</th></tr></thead>"
        f"<tbody><tr><td {left}>fc</td><td {right}>20</td><td {left}>dense</td><td {left}>a remark</td></tr>"
        f"<tr><td {left}>embedding</td><td {right}>1,000</td><td {left}></td><td {left}></td></tr></tbody>"
        f"<tfoot><tr><th {left}>all layers</th><th {right}>1,020</th><th {left}></th></tr></tfoot></table>"
    )


def test_html_escapes_names():
    html = Cells(("<i>",), [("a & b",)], totals=[("<b>",)], caption="1 < 2", notes=["<u>"]).html()
    assert all(escaped in html for escaped in ("&lt;i&gt;", "a &amp; b", "&lt;b&gt;", "1 &lt; 2", "&lt;u&gt;"))


def test_a_table_is_text_when_printed_and_html_in_a_notebook():
    table = Weights((("fc", 20),))
    assert str(table) == repr(table) == "layer  weights\n--------------\nfc          20"
    assert table._repr_html_() == table._cells().html()


def test_a_table_without_rows_shows_its_header():
    assert str(Weights(())) == "layer  weights\n--------------"


def test_the_base_class_has_nothing_to_show():
    with pytest.raises(TypeError, match="abstract"):
        Table()


@pytest.mark.parametrize(
    ("fraction", "shown"), [(0, "0.00%"), (1e-9, "0.01%"), (0.12345, "12.35%"), (1 - 1e-9, "99.99%"), (1, "100.00%")]
)
def test_percent_rounds_to_nothing_and_to_everything_only_if_exact(fraction, shown):
    assert percent(fraction) == shown
