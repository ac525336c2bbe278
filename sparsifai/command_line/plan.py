"""`sparsifai plan`: what a recipe would do to a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_model, check_to

if TYPE_CHECKING:
    from ..gradual.plan_table import Plan
    from ..recipes.recipe import Recipe

DESCRIPTION = """Show what a recipe would do to a model, without data or training.

The table has the remaining weights, bytes and FLOPs (with --input) of each layer, and why some layers stay dense. Above
it is the sparsity after each epoch. A recipe with stages has a table for each stage that prunes.

example: sparsifai plan examples/recipes/training_aware.yaml --model torchvision:resnet50 --input 1,3,224,224
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("recipe", type=Path, help="a recipe, a YAML file")
    add_model(parser)
    parser.add_argument("--batches", type=int, default=100, help="number of batches in an epoch (default 100)")
    parser.add_argument("--picture", type=Path, help="a file for a picture of the sparsity over time and of the layers")


def run(given: argparse.Namespace) -> None:
    """Plan each stage of the recipe."""
    from ..recipes.recipe import Recipe
    from .loading import batch_of, model_of
    from .output import content_of, print_json, print_table

    check_to(given.picture, force=True)
    stages = Recipe.load(given.recipe).stages
    model = model_of(given.model, given.checkpoint)
    example = batch_of(given.input, model)
    planned = [
        stage.plan(model, n_iter=given.batches, example_input=example) if _prunes(stage) or len(stages) == 1 else None
        for stage in stages
    ]
    plans = [plan for plan in planned if plan is not None]
    if not plans:
        raise ValueError("no stage of the recipe has a sparsify step, so there is nothing to plan")
    if given.json:
        print_json(
            {
                "stages": [
                    {"stage": _title(stage, number), "levels": plan.levels, **content_of(plan)}
                    for number, (stage, plan) in enumerate(zip(stages, planned, strict=True), 1)
                    if plan is not None
                ]
            }
        )
    elif len(stages) == 1:
        print_table(plans[0], given.all)
    else:
        print("Each stage is planned for the model as it is before all of them.")
        for number, (stage, plan) in enumerate(zip(stages, planned, strict=True), 1):
            print(f"\n{_title(stage, number)}")
            if plan is not None:
                print_table(plan, given.all)
    if given.picture is not None:
        _draw(plans, given.picture)


def _prunes(recipe: Recipe) -> bool:
    return any(step.kind == "sparsify" for step in recipe.steps)


def _title(stage: Recipe, number: int) -> str:
    """What a stage is, as a line above its plan."""
    name, kinds = stage.content.get("name", number), ", ".join(step.kind for step in stage.steps)
    epochs = "" if stage.epochs is None else f" of {stage.epochs} epochs"
    how = f"a fit{epochs}" if stage.training else "applied at once, without training"
    return f"Stage {name}, {how}: {kinds}{'' if _prunes(stage) else '; nothing is pruned'}."


def _draw(plans: Sequence[Plan], picture: Path) -> None:
    import matplotlib.pyplot as plt

    from ..support.files import write_whole

    height = sum(4 + 0.25 * len(plan._lines()) for plan in plans)
    drawn: Any = plt.subplots(2 * len(plans), 1, figsize=(9, height), layout="constrained")
    figure, axes = drawn
    for plan, above, below in zip(plans, axes[::2], axes[1::2], strict=True):
        plan.plot_schedule(above)
        plan.plot(below)
    kind = picture.suffix[1:] or "png"
    write_whole(picture, lambda file: figure.savefig(file, format=kind))
    plt.close(figure)
