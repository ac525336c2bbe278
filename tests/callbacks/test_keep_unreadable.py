"""KeepSparsity on models whose data flow cannot be read: it keeps their zeros, and says what it cannot keep."""

import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("fastai.vision.all", reason="the callbacks are fastai's")

from conftest import small_learner  # noqa: E402

from sparsifai import KeepSparsity, Sparsifier, SparsifyCallback  # noqa: E402

quantization = pytest.importorskip("torch.ao.quantization", reason="torch's own quantization, where it is still there")
pytestmark = [
    pytest.mark.fastai,
    pytest.mark.filterwarnings("ignore:.*(quantization|reduce_range|observer|erase_node).*"),
]


class Branching(nn.Module):
    """Decides by its data, so that no trace of it exists."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Conv2d(2, 20, 3), nn.BatchNorm2d(20), nn.Linear(20, 3)

    def forward(self, x):
        x = self.norm(self.body(x))
        if float(x.detach().sum()) > 1e9 or not self.training and float(x.detach().sum()) < -1e9:
            x = -x
        return self.head(torch.relu(x).mean((2, 3)))


def branching(granularity, sparsity):
    model = Branching()
    if granularity == "filter":  # a Sparsifier refuses it, since it would need the data flow
        with torch.no_grad():
            model.body.weight[: int(20 * sparsity)] = 0
    else:
        Sparsifier(model, granularity, "local", layers="body").sparsify(sparsity)
    return model


def prepared(granularity, sparsity):
    """A model that is pruned and then prepared for quantization."""
    model = nn.Sequential(
        quantization.QuantStub(), nn.Conv2d(2, 20, 3), nn.ReLU(), nn.Conv2d(20, 8, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 3), quantization.DeQuantStub(),
    )  # fmt: skip
    Sparsifier(model, granularity, "local", layers=["1", "3"]).sparsify(sparsity)
    quantization.fuse_modules_qat(model.train(), [["1", "2"]], inplace=True)
    model.qconfig = quantization.get_default_qat_qconfig("qnnpack")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.prepare_qat(model, inplace=True)


MODELS = {"prepared for quantization": prepared, "branching": branching}
# The zeros of single weights can fill whole rows by chance, as of 95 % with 18 weights in a filter.
ASKED = {
    "single weights": ("weight", 0.5),
    "single weights in whole filters": ("weight", 0.95),
    "filters": ("filter", 0.5),
}


@pytest.mark.filterwarnings("ignore:whole filters are zero")
@pytest.mark.parametrize("given", ["KeepSparsity", "SparsifyCallback"])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("kind", MODELS)
def test_zeros_of_a_model_that_cannot_be_read_are_kept(kind, asked, given):
    model = MODELS[kind](*ASKED[asked])
    zeros = {name: parameter == 0 for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert sum(int(zero.sum()) for zero in zeros.values()) > 100
    callback = KeepSparsity() if given == "KeepSparsity" else SparsifyCallback(0.96, context="local")
    learn = small_learner(model)
    learn.fit(2, 0.05, cbs=callback)
    assert all(bool((model.get_parameter(name)[zero] == 0).all()) for name, zero in zeros.items())


@pytest.mark.parametrize("kind", MODELS)
def test_single_weights_are_kept_without_a_word_of_whole_outputs(kind):
    learn = small_learner(MODELS[kind](*ASKED["single weights"]))
    learn.fit(1, 0.05, cbs=KeepSparsity())


@pytest.mark.parametrize(("asked", "told"), [("single weights in whole filters", False), ("filters", True)])
def test_zeros_of_biases_that_may_not_be_kept_are_told_if_there_are_any(asked, told):
    learn = small_learner(prepared(*ASKED[asked]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learn.fit(1, 0.05, cbs=KeepSparsity())
    texts = [str(each.message) for each in caught if "whole filters are zero" in str(each.message)]
    assert len(texts) == told
    assert all("zeros in biases and norm layers behind them, such as 1.bias, may not be kept" in text for text in texts)
