"""A SparseML recipe as a recipe of this library: the steps, the epochs, and the notices."""

import os
import subprocess
import sys

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sparseml_texts import MARKDOWN, RECIPE, STAGES, modifiers

from sparsifai.axes.schedule import schedules
from sparsifai.recipes.sparseml.convert import Notice, convert


def documented_levels(initial=0.05, final=0.85, start=0, end=20, every=1.0):
    """GMPruningModifier with inter_func cubic, as SparseML documents it: [(epoch, sparsity after the update there)].

    Plain and slow: `initial` at the start, an update every `every` epochs, `final` at the end; 1 - (1 - x)^3 between.
    """
    levels, epoch = [], start
    while epoch < end:
        passed = (epoch - start) / (end - start)
        levels.append((epoch, initial + (final - initial) * (1 - (1 - passed) ** 3)))
        epoch += every
    return [*levels, (end, final)]


def test_the_oracle_by_hand():
    levels = dict(documented_levels())
    assert len(levels) == 21
    assert levels[0] == 0.05
    assert levels[10] == pytest.approx(0.05 + 0.8 * 7 / 8)
    assert levels[19] == pytest.approx(0.05 + 0.8 * (1 - 1 / 8000))
    assert levels[20] == 0.85
    assert len(documented_levels(every=0.5)) == 41


GRADUAL = {
    "sparsity": 0.85,
    "layers": ["layer1.0.conv1.weight", "re:layer2.*conv.*"],
    "granularity": "weight",
    "context": "local",
    "criteria": "large_final",
    "schedule": "agp",
    "start": 0.0,
    "end": 20.0,
    "update_every": 1.0,
    "initial_sparsity": 0.05,
}


def test_a_recipe():
    recipe, notices = convert(RECIPE)
    assert recipe == {"epochs": 30, "steps": [{"sparsify": GRADUAL}]}
    assert [(notice.line, notice.key) for notice in notices] == [(11, "LearningRateFunctionModifier")]
    assert "left to fastai" in notices[0].message
    assert "lr_func='cosine', init_lr=0.001, final_lr=0.0" in notices[0].message
    assert str(notices[0]).startswith("line 11: LearningRateFunctionModifier: ")


def test_its_schedule_has_the_documented_levels():
    schedule = schedules.resolve(convert(RECIPE)[0]["steps"][0]["sparsify"]["schedule"])
    for epoch, level in documented_levels():
        assert 0.05 + (0.85 - 0.05) * schedule(epoch / 20) == pytest.approx(level)


def test_epochs():
    assert convert("- !ConstantPruningModifier {end_epoch: 7}")[0] == {"epochs": 7, "steps": [{"keep": {}}]}
    recipe, notices = convert("!ConstantPruningModifier {params: __ALL__}")
    assert recipe == {"steps": [{"keep": {}}]}
    assert notices == [Notice(1, "epochs", notices[0].message)]
    recipe, notices = convert("- !EpochRangeModifier {start_epoch: 2, end_epoch: '7.2', odd: 1}")
    assert recipe == {"epochs": 8, "steps": []}
    assert [notice.key for notice in notices] == ["end_epoch", "odd", "start_epoch"]


def test_a_number_of_epochs_that_is_not_used_is_told():
    text = "- !ConstantPruningModifier {end_epoch: 7}"
    assert convert(text, epochs=7) == convert(text)
    recipe, notices = convert(text, epochs=9)
    assert recipe["epochs"] == 7
    assert notices == [Notice(1, "epochs", "the recipe says 7 epochs, so epochs=9 is not used")]


def test_modifiers_that_differ_in_sparsity_and_layers_become_one_step():
    text = modifiers("final_sparsity: 0.8, params: [a, b]", "final_sparsity: {0.5: [c], 0.6: [d]}")
    recipe, notices = convert(text)
    (step,) = recipe["steps"]
    assert step["sparsify"]["sparsity"] == {"a": 0.8, "b": 0.8, "d": 0.6, "c": 0.5}
    assert "layers" not in step["sparsify"]
    assert notices == []
    start = "init_sparsity: 0.1, final_sparsity: "  # which is that of all its layers here, too
    recipe, _ = convert(modifiers(f"{start}0.8, params: [a]", f"{start}0.6, params: [b]"))
    assert sparsified(recipe) == [({"a": 0.8, "b": 0.6}, None)]


