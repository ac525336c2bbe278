"""Zeros of quantized, packed, tied and shared weights, in the report and in the count."""

import warnings

import pytest
import torch
from torch import nn

from sparsifai import Report, Sparsifier
from sparsifai.model.zeros import Count

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch: its quantization is deprecated


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    Sparsifier(model, context="local").sparsify(0.5)
    return model


def rows(model):
    return {row.name: (row.count, row.why_dense) for row in Report.of(model).rows}


@pytest.mark.parametrize("zero_point", [0, 3])
def test_an_integer_is_zero_if_it_is_the_zero_point(zero_point):
    weight = torch.tensor([[0.0, 0.1, -0.2, 0.0, -0.3, 0.04]])
    of_tensor = torch.quantize_per_tensor(weight, 0.1, zero_point, torch.qint8)
    assert Count.of(of_tensor) == Count(6, 3)  # 0.04 is rounded to zero
    scales, points = torch.tensor([0.1, 0.1]), torch.tensor([zero_point, -7])
    assert Count.of(torch.quantize_per_channel(weight.repeat(2, 1), scales, points, 0, torch.qint8)) == Count(12, 6)


def test_layers_of_torch_are_counted():
    quantization = pytest.importorskip("torch.ao.quantization", reason="torch's own quantization")
    model = net()
    zeros = [int((model[place].weight == 0).sum()) for place in (0, 2)]
    dynamic = quantization.quantize_dynamic(model, {nn.Linear})
    found = rows(dynamic)
    assert {why for _, why in found.values()} == {"quantized (qint8)"}
    counts = [count for count, _ in found.values()]
    assert [count.weights for count in counts] == [2048, 2048]
    assert all(zero <= count.zeros < zero + 300 for zero, count in zip(zeros, counts, strict=True))
    assert Report.of(dynamic).model.weights == 2 * 2048 + 64 + 32


class Integers(torch.Tensor):
    """Integers with a scale, as the weights of torchao are."""

    @staticmethod
    def __new__(cls, integers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=torch.float32)

    def __init__(self, integers, scale):
        self.integers, self.scale = integers, scale

    def __tensor_flatten__(self):
        return ["integers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return cls(args[0].integers, args[0].scale) if function == torch.ops.aten.detach.default else NotImplemented

    def dequantize(self):
        return self.integers * self.scale


def test_weights_of_torchao_are_counted():
    model = net()
    integers = (model[0].weight.detach() * 100).round().to(torch.int8)
    model[0].weight = nn.Parameter(Integers(integers, torch.tensor(0.01)))
    count, why = rows(model)["0.weight"]
    assert (count, why) == (Count(2048, int((integers == 0).sum())), "")
    with pytest.warns(UserWarning, match="0.weight"):
        sparsifier = Sparsifier(model)
    assert list(sparsifier.masks) == ["2.weight"]


def test_torchao_itself():
    torchao = pytest.importorskip("torchao.quantization", reason="its weights are counted")
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert Report.of(model).model.zeros >= 2048


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.register_buffer("qweight", torch.zeros(4, 2, dtype=torch.int32))


def test_packed_weights_are_not_counted_and_said():
    report = Report.of(Packed())
    assert list(report.not_counted) == ["qweight"]
    assert report.not_counted["qweight"].startswith("packed (GPTQ and the like): each number holds several weights")
    assert (report.left_out, report.model) == (8, Count(20, 0))
    assert {row.name: row.why_dense for row in report.rows} == {"head.weight": "", "qweight": "not counted"}


def test_bitsandbytes_of_four_bits_is_not_counted():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    model[0].weight.quant_state = "of bitsandbytes"
    assert "of bitsandbytes, which packs several weights" in Report.of(model).not_counted["0.weight"]


def test_tied_weights_and_shared_modules_are_counted_once_and_listed():
    model = net()
    model.append(nn.Linear(32, 32))
    model.append(model[3])
    model.append(nn.Linear(64, 32))
    model[5].weight = model[2].weight
    found, report = rows(model), Report.of(model)
    assert found["4.weight"] == (Count(0, 0), "tied to 3.weight")
    assert found["5.weight"] == (Count(0, 0), "tied to 2.weight")
    assert report.model.weights == sum(each.numel() for each in model.parameters())
    lines = {line.split()[0]: line.split() for line in str(report).splitlines()}
    assert lines["4.weight"] == ["4.weight", "Linear", "32x32", "tied", "to", "3.weight"]
    assert Report.of(model[:3]).rows[0].why_dense == ""
