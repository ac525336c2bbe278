"""Forward hooks that are removed from a model whatever happens, and recording the outputs of layers by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn

from ..support.at_end import AtEnd
from .tensors import first_tensor

Hooks = Iterable[tuple[nn.Module, Callable]]


class ForwardHooks:
    """Forward hooks on layers, from `put` to `remove`.

    Args:
        after: Pairs of a layer and a function `(layer, inputs, named_inputs, output)` that is called after the forward
            of the layer. What it returns, unless None, replaces the output.
        before: Pairs of a layer and a function `(layer, inputs, named_inputs)` that is called before the forward of the
            layer. What it returns, unless None, replaces the pair of inputs and named inputs.

    A function object may be on a layer once at a time: by it the hook is found when it is removed.
    """

    def __init__(self, after: Hooks = (), before: Hooks = ()):
        self._after, self._before = list(after), list(before)

    def put(self) -> None:
        """Put the hooks on their layers."""
        for layer, hook in self._before:
            layer.register_forward_pre_hook(hook, with_kwargs=True)
        for layer, hook in self._after:
            layer.register_forward_hook(hook, with_kwargs=True)

    def remove(self) -> None:
        """Remove the hooks that are on their layers, where they are found: an interrupt could lose their handles."""
        for layer, hook in self._before:
            _take(hook, layer._forward_pre_hooks, layer._forward_pre_hooks_with_kwargs)
        for layer, hook in self._after:
            _take(hook, layer._forward_hooks, layer._forward_hooks_with_kwargs)


def _take(hook: Callable, hooks: dict[int, Callable], with_kwargs: dict[int, bool]) -> None:
    for key in [key for key, each in hooks.items() if each is hook]:
        with_kwargs.pop(key, None)
        hooks.pop(key, None)  # last, because by it the key is found if this is interrupted


@contextmanager
def hooked(after: Hooks = (), before: Hooks = ()) -> Iterator[None]:
    """Put forward hooks on layers, and remove them at the end of the `with` block, also after an error.

    Args:
        after: See `ForwardHooks`.
        before: See `ForwardHooks`.

    Example:
        >>> layer, seen = nn.Linear(4, 2), []
        >>> with hooked([(layer, lambda layer, inputs, named, output: seen.append(output.shape))]):
        ...     _ = layer(Tensor([[1, 2, 3, 4]]))
        >>> seen, len(layer._forward_hooks)
        ([torch.Size([1, 2])], 0)
    """
    hooks = ForwardHooks(after, before)
    at_end = AtEnd(hooks.remove)
    with at_end, at_end:
        hooks.put()
        yield


def input_of(layer: nn.Module, inputs: tuple, named: Mapping[str, Any]) -> Any:
    """The first argument of a call of a layer, by its place or by its name."""
    first = next(iter(signature(layer.forward).parameters), "")
    return inputs[0] if inputs else named.get(first, next(iter(named.values()), None))


class RecordedOutputs:
    """Records the outputs of layers, from `start` to `remove`, or inside a `with` block, which may be entered twice.

    Args:
        model: The model that has the layers.
        names: Names of the layers, as in `model.named_modules()`.

    Attributes:
        outputs: Name of a layer -> a copy of its latest output.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]):
        self.outputs: dict[str, Tensor] = {}
        self._hooks = ForwardHooks([(model.get_submodule(name), _Record(name, self.outputs)) for name in set(names)])

    def start(self) -> None:
        """Hook the layers, if they are not hooked."""
        self._hooks.remove()
        self._hooks.put()

    def remove(self) -> None:
        """Remove the hooks; what was recorded stays."""
        self._hooks.remove()

    def __enter__(self) -> dict[str, Tensor]:
        self.start()
        return self.outputs

    def __exit__(self, *error: Any) -> None:
        self.remove()


class _Record:
    """A hook that copies the output of a layer.

    It is pickled and copied without outputs, since a model that was interrupted in a forward still has its hooks.
    """

    def __init__(self, name: str, outputs: dict[str, Tensor]):
        self.name, self.outputs = name, outputs

    def __call__(self, layer: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        # The next layer may be an activation that works in place.
        self.outputs[self.name] = first_tensor(output, f"layer {self.name!r}").clone()

    def __reduce__(self) -> tuple:
        return _Record, (self.name, {})
