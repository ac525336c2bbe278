"""Coupled channels: which outputs of which layers can only be removed together, and what reads them.

A sum couples channel i of all that it adds; a norm layer, a depthwise convolution and a product pass channel i on; a
concatenation and a split move it. torch-pruning's dependency graph knows all this from one forward. Here its groups are
made into sets: one for each channel, of all outputs that yield it and all inputs that read it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_map

from ...axes.quantity import run
from ..flow import is_float, tensors_in
from ..layers import CONVOLUTIONS
from ..parallel import kind_of, unwrapped

Place = tuple[str, int]  # name of a layer, number of an output or input

LAYERS = (nn.Linear, *CONVOLUTIONS)


# What treats every channel by itself.
_BY_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)


_NORMS_OF_INPUT: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True)
class ChannelSet:
    """A channel: all that has to go if it goes.

    outputs: of the layers that yield it; a depthwise convolution yields it, too. through: places in norm layers and
    the like, which treat it by itself. inputs: of the layers that read it. kept: why it cannot go, '' if it can.
    """

    outputs: tuple[Place, ...]
    through: tuple[Place, ...]
    inputs: tuple[Place, ...]
    kept: str


def torch_pruning() -> Any:
    """The library. ImportError that says what to do if it is not there."""
    try:
        import torch_pruning as library
    except ImportError as error:
        raise ImportError(
            f"coupled channels are found by torch-pruning, which cannot be imported ({error}); "
            "pip install 'sparsifai[shrink]'"
        ) from error
    return library


def is_depthwise(module: nn.Module) -> bool:
    """Whether output i of a layer is of input i alone."""
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels


def find_channels(model: nn.Module, example_input: Any) -> list[ChannelSet]:
    """The channels of all convolutions and Linear layers of a model, in the order of the model's layers.

    ValueError if the model does not run on the example, or torch-pruning cannot follow it.
    """
    library = torch_pruning()
    wrapper = _Ends(copied(unwrapped(model)).eval(), example_input).requires_grad_(True)
    with torch.random.fork_rng(), torch.no_grad():
        check_runs(wrapper.model, example_input)
    names: dict[Any, str] = {module: name.removeprefix("model.") for name, module in wrapper.named_modules()}
    names |= {parameter: name for name, parameter in wrapper.model.named_parameters()}
    kept = _obstacles(wrapper.model)
    try:
        with torch.random.fork_rng(), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on parameters outside of layers, which are told of here
            shuffles = _channels_of_shuffles(wrapper, example_input)

            def build() -> Any:
                pruners = {nn.PixelShuffle: _Shuffled(shuffles)}
                return library.DependencyGraph().build_dependency(
                    wrapper, example_input, run, verbose=False, customized_pruners=pruners
                )

            graph = build()
            if wrapper.add_ends(graph.module2node):
                graph = build()
            _map_shuffles(graph, library.dependency.index_mapping._FlattenIndexMapping)
            most = 4 * max(max(_size(each, side) or 0 for side in ("inputs", "outputs")) for each in wrapper.modules())
            for dependency in (each for node in graph.module2node.values() for each in node.dependencies):
                dependency.index_mapping = _Bounded(dependency.index_mapping, most)
            groups = list(_groups(graph, names, kept, library.ops.OPTYPE))
    except Exception as error:  # it raises whatever it stumbles upon
        raise ValueError(
            f"torch-pruning cannot follow the computation of {kind_of(model)} ({type(error).__name__}: {error}), so "
            "that it is not known which channels go together"
        ) from error
    return _joined(groups, kept, {name: number for number, name in enumerate(names.values())})


class _Ends(nn.Module):
    """A model with marks at its ends, so that the graph shows what is coupled with them."""

    def __init__(self, model: nn.Module, example_input: Any):
        super().__init__()
        self.model = model
        self.marks = nn.ModuleDict()
        self.called: dict[nn.Module, Tensor] = {}  # layers and what they have put out
        self.ends: list[nn.Module] = []  # layers whose outputs end in nothing
        for module in model.modules():
            if isinstance(module, LAYERS):
                module.register_forward_hook(lambda module, inputs, output: self.called.update({module: output}))
        self._number = 0
        self._each(example_input, self._add_mark)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The outputs, after an operation that shows where the model ends."""
        inputs, named = self._each((inputs, named), self._mark)
        outputs = [output for output in tensors_in(self.model(*inputs, **named)) if is_float(output)]
        return [output * 1 for output in [*outputs, *(self.called[end] for end in self.ends)]]

    def add_ends(self, known: Container[nn.Module]) -> bool:
        """Have layers that are called, but are not known, among the ends; whether there are any."""
        self.ends = [module for module in self.called if module not in known]
        return bool(self.ends)

    def _each(self, tree: Any, function: Any) -> Any:
        self._number = 0
        return tree_map(function, tree)

    def _add_mark(self, value: Any) -> None:
        if is_float(value) and value.dim() in _NORMS_OF_INPUT:
            kind = _NORMS_OF_INPUT[value.dim()]
            self.marks[str(self._number)] = kind(value.shape[1], device=value.device, dtype=value.dtype)
        self._number += 1

    def _mark(self, value: Any) -> Any:
        key, self._number = str(self._number), self._number + 1
        return self.marks[key](value) if key in self.marks else value


