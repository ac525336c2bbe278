"""The weights in a checkpoint, by name, whoever wrote it. No code in it is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..export.checkpoint import OF_MODELS
from ..export.safetensors_file import SafetensorsFile, unique_json
from ..export.sparse_bitmask import INDEX, WEIGHTS, is_sparse_bitmask
from ..export.sparse_format import is_safetensors, read_tensors
from ..support.checkpoints import load_checkpoint
from ..support.files import open_regular, read_bytes
from ..support.printable import quoted

# Files of a folder of save_pretrained, in the order in which transformers looks for them.
IN_FOLDERS = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
_LARGEST_INDEX = 2**26

State = Mapping[str, Tensor]


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint.

    Args:
        path: A file of learn.save, torch.save, safetensors or save_sparse, or a folder of save_pretrained.

    Returns:
        Name -> tensor on the CPU.

    Raises:
        OSError: The checkpoint cannot be read.
        ValueError: It is damaged, holds code, or holds no tensors by name.
    """
    if path.name == INDEX:
        path = path.parent
    if path.is_dir() and not is_safetensors_folder(path):
        return _of_folder(path)
    if path.name.endswith(".index.json"):
        return _of_index(path)
    return _of_file(path)


def stored(path: Path) -> Any:
    """What a file holds: the content of a file of torch.save, or the tensors of safetensors files.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, or holds code.
    """
    if path.is_dir() or is_safetensors(path):
        return _of_safetensors(path)
    try:
        return load_checkpoint(path, others=True)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a state_dict written by torch.save; whole models and other pickles are not loaded, "
            f"as they can run code ({error})"
        ) from None


def is_safetensors_folder(path: Path) -> bool:
    """Whether a path is a folder of save_pretrained with safetensors files."""
    return any((path / name).exists() for name in (WEIGHTS, INDEX))


def metadata_of(path: Path) -> Mapping[str, str]:
    """The metadata of a safetensors file; none of a folder and of other files.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is a safetensors file that is damaged.
    """
    return {} if path.is_dir() or not is_safetensors(path) else _header(path).metadata


def is_sparse(path: Path) -> bool:
    """Whether a checkpoint is stored without its zeros, by save_sparse or save_pretrained_sparse.

    Raises:
        OSError: The checkpoint cannot be read.
        ValueError: It is damaged.
    """
    if path.is_dir():
        return is_safetensors_folder(path) and any(each.form != "dense" for each in read_tensors(path)[0].values())
    if not is_safetensors(path):
        return False
    header = _header(path)
    return "sparsifai_format" in header.metadata or is_sparse_bitmask(header.pieces)


def _header(path: Path) -> SafetensorsFile:
    with open_regular(path) as file:
        try:
            return SafetensorsFile.read(file)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); get a new copy of the file") from None


def _of_file(path: Path) -> dict[str, Tensor]:
    state = stored(path)
    for key in OF_MODELS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    items = state.items() if isinstance(state, Mapping) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} has no tensors by name; give a file of torch.save(model.state_dict(), path)")
    return tensors


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    if path.is_dir() or is_sparse(path):
        return {name: tensor.expand() for name, tensor in read_tensors(path)[0].items()}
    with open_regular(path) as opened:
        try:
            file = SafetensorsFile.read(opened)
            return {name: file.tensor(name) for name in file.pieces}
        except KeyError as error:
            raise ValueError(f"{path} has tensors of the type {error}, which this version of torch lacks") from None
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); get a new copy of the file") from None


def _of_folder(folder: Path) -> dict[str, Tensor]:
    for name in IN_FOLDERS:
        if (folder / name).is_file():
            return read_state(folder / name)
    raise ValueError(f"{folder} has no weights of save_pretrained; it needs one of {', '.join(IN_FOLDERS)}")


def _of_index(index: Path) -> dict[str, Tensor]:
    """The tensors of several files, of which an index says which tensor is in which file."""
    try:
        content = unique_json(read_bytes(index, _LARGEST_INDEX, "the index").decode(), "it")
        files = content["weight_map"]
        names = set(files.values())
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("its weight_map names what is no file beside it")
    except (UnicodeDecodeError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{index} is damaged: it has no weight_map from tensors to files") from None
    except ValueError as error:
        raise ValueError(f"{index} is damaged ({error})") from None
    read = {name: _of_file(index.parent / name) for name in sorted(names)}
    for tensor, name in files.items():
        if tensor not in read[name]:
            raise ValueError(f"{index.parent / name} lacks {quoted(tensor)}, which the index says it has")
    return {tensor: read[name][tensor] for tensor, name in files.items()}
