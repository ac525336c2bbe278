"""What a TrainingManager is made of: one part for each step of a recipe, checked before there is a model."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..gradual.gradual_pruning import GradualPruning
from ..gradual.in_words import in_words
from ..model.frozen import FrozenLayers
from ..support.arguments import checks_arguments
from ..training.distillation import Distillation
from ..training.regularization import Regularization


class Acting:
    """What a part does in one training. A part that does nothing at a moment leaves the method as it is here.

    Attributes:
        name: The name of the part.
        needs_loss: Whether it adds to the loss, so that `TrainingManager.loss` must be called.
    """

    name, needs_loss = "", False

    @property
    def is_final(self) -> bool:
        """Whether a model of now may be compared with the last one."""
        return True

    def before_forward(self, t: float) -> None:
        """Prepare the forward of a step. t: the fraction of the training that is done."""

    def loss(self, loss: Tensor, t: float, output: Any, inputs: Any) -> Tensor:
        """The loss with what the part adds to it."""
        return loss

    def before_step(self) -> None:
        """Raise if the forward was not one that may be stepped."""

    def during_step(self) -> None:
        """Take off the model what is for a forward of training only: criteria may run the model after a step."""

    def after_step(self, t: float) -> None:
        """Act after a step of the optimizer. t: the fraction of the training that was done before it."""

    def end(self) -> None:
        """Leave nothing on the model. It may be called twice."""

    def warn_at_the_end(self) -> None:
        """Warn at the end of the training of what was not done."""

    def state(self) -> dict[str, Any]:
        """What another one of the same part needs to continue."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what `state` has returned."""


class Part:
    """A part of a training: what is asked for."""

    def acting(self, model: nn.Module, optimizer: Any, loss_func: Any, example_input: Any) -> Acting | None:
        """Make what the part does in one training of a model.

        Args:
            model: The model.
            optimizer: The optimizer that steps it.
            loss_func: The loss of the labels, or None.
            example_input: A batch, for models that torch.fx cannot trace, or None.

        Returns:
            What the manager calls; None if it does the work of this part itself.
        """
        return None


class Sparsify(Part):
    """Make the model sparse while it trains: the part of a TrainingManager with the arguments of SparsifyCallback.

    Args:
        *arguments: sparsity, granularity, context, criteria and schedule, as of SparsifyCallback.
        **options: These and the others by name. `calibration` is a list of batches as `Sparsifier.calibrate` takes
            them. Criteria that need inputs or a loss, and compensate, cannot do without it.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is unknown or out of range, or arguments exclude each other.

    Example:
        >>> Sparsify(0.9, context="erk").pruning.ramp.sparsity
        0.9
    """

    @checks_arguments(of=GradualPruning.of)
    def __init__(self, *arguments: Any, **options: Any):
        self.pruning = GradualPruning.of(*arguments, **options)

    def __repr__(self) -> str:
        return f"Sparsify({in_words(self.pruning)})"


class Keep(Part):
    """Keep the zeros that the model has, as KeepSparsity does in a Learner.

    Example:
        >>> model = nn.Linear(8, 4)
        >>> Sparsifier(model).sparsify(0.75)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> manager = TrainingManager(model, optimizer, Keep(), epochs=1, steps_per_epoch=1)
        >>> model(torch.randn(2, 8)).sum().backward()
        >>> manager.step()
        >>> manager.sparsity
        0.75
    """


class Freeze(Part):
    """Freeze some layers for a part of training, as FreezeCallback does in a Learner.

    Args:
        layers: Names or globs of layers or parameters, or a list of them. A container stands for everything within it.
        start: Fraction of the training that is done when the layers are frozen, from 0 to 1. Default 0.
        end: Fraction of the training that is done when they are trained again, from 0 to 1. Default 1.

    Raises:
        TypeError: `layers` is neither a name nor a list of names.
        ValueError: Not 0 <= start < end <= 1; or, when a training begins, a name matches no layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> manager = TrainingManager(model, optimizer, Freeze('0', end=0.5), epochs=2, steps_per_epoch=1)
        >>> [parameter.requires_grad for parameter in model[0].parameters()]
        [False, False]
        >>> manager.release()
    """

    @checks_arguments
    def __init__(self, layers: str | Iterable[str], start: float = 0.0, end: float = 1.0):
        self.layers, self.start, self.end = layers, start, end
        FrozenLayers("Freeze", layers, start, end)

    def acting(self, model: nn.Module, optimizer: Any, loss_func: Any, example_input: Any) -> Acting:
        """Make what freezes the layers; as of `Part`."""
        return _Freezing(FrozenLayers("Freeze", self.layers, self.start, self.end), model)


class _Freezing(Acting):
    name = "freeze"

    def __init__(self, frozen: FrozenLayers, model: nn.Module):
        self._frozen, self._model = frozen, model
        frozen.parameters(model)  # raises if a name matches no layer
        if isinstance(model, DistributedDataParallel) and not model.find_unused_parameters:
            raise ValueError(
                "Freeze: DistributedDataParallel waits for the gradients of frozen layers; make it with "
                "find_unused_parameters=True"
            )

    def before_forward(self, t: float) -> None:
        self._frozen.at(t, self._model)

    def end(self) -> None:
        self._frozen.unfreeze()


