"""Tracing by torch.fx that changes nothing but the model that it is given.

`torch.fx.Tracer.trace` replaces methods of nn.Module, functions of `math` and functions marked by `torch.fx.wrap` for
the whole process while it runs. Other threads then meet them, and an interrupt can leave them there. Here every module
of the traced model gets the replacements as attributes of its own, and its methods see other globals. So the model must
be a copy that is thrown away.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch.fx
from torch import nn
from torch.fx._symbolic_trace import _wrapped_fns_to_patch
from torch.utils._pytree import tree_leaves

_ONE_STEP = (nn.MultiheadAttention, nn.RNNBase)


class Tracer(torch.fx.Tracer):
    """Traces into every module that has submodules, so that an operation is never more than one layer.

    Args:
        norms: Norm layers that are one operation.
    """

    def __init__(self, norms: Collection[nn.Module]):
        super().__init__()
        self._norms = norms

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, _ONE_STEP) or module in self._norms:
            return True
        return super().is_leaf_module(module, name) and not any(module.children())

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return Proxy(node, self)

    def trace(self, root: nn.Module, concrete_args: None = None) -> torch.fx.Graph:  # type: ignore[override]
        """Trace a copy of a model, which cannot be used afterwards.

        Args:
            root: The copy.
            concrete_args: Not used.

        Returns:
            The graph.
        """
        self.root, self.graph = root, torch.fx.Graph()
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self.tensor_attrs = {
            value: f"{name}.{attribute}".lstrip(".")
            for name, module in root.named_modules()
            for attribute, value in vars(module).items()
            if isinstance(value, torch.Tensor)
        }
        seen = _Seen(self)
        function, arguments = self.create_args_for_root(seen.of_value(type(root).forward), is_module=True)
        parameters = {id(parameter): name for name, parameter in root.named_parameters()}
        proxies = {key: self.create_proxy("get_attr", name, (), {}) for key, name in parameters.items()}
        for module in root.modules():
            seen.give_methods(module)
            vars(module)["_call_impl"] = self._call_of(module)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    vars(module)[name] = proxies[id(parameter)]
        self.create_node("output", "output", (self.create_arg(function(*arguments)),), {})
        return self.graph

    def _call_of(self, module: nn.Module) -> Callable:
        """What nn.Module.__call__ is to call in place of its own method, which runs hooks and the forward."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return type(module)._call_impl(module, *args, **kwargs)

        return lambda *args, **kwargs: self.call_module(module, forward, args, kwargs)


class Proxy(torch.fx.Proxy):
    """A proxy that `math` can round, also in functions that see their own globals, such as methods of plain classes."""

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __trunc__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.trunc, (self,), {})


class _Seen:
    """What the functions of a model see in place of the globals of their modules."""

    def __init__(self, tracer: Tracer):
        self.tracer = tracer
        self._globals: dict[int, _Globals] = {}
        self._functions: dict[Any, Any] = {}  # so that a function stays one object
        self._leaves = {id(value) for name, value in vars(math).items() if callable(value) and name[0] != "_"}
        self.builtins = vars(builtins) | {"super": _super_seen(self), "__import__": self._import}

    def give_methods(self, module: nn.Module) -> None:
        """Give a module methods of its own in place of those of its classes that are not of torch."""
        own = {name: self.of_value(value) for name, value in vars(module).items() if isinstance(value, FunctionType)}
        for kind in type(module).__mro__:
            if not _is_of_torch(kind.__module__):
                for name, value in vars(kind).items():
                    if name[:2] != "__" and name not in vars(module):
                        own.setdefault(name, self._bound(value, module))
        vars(module).update({name: value for name, value in own.items() if value is not None})

    def _bound(self, value: Any, module: nn.Module) -> Any:
        """What is seen in place of a method of a module; None for other attributes of its class."""
        if isinstance(value, FunctionType):
            return MethodType(self.of_value(value), module)
        if isinstance(value, classmethod):
            return MethodType(self.of_value(value.__func__), type(module))
        return self.of_value(value.__func__) if isinstance(value, staticmethod) else None

    def of_value(self, value: Any) -> Any:
        """What is seen in place of a value."""
        value = getattr(value, "_torchdynamo_orig_callable", value) if isinstance(value, FunctionType) else value
        if isinstance(value, FunctionType) and not _is_of_torch(value.__module__):
            if value not in self._functions:
                self._functions[value] = value  # it may be in a closure of its own
                self._functions[value] = self._rebuilt(value)
            return self._functions[value]
        if isinstance(value, ModuleType) and not _is_of_torch(value.__name__):
            return _SeenModule(value, self.of_globals(vars(value)))
        return self.leaf(value) if id(value) in self._leaves else value

    def of_globals(self, names: dict[str, Any]) -> _Globals:
        """What is seen in place of the globals of a module."""
        return self._globals.setdefault(id(names), _Globals(names, self))

    def leaf(self, function: Callable) -> Callable:
        """A function that is one operation if it is given a proxy."""

        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, torch.fx.Proxy) for leaf in tree_leaves((args, kwargs))):
                return self.tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return called

    def _rebuilt(self, function: FunctionType) -> FunctionType:
        closure = function.__closure__ and tuple(map(self._of_cell, function.__closure__))
        rebuilt = FunctionType(
            function.__code__, self.of_globals(function.__globals__), function.__name__, function.__defaults__, closure
        )
        rebuilt.__kwdefaults__ = function.__kwdefaults__
        rebuilt.__dict__.update(function.__dict__)
        return rebuilt

    def _import(self, name: str, names: Any = None, *others: Any) -> Any:
        return self.of_value(__import__(name, names.names if isinstance(names, _Globals) else names, *others))

    def _of_cell(self, cell: CellType) -> CellType:
        try:
            value = cell.cell_contents
        except ValueError:  # it is empty
            return cell
        return CellType(self.of_value(value)) if isinstance(value, FunctionType) else cell


class _Globals(dict):
    """Globals that are looked up when a function asks for them."""

    def __init__(self, names: Mapping[str, Any], seen: _Seen):
        super().__init__(__builtins__=seen.builtins)
        self.names, self._seen = names, seen

    def __missing__(self, name: str) -> Any:
        value = self.names[name]
        is_leaf = (id(self.names), name) in _wrapped_fns_to_patch
        self[name] = self._seen.leaf(value) if is_leaf else self._seen.of_value(value)
        return self[name]


class _SeenModule:
    """A module of Python whose functions see other globals."""

    def __init__(self, module: ModuleType, names: _Globals):
        self._module, self._names = module, names

    def __getattr__(self, name: str) -> Any:
        return self._names[name] if name in vars(self._module) else getattr(self._module, name)


def _super_seen(seen: _Seen) -> type:
    """A `super` that finds methods which see other globals."""

    class Super(super):
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            return MethodType(seen.of_value(found.__func__), found.__self__) if type(found) is MethodType else found

    return Super


def _is_of_torch(name: str | None) -> bool:
    return (name or "").split(".")[0] == "torch"