def sparsified(recipe):
    """Sparsity and layers of each sparsify step."""
    return [(step["sparsify"]["sparsity"], step["sparsify"].get("layers")) for step in recipe["steps"]]


def test_modifiers_of_equal_sparsity_become_one_step_with_all_their_layers():
    equal = "final_sparsity: 0.8, init_sparsity: 0.1, params: "
    assert sparsified(convert(modifiers(f"{equal}[a, b]", f"{equal}[c]"))[0]) == [(0.8, ["a", "b", "c"])]


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        (
            "final_sparsity: 0.8, params: [a]",
            "final_sparsity: 0.8, params: [b], inter_func: linear",
            "GMPruningModifier",
        ),
        (
            "final_sparsity: 0.8, params: [a, b]",
            "final_sparsity: 0.9, params: [c]",
            "GlobalMagnitudePruningModifier",
        ),
    ],
)
def test_modifiers_that_cannot_be_joined_are_steps_of_their_own(first, second, name):
    recipe, notices = convert(modifiers(first, second, name=name))
    assert [list(step) for step in recipe["steps"]] == [["sparsify"], ["sparsify"]]
    assert not any(notice.lost for notice in notices)


@pytest.mark.parametrize("all_layers", ["__ALL__", "__ALL_PRUNABLE__"])
@pytest.mark.parametrize("of_all", [0.5, 0.9])
def test_a_modifier_of_all_layers_leaves_those_that_another_one_names(all_layers, of_all):
    several = [f"final_sparsity: {of_all}, params: {all_layers}", "final_sparsity: 0.8, params: [a, 're:b']"]
    for order in (1, -1):
        recipe, notices = convert(modifiers(*several[::order], name="GMPruningModifier"))
        found = {step["sparsify"]["sparsity"]: step["sparsify"] for step in recipe["steps"]}
        assert found[of_all]["exclude"] == found[0.8]["layers"] == ["a", "re:b.*"]
        lines = (2, 3)[::order]
        (notice,) = [notice for notice in notices if notice.key == "GMPruningModifier"]
        assert (notice.line, notice.lost) == (lines[1], of_all == 0.9)
        assert f"the modifier on line {lines[0]}" in notice.message


def test_layers_that_are_ignored_already_are_not_left_out_twice():
    recipe, notices = convert(
        "modifiers:\n  SparseGPTModifier: {sparsity: 0.5, ignore: ['re:.*head']}\n"
        "  WandaPruningModifier: {sparsity: 0.8, targets: ['re:.*head']}\n"
    )
    assert [step["sparsify"].get("exclude") for step in recipe["steps"]] == [["re:.*head.*"], None]
    assert [notice.key for notice in notices] == ["ignore"]


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ("params: [a, b]", "params: [b, c], inter_func: linear", "b"),
        ("params: __ALL__", "params: __ALL_PRUNABLE__, update_frequency: 1", "all layers"),
    ],
)
def test_modifiers_of_the_same_layers_are_refused(first, second, what):
    text = modifiers(*(f"final_sparsity: {each}" for each in (f"0.8, {first}", f"0.9, {second}")))
    message = f"line 3: GMPruningModifier: {what}: the modifier on line 2 prunes the same, .* make two stages, with a"
    with pytest.raises(ValueError, match=message):
        convert(text)


def test_the_highest_sparsity_counts_for_a_layer_of_several_modifiers():
    # In SparseML the masks of all of them are applied.
    text = modifiers(*(f"final_sparsity: {each}" for each in ("0.8, params: [a, b]", "0.9, params: [a]")))
    assert sparsified(convert(text)[0]) == [({"b": 0.8, "a": 0.9}, None)]
    text = modifiers(*(f"final_sparsity: {each}" for each in ("0.9, params: [a]", "0.5, params: ['re:.*']")))
    ((sparsity, _),) = sparsified(convert(text)[0])
    assert [*sparsity.items()] == [("re:.*", 0.5), ("a", 0.9)]  # the last pattern counts


def test_global_modifiers_of_one_layer_each_become_one_step():
    text = modifiers("final_sparsity: 0.8, params: [a]", "final_sparsity: 0.9, params: [c]")
    recipe, _ = convert(text.replace("GMPruning", "GlobalMagnitudePruning"))
    assert recipe["steps"][0]["sparsify"]["sparsity"] == {"a": 0.8, "c": 0.9}
    assert len(recipe["steps"]) == 1


