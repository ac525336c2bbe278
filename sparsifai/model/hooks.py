"""Taps: hooks that keep what layers of a model give, for as long as they are on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .tensors import first_tensor


class Taps:
    """Hooks on the layers of these names; `seen` is what each has given last, by name. Leaves none behind a `with`."""

    def __init__(self, model: nn.Module, names: Iterable[str]):
        self.seen: dict[str, Tensor] = {}
        self._handles = [model.get_submodule(name).register_forward_hook(_Tap(name, self.seen)) for name in set(names)]

    def remove(self) -> None:
        """Take the hooks off; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> dict[str, Tensor]:
        return self.seen

    def __exit__(self, *error: Any) -> None:
        self.remove()


class _Tap:
    """A hook. Pickled or copied with a model, as after an interruption, it has seen nothing."""

    def __init__(self, name: str, seen: dict[str, Tensor]):
        self.name, self.seen = name, seen

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # A copy, for an activation behind the layer may work in place.
        self.seen[self.name] = first_tensor(output, f"layer {self.name!r}").clone()

    def __reduce__(self) -> tuple:
        return _Tap, (self.name, {})
