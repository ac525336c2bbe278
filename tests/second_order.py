"""Layers by themselves, written plainly: their inputs as columns, their weights as rows, and their errors."""

import copy

import torch
import torch.nn.functional as F
from torch import nn


class Transposed(nn.Module):
    """A layer with a weight of (in, out), as GPT-2 has."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def image(size=9):
    return lambda channels: torch.randn(5, channels, size, size)


def tokens(channels):
    # Of features that depend on each other, as those of a net do.
    return torch.randn(5, 7, channels) @ torch.randn(channels, channels)


# name -> layer, input
LAYERS = {
    "Linear": lambda: (nn.Linear(12, 5), tokens(12)),
    "Linear without bias": lambda: (nn.Linear(12, 5, bias=False), tokens(12)[0]),
    "(in, out)": lambda: (Transposed(12, 5), tokens(12)),
    "Conv1d": lambda: (nn.Conv1d(6, 4, 3, padding="same"), torch.randn(4, 6, 11)),
    "Conv2d": lambda: (nn.Conv2d(3, 4, [3, 2], stride=[2, 2], padding=1), image()(3)),
    "Conv2d, grouped": lambda: (nn.Conv2d(6, 8, 3, groups=2, dilation=2, padding_mode="circular", padding=1),
                                image()(6)),
    "Conv2d, depthwise": lambda: (nn.Conv2d(4, 4, 3, groups=4, padding=1), image()(4)),
    "Conv3d": lambda: (nn.Conv3d(2, 3, 2), torch.randn(3, 2, 4, 5, 4)),
    "ConvTranspose2d": lambda: (nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1), image(4)(4)),
    "ConvTranspose2d, grouped": lambda: (nn.ConvTranspose2d(6, 4, 3, groups=2, padding=1), image(4)(6)),
}  # fmt: skip


def layer_and_input(name):
    """A layer in a model, and an input, in float64."""
    layer, value = LAYERS[name]()
    return nn.Sequential(layer.double()), value.double()


def influence(layer, value):
    """The matrix A with output = A @ weight, of a layer without bias, one column for each weight."""
    plain = copy.deepcopy(layer)
    if plain.bias is not None:
        nn.init.zeros_(plain.bias)
    columns = []
    with torch.no_grad():
        for place in range(plain.weight.numel()):
            plain.weight.zero_().view(-1)[place] = 1
            columns.append(plain(value).flatten())
    return torch.stack(columns, 1)


def least_squares(layer, value, mask, damping=0.01):
    """The weights that are zero where a mask prunes and have the least error, by brute force over all weights."""
    effect, weight = influence(layer, value), layer.weight.detach().flatten()
    # What each weight is multiplied with has a mean square; damping is a fraction of its mean over those of an output.
    squares = effect.square().sum(0)
    rows = torch.diag((damping * _mean_of_row(layer, squares)).sqrt())
    effect, kept = torch.cat([effect, rows]), mask.expand_as(layer.weight).flatten()
    solved = torch.zeros_like(weight)
    solved[kept] = torch.linalg.lstsq(effect[:, kept], effect @ weight, driver="gels").solution
    return solved.view_as(layer.weight)


def _mean_of_row(layer, squares):
    """The mean over the weights of a weight's output (and group), for each weight."""
    form = squares.view_as(layer.weight)
    if isinstance(layer, nn.ConvTranspose2d):
        grouped = form.view(layer.groups, -1, *form.shape[1:])
        return grouped.mean((1, 3, 4), keepdim=True).expand_as(grouped).flatten()
    axes = (0,) if isinstance(layer, Transposed) else tuple(range(1, form.dim()))
    return form.mean(axes, keepdim=True).expand_as(form).flatten()


def error_of(layer, value, weight):
    """The squared error of a layer's outputs with another weight."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.copy_(weight)
        return float((other(value) - layer(value)).square().sum())


def plain_sparsegpt(weight, inputs, sparsity=None, n_of_m=None, per_output=False, width=128, damping=0.01):
    """SparseGPT as the paper's algorithm has it: weight (out, in), inputs (samples, in). Returns weight and mask."""
    weight, columns = weight.clone(), weight.shape[1]
    hessian = 2 / len(inputs) * inputs.T @ inputs
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns).to(hessian)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian)).T
    mask = torch.ones_like(weight, dtype=torch.bool)
    done = 0
    for first in range(0, columns, width):
        last = min(first + width, columns)
        errors = torch.zeros(len(weight), last - first).to(weight)
        for column in range(first, last):
            if n_of_m is None and column == first:
                scores = weight[:, first:last] ** 2 / upper.diagonal()[first:last] ** 2
                rows = scores if per_output else scores.reshape(1, -1)
                height = 1 if per_output else len(weight)
                target = int(sparsity * height * last + 0.5)
                for row, keep in zip(rows, mask[:, first:last] if per_output else [None], strict=True):
                    lowest = sorted(range(len(row)), key=lambda place, row=row: float(row[place]))[: target - done]
                    if per_output:
                        keep[lowest] = False
                    else:
                        flat = mask[:, first:last].reshape(-1)
                        flat[lowest] = False
                        mask[:, first:last] = flat.view(len(weight), -1)
                done = target
            if n_of_m is not None and column % n_of_m[1] == 0:
                n, m = n_of_m
                scores = weight[:, column : column + m] ** 2 / upper.diagonal()[column : column + m] ** 2
                for row, keep in zip(scores, mask[:, column : column + m], strict=True):
                    keep[row.argsort()[: m - n]] = False
            pruned = weight[:, column] * ~mask[:, column]
            errors[:, column - first] = pruned / upper[column, column]
            weight[:, column:last] -= errors[:, column - first, None] * upper[column, column:last]
            weight[:, column] *= mask[:, column]
        weight[:, last:] -= errors @ upper[first:last, last:]
    return weight, mask


def gradients_of(model, batches, name):
    """The gradient of a parameter for each batch, plainly."""
    parameter = model.get_parameter(name)
    return [
        torch.autograd.grad(F.cross_entropy(model(inputs), labels), parameter)[0].flatten()
        for inputs, labels in batches
    ]


def fisher_of(gradients, start, stop, damping=1e-7):
    """One block of the empirical Fisher matrix."""
    block = torch.stack([gradient[start:stop] for gradient in gradients])
    return damping * torch.eye(stop - start).to(block) + block.T @ block / len(gradients)
