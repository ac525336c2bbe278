"""torch-pruning's dependency graph of one forward pass. Only this file calls that library.

It uses what is inside the graph: its nodes, their dependencies and the index mappings of these. pyproject.toml
therefore allows only versions of torch-pruning that this file has been tested with.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ...support.printable import printable
from ...support.progress import progress
from ...support.warning import own_filters
from ..layers import CHANNEL_LAYERS, is_depthwise, outputs_of, size_of
from ..parallel import kind_of, unwrapped
from ..running import in_modes, random_restored, run, sharing_copy
from .concatenations import sizes_of_concatenation
from .equal_groups import has_several_groups
from .marked_model import HiddenNorm, HiddenPart, MarkedModel
from .pixel_shuffle import PixelShuffles, channels_of_shuffles, map_pixel_shuffles
from .rewriting import ChannelOperation, ChannelOperations, map_shuffles

# Layers that handle each channel by itself.
_BY_CHANNEL = (
    *(nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU, HiddenNorm, ChannelOperation),
)


# The reason for keeping a channel that the graph loses track of.
UNKNOWN_PATH = "path through the model unknown"


# Members that are no layers: the end of the model, and indices that no layer has. No module can have such a name.
END, UNKNOWN = ".end", ".unknown"


Member = tuple[str, str, Any]  # name of a layer; 'outputs', 'through' or 'inputs'; index
Group = list[tuple[Member, int]]  # what the outputs of one layer are coupled with, each with the index of the output


def torch_pruning() -> Any:
    """The library.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import torch_pruning as library
    except ImportError as error:
        raise ImportError(
            f"torch-pruning finds which channels are coupled, and cannot be imported ({error}); "
            "run pip install 'sparsifai[shrink]'"
        ) from error
    return library


def coupled_groups(
    model: nn.Module, example_input: Any, why_kept: dict[str, str]
) -> tuple[list[Group], dict[str, int], dict[str, ChannelOperation]]:
    """What the outputs of each layer are coupled with, by one forward pass of a copy of the model.

    Args:
        model: Any torch model, also in a wrapper.
        example_input: A batch, a tuple of positional inputs or a dictionary of named ones.
        why_kept: Layer name -> why none of its channels can be removed. Reasons that the graph shows are added.

    Returns:
        A group for each layer; the order of names: name -> its position in the model; and the chunks and shuffles of
        channels, which are members of the groups, by names that begin with a dot.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: The model does not run on the example, or torch-pruning cannot follow its computation.
    """
    torch_pruning()
    marked = MarkedModel(sharing_copy(unwrapped(model)).eval(), example_input)
    with random_restored(model), in_modes(torch.no_grad()):
        marked.add_operations(example_input)
    with random_restored(model), in_modes(torch.enable_grad()), own_filters():
        # torch-pruning warns of parameters outside of layers. Here they become reasons in `why_kept`.
        warnings.simplefilter("ignore")
        try:
            groups = _all_groups(marked, example_input, why_kept)
        except Exception as error:  # torch-pruning raises errors of many types
            if not _hide_what_fails(marked, example_input):
                raise ValueError(
                    f"torch-pruning cannot follow the computation of {kind_of(model)} ({type(error).__name__}: "
                    f"{error}), so it is unknown which channels are coupled"
                ) from error
            groups = _all_groups(marked, example_input, why_kept)
    order = {name: number for number, name in enumerate(marked.names.values())}
    operations = {marked.names[each]: each for each in marked.operations if isinstance(each, ChannelOperation)}
    return groups, order, operations


def _hide_what_fails(marked: MarkedModel, example_input: Any) -> bool:
    """Hide the insides of the kinds of parts that torch-pruning fails at; returns whether it succeeds then.

    The kinds are hidden one after the other, small parts first, until torch-pruning succeeds; those that it does not
    fail at are shown again.
    """

    def succeeds() -> bool:
        try:
            _all_groups(marked, example_input, {})
        except Exception:
            return False
        return True

    hidden: list[type[nn.Module]] = []
    for kind in marked.kinds_of_parts():
        marked.hide(kind)
        hidden.append(kind)
        if succeeds():
            break
    else:
        return False
    for kind in hidden[:-1]:
        marked.show(kind)
        if not succeeds():
            marked.hide(kind)
    return True


def _all_groups(marked: MarkedModel, example_input: Any, why_kept: dict[str, str]) -> list[Group]:
    """The groups of all layers. Reasons that the graph shows are added to `why_kept`."""
    reasons: dict[str, str] = {}
    groups = list(_groups(_graph(marked, example_input), reasons, marked))
    why_kept.update({name: why for name, why in reasons.items() if name not in why_kept})
    return groups


def _graph(marked: MarkedModel, example_input: Any) -> Any:
    """The graph of one forward pass."""
    library = torch_pruning()
    pruners = {
        nn.PixelShuffle: PixelShuffles(channels_of_shuffles(marked, example_input)),
        HiddenPart: _HiddenParts(),
        HiddenNorm: _HiddenNorms(),
        ChannelOperation: ChannelOperations(),
    }

    def build() -> Any:
        graph = library.DependencyGraph().build_dependency(
            marked, example_input, run, verbose=False, customized_pruners=pruners
        )
        for node in graph.module2node.values():
            sizes = sizes_of_concatenation(node.grad_fn) if node.type == library.ops.OPTYPE.CONCAT else None
            if sizes is not None and len(sizes) == len(node.inputs):
                node.module.concat_sizes = sizes
                library.dependency.index_mapping.update_concat_index_mapping(graph, node)
        return graph

    marked.ends.clear()
    graph = build()
    if marked.add_ends(graph.module2node):
        graph = build()
    map_pixel_shuffles(graph)
    map_shuffles(graph)
    return graph


