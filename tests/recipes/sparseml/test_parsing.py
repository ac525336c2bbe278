"""From the text of a SparseML recipe to its modifiers: YAML, Markdown, stages and variables."""

import pytest
from sparseml_texts import MARKDOWN, RECIPE, STAGES, modifiers
from work import at_most_calls

from sparsifai.recipes.sparseml.convert import convert


@pytest.mark.parametrize("fence", ["---", "+++", "---\r"])
def test_markdown_gives_the_same_steps_and_the_lines_of_the_file(fence):
    recipe, notices = convert(MARKDOWN.replace("\n---\n", f"\n{fence}\n"))
    assert recipe == convert(RECIPE)[0]
    assert [notice.line for notice in notices] == [11 + 6]


def test_the_start_of_a_document_is_not_front_matter():
    assert convert("---\n" + RECIPE)[0] == convert(RECIPE)[0]
    assert convert("\ufeff---\n" + RECIPE + "---\n# A net: pruned\n")[0] == convert(RECIPE)[0]


def test_stages_and_their_variables():
    recipe, notices = convert(STAGES)
    (step,) = recipe["steps"]
    assert recipe["epochs"] == 40
    assert step["sparsify"] == {
        "sparsity": 0.9,
        "granularity": "weight",
        "context": "local",
        "criteria": "large_final",
        "schedule": "lin",
        "start": 10.0,
        "end": 40,
        "initial_sparsity": 0,
    }
    assert [(notice.line, notice.key) for notice in notices] == [(8, "params"), (13, "end_epoch")]
    assert "there are 40 epochs" in notices[1].message


def test_variables_that_are_not_numbers_and_unused_variables():
    text = "mask: block\nnames: [a, b]\nunused: 3\nversion: 1\n" + modifiers(
        "final_sparsity: 0.8, params: eval(names), mask_type: eval(mask)"
    )
    recipe, notices = convert(text)
    assert recipe["steps"][0]["sparsify"]["layers"] == ["a", "b"]
    assert recipe["steps"][0]["sparsify"]["granularity"] == "1x4"
    assert [(notice.line, notice.key) for notice in notices] == [(3, "unused")]


def test_a_variable_that_another_one_uses_or_an_alias_stands_for_is_used():
    text = "one: 1\ntwo: eval(one + 1)\nthree: &three 3\nfour: [&four 4]\n" + modifiers(
        "final_sparsity: 0.8, params: [a], update_frequency: *three"
    )
    assert [notice.key for notice in convert(text)[1]] == ["two", "four"]
    stage = "outer: 2\nin_stage:\n  inner: eval(outer)\n  a_modifiers: {ConstantPruningModifier: {end: 3}}\n"
    assert [notice.key for notice in convert(stage)[1]] == ["inner"]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        *(each * 100_000 for each in ("[", "{", "- ", "? ")),
        "a: 1\n" * 60_000,
        "modifiers:\n" + "- b\n" * 50_000,
        BOMB,
        "a: 1\nb: 9" + "9" * 5000,
        "%YAML 9" + "9" * 5000 + ".1\n--- a",
        modifiers("final_sparsity: eval(9**9**9)"),
    ],
    ids=lambda text: text[:12],
)
def test_hostile_texts_are_refused_at_once(text):
    with at_most_calls(10_000_000), pytest.raises(ValueError, match="^line "):
        convert(text)
