"""Finding the data flow of a model, by torch.fx or by recording the tensor operations of one forward.

torch.fx needs no data. If it cannot trace the model, a forward of an example input is recorded. Both see the order of
computation, never the order in which a class defines its layers. Both run on a shell of the model, which copies its
modules and buffers and shares its parameters. Hooks that the user has put on the model run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.fx
from torch import nn
from torch.overrides import TorchFunctionMode

from .flow import Flow, Operation
from .norms import is_norm_of_others
from .parallel import is_fully_sharded, kind_of
from .running import check_runs, in_modes, random_restored, shell_of
from .symbolic import Tracer
from .tensors import tensors_in

# Operations that keep channels separate and a channel of zeros zero: classes of torch.nn, functions and methods.
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
    """Find the data flow of a model.

    Args:
        model: The model, which is not changed.
        example_input: A batch that the model accepts, a tuple for several positional arguments, a dictionary for named
            ones. It is only used if torch.fx cannot trace the model.

    Returns:
        The flow.

    Raises:
        ValueError: The model cannot be traced and there is no example, or the model fails on it, or the model was
            sharded by fully_shard or prepared for quantization.
    """
    if is_fully_sharded(model):
        raise ValueError(
            f"the data flow of {kind_of(model)} cannot be traced after fully_shard, and this granularity needs "
            "it to know the first and the last layer; create the Sparsifier before calling fully_shard on the model"
        )
    if any(type(module).__module__.startswith("torch.ao.nn") for module in model.modules()):
        raise ValueError(
            f"the data flow of {kind_of(model)} cannot be traced after the model was prepared for quantization, and "
            "this granularity needs it to know the first and the last layer; sparsify the model before preparing it"
        )
    try:
        return traced_flow(model)
    except Exception as error:  # the code of the model can raise anything when it is given fx's proxies
        if example_input is None:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"the data flow of {type(model).__name__} cannot be traced ({reason}), and this granularity needs it "
                "to know the first and the last layer; pass example_input=, a batch that the model accepts"
            ) from error
    return recorded_flow(model, example_input)


def _norms_of_others(shell: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in shell.named_modules() if is_norm_of_others(module)}


def _names(model: nn.Module) -> dict[int, str]:
    """id -> name of each parameter of a model; the names in its shell lack those of wrappers."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _add_operation(flow: Flow, step: Operation) -> int:
    """Add an operation to a flow and return its index.

    Attention is one call but two operations: its output projection reads the results of its input projections.
    """
    out_projection = {name for name in step.parameters if name.rpartition(".")[0].endswith("out_proj")}
    if out_projection and out_projection != step.parameters:
        flow.steps.append(dataclasses.replace(step, parameters=step.parameters - out_projection))
        step = Operation([len(flow.steps) - 1], out_projection)
    flow.steps.append(step)
    return len(flow.steps) - 1


