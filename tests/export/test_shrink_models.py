"""Models that people use, made sparse by coupled filters: all that is zero can be removed, and the outputs stay."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("torch_pruning", reason="shrink asks torch-pruning which channels go together")
torchvision = pytest.importorskip("torchvision", reason="its models are those that are tried")

from sparsifai import Sparsifier, shrink, shrinkage  # noqa: E402

NAMES = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "vgg11_bn", "efficientnet_b0")


def densenet():
    """DenseNet-121 with fewer layers: its many concatenations take their time."""
    return torchvision.models.DenseNet(growth_rate=12, block_config=(3, 4, 3), num_init_features=24, num_classes=10)


def build(name):
    if name == "densenet":
        return densenet()
    if name.startswith("xresnet"):
        xresnet = pytest.importorskip("fastai.vision.models.xresnet", reason="a model of fastai")
        return getattr(xresnet, name)(n_out=10)
    if name == "unet":
        vision = pytest.importorskip("fastai.vision.all", reason="a model of fastai")
        return vision.DynamicUnet(vision.create_body(torchvision.models.resnet18(weights=None)), 3, (64, 64))
    model = getattr(torchvision.models, name)(weights=None, num_classes=10)
    if name.startswith("vgg"):  # 120 million weights of its classifier would only take time
        model.classifier = torch.nn.Sequential(torch.nn.Linear(25088, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    return model


def outputs_stay(model, small):
    for shape in ((2, 3, 64, 64), (1, 3, 96, 96)):
        example = torch.randn(shape)
        with torch.no_grad():
            expected, got = model(example), small(example)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def trained_a_little(model):
    """With running statistics of norm layers that fit, and biases of those that are not zero."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "densenet", "xresnet18", "unet"])
def test_all_that_falls_together_goes(name):
    torch.manual_seed(0)
    model = trained_a_little(build(name))
    example = torch.randn(1, 3, 64, 64)
    Sparsifier(model, "filter", "local", coupled=True, example_input=example).sparsify(0.5)
    small = shrink(model, example)  # without a warning: nothing has to stay
    before, after = (sum(parameter.numel() for parameter in each.parameters()) for each in (model, small))
    assert after < 0.55 * before
    outputs_stay(model, small)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "xresnet18"])
def test_of_what_falls_apart_the_rest_is_named(name):
    torch.manual_seed(0)
    model = trained_a_little(build(name))
    example = torch.randn(1, 3, 64, 64)
    Sparsifier(model, "filter", "local").sparsify(0.5)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small = shrink(model, example)
    outputs_stay(model, small)
    report = shrinkage(model, example)
    assert str(caught[0].message).startswith(f"shrink: {report.zeros_left} of {report.zeros} filters of zeros stay: ")
    assert report.removed > 0
    assert all(bool(layer.why) == bool(layer.zeros_left) for layer in report.layers)
    assert not any("not followed" in layer.why for layer in report.layers), report
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
