"""The n-th lowest of many values.

On some processors (AMD Zen 4) and among many equal values, np.partition takes ten times as long as on others, so it is
given few values.
"""

from __future__ import annotations

import math

import numpy as np

# Numpy sorts at most so many values without branches; a sample is about as long.
SHORT = 256


def stride(step: int) -> int:
    """The highest number up to `step` that is divisible neither by 2 nor by 3.

    With such a stride a sample meets all places of a kernel and all channels alike: their numbers are mostly products
    of 2 and 3. It would misjudge a layer of which it met only the middle of every kernel.

    >>> [stride(step) for step in (1, 4, 9, 25)]
    [1, 1, 7, 25]
    """
    return next(each for each in range(max(step, 1), 0, -1) if math.gcd(each, 6) == 1)


def nth_lowest(values: np.ndarray, count: int) -> np.generic:
    """The `count`-th lowest of some values, from 1 to their number.

    A sample gives two values between which it lies, with near certainty. A sample that misleads only costs time.

    Args:
        values: The values, in one dimension, no NaN.
        count: Which of them.
    """
    while len(values) > 8 * SHORT:
        sample = np.sort(values[:: len(values) // SHORT])
        middle, spread = len(sample) * count / len(values), 1.5 * math.sqrt(len(sample))
        low = sample[max(math.floor(middle - spread), 0)]
        high = sample[min(math.ceil(middle + spread), len(sample) - 1)]
        # The two may be equal to many others, so it is first seen whether it is one of them.
        below, upto_low = int(np.count_nonzero(values < low)), int(np.count_nonzero(values <= low))
        within = values[np.flatnonzero((values > low) & (values < high))]
        upto_high = int(np.count_nonzero(values <= high))
        if below < count <= upto_low:
            return low
        if upto_low + len(within) < count <= upto_high:
            return high
        if count <= below:
            rest, passed = values[values < low], 0
        elif count > upto_high:
            rest, passed = values[values > high], upto_high
        else:
            rest, passed = within, upto_low
        few = len(rest) < len(values) // 2
        values, count = rest, count - passed
        if not few:
            break
    return np.partition(values, count - 1)[count - 1]
