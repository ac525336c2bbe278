"""`sparsifai convert`: a recipe of SparseML becomes one of sparsifai."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from .arguments import add_to, check_to

DESCRIPTION = """Convert a recipe of SparseML or llm-compressor to a recipe of sparsifai.

Parts that have no counterpart are listed on standard error, each with its line. If one of them would change the model,
the recipe is written, and the exit status is 3.

example: sparsifai convert sparseml.md --to recipe.yaml
"""

# The exit status if a recipe was written that has lost something.
LOST = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("recipe", type=Path, help="a recipe of SparseML, YAML or Markdown that begins with YAML")
    add_to(parser, "the file to write; by default the recipe is printed")
    parser.add_argument(
        "--strict", action="store_true", help="fail if a part that would change the model has no counterpart"
    )
    parser.add_argument("--epochs", type=int, help="the number of epochs, for a recipe that does not give it")


def run(given: argparse.Namespace) -> int:
    """Convert the recipe; returns 3 if something that would change the model is lost."""
    from ..recipes.recipe import Recipe
    from ..support.warning import own_filters
    from .output import print_json

    check_to(given.to, given.force)
    with own_filters():
        warnings.simplefilter("ignore")  # the notices are printed
        recipe = Recipe.from_sparseml(given.recipe, strict=given.strict, epochs=given.epochs)
    if given.to is not None:
        recipe.save(given.to)
    is_lost = any(notice.lost for notice in recipe.notices)
    if given.json:
        notices = [{"text": str(notice), "is_lost": notice.lost} for notice in recipe.notices]
        print_json({"recipe": recipe.content, "file": given.to, "notices": notices})
    else:
        if given.to is None:
            print(recipe.dumps(), end="", flush=True)
        for notice in recipe.notices:
            print(notice, file=sys.stderr)
    return LOST if is_lost else 0
