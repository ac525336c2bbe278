"""Sparse training in a loop with accelerate: a manager that is saved and loaded with the states of an Accelerator.

model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
manager = manager_of(accelerator, model, optimizer, 0.9, epochs=5, steps_per_epoch=len(loader))
for images, labels in loader:
    with accelerator.accumulate(model):
        output = model(images)
        accelerator.backward(manager.loss(loss_func(output, labels), output, images))
        if accelerator.sync_gradients:
            manager.before_step()
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        manager.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from .given import Given
from .scaled import AcceleratedManager


class AccumulatingManager(AcceleratedManager):
    """A TrainingManager that does nothing in batches whose gradients are only added up: see `TrainingManager`."""

    def step(self, scaler: Any = None) -> Any:
        """As of TrainingManager, in the batches in which the optimizer steps.

        Args:
            scaler: Must be None: the optimizer has the GradScaler itself.

        Raises:
            TypeError: A GradScaler is given.
        """
        if scaler is not None:
            raise TypeError("step: accelerate's optimizer calls its GradScaler itself; call manager.step() without one")
        self._check_open("step")
        return super().step() if self.optimizer.gradient_state.sync_gradients else None


def manager_of(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    sparsity: Any,
    *arguments: Any,
    epochs: int | None = None,
    steps_per_epoch: int,
    teacher: nn.Module | None = None,
    loss_func: Any = None,
    example_input: Any = None,
    **options: Any,
) -> AccumulatingManager:
    """Make the manager of a training, after `accelerator.prepare`.

    `accelerator.save_state` saves it and `accelerator.load_state` loads it, as it is registered for checkpointing.

    Args:
        accelerator: The Accelerator.
        model: The model that it has prepared.
        optimizer: The optimizer that it has prepared.
        sparsity: A Recipe, a part of a TrainingManager or a list of parts, or the sparsity.
        *arguments: With a sparsity, the further arguments of sparsifai's SparsifyCallback.
        epochs: Number of epochs, unless a recipe says it. Default None.
        steps_per_epoch: Number of steps of the optimizer in an epoch: with gradient accumulation, batches divided by
            the number of batches of a step, rounded up.
        teacher: A trained model for a recipe with a distil step. Default None.
        loss_func: A loss for criteria that need gradients of the batches of `calibration=`. Default None.
        example_input: A batch, for models that torch.fx cannot trace. Default None.
        **options: With a sparsity, the further arguments of sparsifai's SparsifyCallback by name; with a recipe,
            `calibration`, the batches for its criteria.

    Returns:
        The manager. Call its `step` instead of that of the optimizer, in every batch.

    Raises:
        TypeError: An argument has the wrong type, or the optimizer was not prepared.
        ValueError: As TrainingManager, or the recipe has another number of epochs.

    Example:
        >>> from sparsifai.integrations.accelerate import manager_of
        >>> model, optimizer, batches = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1), loader)
        >>> manager = manager_of(accelerator, model, optimizer, 0.75, epochs=1, steps_per_epoch=len(batches))
        >>> for inputs, targets in batches:
        ...     accelerator.backward(nn.functional.cross_entropy(model(inputs), targets))
        ...     manager.step()
        ...     optimizer.zero_grad()
        >>> manager.sparsity
        0.75
    """
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise TypeError(
            f"manager_of: optimizer must be one that accelerator.prepare has returned, not {type(optimizer).__name__}"
        )
    given = Given.of("manager_of", sparsity, arguments, options, teacher, loss_func, example_input)
    given.check_epochs("manager_of", epochs)
    if epochs is None and given.epochs is None:
        raise ValueError("manager_of: pass epochs=, the number of epochs of the training")
    number = given.epochs if epochs is None else epochs
    manager = given.manager(AccumulatingManager, model, optimizer, epochs=number, steps_per_epoch=steps_per_epoch)
    accelerator.register_for_checkpointing(manager)
    return manager
