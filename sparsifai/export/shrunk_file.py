"""Saving a model that `shrink` made, and loading it into a model of the original size.

The file is that of `save_sparse`: a safetensors file, without pickle. In its metadata, `sizes` is JSON: name of a
module -> attribute -> whole number, for all sizes that the modules keep, such as num_heads. Buffers that are in no
state_dict are stored, too, since they can be smaller.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.joint.adapting import adapt
from ..model.joint.attention import find_heads
from ..model.joint.entries import LISTS
from ..model.joint.mlp import find_neurons
from ..model.joint.removal import replace_tensor
from ..model.layers import CHANNEL_LAYERS, outputs_of, parameter_name, size_of
from ..model.parallel import kind_of, unwrapped
from ..model.running import sharing_copy
from ..support.arguments import checks_arguments
from ..support.checks import check_is_module
from ..support.printable import printable
from .pretrained_config import update_config
from .safetensors_file import unique_json
from .sparse_file import SparseFile, check_storable, write_state
from .sparse_format import Tensors, read_with_metadata, some_of
from .sparse_tensor import DTYPES

Sizes = Mapping[str, Mapping[str, int]]


@checks_arguments
def save_shrunk(model: nn.Module, file: str | os.PathLike) -> SparseFile:
    """Save a model that `shrink` made: its tensors, and the sizes that its modules keep.

    It is a safetensors file, without pickle and without the zeros that are left. An existing file is replaced at once;
    after an error it is unchanged.

    Args:
        model: The smaller model, as it is or trained further. Of a wrapper (compiled, data parallel) the model inside
            is saved.
        file: The file to write.

    Returns:
        What the file stores of each tensor.

    Raises:
        OSError: The file cannot be written.
        TypeError: `model` is not a torch.nn.Module.
        ValueError: The state_dict has something that a safetensors file cannot store.

    Example:
        >>> model, batch = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).eval(), torch.rand(4, 8)
        >>> Sparsifier(model, 'filter', coupled=True, example_input=batch).sparsify(0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_shrunk(shrink(model, batch), f'{folder}/small.safetensors')
        ...     small = load_shrunk(model, f'{folder}/small.safetensors')
        >>> small[0].out_features
        8
    """
    check_is_module("save_shrunk", "model", model)
    state = check_storable("save_shrunk", model, _tensors_of(unwrapped(model)))
    return write_state("save_shrunk", file, state, {"sizes": json.dumps(_sizes_of(unwrapped(model)))})


@torch.no_grad()
@torch.inference_mode(False)
@checks_arguments
def load_shrunk(model: nn.Module, file: str | os.PathLike) -> nn.Module:
    """Load a file of `save_shrunk`: returns a copy of a model of the original size that is cut to the saved one.

    Args:
        model: A model as it was before `shrink`, with weights of any values; it is not changed. If `shrink` removed
            whole blocks or experts, it must have as many of them as the smaller model. Of a wrapper (compiled, data
            parallel) the model inside is copied.
        file: The file.

    Returns:
        The smaller model, with the saved weights bit for bit, on the devices and in the modes of `model`.

    Raises:
        OSError: The file cannot be read.
        TypeError: `model` is not a torch.nn.Module.
        ValueError: The file was not written by `save_shrunk`, is damaged, or does not fit the model.

    Example:
        >>> def original():
        ...     return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
        >>> model, batch = original(), torch.rand(4, 8)
        >>> _ = Sparsifier(model, 'filter', coupled=True, example_input=batch).sparsify(0.5)
        >>> small = shrink(model, batch)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_shrunk(small, f'{folder}/small.safetensors')
        ...     loaded = load_shrunk(original(), f'{folder}/small.safetensors')
        >>> loaded[0], torch.equal(loaded(batch), small(batch))
        (Linear(in_features=8, out_features=8, bias=True), True)
    """
    check_is_module("load_shrunk", "model", model)
    model, file = unwrapped(model), Path(file)
    tensors, metadata, _ = read_with_metadata(file)
    if "sizes" not in metadata:
        raise ValueError(f"load_shrunk: {file} was not written by save_shrunk, but by save_sparse; load it with that")
    try:
        sizes = _checked_sizes(unique_json(metadata["sizes"], "its metadata"))
    except ValueError as error:
        raise ValueError(f"load_shrunk: {file} is damaged ({error}); get a new copy of the file") from None
    small = sharing_copy(model)
    found = [*find_heads(small), *find_neurons(small)]
    old = check_storable("load_shrunk", model, _tensors_of(small))
    persistent = small.state_dict().keys()
    added = _added_biases(file, small, old, tensors, persistent)
    for name, tensor in old.items():
        if name in tensors:
            _check_fits(file, name, tensor, tensors)
    values = {name: stored.expand() for name, stored in tensors.items() if stored.name == name}
    _write_sizes(file, small, sizes)
    cut = {name for name, tensor in old.items() if name in tensors and tensors[name].shape != tuple(tensor.shape)}
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in old.items()}.values():
        # A buffer that the model computes itself is only taken if it has been cut.
        if name in persistent or name in cut:
            replace_tensor(small, tensor, values[tensors[name].name].to(tensor.device))
    for name in added:
        weight = attrgetter(f"{name.rpartition('.')[0]}.weight".lstrip("."))(small)
        owner: Any = small.get_submodule(name.rpartition(".")[0])
        owner.bias = nn.Parameter(values[tensors[name].name].to(weight.device), weight.requires_grad)
    for groups in found:
        if cut & {part.name for part in groups.parts}:
            adapt(small, groups)
    _check_layers(file, small)
    if cut:
        update_config(small, found, model)
    return small


def _tensors_of(model: nn.Module) -> dict[str, Any]:
    """The state_dict of a model, and its buffers that are not in it."""
    return {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.state_dict(keep_vars=True))}


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _sizes_of(model: nn.Module) -> Sizes:
    """The whole numbers that the modules of a model keep."""
    every = {
        name: {attribute: value for attribute, value in vars(module).items() if attribute[0] != "_" and _is_size(value)}
        for name, module in model.named_modules()
    }
    return {name: sizes for name, sizes in every.items() if sizes}


def _checked_sizes(sizes: Any) -> Sizes:
    if not isinstance(sizes, dict) or not all(
        isinstance(each, dict) and all(map(_is_size, each.values())) for each in sizes.values()
    ):
        raise ValueError("its sizes are not whole numbers by module and attribute")
    return sizes


def _write_sizes(file: Path, model: nn.Module, sizes: Sizes) -> None:
    """Set the sizes that modules keep. They can only fall: shrink makes nothing larger."""
    for name, module in model.named_modules():
        for attribute, saved in sizes.get(name, {}).items():
            own = vars(module).get(attribute)
            if not _is_size(own) or own == saved:
                continue
            if saved > own:
                raise ValueError(
                    f"load_shrunk: {printable(parameter_name(name, attribute))} is {saved} in {file}, but {own} in the "
                    "model; pass a model of the original size"
                )
            setattr(module, attribute, saved)


def _added_biases(
    file: Path, model: nn.Module, old: Mapping[str, Tensor], tensors: Tensors, persistent: Any
) -> list[str]:
    """Names of biases of the file that the model does not have, because `shrink` added them; the others must fit."""
    missing = [name for name in persistent if name not in tensors]
    added: list[str] = []
    unexpected: list[str] = []
    modules = dict(model.named_modules())
    for name in tensors.keys() - old.keys():
        owner, _, attribute = name.rpartition(".")
        layer = modules.get(owner)
        is_bias = attribute == "bias" and isinstance(layer, CHANNEL_LAYERS) and layer.bias is None
        weight = tensors.get(parameter_name(owner, "weight"))
        fits = weight is not None and len(tensors[name].shape) == 1 and tensors[name].shape[0] in weight.shape[:2]
        (added if is_bias and fits else unexpected).append(name)
    if missing or unexpected:
        what = [f"lacks {some_of(missing)}"] if missing else []
        what += [f"has {some_of(sorted(unexpected))}, which the model does not have"] if unexpected else []
        advice = _advice_on_lists(model, tensors, bool(unexpected)) or "pass a model as it was before shrink"
        raise ValueError(
            f"load_shrunk: {file} was saved from another model than {kind_of(model)}: it {' and '.join(what)}; {advice}"
        )
    return added


def _advice_on_lists(model: nn.Module, tensors: Tensors, is_other: bool) -> str:
    """What to do if a list of modules, such as residual blocks, is longer in a model than in a file; empty if none is.

    Which entries are gone is not in the file. is_other: whether the file has tensors that the model does not have; then
    a list of which it has nothing tells nothing.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LISTS):
            continue
        start = len(parameter_name(name, ""))
        keys = {key[start:].split(".")[0] for key in tensors if key.startswith(parameter_name(name, ""))}
        entries = [key for key, entry in module._modules.items() if entry is not None and entry.state_dict()]
        if (keys or not is_other) and len(keys) < len(entries):
            return (
                f"it has {len(keys)} of the {len(entries)} modules in {printable(name) or kind_of(module)}, so if "
                "shrink removed whole blocks or experts, pass a model that was made with as many as the smaller one, "
                "of the same kinds; or save the smaller model with its own save_pretrained (transformers), or with "
                "torch.save(model, file), and read that with torch.load(file, weights_only=False)"
            )
    return ""


