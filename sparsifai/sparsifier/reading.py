"""Recording what the layers read that read joint groups, such as the heads of an attention, to take its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.hooks import hooked
from ..model.joint.groups import READER
from ..model.layers import NamedWeight
from .collection import Source

Read = dict[str, list[tuple[Tensor, int]]]  # name of a weight -> (input, number of examples) for each call


def readers_of(source: Source) -> dict[str, NamedWeight]:
    """The selected weights that read joint groups, by name."""
    return {name: layer for name, layer in source.layers.items() if source.joint[name][1].role == READER}


@contextmanager
def inputs_recorded(model: nn.Module, layers: Mapping[str, NamedWeight], rows: int) -> Iterator[Read]:
    """Record the inputs of some layers in a `with` block, with their graph.

    Args:
        model: The model.
        layers: Parameter name -> the weight of a layer.
        rows: Number of examples in the batch. If the first axis of an input is no multiple of it, each of its entries
            counts as an example.
    """
    read: Read = {}

    def see(name: str, value: Tensor, examples: int) -> Tensor:
        value = value if value.requires_grad else value.detach().requires_grad_()
        read.setdefault(name, []).append((value, examples))
        return value

    def before(name: str, owner: nn.Module) -> Callable:
        first = next(iter(signature(owner.forward).parameters), "")

        def hook(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            value = inputs[0] if inputs else named.get(first)
            if not isinstance(value, Tensor) or not value.numel() or not value.is_floating_point():
                return None
            seen = see(name, value, len(value) if value.dim() < 2 or len(value) % rows else rows)
            return ((seen, *inputs[1:]), named) if inputs else (inputs, {**named, first: seen})

        return hook

    def after(name: str) -> Callable:
        def hook(attention: Any, inputs: tuple, named: dict[str, Any], output: tuple) -> tuple:
            heads = _without_projection(attention)(*inputs, **named)[0]
            if heads.dim() == 2:
                value = see(name, heads[None], 1)[0]
            elif attention.batch_first:
                value = see(name, heads, len(heads))
            else:
                value = see(name, heads.transpose(0, 1), heads.shape[1]).transpose(0, 1)
            return F.linear(value, attention.out_proj.weight, attention.out_proj.bias), *output[1:]

        return hook

    owners = [(name, place, owner) for name, layer in layers.items() for place, owner in layer.owners]
    # nn.MultiheadAttention reads the weight of its output projection itself, without calling it.
    inside = {(name, place): model.get_submodule(place.rpartition(".")[0]) for name, place, _ in owners}
    of_torch = {key: module for key, module in inside.items() if isinstance(module, nn.MultiheadAttention)}
    with hooked(
        before=[(owner, before(name, owner)) for name, place, owner in owners if (name, place) not in of_torch],
        after=[(attention, after(name)) for (name, _), attention in of_torch.items()],
    ):
        yield read


def _without_projection(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """The same attention, with shared weights, that returns the outputs of its heads side by side."""
    bare = copy(attention)
    weight = attention.out_proj.weight
    projection = nn.Linear(1, 1, bias=False)
    projection.weight = nn.Parameter(torch.eye(len(weight), dtype=weight.dtype, device=weight.device), False)
    bare._modules = {**attention._modules, "out_proj": projection}
    bare._forward_hooks, bare._forward_pre_hooks = type(bare._forward_hooks)(), type(bare._forward_pre_hooks)()
    return bare
