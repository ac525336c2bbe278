"""Rewinding: checkpoints of training, and callbacks that continue training from one."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastcore.foundation import L
from torch import Tensor

from ..callbacks.base import TrainingCallback
from ..callbacks.learner import is_search
from ..model.parallel import unwrapped
from ..support.printable import LONGEST_MESSAGE, printable


@dataclass
class Checkpoint:
    """The state of the model and of the optimizer at a point in training.

    Args:
        model: The state_dict of the model, on the CPU.
        optimizer: The state_dict of the optimizer, on the CPU.
    """

    model: dict[str, Tensor]
    optimizer: Any

    @classmethod
    def of(cls, learn: Learner) -> Checkpoint:
        """The present state of a Learner, copied."""
        return cls(
            copy_to_device(unwrapped(learn.model).state_dict(), "cpu"), copy_to_device(learn.opt.state_dict(), "cpu")
        )

    def restore(self, learn: Learner) -> None:
        """Load the state into a Learner with the same model and optimizer."""
        unwrapped(learn.model).load_state_dict(self.model)
        _load_optimizer(learn.opt, self.optimizer, next(unwrapped(learn.model).parameters()).device)


def _load_optimizer(optimizer: Any, saved: Any, device: torch.device) -> None:
    """Load a state that is on the CPU into an optimizer of fastai, or one of torch in a wrapper."""
    # torch's optimizers move the state that they load to the device of the parameters; fastai's do not.
    state = copy_to_device(saved, "cpu" if isinstance(optimizer, OptimWrapper) else device)
    if "hypers" in state:
        state["hypers"] = L(state["hypers"])
    optimizer.load_state_dict(state)


class SkipBatches(TrainingCallback):
    """Skip the first batches of training, and pause the other callbacks in epochs that are skipped as a whole.

    Args:
        batches: How many batches to skip, counted over all fits.
    """

    # Before the callbacks that prepare an epoch or a batch, such as autocast in MixedPrecision.
    order, run_valid = -20, False

    def __init__(self, batches: int):
        super().__init__()
        self.left = batches
        self.paused: list[Callback] = []

    def before_epoch(self):
        "Skip the epoch if all its batches are to be skipped"
        self.resume()
        batches = len(self.learn.dls.train)
        if 0 < batches <= self.left and not is_search(self.learn):
            self.left -= batches
            self.paused = [each for each in self.learn.cbs if each is not self and each.run]
            for callback in self.paused:  # trackers and loggers would take it for an epoch of training
                if isinstance(callback, ProgressCallback):
                    callback("before_epoch")  # a bar has to be begun at its first epoch
                callback.run = False
            raise CancelEpochException

    def before_batch(self):
        "Skip the batch, while there are batches to skip"
        if self.left and not is_search(self.learn):
            self.left -= 1
            self.learn.yb = ()  # without targets, the Recorder takes no loss of the batch
            raise CancelBatchException

    def after_fit(self):
        "Let the paused callbacks see the end of the fit"
        self.resume()

    def resume(self) -> None:
        """Let the paused callbacks run again."""
        for callback in self.paused:
            callback.run = True
        self.paused = []


class CallBeforeBatch(TrainingCallback):
    """Call functions before certain batches of training.

    Args:
        functions: Number of the batch -> function without arguments. Batches are counted from 0 over all fits, without
            those that SkipBatches skips.
    """

    order, run_valid = 70, False  # after the callbacks that prepare a batch, such as ParamScheduler

    def __init__(self, functions: dict[int, Callable[[], None]]):
        super().__init__()
        self.waiting, self.done = dict(functions), 0

    def before_batch(self):
        "Call the function of this batch, if there is one"
        if not is_search(self.learn):
            if self.done in self.waiting:
                self.waiting.pop(self.done)()
            self.done += 1


def copy_to_device(value: Any, device: Any) -> Any:
    """Copy a state_dict, with its tensors on a device and all containers and numbers as types of torch and Python."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {name: copy_to_device(each, device) for name, each in value.items()}
    if isinstance(value, (list, L)):
        return [copy_to_device(each, device) for each in value]
    return value.item() if isinstance(value, np.generic) else deepcopy(value)


