"""Finding the data flow of a model: by torch.fx, or by recording the tensor operations of one forward."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.fx
from torch import nn
from torch.overrides import TorchFunctionMode

from .flow import Flow, Operation
from .parallel import is_fully_sharded, kind_of, unwrapped
from .running import run
from .tensors import tensors_in

_ONE_STEP = (nn.MultiheadAttention, nn.RNNBase)

# What keeps channels apart and a channel of zeros zero: classes of torch.nn, names of functions and methods.
_ZERO_KEEPING = {
    *("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Hardswish", "Tanh"),
    *("relu", "relu_", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish"),
    *("tanh", "Identity", "Flatten", "flatten", "contiguous", "clone", "to", "type", "float", "half", "bfloat16"),
    *(f"{kind}{n}d" for kind in ("Dropout", "MaxPool", "AvgPool", "ZeroPad") for n in (1, 2, 3)),
    *(f"Adaptive{kind}Pool{n}d" for kind in ("Avg", "Max") for n in (1, 2, 3)),
    *(f"{adaptive}{kind}_pool{n}d" for adaptive in ("", "adaptive_") for kind in ("avg", "max") for n in (1, 2, 3)),
    *("Dropout", "dropout", "Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d", "interpolate"),
}


def find_flow(model: nn.Module, example_input: Any = None) -> Flow:
    """The data flow of `model`. ValueError if it cannot be traced and no `example_input` is given."""
    if is_fully_sharded(model):
        raise ValueError(
            f"the data flow of {kind_of(model)} cannot be traced after fully_shard, and this granularity needs "
            "it to know the first and the last layer; make the Sparsifier before fully_shard is called on the model"
        )
    if any(type(module).__module__.startswith("torch.ao.nn") for module in model.modules()):
        raise ValueError(
            f"the data flow of {kind_of(model)}, which is prepared for quantization, is not followed, and this "
            "granularity needs it; sparsify whole outputs or inputs before the model is prepared"
        )
    try:
        return _traced(model)
    except Exception as error:  # fx raises whatever the model's own code makes of a proxy
        if example_input is None:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"the data flow of {type(model).__name__} cannot be traced ({reason}), and this granularity needs it "
                "to know the first and the last layer; pass example_input=, a batch that the model accepts"
            ) from error
    return _recorded(model, example_input)


def _shell(model: nn.Module) -> nn.Module:
    """A copy of the modules of a model around the same parameters, in evaluation mode, without torch's wrappers."""
    # Activations that a model has kept cannot be copied; like the parameters, they are shared.
    kept = [tensor for module in model.modules() for tensor in tensors_in(vars(module)) if not tensor.is_leaf]
    shell = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *kept)}).eval()
    for part in list(shell.modules()):
        for name, child in part.named_children():
            setattr(part, name, unwrapped(child))  # neither way can look into a compiled one
    return shell


def _names(model: nn.Module) -> dict[int, str]:
    """Names of the parameters of a model by their ids; those of its shell may lack the names of wrappers."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _add_operation(flow: Flow, step: Operation) -> int:
    """Add a step; attention, which is called as one, as two: its projections out read what its projections in make."""
    out = {name for name in step.parameters if name.rpartition(".")[0].endswith("out_proj")}
    if out and out != step.parameters:
        flow.steps.append(dataclasses.replace(step, parameters=step.parameters - out))
        step = Operation([len(flow.steps) - 1], out)
    flow.steps.append(step)
    return len(flow.steps) - 1


class _Tracer(torch.fx.Tracer):
    """Looks into every module that has others in it, so that a step is never more than a layer."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, _ONE_STEP):
            return True
        return super().is_leaf_module(module, name) and not any(module.children())


