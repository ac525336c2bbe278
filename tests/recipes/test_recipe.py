"""Recipes: what is read, what it makes, and what is refused."""

import inspect
import re
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsifai import Recipe, Sparsifier, between, iterative, raised
from sparsifai.__main__ import main
from sparsifai.recipes.step import WORDS

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))

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


def sparsify(**options):
    return Recipe({"epochs": 10, "steps": [{"sparsify": {"sparsity": 0.8, **options}}]})


def schedule_of(recipe):
    return recipe._arguments(recipe.steps[0])["schedule"]


# --- What it says -------------------------------------------------------------------------------------------------


def test_expressions_axes_and_times():
    recipe = Recipe.loads(TEXT)
    assert recipe.variables == {"target": 0.8, "half": 0.4}
    assert recipe.epochs == 8
    first, second, third, fourth = (recipe._arguments(step) for step in recipe.steps)
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


def test_the_sparsity_begins_and_is_updated_as_it_says():
    recipe = sparsify(schedule="lin", start=2, end=6, initial_sparsity=0.2, update_every=2)
    schedule = raised(schedule_of(recipe), 0.2 / 0.8)  # as the callback does
    assert [0.8 * schedule(epoch / 10) for epoch in range(11)] == pytest.approx([0, 0, 0.2, 0.2, 0.5, 0.5, *[0.8] * 5])


def test_values_of_an_axis_within_values():
    recipe = sparsify(schedule={"between": {"schedule": {"iterative": 5}, "start": 0.1, "end": 0.8}})
    assert schedule_of(recipe) == between(iterative(5), 0.1, 0.8)
    assert schedule_of(sparsify(schedule={"stepped": [{"between": ["lin", 0, 0.5]}, 4]}))(0.3) == 0.5
    recipe = sparsify(context={"bounded": [{"blocks": 4}, {"0": 0.5}]}, granularity=("out", "in"))
    assert recipe._arguments(recipe.steps[0])["context"].context.__name__ == "blocks(4)"


def test_without_times_it_is_the_callbacks_own_default():
    assert schedule_of(sparsify()) == between("agp", 0, 0.75)
    assert schedule_of(sparsify(end="50%")) == between("agp", 0, 0.5)


@pytest.mark.fastai
def test_the_words_of_a_step_are_those_of_its_callback():
    pytest.importorskip("fastai", reason="the callbacks need fastai")
    from sparsifai import DistillCallback, FreezeCallback, RegularizeCallback, SparsifyCallback

    kinds = {
        "sparsify": SparsifyCallback,
        "regularize": RegularizeCallback,
        "distil": DistillCallback,
        "freeze": FreezeCallback,
    }
    # What a file cannot say: functions and data; and another name of one of the words.
    left_out = {"teacher", "loss", "feature_loss", "calibration", "compression_ratio"}
    for kind, callback in kinds.items():
        words = set(inspect.signature(callback).parameters) - left_out
        assert words == set(WORDS[kind]) - ({"update_every"} if kind == "freeze" else {"start", "end", "update_every"})


