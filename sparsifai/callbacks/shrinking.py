"""`learn.shrink()`: a Learner goes on with the smaller model that `shrink` makes of its model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastcore.basics import patch_to
from torch import Tensor
from torch.utils._pytree import tree_map

from ..export.shrink import shrunk, warn_of_zeros_left
from ..export.shrinkage_table import Shrinkage
from ..support.arguments import checks_arguments
from ..support.table import percent
from .base import TrainingCallback
from .keep import KeepSparsity
from .learner import bars_of, first_batch
from .reporting import sparsity_not_kept


@patch_to(Learner)
@checks_arguments(name="learn.shrink")
def shrink(
    self: Learner,
    example_input: Any = None,  # A batch that the model accepts, a tuple of inputs, or a dictionary of named ones
) -> Shrinkage:
    """Replace the model by the smaller one that `sparsifai.shrink` makes of it, and make a new optimizer for it.

    The optimizer of the Learner holds the parameters of the larger model, so it would train nothing. The new one is
    made by the `opt_func` and the `splitter` of the Learner; groups that were frozen stay frozen. KeepSparsity goes on
    with the zeros of the smaller model. If the model was in a wrapper (compiled, data parallel), the smaller model is
    not.

    Args:
        example_input: A batch that the model accepts, a tuple of several positional inputs, or a dictionary of named
            ones. Default: the inputs of two examples of the training data.

    Returns:
        The table of what was removed from each layer, with a line on what later fits do. A UserWarning says how many
        zero filters could not be removed.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: As `sparsifai.shrink`; or there is no data and no example, or `opt_func` is an optimizer that was
            already made. Nothing has changed then.

    Example:
        >>> learn = make_learner()
        >>> _ = learn.sparsify(0.5, 2, granularity='filter', coupled=True)
        >>> table = learn.shrink()
        >>> table.parameters, table.parameters_left
        (354, 178)
        >>> learn.fit_one_cycle(1)  # trains the smaller model
    """
    if isinstance(self.opt_func, OptimWrapper):
        raise ValueError(
            f"learn.shrink: opt_func is an {type(self.opt_func).__name__} that was already made for the parameters of "
            "the larger model; give the Learner a function that makes one, such as partial(OptimWrapper, "
            "opt=torch.optim.AdamW)"
        )
    example = _first_two(self) if example_input is None else example_input
    with bars_of(self):
        model, table = shrunk(self.model, example)
    frozen = getattr(self.opt, "frozen_idx", 0)
    before = self.model, self.opt
    try:
        self.model = model
        self.create_opt()
        if frozen:
            self.opt.freeze_to(frozen)
        for callback in self.cbs:
            if isinstance(callback, TrainingCallback):
                callback._model_replaced(example)
    except BaseException:  # a splitter, or a function that makes an optimizer, can raise anything
        self.model, self.opt = before
        raise
    warn_of_zeros_left(table)
    return replace(table, what_next=_what_next(self, table.parameters_left < table.parameters))


def _what_next(learn: Learner, is_smaller: bool) -> str:
    """What later fits of a Learner do with its model, which is smaller if anything was removed."""
    frozen, groups = getattr(learn.opt, "frozen_idx", 0), len(learn.opt.param_lists)
    held = f"; {frozen} of {groups} parameter groups are frozen, as before" if frozen else ""
    text = f"later fits {'train the smaller model, with' if is_smaller else 'have'} a new optimizer{held}"
    if any(each.masks for each in learn._grab_cbs(KeepSparsity)):
        kept = learn.sparsity_report().selected.sparsity
        return f"{text}; KeepSparsity keeps the {percent(kept)} of zeros that it has"
    if sparsity := sparsity_not_kept(learn):
        return f"{text}; nothing keeps the {percent(sparsity)} of zeros that it has: learn.add_cb(KeepSparsity()) does"
    return text


def _first_two(learn: Learner) -> Any:
    """The inputs of the first two examples of the training data, on the device of the model."""
    device = next((parameter.device for parameter in learn.model.parameters()), None)

    def part(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value[:2] if value.dim() else value).as_subclass(Tensor).to(device)

    inputs = tuple(tree_map(part, first_batch(learn)[:-1]))
    return inputs[0] if len(inputs) == 1 else inputs