def _traced(model: nn.Module) -> Flow:
    """Flow from torch.fx: a leaf module is one step, which uses all its parameters."""
    shell, names = _shell(model), _names(model)
    flow = Flow([], set(), set())
    index: dict[torch.fx.Node, int] = {}
    carried: dict[torch.fx.Node, set[str]] = {}  # nodes that hold a parameter or a view of it, and nothing else
    sizes: set[torch.fx.Node] = set()  # of tensors: whoever reads x.shape does not read x
    for node in _Tracer().trace(shell).nodes:
        if _is_size(node) or (node.all_input_nodes and sizes.issuperset(node.all_input_nodes)):
            sizes.add(node)
            continue
        reads = [index[read] for read in node.all_input_nodes if read in index]
        parameters = {name for read in node.all_input_nodes for name in carried.get(read, ())}
        kind: Any = node.target
        if node.op == "call_module":
            module = shell.get_submodule(node.target)
            kind = type(module)
            parameters |= {names[id(parameter)] for parameter in module.parameters()}
        if node.op == "get_attr":
            held = operator.attrgetter(node.target)(shell)
            carried[node] = {names[id(held)]} if id(held) in names else set()
        elif node.op == "output":
            flow.results.update(reads)
        elif parameters and not reads:
            carried[node] = parameters
        else:
            step = Operation(reads, parameters, _keeps_zeros(kind), _order_of_axes(kind, node.args))
            index[node] = _add_operation(flow, step)
            if _writes_in_place(kind) and node.args[0] in index:
                index[node.args[0]] = index[node]  # whoever reads it later reads what was written
            if node.op == "placeholder":
                flow.sources.add(index[node])
    return flow


def _is_size(node: torch.fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim", "numel")


def _name(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", "")


def _keeps_zeros(kind: Any) -> bool:
    return _name(kind) in _ZERO_KEEPING


def _writes_in_place(kind: Any) -> bool:
    name = _name(kind)
    return name in ("setitem", "__setitem__") or (name.endswith("_") and not name.endswith("__"))


def _order_of_axes(kind: Any, arguments: Sequence[Any]) -> tuple[int, ...] | None:
    if _name(kind) != "permute":
        return None
    order = arguments[1] if isinstance(arguments[1], (tuple, list)) else arguments[1:]
    return tuple(axis % len(order) for axis in order) if all(isinstance(axis, int) for axis in order) else None


class _Recorder(TorchFunctionMode):
    """Records every torch function that is called, by the tensors that it reads and makes."""

    def __init__(self, names: Mapping[int, str]):
        self.flow = Flow([], set(), set())
        self.made_by: dict[int, int] = {}
        self.carried = {identity: {name} for identity, name in names.items()}
        self.alive: list[Any] = []  # an id is good only while its tensor lives

    def record(self, made: Any, step: Operation) -> int:
        index = _add_operation(self.flow, step)
        for tensor in tensors_in(made):
            self.made_by[id(tensor)] = index
            # Some wrappers make a tensor unseen around the same memory.
            self.made_by[-tensor.untyped_storage().data_ptr()] = index
        self.alive.append(made)
        return index

    def steps_of(self, tree: Any) -> list[int]:
        """The steps that made the tensors of a tree."""
        steps = []
        for tensor in tensors_in(tree):
            if id(tensor) not in self.carried:
                keys = (id(tensor), -tensor.untyped_storage().data_ptr())
                steps += [self.made_by[key] for key in keys if key in self.made_by][:1]
        return list(dict.fromkeys(steps))

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        parameters = {name for tensor in tensors_in((args, kwargs)) for name in self.carried.get(id(tensor), ())}
        result = args[0] if _writes_in_place(function) else made
        reads = self.steps_of((args, kwargs))
        if parameters and not reads:
            self.carried.update((id(tensor), parameters) for tensor in tensors_in(result))
            self.alive.append(result)
        elif tensors_in(result):
            self.record(result, Operation(reads, parameters, _keeps_zeros(function), _order_of_axes(function, args)))
        return made


def _recorded(model: nn.Module, example_input: Any) -> Flow:
    """Flow from one forward in evaluation mode; the global random state is left as it was."""
    shell, recorder = _shell(model), _Recorder(_names(model))
    recorder.flow.sources.add(recorder.record(example_input, Operation([], set())))
    try:
        with torch.random.fork_rng(), torch.no_grad(), recorder:
            # A list is one input here, as detection models take it.
            output = run(shell, (example_input,) if isinstance(example_input, list) else example_input)
    except Exception as error:
        raise ValueError(
            f"example_input does not run through {type(model).__name__} ({error}); pass a batch that the model "
            "accepts, a tuple for several positional arguments, a dictionary for keywords"
        ) from error
    recorder.flow.results.update(recorder.steps_of(output))
    return recorder.flow
