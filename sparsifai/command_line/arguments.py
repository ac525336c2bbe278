"""Arguments that several commands take."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

_MODEL = (
    "package:function that returns the untrained model, such as torchvision:resnet50, timm:convnext_tiny or "
    "my_package.models:net, with literals as arguments, 'torchvision:resnet18(num_classes=37)'; or transformers:PATH "
    "of a folder or a config.json. A checkpoint of save_pretrained implies it"
)

_CHECKPOINT = (
    "the weights: a file of learn.save, torch.save(state_dict), safetensors, save_sparse or save_shrunk, or a folder "
    "of save_pretrained; no code in it is run"
)


def add_model(parser: argparse.ArgumentParser, checkpoint: str = _CHECKPOINT) -> None:
    """Add --model, --checkpoint and --input."""
    parser.add_argument("--model", help=_MODEL)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help=checkpoint)
    parser.add_argument(
        "--input",
        type=shape,
        metavar="SHAPE",
        help="shape of a batch, such as 1,3,224,224; of token ids for models of transformers, and with int: before it",
    )


def add_to(parser: argparse.ArgumentParser, what: str, required: bool = False) -> None:
    """Add --to and --force. what: what is written."""
    parser.add_argument("--to", type=Path, metavar="FILE", required=required, help=what)
    parser.add_argument("--force", action="store_true", help="write the file even if there is one already")


def check_to(to: Path | None, force: bool) -> None:
    """Refuse what cannot or must not be written, before any work is done.

    Raises:
        ValueError: There is a file, or a link, and `force` is false. Or there is no folder to write it to.
    """
    if to is not None and not force and os.path.lexists(to):
        raise ValueError(f"{to} exists already; choose another name, or give --force to replace it")
    if to is not None and (to.is_dir() or not os.access(to.parent, os.W_OK | os.X_OK)):
        is_there = to.parent.is_dir()
        why = (
            "this is a folder"
            if to.is_dir()
            else f"the folder {'cannot be written to' if is_there else 'does not exist'}"
        )
        raise ValueError(f"{to}: {why}; give the path of a file in a folder of yours")


def shape(text: str) -> tuple[bool, tuple[int, ...]]:
    """Whether a batch has whole numbers, and its shape, of a text such as '1,3,224,224' or 'int:1,128'.

    Raises:
        argparse.ArgumentTypeError: It is not such a text.
    """
    try:
        sizes = tuple(int(size) for size in text.removeprefix("int:").split(","))
        if min(sizes) < 1:
            raise ValueError
        return text.startswith("int:"), sizes
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 1,3,224,224") from None
