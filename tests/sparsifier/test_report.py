"""Reports: measured sparsity as text, HTML and plot."""

import warnings

import pytest
import torch
from torch import nn

from sparsifai import Report, Sparsifier


@pytest.fixture
def report(mlp):
    sparsifier = Sparsifier(mlp, exclude="2")
    sparsifier.sparsify(0.25)
    with torch.no_grad():
        mlp[2].weight[0, :3] = 0
        mlp[2].bias.zero_()
    return sparsifier.report()


def test_a_report_counts_the_zeros_of_the_weights(report):
    assert [
        (row.name, row.kind, row.shape, row.count.weights, row.count.zeros, row.why_dense) for row in report.rows
    ] == [
        ("0.weight", "Linear", (8, 4), 32, 8, ""),
        ("2.weight", "Linear", (2, 8), 16, 3, "excluded"),
    ]
    assert (report.selected.weights, report.selected.zeros, report.selected.sparsity) == (32, 8, 0.25)
    assert (report.model.weights, report.model.zeros) == (32 + 8 + 16 + 2, 8 + 3 + 2)


def test_a_report_is_printed_as_a_table(report):
    lines = [line.split() for line in str(report).splitlines()]
    assert lines[0] == ["layer", "kind", "shape", "weights", "zeros", "sparsity", "why", "dense"]
    assert lines[2] == ["0.weight", "Linear", "8x4", "32", "8", "25.00%"]
    assert lines[3] == ["2.weight", "Linear", "2x8", "16", "3", "18.75%", "excluded"]
    assert lines[5] == ["selected", "layers", "32", "8", "25.00%"]
    assert lines[6] == ["whole", "model", "58", "13", "22.41%"]
    assert repr(report) == str(report)


def test_a_report_rounds_to_100_percent_only_if_no_weight_remains():
    model = nn.Linear(100, 1000, bias=False)
    sparsifier = Sparsifier(model)
    sparsifier.sparsify(1.0)
    assert "99,999    99.99%" in str(sparsifier.report())


def test_html_is_escaped_and_has_all_rows(mlp):
    model = nn.ModuleDict({"<b>": nn.Linear(2, 2)})
    html = Sparsifier(model).report()._repr_html_()
    assert "&lt;b&gt;.weight" in html
    assert "<b>" not in html
    assert html.count("<tr>") == 4


def test_the_plot_shows_measured_sparsity(report):
    matplotlib = pytest.importorskip("matplotlib", reason="the plot is drawn with it")
    matplotlib.use("Agg")
    ax = report.plot()
    assert [bar.get_width() for bar in ax.patches] == [0.25, 3 / 16]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0.weight", "2.weight"]
    assert report.plot(ax) is ax
    matplotlib.pyplot.close("all")


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert Sparsifier(model).report().model.weights == 16


def test_matrices_without_named_axes_are_listed():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner = nn.Parameter(torch.zeros(2, 3)), nn.Linear(3, 3)

    with pytest.warns(UserWarning, match="table of Own"):
        row = Sparsifier(Own()).report().rows[-1]
    assert (row.name, row.kind, row.count.zeros) == ("table", "Own", 6)
    assert row.why_dense == "no named axes: register_layer"


@pytest.fixture
def uncounted():
    """A report of a model with parameters whose zeros cannot be counted."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.BatchNorm1d(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: both are prototypes, or deprecated
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        model[0].weight = nn.Parameter(torch.eye(4).to_sparse())
    model.parts, model[2].bias = nn.Parameter(nested), nn.Parameter(torch.ones(2, device="meta"))
    model.none = nn.Parameter(torch.zeros(0, 3))
    with torch.no_grad():
        model[1].weight[0] = -0.0
    return Report.of(model)


def test_what_cannot_be_counted_is_left_out_and_said(uncounted):
    why = {name: reason.split()[0] for name, reason in uncounted.not_counted.items()}
    assert why == {"parts": "a", "0.weight": "in", "2.bias": "on"}
    assert uncounted.left_out == 5 + 16 + 2
    assert (uncounted.selected.weights, uncounted.selected.zeros) == (8, 4)
    assert (uncounted.model.weights, uncounted.model.zeros) == (4 + 8 + 2 + 2, 4)
    assert {row.name: (row.shape, row.count.weights, row.why_dense) for row in uncounted.rows} == {
        "0.weight": ((4, 4), 0, "not counted"), "1.weight": ((2, 4), 8, ""),
        "parts": ((), 0, "not counted"), "none": ((0, 3), 0, "no elements"),
    }  # fmt: skip
    first, *lines = str(uncounted).splitlines()
    assert first.startswith("Not counted: 23 values of parts (a nested tensor; count its parts, which unbind() ")
    assert first.endswith("2.bias (on the meta device, without values; load the model into memory first).")
    assert ["0.weight", "Linear", "4x4", "not", "counted"] in [line.split() for line in lines]
    assert "Not counted: 23 values" in uncounted._repr_html_()


def test_the_plot_says_what_is_not_counted(uncounted):
    matplotlib = pytest.importorskip("matplotlib", reason="the plot is drawn with it")
    matplotlib.use("Agg")
    texts = [text.get_text() for text in uncounted.plot().texts]
    assert texts[0] == "in the layout sparse_coo; to_dense() makes it countable"
    matplotlib.pyplot.close("all")


def test_a_selected_layer_that_cannot_be_counted_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = nn.Parameter(torch.ones(2, 4).to_sparse())
    with pytest.raises(ValueError, match="zeros cannot be counted: a tensor is in the layout sparse_coo"):
        Report.of(model, ["0.weight", "1.weight"])
    assert Report.of(model, ["0.weight"]).selected.weights == 16


def test_the_plot_of_a_long_report_has_a_bar_for_each_block():
    matplotlib = pytest.importorskip("matplotlib", reason="the plot is drawn with it")
    matplotlib.use("Agg")
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)) for _ in range(31)))
    with torch.no_grad():
        for number, block in enumerate(model):
            block[0].weight.view(-1)[: number % 5] = 0
    report = Report.of(model)
    ax = report.plot()
    assert [bar.get_width() for bar in ax.patches] == [number % 5 / 24 for number in range(31)]
    assert ax.get_yticklabels()[1].get_text() == "1 (2 layers)"
    assert ax.texts[1].get_text() == "23 of 24 left"
    assert ax.lines[0].get_xdata()[0] == report.selected.sparsity
    assert len(report.unfold().plot().patches) == 62
    by_zeros = report.sort("zeros", descending=True).unfold().plot()
    assert [bar.get_width() for bar in by_zeros.patches[:2]] == [4 / 16, 4 / 16]
    matplotlib.pyplot.close("all")