# --- Files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_read_and_saved(path, tmp_path):
    recipe = Recipe.load(path)
    recipe.save(tmp_path / "again.yaml")
    assert Recipe.load(tmp_path / "again.yaml") == recipe
    assert len(EXAMPLES) == 4


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)
fractions = st.floats(0, 1, allow_subnormal=False)
times = st.one_of(st.integers(0, 4), st.integers(0, 49).map("{}%".format))
later = st.one_of(st.integers(6, 9), st.integers(60, 100).map("{}%".format))
sparsities = st.one_of(fractions, st.dictionaries(words.filter(bool), fractions, min_size=1, max_size=3))
schedules = st.sampled_from(
    ["lin", "agp", {"iterative": 4}, {"between": ["cos", 0.2, 0.8]}, {"one_cycle": {"beta": 5}}]
)
steps = st.fixed_dictionaries(
    {"sparsify": st.fixed_dictionaries({"sparsity": sparsities}, optional={
        "context": st.sampled_from(["local", "erk", "2:4", {"blocks": 8}]), "schedule": schedules, "start": times,
        "end": later, "layers": st.lists(words.filter(bool), min_size=1, max_size=2), "every": st.integers(1, 50),
    })},
)  # fmt: skip
contents = st.fixed_dictionaries(
    {"epochs": st.just(10), "steps": st.lists(steps, min_size=1, max_size=1)},
    optional={"name": words, "description": words, "variables": st.dictionaries(st.sampled_from("abc"), fractions),
              "results": st.dictionaries(words, st.one_of(words, fractions, st.none(), st.booleans()))},
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(contents)
def test_saved_and_loaded_it_is_the_same(content):
    recipe = Recipe(content)
    again = Recipe.loads(recipe.dumps())
    assert again == recipe
    assert again.dumps() == recipe.dumps()
    assert again.steps == recipe.steps


# --- What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the recipe is empty"),
        ("- a", "line 1: a recipe is a mapping"),
        ("steps: []", "line 1: steps: steps is a list of what is done"),
        ("epochs: 3\nstep: []", "line 2: step: unknown 'step'; did you mean 'steps'"),
        ("steps:\n- sparsfy: {}", "line 2: steps.0.sparsfy: unknown 'sparsfy'; did you mean 'sparsify'"),
        (
            "steps:\n- sparsify:\n    sparsty: 0.5",
            r"line 3: steps.0.sparsify.sparsty: unknown 'sparsty'; did you mean 'sparsity'",
        ),
        ("steps:\n- sparsify: {}", "line 2: steps.0.sparsify: sparsify needs sparsity"),
        ("steps:\n- sparsify: {sparsity: 80}", "line 2: steps.0.sparsify.sparsity: sparsity 80 is .* pass 0.8"),
        ("steps:\n- sparsify: {sparsity: half}", "line 2: .* sparsity is a number from 0 to 1"),
        (
            "steps:\n- sparsify:\n    sparsity: 0.5\n    context: globl",
            "line 4: .*unknown context 'globl'; did you mean 'global'",
        ),
        (
            "steps:\n- sparsify:\n    sparsity: 0.5\n    schedule: {iterativ: 3}",
            "line 4: .*unknown schedule 'iterativ'; did you mean 'iterative'",
        ),
        (
            "steps:\n- sparsify:\n    sparsity: 0.5\n    schedule: {iterative: 3.5}",
            "line 4: .*n is the number of steps",
        ),
        ("steps:\n- sparsify:\n    sparsity: 0.5\n    schedule: {one_cycle: {gamma: 3}}", "line 4: .*gamma"),
        ("steps:\n- sparsify:\n    sparsity: 0.5\n    schedule: 7", "line 4: .*schedule is a name"),
        ("steps:\n- sparsify:\n    sparsity: 0.5\n    start: 2", "line 4: .*2 epochs of how many. give epochs:"),
        (
            "epochs: 4\nsteps:\n- sparsify:\n    sparsity: 0.5\n    start: soon",
            "line 5: .*a time is in epochs, or a share",
        ),
        (
            "epochs: 4\nsteps:\n- sparsify:\n    sparsity: 0.5\n    start: 3\n    end: 2",
            "line 6: .*start is before end",
        ),
        ("epochs: 4\nsteps:\n- sparsify:\n    sparsity: 0.5\n    end: 5", "line 5: .*end within training"),
        (
            "epochs: 4\nsteps:\n- sparsify:\n    sparsity: 0.5\n    initial_sparsity: 0.6",
            "line [35]: .*up to the sparsity",
        ),
        ("epochs: 0\nsteps: [keep]", "line 1: epochs: epochs is a whole number from 1 on"),
        ("steps: [keep, keep]", "line 1: steps.1.keep: a second keep step"),
        (
            "steps:\n- sparsify: {sparsity: 0.5}\n- sparsify: {sparsity: 0.5}",
            "line 3: .*a second sparsify step: in one fit there is one",
        ),
        ("variables: {a: b}\nsteps: [keep]", "line 1: variables.a: the variable a is a number or an expression"),
        ("variables: {2: 3}\nsteps: [keep]", "line 1: variables.2: 2 is no name of a variable"),
        ("steps:\n- sparsify: {sparsity: '${target}'}", "line 2: .*target"),
        ("steps:\n- keep: {now: 1}", "line 2: steps.0.keep.now: unknown 'now'"),
        ("steps:\n- regularize: {weight: -1}", "line 2: .*weight is a number from 0 on"),
        ("steps:\n- freeze: {layers: []}", "line 2: .*layers are names or globs"),
        ("steps: [3]", "line 1: steps.0: a step is one of sparsify, keep"),
        ("epochs: 2.5\nsteps: [keep]", "line 1: epochs: epochs is a whole number from 1 on, not 2.5"),
        ("epochs: 4\nsteps:\n- sparsify:\n    sparsity: 0.5\n    update_every: 0", "line 5: .*update_every is above 0"),
        ("steps:\n- sparsify:\n    layers: 5\n    sparsity: 0.5", "line 3: .*layers are names or globs"),
        ("steps:\n- sparsify:\n    layers: 're:('\n    sparsity: 0.5", "line 3: .*is no regular expression"),
        ("steps:\n- sparsify:\n    layers: 're:(a+)+b'\n    sparsity: 0.5", "line 3: .*repeats what is repeated"),
        ("steps:\n- sparsify:\n    every: 0\n    sparsity: 0.5", "line 3: .*every is a whole number from 1 on"),
        ("steps:\n- sparsify:\n    drop: 2\n    sparsity: 0.5", "line 3: .*drop is the share"),
        ("steps:\n- sparsify:\n    drop: 0.2\n    sparsity: 0.5", "line 2: .*nothing says what comes back"),
        ("steps:\n- sparsify:\n    pool: meen\n    sparsity: 0.5", "line 3: .*did you mean 'mean'"),
        ("steps:\n- sparsify:\n    may_empty: 3\n    sparsity: 0.5", "line 3: .*true or false, not 3"),
        ("steps:\n- sparsify:\n    context: 2:3:4\n    sparsity: 0.5", "line 3: .*unknown context '2:3:4'"),
        ("steps:\n- distil:\n    weight: 2", "line 2: .*weight is a number from 0 to 1"),
        ("steps:\n- distil:\n    temperature: 0", "line 3: .*temperature is a number above 0"),
        ("a: 1\na: 2", "line 2: the key 'a' comes a second time"),
        ("a: &x [1]\nb: *x", "line 2: .*the alias .x stands for no single value"),
        ("a: !!python/name:os.system", "line 1: the tag .* is not read"),
        ("a: [1", "line 1: "),
    ],
)  # fmt: skip
def test_errors_name_the_line_the_key_and_what_was_expected(text, message):
    with pytest.raises(ValueError, match=message):
        Recipe.loads(text)


