"""The pickle in a file of torch.save, looked through before torch reads it.

torch.load with weights_only=True runs no code of a file, but believes what a file says of its sizes: a storage of 10^12
elements in a file of 1 KB, a bytearray of any length, keys of nested tuples that take years to hash. Here the opcodes
are followed as torch follows them, without making anything, and what is out of proportion is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, BinaryIO

# Limits, more than ten times what the checkpoint of a large language model needs.
MOST_OPCODES = 2**21
LARGEST_KEY = 64  # values in a tuple that is a key; nested tuples that share parts count as if written out
MOST_TUPLE_KEYS = 1000

# Views may have more elements than their storage: that many in one tensor, and so many times the file in all.
_EXPANDED = 2**22
_TIMES_THE_FILE = 32

_MANY = 2**62

_STORAGES = {
    "Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexFloat": 8, "ComplexDouble": 16, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1, "QUInt2x4": 1,
}  # fmt: skip
_ITEM_BYTES = {**{f"torch {kind}Storage": size for kind, size in _STORAGES.items()}, "torch.storage UntypedStorage": 1}


@dataclass(eq=False)
class _Tuple:
    items: list[Any]

    def __post_init__(self) -> None:
        # Its values, each as often as it would be written out. Nested tuples that share parts soon have 10^1000.
        sizes: list[int] = [each.size if isinstance(each, _Tuple) else 1 for each in self.items]
        self.size: int = min(1 + sum(sizes), _MANY)
        self.weight: int = min(sum(map(_weight, self.items)), _MANY)


@dataclass(eq=False, slots=True)
class _Made:
    """Something that torch would make: a list, a dict, what a function returns, a function."""

    kind: str
    bytes: int = 0  # of a storage
    weight: int = 0  # what it costs to copy it or to go through it: values of a container, bytes of a tensor or text
    items: list[Any] = field(default_factory=list)  # of a list, of which a set may be made


class PickleCheck:
    """Follows the opcodes of pickles.

    Args:
        file_bytes: The bytes of the whole file, to which sizes are in proportion.
        storages: Key of a storage -> its bytes in the file. None if the pickle alone says them, as in files of torch
            before 1.6; then all of them together may not be larger than the file.
        others: Whether numbers of numpy and lists of fastcore are allowed, too.
    """

    def __init__(self, file_bytes: int, storages: Mapping[str, int] | None, others: bool = False):
        self.file_bytes, self.storages, self.others = file_bytes, storages, others
        self.claimed: dict[str, int] = {}
        self.claimed_bytes = self.opcodes = self.elements = self.tuple_keys = 0

    def follow(self, file: BinaryIO) -> Any:
        """Follow the opcodes of one pickle, up to its end.

        Args:
            file: A file at the begin of the pickle.

        Returns:
            What the pickle holds, if that is an int or a str.

        Raises:
            ValueError: It is not a pickle, or torch.load should not read it.
        """
        stack: list[Any] = []
        marked: list[list[Any]] = []
        memo: dict[int, Any] = {}
        try:
            argument: Any
            for opcode, argument, _ in pickletools.genops(file):
                self.opcodes += 1
                if self.opcodes > MOST_OPCODES:
                    raise ValueError(f"it has more than {MOST_OPCODES:,} values")
                name = opcode.name
                if name in _VALUES:
                    stack.append(argument)
                elif name in _NAMED:
                    stack.append(_NAMED[name]())
                elif name == "GLOBAL":
                    stack.append(_Made(argument))
                elif name in ("BINPUT", "LONG_BINPUT"):
                    memo[argument] = stack[-1]
                elif name in ("BINGET", "LONG_BINGET"):
                    stack.append(memo[argument])
                elif name == "MARK":
                    marked.append(stack)
                    stack = []
                elif name in _OF_MARKED:
                    items, stack = stack, marked.pop()
                    self._put(name, stack, items)
                elif name in _OF_LAST:
                    count = _OF_LAST[name]
                    items = stack[len(stack) - count :]
                    if len(items) < count:
                        raise IndexError
                    del stack[len(stack) - count :]
                    self._put(name, stack, items)
                elif name == "PROTO" and argument != 2:
                    raise ValueError(f"it is of pickle protocol {argument}, and torch.save uses 2")
                elif name == "STOP":
                    return stack.pop()
                elif name != "PROTO":
                    raise ValueError(f"it has the opcode {name}, which torch.save does not write")
        except (IndexError, KeyError):
            raise ValueError("its pickle is damaged") from None
        raise ValueError("its pickle has no end")

    def _put(self, name: str, stack: list[Any], items: list[Any]) -> None:
        """Put what an opcode makes of the items on the stack."""
        if name == "NEWOBJ":
            if not (self.others and _is_call(*items) and items[0].kind in _LISTS and not items[1].items):
                raise ValueError(_object(items[0]))
            stack.append(_Made(items[0].kind))
        elif name.startswith("TUPLE"):
            stack.append(_Tuple(items))
        elif name in ("APPEND", "APPENDS"):
            _expect(stack[-1], "list")
            stack[-1].items += items
            stack[-1].weight += len(items)
        elif name in ("SETITEM", "SETITEMS"):
            _expect(stack[-1], "dict", "collections OrderedDict", "collections Counter")
            self._check_keys(items[::2])
            stack[-1].weight += len(items)
        elif name == "BINPERSID":
            stack.append(self._storage(items[0]))
        elif name == "BUILD":
            _expect(stack[-1], "collections OrderedDict", "numpy dtype", *_LISTS)
            if stack[-1].kind != "numpy dtype" or not isinstance(items[0], _Tuple):
                _expect(items[0], "dict")
            self._spend(items[0].weight)
        else:
            stack.append(self._called(*items))

    def _check_keys(self, keys: list[Any]) -> None:
        for key in keys:
            if isinstance(key, _Tuple):
                self.tuple_keys += 1
                if key.size > LARGEST_KEY or self.tuple_keys > MOST_TUPLE_KEYS:
                    raise ValueError("it has keys of nested or many tuples")
            elif isinstance(key, int) and abs(key) >= 2**60:  # numbers below have hashes of their own
                raise ValueError("it has keys of huge numbers")

    def _storage(self, identity: Any) -> _Made:
        """The storage that torch would read, as large as it says."""
        items = identity.items if isinstance(identity, _Tuple) else []
        if len(items) == 6 and items[5] is None:
            items = items[:5]  # torch before 1.6
        if len(items) != 5 or items[0] != "storage" or not isinstance(items[2], str) or not _is_size(items[4]):
            raise ValueError("it refers to something that is no storage")
        _, kind, key, _, count = items
        if not isinstance(kind, _Made) or kind.kind not in _ITEM_BYTES:
            raise ValueError("it has a storage of an unknown type")
        size = count * _ITEM_BYTES[kind.kind]
        if self.storages is not None:
            there = self.storages.get(key, -1)
            if size > there:
                raise ValueError(f"a storage should have {size:,} bytes, and the file has {max(there, 0):,} of it")
        else:
            self.claimed_bytes += size - self.claimed.get(key, 0)
            self.claimed[key] = size
            if self.claimed_bytes > self.file_bytes:
                raise ValueError("its storages should have more bytes than the file")
        return _Made(kind.kind, size)

    def _called(self, function: Any, arguments: Any) -> Any:
        """What a function returns."""
        if _is_call(function, arguments) and function.kind == "torch._tensor _rebuild_from_type_v2":
            function, _, arguments = arguments.items[:3]  # a tensor with attributes
        if not _is_call(function, arguments):
            raise ValueError("it calls something that is no function")
        name, given = function.kind, arguments.items
        check = _CALLS.get(name) or (_OF_NUMPY.get(name) if self.others else None)
        if check is None:
            raise ValueError(_object(function))
        if not check(self, given):
            raise ValueError(f"it calls {_name(function)} with wrong arguments")
        weight = sum(map(_weight, given))  # it may be called again and again with the same large argument
        if check is not _VIEW:
            self._spend(weight)
        return _Made(name, weight=weight)

    def _spend(self, weight: int) -> None:
        self.elements += weight
        if self.elements > _TIMES_THE_FILE * self.file_bytes + 2**24:
            raise ValueError("its tensors and values are many times more than the file")

    def _is_view(self, given: list[Any]) -> bool:
        """Whether a tensor fits into its storage."""
        storage, offset, shape, strides = given[:4]
        if not (isinstance(storage, _Made) and storage.kind in _ITEM_BYTES and _is_size(offset)):
            return False
        if not (_are_sizes(shape) and _are_sizes(strides) and len(shape.items) == len(strides.items)):
            return False
        count = prod(shape.items)
        # An element of an untyped storage may have up to 16 bytes; torch checks it again with the dtype.
        item = _ITEM_BYTES[storage.kind]
        last = offset + sum((size - 1) * stride for size, stride in zip(shape.items, strides.items, strict=True))
        if count and (last + 1) * item > storage.bytes:
            raise ValueError("a tensor is larger than its storage")
        if count * item > storage.bytes + _EXPANDED:
            raise ValueError("a tensor has many times more elements than its storage")
        self._spend(count * item)
        return True


def _expect(value: Any, *kinds: str) -> None:
    if not isinstance(value, _Made) or value.kind not in kinds:
        raise ValueError("its pickle changes something that cannot be changed")


def _name(function: Any) -> str:
    return function.kind.replace(" ", ".")[:100] if isinstance(function, _Made) else "no class"


def _object(function: Any) -> str:
    return f"it holds an object of {_name(function)}; only tensors and plain values are read, save these alone"


def _weight(value: Any) -> int:
    """What it costs to copy a value or to go through it."""
    if isinstance(value, (_Tuple, _Made)):
        return value.weight
    return len(value) if isinstance(value, str) else 1


def _is_call(function: Any, arguments: Any) -> bool:
    return isinstance(function, _Made) and isinstance(arguments, _Tuple)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_sizes(value: Any) -> bool:
    return isinstance(value, _Tuple) and len(value.items) <= 64 and all(map(_is_size, value.items))


def _is_text(given: list[Any]) -> bool:
    """Whether these are the arguments with which bytes are made of a text."""
    is_bytes = isinstance(given[0], str) or (isinstance(given[0], _Made) and given[0].kind == "_codecs encode")
    return is_bytes and len(given) <= 2 and all(each in ("latin1", "latin-1") for each in given[1:])


def _is_set(check: PickleCheck, given: list[Any]) -> bool:
    """Whether these are the arguments with which a set is made of a list."""
    if len(given) != 1 or not isinstance(given[0], _Made) or given[0].kind != "list":
        return False
    check._check_keys(given[0].items)
    return True


def _anything(check: PickleCheck, given: list[Any]) -> bool:
    return True


_VIEW: Callable[[PickleCheck, list[Any]], bool] = lambda check, given: check._is_view(given)  # noqa: E731

# Function -> whether it may be called with these arguments. All others are refused, whatever torch allows.
_CALLS: dict[str, Callable[[PickleCheck, list[Any]], bool]] = {
    "collections OrderedDict": lambda check, given: not given,
    "collections Counter": lambda check, given: all(isinstance(each, _Made) and each.kind == "dict" for each in given),
    "torch Size": lambda check, given: all(map(_are_sizes, given)),
    "torch device": _anything,
    "torch.serialization _get_layout": _anything,
    "_codecs encode": lambda check, given: _is_text(given),
    "__builtin__ bytearray": lambda check, given: _is_text(given),
    "__builtin__ complex": _anything,
    "__builtin__ set": _is_set,
    "torch._utils _rebuild_tensor": _VIEW,
    "torch._utils _rebuild_tensor_v2": _VIEW,
    "torch._utils _rebuild_tensor_v3": _VIEW,
    "torch._utils _rebuild_qtensor": _VIEW,
    "torch._utils _rebuild_parameter": _anything,
    "torch._utils _rebuild_parameter_with_state": _anything,
    "torch._utils _rebuild_meta_tensor_no_storage": _anything,
    "torch._utils _rebuild_sparse_tensor": _anything,
    "torch._utils _rebuild_nested_tensor": _anything,
}

# Numbers of numpy.
_OF_NUMPY: dict[str, Callable[[PickleCheck, list[Any]], bool]] = {
    "numpy._core.multiarray scalar": _anything,
    "numpy.core.multiarray scalar": _anything,
    "numpy dtype": lambda check, given: isinstance(given[0], str) and given[0][:1] in tuple("biufc"),
}

# Lists of fastcore, which the state of fastai's optimizers has.
_LISTS = ("fastcore.foundation L",)

# Opcodes, of those that torch.load knows with weights_only=True.
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_NAMED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": lambda: _Tuple([]),
    "EMPTY_LIST": lambda: _Made("list"), "EMPTY_DICT": lambda: _Made("dict"),
}  # fmt: skip
_OF_MARKED = {"TUPLE", "APPENDS", "SETITEMS"}
_OF_LAST = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "APPEND": 1,
    "SETITEM": 2,
    "BINPERSID": 1,
    "REDUCE": 2,
    "NEWOBJ": 2,
    "BUILD": 1,
}
