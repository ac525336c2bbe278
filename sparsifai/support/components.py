"""Things that belong together because they have something in common, directly or by way of others."""

from __future__ import annotations

from collections.abc import Hashable, Iterable


def components(keys: Iterable[Iterable[Hashable]]) -> list[int]:
    """Number things so that those get one number that have a common key, directly or by way of others.

    Args:
        keys: The keys of each thing.

    Returns:
        A number for each thing: the position of the first one that belongs with it.

    Example:
        >>> components([['a'], ['b'], ['b', 'c'], ['c', 'a'], []])
        [0, 0, 0, 0, 4]
    """
    parent: list[int] = []
    first_with: dict[Hashable, int] = {}

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    for number, each in enumerate(keys):
        parent.append(number)
        for key in each:
            one, other = sorted((root(first_with.setdefault(key, number)), root(number)))
            parent[other] = one
    return [root(number) for number in range(len(parent))]
