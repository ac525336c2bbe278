"""A layer whose groups have scores, as a context sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ...support.chunk import CHUNK
from ...support.printable import printable

if TYPE_CHECKING:
    from ...model.layers import NamedWeight


@dataclass
class ScoredLayer:
    """One layer as a context sees it. Arrays have one entry per group, in index order.

    A context ranks layers with `select_groups`, or reads `score`, `alive`, `size` and `grid` itself.

    Attributes:
        target: The weight: its name, axes and parameter.
        part: Function that gives the scores of a slice of the groups, as floats. It is called for one slice after the
            other, so that scores that are computed in it need not be stored.
        alive: False where a group is masked already.
        size: Weights in a group: one number if all groups are equal, else one per group.
        whole: Whether the only group is the whole layer. Then one of the layers that are ranked together is kept, not
            one group of every layer.
        revives: Whether masked groups may be revived, because the sparsity is lower than before.
        may_empty: Whether the best group of the layer may be pruned too.
        grid: Axis name -> number of groups along it, in the order of the groups' index.
        others: Further weights, whose groups are coupled with those of `target`.
    """

    target: NamedWeight
    part: Callable[[slice], np.ndarray]
    alive: np.ndarray
    size: int | np.ndarray = 1
    whole: bool = False
    revives: bool = True
    may_empty: bool = False
    grid: Mapping[str, int] = field(default_factory=dict)
    others: tuple[NamedWeight, ...] = ()

    def __len__(self) -> int:
        return len(self.alive)

    @cached_property
    def score(self) -> np.ndarray:
        """The scores of all groups."""
        score = self.part(slice(None))
        self.check(score, self.alive)
        return score

    @property
    def targets(self) -> tuple[NamedWeight, ...]:
        """The weight, and those that are coupled with it."""
        return (self.target, *self.others)

    @property
    def total(self) -> int:
        """Number of weights in all groups."""
        return self.size * len(self) if isinstance(self.size, int) else int(self.size.sum())

    @property
    def masked(self) -> np.ndarray:
        """True where a group is masked already."""
        return ~self.alive

    @property
    def alone(self) -> ScoredLayer:
        """The layer, to rank by itself. Any scores do that put its groups in the same order."""
        return self

    def weights(self, chosen: np.ndarray, part: slice = slice(None)) -> int:
        """Number of weights in the chosen groups.

        Args:
            chosen: Bool per group of `part`.
            part: Slice of the groups; by default all of them.
        """
        if isinstance(self.size, int):
            return self.size * int(np.count_nonzero(chosen))
        return int(self.size[part][chosen].sum())

    def check(self, score: np.ndarray, where: np.ndarray | bool = True) -> None:
        """Check scores of this layer for NaN.

        Args:
            score: The scores.
            where: Bool per score, False where NaN does not matter; by default NaN matters everywhere.

        Raises:
            ValueError: There is NaN. The message names the layer.
        """
        nan = np.isnan(score)
        if nan.any() and (nan & where).any():
            raise ValueError(nan_message(self.target.name))

    def sample(self, step: int, candidate: np.ndarray) -> np.ndarray:
        """The scores of every `step`-th group, without those that are not candidates."""
        every = slice(None, None, step)
        return self.part(every)[candidate[every]]

    def divide(self, candidate: np.ndarray, low: float, high: float) -> Divided:
        """Compare the groups with a bracket, in one pass.

        Args:
            candidate: Bool per group; the others are left out.
            low: Lower end of the bracket.
            high: Upper end of the bracket.

        Raises:
            ValueError: A candidate's score is NaN.
        """
        kept, places, scores, weights, has_above = np.empty(len(self), bool), [], [], 0, False
        scratch = np.empty(CHUNK, bool)
        with np.errstate(over="ignore"):  # a bracket of float64 scores may be infinite as a float32
            for start in range(0, len(self), CHUNK):
                part = slice(start, start + CHUNK)
                score, of_part = self.part(part), kept[part]
                flag = scratch[: len(score)]
                np.less(score, low, out=flag)
                np.greater(candidate[part], flag, out=of_part)
                weights += self.weights(of_part, part)
                np.greater(score, high, out=flag)
                has_above = has_above or bool((of_part & flag).any())
                np.greater(of_part, flag, out=flag)
                # NaN is neither below nor above the bracket, so it is among these and found at no extra cost.
                within = np.flatnonzero(flag)
                scores.append(score[within])
                self.check(scores[-1])
                places.append(start + within)
        return Divided(kept, np.concatenate(places), np.concatenate(scores), weights, has_above)

    def best(self) -> np.ndarray:
        """Index of the best group that is not masked: the highest score, the last of equal ones. Empty if all are."""
        highest = self.score[self.alive].max(initial=-np.inf)
        return np.flatnonzero((self.score == highest) & self.alive)[-1:]


@dataclass
class Divided:
    """The candidates of a layer, compared with a bracket.

    Attributes:
        kept: Bool per group, True at candidates that do not score below the bracket.
        places: Index of each candidate within the bracket.
        scores: Their scores.
        weights: Number of weights in the candidates that do not score below the bracket.
        has_above: Whether candidates score above the bracket.
    """

    kept: np.ndarray
    places: np.ndarray
    scores: np.ndarray
    weights: int
    has_above: bool


def nan_message(name: str) -> str:
    """The error message for a layer whose scores are NaN."""
    where = printable(name)
    return f"NaN scores for {where}: look for NaN or inf in its weights, or in what the criterion computes from them"


def all_equal(layers: Sequence[ScoredLayer]) -> bool:
    """Whether all groups of all layers have the same score."""
    return len({float(edge) for layer in layers for edge in (layer.score.min(), layer.score.max())}) == 1
