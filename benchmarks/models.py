"""The models that are measured: those of torchvision, with random weights."""

import torch
import torchvision
from torch import nn

from benchmarks.peers import layers_of

MISSING = "not installed"


def random_model(name, zeros=False):
    """A model of torchvision, the same random weights each time.

    zeros: whether its last layer is all zeros, as the heads of some models begin: the only layer of which, ranked
        globally, all weights but the one that must stay fall.
    """
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)()
    head = layers_of(model)[-1].weight
    if zeros:
        nn.init.zeros_(head)
    elif not head.any():
        nn.init.normal_(head, std=0.02)
    return model


def move(model):
    "Change the weights a little, as training does, so that criteria that compare have something to compare"
    with torch.no_grad():
        for layer in layers_of(model):
            layer.weight.add_(torch.randn_like(layer.weight), alpha=0.1 * float(layer.weight.std()))


def weights_of(model):
    "The weights of the layers that are pruned"
    return [layer.weight for layer in layers_of(model)]
