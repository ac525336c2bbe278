"""lottery_ticket: iterative magnitude pruning with rewinding, and control nets to compare the tickets with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastai.learner import Learner
from torch import nn

from ..callbacks.learner import bars_of
from ..sparsifier.options import check_sparsity
from ..sparsifier.sparsifier import Sparsifier
from ..support.arguments import checks_arguments
from ..support.checks import check_count, check_seed
from ..support.progress import progress
from .lottery_run import LotteryRun
from .saved_run import load_run
from .ticket import LotteryTickets


@checks_arguments(of=Sparsifier)
def lottery_ticket(
    learn: Learner,  # Trained in every round; ends with the last ticket, trained, and keeps its zeros
    sparsity: Any,  # Target sparsity of the last ticket: a fraction, or {pattern: fraction} by layer
    rounds: int = 5,  # Rounds of pruning; each prunes the same share of the remaining weights
    fit: int | Callable[[Learner], Any] = 1,  # How to train: a function of the Learner, or epochs of learn.fit
    rewind_to: float = 0,  # Epoch to rewind to; 0.5 is the middle of the first epoch
    *,
    granularity: Any = "weight",  # As for Sparsifier
    context: Any = "global",  # As for Sparsifier
    criteria: Any = "large_final",  # As for Sparsifier
    controls: Sequence[str] = (),  # Nets to train beside each ticket: 'reinitialized', 'shuffled'
    controls_every: int = 1,  # Rounds from one training of the controls to the next; the last round always has one
    reinitialize: Callable[[nn.Module], Any] | None = None,  # Initializes a model for the control 'reinitialized'
    calibration: Iterable | None = None,  # Batches for criteria of data; by default the first batch of training data
    seed: int = 0,  # Seed of the controls and of random criteria
    path: Any = None,  # File that is written after each round; a run that was interrupted resumes from it
    **options: Any,  # Other arguments of Sparsifier: layers, exclude, pool, ...
) -> LotteryTickets:
    """Find lottery tickets: train, prune a share of the remaining weights, rewind, and repeat.

    After round r of n the sparsity is s_r = 1 - (1 - s)^(r / n). Rewinding restores the weights, buffers and optimizer
    of an early point in training. The learning rate continues from that point, too. If the run is interrupted, the
    Learner keeps its present state; call again with the same `path` to resume.

    Controls show whether the mask or the initial weights matter. They have as many remaining weights in each layer as
    the ticket: 'reinitialized' has the same mask and other initial weights, and is trained from the beginning;
    'shuffled' has the same weights and a shuffled mask.

    Source: Frankle and Carbin, 2019 (arXiv:1803.03635); Frankle et al., 2019 (arXiv:1903.01611), for rewinding.

    Args:
        learn: The Learner, with training and validation data. It is trained in every round. It ends with the last
            ticket, trained, and a KeepSparsity callback that keeps its zeros in later fits.
        sparsity: Target sparsity of the last ticket: a fraction from 0 to 1, or a dictionary {pattern: fraction}.
        rounds: Number of rounds of pruning, at least 1. Default 5.
        fit: How each net is trained: a function of the Learner, or the number of epochs of `learn.fit`. Default 1.
        rewind_to: The epoch to rewind to; fractions are rounded to whole batches. Default 0, before the first batch.
        granularity: Which weights form a group, as for Sparsifier. Default "weight".
        context: Over which layers scores are ranked, as for Sparsifier. Default "global".
        criteria: The score by which weights are pruned, as for Sparsifier. Default "large_final". `init` is the weight
            at `rewind_to`.
        controls: Names of the nets that are trained beside each ticket. Default none.
        controls_every: Rounds from one training of the controls to the next, counted back from the last round.
            Default 1.
        reinitialize: A function that initializes a model in place, for the control 'reinitialized'. By default the
            initial values of every parameter are shuffled, which keeps their distribution.
        calibration: Batches for criteria that need data. Default the first batch of the training data.
        seed: Seed of the controls and of random criteria. Default 0.
        path: A file that is written after each round. If it exists, the run resumes from it. Default none.
        **options: Other arguments of Sparsifier, such as layers, exclude and pool. `regrow` and `straight_through` are
            errors.

    Returns:
        The dense net and the tickets of all rounds. Their metrics are those of `learn.validate()` after each fit.

    Raises:
        TypeError: An argument has the wrong type or is unknown.
        ValueError: An argument is out of range, the Learner has no validation data or no Recorder or already has a
            SparsifyCallback or KeepSparsity, `rewind_to` is after the end of the fit, or the file of `path` is from
            another run.

    Example:
        >>> learn = make_learner()
        >>> tickets = lottery_ticket(learn, 0.75, rounds=2, fit=1)
        >>> [ticket.sparsity for ticket in tickets]
        [0.0, 0.5, 0.75]
    """
    for changing in ("regrow", "straight_through"):
        if options.get(changing):
            raise TypeError(
                f"lottery_ticket: tickets keep their masks, so {changing}= is not possible; use SparsifyCallback"
            )
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    asked = {"granularity": granularity, "context": context, "criteria": criteria, "seed": check_seed(seed), **options}
    run = LotteryRun(
        learn, check_sparsity(sparsity), check_count("rounds", rounds), fit, rewind_to,
        [controls] if isinstance(controls, str) else list(controls), check_count("controls_every", controls_every),
        reinitialize, calibration, asked,
    )  # fmt: skip
    saved = None
    if path is not None:
        with suppress(FileNotFoundError):
            saved = load_run(path)
    tickets = [] if saved is None else run.resume(saved, path)
    with bars_of(learn):
        for number in progress(range(len(tickets), run.rounds + 1), "lottery tickets", prints=True):
            tickets.append(run.train_ticket(number) if number else run.train_dense())
            if path is not None:
                run.save(path, tickets)
    run.keep_zeros()
    return LotteryTickets(tickets)
