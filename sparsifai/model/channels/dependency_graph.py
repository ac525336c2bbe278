"""torch-pruning's dependency graph of one forward: all that touches that library, and its names, is here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..hooks import hooked
from ..layers import CHANNEL_LAYERS, is_depthwise, size_of
from ..parallel import kind_of, unwrapped
from ..running import check_runs, copy_of, run
from ..tensors import is_float, tensors_in

# What treats every channel by itself.
_BY_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)


_NORMS_OF_INPUT: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


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


class _Ends(nn.Module):
    """A model with marks at its ends, so that the graph shows what is coupled with them."""

    def __init__(self, model: nn.Module, example_input: Any):
        super().__init__()
        self.model = model
        self.marks = nn.ModuleDict()
        self.called: dict[nn.Module, Tensor] = {}  # layers and what they have put out
        self.ends: list[nn.Module] = []  # layers whose outputs end in nothing
        for module in model.modules():
            if isinstance(module, CHANNEL_LAYERS):
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

    def count(module: nn.Module, inputs: Any, named: Any, output: Tensor) -> None:
        channels[module] = output.shape[-3]

    shuffles = [module for module in model.modules() if isinstance(module, nn.PixelShuffle)]
    if shuffles:
        with hooked([(module, count) for module in shuffles]):
            run(model, example_input)
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


# What one layer's outputs are coupled with: (name, 'outputs', 'through' or 'inputs', place), output of the layer.
Group = list[tuple[tuple[str, str, Any], int]]


LOST = "what is computed of it is not followed"


def coupled_groups(model: nn.Module, example_input: Any, kept: dict[str, str]) -> tuple[list[Group], dict[str, int]]:
    """What the outputs of every layer are coupled with, and the order of the names: name -> its place in the model.

    kept: layer -> why none of its channels can be removed; what the graph shows of that is added. ValueError if the
    model does not run on the example, or torch-pruning cannot follow it.
    """
    library = torch_pruning()
    wrapper = _Ends(copy_of(unwrapped(model)).eval(), example_input).requires_grad_(True)
    with torch.random.fork_rng(), torch.no_grad():
        check_runs(wrapper.model, example_input)
    names: dict[Any, str] = {module: name.removeprefix("model.") for name, module in wrapper.named_modules()}
    names |= {parameter: name for name, parameter in wrapper.model.named_parameters()}
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
            most = 4 * max(
                max(size_of(each, side) or 0 for side in ("inputs", "outputs")) for each in wrapper.modules()
            )
            for dependency in (each for node in graph.module2node.values() for each in node.dependencies):
                dependency.index_mapping = _Bounded(dependency.index_mapping, most)
            groups = list(_groups(graph, names, kept, library.ops.OPTYPE))
    except Exception as error:  # it raises whatever it stumbles upon
        raise ValueError(
            f"torch-pruning cannot follow the computation of {kind_of(model)} ({type(error).__name__}: {error}), so "
            "that it is not known which channels go together"
        ) from error
    return groups, {name: number for number, name in enumerate(names.values())}


def _groups(graph: Any, names: Mapping[Any, str], kept: dict[str, str], types: Any) -> Iterator[Group]:
    """A group for every layer. kept: here is noted of what no channel can be removed, by name, and why."""
    for root in list(graph.module2node):
        if not isinstance(root, CHANNEL_LAYERS) or root not in names:
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
            elif isinstance(module, CHANNEL_LAYERS):
                inward = graph.is_in_channel_pruning_fn(item.dep.handler) and not is_depthwise(module)
                side = "inputs" if inward else "outputs"
            elif isinstance(module, nn.PixelShuffle):
                # Of channels that arrive as one the graph keeps the first: here they are coupled.
                yield [((names[module], side, place), place // module.upscale_factor**2) for place in item.idxs]
            elif not isinstance(module, _BY_CHANNEL):
                reason = f"it goes through {names[module]} ({type(module).__name__}), which takes channels together"
            name, size = names.get(module, "output"), size_of(module, side)
            if reason:
                kept.setdefault(name, reason)
            for place, channel in zip(item.idxs, item.root_idxs, strict=True):
                known = size is None or 0 <= place < size
                group.append(((name, side, place) if known else (LOST, "through", f"{name} {place}"), channel))
        yield group
