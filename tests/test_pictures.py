"""docs/pictures.py draws the pictures of the four questions, with all that is registered."""

import runpy
from pathlib import Path

import pytest

from sparsifai import contexts, criteria, granularities, schedules

DOCS = Path(__file__).parents[1] / "docs"
# Criteria that are no formula of a weight and one more number.
NOT_DRAWN = {"grasp", "synflow", "obs", "sparsegpt", "gate_importance"}


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("how", {*granularities, "4x4"}),
        ("where", {*contexts, "2:4"}),
        ("what", set(criteria) - NOT_DRAWN),
        ("update", {"weights", "scores: |w|", "mask: the 10 lowest are pruned", "weights x mask"}),
        ("when", {*schedules, "between(agp, 0, 0.75)"}),
    ],
)
def test_a_picture_has_all_that_is_registered(name, drawn):
    plt = pytest.importorskip("matplotlib.pyplot", reason="the pictures are drawn with matplotlib")
    pytest.importorskip("PIL", reason="comes with matplotlib")
    figure = runpy.run_path(str(DOCS / "pictures.py"))["PICTURES"][name]()
    titles = {ax.get_title().replace("_\n", "_").replace("\n", " ") for ax in figure.axes if ax.get_title()}
    assert all(ax.has_data() for ax in figure.axes if ax.get_title())
    plt.close(figure)
    assert titles == drawn
    assert (DOCS / f"{name}.png").stat().st_size < 100_000
