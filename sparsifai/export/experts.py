"""`remove_experts` removes the experts of mixtures that are zero, also those that the router still chooses."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..model.joint.experts import find_experts, remove_experts_from, why_too_few
from ..model.joint.removal import removable_groups
from ..model.parallel import unwrapped
from ..model.running import copy_of
from ..model.tensors import check_values
from ..support.arguments import checks_arguments
from ..support.checks import check_is_module
from ..support.printable import printable


@torch.inference_mode(False)
@checks_arguments
def remove_experts(model: nn.Module) -> nn.Module:
    """Remove the experts that are zero, with their rows of the router: returns a smaller copy.

    Its outputs are others than before where a token had chosen such an expert: the token had got nothing from it, and
    now the router gives its share to experts that are left. `shrink` removes only experts that no token of its example
    chooses. Measure the smaller model, and train it further if need be.

    Args:
        model: Any torch model with mixtures of experts, pruned with granularity 'expert'. It is not changed. Of a
            wrapper (compiled, data parallel) the model inside is copied.

    Returns:
        The smaller copy. The config of a transformers model follows if all mixtures have the same number of experts
        left, as with context 'local'.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: It has no experts that are zero, or too few would be left in a mixture.

    Example:
        >>> class Mixture(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.router, self.top_k = nn.Linear(4, 3), 1
        ...         self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        >>> mixture = Mixture()
        >>> _ = [nn.init.zeros_(each) for each in mixture.experts[1].parameters()]
        >>> small = remove_experts(mixture)
        >>> len(small.experts), small.router
        (2, Linear(in_features=4, out_features=2, bias=True))
    """
    check_is_module("remove_experts", "model", model)
    model = unwrapped(model)
    check_values("remove_experts", dict(model.named_parameters()))
    found = {groups.name: groups for groups in find_experts(model)}
    removed = {name: np.flatnonzero(removable_groups(model, groups)) for name, groups in found.items()}
    removed = {name: numbers for name, numbers in removed.items() if len(numbers)}
    if not removed:
        raise ValueError(
            f"remove_experts: {type(model).__name__} has no experts that are zero"
            f"{'' if found else ', nor any mixture of experts'}; prune it with granularity 'expert' before"
        )
    for name, numbers in removed.items():
        if why := found[name].why_kept or why_too_few(model, found[name], numbers):
            raise ValueError(f"remove_experts: {printable(name) or 'the model itself'}: {why}")
    small = copy_of(model)
    remove_experts_from(small, removed)
    return small
