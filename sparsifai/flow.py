"""Data flow of a model: which layers read its input, which yield its output, and what norm layers stand behind which.

The flow is a list of steps in the order of computation. It comes from torch.fx, which needs no data; where a model
cannot be traced symbolically, one forward of an example input is recorded instead. Both see what calls what, never the
order in which a file defines things. Both run on a shell of the model, which shares its tensors but not its modules,
so that the model is left as it was.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# What keeps channels apart and a channel of zeros zero: a norm layer may stand behind it.
_ZERO_KEEPING = {
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "tanh", "dropout"),
    *("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    *("adaptive_max_pool2d", "flatten", "contiguous", "clone"),
}


@dataclass
class Step:
    """A computation: the steps whose results it reads, the parameters it uses, if a zero channel stays zero in it."""

    reads: list[int]
    parameters: set[str]
    keeps_zeros: bool = False


@dataclass
class Flow:
    """The steps of a model in order; sources are those that give its input, results those that give its output."""

    steps: list[Step]
    sources: set[int]
    results: set[int]

    def first(self, layers: Iterable[str]) -> set[str]:
        """Names of the parameters in `layers` that read the input of the model, no other layer between."""
        names = set(layers)
        reached, found = set(self.sources), set()
        for index, step in enumerate(self.steps):
            if reached.intersection(step.reads):
                here = step.parameters & names
                found |= here
                if not here:
                    reached.add(index)
        return found

    def last(self, layers: Iterable[str]) -> set[str]:
        """Names of the parameters in `layers` that yield the output of the model, no other layer between."""
        names = set(layers)
        reached, found = set(self.results), set()
        for index in reversed(range(len(self.steps))):
            if index in reached:
                here = self.steps[index].parameters & names
                found |= here
                if not here:
                    reached.update(self.steps[index].reads)
        return found

    def norms_behind(self, model: nn.Module, layers: Iterable[str]) -> dict[str, set[str]]:
        """Norm layer -> all parameters in `layers` whose outputs it normalizes, by name.

        A norm layer that reads anything else besides is left out: its channels are not dead with those layers.
        """
        names = set(layers)
        producers: dict[str, set[str]] = {}
        others = set()
        for step in self.steps:
            made = [self._producers(read, names) for read in step.reads]
            for norm in _norms_of(model, step):
                producers.setdefault(norm, set()).update(*made)
                if not made or not all(made):
                    others.add(norm)
        return {norm: made for norm, made in producers.items() if norm not in others}

    def _producers(self, index: int, names: set[str]) -> set[str]:
        """The parameters of `names` whose zero outputs arrive at a step as zeros."""
        step = self.steps[index]
        while step.keeps_zeros and not step.parameters and len(step.reads) == 1:
            step = self.steps[step.reads[0]]
        return step.parameters & names


def _norms_of(model: nn.Module, step: Step) -> set[str]:
    holders = {name.rpartition(".")[0] for name in step.parameters}
    return {name for name in holders if isinstance(model.get_submodule(name), _NORMS)}


def find_flow(model: nn.Module, example_input: Any = None) -> Flow:
    """The data flow of `model`. ValueError if it cannot be traced and no `example_input` is given."""
    try:
        return _traced(_shell(model))
    except Exception as error:  # fx raises whatever the model's own code makes of a proxy
        if example_input is None:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"the data flow of {type(model).__name__} cannot be traced ({reason}), and this granularity needs it "
                "to know the first and the last layer; pass example_input=, a batch that the model accepts"
            ) from error
    return _recorded(_shell(model), example_input)


def _shell(model: nn.Module) -> nn.Module:
    """A copy of the modules of a model around the same tensors."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()


def _traced(model: nn.Module) -> Flow:
    """Flow from torch.fx: a leaf module is one step, which uses all its parameters."""
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    flow = Flow([], set(), set())
    index: dict[torch.fx.Node, int] = {}
    carried: dict[torch.fx.Node, set[str]] = {}  # nodes that hold a parameter or a view of it, and nothing else
    sizes: set[torch.fx.Node] = set()  # of tensors: whoever reads x.shape does not read x
    for node in torch.fx.Tracer().trace(model).nodes:
        reads = [index[read] for read in node.all_input_nodes if read in index]
        parameters = {name for read in node.all_input_nodes for name in carried.get(read, ())}
        kind: Any = node.target
        if _is_size(node) or (node.all_input_nodes and sizes.issuperset(node.all_input_nodes)):
            sizes.add(node)
            continue
        if node.op == "call_module":
            module = model.get_submodule(node.target)
            kind = type(module)
            parameters |= {first_name[id(parameter)] for parameter in module.parameters()}
        if node.op == "get_attr":
            held = operator.attrgetter(node.target)(model)
            carried[node] = {first_name[id(held)]} if id(held) in first_name else set()
        elif node.op == "output":
            flow.results.update(reads)
        elif parameters and not reads:
            carried[node] = parameters
        else:
            index[node] = len(flow.steps)
            flow.steps.append(Step(reads, parameters, _keeps_zeros(kind)))
            if node.op == "placeholder":
                flow.sources.add(index[node])
    return flow


def _is_size(node: torch.fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim", "numel", "type")


def _keeps_zeros(kind: Any) -> bool:
    return kind in _ZERO_KEEPING or getattr(kind, "__name__", "") in _ZERO_KEEPING


class _Recorder(TorchFunctionMode):
    """Records every torch function that is called, by the tensors that it reads and makes."""

    def __init__(self, model: nn.Module):
        self.steps: list[Step] = []
        self.made_by: dict[int, int] = {}
        self.carried = {id(parameter): {name} for name, parameter in model.named_parameters()}
        self.alive: list[Any] = []  # an id is good only while its tensor lives

    def record(self, made: Any, step: Step) -> None:
        self.steps.append(step)
        self.made_by.update((id(tensor), len(self.steps) - 1) for tensor in _tensors(made))
        self.alive.append(made)

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        used = [id(tensor) for tensor in _tensors((args, kwargs))]
        reads = list(dict.fromkeys(self.made_by[key] for key in used if key in self.made_by))
        parameters = {name for key in used for name in self.carried.get(key, ())}
        if parameters and not reads:
            self.carried.update((id(tensor), parameters) for tensor in _tensors(made))
            self.alive.append(made)
        elif _tensors(made):
            self.record(made, Step(reads, parameters, _keeps_zeros(function)))
        return made


def _recorded(model: nn.Module, example_input: Any) -> Flow:
    """Flow from one forward in evaluation mode; the global random state is left as it was."""
    recorder = _Recorder(model)
    recorder.record(example_input, Step([], set()))
    with torch.random.fork_rng(), torch.no_grad(), recorder:
        if isinstance(example_input, Mapping):
            output = model(**example_input)
        else:
            output = model(*(example_input if isinstance(example_input, tuple) else (example_input,)))
    results = {recorder.made_by[id(tensor)] for tensor in _tensors(output) if id(tensor) in recorder.made_by}
    return Flow(recorder.steps, {0}, results)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
