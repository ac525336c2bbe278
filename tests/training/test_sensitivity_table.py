"""The table of sensitivities, and the sparsity of each layer that it gives."""

from pathlib import Path

import pytest
from conftest import EXAMPLE, small_net
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsifai import Sensitivity, Sparsifier, sensitivity

# --- Budget -------------------------------------------------------------------------------------------------------


def table(values, sizes, levels=(0.5, 0.9), baseline=0.0, lower_is_better=True):
    names = tuple(f"{place}.weight" for place in range(len(sizes)))
    return Sensitivity(names, tuple(sizes), levels, tuple(map(tuple, values)), baseline, "loss", lower_is_better)


def total(answer, budget):
    return sum(size * budget[name] for name, size in zip(answer.layers, answer.sizes, strict=True)) / sum(answer.sizes)


def test_budget_by_hand():
    # Per weight, the first loses 0.01 at 0.5 and 0.05 at 0.9, the second 0.01 at 0.9. A tolerance of 0.01 allows
    # 0.5 and 0.9: (100 * 0.5 + 300 * 0.9) / 400 = 0.8. Half of it allows half of both.
    answer = table([[1, 5], [3 * 5 / 9, 3]], [100, 300])
    assert answer.budget(0.8) == pytest.approx({"0.weight": 0.5, "1.weight": 0.9})
    assert answer.budget(0.4) == pytest.approx({"0.weight": 0.25, "1.weight": 0.45})
    assert answer.budget(0.85) == pytest.approx({"0.weight": 0.7, "1.weight": 0.9})
    assert answer.budget(0.9) == pytest.approx({"0.weight": 0.9, "1.weight": 0.9})
    assert answer.budget(0) == {"0.weight": 0.0, "1.weight": 0.0}


def test_a_higher_metric_is_a_lower_loss():
    loss, score = table([[1, 5], [1, 3]], [1, 2]), table([[9, 5], [9, 7]], [1, 2], baseline=10, lower_is_better=False)
    assert loss.budget(0.6) == score.budget(0.6)


def test_sparsities_that_cost_nothing_are_scaled_by_one_factor():
    # The first loses nothing at 0.5, the second nothing at 0.9.
    answer = table([[-1, 1], [0, -2]], [100, 100])
    assert answer.budget(0.7) == pytest.approx({"0.weight": 0.5, "1.weight": 0.9})
    assert answer.budget(0.35) == pytest.approx({"0.weight": 0.25, "1.weight": 0.45})


def test_within_a_jump_all_layers_go_the_same_fraction():
    # At a tolerance of 1 per layer, the first jumps from 0.5 to 0.9, and the second stays at 0.25.
    answer = table([[1, 1], [2, 4]], [100, 100])
    assert answer.budget(0.375) == pytest.approx({"0.weight": 0.5, "1.weight": 0.25})
    assert answer.budget(0.475) == pytest.approx({"0.weight": 0.7, "1.weight": 0.25})


def test_a_metric_that_is_better_at_a_higher_level_by_chance_counts_as_equal():
    assert table([[2, 1], [1, 4]], [1, 1]).budget(0.6) == table([[2, 2], [1, 4]], [1, 1]).budget(0.6)


def test_values_that_are_not_finite_count_as_the_worst():
    nan = table([[1, float("nan")], [1, 4]], [1, 1])
    assert nan.budget(0.6) == table([[1, 4], [1, 4]], [1, 1]).budget(0.6)
    assert table([[float("inf")] * 2, [0, 0]], [1, 1]).budget(0.6) == pytest.approx({"0.weight": 0.3, "1.weight": 0.9})


@st.composite
def tables(draw):
    count, levels = draw(st.integers(1, 5)), draw(st.sets(st.integers(1, 99), min_size=1, max_size=5))
    numbers = st.one_of(st.integers(0, 3).map(float), st.floats(-10, 1e6), st.just(float("nan")))
    values = [[draw(numbers) for _ in levels] for _ in range(count)]
    sizes = [draw(st.integers(1, 10**6)) for _ in range(count)]
    return table(
        values, sizes, tuple(level / 100 for level in sorted(levels)), draw(st.floats(-5, 5)), draw(st.booleans())
    )


@given(tables(), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=300)
def test_a_budget_adds_up_and_never_falls_in_a_layer(answer, first, second):
    low, high = sorted((first * answer.levels[-1], second * answer.levels[-1]))
    lower, higher = answer.budget(low), answer.budget(high)
    for budget, sparsity in ((lower, low), (higher, high)):
        assert total(answer, budget) == pytest.approx(sparsity, abs=1e-9)
        assert all(type(level) is float and 0 <= level <= answer.levels[-1] for level in budget.values())
    assert all(lower[name] <= higher[name] + 1e-9 for name in answer.layers)


