"""DistillCallback: train a model to match the outputs of a teacher, and the outputs of the teacher's layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from fastai.callback.rnn import ModelResetter
from fastai.learner import Learner
from torch import Tensor, nn

from ..axes.schedule import progress, schedules
from ..callbacks.base import TrainingCallback
from ..model.hooks import RecordedOutputs
from ..model.parallel import unwrapped
from ..model.running import evaluating, in_modes
from ..model.tensors import first_tensor
from ..support.at_end import AtEnd
from ..support.checks import check_number
from ..support.registry import close_matches
from .distillation_loss import check_compares_classes, scalar_loss, soft_targets


class DistillCallback(TrainingCallback):
    """Train the model to match the outputs of a teacher as well as the labels.

    The gradients are those of

        (1 - a) * loss of the labels + a * loss of the outputs + b * mean of the losses of the features
        a = weight * schedule(t), b = feature_weight * schedule(t), t = fraction of the fit that is done

    Training and validation losses in the table stay those of the labels. The teacher runs in evaluation mode and
    without gradients, on the batches that the model is trained on. A pickled or exported Learner does not include the
    teacher.

    Source: Hinton et al., 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), for the outputs;
    Romero et al., 2015, "FitNets: Hints for Thin Deep Nets" (arXiv:1412.6550), for the features.

    Args:
        teacher: A trained torch.nn.Module, or its Learner. It moves to the device of the model when a fit begins.
        weight: Share of the loss of the outputs, from 0 to 1; the labels have the rest. Default 0.5.
        temperature: Temperature of `soft_targets`, above 0. Default 4. Other losses do not use it.
        loss: Loss of the outputs: a function of (student, teacher) that returns a scalar tensor. Default
            `soft_targets`.
        features: Layers whose outputs are compared: a dictionary {name in the model: name in the teacher}, or names
            that both have. Default none.
        feature_weight: Factor of the losses of the features, at least 0. Default 1.
        feature_loss: Loss of the outputs of two layers: a function of (student, teacher) that returns a scalar tensor.
            Default the mean squared error.
        schedule: How `weight` and `feature_weight` change over each fit (so over both fits of fine_tune): a name of
            `schedules`, a function from [0, 1] to [0, 1], or a fastai annealer. Default "one_shot", which keeps both
            constant.
        axis: Axis of the classes for `soft_targets`. Default that of the Learner's loss, or 1.

    Raises:
        TypeError: The teacher is no module, a loss is no function, or the features are not names.
        ValueError: A number is out of range, the teacher has no layer of a given name, or the feature loss has
            parameters that no optimizer would train. When a fit begins: the model has no layer of a given name, the
            teacher shares parameters with the model, the Learner was pickled, which removes the teacher, or
            `soft_targets` is used with a loss that does not compare classes.

    Example:
        learn.fit_one_cycle(5, cbs=[SparsifyCallback(0.9), DistillCallback(teacher, weight=0.5)])
    """

    # Before RegularizeCallback (5), so that its penalty is not multiplied by (1 - a). Before the callbacks that scale
    # the loss: GradientAccumulation (6) and MixedPrecision (10), after which autocast has ended.
    order, run_valid = 4, False

    _stateattrs = ("teacher", "_recorded")  # not pickled with the Learner
    teacher: Any = None
    _recorded: Any = None  # RecordedOutputs of the model, until the loss of the batch is computed
    _axis = 1  # the axis of the classes in this fit

    def __init__(
        self,
        teacher,  # A trained model, or its Learner
        weight=0.5,  # Share of the loss of the outputs, from 0 to 1; the labels have the rest
        temperature=4.0,  # Temperature of soft_targets; the higher, the more the small probabilities count
        loss=soft_targets,  # Loss of the outputs, a function of (student, teacher)
        features=None,  # Layers whose outputs are compared: {name in the model: name in the teacher}, or shared names
        feature_weight=1.0,  # Factor of the mean loss of the features, which follows the schedule, too
        feature_loss=F.mse_loss,  # Loss of the outputs of two layers, a function of (student, teacher)
        schedule="one_shot",  # When: a name of `schedules`, a function of [0, 1], or a fastai annealer; over each fit
        axis=None,  # Axis of the classes for soft_targets; by default that of the Learner's loss, or 1
    ):
        super().__init__()
        teacher = teacher.model if isinstance(teacher, Learner) else teacher
        if not isinstance(teacher, nn.Module):
            raise TypeError(
                f"DistillCallback: teacher must be a torch.nn.Module or a Learner, not {type(teacher).__name__}"
            )
        for name, function in (("loss", loss), ("feature_loss", feature_loss)):
            if not callable(function):
                raise TypeError(f"DistillCallback: {name} must be a function of (student, teacher), not {function!r}")
        self.weight = check_number("DistillCallback: weight", weight, 0, 1)
        self.temperature = check_number("DistillCallback: temperature", temperature)
        if not self.temperature:
            raise ValueError("DistillCallback: temperature must be above 0, not 0")
        self.axis = axis
        self.feature_weight = check_number("DistillCallback: feature_weight", feature_weight)
        if isinstance(feature_loss, nn.Module) and any(each.requires_grad for each in feature_loss.parameters()):
            raise ValueError(
                "DistillCallback: feature_loss has parameters that no optimizer trains; freeze them, or move the layer "
                "that projects the features into the model"
            )
        self.teacher, self.output_loss, self.feature_loss = teacher, loss, feature_loss
        self.features = _feature_pairs(features)
        _check_names(self.features.values(), teacher, "teacher")
        self.schedule = schedules.resolve(schedule)

    def _taken_off(self) -> None:
        self._remove_hooks()

    _before_question = _taken_off  # after a fit that was interrupted

    def before_fit(self):
        "Check that the teacher and the features fit the model"
        self._remove_hooks()
        if self.teacher is None:
            raise ValueError(
                "DistillCallback has no teacher, because a pickled Learner does not include it; call "
                "learn.remove_cb(DistillCallback) and pass a new DistillCallback to the fit"
            )
        model = unwrapped(self.learn.model)
        if {id(each) for each in model.parameters()} & {id(each) for each in self.teacher.parameters()}:
            raise ValueError(
                "DistillCallback: the teacher shares parameters with the model, so training would change it; pass a "
                "copy as the teacher: copy.deepcopy(learn.model)"
            )
        _check_names(self.features, model, "model")
        if self.weight and self.output_loss is soft_targets:
            check_compares_classes(self.learn.loss_func)
        self._axis = getattr(self.learn.loss_func, "axis", 1) if self.axis is None else self.axis

    def before_train(self):
        "Move the teacher to the device of the model, and reset its hidden state if the Learner resets the model's"
        self.teacher.to(next(self.learn.model.parameters()).device)
        if self.learn._grab_cbs(ModelResetter) and hasattr(self.teacher, "reset"):
            self.teacher.reset()

    def before_batch(self):
        "Hook the layers of the model whose outputs are compared"
        self._remove_hooks()
        self._recorded = RecordedOutputs(unwrapped(self.learn.model), self.features)
        self._recorded.start()  # once it is known here, an interrupt cannot leave hooks behind

    def after_pred(self):
        "Remove the hooks, keep the outputs of the layers"
        self._recorded.remove()

    def after_loss(self):
        "Add the losses of outputs and features to the loss whose gradient is taken, not to the one that is shown"
        reached = progress(self.schedule, self._start)
        weight, feature_weight = self.weight * reached, self.feature_weight * reached if self.features else 0.0
        if weight or feature_weight:
            output, features = self._run_teacher()
            loss = (1 - weight) * self.learn.loss_grad
            if weight:
                loss = loss + weight * self._loss_of_outputs(first_tensor(self.learn.pred, "the model"), output)
            if feature_weight:
                loss = loss + feature_weight * self._loss_of_features(features)
            self.learn.loss_grad = loss
        self._remove_hooks()

    def after_cancel_batch(self):
        "Remove the hooks"
        self._remove_hooks()

    after_fit = after_cancel_batch

    def __deepcopy__(self, memo):
        "Copy everything but the teacher, which the copy shares: nothing trains it"
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        kept = {name: value for name, value in vars(self).items() if name not in ("teacher", "_recorded")}
        copied.__dict__.update(deepcopy(kept, memo) | {"teacher": self.teacher})
        return copied

    def _run_teacher(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The output of the teacher for the batch, and the outputs of its layers by name."""
        recorded = RecordedOutputs(self.teacher, self.features.values())
        at_end = AtEnd(recorded.remove)
        with in_modes(torch.no_grad()), evaluating(self.teacher), at_end, at_end:
            recorded.start()
            return first_tensor(self.teacher(*self.learn.xb), "the teacher"), recorded.outputs

    def _loss_of_outputs(self, student: Tensor, teacher: Tensor) -> Tensor:
        options = {"temperature": self.temperature, "axis": self._axis} if self.output_loss is soft_targets else {}
        return scalar_loss(self.output_loss, student, teacher, ("the model", "the teacher"), "loss", options)

    def _loss_of_features(self, of_teacher: dict[str, Tensor]) -> Tensor:
        losses = []
        for name, teacher_name in self.features.items():
            for layer, outputs, net in ((name, self._recorded.outputs, "model"), (teacher_name, of_teacher, "teacher")):
                if layer not in outputs:
                    raise ValueError(
                        f"DistillCallback: layer {layer!r} of the {net} did not run in this batch; leave it out of "
                        "features="
                    )
            layers = f"layer {name!r} of the model", f"layer {teacher_name!r} of the teacher"
            pair = self._recorded.outputs[name], of_teacher[teacher_name]
            losses.append(scalar_loss(self.feature_loss, *pair, layers, "feature_loss", {}))
        return torch.stack(losses).mean()

    def _remove_hooks(self) -> None:
        if self._recorded is not None:
            self._recorded.remove()
            self._recorded = None


def _feature_pairs(features: Any) -> dict[str, str]:
    """The argument `features` as {name in the model: name in the teacher}."""
    if features is None:
        return {}
    names = [features] if isinstance(features, str) or not isinstance(features, Iterable) else features
    pairs = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    if not pairs or not all(isinstance(name, str) for pair in pairs.items() for name in pair):
        raise TypeError(
            "DistillCallback: features must be names of layers that both nets have, or a dictionary {name in the "
            f"model: name in the teacher}}, not {features!r}"
        )
    return pairs


def _check_names(names: Iterable[str], model: nn.Module, net: str) -> None:
    known = {name for name, _ in model.named_modules() if name}
    for name in names:
        if name not in known:
            raise ValueError(
                f"DistillCallback: features= has {name!r}, which is not a layer of the {net}; "
                f"{close_matches(name, known)}"
            )
