"""`sparsifai report`: the zeros of a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_model

if TYPE_CHECKING:
    from ..support.table import Table

DESCRIPTION = """Count the zeros of a checkpoint.

The table has the weights and zeros of every matrix and of the whole file; tensors that share their memory count once in
the totals. What is not counted is listed with the reason: tensors that are quantized, nested, in a sparse layout or
without values on the meta device, the state of optimizers, and what stands beside the weights in a training checkpoint.

For what save_sparse or save_pretrained_sparse wrote, the table has the form in which each tensor is stored, its bytes,
and the bytes that it would take dense. For an int8 model in an ONNX file of quantize, it has the zeros of each weight.
With --model, it is the report of the model with these weights: layer by layer, and which have no named axes.

example: sparsifai report checkpoint.pth
example: sparsifai report sparse.safetensors
example: sparsifai report learn.pth --model "torchvision:resnet18(num_classes=37)"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "file",
        type=Path,
        nargs="?",
        help="a file of torch.save, learn.save, safetensors, save_sparse or quantize, or a folder of save_pretrained",
    )
    add_model(parser, checkpoint="the same as FILE")


def run(given: argparse.Namespace) -> None:
    """Print the tables of a checkpoint."""
    from .output import content_of, print_json, print_table

    if (given.file is None) == (given.checkpoint is None):
        raise ValueError("give one checkpoint to report on")
    path = given.checkpoint if given.file is None else given.file
    tables = _of_model(given.model, path) if given.model else _tables(path)
    if given.json:
        print_json({"file": path, "tables": [content_of(table) for table in tables]})
        return
    for number, table in enumerate(tables):
        if number:
            print()
        print_table(table, given.all)


def _of_model(model: str, path: Path) -> Sequence[Table]:
    from ..sparsifier.report import Report
    from .loading import model_of

    return [Report.of(model_of(model, path))]


def _tables(path: Path) -> Sequence[Table]:
    """The tables that a checkpoint has of itself, without a model."""
    from ..export.checkpoint import Checkpoint
    from ..export.sparse_file import SparseFile
    from ..quantization.quantized import Quantized
    from .state import is_sparse, read_state, stored

    if path.suffix == ".onnx":
        return [Quantized.read(path)]
    if is_sparse(path):
        return [SparseFile.read(path)]
    is_one_file = not path.is_dir() and not path.name.endswith(".index.json")
    state: Any = stored(path) if is_one_file else read_state(path)
    found = Checkpoint.of(state)
    if not (isinstance(state, dict) and (found.counted or found.left_out)):
        raise ValueError(f"{path} has no tensors by name; give a file of torch.save(model.state_dict(), path)")
    if not found.counted:
        reasons = [f"{name}: {each.why}" for name, each in found.left_out.items()]
        raise ValueError(f"{path} has no tensors whose zeros can be counted ({'; '.join(reasons)})")
    return found.tables()
