import os
import re
import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsifai.axes.schedule import schedules
from sparsifai.recipes.sparseml.convert import Notice, convert


def documented_levels(initial=0.05, final=0.85, start=0, end=20, every=1.0):
    """What SparseML says of GMPruningModifier with inter_func cubic: [(epoch, sparsity after the update there)].

    Plain and slow: initial at the start, an update each `every` epochs, final by the end; between, 1 - (1 - x)^3.
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


RECIPE = """\
# Variables
num_epochs: 30
lr: 1e-3
target: 0.85

training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: eval(num_epochs)

  - !LearningRateFunctionModifier
    start_epoch: 0.0
    end_epoch: eval(num_epochs)
    lr_func: cosine
    init_lr: eval(lr)
    final_lr: 0.0

pruning_modifiers:
  - !GMPruningModifier
    params: ['layer1.0.conv1.weight', 're:layer2.*conv']
    init_sparsity: 0.05
    final_sparsity: eval(target)
    start_epoch: 0.0
    end_epoch: eval(num_epochs * 2 / 3)
    update_frequency: 1.0
    mask_type: unstructured
    leave_enabled: True
"""
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
MARKDOWN = (
    f"<!--\nLicense: of somebody\n--- not here\n-->\n\n---\n{RECIPE}---\n\n# A net\n\nIt is pruned: [so](x).\n---\n- a"
)
STAGES = """\
__metadata__: {made: by hand}
version: 1.1.0
base: &epochs 40
sparsity_stage:
  share: 0.25
  sparsity_modifiers:
    - !MagnitudePruningModifier
      params: __ALL_PRUNABLE__
      init_sparsity: 0
      final_sparsity: 0.9
      inter_func: linear
      start_epoch: eval(base * share)
      end_epoch: *epochs
      update_frequency: -1
  constant_modifiers: []
  other_modifiers:
next_stage:
  share: 0.5
  next_modifiers:
    - !pytorch.EpochRangeModifier {start_epoch: 0, end_epoch: 'eval(max(base, 12 ** 1) * share)'}
