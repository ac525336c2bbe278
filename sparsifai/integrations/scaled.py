"""Gradients under a GradScaler, in the loops of accelerate and of transformers' Trainer, and the end of a backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..loops.manager import TrainingManager
from ..support.at_end import AtEnd


class AcceleratedManager(TrainingManager):
    """A TrainingManager whose optimizer is one that accelerate has prepared: see `TrainingManager`."""

    def before_step(self) -> None:
        """As of TrainingManager; gradients that a GradScaler has scaled are unscaled in the meantime."""
        if not self._is_prepared:
            with unscaled(self.optimizer):
                super().before_step()


@contextmanager
def unscaled(optimizer: Any) -> Iterator[None]:
    """Let gradients have their own size in a `with` block, if a GradScaler has scaled them and not unscaled yet.

    accelerate unscales them when they are clipped, and may do it once a step. A scale is a power of two, so nothing is
    lost.

    Args:
        optimizer: What accelerate has made of an optimizer.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled() or _is_unscaled(scaler, optimizer.optimizer):
        yield
        return
    scale, groups = scaler.get_scale(), optimizer.param_groups
    gradients = [each.grad for group in groups for each in group["params"] if each.grad is not None]
    divided: list[Tensor] = []

    def undo() -> None:
        while divided:
            divided.pop().mul_(scale)

    at_end = AtEnd(undo)
    with at_end, at_end:
        for gradient in gradients:
            gradient.div_(scale)
            divided.append(gradient)
        yield


def _is_unscaled(scaler: Any, optimizer: Any) -> bool:
    states = scaler._per_optimizer_states
    return id(optimizer) in states and states[id(optimizer)]["stage"].name != "READY"


def call_after_backward(output: Any, function: Callable[[], Any]) -> None:
    """Call a function at the end of the backward pass of an output, when all gradients are there.

    With DistributedDataParallel they are the means of all processes then.

    Args:
        output: What a model returned: tensors, in containers or alone.
        function: The function.
    """
    queued: list[bool] = []

    def queue(_: Tensor) -> None:
        if not queued:
            queued.append(True)
            engine = torch.autograd.Variable._execution_engine
            # Called back at the end, it gets in line behind what DistributedDataParallel has queued meanwhile.
            engine.queue_callback(lambda: engine.queue_callback(function))

    for tensor in tree_leaves(dict(output) if isinstance(output, dict) else output):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(queue)


def trained(model: nn.Module) -> bool:
    """Whether a forward is one of training: in training mode, and with gradients."""
    return model.training and torch.is_grad_enabled()
