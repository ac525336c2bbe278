"""DistillCallback: train a model to match the outputs of a teacher, and the outputs of the teacher's layers."""

from __future__ import annotations

from fastai.callback.rnn import ModelResetter
from fastai.learner import Learner

from ..callbacks.base import TrainingCallback
from ..support.arguments import checks_arguments
from .distillation import Distillation


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
        loss: Loss of the outputs: a name of `distillation_losses`, or a function of (student, teacher) that returns a
            scalar tensor. Default "soft_targets".
        features: Layers whose outputs are compared: a dictionary {name in the model: name in the teacher}, or names
            that both have. Default none.
        feature_weight: Factor of the losses of the features, at least 0. Default 1.
        feature_loss: Loss of the outputs of two layers, as `loss`. Default "mean_squared_error".
        schedule: How `weight` and `feature_weight` change over each fit (so over both fits of fine_tune): a name of
            `schedules`, a function from [0, 1] to [0, 1], or a fastai annealer. Default "one_shot", which keeps both
            constant.
        axis: Axis of the classes for `soft_targets`. Default that of the Learner's loss, or 1.

    Raises:
        TypeError: The teacher is no module, a loss is no function, or the features are not names.
        ValueError: A number is out of range, a name of a loss is unknown, the teacher has no layer of a given name, or
            the feature loss is given without features or has parameters that no optimizer would train. When a fit
            begins: the model has no layer of a given name, the teacher shares parameters with the model, the Learner
            was pickled, which removes the teacher, or `soft_targets` is used with a loss that does not compare classes.

    Example:
        >>> learn = make_learner()
        >>> teacher = net()  # a trained one, or its Learner
        >>> learn.fit(1, cbs=[SparsifyCallback(0.75), DistillCallback(teacher, weight=0.5)])
    """

    # Before RegularizeCallback (5), so that its penalty is not multiplied by (1 - a). Before the callbacks that scale
    # the loss: GradientAccumulation (6) and MixedPrecision (10), after which autocast has ended.
    order, run_valid = 4, False

    @checks_arguments
    def __init__(
        self,
        teacher,  # A trained model, or its Learner
        weight=0.5,  # Share of the loss of the outputs, from 0 to 1; the labels have the rest
        temperature=4.0,  # Temperature of soft_targets; the higher, the more the small probabilities count
        loss="soft_targets",  # Loss of the outputs, a name or a function of (student, teacher)
        features=None,  # Layers whose outputs are compared: {name in the model: name in the teacher}, or shared names
        feature_weight=1.0,  # Factor of the mean loss of the features, which follows the schedule, too
        feature_loss="mean_squared_error",  # Loss of the outputs of two layers, a name or a function
        schedule="one_shot",  # When: a name of `schedules`, a function of [0, 1], or a fastai annealer; over each fit
        axis=None,  # Axis of the classes for soft_targets; by default that of the Learner's loss, or 1
    ):
        super().__init__()
        teacher = teacher.model if isinstance(teacher, Learner) else teacher
        self.distillation = Distillation(
            teacher, weight, temperature, loss, features, feature_weight, feature_loss, schedule, axis
        )

    @property
    def teacher(self):
        "The teacher; None in a copy that was pickled"
        return self.distillation.teacher

    def _taken_off(self) -> None:
        self.distillation.release()

    _before_question = _taken_off  # after a fit that was interrupted

    def before_fit(self):
        "Check that the teacher and the features fit the model"
        self.distillation.begin(self.learn.model, self.learn.loss_func)

    def before_train(self):
        "Move the teacher to the device of the model, and reset its hidden state if the Learner resets the model's"
        self.distillation.move(self.learn.model)
        if self.learn._grab_cbs(ModelResetter) and hasattr(self.teacher, "reset"):
            self.teacher.reset()

    def before_batch(self):
        "Hook the layers of the model whose outputs are compared"
        self.distillation.start(self.learn.model)

    def after_pred(self):
        "Remove the hooks, keep the outputs of the layers"
        self.distillation.stop()

    def after_loss(self):
        "Add the losses of outputs and features to the loss whose gradient is taken, not to the one that is shown"
        learn = self.learn
        learn.loss_grad = self.distillation.loss(learn.loss_grad, learn.pred, tuple(learn.xb), self._start)

    def after_cancel_batch(self):
        "Remove the hooks"
        self.distillation.release()

    after_fit = after_cancel_batch
