"""The forms in which recipes of SparseML and llm-compressor come: read, or refused with a line and a reason."""

import os
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from work import at_most_calls

from sparsifai import Recipe, criteria
from sparsifai.recipes.sparseml.convert import convert
from sparsifai.recipes.step import OPTIONS

pytestmark = pytest.mark.filterwarnings("ignore:.*no counterpart and would change the model")


@pytest.fixture(autouse=True)
def second_order(monkeypatch):
    """The criteria and the option that converted recipes name, if the library does not have them."""
    for name in ("obs", "sparsegpt"):
        if name not in criteria:

            def criterion(weight, block_size=50, damping=1e-7):
                return weight.abs()

            criterion.__name__ = name
            criteria.register(criterion)
    if "compensate" not in OPTIONS["sparsify"]:
        monkeypatch.setitem(OPTIONS, "sparsify", (*OPTIONS["sparsify"], "compensate"))


# Form -> its text, the kinds of steps of each stage, and the keys of what is lost.
FORMS = {
    "modifiers in one list": (
        "modifiers:\n- !EpochRangeModifier {start_epoch: 0, end_epoch: 4}\n"
        "- !GMPruningModifier {init_sparsity: 0, final_sparsity: 0.8, start_epoch: 0, end_epoch: 3, "
        "update_frequency: 0.5, params: __ALL_PRUNABLE__}\n- !DistillationModifier {hardness: 1.0, temperature: 2.0}\n",
        [["sparsify", "distil"]], [],
    ),
    "anchors of numbers, lists and mappings": (
        "epochs: &epochs 8\nmilestones: &milestones [3, 6]\nmask: &mask [1, 4]\ntargets: &targets\n"
        "  0.9: ['re:body.*weight']\n  0.8: [head.weight]\n"
        "modifiers:\n- !EpochRangeModifier {end_epoch: *epochs}\n"
        "- !LearningRateModifier {lr_class: MultiStepLR, lr_kwargs: {milestones: *milestones}, init_lr: 0.1}\n"
        "- !GMPruningModifier {params: [], final_sparsity: *targets, init_sparsity: 0.05, start_epoch: 1, "
        "end_epoch: 6, update_frequency: 0.5, mask_type: *mask}\n",
        [["sparsify"]], [],
    ),
    "variables of variables": (
        "rounds: 6\nfirst: eval(rounds / 3)\nlast: eval(first * 2)\nnames: [a.weight]\n"
        "pruning_modifiers:\n- !MagnitudePruningModifier {init_sparsity: 0.1, final_sparsity: 0.7, "
        "params: eval(names), start_epoch: eval(first), end_epoch: eval(last), update_frequency: -1.0}\n",
        [["sparsify"]], [],
    ),
    "groups with ends of their own": (
        "modifiers:\n- !EpochRangeModifier {end_epoch: 10}\n"
        "- !GMPruningModifier {final_sparsity: 0.9, start_epoch: 0, end_epoch: 5, params: [a.weight]}\n"
        "- !GMPruningModifier {final_sparsity: 0.9, start_epoch: 2, end_epoch: 9, params: [b.weight]}\n",
        [["sparsify", "sparsify"]], [],
    ),
    "second order and a teacher": (
        "modifiers:\n- !OBSPruningModifier {init_sparsity: 0.7, final_sparsity: 0.9, start_epoch: 2, end_epoch: 26, "
        "update_frequency: 4.0, params: ['re:encoder.*.weight'], num_grads: 1024, damp: 1e-7, fisher_block_size: 50}\n"
        "distillation_modifiers:\n- !DistillationModifier {hardness: 1.0, distill_output_keys: [start, end]}\n",
        [["sparsify", "distil"]], ["distill_output_keys"],
    ),
    "pruned and then quantized in training": (
        "modifiers:\n- !EpochRangeModifier {end_epoch: 10}\n"
        "- !GMPruningModifier {final_sparsity: 0.8, start_epoch: 0, end_epoch: 6, params: __ALL_PRUNABLE__}\n"
        "- !QuantizationModifier {start_epoch: 8, disable_quantization_observer_epoch: 9, freeze_bn_stats_epoch: 9}\n",
        [["sparsify", "quantize"]], [],
    ),
    "one stage in one shot": (
        "sample_stage:\n  obcq_modifiers:\n    SparseGPTModifier:\n      sparsity: 0.5\n      block_size: 128\n"
        "      sequential_update: False\n      mask_structure: '0:0'\n      targets: ['re:model.layers.\\d+$']\n",
        [["sparsify"]], [],
    ),
    "one-shot, train, one-shot": (
        "prune_stage:\n  run_type: oneshot\n  prune_modifiers:\n"
        "    WandaPruningModifier: {mask_structure: '2:4', sparsity: 0.5}\n"
        "recover_stage:\n  run_type: train\n  recover_modifiers:\n"
        "    ConstantPruningModifier: {targets: ['re:.*proj.weight'], start: 0}\n"
        "    OutputDistillationModifier: {targets: ['re:layers.*'], comparison: square_head, start: 0}\n"
        "int_stage:\n  run_type: oneshot\n  int_modifiers:\n"
        "    GPTQModifier: {ignore: [lm_head], config_groups: {a: {weights: {num_bits: 4}, targets: [Linear]}}}\n",
        [["sparsify"], ["keep", "distil"], ["quantize"]], ["GPTQModifier", "GPTQModifier", "targets"],
    ),
    "run types from the names of stages": (
        "my_oneshot_stage:\n  a_modifiers:\n    SparseGPTModifier: {sparsity: 0.7, targets: [blocks.0]}\n"
        "my_train_stage:\n  b_modifiers:\n    ConstantPruningModifier: {targets: __ALL__, start: 0}\n",
        [["sparsify"], ["keep"]], [],
    ),
    "modifiers without tags at the top": (
        "warm: 2\npruning_modifiers:\n  MagnitudePruningModifier:\n    targets: __ALL_PRUNABLE__\n"
        "    init_sparsity: 0.05\n    final_sparsity: 0.8\n    start: eval(warm)\n    end: eval(warm + 6)\n"
        "    update_frequency: 0.5\n    mask_structure: unstructured\n    leave_enabled: True\n",
        [["sparsify"]], [],
    ),
    "a list of modifiers without tags": (
        "pruning_modifiers:\n- ConstantPruningModifier:\n    targets: __ALL__\n    start: 0\n",
        [["keep"]], [],
    ),
    "stages under one key, one of them disabled": (
        "stages:\n  first:\n    a_modifiers: {SparseGPTModifier: {sparsity: 0.5, targets: [Linear]}}\n"
        "  second:\n    enabled: False\n    b_modifiers: {ConstantPruningModifier: {targets: __ALL__}}\n",
        [["sparsify"]], [],
    ),
    "classes and names that are ignored": (
        "a_stage:\n  a_modifiers:\n    SparseGPTModifier: {sparsity: 0.5, mask_structure: '2:4', targets: [Linear],\n"
        "      ignore: ['re:.*head', SomeNorm]}\n"
        "    QuantizationModifier: {ignore: [head], scheme: FP8, targets: Linear}\n",
        [["sparsify", "quantize"]], ["QuantizationModifier"],
    ),
    "preparations of quantization": (
        "a_stage:\n  a_modifiers:\n    SmoothQuantModifier: {smoothing_strength: 0.5}\n"
        "    SparseGPTModifier: {sparsity: [0.5, 0.6], targets: [layers.0, layers.1]}\n"
        "    QuantizationModifier: {scheme_overrides: {Embedding: {weights: {num_bits: 8}}}}\n",
        [["sparsify", "quantize"]], ["SmoothQuantModifier"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_and_written(form, tmp_path):
    text, kinds, lost = FORMS[form]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    recipe = Recipe.from_sparseml(path)
    assert [[step.kind for step in stage.steps] for stage in recipe.stages] == kinds
    assert sorted(notice.key for notice in recipe.notices if notice.lost) == lost
    assert not any("nothing in the recipe uses" in notice.message for notice in recipe.notices)
    assert Recipe.loads(recipe.dumps()) == recipe
    assert [Recipe.loads(stage.dumps()) for stage in recipe.stages] == list(recipe.stages)


def test_stages_say_whether_they_train():
    (recipe, _), (other, _) = (
        convert(FORMS["one-shot, train, one-shot"][0], 3),
        convert(FORMS["run types from the names of stages"][0]),
    )
    stages = recipe["stages"]
    assert [stage["name"] for stage in stages] == ["prune", "recover", "int"]
    assert [stage.get("training", True) for stage in stages] == [False, True, False]
    assert [stage.get("epochs") for stage in stages] == [None, 3, None]
    assert [stage.get("training", True) for stage in other["stages"]] == [False, True]
    assert stages[0]["steps"] == [
        {"sparsify": {"sparsity": 0.5, "granularity": "weight", "context": "2:4", "criteria": "wanda"}}
    ]
    assert stages[2]["steps"] == [{"quantize": {"exclude": ["lm_head"]}}]


def one_shot(parameters, name="SparseGPTModifier"):
    recipe, notices = convert(f"a_stage:\n  a_modifiers:\n    {name}: {{{parameters}}}\n")
    assert recipe["training"] is False
    return recipe["steps"][0]["sparsify"], {notice.key: notice.lost for notice in notices}


def test_one_shot_modifiers():
    step, notices = one_shot("sparsity: 0.5, targets: [a.0, 're:b$', Linear], ignore: [head, Linear, RMSNorm]")
    assert step == {
        "sparsity": 0.5, "layers": ["a.0", "re:b$", "class:Linear"], "exclude": ["head", "class:Linear"],
        "granularity": "weight", "context": "local", "criteria": "sparsegpt", "compensate": True,
    }  # fmt: skip
    assert notices == {"ignore": False}
    step, notices = one_shot("sparsity: 0.6", "WandaPruningModifier")
    assert (step["context"], step["criteria"], step["sparsity"]) == ("per_output", "wanda", 0.6)
    assert notices == {"WandaPruningModifier": False}
    # N of N:M are pruned, in SparseML and SparseGPT; here N stay.
    step, _ = one_shot("sparsity: 0.5, mask_structure: '1:4', targets: [a]")
    assert (step["context"], step["sparsity"]) == ("3:4", 0.25)
    step, notices = one_shot("sparsity: [0.5, 0.7], targets: [a, b], sparsity_profile: owl, owl_m: 5, owl_lmbda: 0.08")
    assert (step["sparsity"], notices) == ({"a": 0.5, "b": 0.7}, {"sparsity_profile": True})
    step, notices = one_shot("sparsity: 0.5, targets: [a], quantize: {QuantizationModifier: {}}")
    assert notices == {"quantize": True}


def test_what_needs_training_has_a_notice_in_a_stage_that_is_applied():
    recipe, notices = convert(
        "a_stage:\n  run_type: oneshot\n  a_modifiers:\n    EpochRangeModifier: {end_epoch: 3}\n"
        "    MagnitudePruningModifier: {init_sparsity: 0.1, final_sparsity: 0.5, start: 0, end: 3, targets: [a]}\n"
        "    DistillationModifier: {hardness: 0.5}\n"
    )
    assert recipe["steps"] == [
        {"sparsify": {"sparsity": 0.5, "layers": ["a"], "granularity": "weight", "context": "local",
                      "criteria": "large_final"}}
    ]  # fmt: skip
    assert [(notice.key, notice.lost) for notice in notices] == [
        ("EpochRangeModifier", False), ("end", False), ("init_sparsity", False), ("DistillationModifier", True),
    ]  # fmt: skip


def test_layers_of_a_class_are_pruned():
    from torch import nn

    text = "a_modifiers: {SparseGPTModifier: {sparsity: 0.5, targets: Linear}}"
    recipe = Recipe(convert(text)[0])
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    content = recipe.steps[0].options | {"criteria": "large_final"}
    content.pop("compensate")
    sparsifier = Recipe({"training": False, "steps": [{"sparsify": content}]}).apply(model)
    assert list(sparsifier.masks) == ["2.weight"]


def test_the_outputs_of_layers_are_distilled():
    text = (
        "a_modifiers:\n  OutputDistillationModifier: {targets: [a, [b, c]], comparison: l2_distance, orig_scale: 0.5, "
        "distill_scale: 2, start: 1, end: 4}\n"
    )
    recipe, notices = convert(text)
    assert recipe["steps"] == [
        {"distil": {"weight": 0, "features": {"a": "a", "b": "c"}, "feature_weight": 4.0,
                    "schedule": {"between": ["one_shot", 0.25, 1]}}}
    ]  # fmt: skip
    assert notices == []
    assert [notice.lost for notice in convert(text.replace("l2_distance", "square_head"))[1]] == [True]


def test_quantization_that_is_not_int8_is_lost():
    def lost(parameters, name="QuantizationModifier"):
        return [n.message for n in convert(f"a_modifiers:\n  {name}: {{{parameters}}}\n")[1] if n.lost]

    assert lost("scheme: W8A8") == lost("scheme: {weights: {num_bits: 8}}") == lost("start: 0, end: 3") == []
    assert lost("scheme: W4A16") == ["weights become int8, not 'W4A16'"]
    assert lost("scheme: {W4A16: [Linear]}") == ["weights become int8, not 'W4A16'"]
    assert lost("config_groups: {a: {weights: {num_bits: 8, type: float}}}") == ["weights become int8, not 'float'"]
    assert lost("weight_bits: 4") == ["weights become int8, not '4 bits'"]
    assert len(lost("scheme: W8A8", "GPTQModifier")) == len(lost("scheme: W8A8", "AWQModifier")) == 1
    step = convert("- !EpochRangeModifier {end_epoch: 5}\n- !QuantizationModifier {start_epoch: 3, submodules: [a, b]}")
    assert step[0]["steps"] == [{"quantize": {"layers": ["a", "b"], "start": 3}}]


# --- Any recipe -------------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from([0, 1, 0.5, -1, 3, 0.85, 1.0, 1e9, -0.1, "0.5", "eval(a)", "eval(a / 0)", None, [], {}, "x"])
NAMES = st.sampled_from(
    ["__ALL__", "__ALL_PRUNABLE__", "Linear", "a.weight", "re:.*weight", "re:(", ["a", "b"], [], ["a", ["b"]], 3, None]
)
PARAMETERS = {
    **dict.fromkeys(("start_epoch", "end_epoch", "start", "end", "update_frequency", "update"), NUMBERS),
    **dict.fromkeys(("init_sparsity", "sparsity", "compression_sparsity", "forward_sparsity"), NUMBERS),
    **dict.fromkeys(("backward_sparsity", "init_update_fraction", "hardness", "temperature"), NUMBERS),
    **dict.fromkeys(("orig_scale", "distill_scale", "weight_bits", "num_bits"), NUMBERS),
    "final_sparsity": st.one_of(NUMBERS, st.just({0.5: ["a"], 0.9: ["b"]}), st.just({2: "a"})),
    **dict.fromkeys(("params", "targets", "ignore", "submodules", "distill_output_keys"), NAMES),
    **dict.fromkeys(("mask_type", "mask_structure"), st.sampled_from(
        ["unstructured", "2:4", "0:0", "block4", "block_1,4", "filter", "tensorrt", [1, 4], [0], "4:2", "odd", None])),
    **dict.fromkeys(("inter_func", "update_scheduler"), st.sampled_from(
        ["linear", "cubic", "inverse_cubic", "polynomial_decay", "multi_step", "calc(index)", "odd", None, []])),
    "scheduler_args": st.sampled_from([{"exponent": 3}, {"exponent": "x"}, [], None, 3]),
    "sparsity_strategy": st.sampled_from(["uniform", "erdos_renyi", "odd", None]),
    "score_type": st.sampled_from(["magnitude", "movement", "MFAC", None, []]),
    "comparison": st.sampled_from(["l2_distance", "square_head", None, []]),
    **dict.fromkeys(("scheme", "config_groups", "quantize"), st.sampled_from(
        ["W8A8", {"weights": {"num_bits": 4}}, {"a": {"weights": None}}, {"W4A16": ["Linear"]}, [], True, None])),
    **dict.fromkeys(("phased", "leave_enabled", "global_sparsity", "trainable", "apply_globally"),
                    st.sampled_from([True, False, None, "x"])),
}  # fmt: skip
MODIFIERS = [
    "GMPruning", "MagnitudePruning", "GlobalMagnitudePruning", "MovementPruning", "StructuredPruning", "OBSPruning",
    "MFACPruning", "ACDCPruning", "RigLPruning", "TopKASTPruning", "ConstantPruning", "LegacyGMPruning", "SparseGPT",
    "WandaPruning", "TrainableParams", "Distillation", "OutputDistillation", "Quantization", "LegacyQuantization",
    "GPTQ", "AWQ", "SmoothQuant", "EpochRange", "SetLearningRate", "LayerPruning", "Odd",
]  # fmt: skip


GRADUAL = {"init_sparsity": 0.1, "final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 2, "params": ["a", "re:b"]}
# Modifier -> parameters with which it is read.
WHOLE = {
    **dict.fromkeys((name for name in MODIFIERS if name.endswith("Pruning")), GRADUAL),
    "ACDCPruning": {"compression_sparsity": 0.8, "end_epoch": 3, "update_frequency": 0.5, "params": "__ALL__"},
    "TopKASTPruning": {"forward_sparsity": 0.8, "backward_sparsity": 0.5, "params": "__ALL_PRUNABLE__"},
    **dict.fromkeys(("SparseGPT", "WandaPruning"), {"sparsity": 0.5, "targets": ["Linear"]}),
    "TrainableParams": {"trainable": False, "params": ["a"]},
    "OutputDistillation": {"targets": ["a"], "start": 0},
    "EpochRange": {"end_epoch": 4},
}


@st.composite
def modifier_of(draw):
    """The name of a modifier, and its parameters: random ones, or those of `WHOLE` with a few random ones."""
    name = draw(st.sampled_from(MODIFIERS))
    whole = WHOLE.get(name, {}) if draw(st.integers(0, 3)) else {}
    keys = draw(st.lists(st.sampled_from([*PARAMETERS]), max_size=1 if whole else 5, unique=True))
    return f"{name}Modifier", {**whole, **{key: draw(PARAMETERS[key]) for key in keys}}


groups = st.lists(modifier_of(), max_size=3).map(dict)


def written(value):
    """A value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(key)}: {written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    return "null" if value is None else f"'{value}'" if isinstance(value, str) else str(value)


def untagged(group, indent):
    return "".join(f"{indent}{name}: {written(values)}\n" for name, values in group.items())


@st.composite
def recipes(draw):
    """A recipe of either form, or of both."""
    text = draw(st.sampled_from(["", "a: 0.5\n", "a: &a [1, 2]\nb: *a\n"]))
    tagged = draw(st.lists(modifier_of(), max_size=3))
    if tagged:
        text += "pruning_modifiers:\n" + "".join(f"- !{name} {written(values)}\n" for name, values in tagged)
    for number, group in enumerate(draw(st.lists(groups, max_size=3))):
        run_type = draw(st.sampled_from(["", "  run_type: train\n", "  run_type: oneshot\n", "  enabled: False\n"]))
        text += f"number{number}_stage:\n{run_type}  some_modifiers:\n{untagged(group, '    ')}"
    if draw(st.booleans()):
        text += f"other_modifiers:\n{untagged(draw(groups), '  ')}"
    return text


@settings(max_examples=120, deadline=None)
@given(recipes(), st.sampled_from([None, 3]))
def test_any_recipe_is_read_or_refused_with_its_line(text, epochs):
    with at_most_calls(2_000_000):
        problem = ""
        try:
            content, notices = convert(text, epochs)
            recipe = Recipe(content) if content.get("steps") or content.get("stages") else None
        except ValueError as error:
            problem = str(error)
    if problem:
        assert re.match(r"line \d+: ", problem)
        assert int(problem[5:].split(":")[0]) <= len(text.splitlines()) + 1
        return
    assert all(1 <= notice.line <= len(text.splitlines()) for notice in notices)
    if recipe is not None:
        assert Recipe.loads(recipe.dumps()) == recipe
        assert all(stage.training or stage.epochs is None for stage in recipe.stages)


# --- The real ones ----------------------------------------------------------------------------------------------------

CHECKOUT = "SPARSEML_CHECKOUT"
PRUNES = re.compile("Prun|SparseGPT|Wanda")

# Why a recipe of the repository that prunes is not read.
REASONS = (
    "must stand for a value that is complete above it",  # an alias that nothing defines, for SparseML neither
    "no variable is defined",  # variables that are given on its command line
    "the text has no modifier of SparseML",  # a file of settings that holds or names a recipe
)


@pytest.mark.skipif(CHECKOUT not in os.environ, reason=f"${CHECKOUT} does not name a checkout of neuralmagic/sparseml")
def test_the_recipes_of_the_repository_are_read():
    found, refused = Counter(), {}
    for path in sorted(Path(os.environ[CHECKOUT]).rglob("*")):
        if path.suffix not in (".md", ".yaml", ".yml") or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        header = re.search(r"^---\n(.*?)^---", text, re.DOTALL | re.MULTILINE) if path.suffix == ".md" else None
        text = header[1] if header else text if path.suffix != ".md" else ""
        text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        if "odifiers" not in text or not PRUNES.search(text):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                recipe = Recipe.from_sparseml(path, epochs=3)
        except ValueError as error:
            refused[str(error)] = path
            continue
        steps = [step.kind for stage in recipe.stages for step in stage.steps]
        assert {"sparsify", "keep"} & {*steps}, path
        assert Recipe.loads(recipe.dumps()) == recipe
        found["read with losses" if any(notice.lost for notice in recipe.notices) else "read"] += 1
    assert [error for error in refused if not any(reason in error for reason in REASONS)] == []
    assert found["read"] + found["read with losses"] >= 10 * len(refused)
