"""Converted recipes in a fit: the same sparsity as SparseML documents."""

import pytest
from torch import nn

from sparsifai import Recipe, raised
from sparsifai.recipes.reading import Reading


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 3))


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
  - !SetLearningRateModifier
    learning_rate: 0.1
---
# A model card
"""


def test_a_converted_recipe_has_the_sparsity_of_the_original_at_every_epoch(tmp_path):
    (tmp_path / "recipe.md").write_text(SPARSEML)
    recipe = Recipe.from_sparseml(tmp_path / "recipe.md")
    assert recipe.epochs == 20
    reading = Reading(recipe.content)
    schedule = raised(reading.arguments(reading.steps[0])["schedule"], 0.05 / 0.85)  # as the callback does
    highest = recipe.steps[0].options["sparsity"]
    # As documented: 0.05 + 0.8 (1 - (1 - e / 20)^3) at epoch e, and between two epochs that of the earlier.
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
    "several_steps": [
        modifier("GMPruningModifier", final_sparsity=0.8, params="['1.weight']", **PRUNING),
        modifier("GlobalMagnitudePruningModifier", final_sparsity=0.5, params="['re:3.*']", start_epoch=1, end_epoch=3),
    ],
    "top_kast": [
        modifier("TopKASTPruningModifier", forward_sparsity=0.8, backward_sparsity=0.5, params="['re:.*weight']",
                 start_epoch=0, end_epoch=4, update_frequency=-1),
    ],
    "acdc_of_one_phase": [
        modifier("ACDCPruningModifier", compression_sparsity=0.8, start_epoch=0, end_epoch=4, update_frequency=4,
                 params="__ALL_PRUNABLE__"),
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
        modifier("RigLPruningModifier", final_sparsity=0.8, start_epoch=0, end_epoch=4, update_frequency=0.5,
                 init_update_fraction=0.3, params="['re:.*weight']"),
    ],
    "trainable": [
        modifier("GMPruningModifier", final_sparsity=0.8, params="__ALL__", **PRUNING),
        modifier("TrainableParamsModifier", params="['re:1.*']", trainable=False, start_epoch=0, end_epoch=2),
    ],
}  # fmt: skip
SEVERAL = (0.8 * 2048 + 0.5 * 48) / 2096
REACHED = {"constant": 0.0, "several": SEVERAL, "several_steps": SEVERAL, "n_of_m": 0.5, "blocks": 0.5, "filters": 0.5}


def test_what_is_lost_is_a_warning_and_with_strict_an_error(tmp_path):
    path = tmp_path / "recipe.yaml"
    lost = modifier("LayerPruningModifier", layers="['3']")
    path.write_text("\n".join(["modifiers:", *CONVERTED["constant"], lost, lost, lost, lost]))
    message = "recipe.yaml: 4 parts of the recipe have no counterpart and would change the model: line 5: LayerPrun.*; "
    with pytest.warns(UserWarning, match=message + "line 7: .*; line 9: .*; and 1 more, in recipe.notices$") as caught:
        recipe = Recipe.from_sparseml(path)
    assert caught[0].filename == __file__
    assert [notice.line for notice in recipe.notices if notice.lost] == [5, 7, 9, 11]
    with pytest.raises(ValueError, match="recipe.yaml: parts of the recipe have no counterpart:\nline 5: LayerPruning"):
        Recipe.from_sparseml(path, strict=True)


def test_a_learning_rate_is_not_lost(tmp_path):
    path = tmp_path / "recipe.yaml"
    learning_rate = modifier("SetLearningRateModifier", start_epoch=0, learning_rate=0.1)
    path.write_text("\n".join(["modifiers:", modifier("ConstantPruningModifier", start_epoch=5), learning_rate]))
    recipe = Recipe.from_sparseml(path, strict=True, epochs=3)
    assert [step.kind for step in recipe.steps] == ["keep"]
    assert recipe.epochs == 3
    assert len(recipe.notices) >= 2
    path.write_text(f"modifiers:\n{learning_rate}")
    message = "nothing in the recipe can be converted:\n(?s:.*)line 2: SetLearningRateModifier: learning rates are left"
    with pytest.raises(ValueError, match=message):
        Recipe.from_sparseml(path)
    path.write_text("modifiers:\n" + modifier("GMPruningModifier", final_sparsity=80, params="['1.weight']"))
    with pytest.raises(ValueError, match="recipe.yaml: line 3: GMPruningModifier, final_sparsity: expected a fraction"):
        Recipe.from_sparseml(path)


@pytest.mark.fastai
@pytest.mark.filterwarnings("ignore:.*start at zero.*")
@pytest.mark.parametrize("name", CONVERTED)
def test_converted_recipes_train_to_the_sparsity_of_the_original(make_learner, name, tmp_path):
    header = "modifiers:\n" + modifier("EpochRangeModifier", start_epoch=0, end_epoch=4)
    (tmp_path / "recipe.yaml").write_text("\n".join([header, *CONVERTED[name]]))
    recipe = Recipe.from_sparseml(tmp_path / "recipe.yaml")
    assert Recipe.loads(recipe.dumps()) == recipe
    learn = make_learner(net(), lr=0.01)
    learn.fit(recipe.epochs, cbs=recipe.callbacks())
    kept = [name for name, callback in vars(learn).items() if name == "keep_sparsity"]
    reached = learn.keep_sparsity.report().selected.sparsity if kept else 0.0
    assert reached == pytest.approx(REACHED.get(name, 0.8), abs=0.005)


@pytest.mark.fastai
def test_a_converted_recipe_has_the_levels_of_the_original_in_a_fit(make_learner, tmp_path):
    from fastai.callback.core import Callback

    (tmp_path / "recipe.md").write_text(SPARSEML.replace("num_epochs: 20", "num_epochs: 5"))
    recipe = Recipe.from_sparseml(tmp_path / "recipe.md")
    levels = []

    class Look(Callback):
        order = 70

        def before_batch(self):
            if self.learn.training and self.iter == 1:
                levels.append(self.learn.sparsify_callback.sparsifier.level)

    learn = make_learner(net())
    learn.fit(recipe.epochs, cbs=[*recipe.callbacks(), Look()])
    assert levels == pytest.approx([0.05 + 0.8 * (1 - (1 - epoch / 5) ** 3) for epoch in range(5)])
    assert learn.keep_sparsity.report().selected.sparsity == pytest.approx(0.85, abs=1e-3)
