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
from .support.checkpoints import load_checkpoint
from .support.files import write_whole
from .support.printable import printable_lines
from .support.table import Cells

_PLAN = """Show what a recipe would do to a model, without data or training.

The table has the remaining weights, bytes and FLOPs (with --input) of each layer, and why some layers stay dense. Above
it is the sparsity after each epoch.

example: sparsifai plan examples/recipes/training_aware.yaml --model torchvision:resnet50 --input 1,3,224,224
"""

_REPORT = """Count the zeros of a checkpoint.

The table has the weights and zeros of every matrix and of the whole file. Tensors whose zeros cannot be counted
(quantized, in a sparse layout, without values on the meta device) are listed with the reason.

For a file of save_sparse, the table has the form in which each tensor is stored, its bytes, and the bytes that it would
take dense.

example: sparsifai report checkpoint.pth
example: sparsifai report sparse.safetensors
"""

_CONVERT = """Convert a recipe of SparseML to a recipe of sparsifai.

Parts that have no counterpart are listed on standard error, each with its line.

example: sparsifai convert sparseml.md --to recipe.yaml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The words after `sparsifai`. By default those of the command line.

    Returns:
        The exit status: 0 after success, 2 after an error, which is printed on standard error.
    """
    parser = argparse.ArgumentParser(
        "sparsifai", description="Plan sparse training, measure sparse models, and convert recipes."
    )
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
    plan.add_argument("recipe", type=Path, help="a recipe, a YAML file")
    plan.add_argument(
        "--model", required=True, help="package:function that returns an untrained model, such as torchvision:resnet50"
    )
    plan.add_argument(
        "--input",
        type=_shape,
        help="shape of a batch, such as 1,3,224,224: for FLOPs, and for models that torch.fx cannot trace",
    )
    plan.add_argument("--batches", type=int, default=100, help="number of batches in an epoch (default 100)")
    plan.add_argument("--picture", type=Path, help="a file for a picture of the sparsity over time and of the layers")

    report = command("report", _report, _REPORT)
    report.add_argument("checkpoint", type=Path, help="a file of torch.save, learn.save or save_sparse")

    convert = command("convert", _convert, _CONVERT)
    convert.add_argument("recipe", type=Path, help="a recipe of SparseML, YAML or Markdown that begins with YAML")
    convert.add_argument("--to", type=Path, help="the file to write; by default the recipe is printed")
    convert.add_argument(
        "--strict", action="store_true", help="fail if a part that would change the model has no counterpart"
    )
    convert.add_argument("--epochs", type=int, help="the number of epochs, for a recipe that does not give it")

    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(printable_lines(f"sparsifai {given.command}: {error}"), file=sys.stderr)
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
        figure, kind = plan.plot(axes[1]).figure, given.picture.suffix[1:] or "png"
        write_whole(given.picture, lambda file: figure.savefig(file, format=kind))


def _report(given: Any) -> None:
    if is_safetensors(given.checkpoint):
        print(SparseFile.read(given.checkpoint))
        return
    tensors = _tensors_of(given.checkpoint)
    skipped = {name: why for name, value in tensors.items() if (why := _why_skipped(value))}
    counted = {name: value for name, value in tensors.items() if name not in skipped}
    if not counted:
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        raise ValueError(f"{given.checkpoint} has no tensors whose zeros can be counted ({reasons})")
    matrices = {name: value for name, value in counted.items() if value.dim() > 1}
    rows = [_counted(name, _shape_of(value), value) for name, value in matrices.items()]
    whole = "all that are counted" if skipped else "whole file"
    totals = [_counted("all of these", "", *matrices.values()), _counted(whole, "", *counted.values())]
    print(Cells(("weight", "shape", "weights", "zeros", "sparsity"), rows, totals, left=(0, 1)).text())
    if skipped:
        print(f"\n{_not_counted(tensors, skipped).text()}")


def _not_counted(tensors: dict[str, Tensor], skipped: dict[str, str]) -> Cells:
    """The table of the tensors that are not counted. skipped: name -> reason."""
    rows = [(name, _shape_of(tensors[name]), f"{tensors[name].numel():,}", why) for name, why in skipped.items()]
    total = sum(tensors[name].numel() for name in skipped)
    header = ("not counted", "shape", "weights", "why")
    return Cells(header, rows, [("all of these", "", f"{total:,}", "")], left=(0, 1, 3))


def _tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save by name; 'name[0]' is the first of a tuple, as quantized layers have them."""
    try:
        state = load_checkpoint(checkpoint, old_format=True)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint} is not a state_dict written by torch.save; whole models and other pickles are not loaded, "
            f"as they can run code ({error})"
        ) from None
    for key in ("model", "state_dict"):  # as learn.save and other libraries write it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors: dict[str, Tensor] = {}
    for name, value in state.items() if isinstance(state, dict) else ():
        several = isinstance(value, (tuple, list))
        named = {f"{name}[{place}]": each for place, each in enumerate(value)} if several else {str(name): value}
        tensors |= {name: each for name, each in named.items() if isinstance(each, Tensor)}
    if not tensors:
        raise ValueError(f"{checkpoint} has no tensors by name; give a file of torch.save(model.state_dict(), path)")
    return tensors


def _why_skipped(value: Tensor) -> str:
    """Why the zeros of a tensor cannot be counted; empty if they can."""
    if value.is_quantized:
        return f"quantized ({_short(value.dtype)}); dequantize() makes it countable"
    if value.layout != torch.strided:
        return f"in the layout {_short(value.layout)}; to_dense() makes it countable"
    if value.is_meta:
        return "on the meta device, which holds no values"
    try:
        torch.count_nonzero(torch.zeros(1, dtype=value.dtype))
    except RuntimeError:
        return f"torch cannot count zeros of {_short(value.dtype)}; float() makes it countable"
    return ""


def _short(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _shape_of(value: Tensor) -> str:
    return "x".join(map(str, value.shape))


def _convert(given: Any) -> None:
    recipe = Recipe.from_sparseml(given.recipe, strict=given.strict, epochs=given.epochs)
    if given.to is None:
        print(recipe.dumps(), end="")
    else:
        recipe.save(given.to)
    for notice in recipe.notices:
        print(notice, file=sys.stderr)


def _counted(name: str, shape: str, *tensors: Tensor) -> tuple[str, ...]:
    return name, shape, *figures(Count.of(*tensors))


def _model(name: str) -> nn.Module:
    """The model that package:function returns; for torchvision and timm, function is the name of a model."""
    package, _, function = name.partition(":")
    try:
        made = _made(package, function) if function else None
    except Exception as error:  # the code that makes a model may raise anything
        raise ValueError(f"--model {name}: {error or type(error).__name__}") from error
    if not function:
        raise ValueError(f"--model {name}: give package:function, such as torchvision:resnet50")
    if not isinstance(made, nn.Module):
        raise ValueError(f"--model {name}: {function} is not a torch.nn.Module, nor a function that returns one")
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
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 1,3,224,224") from None


if __name__ == "__main__":
    sys.exit(main())
