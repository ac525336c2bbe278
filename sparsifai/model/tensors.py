"""Tensors in trees of values, and copies and casts of single ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def first_tensor(output: Any, whose: str) -> Tensor:
    """The output of a model or a layer, of several the first; ValueError if that is no tensor."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ValueError(
            f"{whose} gives {type(output).__name__}, and tensors are compared; wrap it in a module that gives one"
        )
    return output.as_subclass(Tensor)  # fastai's do not mix


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in containers, and in plain objects, as some models return them."""
    tensors = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)) and not callable(leaf):
            tensors += [held for held in tree_leaves(vars(leaf)) if isinstance(held, Tensor)]
    return tensors


def is_float(value: Any) -> bool:
    """Whether something is a tensor of floats."""
    return isinstance(value, Tensor) and value.is_floating_point()


def widened(value: Tensor) -> Tensor:
    """Half precision as float32, which loses nothing."""
    half = value.is_floating_point() and value.element_size() < 4
    return value.float() if half else value


def cloned(value: Any) -> Any:
    """A copy of a tensor; all else as it is."""
    return value.clone() if isinstance(value, Tensor) else value
