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
from ..model.layers import NamedWeight, full_name_of
from ..support.registry import name_of
from .collection import CollectedQuantities, Source

# Its subclass of the second version, too.
_OF_TORCHVISION = "torchvision.models.swin_transformer.ShiftedWindowAttention"

Read = dict[str, list[tuple[Tensor, int]]]  # name of a weight -> (input, number of examples) for each call


def readers_of(source: Source) -> dict[str, NamedWeight]:
    """The selected weights that read joint groups, by name."""
    return {name: layer for name, layer in source.layers.items() if source.joint[name][1].role == READER}


def check_read(collected: CollectedQuantities) -> None:
    """Refuse a criterion of what layers read of joint groups, if there are no such groups or no such layers.

    Raises:
        ValueError: No layer reads the groups of some module.
    """
    source = collected.source
    for quantity in collected.at("input_grad"):
        needs = f"criterion {name_of(collected.criterion)} needs {quantity}, which is about"
        advice = "give granularity 'head' or 'neuron', or a criterion of weights and gradients such as taylor"
        if not source.joint:
            raise ValueError(f"{needs} groups of several layers; {advice}")
        read = {id(source.joint[name][0]) for name in readers_of(source)}
        if unread := [name for name in source.layers if id(source.joint[name][0]) not in read]:
            what = source.joint[unread[0]][0].what
            raise ValueError(f"{needs} the inputs of layers, but no layer reads the {what}s of {unread[0]}; {advice}")


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

    def after(name: str, path: str) -> Callable:
        def hook(attention: nn.Module, inputs: tuple, named: dict[str, Any], output: Any) -> Any:
            heads = _without_projection(attention, path)(*inputs, **named)
            heads = heads[0] if isinstance(heads, tuple) else heads
            if heads.dim() == 2:
                value = see(name, heads[None], 1)[0]
            elif getattr(attention, "batch_first", True):
                value = see(name, heads, len(heads))
            else:
                value = see(name, heads.transpose(0, 1), heads.shape[1]).transpose(0, 1)
            projection: Any = attention.get_submodule(path)
            result = F.linear(value, projection.weight, projection.bias)
            return (result, *output[1:]) if isinstance(output, tuple) else result

        return hook

    owners = [(name, place, owner) for name, layer in layers.items() for place, owner in layer.owners]
    around = {(name, place): model.get_submodule(place.rpartition(".")[0]) for name, place, _ in owners}
    uncalled = {key: module for key, module in around.items() if _reads_weights(module)}
    with hooked(
        before=[(owner, before(name, owner)) for name, place, owner in owners if (name, place) not in uncalled],
        after=[(module, after(name, place.rpartition(".")[2])) for (name, place), module in uncalled.items()],
    ):
        yield read


def _reads_weights(module: nn.Module) -> bool:
    """Whether an attention reads the weight of its output projection itself, without calling it."""
    return isinstance(module, nn.MultiheadAttention) or _OF_TORCHVISION in map(full_name_of, type(module).__mro__)


def _without_projection(attention: nn.Module, path: str) -> nn.Module:
    """The same attention, with shared weights, that returns the outputs of its heads side by side.

    Args:
        attention: The attention. What it does to the output of its projection, such as moving it to other places, does
            not mix features.
        path: Name of the output projection.
    """
    bare = copy(attention)
    weight: Any = attention.get_parameter(f"{path}.weight")
    projection = nn.Linear(1, 1, bias=False)
    projection.weight = nn.Parameter(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), False)
    bare._modules = {**attention._modules, path: projection}
    bare._forward_hooks, bare._forward_pre_hooks = type(bare._forward_hooks)(), type(bare._forward_pre_hooks)()
    return bare
