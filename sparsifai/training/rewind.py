"""Points in training that can be gone back to, and the callbacks that take training up from one."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastcore.foundation import L
from torch import Tensor

from ..callbacks.base import TrainingCallback
from ..callbacks.learner import is_search
from ..model.parallel import unwrapped


class Skip(TrainingCallback):
    "Skip so many batches of training, of all fits together; other callbacks see nothing of whole epochs"

    order = -20  # before all that prepares an epoch or a batch, such as the autocast of MixedPrecision

    def __init__(self, batches: int):
        super().__init__()
        self.left = batches
        self.paused: list[Callback] = []

    def before_epoch(self):
        "Skip a whole epoch, if there are as many batches to skip"
        self.resume()
        batches = len(self.learn.dls.train)
        if 0 < batches <= self.left and not is_search(self.learn):
            self.left -= batches
            self.paused = [each for each in self.learn.cbs if each is not self and each.run]
            for callback in self.paused:  # which would judge and log an epoch that there was not
                callback.run = False
            raise CancelEpochException

    def before_batch(self):
        "Skip a batch"
        if self.left and self.learn.training and not is_search(self.learn):
            self.left -= 1
            self.learn.yb = ()  # so that the Recorder takes no loss of it
            raise CancelBatchException

    def after_fit(self):
        "Have the others end"
        self.resume()

    def resume(self) -> None:
        """Have the other callbacks see what happens again."""
        for callback in self.paused:
            callback.run = True
        self.paused = []


class AtBatch(TrainingCallback):
    "Call functions before batches of training, by how many are over that were not skipped, of all fits together"

    order = 70  # after all that prepares a batch, such as ParamScheduler

    def __init__(self, at: dict[int, Callable[[], None]]):
        super().__init__()
        self.at, self.over = dict(at), 0

    def before_batch(self):
        "Call what is to be called before this batch"
        if self.learn.training and not is_search(self.learn):
            if self.over in self.at:
                self.at.pop(self.over)()
            self.over += 1


@dataclass
class Moment:
    """A point in training: the state of the model and of the optimizer."""

    model: dict[str, Tensor]
    optimizer: Any

    @classmethod
    def of(cls, learn: Learner) -> Moment:
        """Now."""
        return cls(
            copy_to_device(unwrapped(learn.model).state_dict(), "cpu"), copy_to_device(learn.opt.state_dict(), "cpu")
        )

    def put(self, learn: Learner) -> None:
        """Go back to it."""
        unwrapped(learn.model).load_state_dict(self.model)
        # torch's optimizers take their state to where the parameters are; fastai's take it as it is.
        device = "cpu" if isinstance(learn.opt, OptimWrapper) else next(unwrapped(learn.model).parameters()).device
        state = copy_to_device(self.optimizer, device)
        if "hypers" in state:
            state["hypers"] = L(state["hypers"])
        learn.opt.load_state_dict(state)


def copy_to_device(value: Any, device: Any) -> Any:
    """A copy of nested state, tensors on a device, and nothing but torch's and Python's own types."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {name: copy_to_device(each, device) for name, each in value.items()}
    if isinstance(value, (list, L)):
        return [copy_to_device(each, device) for each in value]
    return value.item() if isinstance(value, np.generic) else deepcopy(value)


def random_states(learn: Learner) -> dict[str, Any]:
    """Of all generators that training draws from."""
    loader = getattr(learn.dls.train, "rng", None)
    kind, keys, *rest = tuple(np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "loader": loader.getstate() if isinstance(loader, random.Random) else None,
    }


def restore_random(learn: Learner, states: Mapping[str, Any]) -> None:
    """Set the generators to what `random_states` gave."""
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
    if states["loader"] is not None and isinstance(getattr(learn.dls.train, "rng", None), random.Random):
        learn.dls.train.rng.setstate(states["loader"])
