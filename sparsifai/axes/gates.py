"""Gates: how much the loss depends on what a joint group, such as an attention head, hands on.

A gate is a factor of 1 that multiplies the outputs of a group before they are read. The derivative of the loss with
respect to it is the sum of x dL/dx over these outputs x, so no gate has to be added to the model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..model.joint.groups import NO_GROUP
from ..model.layers import CONVOLUTIONS, NamedWeight
from ..model.tensors import widened
from ..support.printable import printable
from .quantity import QuantitySource, UnsuitableLayerError, quantities, taken


@quantities.register
@taken("input_grad")
def gate_grad(source: QuantitySource, name: str) -> Tensor:
    """|dL/dξ|, ξ = 1 being a gate that multiplies the outputs of the weight's joint group; the mean over examples.

    L is the loss of one example. All weights of a group have the value of their group; others have zero.
    """
    return source.once(_gate_gradients)[name]


@quantities.register
@taken("score")
def group_width(source: QuantitySource, name: str) -> int:
    """How many entries along its axis a weight has for each joint group; of a query projection, the size of a head."""
    _, part = source.joint[name]
    return int(np.count_nonzero(part.groups != NO_GROUP)) // len(np.unique(part.groups[part.groups != NO_GROUP]))


def _gate_gradients(source: QuantitySource) -> dict[str, Tensor]:
    """The gradients of the gates of all joint groups, spread over their weights; of those whose inputs were seen."""
    of_groups: dict[int, Tensor] = {}
    for name, seen in source.input_grads.items():
        groups, part = source.joint[name]
        numbers = torch.from_numpy(part.groups)
        for value, gradient, rows in seen:
            products = _by_example(source.layers[name], value * gradient, rows)
            gates = torch.zeros(rows, groups.count, dtype=products.dtype, device=products.device)
            gates.index_add_(1, numbers.to(products.device), products)
            # A module that runs several times has one gate, and so have modules whose groups are joined.
            known = of_groups.get(id(groups))
            of_groups[id(groups)] = gates if known is None else known + gates.to(known.device)
    spread = {}
    for name in source.layers:
        groups, part = source.joint[name]
        if id(groups) in of_groups:
            gates = of_groups[id(groups)].abs().sum(0)
            gates = torch.cat([gates, gates.new_zeros(1)])  # NO_GROUP is the last entry
            weight = source.layers[name].parameter
            shape = [-1 if axis == part.axis else 1 for axis in range(weight.dim())]
            spread[name] = gates[torch.from_numpy(part.groups).to(gates.device)].view(shape).to(weight.device)
    return spread


def _by_example(layer: NamedWeight, products: Tensor, rows: int) -> Tensor:
    """Sum over all but examples and features: (examples, features)."""
    features = layer.axes["in"]
    # Channels are the second axis in a convolution (the first without a batch), and the last axis in other layers.
    axis = -1 if not isinstance(layer.module, CONVOLUTIONS) else 1 if products.dim() == len(layer.axes) else 0
    if "expert" in layer.axes or products.shape[axis] != features:
        raise UnsuitableLayerError(
            f"gate_grad: {printable(layer.name)} is not multiplied with the input of {layer.kind}, of shape "
            f"{tuple(products.shape)}; leave it out with exclude=, or choose a criterion of weights such as taylor"
        )
    return widened(products).movedim(axis, -1).reshape(rows, -1, features).sum(1)
