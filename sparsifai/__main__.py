"""The command line: `sparsifai plan`, `sparsifai report`, `sparsifai convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .export.sparse_file import SparseFile
from .export.sparse_format import is_safetensors
from .model.zeros import Count, figures
from .recipes.recipe import Recipe
from .support.table import Cells

_PLAN = """What a recipe would do to a model, without data or training.

How many weights of each layer are left, why some stay dense, bytes, FLOPs (with --input), the sparsity by epoch.

example: sparsifai plan examples/recipes/training_aware.yaml --model torchvision:resnet50 --input 1,3,224,224
"""


_REPORT = """The zeros of a checkpoint, counted: of every matrix, and of the whole file.

Of a file of save_sparse, how each tensor is stored, and the bytes that this takes and that it would take dense.

example: sparsifai report checkpoint.pth
example: sparsifai report sparse.safetensors
"""


_CONVERT = """Make a recipe of one of SparseML. What has no counterpart is listed with its line, on standard error.

example: sparsifai convert sparseml.md --to recipe.yaml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it went well, 2 if what was given cannot work."""
    parser = argparse.ArgumentParser("sparsifai", description="Plan, convert and measure sparse models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Callable[[Any], None], description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=description.partition("\n")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    plan = command("plan", _plan, _PLAN)
    plan.add_argument("recipe", type=Path, help="a recipe, YAML")
    plan.add_argument(
        "--model", required=True, help="package:function that makes a model, such as torchvision:resnet50, untrained"
    )
    plan.add_argument("--input", type=_shape, help="shape of a batch, such as 1,3,224,224, for FLOPs and data flow")
    plan.add_argument("--batches", type=int, default=100, help="batches in an epoch, for the timeline (default 100)")
    plan.add_argument("--picture", type=Path, help="write timeline and layers as a picture, too")

    report = command("report", _report, _REPORT)
    report.add_argument("checkpoint", type=Path, help="what torch.save, learn.save or save_sparse has written")

    convert = command("convert", _convert, _CONVERT)
    convert.add_argument("recipe", type=Path, help="YAML, or Markdown with YAML in front")
    convert.add_argument("--to", type=Path, help="file to write; by default the recipe is printed")
    convert.add_argument("--strict", action="store_true", help="refuse if anything is lost, instead of listing it")
    convert.add_argument("--epochs", type=int, help="if the recipe does not say how many there are")

    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"sparsifai {given.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _plan(given: Any) -> None:
    model, example = _model(given.model), None if given.input is None else torch.zeros(given.input)
    plan = Recipe.load(given.recipe).plan(model, n_iter=given.batches, example_input=example)
    print(plan)
    if given.picture is not None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(2, 1, figsize=(9, 4 + 0.25 * len(plan.layers)), layout="constrained")
        plan.plot_schedule(axes[0])
        plan.plot(axes[1]).figure.savefig(given.picture)


def _report(given: Any) -> None:
    if is_safetensors(given.checkpoint):
        print(SparseFile.read(given.checkpoint))
        return
    try:
        state = torch.load(given.checkpoint, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises whatever it finds in a file
        raise ValueError(
            f"{given.checkpoint} is no state_dict that torch.save has written; whole models and other pickles, which "
            f"can run code, are not loaded ({type(error).__name__})"
        ) from None
    for key in ("model", "state_dict"):  # as learn.save and others write it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = (
        {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
        if isinstance(state, dict)
        else {}
    )
    if not tensors:
        raise ValueError(f"{given.checkpoint} has no tensors by name; give a state_dict that torch.save has written")
    matrices = {name: value for name, value in tensors.items() if value.dim() > 1}
    rows = [_counted(name, "x".join(map(str, value.shape)), value) for name, value in matrices.items()]
    totals = [_counted("all of these", "", *matrices.values()), _counted("whole file", "", *tensors.values())]
    print(Cells(("weight", "shape", "weights", "zeros", "sparsity"), rows, totals, left=(0, 1)).text())


def _convert(given: Any) -> None:
    recipe = Recipe.from_sparseml(given.recipe, strict=given.strict, epochs=given.epochs)
    if given.to is None:
        print(recipe.dumps(), end="")
    else:
        recipe.save(given.to)
    for notice in recipe.notices:
        print(notice, file=sys.stderr)


def _is_plain(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_quantized and not value.is_meta


def _counted(name: str, shape: str, *tensors: Tensor) -> tuple[str, ...]:
    return name, shape, *figures(Count.of(*tensors))


def _model(name: str) -> nn.Module:
    """A model from package:function; 'torchvision' and 'timm' know where theirs are."""
    package, _, function = name.partition(":")
    try:
        made = _made(package, function) if function else None
    except Exception as error:  # of whatever code makes the model
        raise ValueError(f"--model {name}: {error or type(error).__name__}") from error
    if not function:
        raise ValueError(f"--model {name}: give package:function, such as torchvision:resnet50")
    if not isinstance(made, nn.Module):
        raise ValueError(f"--model {name}: {function} makes no torch.nn.Module")
    return made


def _made(package: str, function: str) -> Any:
    if package == "torchvision":
        return import_module("torchvision.models").get_model(function, weights=None)
    if package == "timm":
        return import_module("timm").create_model(function, pretrained=False)
    sys.path.insert(0, "")
    made = getattr(import_module(package), function, None)
    return made() if callable(made) and not isinstance(made, nn.Module) else made


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
        if min(sizes) < 1:
            raise ValueError
        return sizes
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape, such as 1,3,224,224") from None


if __name__ == "__main__":
    sys.exit(main())
