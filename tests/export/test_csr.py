"""CSR on a CPU: which layers are converted, the outputs of a converted model, and what is refused."""

import copy
import io
import pickle

import pytest
import torch
from csr_models import varied
from torch import nn

from sparsifai import Sparsifier, to_sparse_layout
from sparsifai.export.csr import CSRLinear
from sparsifai.model.zeros import Count

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch needs MKL to multiply with CSR")


def net(level=0.95, bias=True):
    """Two layers that are large enough to be converted, the first without an activation after it, and two others."""
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(512, 2048, bias=bias),
        nn.Sequential(nn.Linear(2048, 1024, bias=bias)), nn.ReLU(), nn.Linear(1024, 10),
    )  # fmt: skip
    Sparsifier(model, context="local").sparsify(level)
    return model.eval()


INPUTS = (torch.arange(5 * 2 * 10 * 10).float().view(5, 2, 10, 10) / 37).sin()


@pytest.mark.parametrize("bias", [True, False])
def test_the_copy_has_the_same_outputs_and_the_model_is_unchanged(bias):
    model = net(bias=bias)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    converted = to_sparse_layout(model)
    assert [type(part) for part in converted] == [nn.Conv2d, nn.Flatten, CSRLinear, nn.Sequential, nn.ReLU, nn.Linear]
    assert isinstance(converted[3][0], CSRLinear)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not converted.training
    assert not any(part.training for part in converted.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in converted.parameters())
    for batch in (0, 1, 2, 5):
        torch.testing.assert_close(converted(INPUTS[:batch]), model(INPUTS[:batch]).detach(), atol=1e-5, rtol=1e-5)
    # 5 % of the weights are stored, as a copy of those of the model.
    assert len(converted[2].values) == round(0.05 * 512 * 2048)
    with torch.no_grad():
        expected = converted(INPUTS)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(converted(INPUTS), expected)


def test_inputs_of_any_shape():
    # 90 % of these weights is not a whole number, and is rounded down.
    layer = nn.Linear(512, 2063)
    Sparsifier(nn.Sequential(layer), layers=["0"]).sparsify(0.9)
    converted = to_sparse_layout(layer.eval(), 0.9)
    assert isinstance(converted, CSRLinear)
    for shape in ((512,), (1, 512), (3, 1, 512), (3, 5, 512), (7, 512)):
        inputs = torch.randn(shape).transpose(0, -1).contiguous().transpose(0, -1)
        output = converted(inputs)
        torch.testing.assert_close(output, layer(inputs).detach(), atol=1e-5, rtol=1e-5)
        assert output.is_contiguous()
    assert "in_features=512, out_features=2063, bias=True, stored=105626" in repr(converted)


def test_a_converted_model_is_copied_saved_and_pickled():
    converted = to_sparse_layout(net())
    expected = converted(INPUTS)
    assert torch.equal(copy.deepcopy(converted)(INPUTS), expected)
    assert torch.equal(pickle.loads(pickle.dumps(converted))(INPUTS), expected)
    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(converted)
    assert {"2.rows", "2.columns", "2.values", "2.bias"} <= other.state_dict().keys()
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(INPUTS), expected)


def test_a_layer_with_two_names_in_a_wrapper():
    layer = nn.Linear(1024, 1024)
    Sparsifier(nn.Sequential(layer), layers=["0"]).sparsify(0.8)
    converted = to_sparse_layout(nn.DataParallel(nn.Sequential(layer, nn.ReLU(), layer)).eval())
    assert converted[0] is converted[2]
    assert isinstance(converted[0], CSRLinear)


def test_code_that_reads_the_dtype_of_the_weight():
    """T5 does so, to cast its input."""

    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1024, 1024)

        def forward(self, inputs):
            return self.layer(inputs.to(self.layer.weight.device, self.layer.weight.dtype))

    model = Asking().eval()
    Sparsifier(model).sparsify(0.9)
    converted, inputs = to_sparse_layout(model), torch.randn(3, 1024).double()
    assert torch.allclose(converted(inputs), model(inputs), atol=1e-5)
    assert torch.equal(converted.layer.weight.to_dense(), model.layer.weight)


def test_why_layers_stay_dense():
    model = varied()
    with pytest.raises(ValueError, match="no layer of ModuleDict") as raised:
        to_sparse_layout(model)
    for reason in (
        "small.weight (fewer than 1,048,576 weights)", "full.weight (50.00% zeros)",
        "precise.weight (float64: float32 is needed)", "hooked.weight (has hooks)", "conv.weight (not ",
    ):  # fmt: skip
        assert reason in str(raised.value)
    assert isinstance(to_sparse_layout(model, sparsity=0.5)["full"], CSRLinear)


def test_a_model_that_cannot_be_converted_is_refused():
    with pytest.raises(ValueError, match="no layer"):
        to_sparse_layout(nn.ReLU().eval())
    with pytest.raises(ValueError, match="training mode"):
        to_sparse_layout(net().train())
    with pytest.raises(TypeError):
        to_sparse_layout(3)
    with pytest.raises(ValueError, match="percentage"):
        to_sparse_layout(net(), 90)


def test_a_machine_without_mkl_is_refused(monkeypatch):
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: False)
    with pytest.raises(RuntimeError, match="MKL"):
        to_sparse_layout(net())


def test_weights_elsewhere_than_on_the_cpu_are_refused(monkeypatch):
    # Every machine has the meta device. Zeros cannot be counted there.
    monkeypatch.setattr(Count, "of", lambda *weights: Count(1024, 1024))
    with pytest.raises(RuntimeError, match="meta"):
        to_sparse_layout(nn.Linear(1024, 1024, device="meta").eval())


def test_a_layer_with_other_outputs_is_an_error(monkeypatch):
    class Wrong(CSRLinear):
        def __init__(self, weight, bias):
            super().__init__(weight, bias)
            if len(weight) == 1024:
                self.values[5] *= -1

    monkeypatch.setattr("sparsifai.export.csr.CSRLinear", Wrong)
    with pytest.raises(RuntimeError, match=r"3\.0\.weight"):
        to_sparse_layout(net())
