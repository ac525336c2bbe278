"""Recipes of several parts, each applied or fitted."""

import pytest
import torch
from torch import nn

from sparsifai import Recipe

STAGES = """\
name: twice
variables: {target: 0.5, twice: "${target * 1.5}"}
stages:
- name: prune
  training: false
  steps:
  - sparsify: {sparsity: "${target}", context: "2:4"}
- name: tune
  variables: {rounds: 2}
  epochs: ${rounds}
  steps:
  - keep
- name: more
  epochs: 2
  steps:
  - sparsify: {sparsity: "${twice}", start: 1}
"""


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 3))


def zeros(model):
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def test_each_stage_is_a_recipe():
    recipe = Recipe.loads(STAGES)
    assert [(stage.training, stage.epochs) for stage in recipe.stages] == [(False, None), (True, 2), (True, 2)]
    assert [[step.kind for step in stage.steps] for stage in recipe.stages] == [["sparsify"], ["keep"], ["sparsify"]]
    assert [stage.steps[0].options.get("sparsity") for stage in recipe.stages] == [0.5, None, 0.75]
    assert [stage.content["name"] for stage in recipe.stages] == ["prune", "tune", "more"]
    assert (recipe.steps, recipe.epochs) == ((), None)


def test_a_recipe_with_stages_and_each_stage_are_written_and_read(tmp_path):
    recipe = Recipe.loads(STAGES)
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    for stage in recipe.stages:
        again = Recipe.loads(stage.dumps())
        assert again == stage
        assert [step.options for step in again.steps] == [step.options for step in stage.steps]
        assert again.variables == stage.variables


def test_a_recipe_without_stages_is_its_only_stage():
    recipe = Recipe({"epochs": 3, "steps": ["keep"]})
    assert recipe.stages == (recipe,)
    assert recipe.training
    once = Recipe({"training": False, "steps": [{"sparsify": {"sparsity": 0.5}}]})
    model = net()
    once.stages[0].apply(model)
    assert zeros(model) == pytest.approx(0.5, abs=1e-3)


def test_apply_leaves_the_quantization_of_a_stage_to_quantize():
    recipe = Recipe({"training": False, "steps": [{"quantize": {"layers": ["1"]}}, {"sparsify": {"sparsity": 0.5}}]})
    model = net()
    with pytest.warns(UserWarning, match=r"call quantize\(model, calibration, path, layers=\['1'\]\) after it"):
        recipe.apply(model)
    assert zeros(model) == pytest.approx(0.5, abs=1e-3)


def test_an_error_of_a_stage_names_its_line_and_where_it_is():
    with pytest.raises(ValueError, match=r"^line 10: stages\.1\.epochs: .*whole number.*not 2\.5"):
        Recipe.loads(STAGES.replace("${rounds}", "2.5"))
    stage = Recipe.loads(STAGES).stages[2]
    with pytest.raises(ValueError, match=r"^line 16: stages\.2\.steps\.0\.sparsify: "):
        stage.plan(nn.Sequential(nn.BatchNorm1d(3)))


def test_a_stage_that_is_applied_is_planned_without_epochs():
    plan = Recipe.loads(STAGES).stages[0].plan(net())
    assert plan.notes[0] == "Plan for 50.00% zeros (weight, 2:4, large_final) at once, without training."
    assert (plan.timeline, plan.levels) == (((0.0, 0.5),), ())
    assert "epoch" not in str(plan)
    steps = [{"sparsify": {"sparsity": 0.8, "layers": "1"}}, {"sparsify": {"sparsity": 0.5, "layers": "3"}}]
    recipe, model = Recipe({"training": False, "steps": steps}), net()
    plan = recipe.plan(model)
    recipe.apply(model)
    left = {layer.name: layer.size.left for layer in plan.layers}
    assert left == {name: int((each != 0).sum()) for name, each in model.named_parameters() if each.dim() > 1}


@pytest.mark.fastai
def test_a_loop_over_the_stages_applies_and_fits_them(make_learner):
    learn, reached = make_learner(net(), lr=0.01), []
    for stage in Recipe.loads(STAGES).stages:
        if stage.training:
            learn.fit(stage.epochs, cbs=stage.callbacks())
        else:
            stage.apply(learn.model)
        reached.append(zeros(learn.model))
    assert reached == pytest.approx([0.5, 0.5, 0.75], abs=1e-3)