HOSTILE = {
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "deep": "[" * 100_000,
    "deep mapping": "\n".join(" " * level + "a:" for level in range(500)),
    "long": "a: " + "x" * 2_000_000,
    "huge number": "epochs: " + "9" * 5000,
    "huge hexadecimal": "epochs: 0x" + "f" * 5000,
    "infinite": "epochs: .inf",
    "power": "epochs: ${9**9**9**9}\nsteps: [keep]",
    "python": "!!python/object/apply:os.system ['touch TOUCHED']",
    "python in a value": "steps:\n- sparsify: {sparsity: !!python/object/apply:os.system ['touch TOUCHED']}",
    "import": "epochs: ${__import__('os').system('touch TOUCHED')}\nsteps: [keep]",
    "attribute": "variables: {a: 1}\nepochs: ${a.__class__}\nsteps: [keep]",
    "nul": "a: \x00",
    "merge": "<<: {steps: [keep]}",
    "many": "steps: [" + "keep," * 200_000 + "]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_quickly_and_run_no_code(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = time.process_time()
    with pytest.raises(ValueError, match=r"\w"):
        Recipe.loads(HOSTILE[name])
    assert time.process_time() - began < 10
    assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_broken_file_is_a_value_error_and_nothing_else(data):
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


def test_blocks_and_times_without_quotes_and_the_beginning_without_epochs():
    recipe = Recipe.loads("steps:\n- sparsify: {sparsity: 0.5, context: 2:4, start: 0, end: 50%}")
    assert recipe._arguments(recipe.steps[0])["context"].__name__ == "2:4"


# --- From the command line ------------------------------------------------------------------------------------


def test_plan_report_and_convert(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture is drawn with it")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 4\nsteps:\n- sparsify: {sparsity: 0.9, context: erk, end: 75%}\n")
    picture = tmp_path / "plan.png"
    arguments = [
        "plan",
        str(recipe),
        "--model",
        "sparsifai_models:small",
        "--input",
        "1,2,8,8",
        "--picture",
        str(picture),
    ]
    (tmp_path / "sparsifai_models.py").write_text("from conftest import small_net as small\nnumber = 3\n")
    sys.path.insert(0, str(tmp_path))
    try:
        assert main(arguments) == 0
        assert "0.weight" in capsys.readouterr().out
        assert picture.stat().st_size > 5000
        assert main([*arguments[:3], "sparsifai_models:number"]) == 2
        assert "number makes no torch.nn.Module" in capsys.readouterr().err
    finally:
        sys.path.remove(str(tmp_path))
    assert main(["plan", str(recipe), "--model", "resnet50"]) == 2
    assert "give package:function, such as torchvision:resnet50" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "none.yaml"), "--model", "torchvision:resnet18"]) == 2
    assert "none.yaml" in capsys.readouterr().err

    model = nn.Linear(10, 10)
    Sparsifier(model).sparsify(0.5)
    for state in (model.state_dict(), {"model": model.state_dict(), "opt": {}}):
        torch.save(state, tmp_path / "checkpoint.pth")
        assert main(["report", str(tmp_path / "checkpoint.pth")]) == 0
        out = capsys.readouterr().out
        assert re.search(r"weight +10x10 +100 +50 +50.00%", out)
        assert re.search(r"whole file +110 +50 +45.45%", out)
    for broken in (b"", b"text\n", b"PK\x03\x04 broken"):
        (tmp_path / "checkpoint.pth").write_bytes(broken)
        assert main(["report", str(tmp_path / "checkpoint.pth")]) == 2
    torch.save(model, tmp_path / "checkpoint.pth")
    assert main(["report", str(tmp_path / "checkpoint.pth")]) == 2
    assert "whole models and other pickles, which can run code, are not loaded" in capsys.readouterr().err
    assert main(["plan", str(recipe), "--model", "torchvision:resnet500"]) == 2
    torch.save([1, 2], tmp_path / "checkpoint.pth")
    assert main(["report", str(tmp_path / "checkpoint.pth")]) == 2
    assert "has no tensors by name" in capsys.readouterr().err

    sparseml = tmp_path / "sparseml.md"
    sparseml.write_text(SPARSEML)
    assert main(["convert", str(sparseml), "--to", str(tmp_path / "converted.yaml")]) == 0
    assert "QuantizationModifier" in capsys.readouterr().err
    assert Recipe.load(tmp_path / "converted.yaml") == Recipe.from_sparseml(sparseml)
    assert main(["convert", str(sparseml), "--strict"]) == 2
    assert "QuantizationModifier" in capsys.readouterr().err
    assert main(["convert", str(sparseml)]) == 0
    assert Recipe.loads(capsys.readouterr().out) == Recipe.from_sparseml(sparseml)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("plan", "report", "convert"))
    for command in ("plan", "report", "convert"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"example: sparsifai {command} " in capsys.readouterr().out


# --- From SparseML --------------------------------------------------------------------------------------------

SPARSEML = """---
num_epochs: 20
modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: eval(num_epochs)
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.05
    final_sparsity: 0.85
    start_epoch: 0.0
    end_epoch: eval(num_epochs)
    update_frequency: 1.0
    inter_func: cubic
  - !QuantizationModifier
    start_epoch: 18
---
# A model card
"""


def test_a_converted_recipe_has_the_sparsity_of_the_original_at_every_epoch(tmp_path):
    (tmp_path / "recipe.md").write_text(SPARSEML)
    recipe = Recipe.from_sparseml(tmp_path / "recipe.md")
    assert recipe.epochs == 20
    assert [notice.line for notice in recipe.notices if notice.key == "QuantizationModifier"] == [15]
    with pytest.raises(ValueError, match="line 15: QuantizationModifier"):
        Recipe.from_sparseml(tmp_path / "recipe.md", strict=True)
    schedule, highest = raised(schedule_of(recipe), 0.05 / 0.85), recipe.steps[0].options["sparsity"]
    # As documented: at an epoch e, 0.05 + 0.8 (1 - (1 - e / 20)^3), and between two epochs that of the earlier.
    for epoch in range(21):
        expected = 0.05 + 0.8 * (1 - (1 - epoch / 20) ** 3)
        assert highest * schedule(epoch / 20) == pytest.approx(expected)
        assert highest * schedule(min((epoch + 0.99) / 20, 1)) == pytest.approx(expected)


def modifier(name, **options):
    lines = [f"    {key}: {value}" for key, value in options.items()]
    return "\n".join([f"  - !{name}", *lines])


PRUNING = {"start_epoch": 0, "end_epoch": 4, "update_frequency": 1.0, "init_sparsity": 0.05}
CONVERTED = {
    "constant": [modifier("ConstantPruningModifier", start_epoch=0, params="__ALL__")],
    "global": [modifier("GlobalMagnitudePruningModifier", final_sparsity=0.8, params="__ALL__", **PRUNING)],
    "movement": [modifier("MovementPruningModifier", final_sparsity=0.8, params="['re:.*weight']", **PRUNING)],
    "several": [
        modifier("GMPruningModifier", final_sparsity=0.8, params="['1.weight']", **PRUNING),
        modifier("GMPruningModifier", final_sparsity=0.5, params="['re:3.*']", **PRUNING),
    ],
    "n_of_m": [modifier("GMPruningModifier", final_sparsity=0.5, params="__ALL__", mask_type="'2:4'", **PRUNING)],
    "blocks": [modifier("GMPruningModifier", final_sparsity=0.5, params="__ALL__", mask_type="block4", **PRUNING)],
    "filters": [
        modifier("StructuredPruningModifier", final_sparsity=0.5, params="['1.weight']", mask_type="filter", **PRUNING)
    ],
    "acdc": [
        modifier("ACDCPruningModifier", compression_sparsity=0.8, start_epoch=0, end_epoch=4, update_frequency=1,
                 params="__ALL_PRUNABLE__"),
    ],
    "rigl": [
        modifier("RigLPruningModifier", sparsity=0.8, start_epoch=0, end_epoch=4, update_frequency=0.5,
                 init_update_fraction=0.3, params="['re:.*weight']"),
    ],
    "trainable": [
        modifier("GMPruningModifier", final_sparsity=0.8, params="__ALL__", **PRUNING),
        modifier("TrainableParamsModifier", params="['re:1.*']", trainable=False, start_epoch=0, end_epoch=2),
    ],
}  # fmt: skip
REACHED = {"constant": 0.0, "several": (0.8 * 2048 + 0.5 * 48) / 2096, "n_of_m": 0.5, "blocks": 0.5, "filters": 0.5}


def test_what_cannot_be_in_one_fit_is_told_and_what_is_left_to_fastai_is_no_loss(tmp_path):
    path = tmp_path / "recipe.yaml"
    header = "modifiers:\n" + modifier("EpochRangeModifier", start_epoch=0, end_epoch=9)
    first = modifier("GMPruningModifier", final_sparsity=0.8, params="['1.weight']", **PRUNING)
    second = modifier("GMPruningModifier", final_sparsity=0.8, params="['3.weight']", **{**PRUNING, "end_epoch": 8})
    path.write_text("\n".join([header, first, second]))
    recipe = Recipe.from_sparseml(path)
    assert [step.kind for step in recipe.steps] == ["sparsify"]
    assert [notice.line for notice in recipe.notices if notice.lost] == [12]
    with pytest.raises(ValueError, match="line 12: sparsify: in one fit there is one"):
        Recipe.from_sparseml(path, strict=True)
    learning_rate = modifier("SetLearningRateModifier", start_epoch=0, learning_rate=0.1)
    path.write_text("\n".join([header, modifier("ConstantPruningModifier", start_epoch=5), learning_rate]))
    recipe = Recipe.from_sparseml(path, strict=True)
    assert [step.kind for step in recipe.steps] == ["keep"]
    assert len(recipe.notices) >= 2
    path.write_text("\n".join([header, modifier("GMPrunningModifier", final_sparsity=0.8)]))
    with pytest.raises(ValueError, match="did you mean 'GMPruningModifier'"):
        Recipe.from_sparseml(path)
    path.write_text("modifiers:\n" + modifier("ConstantPruningModifier", start_epoch=0))
    assert Recipe.from_sparseml(path, epochs=3).epochs == 3


@pytest.mark.fastai
@pytest.mark.filterwarnings("ignore:.*come back start at zero.*")
@pytest.mark.parametrize("name", CONVERTED)
def test_what_is_converted_trains(make_learner, name, tmp_path):
    header = "modifiers:\n" + modifier("EpochRangeModifier", start_epoch=0, end_epoch=4)
    (tmp_path / "recipe.yaml").write_text("\n".join([header, *CONVERTED[name]]))
    recipe = Recipe.from_sparseml(tmp_path / "recipe.yaml")
    assert Recipe.loads(recipe.dumps()) == recipe
    learn = make_learner(net(), lr=0.01)
    learn.fit(recipe.epochs, cbs=recipe.callbacks())
    kept = [name for name, callback in vars(learn).items() if name == "keep_sparsity"]
    reached = learn.keep_sparsity.sparsifier.sparsity if kept and learn.keep_sparsity.sparsifier else 0.0
    assert reached == pytest.approx(REACHED.get(name, 0.8), abs=0.005)


@pytest.mark.fastai
def test_layers_with_different_targets_begin_with_the_same_sparsity(make_learner):
    from fastai.callback.core import Callback

    from sparsifai import SparsifyCallback, lin

    levels = []

    class Look(Callback):
        order = 70

        def before_batch(self):
            if self.learn.training:
                masks = self.learn.sparsify.sparsifier.masks
                levels.append(tuple(float((~masks[name]).float().mean()) for name in ("1.weight", "3.weight")))

    callback = SparsifyCallback(
        {"1": 0.75, "3": 0.5}, context="local", schedule=between(lin, 0.5, 1), initial_sparsity=0.25
    )
    make_learner(net(), steps=4).fit(1, cbs=[callback, Look()])
    assert levels == [(0, 0), (0, 0), (0.25, 0.25), (0.5, pytest.approx(0.375, abs=0.02))]
    assert float((~callback.sparsifier.masks["3.weight"]).float().mean()) == 0.5
    with pytest.raises(ValueError, match="initial_sparsity 0.6 is above the sparsity 0.5"):
        SparsifyCallback({"1": 0.75, "3": 0.5}, initial_sparsity=0.6)


@pytest.mark.fastai
def test_a_converted_recipe_trains_to_the_sparsity_of_the_original(make_learner, tmp_path):
    from fastai.callback.core import Callback

    (tmp_path / "recipe.md").write_text(SPARSEML.replace("num_epochs: 20", "num_epochs: 5"))
    recipe = Recipe.from_sparseml(tmp_path / "recipe.md")
    levels = []

    class Look(Callback):
        order = 70

        def before_batch(self):
            if self.learn.training and self.iter == 1:
                levels.append(self.learn.sparsify.sparsifier.level)

    learn = make_learner(net())
    learn.fit(recipe.epochs, cbs=[*recipe.callbacks(), Look()])
    assert levels == pytest.approx([0.05 + 0.8 * (1 - (1 - epoch / 5) ** 3) for epoch in range(5)])
    assert learn.keep_sparsity.sparsifier.sparsity == pytest.approx(0.85, abs=1e-3)


# --- Use ----------------------------------------------------------------------------------------------------------


def test_applied_it_makes_a_plain_model_sparse_at_once(mlp):
    sparsifier = sparsify(context="local").apply(mlp)
    assert isinstance(sparsifier, Sparsifier)
    assert sparsifier.sparsity == pytest.approx(0.8, abs=0.02)
    recipe = sparsify(criteria="snip", sparsity={"0": 0.5, "2": 0.25})
    with pytest.raises(ValueError, match="call calibrate"):
        recipe.apply(mlp)
    batches = [(torch.randn(8, 4), torch.randint(2, (8,)))]
    assert recipe.apply(mlp, batches, nn.functional.cross_entropy).sparsity >= 0.4
    with pytest.raises(ValueError, match="steps.1.regularize: regularize needs training"):
        Recipe({"steps": [{"sparsify": {"sparsity": 0.5}}, {"regularize": {"weight": 1}}]}).apply(mlp)
    with pytest.raises(ValueError, match="no step that sparsifies"):
        Recipe({"steps": ["keep"]}).apply(mlp)


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.mark.fastai
def test_in_a_fit_it_does_what_the_callbacks_do(make_learner):
    from fastai.callback.core import Callback

    from sparsifai import DistillCallback, RegularizeCallback, SparsifyCallback

    recipe = Recipe.loads(
        "epochs: 4\nsteps:\n"
        "- sparsify: {sparsity: 0.8, schedule: lin, start: 1, end: 3, initial_sparsity: 0.2, update_every: 1}\n"
        "- regularize: {weight: 1e-3}\n- distil: {weight: 0.5}\n- freeze: {layers: '1', end: 50%}\n"
    )
    levels, frozen = [], []

    class Look(Callback):
        order = 70

        def before_batch(self):
            if self.learn.training and self.iter == 0:
                levels.append(self.learn.sparsify.sparsifier.sparsity)
                frozen.append(not self.model[1].weight.requires_grad)

    with pytest.raises(ValueError, match="line 5: steps.2.distil: distil needs a teacher"):
        recipe.callbacks()
    learn, callbacks = make_learner(net()), recipe.callbacks(teacher=net())
    assert [type(each) for each in callbacks[:3]] == [SparsifyCallback, RegularizeCallback, DistillCallback]
    learn.fit(recipe.epochs, cbs=[*callbacks, Look()])
    assert levels == pytest.approx([0, 0.2, 0.5, 0.8], abs=1e-3)
    assert frozen == [True, True, False, False]
    assert all(parameter.requires_grad for parameter in learn.model.parameters())
    recorded = recipe.recorded(learn)
    results = recorded.content["results"]
    assert results["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert set(results["layers"]) == {"1.weight", "3.weight"}
    assert results["metrics"]["valid_loss"] > 0
    assert Recipe.loads(recorded.dumps()) == recorded != recipe
    assert "results" not in recipe.content


@pytest.mark.fastai
def test_freezing_leaves_the_methods_of_the_learner_alone(make_learner):
    from sparsifai import FreezeCallback

    steps = [{"freeze": {"layers": "1", "end": 2}}, {"freeze": {"layers": ["3"], "start": 2}}]
    learn = make_learner(net())
    learn.fit(4, cbs=Recipe({"epochs": 4, "steps": steps}).callbacks())
    assert all(parameter.requires_grad for parameter in learn.model.parameters())
    learn = make_learner(net(), cbs=FreezeCallback("1"))
    learn.fine_tune(1)
    assert callable(learn.freeze)


@pytest.mark.fastai
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run_and_what_they_reach_is_recorded(make_learner, path, tmp_path):
    recipe, model = Recipe.load(path), net()
    if recipe.epochs is None:
        assert recipe.apply(model).sparsity == pytest.approx(0.5, abs=1e-3)
        return
    if path.stem == "sparse_transfer":
        Sparsifier(model).sparsify(0.9)
        assert "0" in recipe.steps[1].options["layers"]
        model = nn.Sequential(nn.Sequential(*model[:3]), model[3])
    learn = make_learner(model, lr=0.01)
    learn.fit(recipe.epochs, cbs=recipe.callbacks(teacher=net()))
    losses, values = list(learn.recorder.losses), list(learn.recorder.values)
    recorded = recipe.recorded(learn)
    assert (list(learn.recorder.losses), list(learn.recorder.values)) == (losses, values)
    recorded.save(tmp_path / "recorded.yaml")
    assert Recipe.load(tmp_path / "recorded.yaml") == recorded
    expected = {"training_aware": 0.9, "compound": 0.95, "sparse_transfer": 0.9}[path.stem]
    assert recorded.content["results"]["sparsity"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.fastai
def test_the_plan_of_a_recipe_is_that_of_its_callback_and_of_a_fit(make_learner):
    from fastai.callback.core import Callback

    text = "epochs: 2\nsteps:\n- sparsify: {sparsity: {'1': 0.9, '3': 0.5}, context: local, "
    text += "initial_sparsity: 0.2, schedule: lin}"
    for more in ("", ", regrow: random"):
        recipe, model = Recipe.loads(text[:-1] + more + "}"), net()
        plan, callback = recipe.plan(model, n_iter=150), recipe.callbacks()[0]
        assert str(plan) == str(callback.plan(model, 2, 150))
        assert plan.timeline == callback.plan(model, 2, 150).timeline
    recipe = sparsify(sparsity={"1": 0.9}, context="local")  # of which the other layer takes no part
    assert str(recipe.plan(net())) == str(recipe.callbacks()[0].plan(net(), 10, 100))
    assert str(recipe.apply(net()).report()).count("excluded") == 1
    levels = {}

    class Look(Callback):
        order = 70

        def before_batch(self):
            if self.learn.training:
                levels[self.epoch + self.iter / 4] = self.learn.sparsify.sparsifier.level

    recipe, learn = Recipe.loads(text), make_learner(net(), steps=4)
    planned = dict(recipe.plan(learn.model, n_iter=4).timeline)
    learn.fit(2, cbs=[*recipe.callbacks(), Look()])
    assert [planned[epoch] for epoch in levels] == pytest.approx(list(levels.values()))


@pytest.mark.fastai
def test_what_is_frozen_is_not_trained_and_is_trained_again_after_an_interrupted_fit(make_learner):
    from fastai.callback.core import Callback
    from fastai.optimizer import SGD

    from sparsifai import FreezeCallback

    learn = make_learner(net())
    before = learn.model[1].weight.detach().clone()

    def stop(self):
        if self.iter == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, 0.1, cbs=[FreezeCallback("1"), Callback(after_step=stop)])
    assert torch.equal(before, learn.model[1].weight)
    assert all(parameter.requires_grad for parameter in learn.model.parameters())
    learn.fit(1, 0.1)
    assert not torch.equal(before, learn.model[1].weight)
    halves = []
    learn = make_learner(net(), opt_func=partial(SGD, mom=0.9, wd=0.1))
    note = Callback(after_epoch=lambda self: halves.append(self.model[1].weight.detach().clone()))
    learn.fit(2, 0.1, cbs=[FreezeCallback("1", start=0.5), note])
    assert torch.equal(*halves)  # momentum and weight decay move nothing
    with pytest.raises(ValueError, match="no layer matches 'head'"):
        learn.fit(1, cbs=FreezeCallback("head"))
