"""sparsifai plan: tables and a picture of what a recipe would do to a model."""

import sys

import pytest

from sparsifai.command_line.main import main


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Run `sparsifai plan` with a recipe and a module of models."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 4\nsteps:\n- sparsify: {sparsity: 0.9, context: erk, end: 75%}\n")
    (tmp_path / "sparsifai_models.py").write_text("from conftest import small_net as small\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sparsifai_models", raising=False)
    return lambda model, *options, recipe=recipe: main(["plan", str(recipe), "--model", model, *options])


def test_plan_prints_a_table_and_draws_a_picture(plan, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture is drawn with it")
    picture = tmp_path / "plan.png"
    assert plan("sparsifai_models:small", "--input", "1,2,8,8", "--picture", str(picture)) == 0
    assert "0.weight" in capsys.readouterr().out
    assert picture.stat().st_size > 5000


def test_plan_prints_a_table_for_each_stage_that_prunes(plan, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture is drawn with it")
    recipe, picture = tmp_path / "stages.yaml", tmp_path / "stages.png"
    once = "{name: once, training: false, steps: [{sparsify: {sparsity: 0.5}}, keep]}"
    tune, more = "{epochs: 2, steps: [keep]}", "{epochs: 4, steps: [{sparsify: {sparsity: 0.75}}]}"
    recipe.write_text(f"stages:\n- {once}\n- {tune}\n- {more}\n")
    assert plan("sparsifai_models:small", "--picture", str(picture), recipe=recipe) == 0
    found = capsys.readouterr().out
    titles = [line for line in found.splitlines() if line.startswith(("Stage", "Plan for"))]
    assert titles == [
        "Stage once, applied at once, without training: sparsify, keep.",
        "Plan for 50.00% zeros (weight, global, large_final) at once, without training.",
        "Stage 2, a fit of 2 epochs: keep; nothing is pruned.",
        "Stage 3, a fit of 4 epochs: sparsify.",
        "Plan for 75.00% zeros (weight, global, large_final, between(agp, 0, 0.75)) in 4 x 100 batches; nothing is "
        "trained yet.",
    ]
    assert picture.stat().st_size > 5000
    recipe.write_text(f"stages:\n- {tune}\n- {tune}\n")
    assert plan("sparsifai_models:small", recipe=recipe) == 2
    assert "no stage of the recipe has a sparsify step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet50", "--model resnet50: give package:function, such as torchvision:resnet50"),
        ("sparsifai_models:number", "number is not a torch.nn.Module, nor a function that returns one"),
        ("torchvision:resnet500", "--model torchvision:resnet500: "),
        ("no_such_package:model", "--model no_such_package:model: No module named 'no_such_package'"),
    ],
)
def test_plan_refuses_what_is_not_a_model(plan, model, message, capsys):
    assert plan(model) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparsifai plan: ")
    assert message in error


def test_plan_refuses_a_missing_recipe_and_a_wrong_shape(plan, tmp_path, capsys):
    assert plan("torchvision:resnet18", recipe=tmp_path / "none.yaml") == 2
    assert "none.yaml" in capsys.readouterr().err
    for shape in ("1,x", "1,0"):
        with pytest.raises(SystemExit):
            plan("sparsifai_models:small", "--input", shape)
        assert f"'{shape}' is not a shape such as 1,3,224,224" in capsys.readouterr().err