def _groups(graph: Any, why_kept: dict[str, str], marked: MarkedModel) -> Iterator[Group]:
    """A group for each layer; reasons for keeping the channels of a layer are added to `why_kept`."""
    types, names, marks = torch_pruning().ops.OPTYPE, marked.names, set(marked.marks.values())
    for name, part in marked.layers_in_hidden_parts():
        why_kept.setdefault(
            name, f"inside {printable(names[part])} ({type(part).__name__}), which torch-pruning cannot follow"
        )
        yield [((name, "outputs", index), index) for index in range(outputs_of(marked.model.get_submodule(name)))]
    most = 4 * max(max(size_of(module, side) or 0 for side in ("inputs", "outputs")) for module in marked.modules())
    roots = [root for root in graph.module2node if isinstance(root, CHANNEL_LAYERS) and root in names]
    for root in progress(roots, "finding filters that go together", name=names.__getitem__):
        every = range(graph.get_pruner_of_module(root).get_out_channels(root))
        group: Group = []
        try:
            reached = _reached(graph, root, every, most)
        except OverflowError:
            why_kept.setdefault(names[root], UNKNOWN_PATH)
            yield [((names[root], "outputs", index), index) for index in every]
            continue
        for node, handler, pairs in reached:
            module = node.module
            name, side, reason = names.get(module, ""), "through", ""
            if node.type == types.OUTPUT:
                name, reason = END, "yields the model's output"
            elif not name or getattr(module, "num_parameters", 0) == 1:
                continue  # a PReLU with one parameter for all channels has none to remove
            elif module in marks:
                reason = "coupled with the model's input"
            elif isinstance(module, nn.Parameter):
                reason = f"coupled with {printable(name)}, a parameter that belongs to no layer"
            elif isinstance(module, CHANNEL_LAYERS):
                is_input = graph.is_in_channel_pruning_fn(handler) and not is_depthwise(module)
                side = "inputs" if is_input else "outputs"
            elif isinstance(module, nn.PixelShuffle):
                # Its own number of outputs is that of its inputs divided by r x r, which are one channel each.
                yield [((name, side, index), index // module.upscale_factor**2) for index, _ in pairs]
            elif not isinstance(module, _BY_CHANNEL) and not has_several_groups(module):
                kind = type(module.part if isinstance(module, HiddenPart) else module).__name__
                reason = f"goes through {printable(name)} ({kind}), which mixes channels"
            if reason:
                why_kept.setdefault(name, reason)
            size = size_of(module, side)
            for index, channel in pairs:
                is_known = size is None or 0 <= index < size
                member = (name, side, index) if is_known else (UNKNOWN, "through", f"{name} {index}")
                group.append((member, channel))
        yield group


def _reached(
    graph: Any, root: nn.Module, channels: Iterable[int], most: int
) -> list[tuple[Any, Any, list[tuple[int, int]]]]:
    """What is coupled with the outputs of a layer: a walk through the dependencies of the graph.

    The graph misreads some reshapes, such as those of windows in a Swin transformer and of rotary embeddings. Indices
    then grow without end, or multiply. So the walk follows each pair of an index and an output once per node, and stops
    where there are more of them, or larger ones, than any layer can have.

    Args:
        graph: The graph.
        root: The layer.
        channels: Indices of its outputs.
        most: A number that indices, and pairs of a node, do not reach.

    Returns:
        Triples of a node, the function that prunes it, and pairs of an index and the output it is coupled with.

    Raises:
        OverflowError: The graph has lost track of the indices.
    """
    prune = graph.get_pruner_of_module(root).prune_out_channels
    index_of = torch_pruning()._helpers._HybridIndex
    node, indices = graph.module2node[root], [index_of(idx=index, root_idx=index) for index in channels]
    found = {(node, prune): dict.fromkeys(indices)}
    waiting = [(node, prune, indices)]
    while waiting:
        node, prune, indices = waiting.pop()
        for dependency in node.dependencies:
            if not dependency.is_triggered_by(prune):
                continue
            mapped = indices
            for mapping in dependency.index_mapping:
                mapped = mapping(mapped) if mapping is not None else mapped
            known = found.setdefault((dependency.target, dependency.handler), {})
            if fresh := list(dict.fromkeys(index for index in mapped if index not in known)):
                known.update(dict.fromkeys(fresh))
                if len(known) > most or any(index.root_idx is None or abs(index.idx) > most for index in fresh):
                    raise OverflowError(f"the indices of {dependency.target} are none of a channel")
                waiting.append((dependency.target, dependency.handler, fresh))
    return [(node, handler, [tuple(index) for index in pairs]) for (node, handler), pairs in found.items() if pairs]


class _HiddenParts:
    """The pruner that the graph asks about a part of the model that it does not see into."""

    def prune_out_channels(self, module: nn.Module, indices: list[int]) -> nn.Module:
        """Nothing to do: no channel of such a part is removed."""
        return module

    def prune_in_channels(self, module: nn.Module, indices: list[int]) -> nn.Module:
        """Nothing to do. The graph tells inputs from outputs by the functions that prune them."""
        return module

    def get_out_channels(self, module: HiddenPart) -> int | None:
        """Number of channels of the output."""
        return module.out_channels

    def get_in_channels(self, module: HiddenPart) -> int | None:
        """Number of channels of the input."""
        return module.in_channels


class _HiddenNorms(_HiddenParts):
    """The same for a norm layer, whose output has the channels of its input."""

    prune_in_channels = _HiddenParts.prune_out_channels
