"""What can go wrong in straight-through training: the checks and the messages of `DenseWeights`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..model.parallel import is_sharded
from ..support.printable import printable

MOVED_ELSEWHERE = (
    "straight_through: pruned weights were changed outside of the step of the optimizer, and are set to zero again; "
    "call the step inside `with sparsifier.dense_weights():`, so that it moves the dense weights"
)

UNPREPARED = (
    "straight_through: mask_gradients was not called before this step, so decay= and gradient_sparsity= do nothing in "
    "it; call it after backward, before `with sparsifier.dense_weights():`"
)

SETTLED_UNPRUNED = (
    "settle: no weight is pruned yet, and from here on the masks cannot change their mind; settle after the last update"
)

# With the name of a parameter.
BACKWARD_INSIDE = (
    "dense_weights: a backward pass has reached {} inside the block, where gradients are those of the dense model; "
    "make it before the block, and call the step without a closure"
)


def check_can_be_kept(name: str, parameter: Tensor) -> None:
    """Check that the dense weights of a parameter can be kept.

    Raises:
        ValueError: It is sharded, or cannot be trained.
    """
    if parameter.is_inference():
        raise ValueError(
            f"straight_through: {printable(name)} was made in inference mode, so that no optimizer can move it; make "
            "the model outside of torch.inference_mode()"
        )
    if is_sharded(parameter):
        raise ValueError(
            f"straight_through: {printable(name)} is sharded by fully_shard, whose parameters cannot hold other memory "
            "for a step; use DistributedDataParallel, or train without straight_through="
        )


def check_can_be_pulled(gradients: Mapping[str, Tensor]) -> None:
    """Check that the pull of `decay=` can be added to gradients.

    Args:
        gradients: Parameter name -> gradient.

    Raises:
        ValueError: A gradient is a sparse tensor.
    """
    for name, gradient in gradients.items():
        if gradient.layout != torch.strided:
            raise ValueError(
                f"straight_through: the gradient of {printable(name)} is a sparse tensor, to which the pull of decay= "
                "cannot be added; pass decay=0, or make the layer with sparse=False"
            )
