"""The models that a GPU is given, and small ones with which all of it is rehearsed on a CPU."""

import copy
from functools import cache, partial
from itertools import count

import torch
from torch import nn
from torchvision.models import VisionTransformer

from benchmarks.models import random_model


def models(section):
    "From names to functions that give a model on the device, in the type that it is usually kept in"
    decoded = "decoder 1.1B bf16"
    return {
        convolutional(section): lambda: copied(convolutional(section)).to(section.device),
        "vit_b_16": lambda: transformer(section).to(section.device),
        decoded: partial(decoder, section),
    }


def copied(name):
    "A model of torchvision with random weights, which are drawn once: that takes longer than to copy them"
    return copy.deepcopy(_drawn(name))


_drawn = cache(random_model)


def convolutional(section):
    "Name of a model of torchvision"
    return "squeezenet1_1" if section.quick else "resnet50"


def side_of_pictures(section):
    "In pixels"
    return 64 if section.quick else 224


def transformer(section):
    "ViT-B/16"
    if not section.quick:
        return copied("vit_b_16")
    torch.manual_seed(0)
    model = VisionTransformer(side_of_pictures(section), 16, 2, 2, 64, 128)
    nn.init.normal_(model.heads[-1].weight, std=0.02)  # zeros, else
    return model


def decoder(section):
    "The Linear layers of a decoder in the shapes of TinyLlama 1.1B, in bfloat16"
    width, keys, inner, words, blocks = (64, 16, 176, 1000, 2) if section.quick else (2048, 256, 5632, 32000, 22)
    shapes = [(width, width), (width, keys), (width, keys), (width, width), (width, inner), (width, inner)]
    torch.manual_seed(0)
    with torch.device(section.device):
        linear = partial(nn.Linear, bias=False, dtype=torch.bfloat16)
        layers = [linear(*shape) for _ in range(blocks) for shape in [*shapes, (inner, width)]]
        return nn.Sequential(*layers, linear(width, words))


def rising():
    "Levels each a little higher than the one before, so that every update finds something to do"
    return (0.45 + number / 1000 for number in count())


def copying(weights):
    weights = [weight.detach() for weight in weights]
    copies = [torch.empty_like(weight) for weight in weights]

    def copy(number):
        for into, weight in zip(copies, weights, strict=True):
            into.copy_(weight)

    return copy
