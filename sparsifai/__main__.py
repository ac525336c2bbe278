"""The command line: `sparsifai plan`, `sparsifai report`, `sparsifai convert`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .export.checkpoint import Checkpoint
from .export.sparse_file import SparseFile
from .export.sparse_format import is_safetensors
from .quantization.quantized import Quantized
from .recipes.recipe import Recipe
from .support.checkpoints import load_checkpoint
from .support.files import write_whole
from .support.printable import printable_lines
from .support.warning import own_filters

_PLAN = """Show what a recipe would do to a model, without data or training.

The table has the remaining weights, bytes and FLOPs (with --input) of each layer, and why some layers stay dense. Above
it is the sparsity after each epoch. A recipe with stages has a table for each stage that prunes.

example: sparsifai plan examples/recipes/training_aware.yaml --model torchvision:resnet50 --input 1,3,224,224
"""

_REPORT = """Count the zeros of a checkpoint.

The table has the weights and zeros of every matrix and of the whole file; tensors that share their memory count once in
the totals. What is not counted is listed with the reason: tensors that are quantized, nested, in a sparse layout or
without values on the meta device, the state of optimizers, and what stands beside the weights in a training checkpoint.

For a file of save_sparse, the table has the form in which each tensor is stored, its bytes, and the bytes that it would
take dense. For an int8 model in an ONNX file of quantize, it has the zeros of each weight.

example: sparsifai report checkpoint.pth
example: sparsifai report sparse.safetensors
"""

_CONVERT = """Convert a recipe of SparseML or llm-compressor to a recipe of sparsifai.

Parts that have no counterpart are listed on standard error, each with its line. If one of them would change the model,
the recipe is written, and the exit status is 3.

example: sparsifai convert sparseml.md --to recipe.yaml
"""

# The exit status of `convert` if it wrote a recipe that has lost something.
LOST = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The words after `sparsifai`. By default those of the command line.

    Returns:
        The exit status: 0 after success, 2 after an error, which is printed on standard error, and 3 if `convert` wrote
        a recipe without a part that would change the model.
    """
    parser = argparse.ArgumentParser(
        "sparsifai", description="Plan sparse training, measure sparse models, and convert recipes."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Callable[[Any], int | None], description: str) -> argparse.ArgumentParser:
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
    report.add_argument("checkpoint", type=Path, help="a file of torch.save, learn.save, save_sparse or quantize")

    convert = command("convert", _convert, _CONVERT)
    convert.add_argument("recipe", type=Path, help="a recipe of SparseML, YAML or Markdown that begins with YAML")
    convert.add_argument("--to", type=Path, help="the file to write; by default the recipe is printed")
    convert.add_argument("--force", action="store_true", help="write the file even if there is one already")
    convert.add_argument(
        "--strict", action="store_true", help="fail if a part that would change the model has no counterpart"
    )
    convert.add_argument("--epochs", type=int, help="the number of epochs, for a recipe that does not give it")

    given = parser.parse_args(arguments)
    try:
        status = given.run(given) or 0
        sys.stdout.flush()  # an error of a full disk is told now
        return status
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(printable_lines(f"sparsifai {given.command}: {error}"), file=sys.stderr)
        return 2


def _plan(given: Any) -> None:
    model, example = _model(given.model), None if given.input is None else torch.zeros(given.input)
    stages = Recipe.load(given.recipe).stages
    planned = [
        stage.plan(model, n_iter=given.batches, example_input=example) if _prunes(stage) or len(stages) == 1 else None
        for stage in stages
    ]
    plans = [plan for plan in planned if plan is not None]
    if not plans:
        raise ValueError("no stage of the recipe has a sparsify step, so there is nothing to plan")
    if len(stages) == 1:
        print(plans[0])
    else:
        print("Each stage is planned for the model as it is before all of them.")
        for number, (stage, plan) in enumerate(zip(stages, planned, strict=True), 1):
            print(f"\n{_title(stage, number)}", *([] if plan is None else [plan]), sep="\n")
    if given.picture is not None:
        import matplotlib.pyplot as plt

        height = sum(4 + 0.25 * len(plan.layers) for plan in plans)
        figure, axes = plt.subplots(2 * len(plans), 1, figsize=(9, height), layout="constrained")
        for plan, above, below in zip(plans, axes[::2], axes[1::2], strict=True):
            plan.plot_schedule(above)
            plan.plot(below)
        kind = given.picture.suffix[1:] or "png"
        write_whole(given.picture, lambda file: figure.savefig(file, format=kind))


def _prunes(recipe: Recipe) -> bool:
    return any(step.kind == "sparsify" for step in recipe.steps)


def _title(stage: Recipe, number: int) -> str:
    """What a stage is, as a line above its plan."""
    name, kinds = stage.content.get("name", number), ", ".join(step.kind for step in stage.steps)
    epochs = "" if stage.epochs is None else f" of {stage.epochs} epochs"
    how = f"a fit{epochs}" if stage.training else "applied at once, without training"
    return f"Stage {name}, {how}: {kinds}{'' if _prunes(stage) else '; nothing is pruned'}."


def _report(given: Any) -> None:
    if given.checkpoint.suffix == ".onnx":
        print(Quantized.read(given.checkpoint))
        return
    if is_safetensors(given.checkpoint):
        print(SparseFile.read(given.checkpoint))
        return
    found = _checkpoint(given.checkpoint)
    if not found.counted:
        reasons = [f"{name}: {each.why}" for name, each in found.left_out.items()]
        raise ValueError(f"{given.checkpoint} has no tensors whose zeros can be counted ({'; '.join(reasons)})")
    print("\n\n".join(map(str, found.tables())))


def _checkpoint(checkpoint: Path) -> Checkpoint:
    """The tensors of a file of torch.save by name."""
    try:
        state = load_checkpoint(checkpoint, others=True)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint} is not a state_dict written by torch.save; whole models and other pickles are not loaded, "
            f"as they can run code ({error})"
        ) from None
    found = Checkpoint.of(state)
    if not (isinstance(state, dict) and (found.counted or found.left_out)):
        raise ValueError(f"{checkpoint} has no tensors by name; give a file of torch.save(model.state_dict(), path)")
    return found


def _convert(given: Any) -> int:
    if given.to is not None and not given.force and os.path.lexists(given.to):
        raise ValueError(f"{given.to} exists already; choose another name, or give --force to replace it")
    with own_filters():
        warnings.simplefilter("ignore")  # the notices are printed
        recipe = Recipe.from_sparseml(given.recipe, strict=given.strict, epochs=given.epochs)
    if given.to is None:
        print(recipe.dumps(), end="", flush=True)
    else:
        recipe.save(given.to)
    for notice in recipe.notices:
        print(notice, file=sys.stderr)
    return LOST if any(notice.lost for notice in recipe.notices) else 0


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
