"""Where: contexts, which say over what scope scores are ranked.

A context is a function of the scored layers and the sparsity asked for. It returns, for each layer, a bool array
over the groups: True where a group falls. `select_groups` of selection.py ranks any set of layers jointly, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .registry import Registry
from .selection import ScoredLayer, select_groups

Context = Callable[[Sequence[ScoredLayer], float], "list[np.ndarray]"]

contexts = Registry("context")


@contexts.register
def local(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Every layer is ranked alone and reaches the target."""
    return [falls for layer in layers for falls in select_groups([layer], sparsity)]


@contexts.register(name="global")
def global_(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """All layers are ranked together and reach the target together."""
    return select_groups(layers, sparsity)


global_.__name__ = "global"  # as it is registered and shown; the keyword cannot be defined
