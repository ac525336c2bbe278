"""`learn.sparsity_report()`: the zeros of the model of a Learner, whatever pruned it."""

from __future__ import annotations

from fastai.learner import Learner
from fastcore.basics import patch

from ..model.parallel import unwrapped
from ..sparsifier.recovery import CHANCE
from ..sparsifier.report import Report
from ..sparsifier.sparsifiers import Sparsifiers
from .keep import KeepSparsity
from .sparsify import SparsifyCallback


@patch
def sparsity_report(self: Learner) -> Report:
    """Count the zeros of the model as it is. Nothing is changed, in a fit or outside of one.

    Which layers count as selected is known from the SparsifyCallback that prunes the model now; else from the masks of
    KeepSparsity, which stays after a fit that pruned; else all weights with named axes count.

    Returns:
        A `Report`: a table of the zeros of each layer, of the selected layers and of the whole model; with `plot`.

    Raises:
        ValueError: The zeros of no parameter can be counted, as in a quantized model.

    Example:
        >>> learn = make_learner()
        >>> _ = learn.sparsify(0.75, 2)
        >>> learn.sparsity_report().selected.sparsity
        0.75
    """
    pruned = [callback.pruned for callback in self._grab_cbs(SparsifyCallback)]
    sparsifiers = [each.sparsifier for each in pruned if each is not None and each.is_kept_on(self)]
    if sparsifiers:
        return Sparsifiers(sparsifiers).report() if len(sparsifiers) > 1 else sparsifiers[0].report()
    model = unwrapped(self.model)
    kept = {name for each in self._grab_cbs(KeepSparsity) if each.held_model is model for name in each.masks}
    return Report.of(model, kept or None)


def sparsity_not_kept(learn: Learner) -> float:
    """The fraction of the weights that are zero, if nothing on a Learner keeps them so; else 0.

    A layer of zeros only was initialized so, and a few of very many random weights are zero by chance.
    """
    if learn._grab_cbs(SparsifyCallback) or learn._grab_cbs(KeepSparsity):
        return 0.0
    counts = [row.count for row in learn.sparsity_report().rows]
    weights, zeros = sum(each.weights for each in counts), sum(each.zeros % (each.weights or 1) for each in counts)
    return zeros / weights if zeros > CHANCE * weights else 0.0
