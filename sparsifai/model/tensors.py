"""Finding tensors in the outputs of models, and copying and casting single tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


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
            f"{caller}: {without[0]} is on the meta device, without values{count}; load the whole model into memory "
            "first, by model.to_empty(device='cpu') and load_state_dict, or without offloading (device_map=None)"
        )


def is_float(value: Any) -> bool:
    """Tell whether a value is a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def widened(value: Tensor) -> Tensor:
    """Cast a tensor in half precision to float32, which loses nothing; return others unchanged."""
    half = value.is_floating_point() and value.element_size() < 4
    return value.float() if half else value


def cloned(value: Any) -> Any:
    """Copy a tensor; return other values unchanged."""
    return value.clone() if isinstance(value, Tensor) else value
