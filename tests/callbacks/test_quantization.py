"""Quantization-aware training beside sparsity: torch's own flow keeps the zeros, from fake quantization to integers."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsifai import KeepSparsity, Sparsifier, SparsifyCallback, shrink

quantization = pytest.importorskip("torch.ao.quantization", reason="torch's own quantization, where it is still there")

# torch says that its flow moves to another package; the module itself is what this is about.
pytestmark = pytest.mark.filterwarnings("ignore:.*(quantization|reduce_range|observer|erase_node).*")


class Net(nn.Module):
    """A fused convolution with norm and ReLU, a grouped one, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(self.quant(x))))
        x = F.adaptive_avg_pool2d(self.grouped(x), 1).flatten(1)
        return self.dequant(self.last(F.relu(self.first(x))))


def prepare(model):
    """What torch's flow does before training, in place."""
    supported = torch.backends.quantized.supported_engines
    engine = next((each for each in ("x86", "fbgemm", "qnnpack") if each in supported), None)
    if engine is None:
        pytest.skip("this torch is built without an engine for quantized layers")
    torch.backends.quantized.engine = engine
    quantization.fuse_modules_qat(model.train(), [["conv", "norm", "relu"]], inplace=True)
    model.qconfig = quantization.get_default_qat_qconfig(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.prepare_qat(model, inplace=True)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 4, 8, 8, generator=generator), torch.randint(3, (16,), generator=generator)


def integers(module):
    return module.weight().int_repr()


def trained(sparsifier, model, steps=8):
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(steps):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        sparsifier.mask_gradients()
        optimizer.step()
        sparsifier.sparsify(0.75 * (step + 1) / steps)
        sparsifier.mask_moments(optimizer)


@pytest.mark.parametrize("context", ["global", "2:4"])
def test_zeros_are_zeros_when_fake_quantized_and_as_integers(context):
    model = prepare(Net())
    sparsifier = Sparsifier(model, context=context)
    trained(sparsifier, model) if context == "global" else sparsifier.sparsify(0.5)
    model(batch(9)[0])  # so that all observers have seen something
    masks = {name.removesuffix(".weight"): mask for name, mask in sparsifier.masks.items()}
    assert set(masks) == {"conv", "grouped", "first", "last"}
    for name, mask in masks.items():
        module = model.get_submodule(name)
        assert not mask.all()
        fake = module.weight_fake_quant(module.weight)
        assert (fake[~mask] == 0).all()
        assert (fake[mask] != 0).any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = quantization.convert(model.eval())
    for name, mask in masks.items():
        assert (integers(converted.get_submodule(name))[~mask] == 0).all()
    assert converted(batch(10)[0]).shape == (16, 3)


@pytest.mark.parametrize("granularity", ["filter", "channel"])
def test_whole_outputs_and_inputs_are_refused_once_a_model_is_prepared(granularity):
    with pytest.raises(ValueError, match="sparsify the model before preparing it"):
        Sparsifier(prepare(Net()), granularity, example_input=batch(0)[0])


@pytest.mark.fastai
def test_in_a_learner_the_zeros_of_a_prepared_model_are_kept():
    fastai = pytest.importorskip("fastai.vision.all", reason="a Learner is fastai's")
    from sparsifai import SparsifyCallback

    inputs, labels = batch(0)
    loader = [fastai.DataLoader(list(zip(inputs, labels, strict=True)), bs=4) for _ in range(2)]
    learn = fastai.Learner(fastai.DataLoaders(*loader, device="cpu"), prepare(Net()), loss_func=nn.CrossEntropyLoss())
    callback = SparsifyCallback(0.75)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, cbs=callback)
    assert callback.sparsifier.sparsity == pytest.approx(0.75, abs=1e-3)
    for name, mask in callback.sparsifier.masks.items():
        module = learn.model.get_submodule(name.removesuffix(".weight"))
        assert (module.weight_fake_quant(module.weight)[~mask] == 0).all()


def test_a_sparse_model_stays_sparse_when_it_is_prepared_and_trained_further():
    model = Net()
    sparsifier = Sparsifier(model)
    sparsifier.sparsify(0.8)
    kept = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    prepare(model)
    second = Sparsifier(model)  # preparing makes modules of other kinds, under the same names
    second.recover_masks()
    assert all(torch.equal(second.masks[name.replace("conv.0.", "conv.")], mask) for name, mask in kept.items())
    before = second.sparsity
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    for step in range(4):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        second.mask_gradients()
        optimizer.step()
        second.apply_masks()
    assert second.sparsity == before >= 0.8 - 1e-3


class Convolutions(nn.Module):
    """Two convolutions with norm layers that are fused, and a classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.second, self.last = nn.Conv2d(8, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        x = self.second(self.relu(self.norm(self.conv(self.quant(x)))))
        return self.dequant(self.last(F.adaptive_avg_pool2d(x, 1).flatten(1)))


def with_pruned_filters():
    model = Convolutions()
    Sparsifier(model, "filter", "local").sparsify(0.5)
    return model


@pytest.mark.parametrize(
    "use",
    [
        lambda model: Sparsifier(model),
        lambda model: Sparsifier(model, "filter", layers="second"),
        lambda model: shrink(model, batch(0)[0]),
        lambda model: learner(model).fit(1, cbs=KeepSparsity()),
        lambda model: learner(model).fit(1, cbs=SparsifyCallback(0.5)),
    ],
    ids=["Sparsifier", "filters", "shrink", "KeepSparsity", "SparsifyCallback"],
)
def test_pruned_filters_that_quantization_aware_training_would_divide_by_are_refused(use):
    model = prepare(with_pruned_filters())
    with torch.no_grad():
        assert model(batch(0)[0]).isnan().all()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"divides by the scales of the batch norms that are fused into Conv") as error:
        use(model)
    assert "conv (4). The outputs would be NaN; call shrink(model, example_input) before fuse_modules_qat" in str(
        error.value
    )
    assert all(torch.equal(value.nan_to_num(), state[name].nan_to_num()) for name, value in model.state_dict().items())


def test_a_model_that_was_shrunk_before_trains_in_it():
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    model = prepare(shrink(with_pruned_filters().eval(), batch(0)[0]))
    assert model.conv.out_channels == 4
    sparsifier = Sparsifier(model)
    trained(sparsifier, model)
    assert sparsifier.sparsity == pytest.approx(0.75, abs=0.01)
    assert model(batch(0)[0]).isfinite().all()


def learner(model):
    from fastai.vision.all import DataLoader, DataLoaders, Learner

    pairs = [(inputs, label) for inputs, label in zip(*batch(0), strict=True)]
    dls = DataLoaders(DataLoader(pairs, bs=4), DataLoader(pairs, bs=4), device="cpu")
    return Learner(dls, model, loss_func=nn.CrossEntropyLoss())