@dataclass
class _Shuffled:
    """What the graph asks of PixelShuffle, which makes r x r channels one. channels: of its outputs."""

    channels: Mapping[nn.Module, int]

    def prune_out_channels(self, module: nn.Module, places: list[int]) -> nn.Module:
        """Nothing: it has no parameters."""
        return module

    prune_in_channels = prune_out_channels

    def get_out_channels(self, module: nn.Module) -> int:
        """Channels that it puts out."""
        return self.channels[module]

    def get_in_channels(self, module: nn.PixelShuffle) -> int:
        """Channels that it reads, by which the graph numbers its places."""
        return self.channels[module] * module.upscale_factor**2


def _channels_of_shuffles(model: nn.Module, example_input: Any) -> dict[nn.Module, int]:
    channels: dict[nn.Module, int] = {}
    handles = [
        module.register_forward_hook(lambda module, inputs, output: channels.update({module: output.shape[-3]}))
        for module in model.modules()
        if isinstance(module, nn.PixelShuffle)
    ]
    if handles:
        run(model, example_input)
    for handle in handles:
        handle.remove()
    return channels


def _map_shuffles(graph: Any, mapping: Callable) -> None:
    """Have the graph map the r x r channels that a PixelShuffle reads to the one that is made of them, and back."""
    for module, node in graph.module2node.items():
        if isinstance(module, nn.PixelShuffle):
            stride = module.upscale_factor**2
            for dependency in node.dependencies:
                if dependency.target in node.outputs:
                    dependency.index_mapping[0] = mapping(stride=stride, reverse=True)
            for behind in node.outputs:
                for dependency in behind.dependencies:
                    if dependency.target is node:  # on the way back it comes after the offset in a concatenation
                        dependency.index_mapping.append(mapping(stride=stride, reverse=False))


class _Bounded(list):
    """Mappings of places from layer to layer. OverflowError of more places than any layer has.

    Reshapes that the graph misreads, as those of windows in a Swin transformer, multiply them one after the other.
    """

    def __init__(self, mappings: Iterable[Callable | None], most: int):
        super().__init__(mappings)
        self.most = most

    def __iter__(self) -> Iterator[Any]:
        return (mapping and partial(self._mapped, mapping) for mapping in super().__iter__())

    def _mapped(self, mapping: Callable, places: list) -> list:
        mapped = mapping(places)
        if len(mapped) > self.most:
            raise OverflowError(f"{len(mapped)} places, but no layer has more than {self.most}")
        return mapped


def copied(model: nn.Module) -> nn.Module:
    """A copy, of models too that hold tensors computed in a forward, as with torch.nn.utils.spectral_norm."""
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in held if not value.is_leaf})


def check_runs(model: nn.Module, example_input: Any) -> Any:
    """The output for an example. ValueError if there is none."""
    try:
        return run(model, example_input)
    except Exception as error:
        raise ValueError(
            f"example_input does not run through {kind_of(model)} ({error}); pass a batch that the model accepts, on "
            "its device: a tuple for several positional arguments, a dictionary for keywords"
        ) from error


# What one layer's outputs are coupled with: (name, 'outputs', 'through' or 'inputs', place), output of the layer.
Group = list[tuple[tuple[str, str, Any], int]]


