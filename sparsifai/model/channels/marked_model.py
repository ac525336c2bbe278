"""A model that is made ready for torch-pruning's graph: its ends are marked, and parts of it are hidden."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..layers import CHANNEL_LAYERS
from ..norms import is_norm_of_others, keeps_channels_apart
from ..running import check_runs
from ..tensors import is_float, tensors_in
from .rewriting import Rewriting

# Number of axes of an input -> a layer that has a parameter for each of its channels.
_MARKS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


# Layers of several operations that torch-pruning does not know, or knows in part.
_ALWAYS_HIDDEN = (nn.RNNBase, nn.RNNCellBase)


class MarkedModel(nn.Module):
    """A model with a layer at each input and an operation at each output, parts of which can be hidden.

    The graph thereby shows which channels are coupled with the inputs and outputs of the model.

    Args:
        model: A copy of a model in evaluation mode. It is changed.
        example_input: A batch, a tuple of positional inputs or a dictionary of named ones.

    Attributes:
        names: Modules and parameters -> their names in the model. Names of what is added here begin with a dot.
        ends: Layers whose output nothing reads; they are made outputs of the model.
        operations: Chunks and shuffles of channels that `add_operations` has found.
    """

    def __init__(self, model: nn.Module, example_input: Any):
        super().__init__()
        self.model = model
        self.marks = nn.ModuleDict()
        self.hidden = nn.ModuleList()
        self.called: dict[nn.Module, Tensor] = {}  # layer -> its last output
        self.ends: list[nn.Module] = []
        self.names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        self.names |= {parameter: name for name, parameter in model.named_parameters()}
        for module in model.modules():
            if isinstance(module, CHANNEL_LAYERS):
                module.register_forward_hook(lambda module, inputs, output: self.called.update({module: output}))
        self._rewriting = Rewriting()
        self.operations = self._rewriting.operations
        self._number = 0
        self._each(example_input, self._add_mark)
        for kind in _ALWAYS_HIDDEN:
            self.hide(kind)
        for part in model.modules():
            if is_norm_of_others(part):
                self._hide(HiddenNorm(part) if keeps_channels_apart(part) else HiddenPart(part))
        self._always_hidden = {each.part for each in self.hidden}
        self.requires_grad_(True)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The outputs of the model, after an operation that the graph sees as the end of the model."""
        inputs, named = self._each((inputs, named), self._mark)
        with self._rewriting:
            found = self.model(*inputs, **named)
        outputs = [output for output in tensors_in(found) if is_float(output)]
        return [output * 1 for output in [*outputs, *(self.called[end] for end in self.ends)] if output.requires_grad]

    def add_operations(self, example_input: Any) -> None:
        """Run the model once, to find the chunks and shuffles of channels in it.

        Raises:
            ValueError: The model does not run on the example.
        """
        with self._rewriting.recording():
            check_runs(self.model, example_input)
        self.names |= {each: f".{each.kind} {number}" for number, each in enumerate(self.operations)}

    def add_ends(self, known: Container[nn.Module]) -> bool:
        """Make outputs of the called layers that are not known; returns whether there are any."""
        self.ends = [module for module, output in self.called.items() if module not in known and output.requires_grad]
        return bool(self.ends)

    def _each(self, tree: Any, function: Any) -> Any:
        self._number = 0
        return tree_map(function, tree)

    def _add_mark(self, value: Any) -> None:
        if is_float(value) and value.dim() in _MARKS:
            kind = _MARKS[value.dim()]
            mark = kind(value.shape[1], device=value.device, dtype=value.dtype)
            self.marks[str(self._number)] = mark
            self.names[mark] = f".input {self._number}"
        self._number += 1

    def _mark(self, value: Any) -> Any:
        key, self._number = str(self._number), self._number + 1
        return self.marks[key](value) if key in self.marks else value

    # --- Hidden parts -----------------------------------------------------------------------------------------------

    def kinds_of_parts(self) -> list[type[nn.Module]]:
        """The classes of modules that can be hidden, those with the fewest submodules first."""
        sizes: dict[type[nn.Module], int] = {}
        for part in self.model.modules():
            size = sum(1 for _ in part.modules())
            of_torch = type(part).__module__.startswith("torch.nn")
            if part is not self.model and not (size == 1 and of_torch) and not isinstance(part, CHANNEL_LAYERS):
                sizes[type(part)] = max(size, sizes.get(type(part), 0))
        return sorted(sizes, key=lambda kind: sizes[kind])

    def hide(self, kind: type[nn.Module]) -> None:
        """Make one operation of each module of a class."""
        already = [hidden.part for hidden in self.hidden]
        for part in self.model.modules():
            if part is not self.model and isinstance(part, kind) and part not in already:
                self._hide(HiddenPart(part))

    def _hide(self, hidden: HiddenPart) -> None:
        self.hidden.append(hidden)
        self.names[hidden] = self.names[hidden.part]
        hidden.part.forward = hidden.around(hidden.part.forward)

    def show(self, kind: type[nn.Module]) -> None:
        """Undo `hide`."""
        shown = [each for each in self.hidden if isinstance(each.part, kind) and each.part not in self._always_hidden]
        for each in shown:
            vars(each.part).pop("forward")
        self.hidden = nn.ModuleList(each for each in self.hidden if each not in shown)

    def layers_in_hidden_parts(self) -> list[tuple[str, nn.Module]]:
        """Names of the layers that are hidden, and the part that each of them is in."""
        parts: list[Any] = [each.part for each in self.hidden]
        layers = [(layer, part) for part in parts for layer in part.modules() if isinstance(layer, CHANNEL_LAYERS)]
        return [(self.names[layer], part) for layer, part in layers]


class HiddenPart(nn.Module):
    """One operation in place of all that a module computes.

    Args:
        part: The module.

    Attributes:
        in_channels, out_channels: Numbers of channels of its first input and output, None if it has not been called.
    """

    part: nn.Module

    def __init__(self, part: nn.Module):
        super().__init__()
        self.__dict__["part"] = part  # not as a submodule: it has its place in the model
        self.in_channels: int | None = None
        self.out_channels: int | None = None
        self.anchor = nn.Parameter(torch.zeros(()))  # keeps the operation in the graph if no input is a float

    def around(self, forward: Callable) -> Callable:
        """The forward of the module without a graph, followed by this operation."""

        def replaced(*inputs: Any, **named: Any) -> Any:
            with torch.no_grad():
                output = forward(*inputs, **named)
            leaves, structure = tree_flatten(output)
            read = [value for value in tree_leaves((inputs, named)) if is_float(value)]
            made = [value for value in leaves if is_float(value)]
            if not made:
                return output
            following = iter(self(read, made))
            return tree_unflatten([next(following) if is_float(leaf) else leaf for leaf in leaves], structure)

        return replaced

    def forward(self, read: list[Tensor], made: list[Tensor]) -> tuple[Tensor, ...]:
        """What the module has made, as results of one operation on what it has read."""
        self.in_channels, self.out_channels = (_channels_of(values[0]) if values else None for values in (read, made))
        return _Operation.apply(len(read), self.anchor, *read, *made)


class HiddenNorm(HiddenPart):
    """One operation in place of a norm layer that handles each channel by itself."""


def _channels_of(value: Tensor) -> int:
    """Number of channels: the second axis of maps, the last of all else."""
    return value.shape[1 if value.dim() > 3 else -1]


class _Operation(torch.autograd.Function):
    """Copies of some tensors, as results that depend on others."""

    @staticmethod
    def forward(context: Any, count: int, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(made.clone() for made in tensors[count:])
