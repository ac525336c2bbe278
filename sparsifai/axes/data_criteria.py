"""Criteria that need data: they are computed from gradients, activations or curvature, not from weights alone.

How a criterion is written, and how it is registered, is in criterion.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gates  # noqa: F401 registers the quantities of gates
from .criterion import criteria, elementwise, pooled_by
from .curvature import FisherCurvature


@criteria.register
@elementwise
def snip(weight: Tensor, grad: Tensor) -> Tensor:
    """|w g|: weights whose removal changes the loss little are pruned. Lee et al., 2019, "SNIP" (arXiv:1810.02340).

    Example:
        >>> batches = [(torch.randn(16, 8), torch.randint(2, (16,)))]
        >>> sparsifier = Sparsifier(nn.Linear(8, 2), criteria='snip')
        >>> sparsifier.calibrate(batches, nn.functional.cross_entropy)
        >>> sparsifier.sparsify(0.5)
        >>> sparsifier.sparsity
        0.5
    """
    return (weight * grad).abs()


@criteria.register
@elementwise
def grasp(weight: Tensor, hessian_grad: Tensor) -> Tensor:
    """w Hg, H being the Hessian of the loss. The paper's score is -w Hg, and the weights with the highest are pruned.

    -w Hg estimates how much the norm of the gradient grows when the weight is pruned. Wang et al., 2020, "Picking
    Winning Tickets Before Training by Preserving Gradient Flow" (arXiv:2002.07376).

    Example:
        >>> batches = [(torch.randn(16, 8), torch.randint(2, (16,)))]
        >>> sparsifier = Sparsifier(nn.Linear(8, 2), criteria='grasp')
        >>> sparsifier.calibrate(batches, nn.functional.cross_entropy)
        >>> sparsifier.sparsify(0.5)
        >>> sparsifier.sparsity
        0.5
    """
    return weight * hessian_grad


@criteria.register
@elementwise
def synflow(weight: Tensor, flow: Tensor) -> Tensor:
    """|w| dR/d|w|, R being the sum of the outputs for an input of ones and weights |w|.

    Published for many steps, as in `sparsify(0.99, steps=100)`. Tanaka et al., 2020, "Pruning Neural Networks without
    Any Data by Iteratively Conserving Synaptic Flow" (arXiv:2006.05467).

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> sparsifier = Sparsifier(model, criteria='synflow', example_input=torch.zeros(1, 8))
        >>> sparsifier.sparsify(0.75, steps=10)
        >>> sparsifier.sparsity
        0.75
    """
    return weight.abs() * flow


@criteria.register
@pooled_by("squared_sum")
@elementwise
def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """w g; the score of a group is (sum of w g)^2, the square of the change in loss when the group is pruned.

    For a whole filter before a batch norm the sum is zero, because the norm undoes the filter's scale. Molchanov et
    al., 2019, "Importance Estimation for Neural Network Pruning" (arXiv:1906.10771).

    Example:
        >>> batches = [(torch.randn(16, 8), torch.randint(2, (16,)))]
        >>> sparsifier = Sparsifier(nn.Linear(8, 2), criteria='taylor')
        >>> sparsifier.calibrate(batches, nn.functional.cross_entropy)
        >>> sparsifier.sparsify(0.5)
        >>> sparsifier.sparsity
        0.5
    """
    return weight * grad


@criteria.register
@elementwise
def fisher(weight: Tensor, grad_sq: Tensor) -> Tensor:
    """w^2 F / 2, F being the diagonal of the empirical Fisher matrix.

    Theis et al., 2018, "Faster gaze prediction with dense networks and Fisher pruning" (arXiv:1801.05787).

    Example:
        >>> batches = [(torch.randn(16, 8), torch.randint(2, (16,)))]
        >>> sparsifier = Sparsifier(nn.Linear(8, 2), criteria='fisher')
        >>> sparsifier.calibrate(batches, nn.functional.cross_entropy)
        >>> sparsifier.sparsify(0.5)
        >>> sparsifier.sparsity
        0.5
    """
    return weight.square() * grad_sq / 2


@criteria.register
@elementwise
def movement_pruning(weight_grad: Tensor) -> Tensor:
    """-w g, averaged over all batches: weights that move away from zero are kept.

    Sanh et al., 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (arXiv:2005.07683).

    Example:
        >>> batches = [(torch.randn(16, 8), torch.randint(2, (16,)))]
        >>> sparsifier = Sparsifier(nn.Linear(8, 2), criteria='movement_pruning')
        >>> sparsifier.calibrate(batches, nn.functional.cross_entropy)
        >>> sparsifier.sparsify(0.5)
        >>> sparsifier.sparsity
        0.5
    """
    return -weight_grad


@criteria.register
def wanda(weight: Tensor, activation: Tensor) -> Tensor:
    """|w| ||x||, x being the input that the weight is multiplied with. Published with context 'per_output'.

    Sun et al., 2023, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv:2306.11695).

    Example:
        >>> sparsifier = Sparsifier(nn.Linear(8, 2), context='per_output', criteria='wanda')
        >>> sparsifier.calibrate([torch.randn(16, 8)])
        >>> sparsifier.sparsify(0.5)
        >>> sparsifier.sparsity
        0.5
    """
    return weight.abs() * activation


# --- Criteria of second order -----------------------------------------------------------------------------------


@criteria.register(curvature=FisherCurvature, compensates=True)
def obs(weight: Tensor, inverse_curvature: Tensor, block_size: int = 50, damping: float = 1e-7) -> Tensor:
    """w^2 / (2 [F^-1]_ii), F = damping I + 1/m sum of g g^T being the empirical Fisher matrix of m batches, in blocks.

    A block has `block_size` consecutive weights. The score is the least rise of the loss if the weight is pruned and
    the others of its block adapt, which compensate=, here the default, lets them do. Kurtic et al., 2022, "The Optimal
    BERT Surgeon" (arXiv:2203.07259).

    Example:
        >>> batches = [(torch.randn(4, 8), torch.randint(2, (4,))) for _ in range(8)]
        >>> sparsifier = Sparsifier(nn.Linear(8, 2), criteria='obs')
        >>> sparsifier.calibrate(batches, nn.functional.cross_entropy)
        >>> sparsifier.sparsify(0.5)
        >>> sparsifier.sparsity
        0.5
    """
    return weight.square() / (2 * inverse_curvature)


@criteria.register(compensates=True, sweeps=True)
def sparsegpt(weight: Tensor, inverse_curvature: Tensor, damping: float = 0.01, block_size: int = 128) -> Tensor:
    """w^2 / [H^-1]_jj, H = 2 X X^T + damping * mean of its diagonal, X being the inputs of the layer.

    H^-1 is that of column j and those behind it, and w is the weight as the columns before it have changed it. A mask
    is chosen for `block_size` columns after the other. For contexts that rank within a layer. Frantar and Alistarh,
    2023, "SparseGPT" (arXiv:2301.00774).

    Example:
        >>> sparsifier = Sparsifier(nn.Linear(8, 2), context='local', criteria='sparsegpt')
        >>> sparsifier.calibrate([torch.randn(16, 8)])
        >>> sparsifier.sparsify(0.5)
        >>> sparsifier.sparsity
        0.5
    """
    return weight.square() / inverse_curvature


@criteria.register
def gate_importance(weight: Tensor, gate_grad: Tensor, group_width: int, normalize: bool = True) -> Tensor:
    """E |dL/dξ|, ξ = 1 being a gate that multiplies what a head (or a neuron) hands on, and E the mean over examples.

    All weights of a head have the score of their head. With `normalize`, the scores of an attention are divided by
    their l2 norm over its heads, as published. Only for granularities such as 'head' and 'neuron'. Michel et al., 2019,
    "Are Sixteen Heads Really Better than One?" (arXiv:1905.10650).

    Example:
        >>> layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        >>> sparsifier = Sparsifier(layer, 'head', criteria='gate_importance')
        >>> sparsifier.calibrate([(torch.randn(8, 3, 16), torch.randn(8, 3, 16))], nn.functional.mse_loss)
        >>> sparsifier.sparsify(0.5)
        >>> sparsifier.report().joint  # heads that are pruned, and all
        {'self_attn': (2, 4)}
    """
    # Each head has as many entries as it is wide, so the norm over entries is that over heads times the root of it.
    importance = gate_grad.double()
    norm = importance.norm().clamp(min=1e-300) / group_width**0.5 if normalize else 1.0
    return (importance / norm).to(torch.promote_types(weight.dtype, torch.float32)).expand_as(weight)
