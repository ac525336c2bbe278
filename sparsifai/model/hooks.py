"""Forward hooks that are removed from a model whatever happens, and recording the outputs of layers by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .tensors import first_tensor

Hooks = Iterable[tuple[nn.Module, Callable]]


@contextmanager
def hooked(after: Hooks = (), before: Hooks = ()) -> Iterator[None]:
    """Put forward hooks on layers, and remove them at the end of the `with` block, also after an error.

    Args:
        after: Pairs of a layer and a function `(layer, inputs, named_inputs, output)` that is called after the forward
            of the layer. What it returns, unless None, replaces the output.
        before: Pairs of a layer and a function `(layer, inputs, named_inputs)` that is called before the forward of the
            layer. What it returns, unless None, replaces the pair of inputs and named inputs.

    Example:
        >>> layer, seen = nn.Linear(4, 2), []
        >>> with hooked([(layer, lambda layer, inputs, named, output: seen.append(output.shape))]):
        ...     _ = layer(torch.ones(3, 4))
        >>> seen, len(layer._forward_hooks)
        ([torch.Size([3, 2])], 0)
    """
    with ExitStack() as stack:
        for layer, hook in before:
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for layer, hook in after:
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield


class RecordedOutputs:
    """Records what layers put out: `outputs` maps the name of a layer to a copy of its latest output.

    The layers are hooked at once, until `remove` is called or a `with` block ends.

    Args:
        model: The model that has the layers.
        names: Names of the layers, as in `model.named_modules()`.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]):
        self.outputs: dict[str, Tensor] = {}
        self._hooks = ExitStack()
        hooks = [(model.get_submodule(name), _Record(name, self.outputs)) for name in set(names)]
        self._hooks.enter_context(hooked(hooks))

    def remove(self) -> None:
        """Remove the hooks; what was recorded stays."""
        self._hooks.close()

    def __enter__(self) -> dict[str, Tensor]:
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
