"""The table of a comparison: text, HTML, ratios and the plot."""

import pytest
from torch import nn

from sparsifai import Comparison
from sparsifai.export.comparison_table import Form, caption


@pytest.fixture
def comparison():
    return Comparison(
        (
            Form("dense", 4000, 1000, 1000, 2000, 2.0),
            Form("masked", 1000, 1000, 100, 2000, 2.2, "as many <FLOPs>", is_noise=True),
            Form("shrunk", note="nothing to remove"),
        ),
        "Median times",
    )


def test_text_and_html(comparison):
    lines = str(comparison).splitlines()
    assert lines[0] == "Median times"
    assert lines[1].split("  ")[0] == "form"
    assert lines[3].split() == ["dense", "4,000", "1,000", "1,000", "2,000", "2"]
    assert lines[4].split() == ["masked", "1,000", "1,000", "100", "2,000", "2.2"] + (
        ["4x", "smaller,", "as", "fast", "within", "the", "noise"]
    )
    assert lines[5] == "shrunk"
    assert lines[6:] == ["masked: as many <FLOPs>", "shrunk: nothing to remove"]
    assert repr(comparison) == str(comparison)
    html = comparison._repr_html_()
    assert html.count("<tr>") == 4
    assert "as many &lt;FLOPs&gt;" in html
    assert "<caption>Median times</caption>" in html
    assert html.endswith("</table><p>masked: as many &lt;FLOPs&gt;<br>shrunk: nothing to remove</p>")


def test_lines_of_large_models_fit():
    sizes = (1_340_000_000, 335_000_000, 335_000_000, 9_876_543_210_123, 12345.6)  # of a large BERT
    forms = Form("dense", *sizes), Form("semi-structured", *sizes, note="a reason, " * 50, is_noise=True)
    lines = str(Comparison(forms, caption({"dense": [1.0] * 200}, nn.Linear(4, 4)))).splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) > 9
    assert lines[3].split()[-1] == "12,346"
    assert all(line.startswith("  ") for line in lines[6:])


def test_forms_are_looked_up_by_name(comparison):
    assert comparison["masked"].nonzeros == 100
    assert comparison.relative("masked", "bytes") == 0.25
    assert comparison.relative("shrunk", "bytes") is None
    with pytest.raises(KeyError, match="smaller"):
        comparison["smaller"]


@pytest.mark.parametrize(
    ("size", "time", "noise", "words"),
    [
        (1000, 0.7, False, "4x smaller, 2.9x faster"),
        (3900, 2.06, False, "1.03x smaller, 1.03x slower"),
        (4000, 50.0, False, "as large, 25x slower"),
        (8000, 2.1, True, "2x larger, as fast within the noise"),
        (None, 1.0, False, "2x faster"),
        (2000, None, False, "2x smaller"),
        (None, None, False, ""),
    ],
)
def test_a_form_beside_the_dense_one_in_words(size, time, noise, words):
    forms = Form("dense", 4000, milliseconds=2.0), Form("shrunk", size, milliseconds=time, is_noise=noise)
    comparison = Comparison(forms, "")
    assert comparison.in_words("shrunk") == words
    assert comparison.in_words("dense") == ""


def test_records_have_the_ratios(comparison):
    dense, masked, shrunk = comparison.records()
    assert masked == {
        "form": "masked", "bytes": 1000, "bytes_ratio": 0.25, "parameters": 1000, "parameters_ratio": 1.0,
        "nonzeros": 100, "nonzeros_ratio": 0.1, "flops": 2000, "flops_ratio": 1.0, "milliseconds": 2.2,
        "milliseconds_ratio": 1.1, "is_noise": True, "in_words": "4x smaller, as fast within the noise",
        "note": "as many <FLOPs>",
    }  # fmt: skip
    assert list(shrunk) == list(dense) == list(masked)
    assert {shrunk[name] for name in masked if name.endswith("_ratio") or name in ("bytes", "flops")} == {None}
    assert [row["form"] for row in comparison.sort("bytes").records()] == ["masked", "dense", "shrunk"]


def test_plot(comparison):
    matplotlib = pytest.importorskip("matplotlib", reason="the plot is drawn with it")
    matplotlib.use("Agg")
    ax = comparison.plot()
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([1, 0.25, 1, 1, 1, 0.1, 1, 1, 1, 1.1])
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["dense", "masked\n4x smaller\nas fast within the noise"]
    assert [text.get_text() for text in ax.texts[:2]] == ["1", "0.25"]
    assert [text.get_text() for text in ax.texts[-2:]] == ["1", "~1.1"]
    assert len(ax.texts) == 5 * 2
    assert ax.get_xlabel().endswith("\nnot available (see the notes): shrunk")
    titles = ["file bytes", "parameters", "non-zeros", "FLOPs", "latency"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == titles
    assert comparison.plot(ax) is ax
    matplotlib.pyplot.close("all")
