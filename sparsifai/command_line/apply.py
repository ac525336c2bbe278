"""`sparsifai apply`: one-shot pruning of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_model, add_to, check_to

if TYPE_CHECKING:
    from torch import nn

    from ..sparsifier.sparsifier import Sparsifier
    from ..sparsifier.sparsifiers import Sparsifiers

DESCRIPTION = """Prune a checkpoint at once, without data or training, and save it.

How the weights are pruned is said by options, whose values `sparsifai list` shows, or by a recipe. The table has the
zeros of each layer. Without --to nothing is written.

example: sparsifai apply --model torchvision:resnet18 --checkpoint dense.pth --sparsity 0.8 --to sparse.safetensors
example: sparsifai apply --checkpoint bert/ --granularity head --layers "*.attention.*" --sparsity 0.25 --to bert.pth
example: sparsifai apply --model my_models:net --checkpoint net.pth --recipe recipe.yaml --to net.sparse --format sparse
"""

_AXES = {"granularity": "weight", "context": "global", "criteria": "large_final"}

# Suffix of a file -> its format.
_FORMATS = {".pth": "torch", ".pt": "torch", ".bin": "torch", ".safetensors": "safetensors"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)
    parser.add_argument(
        "--sparsity",
        action="append",
        metavar="FRACTION",
        help="0.8 for 80 %%; PATTERN=FRACTION for the layers of a pattern, as often as there are patterns",
    )
    for axis, default in _AXES.items():
        parser.add_argument(f"--{axis}", help=f"default {default}; see `sparsifai list {axis}`")
    parser.add_argument("--layers", nargs="+", metavar="PATTERN", help="names or globs of the layers that are pruned")
    parser.add_argument("--exclude", nargs="+", metavar="PATTERN", help="names or globs of layers that stay dense")
    parser.add_argument(
        "--coupled", action="store_true", help="prune filters together that shrink can only remove together"
    )
    parser.add_argument("--recipe", type=Path, help="a recipe, instead of these options")
    add_to(parser, "the file to write: .pth, .pt, .bin, .safetensors, or any name with --format")
    parser.add_argument(
        "--format",
        choices=["torch", "safetensors", "sparse"],
        help="a state_dict of torch.save, a safetensors file, or a file of save_sparse, without the zeros",
    )


def run(given: argparse.Namespace) -> None:
    """Prune the model, print its report, and save it."""
    from .loading import batch_of, model_of
    from .output import content_of, print_json, print_table

    check_to(given.to, given.force)
    kind = None if given.to is None else _format(given)
    if given.checkpoint is None:
        raise ValueError("give --checkpoint, the weights that are pruned")
    _check_one_way(given)
    model = model_of(given.model, given.checkpoint)
    example = batch_of(given.input, model)
    pruned = _by_options(given, model, example) if given.recipe is None else _by_recipe(given.recipe, model, example)
    report = pruned.report()
    if given.to is not None:
        _save(model, given.to, kind)
    if given.json:
        print_json({"sparsity": report.selected.sparsity, "file": given.to, **content_of(report)})
    else:
        print_table(report, given.all)
        if given.to is not None:
            print(f"\n{given.to}: {given.to.stat().st_size:,} bytes")


def _format(given: argparse.Namespace) -> str:
    kind = given.format or _FORMATS.get(given.to.suffix)
    if kind is None:
        raise ValueError(f"the format of {given.to} is not known by its suffix; give --format")
    return kind


def _check_one_way(given: argparse.Namespace) -> None:
    """Check that a recipe or options are given, and not both."""
    options = [name for name in ("sparsity", *_AXES, "layers", "exclude", "coupled") if getattr(given, name)]
    if given.recipe is None and given.sparsity is None:
        raise ValueError("give --sparsity, such as --sparsity 0.8, or --recipe")
    if given.recipe is not None and options:
        raise ValueError(f"--recipe says how the model is pruned; leave out --{', --'.join(options)}")


def _by_options(given: argparse.Namespace, model: nn.Module, example: Any) -> Sparsifier:
    from ..sparsifier.sparsifier import Sparsifier

    values = {axis: _value(axis, getattr(given, axis) or default) for axis, default in _AXES.items()}
    _check_without_data(values["criteria"])
    sparsity = _sparsity(given.sparsity)
    sparsifier = Sparsifier(
        model, **values, layers=given.layers, exclude=given.exclude, coupled=given.coupled, example_input=example
    )
    sparsifier.sparsify(sparsity)
    return sparsifier


def _by_recipe(path: Path, model: nn.Module, example: Any) -> Sparsifier | Sparsifiers:
    from ..recipes.recipe import Recipe

    recipe = Recipe.load(path)
    for step in recipe.steps:
        if step.kind == "sparsify":
            _check_without_data(_value("criteria", step.options.get("criteria", _AXES["criteria"])))
    return recipe.apply(model, example_input=example)


def _value(axis: str, given: Any) -> Any:
    """A value of an axis: a name, axes such as 'out,h', or one with options, as recipes have it: '{blocks: [4]}'."""
    from ..recipes.axis_value import axis_value
    from ..recipes.safe_yaml import load_yaml

    if isinstance(given, str) and given.startswith(("{", "[")):
        given = load_yaml(given).value
    elif isinstance(given, str) and axis == "granularity" and "," in given:
        given = [each.strip() for each in given.split(",")]
    return axis_value(axis, given)


def _check_without_data(criterion: Any) -> None:
    """Refuse a criterion whose scores need data, or what training has changed."""
    from ..axes.criterion import quantities_of
    from ..support.registry import name_of

    needed = [name for name in quantities_of(criterion) if name not in ("weight", "rng", "flow")]
    if needed:
        raise ValueError(
            f"criteria {name_of(criterion)} needs {', '.join(needed)}, which a checkpoint does not have; choose "
            "another, such as large_final, or call Sparsifier.calibrate(batches, loss_func) in Python, or train"
        )


def _sparsity(given: list[str]) -> Any:
    """A fraction, or the fraction of each pattern."""
    try:
        pairs = [each.rpartition("=") for each in given]
        if len(pairs) == 1 and not pairs[0][1]:
            return float(pairs[0][2])
        if all(pattern for pattern, _, _ in pairs):
            return {pattern: float(fraction) for pattern, _, fraction in pairs}
    except ValueError:
        pass
    raise ValueError(f"--sparsity is one fraction such as 0.8, or several PATTERN=FRACTION, not {' '.join(given)}")


def _save(model: nn.Module, path: Path, kind: str | None) -> None:
    import torch

    from ..export.sparse_file import save_sparse, state_of
    from ..support.files import write_whole

    if kind == "sparse":
        save_sparse(model, path)
    elif kind == "torch":
        write_whole(path, lambda file: torch.save(model.state_dict(), file))
    else:
        from safetensors.torch import save

        # Tied tensors are stored under each of their names, so that the file can be loaded strictly.
        state = {name: tensor.contiguous().clone() for name, tensor in state_of("apply", model).items()}
        content = save(state, {"format": "pt"})
        write_whole(path, lambda file: file.write(content))