def random_states(learn: Learner) -> dict[str, Any]:
    """The states of all random generators that training uses: Python, NumPy, torch, CUDA and the data loader."""
    loader = getattr(learn.dls.train, "rng", None)
    kind, keys, *rest = tuple(np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "loader": loader.getstate() if isinstance(loader, random.Random) else None,
    }


def check_optimizer(learn: Learner, saved: Any, where: str) -> None:
    """Check what should be the state of an optimizer, by a step of a new optimizer with it on a copy of the model.

    Args:
        learn: The Learner. Its own optimizer and model stay as they are.
        saved: The state_dict, of values that `check_plain` has passed.
        where: Its name, for messages.

    Raises:
        ValueError: It is something else, or has moments of other shapes than the parameters, or values that are not
            finite.
    """
    if not isinstance(saved, Mapping) or not {"state"} < saved.keys() or not saved.keys() & {"hypers", "param_groups"}:
        raise ValueError(f"{where} is not the state of an optimizer; it lacks state, and hypers or param_groups")
    if isinstance(learn.opt_func, OptimWrapper):
        return  # an optimizer that is already made; another one of its kind cannot be had
    model = deepcopy(unwrapped(learn.model))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    trial = learn.opt_func(learn.splitter(model), lr=learn.lr)
    parameters = [parameter for group in trial.param_lists for parameter in group]
    try:
        if "hypers" in saved and [sorted(group) for group in saved["hypers"]] != [
            sorted(each) for each in trial.hypers
        ]:
            raise ValueError("its options have other names")
        of_all = saved["state"]
        states = of_all if "hypers" in saved else [of_all.get(number, {}) for number in range(len(parameters))]
        for number, (parameter, moments) in enumerate(zip(parameters, states, strict=True)):
            for name, value in moments.items():
                if isinstance(value, Tensor):
                    _check_moment(value, parameter, f"{name} of parameter {number}")
        for group in saved["hypers"] if "hypers" in saved else saved["param_groups"]:
            for name, value in group.items():
                if isinstance(value, float) and not isfinite(value):
                    raise ValueError(f"{name} is {value}")
        _load_optimizer(trial, saved, next(model.parameters()).device)
        trial.step()
    except Exception as error:  # the optimizers raise whatever comes up
        why = printable(str(error), LONGEST_MESSAGE)
        raise ValueError(f"{where} is not the state of this optimizer ({why})") from None


def _check_moment(value: Tensor, parameter: Tensor, name: str) -> None:
    # Adafactor keeps means over an axis, and some optimizers a single number.
    axes = zip(value.shape, parameter.shape, strict=False)
    fits = value.dim() == parameter.dim() and all(size in (1, length) for size, length in axes)
    if value.numel() != 1 and not fits:
        raise ValueError(f"{name} has the shape {tuple(value.shape)}, and the parameter {tuple(parameter.shape)}")
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise ValueError(f"{name} has values that are inf or NaN")


def check_random_states(states: Any) -> None:
    """Check what should be states of `random_states`, by setting generators of no one to them.

    Args:
        states: The states.

    Raises:
        ValueError: They are something else. The message names the generator.
    """
    names = {"python", "numpy", "torch", "cuda", "loader"}
    if not isinstance(states, Mapping) or not names <= states.keys():
        raise ValueError(f"run.random lacks one of {', '.join(sorted(names))}")
    name = "python"
    try:
        random.Random().setstate(states["python"])
        name = "numpy"
        _, keys, position, *_ = states["numpy"]
        if len(keys) != 624 or not 0 <= position <= 624:  # numpy would read memory that is not its own
            raise ValueError(f"it has {len(keys)} numbers, and the position {position}")
        np.random.RandomState().set_state(tuple(states["numpy"]))
        name = "torch"
        torch.Generator().set_state(states["torch"])
        name = "cuda"
        if not all(isinstance(each, Tensor) and each.dtype == torch.uint8 for each in states["cuda"]):
            raise ValueError("it is no list of states")
        name = "loader"
        if states["loader"] is not None:
            random.Random().setstate(states["loader"])
    except Exception as error:  # the generators raise whatever comes up
        raise ValueError(f"run.random[{name!r}] is not the state of a generator ({error})") from None


def restore_random_states(learn: Learner, states: Mapping[str, Any]) -> None:
    """Set the random generators to states that `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
    if states["loader"] is not None and isinstance(getattr(learn.dls.train, "rng", None), random.Random):
        learn.dls.train.rng.setstate(states["loader"])
