"""What users give to an integration, and what it reports: a recipe, parts, or the arguments of SparsifyCallback."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..loops.manager import TrainingManager
from ..loops.parts import Part, Sparsify
from ..recipes.recipe import Recipe
from ..sparsifier.report import Report


@dataclass(frozen=True)
class Given:
    """The parts of a training, before there is a model.

    Attributes:
        parts: The parts.
        epochs: The number of epochs that a recipe says; else None.
        loss_func: A loss for criteria that need gradients of calibration batches, or None.
        example_input: A batch, for models that torch.fx cannot trace, or None.
    """

    parts: tuple[Part, ...]
    epochs: int | None
    loss_func: Any = None
    example_input: Any = None

    @classmethod
    def of(
        cls, caller: str, what: Any, arguments: tuple, options: dict[str, Any], teacher: Any, loss_func: Any,
        example_input: Any,
    ) -> Given:  # fmt: skip
        """Check what was given.

        Args:
            caller: Who was given it, for errors.
            what: A Recipe, a part or a list of parts, or the sparsity.
            arguments: Further arguments of SparsifyCallback, if `what` is the sparsity.
            options: The same by name. With a Recipe, only `calibration`.
            teacher: A trained model for a recipe with a distil step, or None.
            loss_func: As the attribute.
            example_input: As the attribute.

        Raises:
            TypeError: Arguments beside a recipe or parts, or an argument has the wrong type.
            ValueError: An argument is unknown or out of range, or a recipe cannot run in a loop.
        """
        if isinstance(what, (str, os.PathLike)):
            raise TypeError(f"{caller}: give a Recipe, not its file: Recipe.load({str(what)!r})")
        of_parts = [what] if isinstance(what, Part) else what
        is_parts = isinstance(of_parts, (list, tuple)) and all(isinstance(each, Part) for each in of_parts)
        calibration = options.pop("calibration", None) if isinstance(what, Recipe) else None
        if (isinstance(what, Recipe) or is_parts) and (arguments or options):
            more = ", ".join([*map(repr, arguments), *options])
            raise TypeError(f"{caller}: a recipe or parts say all that is pruned; write {more} into them")
        if teacher is not None and not isinstance(what, Recipe):
            raise TypeError(f"{caller}: teacher= is for a recipe; else pass parts: [Sparsify(...), Distil(teacher)]")
        if isinstance(what, Recipe):
            return cls(tuple(what.parts(teacher, calibration)), what.epochs, loss_func, example_input)
        parts = tuple(of_parts) if is_parts else (Sparsify(what, *arguments, **options),)
        if not parts:
            raise ValueError(f"{caller}: there are no parts; pass at least one, such as Sparsify(0.9)")
        return cls(parts, None, loss_func, example_input)

    def check_epochs(self, caller: str, epochs: int | None) -> None:
        """Refuse a training of another number of epochs than a recipe says.

        Args:
            caller: Who trains, for errors.
            epochs: The number of epochs of the training; None if it is not known.

        Raises:
            ValueError: The numbers differ.
        """
        if None not in (self.epochs, epochs) and self.epochs != epochs:
            raise ValueError(
                f"{caller}: the recipe says {self.epochs} epochs, but the training has {epochs}; make them equal, or "
                "leave epochs: out of the recipe and give its times as shares of training, such as 75%"
            )

    def manager(self, kind: type[TrainingManager], model: nn.Module, optimizer: Any, **numbers: Any) -> Any:
        """Make the manager of a training.

        Args:
            kind: TrainingManager, or a subclass.
            model: The model.
            optimizer: The optimizer.
            **numbers: epochs, steps_per_epoch, steps and state.
        """
        given = {"loss_func": self.loss_func, "example_input": self.example_input, **numbers}
        return kind(model, optimizer, *self.parts, **given)


class Reporting:
    """An integration that reports on the model of its training.

    Attributes:
        manager: The TrainingManager of the present training, or of the last one; None before.
    """

    manager: Any = None

    def report(self) -> Report:
        """Count the zeros of each layer and of the whole model.

        Returns:
            A table; its `plot` draws it.

        Raises:
            ValueError: No training has begun.
        """
        if self.manager is None:
            raise ValueError("report: there is no manager before a training; call it later")
        return self.manager.report()
