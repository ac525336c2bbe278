"""How one layer connects its input channels with its output channels."""

import pytest
import torch
from torch import nn

from sparsifai.model.channels.connections import keeps_constants, nonzero_connections, zero_outputs


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(3, 4, 3, padding="valid"),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, 1, padding="same"),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, 1, padding=1),
        nn.Conv2d(3, 4, (1, 3), padding=(0, 1), stride=2),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"),
        nn.ConvTranspose2d(3, 4, 3),
        nn.ConvTranspose2d(3, 4, 2, stride=2),
        nn.Linear(9, 4),
    ],
    ids=str,
)
def test_a_constant_input_adds_the_same_everywhere_but_where_padding_differs(layer):
    with torch.no_grad():
        output = layer(torch.ones(1, 3, 9, 9))
    assert keeps_constants(layer) == bool(
        (output - output[..., :1, :1]).abs().max() < 1e-5 or isinstance(layer, nn.Linear)
    )


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.Conv1d(4, 4, 3, groups=4),
        nn.ConvTranspose1d(4, 8, 2, groups=4),
    ],
    ids=str,
)
def test_connections_are_the_gradients_that_are_not_zero(layer):
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight[..., :1]) < 0.3)
    is_linear = isinstance(layer, nn.Linear)
    channels, lengths = (6, ()) if is_linear else (layer.in_channels, (6,) * (layer.weight.dim() - 2))
    inputs = torch.ones(1, channels, *lengths, requires_grad=True)

    def gradient(output):
        # Random factors, so that gradients do not cancel.
        (found,) = torch.autograd.grad((output * torch.randn_like(output)).sum(), inputs, retain_graph=True)
        return found.reshape(channels, -1).any(1)

    reads = torch.stack([gradient(output) for output in layer(inputs)[0]])
    expected, connections = torch.zeros_like(reads), nonzero_connections(layer)
    groups, out, into = connections.shape
    for group in range(groups):
        expected[group * out : (group + 1) * out, group * into : (group + 1) * into] = connections[group]
    assert torch.equal(reads, expected)
    assert zero_outputs(layer) == [not row.any() for row in reads]
    assert 0 < reads.sum() < reads.numel()