def traced_flow(model: nn.Module) -> Flow:
    """Find the flow by torch.fx; a module without submodules is one operation, which uses all its parameters.

    Args:
        model: The model.

    Raises:
        Exception: Anything that the code of the model or torch.fx raises, if it cannot be traced.
    """
    shell, names = shell_of(model), _names(model)
    flow = Flow([], set(), set())
    index: dict[torch.fx.Node, int] = {}
    carried: dict[torch.fx.Node, set[str]] = {}  # nodes that hold only parameters or views of them
    sizes: set[torch.fx.Node] = set()  # shapes and the like: an operation that reads x.shape does not read x
    norms = _norms_of_others(shell)  # before tracing, in which no module computes
    held = {name: names[id(each)] for name, each in shell.named_parameters(remove_duplicate=False) if id(each) in names}
    for node in Tracer(norms).trace(shell).nodes:
        if _is_size(node) or (node.all_input_nodes and sizes.issuperset(node.all_input_nodes)):
            sizes.add(node)
            continue
        reads = [index[read] for read in node.all_input_nodes if read in index]
        parameters = {name for read in node.all_input_nodes for name in carried.get(read, ())}
        kind: Any = node.target
        norm = ""
        if node.op == "call_module":
            module = shell.get_submodule(node.target)
            kind = type(module)
            norm = norms.get(module, "")
            parameters |= {names[id(parameter)] for parameter in module.parameters()}
        if node.op == "get_attr":
            carried[node] = {held[node.target]} if node.target in held else set()
        elif node.op == "output":
            flow.results.update(reads)
        elif parameters and not reads:
            carried[node] = parameters
        else:
            step = Operation(reads, parameters, _keeps_zeros(kind), _order_of_axes(kind, node.args), norm)
            index[node] = _add_operation(flow, step)
            if _writes_in_place(kind) and node.args[0] in index:
                index[node.args[0]] = index[node]  # later operations read what was written
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
    """Records every torch function that is called, with the tensors that it reads and returns."""

    def __init__(self, names: Mapping[int, str]):
        self.flow = Flow([], set(), set())
        self.made_by: dict[int, int] = {}
        self.carried = {identity: {name} for identity, name in names.items()}
        self.alive: list[Any] = []  # keeps the tensors, so that their ids are not used again
        self._in_norm = False

    def record(self, made: Any, step: Operation) -> int:
        """Add an operation and note which tensors it returned."""
        index = _add_operation(self.flow, step)
        for tensor in tensors_in(made):
            self.made_by[id(tensor)] = index
            # Some wrappers create another tensor around the same memory without a torch function.
            self.made_by[-tensor.untyped_storage().data_ptr()] = index
        self.alive.append(made)
        return index

    def steps_of(self, tree: Any) -> list[int]:
        """Indices of the operations that returned the tensors of a tree."""
        steps = []
        for tensor in tensors_in(tree):
            if id(tensor) not in self.carried:
                keys = (id(tensor), -tensor.untyped_storage().data_ptr())
                steps += [self.made_by[key] for key in keys if key in self.made_by][:1]
        return list(dict.fromkeys(steps))

    def one_step(self, name: str, norm: nn.Module, parameters: set[str]) -> None:
        """Have the forward of a norm layer recorded as one operation."""
        forward = norm.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            reads, self._in_norm = self.steps_of((args, kwargs)), True
            try:
                made = forward(*args, **kwargs)
            finally:
                self._in_norm = False
            self.record(made, Operation(reads, parameters, norm=name))
            return made

        norm.forward = recorded

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if self._in_norm:
            return made
        parameters = {name for tensor in tensors_in((args, kwargs)) for name in self.carried.get(id(tensor), ())}
        result = args[0] if _writes_in_place(function) else made
        reads = self.steps_of((args, kwargs))
        if parameters and not reads:
            self.carried.update((id(tensor), parameters) for tensor in tensors_in(result))
            self.alive.append(result)
        elif tensors_in(result):
            self.record(result, Operation(reads, parameters, _keeps_zeros(function), _order_of_axes(function, args)))
        return made


def recorded_flow(model: nn.Module, example_input: Any) -> Flow:
    """Find the flow by recording one forward in evaluation mode; the random generators of torch are restored.

    Args:
        model: The model.
        example_input: A batch that the model accepts, a tuple for several positional arguments, a dictionary for named
            ones. A list is one argument, as detection models take it.

    Raises:
        ValueError: The model fails on the example.
    """
    names = _names(model)
    shell, recorder = shell_of(model), _Recorder(names)
    for norm, name in _norms_of_others(shell).items():
        recorder.one_step(name, norm, {names[id(parameter)] for parameter in norm.parameters()})
    recorder.flow.sources.add(recorder.record(example_input, Operation([], set())))
    with random_restored(shell), in_modes(torch.no_grad(), recorder):
        output = check_runs(shell, (example_input,) if isinstance(example_input, list) else example_input)
    recorder.flow.results.update(recorder.steps_of(output))
    return recorder.flow
