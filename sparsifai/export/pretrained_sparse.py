"""Saving a transformers model to a folder without its zeros, in the form `sparse-bitmask` of compressed-tensors."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from operator import methodcaller
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import nn

from ..model.parallel import unwrapped
from ..support.arguments import checks_arguments
from ..support.checks import check_is_module
from ..support.files import open_regular, write_text, write_whole
from .pretrained_config import is_pretrained
from .safetensors_file import SafetensorsFile
from .sparse_bitmask import (
    CONFIG,
    FORM,
    INDEX,
    BitmaskTensor,
    check_names,
    config_entry,
    index_text,
    weight_files,
)
from .sparse_file import SparseFile, ties_of


@checks_arguments
def save_pretrained_sparse(
    model: nn.Module, folder: str | os.PathLike, max_shard_size: int | str | None = None
) -> SparseFile:
    """Save a transformers model to a folder without its zeros, in the form `sparse-bitmask` of compressed-tensors.

    The folder is what `model.save_pretrained` writes, but every weight that takes fewer bytes so is stored as its
    nonzero values and one bit per weight. Other weights stay dense, and so do tied ones, which are stored once.
    `load_sparse(folder, model)` reads it bit for bit. compressed-tensors 0.9 to 0.14 reads it, too. Its later versions,
    and with them transformers 5, do not, nor does vLLM: give them what `model.save_pretrained` writes. The folder
    appears whole, or not at all. While it is written, the dense files take space on the disk.

    Args:
        model: A model of transformers. Of a wrapper (compiled, data parallel) the model inside is saved.
        folder: A folder that does not exist yet, or is empty.
        max_shard_size: The largest size of one file, as `save_pretrained` takes it: a number of bytes of dense weights,
            or a text such as '5GB'. Default: that of transformers.

    Returns:
        What the folder stores of each tensor.

    Raises:
        OSError: The folder cannot be written, or has files already.
        TypeError: `model` is not a model of transformers.
        ValueError: The model is quantized, or cannot be saved by `save_pretrained`.

    Warns:
        UserWarning: No weight has enough zeros for a smaller form, so all are stored dense.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> model = BertModel(config)
        >>> Sparsifier(model).sparsify(0.9)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     saved = save_pretrained_sparse(model, f'{parent}/bert')
        ...     loaded = load_sparse(f'{parent}/bert', BertModel(config))
        >>> saved.ratio < 0.4
        True
    """
    caller = "save_pretrained_sparse"
    check_is_module(caller, "model", model)
    model = unwrapped(model)
    if not is_pretrained(model):
        raise TypeError(
            f"{caller}: {type(model).__name__} is not a model of transformers, which has a config; save it with "
            "save_sparse(model, file)"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{caller}: {type(model).__name__} is quantized, and has no zeros to leave out; use its "
                         "save_pretrained")  # fmt: skip
    goal = Path(os.path.realpath(folder))
    if goal.exists() and (not goal.is_dir() or any(goal.iterdir())):
        raise FileExistsError(errno.EEXIST, f"{caller}: there are files already; choose another folder", str(folder))
    if not goal.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"{caller}: the folder around it does not exist; create it first", str(goal.parent)
        )
    staged = goal.parent / f".sparsifai-{uuid4().hex}.tmp"
    staged.mkdir()
    try:
        _write(model, staged, {} if max_shard_size is None else {"max_shard_size": max_shard_size})
        saved = SparseFile.read(staged)
        if goal.exists():
            goal.rmdir()  # Windows moves nothing over an empty folder
        staged.replace(goal)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    if all(row.form != FORM for row in saved.rows):
        warnings.warn(
            f"{caller}: no weight of {type(model).__name__} has enough zeros to take fewer bytes, so all are stored "
            "dense, as save_pretrained does; prune the model first",
            stacklevel=2,
        )
    return SparseFile(goal, saved.rows, saved.bytes, saved.dense_bytes)


def _write(model: Any, folder: Path, options: dict[str, Any]) -> None:
    """Save the model as transformers does, and replace the files of weights, one after the other."""
    model.save_pretrained(folder, **options)
    try:
        files = weight_files(folder)
    except OSError:
        raise ValueError(
            f"save_pretrained_sparse: save_pretrained of {type(model).__name__} writes no safetensors file of a whole "
            "model; merge adapters into it first"
        ) from None
    from safetensors.torch import save

    ties = ties_of(model.state_dict())
    tied = {*ties, *ties.values()}
    names: dict[str, list[str]] = {}
    tensors: dict[str, BitmaskTensor] = {}
    for path in files:
        with open_regular(path) as opened:
            dense = SafetensorsFile.read(opened)
            check_names(dense.pieces)
            found = {name: BitmaskTensor.of(name, dense.tensor(name), name in tied) for name in dense.pieces}
        pieces = {key: piece for stored in found.values() for key, piece in stored.pieces().items()}
        written = save(pieces, {"format": "pt"})
        path.unlink()
        write_whole(path, methodcaller("write", written))
        names[path.name], tensors = list(pieces), tensors | found
    if (folder / INDEX).exists():
        write_text(folder / INDEX, index_text(names, sum(stored.bytes for stored in tensors.values())))
    if any(stored.form == FORM for stored in tensors.values()):
        counts = [stored.unset for stored in tensors.values()]
        sparsity = sum(count.zeros for count in counts) / sum(count.weights for count in counts)
        config = json.loads((folder / CONFIG).read_text())
        config["quantization_config"] = config_entry(tensors, sparsity)
        write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
