"""What is known of the other callbacks of a Learner."""

from __future__ import annotations

from typing import Any

# The events in which a callback can change weights within an epoch's training.
_OF_TRAINING = (
    *("before_train", "before_batch", "after_pred", "after_loss", "before_backward", "after_cancel_backward"),
    *("after_backward", "before_step", "after_cancel_step", "after_step", "after_cancel_batch", "after_batch"),
)


def are_all_known(learn: Any) -> bool:
    """Whether all callbacks with events of training are fastai's or sparsifai's own, which change no weights.

    Args:
        learn: The Learner.
    """
    return not any(
        event in vars(callback) or (hasattr(type(callback), event) and not _is_known(type(callback)))
        for callback in learn.cbs
        for event in _OF_TRAINING
    )


def _is_known(kind: type) -> bool:
    return kind.__module__.split(".")[0] in ("fastai", "sparsifai")
