"""`sparsifai shrink`: a smaller model without the filters, heads and neurons that are zero."""

from __future__ import annotations

import argparse
import warnings

from .arguments import add_model, add_to, check_to

DESCRIPTION = """Remove filters, attention heads and neurons that are zero from a model, and save the smaller one.

The table has what is removed from each layer, and why the rest stays. Without --to nothing is written. The file is one
of save_shrunk: load_shrunk(model, file) loads it into a model of the original size.

example: sparsifai shrink --model timm:resnet18 --checkpoint pruned.pth --input 1,3,224,224 --to small.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)
    add_to(parser, "the file to write")


def run(given: argparse.Namespace) -> None:
    """Shrink the model, print what was removed, and save what is left."""
    from ..export.shrink import shrunk
    from ..export.shrunk_file import save_shrunk
    from .loading import batch_of, model_of
    from .output import content_of, print_json, print_table

    check_to(given.to, given.force)
    if given.checkpoint is None or given.input is None:
        raise ValueError("give --checkpoint and --input, such as --checkpoint pruned.pth --input 1,3,224,224")
    model = model_of(given.model, given.checkpoint)
    small, table = shrunk(model, batch_of(given.input, model))
    removes = table.parameters_left < table.parameters
    saved = save_shrunk(small, given.to) if removes and given.to is not None else None
    if given.json:
        sizes = {"parameters": table.parameters, "parameters_left": table.parameters_left}
        file = None if saved is None else {"path": saved.path, "bytes": saved.bytes}
        print_json({**sizes, "file": file, **content_of(table)})
    else:
        print_table(table, given.all)
        if saved is not None:
            print(f"\n{saved.path}: {saved.bytes:,} bytes")
    if not removes:
        why = f": {table.reasons}" if table.reasons else "; prune whole filters, heads or neurons first"
        why = f"nothing can be removed{why}"
        if given.to is not None:
            raise ValueError(f"{why}; {given.to} is not written")
        warnings.warn(why, stacklevel=2)
