"""DistillCallback: a model learns what a teacher answers, and what layers of it give, beside the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
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
from ..model.running import evaluating
from ..model.tensors import first_tensor, widened
from ..support.checks import check_number
from ..support.registry import close_matches, name_of

# Losses of numbers, or of several labels at once, which a softmax does not suit.
_OF_NUMBERS = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)


def soft_targets(student: Tensor, teacher: Tensor, temperature: float, axis: int) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over all but the class axis.

    student, teacher: logits of one shape, with the classes along `axis`. The factor keeps the size of the gradients
    when T changes. ValueError if there are no classes to compare. Hinton et al., 2015, "Distilling the Knowledge in a
    Neural Network" (arXiv:1503.02531).
    """
    if not -student.dim() <= axis < student.dim() or student.shape[axis] < 2:
        raise ValueError(
            f"soft_targets compares classes, and outputs of the shape {tuple(student.shape)} have none along axis "
            f"{axis}; give DistillCallback another loss=, such as torch.nn.functional.mse_loss"
        )
    ours, theirs = (F.log_softmax(widened(logits) / temperature, axis) for logits in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(axis).mean()


class DistillCallback(TrainingCallback):
    "Train the model on what a teacher answers, too: (1 - a) loss + a soft loss, a being weight * schedule"

    # Before RegularizeCallback (5), whose penalty is no part of the loss that is weighed here, and before what scales
    # the loss: GradientAccumulation (6), and MixedPrecision (10), with which autocast ends.
    order, run_valid = 4, False

    _stateattrs = ("teacher", "_taps")  # go nowhere with a pickled Learner
    teacher: Any = None
    _taps: Any = None  # RecordedOutputs of the model, from its forward until the loss is computed
    _axis = 1  # of the classes

    def __init__(
        self,
        teacher,  # A trained model, or its Learner; it is moved to the device of the model when a fit begins
        weight=0.5,  # Of what the teacher answers, from 0 to 1; the labels have the rest
        temperature=4.0,  # Of soft_targets: the higher, the more the small probabilities count
        loss=soft_targets,  # Of the outputs of both: a function of (student, teacher)
        features=None,  # Layers whose outputs are compared: {name in the model: name in the teacher}, or names of both
        feature_weight=1.0,  # Of the mean over features, which is added to the loss and follows the schedule, too
        feature_loss=F.mse_loss,  # Of the outputs of two layers: a function of (student, teacher)
        # When, over each fit, so twice with fine_tune: a name of `schedules`, a function from [0, 1] to [0, 1], or a
        # fastai annealer
        schedule="one_shot",
        axis=None,  # Of the classes, for soft_targets; by default that of the Learner's loss, or 1
    ):
        super().__init__()
        teacher = teacher.model if isinstance(teacher, Learner) else teacher
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"DistillCallback: teacher is a torch.nn.Module or a Learner, not {type(teacher).__name__}")
        for name, function in (("loss", loss), ("feature_loss", feature_loss)):
            if not callable(function):
                raise TypeError(f"DistillCallback: {name} is a function of (student, teacher), not {function!r}")
        self.weight = check_number("DistillCallback: weight", weight, 0, 1)
        self.temperature = check_number("DistillCallback: temperature", temperature)
        if not self.temperature:
            raise ValueError("DistillCallback: temperature is a number above 0, not 0")
        self.axis = axis
        self.feature_weight = check_number("DistillCallback: feature_weight", feature_weight)
        if isinstance(feature_loss, nn.Module) and any(each.requires_grad for each in feature_loss.parameters()):
            raise ValueError(
                "DistillCallback: feature_loss has parameters, which no optimizer trains; freeze them, or put what "
                "projects features into the model"
            )
        self.teacher, self.output_loss, self.feature_loss = teacher, loss, feature_loss
        self.features = _pairs(features)
        _check_names(self.features.values(), teacher, "teacher")
        self.schedule = schedules.resolve(schedule)

    def _taken_off(self) -> None:
        self._untap()

    def before_fit(self):
        "Refuse a teacher that is the model or shares weights with it, and names of layers that the model has not"
        self._untap()
        if self.learn.lock.locked():  # validate and the like do not ask the teacher
            return
        if self.teacher is None:
            raise ValueError(
                "DistillCallback has no teacher, which does not go with a Learner that is pickled or copied; take it "
                "off with learn.remove_cb(DistillCallback) and give the fit a new one"
            )
        model = unwrapped(self.learn.model)
        if {id(each) for each in model.parameters()} & {id(each) for each in self.teacher.parameters()}:
            raise ValueError(
                "DistillCallback: the teacher shares parameters with the model that is trained, so it would change "
                "with it; give a copy as the teacher, copy.deepcopy(learn.model)"
            )
        _check_names(self.features, model, "model")
        self._check_classes()
        self._axis = getattr(self.learn.loss_func, "axis", 1) if self.axis is None else self.axis

    def before_train(self):
        "Have the teacher on the device of the model, and begin its texts anew where the model's begin anew"
        self.teacher.to(next(self.learn.model.parameters()).device)
        if self.learn._grab_cbs(ModelResetter) and hasattr(self.teacher, "reset"):
            self.teacher.reset()

    def before_batch(self):
        "See what layers of the model give"
        self._untap()
        self._taps = RecordedOutputs(unwrapped(self.learn.model), self.features)

    def after_pred(self):
        "Leave no hook on the model"
        self._taps.remove()

    def after_loss(self):
        "Ask the teacher, and add what it says to the loss that gradients are taken of, not to the one that is shown"
        reached = progress(self.schedule, self._start)
        share, feature_share = self.weight * reached, self.feature_weight * reached if self.features else 0.0
        if share or feature_share:
            answer, theirs = self._ask()
            loss = (1 - share) * self.learn.loss_grad
            if share:
                loss = loss + share * self._loss_of_outputs(first_tensor(self.learn.pred, "the model"), answer)
            if feature_share:
                loss = loss + feature_share * self._loss_of_features(theirs)
            self.learn.loss_grad = loss
        self._untap()

    def after_cancel_batch(self):
        "Leave no hook on the model"
        self._untap()

    after_fit = after_cancel_batch

    def _check_classes(self) -> None:
        """ValueError if soft_targets would compare what are no classes."""
        loss = getattr(self.learn.loss_func, "func", self.learn.loss_func)  # that of fastai's flattened losses
        if self.weight and self.output_loss is soft_targets and isinstance(loss, _OF_NUMBERS):
            raise ValueError(
                f"DistillCallback: soft_targets compares classes, and {type(loss).__name__} is of numbers; give "
                "another loss=, such as torch.nn.functional.mse_loss"
            )

    def __deepcopy__(self, memo):
        "A copy has the same teacher, which it does not train either"
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        kept = {name: value for name, value in vars(self).items() if name not in ("teacher", "_taps")}
        made.__dict__.update(deepcopy(kept, memo) | {"teacher": self.teacher})
        return made

    def _ask(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What the teacher, and layers of it, give for the batch; in autocast if the model's forward was."""
        recorded = RecordedOutputs(self.teacher, self.features.values())
        with torch.no_grad(), evaluating(self.teacher), recorded as theirs:
            return first_tensor(self.teacher(*self.learn.xb), "the teacher"), theirs

    def _loss_of_outputs(self, student: Tensor, teacher: Tensor) -> Tensor:
        options = {"temperature": self.temperature, "axis": self._axis} if self.output_loss is soft_targets else {}
        shapes = f"the model gives {tuple(student.shape)} and the teacher {tuple(teacher.shape)}"
        return _compared(self.output_loss, student, teacher, f"outputs: {shapes}", "loss", options)

    def _loss_of_features(self, theirs: dict[str, Tensor]) -> Tensor:
        losses = []
        for our, their in self.features.items():
            for name, seen, whose in ((our, self._taps.outputs, "model"), (their, theirs, "teacher")):
                if name not in seen:
                    raise ValueError(f"features: {name!r} of the {whose} computes nothing in this batch; leave it out")
            student, teacher = self._taps.outputs[our], theirs[their]
            shapes = f"{our!r} of the model gives {tuple(student.shape)} and {their!r} of the teacher "
            shapes += f"{tuple(teacher.shape)}"
            losses.append(_compared(self.feature_loss, student, teacher, f"features: {shapes}", "feature_loss", {}))
        return torch.stack(losses).mean()

    def _untap(self) -> None:
        if self._taps is not None:
            self._taps.remove()
            self._taps = None


def _compared(loss: Callable, student: Tensor, teacher: Tensor, shapes: str, argument: str, options: dict) -> Tensor:
    """What a loss makes of two outputs. ValueError unless they fit each other and it gives one number."""
    if student.shape != teacher.shape and _is_torch_s(loss):
        raise ValueError(
            f"{shapes}, which {name_of(loss)} cannot compare; give outputs of one shape, or a {argument}= of your own, "
            "a function of (student, teacher)"
        )
    value = loss(widened(student), widened(teacher), **options)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of the shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"DistillCallback: {argument} {name_of(loss)} must return one number as a tensor; got {got}")
    return value.as_subclass(Tensor).reshape(())


def _is_torch_s(loss: Callable) -> bool:
    """Whether a loss compares element by element: one of torch's, or soft_targets."""
    while isinstance(loss, partial):
        loss = loss.func
    return loss is soft_targets or (getattr(loss, "__module__", None) or "").partition(".")[0] == "torch"


def _pairs(features: Any) -> dict[str, str]:
    """{name in the model: name in the teacher} of what a user gives."""
    if features is None:
        return {}
    names = [features] if isinstance(features, str) or not isinstance(features, Iterable) else features
    pairs = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    if not pairs or not all(isinstance(name, str) for pair in pairs.items() for name in pair):
        raise TypeError(
            "DistillCallback: features are names of layers that both models have, or a dictionary {name in the model: "
            f"name in the teacher}}, not {features!r}"
        )
    return pairs


def _check_names(names: Iterable[str], model: nn.Module, whose: str) -> None:
    known = {name for name, _ in model.named_modules() if name}
    for name in names:
        if name not in known:
            raise ValueError(f"features: the {whose} has no layer {name!r}; {close_matches(name, known)}")