LOST = "what is computed of it is not followed"


def _groups(graph: Any, names: Mapping[Any, str], kept: dict[str, str], types: Any) -> Iterator[Group]:
    """A group for every layer. kept: here is noted of what no channel can be removed, by name, and why."""
    for root in list(graph.module2node):
        if not isinstance(root, LAYERS) or root not in names:
            continue
        pruner = graph.get_pruner_of_module(root)
        every = list(range(pruner.get_out_channels(root)))
        group: Group = []
        try:
            items = list(graph.get_pruning_group(root, pruner.prune_out_channels, every))
        except OverflowError:
            kept.setdefault(names[root], LOST)
            yield [((names[root], "outputs", place), place) for place in every]
            continue
        for item in items:
            module = item.dep.target.module
            side, reason = "through", ""
            if item.dep.target.type == types.OUTPUT:
                reason = "it yields the output of the model"
            elif module not in names or getattr(module, "num_parameters", 0) == 1:
                continue  # PReLU can have one parameter for all channels
            elif names[module].startswith("marks."):
                reason = "coupled with the input of the model"
            elif isinstance(module, nn.Parameter):
                reason = f"coupled with {names[module]}, a parameter of no layer"
            elif isinstance(module, LAYERS):
                inward = graph.is_in_channel_pruning_fn(item.dep.handler) and not is_depthwise(module)
                side = "inputs" if inward else "outputs"
            elif isinstance(module, nn.PixelShuffle):
                # Of channels that arrive as one the graph keeps the first: here they are coupled.
                yield [((names[module], side, place), place // module.upscale_factor**2) for place in item.idxs]
            elif not isinstance(module, _BY_CHANNEL):
                reason = f"it goes through {names[module]} ({type(module).__name__}), which takes channels together"
            name, size = names.get(module, "output"), _size(module, side)
            if reason:
                kept.setdefault(name, reason)
            for place, channel in zip(item.idxs, item.root_idxs, strict=True):
                known = size is None or 0 <= place < size
                group.append(((name, side, place) if known else (LOST, "through", f"{name} {place}"), channel))
        yield group


def _size(module: Any, side: str) -> int | None:
    """Number of places on a side of a layer, None if it is not known."""
    if isinstance(module, nn.Linear):
        return module.in_features if side == "inputs" else module.out_features
    if isinstance(module, CONVOLUTIONS):
        return module.in_channels if side == "inputs" else module.out_channels
    return None


def _obstacles(model: nn.Module) -> dict[str, str]:
    """Layers of which no channel can be removed, and why."""
    owners: dict[int, list[str]] = {}
    obstacles = {LOST: LOST}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
        if isinstance(module, CONVOLUTIONS) and module.groups > 1 and not is_depthwise(module):
            obstacles[name] = f"coupled with {name}, whose {module.groups} groups have to stay equal"
        elif is_parametrized(module) or isinstance(module, LAYERS) and "weight" not in module._parameters:
            obstacles[name] = f"coupled with {name}, whose weights are computed from others"
    for sharing in owners.values():
        if len(sharing) > 1:
            obstacles |= dict.fromkeys(sharing, f"coupled with {' and '.join(sharing)}, which share a parameter")
    return obstacles


def _joined(groups: Iterable[Group], kept: Mapping[str, str], order: Mapping[str, int]) -> list[ChannelSet]:
    """Sets of all places that are coupled in any group, which is to say, of the same channel of its layer."""
    parent: dict[Any, Any] = {}

    def root(key: Any) -> Any:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    places = set()
    for number, group in enumerate(groups):
        for place, channel in group:
            places.add(place)
            parent[root(place)] = root((number, channel))
    members: dict[Any, list[tuple[str, str, int]]] = {}
    for place in sorted(places, key=lambda place: (order.get(place[0], len(order)), place)):
        members.setdefault(root(place), []).append(place)
    return [
        ChannelSet(
            _on("outputs", each), _on("through", each), _on("inputs", each),
            next((kept[name] for name, _, _ in each if name in kept), ""),
        )
        for each in members.values()
    ]  # fmt: skip


def _on(side: str, places: list[tuple[str, str, int]]) -> tuple[Place, ...]:
    return tuple((name, place) for name, of, place in places if of == side)
