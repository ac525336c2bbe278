"""Recipes: files, and what they are used for."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from work import at_most_calls

from sparsifai import Recipe, Sparsifier, relational, similarity, soft_targets
from sparsifai.recipes.sparseml.convert import convert

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))


def sparsify(**options):
    return Recipe({"epochs": 10, "steps": [{"sparsify": {"sparsity": 0.8, **options}}]})


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 3))


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
def test_a_recipe_is_the_same_after_saving_and_loading(content):
    recipe = Recipe(content)
    again = Recipe.loads(recipe.dumps())
    assert again == recipe
    assert again.dumps() == recipe.dumps()
    assert again.steps == recipe.steps


parts = st.fixed_dictionaries(
    {"epochs": st.just(10), "steps": st.lists(steps, min_size=1, max_size=1)},
    optional={"name": words, "variables": st.dictionaries(st.sampled_from("bcd"), fractions)},
)
staged = st.fixed_dictionaries(
    {"stages": st.lists(parts, min_size=1, max_size=3)},
    optional={"variables": st.dictionaries(st.sampled_from("abc"), fractions)},
)


@settings(deadline=None, max_examples=40)
@given(staged)
def test_stages_are_the_same_after_saving_and_loading(content):
    recipe = Recipe(content)
    again = Recipe.loads(recipe.dumps())
    assert again == recipe
    for stage, part in zip(again.stages, content["stages"], strict=True):
        assert stage.steps[0].options == part["steps"][0]["sparsify"]
        assert stage.variables == {**content.get("variables", {}), **part.get("variables", {})}
        assert Recipe.loads(stage.dumps()) == stage


# --- Use ----------------------------------------------------------------------------------------------------------


def test_apply_prunes_any_torch_model_at_once(mlp):
    sparsifier = sparsify(context="local").apply(mlp)
    assert isinstance(sparsifier, Sparsifier)
    assert sparsifier.sparsity == pytest.approx(0.8, abs=0.02)
    recipe = sparsify(criteria="snip", sparsity={"0": 0.5, "2": 0.25})
    with pytest.raises(ValueError, match="needs batches; pass calibration="):
        recipe.apply(mlp)
    batches = [(torch.randn(8, 4), torch.randint(2, (8,)))]
    assert recipe.apply(mlp, batches, nn.functional.cross_entropy).sparsity >= 0.4


@pytest.mark.fastai
def test_the_options_of_straight_through_training_arrive_at_the_callback(make_learner):
    pytest.importorskip("fastai", reason="the callbacks need fastai")
    recipe = Recipe.loads(
        "epochs: 4\nvariables: {pull: 0.01}\nsteps:\n"
        "- sparsify: {sparsity: 0.8, schedule: lin, end: 2, straight_through: true, decay: '${2 * pull}',\n"
        "             gradient_sparsity: 0.25, settle: 0.5}\n"
    )
    assert Recipe.loads(recipe.dumps()) == recipe
    (callback,) = recipe.callbacks()
    options = callback.pruning.options
    assert (options.straight_through, options.decay, options.gradient_sparsity) == (True, 0.02, 0.25)
    assert callback.pruning.settle == 0.5
    learn, changing = make_learner(net()), []
    callback.after_epoch = lambda: changing.append(callback.sparsifier.is_straight_through)
    learn.fit(recipe.epochs, cbs=callback)
    assert changing == [True, False, False, False]
    assert callback.sparsifier.sparsity == pytest.approx(0.8, abs=1e-3)
    plain = sparsify().callbacks()[0].pruning
    assert (plain.options.straight_through, plain.options.decay, plain.settle) == (False, None, None)
    sparsifier = recipe.apply(net())
    assert sparsifier.is_straight_through
    assert sparsifier.sparsity == pytest.approx(0.8, abs=1e-3)
    assert "80.00%" in str(recipe.plan(net()))


@pytest.mark.fastai
def test_a_recipe_with_losses_of_a_teacher(make_learner):
    recipe = Recipe.loads(
        "epochs: 1\nsteps:\n"
        "- distil: {loss: {soft_targets: {temperature: 2}}, features: ['0'], feature_loss: similarity, end: 50%}\n"
        "- distil: {weight: 0, features: {'0': '1'}, feature_loss: {relational: {angle_weight: 0}}}\n"
    )
    callbacks = recipe.callbacks(teacher=net())
    first, second = (each.distillation for each in callbacks)
    assert (first.output_loss.func, first.output_loss.keywords) == (soft_targets, {"temperature": 2})
    assert (first.features, first.feature_loss) == ({"0": "0"}, similarity)
    assert (second.feature_loss.func, second.feature_loss.keywords) == (relational, {"angle_weight": 0})
    make_learner(net()).fit(recipe.epochs, cbs=callbacks)


@pytest.mark.fastai
def test_a_fit_with_the_callbacks_of_a_recipe(make_learner):
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
                levels.append(self.learn.sparsify_callback.sparsifier.sparsity)
                frozen.append(not self.model[1].weight.requires_grad)

    with pytest.raises(ValueError, match="line 5: steps.2.distil"):
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
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run_and_record_what_they_reach(make_learner, path, tmp_path):
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
def test_the_plan_of_a_recipe_agrees_with_its_callback_and_a_fit(make_learner):
    from fastai.callback.core import Callback

    text = "epochs: 2\nsteps:\n- sparsify: {sparsity: {'1': 0.9, '3': 0.5}, context: local, "
    text += "initial_sparsity: 0.2, schedule: lin}"
    for more in ("", ", regrow: random"):
        recipe, model = Recipe.loads(text[:-1] + more + "}"), net()
        plan, callback = recipe.plan(model, n_iter=150), recipe.callbacks()[0]
        assert str(plan) == str(callback.plan(model, 2, 150))
        assert plan.timeline == callback.plan(model, 2, 150).timeline
    recipe = sparsify(sparsity={"1": 0.9}, context="local")  # the other layer stays dense
    assert str(recipe.plan(net())) == str(recipe.callbacks()[0].plan(net(), 10, 100))
    assert str(recipe.apply(net()).report()).count("excluded") == 1
    levels = {}

    class Look(Callback):
        order = 70

        def before_batch(self):
            if self.learn.training:
                levels[self.epoch + self.iter / 4] = self.learn.sparsify_callback.sparsifier.level

    recipe, learn = Recipe.loads(text), make_learner(net(), steps=4)
    planned = dict(recipe.plan(learn.model, n_iter=4).timeline)
    learn.fit(2, cbs=[*recipe.callbacks(), Look()])
    assert [planned[epoch] for epoch in levels] == pytest.approx(list(levels.values()))


# --- Files of others --------------------------------------------------------------------------------------------------


def pipe(path):
    os.mkfifo(path)


def huge(path):
    with open(path, "wb") as file:
        file.truncate(2**32)  # of 4 GB, without taking room on the disk


FILES = {
    "pipe": (pipe, OSError, "it is a pipe"),
    "folder": (os.mkdir, OSError, "it is a folder"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), OSError, "it is a device"),
    "huge": (huge, ValueError, "has more than 1,000,000 bytes, which is the limit for a recipe"),
    "no text": (
        lambda path: path.write_bytes(b"a: 1\nb: \xff\xfe"),
        ValueError,
        "line 2: the file is not text in UTF-8",
    ),
    "UTF-16": (lambda path: path.write_text("a: 1", encoding="utf-16"), ValueError, "line 1: the file is not text in"),
}


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices are files")
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("read", [Recipe.load, Recipe.from_sparseml])
def test_a_file_that_is_no_recipe_is_refused_at_once(kind, read, tmp_path):
    make, error, message = FILES[kind]
    make(tmp_path / "recipe.yaml")
    with pytest.raises(error, match=message):
        read(tmp_path / "recipe.yaml")


def test_a_file_may_have_the_line_ends_and_the_mark_of_windows(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes("\ufeffepochs: 3\r\nsteps: [keep]\r\n".encode())
    assert Recipe.load(tmp_path / "recipe.yaml").epochs == 3
    (tmp_path / "recipe.yaml").write_bytes(
        "\ufeffmodifiers:\r\n- !ConstantPruningModifier {start_epoch: 0}\r\n".encode()
    )
    assert Recipe.from_sparseml(tmp_path / "recipe.yaml").steps[0].kind == "keep"


def test_text_that_a_terminal_obeys_is_written_with_escapes():
    recipe = Recipe({"name": "\u202eabc\x1b[2J\x9b", "description": "größer\nals", "steps": ["keep"]})
    assert all(line.isprintable() for line in str(recipe).split("\n"))
    assert Recipe.loads(str(recipe)) == recipe
    assert "größer" in str(Recipe({"name": "größer", "steps": ["keep"]}))


def test_expressions_of_a_recipe_are_computed_once():
    chain = "v0: 1\n" + "".join(
        f"v{number}: eval(max({','.join([f'v{number - 1}'] * 60)}))\n" for number in range(1, 49)
    )
    last = "  - !EpochRangeModifier {end_epoch: eval(v48 * 0 + 1)}\n"
    with at_most_calls(1_000_000):
        assert convert(f"{chain}modifiers:\n{last * 300}")[0]["epochs"] == 1


# --- Several sparsify steps -------------------------------------------------------------------------------------------

SEVERAL = """
epochs: 4
steps:
- sparsify: {sparsity: 0.5, granularity: row, context: local, layers: '1', schedule: lin}
- sparsify: {sparsity: 0.75, criteria: random, layers: '3', schedule: one_shot, start: 2}
"""


@pytest.mark.filterwarnings("ignore:near collapse")
def test_several_sparsify_steps_are_planned_as_one():
    recipe, model = Recipe.loads(SEVERAL), net()
    plan = recipe.plan(model, n_iter=5, example_input=torch.zeros(1, 2, 8, 8))
    first, second = (layer.size for layer in plan.layers)
    assert (first.left, second.left) == (1024, 12)
    assert (plan.selected.weights, plan.selected.left) == (2096, 1036)
    assert (plan.model.weights, plan.model.left) == (2096 + 19, 1036 + 19)
    assert plan.model.bytes - plan.model.bytes_left == plan.selected.bytes - plan.selected.bytes_left
    assert plan.model.flops == 2 * 2096
    expected = [(0.5 * epoch / 4 * 2048 + (0.75 if epoch >= 2 else 0) * 48) / 2096 for epoch in range(1, 5)]
    assert plan.levels == pytest.approx(expected)
    titles = [note for note in plan.notes if "Plan for" in note]
    starts = (
        "Plan for 50.57% zeros by 2",
        "Step 1: Plan for 50.00% zeros (row, local",
        "Step 2: Plan for 75.00% zeros (",
    )
    assert [title.startswith(start) for title, start in zip(titles, starts, strict=True)] == [True] * 3
    assert plan.notes[1].startswith("Level after epoch 0: ")
    assert len(set(plan.notes)) == len(plan.notes)


def test_several_sparsify_steps_are_applied_at_once():
    model = net()
    several = Recipe.loads(SEVERAL).apply(model)
    assert (model[1].weight == 0).all(1).sum() == 8
    assert (model[3].weight == 0).sum() == 36
    assert several.sparsity == (1024 + 36) / 2096


@pytest.mark.fastai
def test_several_sparsify_steps_are_trained_in_one_fit(make_learner):
    pytest.importorskip("fastai", reason="the callbacks need fastai")
    recipe, learn = Recipe.loads(SEVERAL), make_learner(net())
    assert Recipe.loads(recipe.dumps()) == recipe
    learn.fit(recipe.epochs, 0.1, cbs=recipe.callbacks())
    assert (learn.model[1].weight == 0).all(1).sum() == 8
    assert (learn.model[3].weight == 0).sum() == 36
    results = recipe.recorded(learn).content["results"]
    assert results["layers"] == {"1.weight": 0.5, "3.weight": 0.75}


@pytest.mark.filterwarnings("ignore:near collapse")
def test_several_sparsify_steps_of_the_same_layer_are_refused():
    recipe = Recipe.loads("steps: [sparsify: {sparsity: 0.5}, sparsify: {sparsity: 0.7, layers: '3'}]")
    model = net()
    before = model[3].weight.detach().clone()
    for use in (recipe.apply, recipe.plan):
        with pytest.raises(ValueError, match="both prune 3.weight"):
            use(model)
    assert torch.equal(model[3].weight, before)


@pytest.mark.fastai
def test_a_fit_of_other_epochs_than_those_of_the_recipe_warns_once(make_learner):
    from fastai.vision.all import L, params

    recipe = Recipe.loads("epochs: 4\nsteps:\n- sparsify: {sparsity: 0.8, start: 1, end: 3}\n- freeze: {layers: '1'}\n")
    learn = make_learner(net(), splitter=lambda model: L(model[:1], model[1:]).map(params))
    with pytest.warns(
        UserWarning, match="^the recipe is for 4 epochs and this fit has 2, .* multiplied by 0.5; "
    ) as told:
        learn.fit(2, cbs=recipe.callbacks())
    assert len([each for each in told if "epochs" in str(each.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn.fit(4, cbs=recipe.callbacks())
        learn.freeze()
        learn.fit(1, cbs=recipe.callbacks())  # as the first part of fine_tune
        make_learner(net()).fit(2, cbs=Recipe({"steps": [{"keep": {}}]}).callbacks())
