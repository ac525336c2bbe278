"""Making the Sparsifiers of a TrainingManager, and checks of what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..axes.quantity import CALIBRATED
from ..gradual.gradual_pruning import GradualPruning
from ..gradual.gradual_sparsifier import GradualSparsifier, show_batches
from ..sparsifier.masking import parameters_of
from ..sparsifier.notices import notice_of_unstepped
from ..sparsifier.options import reads_passes
from ..sparsifier.sparsifier import Sparsifier
from ..support.registry import name_of
from ..support.warning import warn
from .parts import Part
from .quantize_part import Quantize


def gradual_of(
    pruning: GradualPruning, model: nn.Module, optimizer: Any, loss_func: Callable | None, example_input: Any
) -> GradualSparsifier:
    """Make the Sparsifier of a `Sparsify` part, and raise now what a later mask update would raise.

    Args:
        pruning: What is pruned.
        model: The model.
        optimizer: The optimizer that steps it.
        loss_func: A loss for the batches of `calibration=`, or None.
        example_input: A batch, for models that torch.fx cannot trace, or None.

    Raises:
        ValueError: The part does not fit the model, or its criterion needs data that are not given.
    """
    sparsifier = pruning.sparsifier(model, example_input)
    sparsifier.wait_for_frozen()
    collected, has_data = sparsifier.collected, pruning.calibration is not None
    collected.may_skip = not has_data
    means_are_short = collected.at(*CALIBRATED) or (collected.missing() and pruning.ramp.at(0.0))
    if not has_data and (sparsifier.runs_batches or means_are_short):
        by_criterion = means_are_short or reads_passes(collected.criterion)
        what = f"criterion {name_of(collected.criterion)}" if by_criterion else "compensate=True"
        raise ValueError(
            f"TrainingManager: {what} needs data before the first masks are made, "
            "which a loop does not show; pass calibration=, a list of batches, to Sparsify or beside the recipe, and "
            "loss_func= if it needs gradients"
        )
    show = partial(_show, sparsifier, pruning.calibration, loss_func)
    show(False)
    if not collected.missing():
        pruning.check(sparsifier)
    if notice := notice_of_unstepped(sparsifier.layers, parameters_of(optimizer)):
        warn(f"TrainingManager: {notice}; give them to the optimizer, or name the layers to prune in layers=")
    return GradualSparsifier(pruning, sparsifier, optimizer, show)


def check_parts(parts: Sequence[Any]) -> None:
    """Refuse what is no part of a training, and a training without parts."""
    for part in parts:
        if not isinstance(part, Part):
            raise TypeError(
                "TrainingManager: parts are Sparsify, Keep, Regularize, Distil, Freeze and Quantize, each an argument "
                f"of its own, not {type(part).__name__}; call recipe.manager(...) for a Recipe"
            )
    if sum(isinstance(part, Quantize) for part in parts) > 1:
        raise ValueError("TrainingManager: two Quantize parts would round twice; use one, with layers= or exclude=")
    if not parts:
        raise ValueError("TrainingManager: there is nothing to do; pass a part, such as Sparsify(0.9)")


def _show(sparsifier: Sparsifier, batches: Any, loss_func: Callable | None, anew: bool) -> None:
    """Collect what a criterion needs of data, unless the gradients of past steps are enough. anew: they are not."""
    short = sparsifier.means_are_short(anew)
    if batches is not None and (short or sparsifier.runs_batches):
        show_batches(sparsifier, batches, loss_func, short)


def check_steps(model: nn.Module, optimizer: Any) -> None:
    """Check that an optimizer steps a model, weight by weight.

    Args:
        model: The model, wrapped or not.
        optimizer: torch's optimizer, or a wrapper around one.

    Raises:
        TypeError: It is no optimizer, or one that calls a closure several times in a step.
        ValueError: It holds none of the model's parameters.
    """
    if not callable(getattr(optimizer, "step", None)) or not hasattr(optimizer, "param_groups"):
        raise TypeError(f"TrainingManager: optimizer must be an optimizer of torch, not {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "TrainingManager: LBFGS moves all weights along one vector, which masks cannot reach; use another optimizer"
        )
    held = {id(parameter) for parameter in parameters_of(optimizer)}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise ValueError(
            "TrainingManager: the optimizer holds no parameter of the model, so that nothing would be trained; make "
            "it of model.parameters(), after the model was moved or replaced"
        )