"""


def only(text):
    """The one step that a modifier in flow style becomes, and its notices by key."""
    recipe, notices = convert(f"modifiers:\n  - !EpochRangeModifier {{start_epoch: 0, end_epoch: 20}}\n  - {text}\n")
    assert recipe["epochs"] == 20
    assert {notice.line for notice in notices} <= {3}
    (step,) = recipe["steps"] or [None]
    return step, {notice.key: notice.message for notice in notices}


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


@pytest.mark.parametrize("fence", ["---", "+++", "---\r"])
def test_markdown_has_the_same_and_lines_of_the_file(fence):
    recipe, notices = convert(MARKDOWN.replace("\n---\n", f"\n{fence}\n"))
    assert recipe == convert(RECIPE)[0]
    assert [notice.line for notice in notices] == [11 + 6]


def test_a_document_start_is_no_front_matter():
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


COMMON = "start_epoch: 0, end_epoch: 10, update_frequency: 0.5, params: [a.weight], init_sparsity: 0.1"


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8}}", {}),
        (f"!MagnitudePruningModifier {{{COMMON}, final_sparsity: 0.8}}", {}),
        (f"!GlobalMagnitudePruningModifier {{{COMMON}, final_sparsity: 0.8}}", {"context": "global"}),
        (f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8, global_sparsity: True}}", {"context": "global"}),
        (f"!MovementPruningModifier {{{COMMON}, final_sparsity: 0.8}}", {"criteria": "movement_pruning"}),
        (
            f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8, score_type: movement}}",
            {"criteria": "movement_pruning"},
        ),
        (f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8, inter_func: linear}}", {"schedule": "lin"}),
        (f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8, mask_type: block}}", {"granularity": "1x4"}),
        (f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8, mask_type: block4}}", {"granularity": "1x4"}),
        (f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8, mask_type: [2, 4]}}", {"granularity": "2x4"}),
        (
            f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.5, mask_type: '2:4'}}",
            {"context": "2:4", "sparsity": 0.5},
        ),
        (
            f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.5, mask_type: tensorrt}}",
            {"context": "2:4", "sparsity": 0.5},
        ),
        (
            f"!GMPruningModifier {{{COMMON}, final_sparsity: {{0.8: [a.weight, 're:b'], 0.5: ['re:.*']}}}}",
            {"sparsity": {"re:.*": 0.5, "re:b.*": 0.8, "a.weight": 0.8}, "layers": None},
        ),
    ],
)
def test_gradual_modifiers(text, changed):
    expected = {
        "sparsity": 0.8,
        "layers": ["a.weight"],
        "granularity": "weight",
        "context": "local",
        "criteria": "large_final",
        "schedule": "agp",
        "start": 0,
        "end": 10,
        "update_every": 0.5,
        "initial_sparsity": 0.1,
    } | changed
    step, notices = only(text)
    assert step == {"sparsify": {key: value for key, value in expected.items() if value is not None}}
    if isinstance(expected["sparsity"], dict):  # the last that matches counts, in SparseML the first
        assert list(step["sparsify"]["sparsity"]) == list(expected["sparsity"])
    assert list(notices) == (["params"] if expected["layers"] is None else [])


def test_structured_pruning():
    step, notices = only(
        "!StructuredPruningModifier {init_sparsity: 0, final_sparsity: 0.5, start_epoch: 0, end_epoch: 10, "
        "update_frequency: 1, mask_type: channel, param_groups: [[a, b]]}"
    )
    assert "layers" not in step["sparsify"]
    assert (step["sparsify"]["granularity"], step["sparsify"]["pool"]) == ("channel", "l2")
    assert notices.keys() == {"mask_type", "param_groups"}
    step, notices = only("!StructuredPruningModifier {final_sparsity: 0.5, params: [a.weight]}")
    assert step["sparsify"]["granularity"] == "filter"
    assert notices == {}


def test_ac_dc_ends_with_a_sparse_phase():
    acdc = "!ACDCPruningModifier {compression_sparsity: 0.9, start_epoch: 2, end_epoch: %s, update_frequency: 3, "
    acdc += "params: __ALL_PRUNABLE__, momentum_buffer_reset: True}"
    step, notices = only(acdc % 17)
    assert notices.keys() == {"params", "end_epoch", "momentum_buffer_reset"}
    assert step["sparsify"] == {
        "sparsity": 0.9,
        "granularity": "weight",
        "context": "global",
        "criteria": "large_final",
        "schedule": {"ac_dc": {"warm_up": 0.25, "phase": 0.25, "dense": 0.5, "sparse": 0.75}},
        "start": 2,
        "end": 14,
        "update_every": 3,
    }
    for end in (8, 12, 13.5, 14, 15, 17, 19, 20):
        step = only(acdc % end)[0]["sparsify"]
        for tenth in range(int(10 * (step["end"] - step["start"]))):
            # Phases 0, 2, ... are dense, 1, 3, ... are sparse.
            level = schedules["ac_dc"]((tenth / 10) / (step["end"] - step["start"]), **step["schedule"]["ac_dc"])
            assert level == tenth // 30 % 2
        assert level == 1
    acdc = acdc.replace("2, ", "-1, ", 1).replace("momentum_buffer_reset: True", "global_sparsity: False")
    step = only(acdc % 12)[0]["sparsify"]
    assert (step["context"], step["start"]) == ("local", 0)
    with pytest.raises(ValueError, match="line 3: ACDCPruningModifier, update_frequency: expected phases of which"):
        only(acdc % 3)


def test_rigl():
    step, notices = only(
        "!RigLPruningModifier {sparsity: 0.8, start_epoch: 5, end_epoch: 15, update_frequency: 0.1, params: __ALL__, "
        "global_sparsity: True, sparsity_strategy: erdos_renyi, init_update_fraction: 0.25, inter_func: cubic}"
    )
    assert step["sparsify"] == {
        "sparsity": 0.8,
        "layers": ["*"],
        "granularity": "weight",
        "context": "er",
        "criteria": "large_final",
        "schedule": "cos",
        "regrow": "grad",
        "drop": 0.25,
        "decay": {"between": ["cos", 0.25, 0.75]},
        "start": 5,
        "end": 15,
        "update_every": 0.1,
        "initial_sparsity": pytest.approx(0.6),
    }
    assert notices.keys() == {"params", "init_update_fraction", "inter_func"}


def test_constant_pruning_keeps():
    assert only("!ConstantPruningModifier {start_epoch: 0.0, params: __ALL_PRUNABLE__}") == ({"keep": {}}, {})
    assert only("!ConstantPruningModifier") == ({"keep": {}}, {})
    step, notices = only("!ConstantPruningModifier {start_epoch: 3, end_epoch: 9, update_frequency: 1, params: [a]}")
    assert step == {"keep": {}}
    assert notices.keys() == {"start_epoch", "end_epoch", "update_frequency", "params"}


def test_trainable_parameters_and_distillation():
    step, notices = only("!TrainableParamsModifier {params: ['re:features'], trainable: False, end_epoch: 5}")
    assert (step, notices) == ({"freeze": {"layers": ["re:features.*"], "end": 5}}, {})
    step, notices = only("!TrainableParamsModifier {params: __ALL__, trainable: False, params_strict: False}")
    assert step == {"freeze": {"layers": ["*"]}}
    assert notices.keys() == {"params_strict"}
    step, notices = only("!TrainableParamsModifier {params: __ALL__, trainable: True}")
    assert step is None
    assert "left out: params='__ALL__', trainable=True" in notices["TrainableParamsModifier"]
    step, notices = only("!DistillationModifier {hardness: 0.75, start_epoch: 5, distill_output_keys: [logits]}")
    assert step == {
        "distil": {"weight": 0.75, "temperature": 2.0, "schedule": {"between": ["one_shot", 0.25, 1]}},
    }
    assert notices.keys() == {"distill_output_keys"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!SetWeightDecayModifier {start_epoch: 0, weight_decay: 0.01}", "weight decay is left to fastai"),
        ("!SetLearningRateModifier {learning_rate: 0.1}", "left to fastai, such as .*; left out: learning_rate=0.1"),
        ("!QuantizationModifier {start_epoch: 5, submodules: [a, b]}", r"left to torch.*submodules=\['a', 'b'\]"),
        ("!OBSPruningModifier {final_sparsity: 0.9}", "has no counterpart.*final_sparsity=0.9"),
        ("!MFACPruningModifier {final_sparsity: 0.9}", "has no counterpart"),
        ("!LayerThinningModifier {structure_type: filter}", "has no counterpart"),
        ("!GMPrunningModifier {final_sparsity: 0.9}", "is not known here; did you mean 'GMPruningModifier'"),
        ("!GMPruningModifier {final_sparsity: 0.9, score_type: MFAC}", "score_type 'MFAC' has no counterpart"),
        ("!GMPruningModifier {final_sparsity: 0.9, mask_type: [1, -1]}", r"mask_type '\[1, -1\]' has no counterpart"),
        ("!GMPruningModifier {final_sparsity: 0.9, mask_type: odd}", "mask_type 'odd' has no counterpart"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_left_out_and_said(text, message):
    step, notices = only(text)
    assert step is None
    assert len(notices) == 1
    assert re.search(message, notices[text[1 : text.index(" ")]])


@pytest.mark.parametrize("key", ["leave_enabled: False", "log_types: [x]", "odd: 3", "init_sparsity: __FROM_PARAM__"])
def test_each_parameter_that_is_not_carried_over_has_a_notice_of_its_line(key):
    text = (
        f"modifiers:\n  - !GMPruningModifier\n    params: [a]\n    final_sparsity: 0.5\n    end_epoch: 4\n    {key}\n"
    )
    recipe, notices = convert(text)
    assert recipe["steps"][0]["sparsify"].keys() & {"leave_enabled", "log_types", "odd", "initial_sparsity"} == set()
    assert [(notice.line, notice.key) for notice in notices] == [(6, key.split(":")[0])]


def test_epochs():
    assert convert("- !ConstantPruningModifier {end_epoch: 7}")[0] == {"epochs": 7, "steps": [{"keep": {}}]}
    recipe, notices = convert("!ConstantPruningModifier {params: __ALL__}")
    assert recipe == {"steps": [{"keep": {}}]}
    assert notices == [Notice(1, "epochs", notices[0].message)]
    recipe, notices = convert("- !EpochRangeModifier {start_epoch: 2, end_epoch: '7.2', odd: 1}")
    assert recipe == {"epochs": 8, "steps": []}
    assert [notice.key for notice in notices] == ["end_epoch", "odd", "start_epoch"]


def modifiers(*parameters, name="GMPruningModifier"):
    return "modifiers:\n" + "".join(f"  - !{name} {{start_epoch: 0, end_epoch: 9, {each}}}\n" for each in parameters)


def test_modifiers_that_differ_in_sparsity_and_layers_are_one_step():
    text = modifiers("final_sparsity: 0.8, params: [a, b]", "final_sparsity: {0.5: [c], 0.6: [d]}")
    recipe, notices = convert(text)
    (step,) = recipe["steps"]
    assert step["sparsify"]["sparsity"] == {"a": 0.8, "b": 0.8, "d": 0.6, "c": 0.5}
    assert "layers" not in step["sparsify"]
    assert notices == []


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        (
            "final_sparsity: 0.8, params: [a]",
            "final_sparsity: 0.8, params: [b], inter_func: linear",
            "GMPruningModifier",
        ),
        ("final_sparsity: 0.8, params: [a]", "final_sparsity: 0.9, params: [a]", "GMPruningModifier"),
        ("final_sparsity: 0.8, params: [a]", "final_sparsity: 0.9, params: __ALL__", "GMPruningModifier"),
        ("final_sparsity: 0.8, params: [a]", "final_sparsity: 0.9, params: __ALL_PRUNABLE__", "GMPruningModifier"),
        (
            "final_sparsity: 0.8, params: [a, b]",
            "final_sparsity: 0.9, params: [c]",
            "GlobalMagnitudePruningModifier",
        ),
    ],
)
def test_of_modifiers_that_cannot_be_one_step_the_second_is_lost_and_it_is_said(first, second, name):
    recipe, notices = convert(modifiers(first, second, name=name))
    assert [list(step) for step in recipe["steps"]] == [["sparsify"]]
    (notice,) = [notice for notice in notices if notice.key == "sparsify"]
    assert (notice.line, notice.lost) == (3, True)
    assert "cannot be joined with that of line 2" in notice.message


def test_layers_that_are_ranked_globally_one_by_one_are_one_step():
    text = modifiers("final_sparsity: 0.8, params: [a]", "final_sparsity: 0.9, params: [c]")
    recipe, _ = convert(text.replace("GMPruning", "GlobalMagnitudePruning"))
    assert recipe["steps"][0]["sparsify"]["sparsity"] == {"a": 0.8, "c": 0.9}
    assert len(recipe["steps"]) == 1


def test_variables_that_are_no_numbers_and_those_that_nobody_uses():
    text = "mask: block\nnames: [a, b]\nunused: 3\nversion: 1\n" + modifiers(
        "final_sparsity: 0.8, params: eval(names), mask_type: eval(mask)"
    )
    recipe, notices = convert(text)
    assert recipe["steps"][0]["sparsify"]["layers"] == ["a", "b"]
    assert recipe["steps"][0]["sparsify"]["granularity"] == "1x4"
    assert [(notice.line, notice.key) for notice in notices] == [(3, "unused")]


@pytest.mark.parametrize(
    ("expression", "sparseml", "expected"),
    [
        ("re:.*", "re:.*", ["a.weight", "b.0.weight"]),
        ("re:b", "re:b.*", ["b.0.weight"]),
        ("re:a|b", "re:(?:a|b).*", ["a.weight", "b.0.weight"]),
        ("re:.*0.weight$", "re:.*0.weight$", ["b.0.weight"]),
    ],
)
def test_patterns_match_what_they_match_in_sparseml(expression, sparseml, expected):
    from torch import nn

    from sparsifai import Sparsifier

    recipe, _ = convert(modifiers(f"final_sparsity: 0.8, params: ['{expression}']"))
    (pattern,) = recipe["steps"][0]["sparsify"]["layers"]
    assert pattern == sparseml
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 2))})
    assert list(Sparsifier(model, layers=pattern).masks) == expected


# --- Texts that are no recipe, or mean harm --------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = [
    ("", 1, "the recipe is empty"),
    ("# nothing\n", 1, "the recipe is empty"),
    ("just words", 1, "expected the variables and modifiers of a recipe, not 'just words'"),
    ("a: 1\nb: 2", 1, "no modifier of SparseML"),
    ("a: 1\na: 2\n" + RECIPE, 2, "the key 'a' comes a second time, after line 1"),
    (modifiers("params: [a], params: [b], final_sparsity: 0.5"), 2, "the key 'params' comes a second time"),
    ("a:\n\t- b\n", 2, "not YAML that can be read"),
    ("a: b\n\0", 2, "is not allowed"),
    ("a: [1, 2\nb: 3\n", 2, "not YAML that can be read"),
    ("a: 1\n---\nb: 2\n", 2, "not YAML that can be read"),
    ("[" * 100_000, 1, "nested deeper than 20 levels"),
    ("{" * 100_000, 1, "nested deeper than 20 levels"),
    ("- " * 100_000, 1, "nested deeper than 20 levels"),
    ("? " * 100_000, 1, "nested deeper than 20 levels"),
    ("a: 1\n" * 60_000, 1, "characters, more than 250000"),
    ("modifiers:\n" + "- b\n" * 50_000, 19_999, "more than 20000 values"),
    (BOMB, 2, "the alias [*]a stands for no single value"),
    ("a: &a [*a]", 1, "the alias [*]a stands for no single value"),
    ("a: *b", 1, "the alias [*]b stands for no single value"),
    ("a: 1\nb: 9" + "9" * 5000, 2, "is no finite number of up to 40 characters"),
    ("a: .inf", 1, "is no finite number"),
    ("a: !!int many", 1, "'many' is no int"),
    ("a: !!bool perhaps", 1, "'perhaps' is no bool"),
    ("? [a, b]\n: 1", 1, "a key is a single value"),
    ("<<: {a: 1}", 1, "the tag .*merge' is not read here"),
    ("a: !!set {b}", 1, "the tag .*set' is not read here"),
    ("a: !!binary aGk=", 1, "the tag .*binary' is not read here"),
    ("a: 1\nb: !!python/object/apply:os.system ['exit 1']", 2, "the tag .*os.system' is not read here"),
    ("modifiers:\n- !!python/object/new:GMPruningModifier {}", 2, "the tag .* is not read here"),
    ('a: "\\UFFFFFFFF"', 1, "not YAML that can be read"),
    ("%YAML 9" + "9" * 5000 + ".1\n--- a", 1, "not YAML that can be read"),
    ("modifiers:\n  - GMPruningModifier:\n      end_epoch: 3", 2, "expected a modifier of SparseML.*not .'GMPruning"),
    ("modifiers: many", 1, "expected the variables and modifiers"),
    ("modifiers:\n  - !GMPruningModifier [a]", 2, "is followed by its parameters"),
    (
        modifiers("final_sparsity: 85, params: [a]"),
        2,
        "GMPruningModifier, final_sparsity: expected a fraction .* not 85",
    ),
    (modifiers("final_sparsity: much, params: [a]"), 2, "expected a number, not 'much'"),
    (modifiers("params: [a]"), 2, "final_sparsity: expected the sparsity to end with"),
    (modifiers("final_sparsity: 0.5"), 2, "params: expected names of parameters, not None"),
    (modifiers("final_sparsity: 0.5, params: []"), 2, "params: expected at least one name"),
    (modifiers("final_sparsity: {}"), 2, "final_sparsity: expected fractions with names"),
    (modifiers("final_sparsity: 0.5, params: ['re:(a']"), 2, "'re:[(]a' is no regular expression"),
    (modifiers("final_sparsity: 0.5, params: [a], inter_func: cubik"), 2, "inter_func: .*did you mean 'cubic'"),
    (modifiers("final_sparsity: eval(target), params: [a]"), 2, "final_sparsity: .*undefined name 'target'"),
    ("a: eval(b)\nb: eval(a)\n" + modifiers("final_sparsity: eval(a)"), 4, "depend on themselves: a -> b -> a"),
    (modifiers("final_sparsity: eval(9**9**9)"), 2, "the exponent 387420489 is beyond 100"),
    ("- !GMPruningModifier {final_sparsity: 0.5, params: [a],\n start_epoch: 5, end_epoch: 5}", 2, "is not after"),
    ("- !EpochRangeModifier {end_epoch: 1e9}", 1, "expected a number up to 1e[+]06"),
    ("- !EpochRangeModifier {end_epoch: [1]}", 1, "expected a number, not '.1.'"),
]


@pytest.mark.parametrize(("text", "line", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_what_is_refused_at_once_and_by_its_line(text, line, message):
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=f"line {line}: .*{message}"):
        convert(text)
    assert time.perf_counter() - begun < 10


def test_a_text_is_a_text():
    with pytest.raises(TypeError, match="the text of a recipe is a str, not bytes"):
        convert(RECIPE.encode())


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
    # They would make the directory, were they run.
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


@settings(max_examples=300, deadline=2000)
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
    assert set(recipe) <= {"epochs", "steps"}
    assert notices == sorted(notices, key=lambda notice: (notice.line, notice.key))
    assert all(notice.line >= 1 and notice.key and notice.message for notice in notices)


def test_it_needs_no_fastai():
    code = "import sys; import sparsifai.sparseml; assert 'fastai' not in sys.modules"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
