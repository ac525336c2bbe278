"""Classes of modules whose parts are declared by name: attentions and MLPs of torch and of other libraries."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from ...support.listing import in_short
from ...support.printable import printable
from ...support.table import percent
from ..layers import full_name_of
from ..parallel import kind_of

Kind = type[nn.Module] | str


class Named(Protocol):
    """What is declared of a kind: paths from its module, of which each may belong to one record only."""

    @property
    def last(self) -> str:
        """Path of the layer that reads the groups."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all layers that have to be there."""


Record = TypeVar("Record", bound=Named)


def checked_paths(function: str, **paths: Any) -> None:
    """Check paths that a user declares.

    Args:
        function: Name of the function by which they are declared.
        **paths: Argument -> a path, or a tuple or dictionary of paths.

    Raises:
        TypeError: A tuple or dictionary of paths is something else.
        ValueError: A path does not consist of names with dots between them.
    """
    for argument, given in paths.items():
        several = argument in ("also", "norms", "widths", "per_head")
        if argument == "per_head" and not isinstance(given, Mapping):
            raise TypeError(f"{function}: per_head={given!r} must be a dictionary, such as {{'table': 0}}")
        if several and not isinstance(given, (tuple, list, Mapping)):
            example = given if isinstance(given, str) else "name"
            raise TypeError(f"{function}: {argument}={given!r} must be a tuple of names, such as ({example!r},)")
        for path in given if several else [given]:
            if not isinstance(path, str) or not re.fullmatch(r"\w+(\.\w+)*", path):
                raise ValueError(
                    f"{function}: {argument}={path!r} is no path from the module to a layer or parameter; give its "
                    "name, such as 'q_proj' or 'self.query'"
                )


@dataclass
class Matches(Generic[Record]):
    """The modules of a model that fit a record, and the notices about others.

    Attributes:
        found: (name, module, record), in the order of the model.
        guessed: Class -> the record that modules of it were taken for, because of the names of their layers.
        left_out: Name of a module that looks like one, but fits no record -> why.
    """

    found: list[tuple[str, nn.Module, Record]] = field(default_factory=list)
    guessed: dict[type, Record] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


class Declared(Generic[Record]):
    """Records by class. A class may have several; the latest that was declared is tried first.

    Args:
        function: Name of the function by which users declare.
        what: What a module is that fits, in the plural, such as 'attentions'.
    """

    def __init__(self, function: str, what: str) -> None:
        self.function, self.what = function, what
        self._records: list[tuple[Kind, Record]] = []

    def add(self, kind: Kind, record: Record) -> None:
        """Declare a record for a class, or for all classes whose full name matches a glob.

        Raises:
            TypeError: It is neither a module class nor the full name of one.
        """
        if not (isinstance(kind, str) and "." in kind or isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(
                f"{self.function}: {kind!r} is not a module class; pass a class, or its full name such as "
                "'package.module.Class'"
            )
        self._records.insert(0, (kind, record))

    def _of(self, module: nn.Module) -> dict[Record, Kind]:
        """The records of the class of a module and of its base classes, with the kind that they were declared for."""
        found: dict[Record, Kind] = {}
        for cls in type(module).__mro__:
            full_name = full_name_of(cls)
            for kind, record in self._records:
                if kind is cls or isinstance(kind, str) and fnmatchcase(full_name, kind):
                    found.setdefault(record, kind)
        return found

    def matching(
        self,
        model: nn.Module,
        why_unfit: Callable[[nn.Module, str, Record], str],
        may_be: Callable[[nn.Module], bool],
        looks_like: Callable[[nn.Module], bool],
    ) -> Matches[Record]:
        """Find the modules of a model that fit a record.

        Args:
            model: The model.
            why_unfit: Why a module, with its name, does not fit a record; empty if it fits.
            may_be: Whether a module of a class without a record is compared with all records.
            looks_like: Whether a module should be named if it fits no record.
        """
        # Layers that have numbers for names say nothing of what a module is.
        telling = [each for _, each in self._records if not re.fullmatch(r"[\d.]+", "".join(each.paths))]
        matches: Matches[Record] = Matches()
        last_layers: set[int] = set()
        unfit: dict[str, str] = {}
        for name, module in model.named_modules():
            records = self._of(module)
            candidates = records or (telling if may_be(module) else ())
            reasons: dict[Record, str] = {}
            for record in candidates:
                reasons[record] = why_unfit(module, name, record)
                if reasons[record]:
                    continue
                last = id(attrgetter(record.last)(module))
                if last not in last_layers:
                    last_layers.add(last)
                    matches.found.append((name, module, record))
                    if not records:
                        matches.guessed[type(module)] = record
                break
            else:
                if by_class := [each for each, kind in records.items() if not _is_glob(kind)]:
                    unfit[name] = reasons[by_class[0]]
                elif looks_like(module):
                    unfit[name] = "its layers have other names or sizes than those of the declared classes"
        inside = [name for name, _, _ in matches.found]
        for name, why in unfit.items():
            if not any(contains(name, other) or contains(other, name) for other in [*inside, *matches.left_out]):
                matches.left_out[name] = why
        return matches

    def notices(self, model: nn.Module, matches: Matches[Record]) -> list[str]:
        """What the user should be warned of: classes that were guessed, and modules that are left out."""
        notices = []
        for kind, record in matches.guessed.items():
            paths = ", ".join(dict.fromkeys(record.paths))
            notices.append(
                f"{kind.__name__} is taken for one of the {self.what}, because it has the layers {paths}; if that is "
                f"wrong, or something is missing, declare its parts: {self.function}({kind.__name__}, ...)"
            )
        if matches.left_out:
            notices.append(self._notice_of_left_out(model, matches.left_out))
        return notices

    def _notice_of_left_out(self, model: nn.Module, left_out: Mapping[str, str]) -> str:
        """How much of a model is left out, with a reason for each class."""
        weights = _size(tensor for name in left_out for tensor in model.get_submodule(name).parameters())
        reasons = {
            kind_of(model.get_submodule(name)): f"{printable(name) or 'the model itself'}: {why}"
            for name, why in left_out.items()
        }
        listed = in_short([f"{kind} ({reason})" for kind, reason in reasons.items()], others="other classes")
        return (
            f"{len(left_out)} of the {self.what}, with {percent(weights / max(1, _size(model.parameters())))} of the "
            f"parameters, are left out: {listed}; declare their parts: {self.function}({next(iter(reasons))}, ...)"
        )


def _is_glob(kind: Kind) -> bool:
    return isinstance(kind, str) and bool(re.search(r"[*?\[]", kind))


def contains(outer: str, inner: str) -> bool:
    """Whether a module, by its name, is or contains another."""
    return not outer or inner == outer or inner.startswith(f"{outer}.")


def _size(tensors: Iterable[Tensor]) -> int:
    """Number of values in different tensors."""
    return sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in tensors}.values())
