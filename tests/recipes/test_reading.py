"""From the content of a recipe to checked steps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsifai import Recipe, between, raised
from sparsifai.recipes.reading import Reading
from sparsifai.recipes.safe_yaml import load_yaml

TEXT = """
# a comment
epochs: 8
variables: {target: 0.8, half: "${target / 2}"}
steps:
  - sparsify:
      sparsity: "${half + 0.4}"
      granularity: [out, h]
      context: {bounded: [local, {'0*': [0, 0.9]}]}
      criteria: movement
      schedule: {one_cycle: {alpha: 10}}
      start: 2
      end: 75%
  - regularize: {weight: 1e-3, granularity: {block: [2, 2]}, end: 4}
  - distil: {weight: "${half}", temperature: 2}
  - freeze: {layers: ["0"], start: 1, end: 50%}
"""


def read(text):
    source = load_yaml(text)
    return Reading(source.value, source)


def schedule_of(**options):
    """The schedule of a sparsify step with these options."""
    reading = Reading({"epochs": 10, "steps": [{"sparsify": {"sparsity": 0.8, **options}}]})
    return reading.arguments(reading.steps[0])["schedule"]


def test_expressions_axes_and_times():
    reading = read(TEXT)
    assert reading.variables == {"target": 0.8, "half": 0.4}
    assert reading.epochs == 8
    first, second, third, fourth = map(reading.arguments, reading.steps)
    assert first["sparsity"] == pytest.approx(0.8)
    assert first["granularity"]({"out": 4, "in": 4, "h": 3, "w": 3}) == ("out", "h")
    assert first["context"].__name__ == "bounded(local)"
    assert first["schedule"](0.24) == 0
    assert first["schedule"](0.75) == pytest.approx(1)
    assert second["weight"] == 1e-3
    assert second["schedule"](0.49) == 1
    assert second["schedule"](0.5) == 0
    assert third["weight"] == 0.4
    assert (fourth["start"], fourth["end"]) == (1 / 8, 0.5)


def test_arguments_are_new_for_every_call():
    reading = read(TEXT)
    step = reading.steps[0]
    reading.arguments(step).clear()
    assert reading.arguments(step)["sparsity"] == step.options["sparsity"]


def test_the_sparsity_starts_and_is_updated_as_the_recipe_says():
    schedule = schedule_of(schedule="lin", start=2, end=6, initial_sparsity=0.2, update_every=2)
    schedule = raised(schedule, 0.2 / 0.8)  # as the callback does
    assert [0.8 * schedule(epoch / 10) for epoch in range(11)] == pytest.approx([0, 0, 0.2, 0.2, 0.5, 0.5, *[0.8] * 5])


def test_without_times_the_schedule_is_the_default_of_the_callback():
    assert schedule_of() == between("agp", 0, 0.75)
    assert schedule_of(end="50%") == between("agp", 0, 0.5)


def test_blocks_and_times_need_no_quotes_and_the_start_needs_no_epochs():
    reading = read("steps:\n- sparsify: {sparsity: 0.5, context: 2:4, start: 0, end: 50%}")
    (arguments,) = map(reading.arguments, reading.steps)
    assert arguments["context"].__name__ == "2:4"
    assert arguments["schedule"] == between("agp", 0, 0.5)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_broken_file_raises_a_value_error_or_is_read(data):
    text = TEXT
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 12))
        text = (
            text[:place]
            + data.draw(st.text(st.sampled_from("{}[]:-,&*!%'\"#|>${} \n\tabé0.5"), max_size=5))
            + text[place + cut :]
        )
    try:
        recipe = Recipe.loads(text)
    except ValueError:
        return
    assert Recipe.loads(recipe.dumps()) == recipe
