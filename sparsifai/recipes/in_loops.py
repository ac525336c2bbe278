"""Recipes in loops that are not fastai's: the parts of a TrainingManager that its steps stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

from torch import nn

from ..gradual.unused import looks_at_data
from ..loops.manager import TrainingManager
from ..loops.parts import Distil, Freeze, Keep, Part, Regularize, Sparsify
from ..loops.quantize_part import Quantize
from ..sparsifier.options import Options
from ..support.arguments import checks_arguments
from .reading import Reading
from .step import Step
from .uses import check_fit

# Kind of step -> the part of a training in any loop.
_PARTS: dict[str, Callable[..., Part]] = {
    "sparsify": Sparsify, "keep": Keep, "regularize": Regularize, "distil": Distil, "freeze": Freeze,
    "quantize": Quantize,
}  # fmt: skip


class RunsInLoops:
    """What a Recipe is in a loop of one's own."""

    epochs: Any
    steps: tuple[Step, ...]
    _reading: Reading
    _at: Callable[[Step], AbstractContextManager[None]]

    @checks_arguments
    def parts(self, teacher: Any = None, calibration: Any = None) -> list[Part]:
        """Make the parts of a TrainingManager, one per step.

        Args:
            teacher: A trained model, for a distil step. Default None.
            calibration: Batches for criteria that need inputs or a loss, and for `compensate`, as of `Sparsify`.
                Default None.

        Returns:
            The parts, in the order of the steps.

        Raises:
            ValueError: The recipe has a distil step and no teacher is given, or a part refuses its arguments.
        """
        return self._made("parts", _PARTS, teacher, calibration)

    def _made(self, method: str, makers: Mapping[str, Callable], teacher: Any, calibration: Any) -> list:
        """What each step becomes by the maker of its kind."""
        check_fit(self._reading, method)
        looking = [] if calibration is None else [step for step in self.steps if self._looks_at_data(step)]
        made = []
        for step in self.steps:
            arguments = self._reading.arguments(step)
            with self._at(step):
                if step.kind == "distil":
                    if teacher is None:
                        raise ValueError("distil needs a teacher; pass teacher=, a trained model")
                    arguments["teacher"] = teacher
                # If no step looks at the batches, each one warns of them.
                if step.kind == "sparsify" and calibration is not None and (step in looking or not looking):
                    arguments["calibration"] = calibration
                made.append(makers[step.kind](**arguments))
        return made

    def _looks_at_data(self, step: Step) -> bool:
        """Whether a step makes use of calibration batches."""
        if step.kind != "sparsify":
            return False
        names = {each.name for each in fields(Options)}
        options = {name: value for name, value in self._reading.arguments(step).items() if name in names}
        with self._at(step):
            return looks_at_data(Options.of(**options))

    @checks_arguments
    def manager(
        self,
        model: nn.Module,
        optimizer: Any,
        steps_per_epoch: int,
        *,
        epochs: int | None = None,
        teacher: Any = None,
        calibration: Any = None,
        loss_func: Callable | None = None,
        example_input: Any = None,
        state: Mapping[str, Any] | None = None,
    ) -> TrainingManager:
        """Make the manager of a training in a loop of one's own, as SparseML's ScheduledModifierManager was.

        Args:
            model: Any torch model, wrapped if several processes train it.
            optimizer: torch's optimizer of its parameters.
            steps_per_epoch: Number of steps of the optimizer in an epoch. With gradient accumulation, fewer than
                batches.
            epochs: Number of epochs, for a recipe that does not give it. Default None.
            teacher: A trained model, for a distil step. Default None.
            calibration: Batches for criteria that need inputs or a loss, such as obs and wanda, and for `compensate`.
                Default None.
            loss_func: A loss for criteria that need gradients of these batches. Default None.
            example_input: A batch, for models that torch.fx cannot trace and for `coupled: true`. Default None.
            state: What `TrainingManager.state_dict` returned, to resume from: of a model and an optimizer whose states
                are loaded already. Default None.

        Returns:
            The manager: call its `step` instead of that of the optimizer.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: As `parts`, or the recipe does not fit the model, or says another number of epochs or none.
        """
        check_fit(self._reading, "manager")
        if self.epochs is None and epochs is None:
            raise ValueError("manager: the recipe does not say how many epochs there are; pass epochs=")
        if None not in (self.epochs, epochs) and epochs != self.epochs:
            raise ValueError(f"manager: epochs={epochs!r}, but the recipe says {self.epochs}; leave out one of them")
        parts, given = (
            self.parts(teacher, calibration),
            {"loss_func": loss_func, "example_input": example_input, "state": state},
        )
        number: Any = self.epochs or epochs
        return TrainingManager(model, optimizer, *parts, epochs=number, steps_per_epoch=steps_per_epoch, **given)
