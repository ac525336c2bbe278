"""Numbers that papers and their code print."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import layers_of
from torch import nn

from sparsifai import Sparsifier, agp, cos, criteria, is_nm, lin, one_cycle, one_shot

# --- Schedules -----------------------------------------------------------------------------------------------------


def test_agp():
    # Zhu and Gupta, 2017 (arXiv:1710.01878): s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3, here by hand from 0 to
    # 87.5 % in 10 steps: 87.5 % of 1 - 0.9^3 = 0.271, 1 - 0.8^3 = 0.488, ...
    levels = [0.875 * agp(step / 10) for step in range(11)]
    expected = [0, 0.237125, 0.427, 0.574875, 0.686, 0.765625, 0.819, 0.851375, 0.868, 0.874125, 0.875]
    assert levels == pytest.approx(expected)


def test_the_four_schedules_of_one_cycle_pruning():
    # Hubens et al., 2021, "One-Cycle Pruning" (arXiv:2107.02086), with alpha 14 and beta 6.
    for t in np.linspace(0, 1, 11):
        t = float(t)
        assert one_shot(t) == 1
        assert lin(t) == pytest.approx(t)
        assert cos(t) == pytest.approx((1 - math.cos(math.pi * t)) / 2)
        expected = (1 + math.exp(-14 + 6)) / (1 + math.exp(-14 * t + 6))
        assert one_cycle(t) == pytest.approx(expected)
    assert one_cycle(1.0) == 1


# --- Erdos-Renyi-Kernel --------------------------------------------------------------------------------------------

# Sparsities in per cent of ResNet-50 at 90 %, as RigL (arXiv:1911.11134) and STR (arXiv:2002.03231) print them.
PRINTED = {
    "conv1.weight": 58,
    "layer1.0.conv1.weight": 0,
    "layer4.0.conv2.weight": 98,
    "layer4.1.conv2.weight": 98,
    "layer4.2.conv2.weight": 98,
    "fc.weight": 93,
}


def test_erk_of_resnet50_at_90_percent():
    torchvision = pytest.importorskip("torchvision", reason="has the ResNet-50")
    sparsifier = Sparsifier(torchvision.models.resnet50(), context="erk")
    sparsifier.sparsify(0.9)
    found = {name: 100 * float((~mask).float().mean()) for name, mask in sparsifier.masks.items()}
    assert len(found) == 54
    assert {name: found[name] for name in PRINTED} == pytest.approx(PRINTED, abs=0.5)
    # By the formula, with the scale that the printed 57.99 % of the first layer has: (64 + 3 + 7 + 7) / (64 3 7 7).
    scale = (1 - found["conv1.weight"] / 100) / (81 / 9408)
    for name, target in layers_of(sparsifier).items():
        shape = target.parameter.shape
        assert found[name] == pytest.approx(100 * (1 - min(1, scale * sum(shape) / math.prod(shape))), abs=0.5)
    assert sparsifier.sparsity == pytest.approx(0.9, abs=1e-5)


# --- LAMP, 2:4 -----------------------------------------------------------------------------------------------------


def test_lamp_scores():
    # Lee et al., 2021 (arXiv:2010.07611), by its formula.
    scores = criteria["lamp"](torch.tensor([1.0, -2.0, 3.0, -4.0]))
    assert scores.tolist() == pytest.approx([1 / 30, 4 / 29, 9 / 25, 1])


def test_two_of_four_of_the_example_of_asp():
    # NVIDIA apex, contrib/sparsity: the magnitude that 2:4 keeps of a random matrix.
    np.random.seed(seed=1)
    weight = torch.from_numpy(np.random.rand(128, 64))
    model = nn.Sequential(nn.Linear(64, 128, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    Sparsifier(model, context="2:4", layers=["0"]).sparsify(0.5)
    assert float(weight.sum()) == pytest.approx(4083.169, abs=6e-4)
    assert float(model[0].weight.detach().sum()) == pytest.approx(2852.377, abs=6e-4)
    assert is_nm(model[0].weight, 2, 4)


# --- SynFlow: conservation, and which layers collapse when ---------------------------------------------------------


def vgg16(width=0.25, classes=10):
    """VGG-16 with batch norm, of a quarter of its width, for pictures of 32 px and one linear layer."""
    layers, channels = [], 3
    for kind in (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool"):
        if kind == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            out = int(kind * width)
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes))


def test_synflow_is_conserved_in_every_layer():
    # Tanaka et al., 2020 (arXiv:2006.05467), theorem 1: without biases every layer's sum of w dR/dw is R.
    model = nn.Sequential(*(layer for layer in vgg16() if not isinstance(layer, nn.BatchNorm2d)))
    for layer in model:
        if hasattr(layer, "bias"):
            layer.bias = None
    sparsifier = Sparsifier(model, criteria="synflow", example_input=torch.zeros(1, 3, 32, 32))
    sums = [
        float((target.parameter.detach().abs() * sparsifier.collected.value("flow", name)).sum())
        for name, target in layers_of(sparsifier).items()
    ]
    assert len(sums) == 14
    assert sums == pytest.approx([sums[0]] * 14, rel=1e-9)


def first_collapse(criterion, steps, powers, seed=0):
    """The first power of ten by which the weights can be fewer before a layer is empty."""
    torch.manual_seed(seed)
    model = vgg16()
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    for power in powers:
        pruned = copy.deepcopy(model)
        sparsifier = Sparsifier(pruned, criteria=criterion, may_empty=True, example_input=images)
        if sparsifier.collected.at("backward", "loss"):
            sparsifier.calibrate([(images, labels)], F.cross_entropy)
        sparsifier.sparsify(1 - 10.0**-power, steps=steps)
        if not all(mask.any() for mask in sparsifier.masks.values()):
            return power
    return math.inf


@pytest.mark.slow
def test_snip_grasp_and_magnitude_collapse_long_before_synflow():
    # As in figure 1 of the paper: all but synflow empty a layer one or more powers of ten earlier, in steps of a tenth.
    for name, about in (("large_final", 1.2), ("snip", 1.7), ("grasp", 2.2)):
        power = first_collapse(name, 1, [about - 0.2, about - 0.1, about, about + 0.1])
        assert power < math.inf, name
        assert first_collapse("synflow", 100, [power + 0.9]) == math.inf, name
