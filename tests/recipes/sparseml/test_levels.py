"""The sparsity at each update, as SparseML 1.9 computes it, written here by hand from its formulas."""

import math

import pytest
from sparseml_texts import modifiers

from sparsifai.gradual.gradual_pruning import GradualPruning
from sparsifai.recipes.reading import Reading
from sparsifai.recipes.sparseml.convert import convert

EPOCHS = 20


def converted(text):
    """What the one sparsify step of a converted recipe prunes, and when."""
    recipe, _ = convert(f"- !EpochRangeModifier {{end_epoch: {EPOCHS}}}\n- {text}")
    reading = Reading(recipe)
    (step,) = reading.steps
    return GradualPruning.of(**reading.arguments(step))


def level(pruning, epoch):
    """The sparsity that is asked for at an epoch, or {pattern: sparsity}."""
    return pruning.ramp.sparsity_at(pruning.ramp.at(epoch / EPOCHS))


def updates(start, end, every):
    """The epochs of the updates of a modifier: every `every` epochs from the start on, and the end."""
    count = math.ceil((end - start) / every - 1e-9)
    return [start + number * every for number in range(count)] + [end]


SHAPES = {
    "linear": lambda x: x,
    "cubic": lambda x: 1 - (1 - x) ** 3,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("initial", "final", "start", "end", "every"),
    [(0.05, 0.85, 0, 20, 1.0), (0.0, 0.9, 2, 18, 0.5), (0.7, 0.97, 2, 18, 4.0), (0.3, 0.6, 1.5, 12, 0.7)],
)
def test_gradual(shape, initial, final, start, end, every):
    pruning = converted(
        f"!GMPruningModifier {{init_sparsity: {initial}, final_sparsity: {final}, start_epoch: {start}, "
        f"end_epoch: {end}, update_frequency: {every}, inter_func: {shape}, params: [a]}}"
    )
    moments = updates(start, end, every)
    assert len(moments) > 3
    for epoch, later in zip(moments, [*moments[1:], EPOCHS], strict=True):
        expected = initial + (final - initial) * SHAPES[shape]((epoch - start) / (end - start))
        assert level(pruning, epoch + 1e-6) == pytest.approx(expected)
        assert level(pruning, max(later - 1e-6, epoch)) == pytest.approx(expected)  # until the next update
    assert start == 0 or level(pruning, start - 0.1) == 0
    assert level(pruning, EPOCHS) == final


def test_gradual_of_several_sparsities_starts_all_layers_at_the_initial_one():
    pruning = converted(
        "!GMPruningModifier {init_sparsity: 0.3, final_sparsity: {0.9: [a], 0.5: [b]}, start_epoch: 0, end_epoch: 10, "
        "update_frequency: 1.0}"
    )
    for epoch in range(11):
        done = 1 - (1 - epoch / 10) ** 3
        found = level(pruning, epoch + 1e-6)
        assert found == {"a": pytest.approx(0.3 + 0.6 * done), "b": pytest.approx(0.3 + 0.2 * done)}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("RigLPruningModifier", "final_sparsity: 0.8"),
        ("TopKASTPruningModifier", "forward_sparsity: 0.8, backward_sparsity: 0.5"),
    ],
)
def test_constant(name, parameters):
    pruning = converted(
        f"!{name} {{{parameters}, start_epoch: 3, end_epoch: 15, update_frequency: 0.5, params: __ALL_PRUNABLE__}}"
    )
    assert level(pruning, 2.99) == 0
    for epoch in updates(3, 15, 0.5):
        assert level(pruning, epoch + 1e-6) == 0.8
    assert level(pruning, EPOCHS) == 0.8


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("fraction", [0.3, 0.1])
def test_the_fraction_of_rigl_that_moves(start, fraction):
    pruning = converted(
        f"!RigLPruningModifier {{final_sparsity: 0.8, start_epoch: {start}, end_epoch: 15, update_frequency: 0.5, "
        f"params: __ALL_PRUNABLE__, init_update_fraction: {fraction}}}"
    )
    for epoch in updates(start, 15, 0.5):
        expected = fraction / 2 * (1 + math.cos(math.pi * (epoch - start) / (15 - start)))
        assert pruning.drop_at(epoch / EPOCHS) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("end", [3, 4, 5, 6, 8, 9, 10, 11, 12, 14, 17, 18, 20])
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_ac_dc(start, end, every):
    pruning = converted(
        f"!ACDCPruningModifier {{compression_sparsity: 0.9, start_epoch: {start}, end_epoch: {end}, "
        f"update_frequency: {every}, params: __ALL_PRUNABLE__}}"
    )
    moments = updates(start, end, every)
    for number, epoch in enumerate(moments):
        dense = number % 2 == 0 and end - every > epoch
        assert level(pruning, epoch + 1e-6) == (0.0 if dense else 0.9), (epoch, number)
    assert level(pruning, EPOCHS) == 0.9
    assert start == 0 or level(pruning, start - 0.1) == 0


def test_modifiers_without_tags_have_the_levels_of_those_with_tags():
    tagged = modifiers("init_sparsity: 0.1, final_sparsity: 0.8, params: [a], update_frequency: 0.5")
    for scheduler in ("cubic", "polynomial_decay, scheduler_args: {exponent: 3}"):
        untagged = (
            "pruning_modifiers:\n  MagnitudePruningModifier: {init_sparsity: 0.1, final_sparsity: 0.8, targets: [a], "
            f"start: 0, end: 9, update_frequency: 0.5, update_scheduler: {scheduler}}}"
        )
        assert convert(untagged) == convert(tagged)
