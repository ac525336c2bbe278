"""`sparsifai compare`: the forms of a sparse model beside the dense one."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from .arguments import add_model

DESCRIPTION = """Compare each form of a sparse model with the dense model: file size, parameters, FLOPs and time.

The forms are the sparse model as it is, shrunk, with 2:4 kernels, and in CSR. If a form is not available, its note says
why. The dense model has the weights of --dense; without it, it is a copy whose zeros are filled with random numbers.

example: sparsifai compare --model torchvision:resnet18 --checkpoint pruned.pth --input 8,3,224,224
"""

FILLED = (
    "the weights of --checkpoint, with random numbers in place of zeros, since there is no --dense; time and size of a "
    "dense model do not depend on the values of its weights"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)
    parser.add_argument("--dense", type=Path, metavar="FILE", help="the weights of the dense model")
    parser.add_argument(
        "--repeats", type=int, help="how often each form is timed, at least 3; default: for about a second"
    )


def run(given: argparse.Namespace) -> None:
    """Compare the models, and print the table."""
    from ..export.comparison import compare
    from .loading import batch_of, filled, model_of
    from .output import content_of, print_json, print_table

    if given.checkpoint is None or given.input is None:
        raise ValueError("give --checkpoint and --input, such as --checkpoint pruned.pth --input 8,3,224,224")
    sparse = model_of(given.model, given.checkpoint)
    dense = filled(sparse) if given.dense is None else model_of(given.model, given.dense)
    table = compare(dense, sparse, batch_of(given.input, dense), given.repeats)
    if given.dense is None:
        of_dense = replace(table.forms[0], note=FILLED)
        table = replace(table, forms=(of_dense, *table.forms[1:]))
    if given.json:
        print_json({"measured": table.caption, **content_of(table)})
    else:
        print_table(table, given.all)
