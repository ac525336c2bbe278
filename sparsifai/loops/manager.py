"""TrainingManager: sparse training in a loop of one's own, around each step of the optimizer.

loss = manager.loss(loss_func(output, targets), output, inputs)   # adds penalties and a teacher, if there are any
loss.backward()
manager.before_step()       # gradients are collected and masked: clip them now, if at all
manager.step()              # the optimizer's step, then the masks of where the schedule is
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..model.norms import check_fused_norms
from ..model.parallel import unwrapped
from ..model.zeros import Count
from ..sparsifier.notices import notices_of_starved
from ..sparsifier.options import highest
from ..sparsifier.report import Report
from ..sparsifier.sparsifier import Sparsifier
from ..support.at_end import AtEnd
from ..support.checks import check_count
from ..support.table import percent
from ..support.warning import warn
from .kept_zeros import REFRESH, KeptZeros
from .making import check_disjoint, check_parts, check_steps, gradual_of
from .parts import Acting, Distil, Keep, Part, Sparsify


class TrainingManager:
    """Trains a model to be sparse in a loop of one's own. `Recipe.manager` makes one of a recipe.

    When it is made, the model is pruned to where the schedule begins. In every step, gradients of pruned weights are
    zero before the optimizer uses them, and pruned weights are zero after it. Nothing is added to the model: its
    parameters stay the same objects, and its `state_dict` has the same names. After the last step the sparsity is
    exactly the one that was asked for. Zeros that the model has at the start are kept.

    Attributes:
        model: The model.
        optimizer: The optimizer.
        epochs: Number of epochs of the training.
        steps_per_epoch: Number of steps of the optimizer in an epoch.
        steps_done: Number of steps that are done.
        sparsifiers: The Sparsifiers of the model, one for each `Sparsify` part, in their order.

    Args:
        model: Any torch.nn.Module. With DistributedDataParallel, the wrapped model: all processes get the same masks.
        optimizer: torch's optimizer of the model's parameters, or a wrapper around one.
        *parts: What the training does: `Sparsify`, `Keep`, `Regularize`, `Distil`, `Freeze`. Several `Sparsify` parts
            prune layers of their own each: pass `layers=`.
        epochs: Number of epochs of the training.
        steps_per_epoch: Number of steps of the optimizer in an epoch. With gradient accumulation, fewer than batches.
        loss_func: The loss of the labels, a function of (output, target): for the batches of `calibration=`, as of
            `Sparsifier.calibrate`, and to check that a teacher's outputs can be compared. Default None.
        example_input: A batch, for models that torch.fx cannot trace, in the form that Sparsifier takes. Default None.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There are no parts, they do not fit the model, two of them prune the same layer, the criterion needs
            data that are not given, or the optimizer holds no parameter of the model. Nothing has changed then.

    Example:
        >>> import torch
        >>> from torch import nn
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

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *parts: Part,
        epochs: int,
        steps_per_epoch: int,
        loss_func: Callable | None = None,
        example_input: Any = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"TrainingManager: model must be a torch.nn.Module, not {type(model).__name__}")
        self.epochs = check_count("TrainingManager: epochs", epochs)
        self.steps_per_epoch = check_count("TrainingManager: steps_per_epoch", steps_per_epoch)
        check_parts(parts)
        check_steps(model, optimizer)
        check_fused_norms(model)
        self.model, self.optimizer, self.steps_done = model, optimizer, 0
        self._is_prepared = self._has_loss = self._is_closed = self._has_begun = False
        prunings = [part.pruning for part in parts if isinstance(part, Sparsify)]
        self._gradual = [gradual_of(pruning, model, optimizer, loss_func, example_input) for pruning in prunings]
        check_disjoint(self.sparsifiers)
        # The loss of the labels has a smaller share beside a teacher, a penalty has not.
        ordered = sorted(parts, key=lambda part: not isinstance(part, Distil))
        acting = (part.acting(model, optimizer, loss_func, example_input) for part in ordered)
        self._acting: list[Acting] = [each for each in acting if each is not None]
        self._zeros = KeptZeros(model, optimizer, self._gradual)
        if any(isinstance(part, Keep) for part in parts) or any(highest(each.ramp.sparsity) for each in prunings):
            self._zeros.recover(example_input)
        for each in self._gradual:
            each.go_to(0.0)
        self._zeros.apply()
        self._prepare_forward()

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        return self.epochs * self.steps_per_epoch

    @property
    def sparsifiers(self) -> list[Sparsifier]:
        """The Sparsifiers of the model, one for each `Sparsify` part."""
        return [each.sparsifier for each in self._gradual]

    @property
    def is_done(self) -> bool:
        """Whether all steps are done."""
        return self.steps_done >= self.steps

    @property
    def has_reached_target(self) -> bool:
        """Whether the masks stay as they are until the end. A best model should be looked for from here on only."""
        return all(each.is_final(self.steps_done, self.steps) for each in self._gradual)

    # --- The loop -----------------------------------------------------------------------------------------------

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
        self._has_loss = True
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
        self.before_step()
        at_end = AtEnd(self._zeros.apply)
        with at_end, at_end, ExitStack() as stack:
            for each in self._gradual:
                stack.enter_context(each.sparsifier.dense_weights())
            yield
        self._after_step()

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
            if self.steps_done > self.steps - self.steps_per_epoch or self.is_done:
                for each in self._gradual:
                    each.go_to(1.0)
                self._zeros.apply()
                self._zeros.mask_moments()
            elif not self.has_reached_target:
                warn(
                    f"TrainingManager.finish: the training has ended after {self.steps_done} of {self.steps} steps, at "
                    f"a sparsity of {percent(self.sparsity)}, before its schedule did, or its masks settled"
                )
            self._close()

    def _after_step(self) -> None:
        steps = self.steps_done + 1
        for acting in self._acting:
            acting.after_step(self.steps_done / self.steps)
        for each in self._gradual:
            each.after_step(steps, self.steps)
        self._zeros.apply()
        if steps % REFRESH == 0:
            self._zeros.mask_moments()
        self.steps_done, self._is_prepared, self._has_loss = steps, False, False
        if self.is_done:
            self._close()
        else:
            self._prepare_forward()

    def _prepare_forward(self) -> None:
        for each in self._acting:
            each.before_forward(self.steps_done / self.steps)

    def _begin(self) -> None:
        """Warn at the first step: a state that is loaded before it can change what there is to say."""
        if not self._has_begun:
            self._has_begun = True
            self._zeros.warn_of_fixed()
            for each in self._gradual:
                each.warn_of_higher_sparsity()

    def _close(self) -> None:
        for each in self._acting:
            each.end()
        if not self._is_closed:
            self._is_closed = True
            for sparsifier in self.sparsifiers:
                for notice in notices_of_starved(sparsifier.layers, sparsifier.ranking.options.context):
                    warn(notice)

    def _check_open(self, operation: str) -> None:
        if self._is_closed:
            why = f"all {self.steps} steps are done" if self.is_done else "the training was finished"
            raise RuntimeError(
                f"TrainingManager.{operation}: {why} ({self.epochs} epochs of {self.steps_per_epoch} steps); make the "
                "manager with more epochs, or with the number of steps that an epoch has, or make a new one"
            )

    # --- What is measured, and the state ------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask of everything that is kept at zero, False where it is."""
        return dict(self._zeros.masks)

    @property
    def sparsity(self) -> float:
        """Measured sparsity: zeros over weights of the layers that are pruned or kept sparse."""
        layers = [each for one in self.sparsifiers for each in one.layers.values() if each.is_selected]
        if not layers:
            return self.report().selected.sparsity
        return Count.of(*(layer.parameter for layer in layers)).sparsity

    def report(self) -> Report:
        """Count the zeros of each layer and of the whole model.

        Returns:
            A table; its `plot` draws it.
        """
        if len(self._gradual) == 1:
            return self.sparsifiers[0].report()
        return Report.of(unwrapped(self.model), self.masks or None)

    def state_dict(self) -> dict[str, Any]:
        """Collect what another manager of the same model and parts needs to resume exactly.

        Save it beside the states of the model and the optimizer, after a step.

        Returns:
            The position, masks, dense weights, collected quantities and random states; for torch.save.
        """
        return {
            "steps_done": self.steps_done,
            "steps": self.steps,
            "sparsifiers": [each.state() for each in self._gradual],
            "parts": [each.state() for each in self._acting],
            "others": {name: mask.clone() for name, mask in self._zeros.others.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned. Load the states of the model and the optimizer before.

        Args:
            state: What `state_dict` returned, of a manager with the same parts, epochs and steps.

        Raises:
            ValueError: It is no such state, or it is that of other parts or another number of steps.
        """
        if not isinstance(state, Mapping) or state.keys() != self.state_dict().keys():
            raise ValueError("load_state_dict: give what TrainingManager.state_dict() returned")
        own = (self.steps, len(self._gradual), len(self._acting))
        its = (state["steps"], len(state["sparsifiers"]), len(state["parts"]))
        if own != its:
            raise ValueError(
                f"load_state_dict: the state is of {its[0]} steps, {its[1]} Sparsify and {its[2]} other parts, and "
                f"this manager has {own[0]}, {own[1]} and {own[2]}; make it with the same arguments"
            )
        check_count("load_state_dict: steps_done + 1", state["steps_done"] + 1, self.steps + 1)
        for each, of_each in zip(self._gradual, state["sparsifiers"], strict=True):
            each.load(of_each)
        for acting, of_part in zip(self._acting, state["parts"], strict=True):
            acting.load(of_part)
        self._zeros.keep(dict(state["others"]))
        self._zeros.apply()
        self.steps_done = state["steps_done"]
        self._is_prepared, self._has_loss, self._is_closed = False, False, False
        self._has_begun = True  # what there is to warn of was said when the training began
        if self.is_done:
            self._close()
        else:
            self._prepare_forward()

    def __repr__(self) -> str:
        return f"TrainingManager(step {self.steps_done} of {self.steps}, {len(self._gradual)} Sparsifiers)"