# --- Any text ---------------------------------------------------------------------------------------------------------


def test_no_code_is_run(tmp_path):
    made = tmp_path / "made"
    payloads = [
        f"modifiers:\n- !!python/object/apply:os.mkdir ['{made}']",
        f"a: !!python/object/new:os.mkdir ['{made}']\n" + RECIPE,
        f"a: !!python/name:os.mkdir ['{made}']",
        f"%TAG !M tag:yaml.org,2002:python/object/apply:os.\n---\nmodifiers:\n- !MmkdirModifier ['{made}']",
        modifiers(f"final_sparsity: \"eval(__import__('os').mkdir('{made}'))\", params: [a]"),
        modifiers(f"final_sparsity: 0.5, params: [a], start_epoch: \"__import__('os').mkdir('{made}')\""),
    ]
    for payload in payloads:
        with pytest.raises(ValueError, match="^line "):
            convert(payload)
        assert not made.exists()
    # A loader that runs code would make the directory.
    yaml.unsafe_load(payloads[0])
    assert made.exists()


WORDS = [
    *("!GMPruningModifier", "!EpochRangeModifier", "!ACDCPruningModifier", "!X", "!!int", "!!python/name:os.system"),
    *("modifiers", "final_sparsity", "params", "end_epoch", "eval(a)", "a", "0.5", "1e3", "-1", "re:(", "__ALL__"),
    *(
        ": ",
        ":",
        "- ",
        "\n",
        "\n  ",
        "\n    ",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "&a ",
        "*a",
        "? ",
        "'",
        '"',
        "|",
        ">",
        "#",
        "---\n",
    ),
    *("%TAG ", "\t", "\0", "\x85", "\u2028", "\ufeff", "\\", "<<", ".inf", "0x", "1:30", "~", "=", "@"),
]


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(max_size=60),
        st.lists(st.sampled_from(WORDS), max_size=30).map("".join),
        st.tuples(
            st.sampled_from([RECIPE, MARKDOWN, STAGES]), st.integers(0, 900), st.sampled_from(WORDS), st.integers(0, 9)
        ).map(lambda part: part[0][: part[1]] + part[2] + part[0][part[1] + part[3] :]),
    )
)
@example("modifiers:\n  - !GMPruningModifier {final_sparsity: {a: {b: c}}}")
@example("- !GMPruningModifier {params: {}, final_sparsity: 1}")
@example("- !GMPruningModifier {params: 'RE:', final_sparsity: {0.5: {}}}")
@example("a_stage: {a_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}")
@example("a_modifiers: {SparseGPTModifier: {sparsity: [], targets: []}}")
@example("- !ACDCPruningModifier {end_epoch: 1000000, update_frequency: 1e-300, compression_sparsity: 1}")
@example("- !ACDCPruningModifier {end_epoch: .inf}")
@example("- !GMPruningModifier {mask_type: [true, 4], final_sparsity: 0.5, params: [a]}")
@example("- !GMPruningModifier {mask_type: {}, score_type: [], global_sparsity: {}, final_sparsity: 0.5, params: [a]}")
@example("a: [b]\n- !XModifier")
@example("a: eval()\nmodifiers: [!XModifier {b: eval(a)}]")
@example("a: {b: eval(c)}\nmodifiers: [!XModifier {b: eval(a)}]")
@example("modifiers: [!XModifier {eval(b): 1, 2: 3, ~: 4}]")
def test_any_text_is_a_recipe_or_an_error_with_its_line(text):
    problem = ""
    try:
        recipe, notices = convert(text)
    except ValueError as error:
        problem = str(error)
    if problem:
        assert problem.startswith("line ")
        assert 1 <= int(problem[5:].split(":")[0]) <= len(text.splitlines()) + 1
        return
    assert set(recipe) <= {"epochs", "steps", "training"} or set(recipe) == {"stages"}
    assert notices == sorted(notices, key=lambda notice: (notice.line, notice.key))
    assert all(notice.line >= 1 and notice.key and notice.message for notice in notices)


def test_it_needs_no_fastai():
    code = "import sys; import sparsifai.recipes.sparseml.convert; assert 'fastai' not in sys.modules"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
