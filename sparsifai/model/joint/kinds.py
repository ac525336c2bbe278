"""Classes of modules whose parts are declared by name: attentions and MLPs of torch and of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from ...support.warning import warn

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


class Declared(Generic[Record]):
    """Records by class. A class may have several; the latest that was declared is tried first.

    Args:
        function: Name of the function by which users declare.
    """

    def __init__(self, function: str) -> None:
        self.function = function
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

    def _of(self, module: nn.Module) -> list[Record]:
        """The records of the class of a module and of its base classes."""
        found = []
        for cls in type(module).__mro__:
            full_name = f"{cls.__module__}.{cls.__qualname__}"
            matching = (
                kind is cls or isinstance(kind, str) and fnmatchcase(full_name, kind) for kind, _ in self._records
            )
            found += [record for (_, record), fits in zip(self._records, matching, strict=True) if fits]
        return found

    def matching(
        self,
        model: nn.Module,
        is_likely: Callable[[nn.Module], bool],
        what: str,
        fits: Callable[[nn.Module, str, Record], Any],
    ) -> Iterator[tuple[str, nn.Module, Record]]:
        """The modules of a model that fit a record: (name, module, record), in the order of the model.

        Args:
            model: The model.
            is_likely: Whether a module of a class without a record of its own is compared with all records.
            what: What a module is that fits, for the UserWarning about such classes.
            fits: Whether a module, with its name, fits a record.
        """
        # Numbers are the names of layers in any nn.Sequential, so they tell nothing.
        everything = [
            record
            for record in dict.fromkeys(record for _, record in self._records)
            if not any(path.isdigit() for path in record.paths)
        ]
        guessed: dict[str, Record] = {}
        taken: set[int] = set()
        for name, module in model.named_modules():
            records = self._of(module)
            is_guess = not records and is_likely(module)
            for record in everything if is_guess else records:
                if not fits(module, name, record):
                    continue
                last = id(attrgetter(record.last)(module))
                if last not in taken:
                    taken.add(last)
                    if is_guess:
                        guessed[type(module).__name__] = record
                    yield name, module, record
                break
        for kind, record in guessed.items():
            paths = ", ".join(dict.fromkeys(record.paths))
            warn(
                f"{kind} is taken for {what}, because it has the layers {paths}; if that is wrong, or something is "
                f"missing, declare its parts: {self.function}({kind}, ...)"
            )
