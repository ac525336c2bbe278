"""A picture of schedules: its curves against the formulas."""

import pytest

from sparsifai import between, cos, plot_schedule, schedules

matplotlib = pytest.importorskip("matplotlib", reason="the picture is drawn with it")
matplotlib.use("Agg")
pytestmark = pytest.mark.usefixtures("closing_figures")


def test_curves_are_those_of_the_schedules():
    half = between("agp", 0, 0.5)
    ax = plot_schedule("agp", half, cos, lambda t: t * t, sparsity=0.8)
    expected = (lambda t: 1 - (1 - t) ** 3, half, cos, lambda t: t * t)
    for line, schedule in zip(ax.lines, expected, strict=True):
        times, levels = line.get_data()
        assert (times[0], times[-1], len(times)) == (0, 1, 1001)
        assert list(levels) == pytest.approx([0.8 * schedule(t) for t in times])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["agp", "between(agp, 0, 0.5)", "cos", "schedule 4"]
    assert ax.get_ylabel() == "sparsity"


def test_a_schedule_whose_name_matplotlib_would_hide_is_in_the_legend():
    def _inner(t):
        return t

    ax = plot_schedule(_inner, "lin")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["schedule 1", "lin"]


def test_by_default_the_share_of_the_target_is_drawn_in_percent():
    ax = plot_schedule("one_shot")
    assert ax.get_ylabel() == "share of the target sparsity"
    assert list(ax.lines[0].get_ydata()) == [1.0] * 1001
    ax.figure.canvas.draw()
    assert [label.get_text() for label in ax.get_yticklabels()][:2] == ["0%", "20%"]


def test_given_axes_are_drawn_on_and_every_schedule_can_be():
    _, ax = matplotlib.pyplot.subplots()
    names = [name for name in schedules if name != "iterative"]
    assert plot_schedule(*names, ax=ax) is ax
    assert len(ax.lines) == len(names)
