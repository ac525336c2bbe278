"""Finding tensors in the outputs of models, and copying, casting and checking single tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from ..support.printable import printable
from .parallel import is_sharded, whole

_UNSIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}

# The name of an output of a model that gives it none.
UNNAMED = "an output without a name"


def first_tensor(output: Any, whose: str) -> Tensor:
    """Return the output of a model or a layer, or the first one of several.

    Args:
        output: What the model or layer returned.
        whose: Its name, for the message.

    Raises:
        ValueError: That is not a tensor.
    """
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ValueError(
            f"{whose} returns {type(output).__name__}, but only tensors can be compared; wrap it in a module that "
            "returns a tensor"
        )
    # fastai's subclasses of Tensor cannot be combined with each other.
    return output.as_subclass(Tensor)


def logits_in(output: Any, whose: str) -> dict[str, Tensor]:
    """The logits that a model returned, by name; if it has none with a name, its output or the first of several.

    Args:
        output: What the model returned: logits; or a dictionary or an object with `logits`, or else with several, such
            as `start_logits` and `end_logits`.
        whose: Its name, for the message.

    Raises:
        ValueError: There is no tensor.
    """
    named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    named = {**named, "logits": named.get("logits", getattr(output, "logits", None))}
    found = {name: each for name, each in named.items() if str(name).endswith("logits") and isinstance(each, Tensor)}
    of_one = {"logits": found["logits"]} if "logits" in found else found
    return {name: first_tensor(each, whose) for name, each in (of_one or {UNNAMED: output}).items()}


def tensors_in(tree: Any) -> list[Tensor]:
    """List all tensors in nested containers, and in the attributes of plain objects, which some models return."""
    tensors = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif hasattr(leaf, "__dict__") and not callable(leaf):  # modules, classes and functions are callable
            tensors += [held for held in tree_leaves(vars(leaf)) if isinstance(held, Tensor)]
    return tensors


def check_values(caller: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors have values.

    Args:
        caller: Name of the function that was called, for the message.
        tensors: The parameters of a model by name.

    Raises:
        ValueError: One of them is on torch's meta device, because it was made there or because its values are
            offloaded.
    """
    without = [name for name, tensor in tensors.items() if tensor.is_meta]
    if without:
        count = f" ({len(without)} of {len(tensors)} parameters are)" if len(without) > 1 else ""
        raise ValueError(
            f"{caller}: {printable(without[0])} is on the meta device, without values{count}; load the whole model "
            "into memory first, by model.to_empty(device='cpu') and load_state_dict, or without offloading "
            "(device_map=None)"
        )


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor; () where it has none, as a nested or a lazy one."""
    return () if is_lazy(tensor) or tensor.is_nested else tuple(tensor.shape)


def size_of(tensor: Tensor) -> int:
    """Return the number of elements of a tensor, zeros of a sparse one included; 0 while it is lazy."""
    return 0 if is_lazy(tensor) else tensor.numel()


def is_fixed(tensor: Tensor) -> bool:
    """Tell whether a tensor cannot be written to: it is made of other tensors, or elements are at one place."""
    if is_made_of_others(tensor):
        return True
    if tensor.layout != torch.strided or tensor.is_nested:
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def is_made_of_others(tensor: Tensor) -> bool:
    """Tell whether a tensor is a subclass without memory of its own, as for quantized weights. A shard is none."""
    return hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor)


def is_float(value: Any) -> bool:
    """Tell whether a value is a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def widened(value: Tensor) -> Tensor:
    """Cast a tensor in half precision or float8 to float32, which loses nothing; return others unchanged."""
    half = value.is_floating_point() and value.element_size() < 4
    return value.float() if half else value


def computable(value: Tensor) -> Tensor:
    """Return a tensor of a type that torch compares and takes magnitudes of, with the same zeros.

    float8 is cast to float32, which loses nothing. Unsigned integers of several bytes are read as signed ones. Others
    are returned unchanged.
    """
    if value.dtype in _UNSIGNED:
        return value.view(_UNSIGNED[value.dtype])
    return value.float() if value.is_floating_point() and value.element_size() == 1 else value


def cloned(value: Any) -> Any:
    """Copy a tensor; return other values unchanged."""
    return value.clone() if isinstance(value, Tensor) else value


def sent(values: np.ndarray, device: torch.device) -> Tensor:
    """Numbers as a tensor on a device; a transfer to a GPU is not waited for."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def all_finite(tensors: Iterable[Tensor | None]) -> Tensor:
    """Whether all numbers of some tensors are finite: a bool tensor on the device of the first."""
    flags = []
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            dense = whole(tensor.detach().to_dense() if tensor.is_sparse else tensor.detach())
            # The largest magnitude is inf or NaN if any number is. A sum could overflow, or cancel.
            flags.append(torch.linalg.vector_norm(dense, float("inf")).isfinite())
    return torch.stack([flag.to(flags[0].device) for flag in flags]).all() if flags else torch.tensor(True)


def with_autograd(tree: Any) -> Any:
    """Replace tensors that were made under `torch.inference_mode`, which autograd refuses, by copies.

    Args:
        tree: A tensor, or nested containers of tensors and other values.
    """

    def ordinary(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    with torch.inference_mode(False):
        return tree_map(ordinary, tree)
