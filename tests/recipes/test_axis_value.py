"""What a recipe says about an axis, as a function."""

import pytest

from sparsifai import agp, between, criteria, distillation_losses, iterative, one_cycle, relational
from sparsifai.recipes.axis_value import axis_value


@pytest.mark.parametrize("axis", ["schedule", "drop_schedule"])
def test_names_and_options(axis):
    assert axis_value(axis, "agp") is agp
    assert axis_value(axis, {"agp": None}).func is agp
    assert axis_value(axis, {"iterative": 5}) == axis_value(axis, {"iterative": {"n": 5}}) == iterative(5)
    assert axis_value(axis, {"one_cycle": {"alpha": 10}})(0.4) == one_cycle(0.4, alpha=10)


def test_values_of_an_axis_within_values():
    options = {"schedule": {"iterative": 5}, "start": 0.1, "end": 0.8}
    assert axis_value("schedule", {"between": options}) == between(iterative(5), 0.1, 0.8)
    assert axis_value("schedule", {"stepped": [{"between": ["lin", 0, 0.5]}, 4]})(0.3) == 0.5
    assert axis_value("context", {"bounded": [{"blocks": 4}, {"0": 0.5}]}).context.__name__ == "blocks(4)"


def test_granularities_and_what_is_regrown():
    sizes = {"out": 4, "in": 4, "h": 3, "w": 3}
    assert axis_value("granularity", ["out", "h"])(sizes) == axis_value("granularity", ("out", "h"))(sizes)
    assert axis_value("granularity", {"block": [2, 2]}) is not None
    assert axis_value("regrow", "grad") is criteria["grad"]


@pytest.mark.parametrize("option", ["loss", "feature_loss"])
def test_losses_of_a_teacher(option):
    assert axis_value(option, "mean_squared_error") is distillation_losses["mean_squared_error"]
    loss = axis_value(option, {"relational": {"angle_weight": 0}})
    assert (loss.func, loss.keywords) == (relational, {"angle_weight": 0})
