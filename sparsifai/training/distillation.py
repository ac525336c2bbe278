"""Distillation: a loss that compares a model with its teacher, for any training loop.

    distillation = Distillation(teacher, weight=0.5, features=['layer4'], feature_loss='similarity')
    distillation.begin(model)
    for step, (images, labels) in enumerate(batches):
        with distillation.recording(model):
            logits = model(images)
        loss = distillation.loss(F.cross_entropy(logits, labels), logits, images, step / len(batches))

DistillCallback does this in a fastai Learner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.schedule import progress, schedules
from ..model.hooks import RecordedOutputs
from ..model.parallel import unwrapped
from ..model.running import evaluating, in_modes, run
from ..model.tensors import UNNAMED, logits_in
from ..support.arguments import checks_arguments
from ..support.at_end import AtEnd
from ..support.checks import check_number
from ..support.registry import close_matches
from .distillation_loss import (
    check_compares_classes,
    distillation_losses,
    is_of_classes,
    loss_function,
    options_of,
    scalar_loss,
)


class Distillation:
    """The loss of a model that has a teacher, in any training loop.

    The loss of a batch is

        (1 - a) * loss of the labels + a * loss of the outputs + b * mean of the losses of the features
        a = weight * schedule(t), b = feature_weight * schedule(t), t = fraction of training that is done

    The teacher runs in evaluation mode and without gradients, on the inputs that the model was given. For a model that
    returns a dictionary or an object with `logits`, as those of transformers do, the outputs are the logits. If it has
    several instead, such as `start_logits` and `end_logits`, the loss of the outputs is the mean of theirs. Of a tuple
    the first output is compared. With several processes, each compares the examples of its own batch.

    A pickled Distillation does not include the teacher. A copy shares it.

    Args:
        teacher: A trained torch.nn.Module.
        weight: Share of the loss of the outputs, from 0 to 1; the labels have the rest. Default 0.5.
        temperature: Temperature of `soft_targets`, above 0. Default 4. Other losses do not use it.
        loss: Loss of the outputs: a name of `distillation_losses`, or a function of (student, teacher) that returns a
            scalar tensor. Default 'soft_targets'.
        features: Layers whose outputs are compared: a dictionary {name in the model: name in the teacher}, or names
            that both have. Default none.
        feature_weight: Factor of the losses of the features, at least 0. Default 1.
        feature_loss: Loss of the outputs of two layers, as `loss`. Default 'mean_squared_error'.
        schedule: How `weight` and `feature_weight` change over training: a name of `schedules`, or a function from
            [0, 1] to [0, 1]. Default 'one_shot', which keeps both constant.
        axis: Axis of the classes for `soft_targets`. Default that of the loss that `begin` is given. If it has none:
            the last for `logits` of shape (batch, tokens, classes), else 1.

    Raises:
        TypeError: The teacher is no module, a loss is no function, or the features are not names.
        ValueError: A number is out of range, a name of a loss is unknown, the teacher has no layer of a given name, or
            the feature loss is given without features or has parameters that no optimizer would train.

    Example:
        >>> model, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> distillation = Distillation(teacher, weight=1.0, loss='mean_squared_error')
        >>> distillation.begin(model)
        >>> inputs = torch.ones(2, 4)
        >>> loss = distillation.loss(torch.tensor(0.0), model(inputs), inputs, t=0.5)
        >>> bool(loss == (model(inputs) - teacher(inputs)).square().mean())
        True
    """

    teacher: nn.Module | None = None  # what a pickled one has

    @checks_arguments
    def __init__(
        self,
        teacher: nn.Module,
        weight: float = 0.5,
        temperature: float = 4.0,
        loss: str | Callable = "soft_targets",
        features: Any = None,
        feature_weight: float = 1.0,
        feature_loss: str | Callable = "mean_squared_error",
        schedule: Any = "one_shot",
        axis: int | None = None,
    ):
        if not isinstance(teacher, nn.Module):
            raise TypeError(
                f"distillation: teacher must be a torch.nn.Module or a fastai Learner, not {type(teacher).__name__}"
            )
        self.output_loss, self.feature_loss = loss_function("loss", loss), loss_function("feature_loss", feature_loss)
        self.weight = check_number("distillation: weight", weight, 0, 1)
        self.temperature = check_number("distillation: temperature", temperature)
        if not self.temperature:
            raise ValueError("distillation: temperature must be above 0, not 0")
        self.axis = axis
        self.feature_weight = check_number("distillation: feature_weight", feature_weight)
        if isinstance(feature_loss, nn.Module) and any(each.requires_grad for each in feature_loss.parameters()):
            raise ValueError(
                "distillation: feature_loss has parameters that no optimizer trains; freeze them, or move the layer "
                "that projects the features into the model"
            )
        self.teacher = teacher
        self.features = _feature_pairs(features)
        if not self.features and self.feature_loss is not distillation_losses["mean_squared_error"]:
            raise ValueError(
                "distillation: feature_loss is given without features; pass features=, names of layers, or leave it out"
            )
        _check_names(self.features.values(), teacher, "teacher")
        self.schedule = schedules.resolve(schedule)
        self._recorded: RecordedOutputs | None = None  # of the model, until the loss of the batch is computed
        self._axis_of_loss: int | None = None

    # --- Calls of a training loop, in their order ------------------------------------------------------------------

    def begin(self, model: nn.Module, loss_func: Any = None) -> None:
        """Check that the teacher and the features fit the model, and move the teacher to the device of the model.

        Args:
            model: The model that is trained.
            loss_func: The loss of the labels, if it is an object that has an axis of the classes. Default none.

        Raises:
            ValueError: The model has no layer of a given name, the teacher shares parameters with the model, this
                object was pickled, which removes the teacher, or `soft_targets` is used with a loss that does not
                compare classes.
        """
        self.release()
        if self.teacher is None:
            raise ValueError(
                "distillation has no teacher, because what is pickled does not include it; make a new one with the "
                "teacher, for a fastai Learner after learn.remove_cb(DistillCallback)"
            )
        model = unwrapped(model)
        if {id(each) for each in model.parameters()} & {id(each) for each in self.teacher.parameters()}:
            raise ValueError(
                "distillation: the teacher shares parameters with the model, so training would change it; pass a "
                "copy as the teacher: copy.deepcopy(model)"
            )
        _check_names(self.features, model, "model")
        if self.weight and is_of_classes(self.output_loss):
            check_compares_classes(loss_func)
        self._axis_of_loss = getattr(loss_func, "axis", None)
        self.move(model)

    def move(self, model: nn.Module) -> None:
        """Move the teacher to the device of the model.

        Args:
            model: The model that is trained.
        """
        parameter = next(model.parameters(), None)
        if self.teacher is not None and parameter is not None:
            self.teacher.to(parameter.device)

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record the features of the model in a `with` block around its forward. Without features it does nothing.

        Args:
            model: The model that is trained.
        """
        at_end = AtEnd(self.stop)
        with at_end, at_end:
            self.start(model)
            yield

    def start(self, model: nn.Module) -> None:
        """Hook the layers of the model whose outputs are compared, before its forward.

        Args:
            model: The model that is trained.
        """
        self.release()
        self._recorded = RecordedOutputs(unwrapped(model), self.features)
        self._recorded.start()  # once it is known here, an interrupt cannot leave hooks behind

    def stop(self) -> None:
        """Remove the hooks after the forward, and keep the outputs of the layers for `loss`."""
        if self._recorded is not None:
            self._recorded.remove()

    def loss(self, loss: Tensor, output: Any, inputs: Any, t: float) -> Tensor:
        """Add the losses of outputs and features to the loss of the labels, and forget the features.

        Args:
            loss: The loss of the labels, a scalar tensor.
            output: What the model returned: a tensor, a tuple that begins with one, or an object or a dictionary with
                `logits`, or with several whose names end so.
            inputs: What it was called with: one input, a tuple of inputs, or a dictionary of named inputs. With an
                `attention_mask` of shape (batch, tokens) beside outputs of shape (batch, tokens, classes),
                `soft_targets` leaves out the tokens that it masks.
            t: Fraction of training that was done before the batch, from 0 to 1.

        Returns:
            The loss to take gradients of. It is `loss` itself where the schedule is 0.

        Raises:
            ValueError: Outputs cannot be compared, or a layer did not run.
        """
        reached = progress(self.schedule, t)
        weight, feature_weight = self.weight * reached, self.feature_weight * reached if self.features else 0.0
        if weight or feature_weight:
            answer, features = self._run_teacher(inputs)
            loss = (1 - weight) * loss
            if weight:
                loss = loss + weight * self._loss_of_outputs(output, answer, inputs)
            if feature_weight:
                loss = loss + feature_weight * self._loss_of_features(features)
        self.release()
        return loss

    def release(self) -> None:
        """Remove the hooks and forget what they recorded. It may be called at any time."""
        if self._recorded is not None:
            self._recorded.remove()
            self._recorded = None

    # --- What `loss` is made of -------------------------------------------------------------------------------------

    def _run_teacher(self, inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        """The output of the teacher for the batch, and the outputs of its layers by name."""
        assert self.teacher is not None
        recorded = RecordedOutputs(self.teacher, self.features.values())
        at_end = AtEnd(recorded.remove)
        with in_modes(torch.no_grad()), evaluating(self.teacher), at_end, at_end:
            recorded.start()
            return run(self.teacher, inputs), recorded.outputs

    def _loss_of_outputs(self, output: Any, answer: Any, inputs: Any) -> Tensor:
        losses, given = [], self._axis_of_loss if self.axis is None else self.axis
        for name, student, teacher in _compared(output, answer):
            by_default = -1 if name != UNNAMED and student.dim() == 3 else 1
            axis = by_default if given is None else given
            options = {"temperature": self.temperature, "axis": axis, "mask": _mask_of_tokens(inputs, student, axis)}
            options, nets = options_of(self.output_loss, options), ("the model", "the teacher")
            losses.append(scalar_loss(self.output_loss, student, teacher, nets, "loss", options))
        return torch.stack(losses).mean()

    def _loss_of_features(self, of_teacher: dict[str, Tensor]) -> Tensor:
        if self._recorded is None:
            raise ValueError(
                "distillation: the outputs of the layers were not recorded; call the model inside of "
                "`with distillation.recording(model):`"
            )
        losses, options = [], options_of(self.feature_loss, {"temperature": self.temperature})
        for name, teacher_name in self.features.items():
            for layer, outputs, net in ((name, self._recorded.outputs, "model"), (teacher_name, of_teacher, "teacher")):
                if layer not in outputs:
                    raise ValueError(
                        f"distillation: layer {layer!r} of the {net} did not run in this batch; leave it out of "
                        "features="
                    )
            layers = f"layer {name!r} of the model", f"layer {teacher_name!r} of the teacher"
            pair = self._recorded.outputs[name], of_teacher[teacher_name]
            losses.append(scalar_loss(self.feature_loss, *pair, layers, "feature_loss", options))
        return torch.stack(losses).mean()

    # --- Copies -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "teacher"} | {"_recorded": None}

    def __deepcopy__(self, memo: dict) -> Distillation:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(deepcopy(self.__getstate__(), memo))
        copied.teacher = self.teacher  # nothing trains it
        return copied


def _feature_pairs(features: Any) -> dict[str, str]:
    """The argument `features` as {name in the model: name in the teacher}."""
    if features is None:
        return {}
    names = [features] if isinstance(features, str) or not isinstance(features, Iterable) else features
    pairs = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    if not pairs or not all(isinstance(name, str) for pair in pairs.items() for name in pair):
        raise TypeError(
            "distillation: features must be names of layers that both nets have, or a dictionary {name in the "
            f"model: name in the teacher}}, not {features!r}"
        )
    return pairs


def _check_names(names: Iterable[str], model: nn.Module, net: str) -> None:
    known = {name for name, _ in model.named_modules() if name}
    for name in names:
        if name not in known:
            raise ValueError(
                f"distillation: features= has {name!r}, which is not a layer of the {net}; {close_matches(name, known)}"
            )


def _compared(output: Any, answer: Any) -> list[tuple[str, Tensor, Tensor]]:
    """The name of each output that is compared, that of the model and that of the teacher."""
    ours, theirs = logits_in(output, "the model"), logits_in(answer, "the teacher")
    if len(ours) == len(theirs) == 1:  # a net that returns a tensor may have a teacher that returns `logits`
        theirs = dict.fromkeys(ours, *theirs.values())
    if not ours.keys() <= theirs.keys():
        raise ValueError(
            f"distillation: the model returns {', '.join(ours)}, and the teacher {', '.join(theirs)}; wrap one of them "
            "in a module that returns what the other does"
        )
    return [(name, ours[name], theirs[name]) for name in ours]


def _mask_of_tokens(inputs: Any, logits: Tensor, axis: int) -> Tensor | None:
    """Which tokens are no padding, for logits of shape (batch, tokens, classes); None if nothing says so."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    of_tokens = logits.dim() == 3 and axis in (2, -1)
    return mask if of_tokens and isinstance(mask, Tensor) and mask.shape == logits.shape[:2] else None