def _check_fits(file: Path, name: str, tensor: Tensor, tensors: Tensors) -> None:
    """Check that a tensor of the model can be cut to the saved shape."""
    stored = tensors[name]
    dtype = str(DTYPES[stored.dtype]).removeprefix("torch.")
    if len(stored.shape) != tensor.dim() or any(map(int.__gt__, stored.shape, tensor.shape)):
        raise ValueError(
            f"load_shrunk: {printable(name)} has the shape {stored.shape} in {file}, and {tuple(tensor.shape)} in the "
            "model cannot be cut to it; pass a model as it was before shrink"
        )
    if DTYPES[stored.dtype] != tensor.dtype:
        own = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"load_shrunk: {printable(name)} is {dtype} in {file}, but {own} in the model; load into a model of that "
            f"dtype, as model.to(torch.{dtype}) gives, and cast it afterwards"
        )


def _check_layers(file: Path, model: nn.Module) -> None:
    """Check that the sizes that layers keep are those of their weights."""
    for name, module in model.named_modules():
        if not isinstance(module, CHANNEL_LAYERS):
            continue
        layer: Any = module
        sizes = outputs_of(layer), size_of(layer, "inputs") or 0
        first, second = reversed(sizes) if getattr(layer, "transposed", False) else sizes
        expected = (first, second // max(getattr(layer, "groups", 1), 1))
        if "weight" in layer._parameters and tuple(layer.weight.shape[:2]) != expected:
            raise ValueError(
                f"load_shrunk: the sizes of {printable(name)} in {file} are {expected}, which do not fit its weight of "
                f"the shape {tuple(layer.weight.shape)}; get a new copy of the file"
            )
