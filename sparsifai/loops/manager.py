"""TrainingManager: sparse training in a loop of one's own, around each step of the optimizer.

loss = manager.loss(loss_func(output, targets), output, inputs)   # adds penalties and a teacher, if there are any
loss.backward()
manager.before_step()       # gradients are collected and masked: clip them now, if at all
manager.step()              # the optimizer's step, then the masks of where the schedule is
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from ..gradual.in_words import in_words
from ..model.parallel import kind_of
from ..sparsifier.masking import REFRESH
from ..support.at_end import AtEnd
from ..support.foreign_names import ForeignAttributes
from ..support.table import percent
from ..support.warning import warn
from .managed import ManagedTraining


class TrainingManager(ManagedTraining, ForeignAttributes):
    """Trains a model to be sparse in a loop of one's own. `Recipe.manager` makes one of a recipe.

    When it is made, the model is pruned to where the schedule begins. In every step, gradients of pruned weights are
    zero before the optimizer uses them, and pruned weights are zero after it. Nothing is added to the model: its
    parameters stay the same objects, and its `state_dict` has the same names. After the last step the sparsity is
    exactly the one that was asked for. `Sparsify` and `Keep` keep the zeros that the model has at the start.

    Attributes:
        model: The model.
        optimizer: The optimizer.
        epochs: Number of epochs of the training.
        steps_per_epoch: Number of steps of the optimizer in an epoch.
        steps: Number of steps of the whole training.
        steps_done: Number of steps that are done.
        sparsifiers: The Sparsifiers of the model, one for each `Sparsify` part, in their order.

    Args:
        model: Any torch.nn.Module. With DistributedDataParallel, the wrapped model: all processes get the same masks.
        optimizer: torch's optimizer of the model's parameters, or a wrapper around one.
        *parts: What the training does: `Sparsify`, `Keep`, `Regularize`, `Distil`, `Freeze`, `Quantize`. Several
            `Sparsify` parts prune layers of their own each: pass `layers=`.
        epochs: Number of epochs of the training.
        steps_per_epoch: Number of steps of the optimizer in an epoch. With gradient accumulation, fewer than batches.
        steps: Number of steps of the whole training, if the last epoch has fewer than the others. Default: epochs
            times steps_per_epoch.
        loss_func: The loss of the labels, a function of (output, target): for the batches of `calibration=`, as of
            `Sparsifier.calibrate`, and to check that a teacher's outputs can be compared. Default None.
        example_input: A batch, for models that torch.fx cannot trace, in the form that Sparsifier takes. Default None.
        state: What `state_dict` of another manager returned, to resume from: of a model and an optimizer whose states
            are loaded already. Default None.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There are no parts, they do not fit the model, two of them prune the same layer, the criterion needs
            data that are not given, or the optimizer holds no parameter of the model. Nothing has changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> manager = TrainingManager(model, optimizer, Sparsify(0.5), epochs=2, steps_per_epoch=4)
        >>> for _ in range(8):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(3, 4)).sum().backward()
        ...     manager.step()
        >>> manager.sparsity
        0.5
    """

    def loss(self, loss: Tensor, output: Any = None, inputs: Any = None) -> Tensor:
        """Add penalties, and the loss of a teacher's outputs. Call it for every batch, before backward.

        Args:
            loss: The loss of the labels, a mean over the batch, before it is divided for gradient accumulation.
            output: The output of the model, for `Distil`. Default None.
            inputs: The inputs of the model, for `Distil`: a tensor, a tuple of arguments or a dictionary of keywords.
                Default None.

        Returns:
            The loss to call `backward` of. It is `loss` itself if there is nothing to add.

        Raises:
            RuntimeError: All steps are done.
        """
        self._check_open("loss")
        for each in self._acting:
            loss = each.loss(loss, self.steps_done / self.steps, output, inputs)
        self._has_loss, self._is_prepared = True, False
        return loss

    def before_step(self) -> None:
        """Collect the gradients for the criterion, and set those of pruned weights to zero. `step` calls it, too.

        Call it yourself to clip gradients between it and `step`. With a GradScaler call `scaler.unscale_(optimizer)`
        before it.

        Raises:
            RuntimeError: All steps are done, or `loss` was not called though a part adds to the loss.
        """
        self._check_open("step")
        if self._is_prepared:
            return
        self._begin()
        if not self._has_loss and (needy := [each.name for each in self._acting if each.needs_loss]):
            raise RuntimeError(
                f"TrainingManager.step: {needy[0]} adds to the loss; call loss = manager.loss(loss, output, inputs) "
                "before loss.backward()"
            )
        for acting in self._acting:
            acting.before_step()
        for each in self._gradual:
            each.before_step(self.steps_done, self.steps)
        self._zeros.mask_gradients()
        self._is_prepared = True

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Do in a `with` block what `step` does, for a loop that steps the optimizer in a way of its own.

        Put the optimizer's step into the block, and nothing else. In front of it is `before_step`.

        Raises:
            RuntimeError: As `before_step`.
        """
        ready, at_end = AtEnd(self.prepare), AtEnd(self._after_optimizer)
        with ready, ready:
            self.before_step()
            with at_end, at_end, ExitStack() as stack:
                for acting in self._acting:
                    acting.during_step()
                for each in self._gradual:
                    stack.enter_context(each.sparsifier.dense_weights())
                yield
            self._after_step()

    def _after_optimizer(self) -> None:
        """Keep the zeros, also if the step was interrupted; what comes next are the gradients of another batch."""
        self._zeros.apply()
        self._is_prepared = False

    def step(self, scaler: Any = None) -> Any:
        """Step the optimizer: `before_step`, its own step, and the masks of where the schedule is after it.

        If it is interrupted, the model is sparse, and the next call goes on.

        Args:
            scaler: A torch.amp.GradScaler, whose `step` is called instead. Gradients are unscaled before, unless you
                have called `before_step`. Call `scaler.update()` yourself. Default None.

        Returns:
            What the optimizer's step returns.

        Raises:
            RuntimeError: As `before_step`.
        """
        self._check_open("step")
        if scaler is not None and not self._is_prepared:
            scaler.unscale_(self.optimizer)
        with self.stepping():
            return self.optimizer.step() if scaler is None else scaler.step(self.optimizer)

    def finish(self) -> None:
        """End the training: call it after the loop, or if you stop early. It may be called twice.

        In the last epoch the sparsity goes to the end of the schedule, if a last batch had no step. Frozen layers are
        trained again, and no hook is left on the model.
        """
        if not self._is_closed:
            if not self.steps_done:
                warn(
                    "TrainingManager.finish: no step was done, so nothing was pruned or trained as asked for; call "
                    "manager.step() instead of optimizer.step()"
                )
            elif self.steps_done > self.steps - self.steps_per_epoch or self.is_done:
                for each in self._gradual:
                    each.go_to(1.0)
                self._zeros.apply()
                self._zeros.mask_moments()
            elif not self._has_final_masks:
                warn(
                    f"TrainingManager.finish: the training has ended after {self.steps_done} of {self.steps} steps, at "
                    f"a sparsity of {percent(self.sparsity)}, before its schedule did, or its masks settled"
                )
            self._close()

    def release(self) -> None:
        """Leave nothing on the model but its zeros: no hook, no frozen layer.

        For a loop that was interrupted, or to save the whole model within it; `finish` does it, too. To go on, call
        `prepare` before the next forward.
        """
        for each in self._acting:
            each.end()

    def _after_step(self) -> None:
        steps = self.steps_done + 1
        for acting in self._acting:
            acting.after_step(self.steps_done / self.steps)
        for each in self._gradual:
            each.after_step(steps, self.steps)
        if steps % REFRESH == 0:
            self._zeros.mask_moments()
        self.steps_done, self._has_loss = steps, False

    def _begin(self) -> None:
        """Warn at the first step: a state that is loaded before it can change what there is to say."""
        if not self._has_begun:
            self._has_begun = True
            self._zeros.warn_of_fixed()
            for each in self._gradual:
                if message := each.pruning.notice_of_every(self.steps):
                    warn(f"TrainingManager: {message}")
                if message := each.higher_sparsity(each.sparsifier.masks):
                    warn(
                        f"{message}, because the zeros that the model has stay; to let them go, load weights from "
                        "before they were pruned"
                    )

    def _check_open(self, operation: str) -> None:
        if self._is_closed:
            why = f"all {self.steps} steps are done" if self.is_done else "the training was finished"
            raise RuntimeError(
                f"TrainingManager.{operation}: {why} ({self.epochs} epochs of {self.steps_per_epoch} steps); make the "
                "manager with more epochs, or with the number of steps that an epoch has, or make a new one"
            )

    def __repr__(self) -> str:
        sparsify = "".join(f"; Sparsify({in_words(each.pruning)})" for each in self._gradual)
        return f"TrainingManager of {kind_of(self.model)}: step {self.steps_done} of {self.steps}{sparsify}"
