"""Chunks and shuffles of channels, as torch-pruning's graph can follow them.

The graph misreads torch.chunk where a chunk is read twice, takes GLU for a function of each channel, and does not know
channel shuffles. So a chunk is computed by slices, behind a mark that tells into how many parts the channels are split,
and a shuffle, also one that is written as view, transpose and view, by an operation whose map of channels is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..tensors import is_float

CHUNK, SHUFFLE = "chunk", "shuffle"

# Number of axes of a tensor -> the axis that the graph takes for that of the channels.
CHANNEL_AXES = {2: 1, 3: 2, 4: 1, 5: 1}


class ChannelOperation(nn.Module):
    """A chunk or a shuffle of channels, as one operation.

    Args:
        kind: CHUNK or SHUFFLE.
        channels: Number of channels.
        parts: Into how many parts the channels are split.
    """

    def __init__(self, kind: str, channels: int, parts: int):
        super().__init__()
        self.kind, self.channels, self.parts = kind, channels, parts

    @property
    def share(self) -> int:
        """Number of channels in a part."""
        return self.channels // self.parts

    @property
    def joined(self) -> list[list[int]]:
        """The channels that can only be removed together: of a shuffle those at the same place of each part."""
        places = range(self.share if self.kind == SHUFFLE else 0)
        return [[part * self.share + place for part in range(self.parts)] for place in places]

    def forward(self, given: Tensor) -> Tensor:
        """The input, shuffled or as it is."""
        return _Operation.apply(given, self.parts if self.kind == SHUFFLE else 1)

    def shuffled(self, index: int) -> int:
        """Where the shuffle moves a channel."""
        return index % self.share * self.parts + index // self.share if self.kind == SHUFFLE else index

    def unshuffled(self, index: int) -> int:
        """Where a channel was before the shuffle."""
        return index % self.parts * self.share + index // self.parts if self.kind == SHUFFLE else index


class _Operation(torch.autograd.Function):
    """A copy of a tensor with shuffled channels, as one operation of the graph."""

    @staticmethod
    def forward(context: Any, given: Tensor, parts: int) -> Tensor:
        return given.unflatten(1, (parts, -1)).transpose(1, 2).flatten(1, 2).clone()


class ChannelOperations:
    """The pruner that the graph asks about a `ChannelOperation`."""

    def prune_out_channels(self, module: nn.Module, indices: list[int]) -> nn.Module:
        """Nothing to do: the operation has no parameters."""
        return module

    prune_in_channels = prune_out_channels

    def get_out_channels(self, module: ChannelOperation) -> int:
        """Number of channels."""
        return module.channels

    get_in_channels = get_out_channels


def map_shuffles(graph: Any) -> None:
    """Have the graph map the channels before a shuffle to those behind it, and back."""
    for module, node in graph.module2node.items():
        if isinstance(module, ChannelOperation) and module.kind == SHUFFLE:
            for dependency in node.dependencies:
                if dependency.target in node.outputs:
                    dependency.index_mapping.insert(0, partial(_mapped, module.shuffled))
            for behind in node.outputs:
                for dependency in behind.dependencies:
                    if dependency.target is node:
                        dependency.index_mapping.append(partial(_mapped, module.unshuffled))


def _mapped(move: Callable[[int], int], indices: list) -> list:
    return [index._replace(idx=move(index.idx)) for index in indices]


class Rewriting(TorchFunctionMode):
    """Compute chunks, GLU and shuffles of channels in another way: a mode of torch, active inside a `with` block.

    Attributes:
        operations: What was found in the first run, in the order of the calls. Later runs use the same modules.
    """

    def __init__(self) -> None:
        self.operations = nn.ModuleList()
        self._is_recording = False
        self._number = 0
        # id of a view -> the view, what it is a view of, and number of parts: negative once the two axes are swapped.
        self._views: dict[int, tuple[Tensor, Tensor, int]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Add to the operations what is found inside a `with` block."""
        self._is_recording = True
        try:
            with self:
                yield
        finally:
            self._is_recording = False

    def __enter__(self) -> Rewriting:
        self._number = 0
        self._views.clear()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._views.clear()
        super().__exit__(*error)

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if name in _SPLITS and args and is_float(args[0]):
            rewritten = self._split(name, *args, **kwargs)
            return function(*args, **kwargs) if rewritten is None else rewritten
        if name == "channel_shuffle" and is_float(args[0]) and args[0].dim() == 4:
            groups = args[1] if len(args) > 1 else kwargs["groups"]
            return self._operation(SHUFFLE, args[0], groups)
        result = function(*args, **kwargs)
        if name in _VIEWS and isinstance(result, Tensor):
            return self._viewed(name, args[0], result)
        return result

    def _operation(self, kind: str, given: Tensor, parts: int) -> Tensor:
        """The result of the operation of this call; of a new one, if operations are recorded."""
        channels = given.shape[CHANNEL_AXES[given.dim()]]
        if self._is_recording:
            self.operations.append(ChannelOperation(kind, channels, parts))
        operation = self.operations[self._number]
        self._number += 1
        return operation(given)

    def _split(self, name: str, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Equal parts of the channels of a tensor; None if it is another split."""
        default = -1 if name == "glu" else 0
        names = ("dim",) if name == "glu" else (_SPLITS[name], "dim")
        arguments = dict(zip(names, args, strict=False)) | kwargs
        axis = arguments.get("dim", default)
        length = given.shape[axis]
        axis %= given.dim()
        if axis != CHANNEL_AXES.get(given.dim()):
            return None
        share = length // 2 if name == "glu" else arguments[_SPLITS[name]]
        if name == "chunk":
            share = -(-length // share)
        elif isinstance(share, (tuple, list)):
            share = share[0] if len(set(share)) == 1 else 0
        if not share or length % share or length == share:
            return None
        marked = self._operation(CHUNK, given, length // share)
        parts = tuple(marked.narrow(axis, start, share) for start in range(0, length, share))
        return parts[0] * parts[1].sigmoid() if name == "glu" else parts

    def _viewed(self, name: str, given: Tensor, result: Tensor) -> Tensor:
        """The result of a view, or of the shuffle that ends with it."""
        known = self._views.get(id(given))
        if name in ("view", "reshape", "unflatten", "flatten"):
            if given.dim() == 4 and result.dim() == 5 and _splits_channels(given, result):
                self._views[id(result)] = result, given, result.shape[1]
            elif known is not None and known[2] < 0 and result.shape == known[1].shape:
                return self._operation(SHUFFLE, known[1], -known[2])
        elif known is not None:
            swapped = known[2] > 0 and _swaps_parts(given, result)
            if swapped or name == "contiguous":
                self._views[id(result)] = result, known[1], -known[2] if swapped else known[2]
        return result


# Function -> name of its argument that says how many or how large the parts are.
_SPLITS = {"chunk": "chunks", "split": "split_size_or_sections", "glu": ""}
_VIEWS = {"view", "reshape", "unflatten", "flatten", "transpose", "swapaxes", "permute", "contiguous"}


def _splits_channels(given: Tensor, result: Tensor) -> bool:
    """Whether a view splits the channels of maps in two axes."""
    return result.shape[0] == given.shape[0] and result.shape[3:] == given.shape[2:] and result.shape[1] > 1


def _swaps_parts(given: Tensor, result: Tensor) -> bool:
    """Whether a view swaps the two axes that the channels were split in."""
    axes = (0, 2, 1, 3, 4)
    swapped = given.permute(axes) if given.dim() == 5 else given
    return result.shape == swapped.shape and result.stride() == swapped.stride() and result is not given
