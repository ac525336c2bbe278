"""`learn.sparsify()`: train a Learner and prune its model meanwhile, in one call."""

from __future__ import annotations

from typing import Any

from fastai.callback.schedule import fit_one_cycle as fit_one_cycle  # adds `learn.fit_one_cycle`
from fastai.learner import Learner
from fastcore.basics import patch_to
from fastcore.foundation import L

from ..support.arguments import checks_arguments
from ..support.checks import check_count
from ..support.printable import quoted
from .sparsify import SparsifyCallback


@patch_to(Learner)
@checks_arguments(of=SparsifyCallback, name="learn.sparsify")
def sparsify(
    self: Learner,
    sparsity: Any,  # Fraction of the weights to be zero, 0.5 for 50 %; or {pattern: fraction} by layer
    n_epoch: int,  # Number of epochs
    lr_max: Any = None,  # Highest learning rate, or a slice of them; by default that of the Learner
    *,
    div: float = 25.0,  # lr_max / the learning rate at the start
    div_final: float = 1e5,  # lr_max / the learning rate at the end
    pct_start: float = 0.25,  # Fraction of the fit in which the learning rate rises
    wd: float | None = None,  # Weight decay; by default that of the Learner
    moms: Any = None,  # Momentums at the start, at the highest learning rate and at the end
    cbs: Any = None,  # More callbacks for this fit
    reset_opt: bool = False,  # Whether to make a new optimizer
    start_epoch: int = 0,  # The epoch at which a fit is resumed
    **options: Any,
) -> SparsifyCallback:
    """Train by `fit_one_cycle` with a SparsifyCallback: `sparsity` of the weights are zero at the end.

    KeepSparsity stays on the Learner and keeps the zeros in later fits. For another way to train, pass
    `cbs=SparsifyCallback(...)` to any fit.

    Args:
        sparsity: The target sparsity: fraction of the weights that are zero at the end, 0.5 for 50 %; or {pattern:
            fraction} by layer.
        n_epoch: Number of epochs.
        lr_max: Highest learning rate, or a slice of them by parameter group. Default: that of the Learner.
        div: `lr_max` divided by this is the learning rate at the start. Default 25.
        div_final: `lr_max` divided by this is the learning rate at the end. Default 1e5.
        pct_start: Fraction of the fit in which the learning rate rises. Default 0.25.
        wd: Weight decay. Default: that of the Learner.
        moms: Momentums at the start, at the highest learning rate and at the end. Default: those of the Learner.
        cbs: More callbacks for this fit. Default none.
        reset_opt: Whether to make a new optimizer. Default False.
        start_epoch: The epoch at which a fit is resumed. Default 0.
        **options: How, where, what and when weights are pruned: `granularity`, `context`, `criteria`, `schedule`,
            `layers` and the other arguments of SparsifyCallback.

    Returns:
        The SparsifyCallback. Its `sparsifier` has the masks, and `sparsifier.report()` the zeros of each layer.

    Raises:
        TypeError: An argument is unknown or has the wrong type.
        ValueError: An argument is out of range, or arguments exclude each other; or layers are frozen. Nothing has
            changed then.

    Example:
        >>> learn = make_learner()
        >>> callback = learn.sparsify(0.75, 2, 1e-3)
        >>> callback.sparsifier.sparsity
        0.75
    """
    check_count("learn.sparsify: n_epoch", n_epoch)
    if isinstance(lr_max, str):  # an answer to a question, such as 'filter', that was not passed by name
        raise TypeError(
            f"learn.sparsify: lr_max is the highest learning rate, a number or a slice, not {quoted(lr_max)}; pass "
            "how, where and what to prune by name: granularity='filter'"
        )
    callback = SparsifyCallback(sparsity, **options)
    if getattr(self.opt, "frozen_idx", 0) > 0:
        raise ValueError(
            "learn.sparsify: some layers are frozen, and a fit with frozen layers prunes nothing. Call "
            "learn.unfreeze() first; or learn.fine_tune(epochs, cbs=SparsifyCallback(...)), which prunes in its second "
            "part"
        )
    self.fit_one_cycle(
        n_epoch, lr_max, div=div, div_final=div_final, pct_start=pct_start, wd=wd, moms=moms, cbs=[callback, *L(cbs)],
        reset_opt=reset_opt, start_epoch=start_epoch,
    )  # fmt: skip
    return callback