class Regularize(Part):
    """Drive groups of weights to zero with a penalty on their norms, as RegularizeCallback does in a Learner.

    Args:
        weight: Factor of the penalty, at least 0.
        granularity: Which weights form a group, as of `Regularizer`. Default "weight".
        criteria: The scores whose norms are penalized, as of `Regularizer`. Default "large_final".
        schedule: How the factor changes over the training: a name of `schedules` or a function from [0, 1] to [0, 1].
            Default "one_shot", which keeps it constant.
        layers: The layers to regularize, as of `Regularizer`. Default all but embeddings.
        exclude: The layers to leave out, in the same form. Default none.
        proximal: Take a proximal step after each step of the optimizer, with the learning rate of each parameter
            group, instead of adding the penalty to the loss. Default False.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is unknown or out of range, or the criterion cannot be a penalty. When a training
            begins: a pattern matches no layer, or proximal=True and the optimizer trains none of the weights.

    Example:
        >>> model = nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> manager = TrainingManager(model, optimizer, Regularize(0.1), epochs=1, steps_per_epoch=1)
        >>> inputs = torch.randn(2, 8)
        >>> output = model(inputs)
        >>> manager.loss(output.square().mean(), output, inputs).backward()
        >>> manager.step()
    """

    @checks_arguments
    def __init__(
        self,
        weight: float,
        granularity: Any = "weight",
        criteria: Any = "large_final",
        schedule: Any = "one_shot",
        *,
        layers: Any = None,
        exclude: Any = None,
        proximal: bool = False,
    ):
        arguments = (weight, granularity, criteria, schedule, layers, exclude, proximal)
        self.regularization = Regularization("Regularize", *arguments)

    def acting(self, model: nn.Module, optimizer: Any, loss_func: Any, example_input: Any) -> Acting:
        """Make what adds the penalty or takes proximal steps; as of `Part`."""
        return _Regularizing(self.regularization, model, optimizer, example_input)


class _Regularizing(Acting):
    name = "regularize"

    def __init__(self, regularization: Regularization, model: nn.Module, optimizer: Any, example_input: Any):
        self._regularization, self._optimizer = regularization, optimizer
        self._regularizer = regularization.regularizer(model, example_input, self._rates())
        self.needs_loss = not regularization.proximal

    def loss(self, loss: Tensor, t: float, output: Any, inputs: Any) -> Tensor:
        if self._regularization.proximal:
            return loss
        return loss + (self._regularization.factor(t) * self._regularizer.penalty()).to(loss.device)

    def after_step(self, t: float) -> None:
        if self._regularization.proximal:
            self._regularization.proximal_step(self._regularizer, self._rates(), t)

    def _rates(self) -> dict[int, float]:
        """Learning rates of the parameters of the optimizer: id of the parameter -> rate."""
        groups = self._optimizer.param_groups
        return {id(parameter): float(group["lr"]) for group in groups for parameter in group["params"]}

    def state(self) -> dict[str, Any]:
        return {"regularizer": self._regularizer.sparsifier.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self._regularizer.sparsifier.load_state_dict(state["regularizer"])


class Distil(Part):
    """Train the model to match the outputs of a teacher, as DistillCallback does in a Learner.

    Args:
        *arguments: The teacher, a trained torch.nn.Module, and the other arguments of `Distillation`, in their order.
        **options: The same by name.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is unknown or out of range. When a training begins: the model has no such layer, or it
            shares parameters with the teacher.

    Example:
        >>> model, teacher = nn.Linear(8, 4), nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> manager = TrainingManager(model, optimizer, Distil(teacher), epochs=1, steps_per_epoch=1)
        >>> inputs, targets = torch.randn(2, 8), torch.tensor([0, 3])
        >>> output = model(inputs)
        >>> manager.loss(nn.functional.cross_entropy(output, targets), output, inputs).backward()
        >>> manager.step()
    """

    @checks_arguments(of=Distillation)
    def __init__(self, *arguments: Any, **options: Any):
        self.distillation = Distillation(*arguments, **options)

    def acting(self, model: nn.Module, optimizer: Any, loss_func: Any, example_input: Any) -> Acting:
        """Make what adds the loss of the teacher; as of `Part`."""
        distillation = deepcopy(self.distillation)  # which shares the teacher
        distillation.begin(model, loss_func)
        return _Distilling(distillation, model)


class _Distilling(Acting):
    name, needs_loss = "distil", True

    def __init__(self, distillation: Distillation, model: nn.Module):
        self._distillation, self._model = distillation, model

    def before_forward(self, t: float) -> None:
        if self._distillation.features:
            self._distillation.start(self._model)

    def loss(self, loss: Tensor, t: float, output: Any, inputs: Any) -> Tensor:
        if output is None or inputs is None:
            raise TypeError(
                "TrainingManager.loss: distil compares outputs; call loss = manager.loss(loss, output, inputs), with "
                "the output and the inputs of the model"
            )
        try:
            return self._distillation.loss(loss, output, inputs, t)
        finally:
            self.before_forward(t)  # of the next batch, which may come before the step

    def end(self) -> None:
        self._distillation.release()
