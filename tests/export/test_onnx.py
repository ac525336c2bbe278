"""Sparse and shrunk models leave torch by its own ONNX exporter, and give the same in onnxruntime."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsifai import Sparsifier, shrink

onnx = pytest.importorskip("onnx", reason="exported models are read with it")
pytest.importorskip("onnxscript", reason="torch's exporter is made with it")
onnxruntime = pytest.importorskip("onnxruntime", reason="exported models run in it")

TOLERANCE = 1e-5  # of outputs, relative to the largest of them


class Block(nn.Module):
    """Two convolutions with norm layers, and what comes in beside them."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, inputs):
        return F.relu(inputs + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(inputs))))))


def residual_net():
    """With running statistics that are not the first ones."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Block(16), Block(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12), nn.LayerNorm(12), nn.Linear(12, 4),
    )  # fmt: skip
    for _ in range(3):
        model(2 * images() + 1)
    return model


def images(batch=3, side=16):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


def export(model, example, path):
    """By torch's exporter, with a batch of any size; the tensors that the file has, by name."""
    with warnings.catch_warnings():
        # What torch and onnxscript say of their own insides.
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|onnxscript|onnx_ir|copyreg)\b")
        torch.onnx.export(
            model.eval(), (example,), path, dynamo=True, external_data=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded)
    return {each.name: onnx.numpy_helper.to_array(each) for each in loaded.graph.initializer}


def check_export(model, path, images):
    """A model gives the same in onnxruntime, for batches of several sizes, and its zeros are zeros there.

    Where the exporter folds norm layers into the convolutions before them, weights are scaled output by output, which
    leaves their zeros as they are; biases change, and norm layers go. So only weights are counted.
    """
    tensors = export(model, images(), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    for inputs in (images(), images(1), images(5)):
        with torch.no_grad():
            expected = model(inputs).numpy()
        (output,) = session.run(None, {name: inputs.numpy()})
        assert output.shape == expected.shape
        assert np.abs(output - expected).max() <= TOLERANCE * np.abs(expected).max()
    weights = {name: value.detach().numpy() for name, value in model.named_parameters() if value.dim() > 1}
    assert weights.keys() <= tensors.keys()
    for name, weight in weights.items():
        assert np.array_equal(tensors[name] == 0, weight == 0), name


def trained(model, sparsifier, sparsity, steps=3):
    """Made sparse and trained for some steps."""
    sparsifier.sparsify(sparsity)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        inputs = images(6 + step)
        F.cross_entropy(model(inputs), torch.arange(len(inputs)) % 4).backward()
        sparsifier.mask_moments(optimizer)
        optimizer.step()
        sparsifier.apply_masks()
        optimizer.zero_grad()
    assert sparsifier.sparsity == pytest.approx(sparsity, abs=0.05)
    return model.eval()


def test_a_sparse_model(tmp_path):
    model = residual_net()
    check_export(trained(model, Sparsifier(model), 0.8), tmp_path / "sparse.onnx", images)


def test_a_shrunk_model(tmp_path):
    pytest.importorskip("torch_pruning", reason="shrink asks it which channels go together")
    model = residual_net()
    # LayerNorm reads all that it is given, also what is zero.
    sparsifier = Sparsifier(model, "filter", "local", coupled=True, example_input=images(), exclude="7")
    small = shrink(trained(model, sparsifier, 0.5), images())
    assert small[3].conv1.out_channels == small[4].conv2.out_channels == 8
    check_export(model, tmp_path / "masked.onnx", images)
    check_export(small, tmp_path / "shrunk.onnx", images)
    parameters, left = (sum(each.numel() for each in of.parameters()) for of in (model, small))
    saved = (tmp_path / "masked.onnx").stat().st_size - (tmp_path / "shrunk.onnx").stat().st_size
    # Of float32, but for norm layers, where the exporter folds them.
    assert saved > 0.8 * 4 * (parameters - left) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_models_of_torchvision_shrunk_and_sparse(tmp_path, name):
    pytest.importorskip("torch_pruning", reason="shrink asks it which channels go together")
    models = pytest.importorskip("torchvision.models", reason="the models are torchvision's")
    torch.manual_seed(0)
    model, pictures = models.get_model(name, weights=None, num_classes=10).eval(), partial(images, side=64)
    Sparsifier(model, "filter", "local", coupled=True, example_input=pictures()).sparsify(0.5)
    small = shrink(model, pictures())
    Sparsifier(small).sparsify(0.8)
    check_export(small, tmp_path / "shrunk.onnx", pictures)
    # The graph itself takes some bytes, too.
    assert (tmp_path / "shrunk.onnx").stat().st_size < 0.6 * sum(each.nbytes for each in model.parameters())