def test_a_sparsifier_reaches_the_total_with_a_budget(net):
    answer = sensitivity(net, lambda model: float(model(EXAMPLE + 1).square().sum()), (0.5, 0.8, 0.95), progress=False)
    for sparsity in (0.3, 0.6, 0.9):
        model = small_net()
        sparsifier = Sparsifier(model, context="local")
        sparsifier.sparsify(answer.budget(sparsity))
        # Every layer is rounded to whole weights.
        assert abs(sparsifier.sparsity - sparsity) * sum(answer.sizes) <= len(answer.sizes) / 2 + 1e-6


@pytest.mark.fastai
def test_the_callback_reaches_a_budget(make_learner):
    from sparsifai import SparsifyCallback

    learn = make_learner()
    budget = sensitivity(learn, progress=False).budget(0.9)
    learn.fit(1, cbs=SparsifyCallback(budget, context="local"))
    report = learn.keep_sparsity.report()
    assert report.selected.sparsity == pytest.approx(0.9, abs=0.01)
    for row in report.rows:
        assert row.count.sparsity == pytest.approx(budget[row.name], abs=0.5 / row.count.weights + 1e-9)


@pytest.mark.fastai
@pytest.mark.slow
def test_a_budget_is_better_than_the_same_sparsity_in_all_layers(monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come with it")
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from fastai.vision.all import CrossEntropyLossFlat, Learner, accuracy, set_seed

    from examples.digits import accuracy_of, conv_net, digits_loaders
    from sparsifai import SparsifyCallback

    def trained(seed, sparsity=None):
        set_seed(seed, reproducible=True)
        learn = Learner(digits_loaders(seed), conv_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(6, 1e-2, cbs=[] if sparsity is None else SparsifyCallback(sparsity, context="local"))
        return learn

    budgets, uniform = [], []
    for seed in range(2):
        budget = sensitivity(trained(seed), progress=False).budget(0.95)
        budgets.append(accuracy_of(trained(seed, budget)))
        uniform.append(accuracy_of(trained(seed, 0.95)))
    # Over six seeds 0.949 and 0.709, with standard deviations of 0.015 and 0.103.
    assert min(budgets) > 0.9
    assert max(uniform) < 0.85


# --- Output -------------------------------------------------------------------------------------------------------


def test_text_and_html():
    answer = Sensitivity(("<b>.weight",), (4608,), (0.5, 0.975), ((0.123456, float("nan")),), 0.1, "valid_loss", True)
    assert str(answer).splitlines() == [
        "valid_loss is 0.1 before pruning (lower is better); with one layer pruned at a time it is:",
        "layer       weights     50%  97.5%",
        "----------------------------------",
        "<b>.weight    4,608  0.1235    nan",
    ]
    assert repr(answer) == str(answer)
    html = answer._repr_html_()
    assert "&lt;b&gt;.weight" in html
    assert "<b>" not in html
    assert html.count("<tr>") == 2


def test_plot():
    matplotlib = pytest.importorskip("matplotlib", reason="the plot is drawn with it")
    matplotlib.use("Agg")
    answer = table([[1, 5], [1, 3]], [1, 2], baseline=0.5)
    ax = answer.plot()
    assert [tuple(line.get_ydata()) for line in ax.lines] == [(1, 5), (1, 3), (0.5, 0.5)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0.weight", "1.weight", "before pruning"]
    assert answer.plot(ax) is ax
    matplotlib.pyplot.close("all")


def test_the_heat_map_of_many_layers():
    matplotlib = pytest.importorskip("matplotlib", reason="the plot is drawn with it")
    matplotlib.use("Agg")
    values = [[0.1 * layer, 0.2 * layer] for layer in range(12)]
    values[3] = [float("nan"), float("inf")]
    ax = table(values, [1] * 12, baseline=0.0).plot()
    shown = ax.images[0].get_array()
    expected = [[value if abs(value) < 10 else None for value in row] for row in values]
    assert [row for number, row in enumerate(shown.tolist()) if number != 3] == expected[:3] + expected[4:]
    assert shown.mask.tolist() == [[number == 3] * 2 for number in range(12)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["50%", "90%"]
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"{number}.weight" for number in range(12)]
    assert "grey: not finite" in ax.get_xlabel()
    assert ax.figure.axes[-1].get_ylabel() == "loss: more than 0"
    score = table([[9, 5], [9, 7]], [1, 2], baseline=10, lower_is_better=False).plot_heat_map()
    assert score.images[0].get_array().tolist() == [[1, 5], [1, 3]]
    matplotlib.pyplot.close("all")


def test_the_heat_map_of_150_layers_labels_blocks():
    matplotlib = pytest.importorskip("matplotlib", reason="the plot is drawn with it")
    matplotlib.use("Agg")
    names = tuple(f"layers.{number // 5}.{number % 5}.weight" for number in range(150))
    answer = Sensitivity(names, (1,) * 150, (0.5,), ((0.2,),) * 150, 0.1, "loss", True)
    ax = answer.plot()
    assert ax.images[0].get_array().shape == (150, 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"layers.{number}" for number in range(30)]
    assert list(ax.get_yticks()) == list(range(0, 150, 5))
    matplotlib.pyplot.close("all")
