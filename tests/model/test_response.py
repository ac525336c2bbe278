"""Layers whose forward computes another weight from their own: zeros in the parameter would not last."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsifai import Sparsifier


class StandardizedConv2d(nn.Conv2d):
    """Weight standardization, as in Qiao et al., 2019 (arXiv:1903.10520)."""

    def forward(self, x):
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, centred / (centred.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class CentredLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class CentredTransposed(nn.ConvTranspose2d):
    def forward(self, x):
        return F.conv_transpose2d(x, self.weight - self.weight.mean(), self.bias, groups=self.groups)


class BinaryLinear(nn.Linear):
    """Every weight is -1 or 1, so none is zero."""

    def forward(self, x):
        return F.linear(x, torch.where(self.weight >= 0, 1.0, -1.0), self.bias)


class CentredSigns(nn.Linear):
    """Wang et al., 2023, "BitNet" (arXiv:2310.11453)."""

    def forward(self, x):
        return F.linear(x, (self.weight - self.weight.mean()).sign() * self.weight.abs().mean(), self.bias)


class TernaryLinear(nn.Linear):
    """Zeros stay zero: Ma et al., 2024, "The Era of 1-bit LLMs" (arXiv:2402.17764)."""

    def forward(self, x):
        scale = self.weight.abs().mean()
        return F.linear(x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias)


class LowRankLinear(nn.Linear):
    """Something is added that does not depend on the weight, as by LoRA."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.first, self.second = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + x @ self.first.T @ self.second.T


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.1, self.bias)


class TwoInputs(nn.Linear):
    def forward(self, x, y):
        return F.linear(x, self.weight, self.bias) + y


class PaddedConv2d(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class SoftmaxHead(nn.Linear):
    """What a layer does with its outputs, or its inputs, does not concern its weight."""

    def forward(self, x):
        return F.log_softmax(super().forward(x), -1)


class NormalizedLinear(nn.Linear):
    def forward(self, x):
        return F.layer_norm(F.linear(F.layer_norm(x, x.shape[-1:]), self.weight.to(x.dtype)), (self.out_features,))


class GroupNormalizedConv2d(nn.Conv2d):
    def forward(self, x):
        y = F.group_norm(super().forward(x), 1)
        return y * y.mean(1, keepdim=True).sigmoid()


class ByMatmul(nn.Linear):
    def forward(self, x):
        return x @ (2 * self.weight).t()


class CentredByMatmul(nn.Linear):
    def forward(self, x):
        return x @ (self.weight - self.weight.mean()).t()


class FailingBehind(nn.Linear):
    """Its forward fails on an example, but by then it has multiplied."""

    def forward(self, x):
        y = F.linear(x, self.weight - self.weight.mean(1, keepdim=True))
        return y.view(3, 5, 7)


COMPUTE = {
    "centred, by matmul": lambda: CentredByMatmul(6, 6),
    "centred, and then it fails": lambda: FailingBehind(5, 7),
    "standardized": lambda: StandardizedConv2d(3, 16, 3),
    "standardized in groups": lambda: StandardizedConv2d(6, 16, 3, groups=2, dilation=2, padding=4),
    "standardized, half precision": lambda: StandardizedConv2d(3, 16, 3).half(),
    "centred": lambda: CentredLinear(5, 7),
    "centred, of zeros": lambda: nn.init.zeros_((layer := CentredLinear(5, 7)).weight) is None or layer,
    "transposed in groups": lambda: CentredTransposed(4, 6, 3, groups=2),
    "binary": lambda: BinaryLinear(5, 8),
    "centred signs": lambda: CentredSigns(6, 8),
}
USE = {
    "softmax": lambda: SoftmaxHead(5, 8),
    "normalized": lambda: NormalizedLinear(5, 8),
    "group norm and attention": lambda: GroupNormalizedConv2d(4, 8, 3),
    "by matmul": lambda: ByMatmul(6, 6),
    "ternary": lambda: TernaryLinear(5, 8),
    "low rank": lambda: LowRankLinear(5, 8),
    "scaled": lambda: ScaledLinear(5, 8),
    "two inputs": lambda: TwoInputs(5, 8),
    "padded": lambda: PaddedConv2d(4, 8, 3, stride=2),
}


@pytest.mark.parametrize("make", COMPUTE.values(), ids=COMPUTE)
def test_a_layer_that_computes_its_weight_is_refused_and_not_changed(make):
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"the forward of 0 \(.*\) computes its own weight from 0.weight.*exclude="):
        Sparsifier(nn.Sequential(layer, nn.Identity()))
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in before.items())
    assert layer.training


@pytest.mark.parametrize("make", COMPUTE.values(), ids=COMPUTE)
def test_it_can_be_left_out(make):
    model = nn.Sequential(make(), nn.Linear(4, 4))
    for options in ({"exclude": "0"}, {"layers": "1"}, {"exclude": type(model[0])}):
        sparsifier = Sparsifier(model, **options)
        assert list(sparsifier.masks) == ["1.weight"]


@pytest.mark.parametrize("make", USE.values(), ids=USE)
def test_a_layer_whose_zeros_last_is_pruned(make):
    sparsifier = Sparsifier(nn.Sequential(make()), layers="0")
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == 0.5


def test_whole_filters_of_standardized_weights_last():
    layer = StandardizedConv2d(3, 8, 3, bias=False)
    sparsifier = Sparsifier(nn.Sequential(layer), "filter", layers="0")
    sparsifier.sparsify(0.5)
    assert (layer(torch.rand(1, 3, 5, 5)).abs().amax((0, 2, 3)) == 0).sum() == 4


def test_layers_of_timm():
    layers = pytest.importorskip("timm.layers", reason="timm has layers that standardize their weights")
    for kind in (layers.StdConv2d, layers.ScaledStdConv2d, layers.StdConv2dSame):
        with pytest.raises(ValueError, match=f"{kind.__name__}. computes its own weight"):
            Sparsifier(nn.Sequential(kind(4, 8, 3)))
    Sparsifier(nn.Sequential(layers.Conv2dSame(4, 8, 3))).sparsify(0.5)


def test_random_numbers_of_the_user_stay_as_they_are():
    class Noisy(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight) + 0 * torch.rand(1)

    model = nn.Sequential(Noisy(4, 4))
    before = torch.get_rng_state()
    Sparsifier(model)
    assert torch.equal(torch.get_rng_state(), before)
