"""A bound on how much work is done for a text that someone else wrote, counted in steps and not in seconds."""

from __future__ import annotations


class Work:
    """Steps that may still be taken.

    Steps are counted, as seconds are not the same on every machine.

    Args:
        most: The number of steps.
        problem: The message of the error when there are none left.

    Example:
        >>> work = Work(10, 'it takes too long')
        >>> work.spend(8)
        >>> work.spend(8)
        Traceback (most recent call last):
        ValueError: it takes too long
    """

    def __init__(self, most: int, problem: str):
        self.left, self.problem = most, problem

    def spend(self, steps: int) -> None:
        """Count steps.

        Raises:
            ValueError: More steps were taken than there may be.
        """
        self.left -= steps
        if self.left < 0:
            raise ValueError(self.problem)
