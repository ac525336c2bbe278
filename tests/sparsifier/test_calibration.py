"""Calibration: what it refuses, and that it leaves no trace."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_net
from torch import nn
from updates import BAD_CALIBRATIONS, batches

from sparsifai import Sparsifier, Sparsify, quantize, sensitivity


@pytest.fixture
def net():
    return small_net().eval()


def test_calibration_leaves_no_trace():
    model = small_net().train()
    model.insert(3, nn.Dropout(0.5))
    gradient = torch.randn_like(model[0].weight)
    model[0].weight.grad = gradient
    before, kept = copy.deepcopy(model.state_dict()), gradient.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    class Drawn:
        def __iter__(self):
            for inputs, labels in batches():
                random.random(), np.random.rand()
                yield inputs + torch.randn(1), labels

    for criterion in ("snip", "grasp", "wanda", "synflow"):
        sparsifier = Sparsifier(model, criteria=criterion, example_input=batches()[0][0])
        sparsifier.calibrate(Drawn(), F.cross_entropy)
        sparsifier.check(0.5)
        assert model.training
        assert all(module.training for module in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model[0].weight.grad is gradient
        assert torch.equal(gradient, kept)
        assert all(parameter.grad is None for parameter in list(model.parameters())[1:])
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert (np.random.get_state()[1] == states[2]).all()
        assert sparsifier.collected.source.inputs == {}
        assert sparsifier.collected.source.loss is None


class Forgetful(nn.Module):
    """Keeps buffers that its forward makes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("seen", None)

    def forward(self, x):
        self.seen = x.mean()
        if "made" not in self._buffers:
            self.register_buffer("made", torch.ones(2))
        return self.layer(x)


def test_calibration_makes_no_optimizer_step_and_adds_no_buffer():
    model = Forgetful()
    weight, stepped = model.layer.weight, []
    weight.register_post_accumulate_grad_hook(lambda parameter: stepped.append(parameter))
    scale = nn.Parameter(torch.ones(()))
    sparsifier = Sparsifier(model, criteria="snip")
    sparsifier.calibrate([(torch.randn(5, 4), torch.zeros(5).long())], lambda out, y: scale * F.cross_entropy(out, y))
    assert not stepped
    assert scale.grad is None
    assert model.seen is None
    assert "made" not in model._buffers


def test_the_generators_of_data_loaders_are_restored():
    data = torch.utils.data.TensorDataset(torch.randn(8, 2, 8, 8), torch.randint(3, (8,)))
    generator = torch.Generator().manual_seed(1)
    loader = torch.utils.data.DataLoader(data, 4, shuffle=True, generator=generator)
    before, outside = generator.get_state(), torch.get_rng_state()
    sparsifier = Sparsifier(small_net(), criteria="snip")
    outside = torch.get_rng_state()
    sparsifier.calibrate(loader, F.cross_entropy)
    sparsifier.sparsify(0.5, steps=3)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), outside)


def test_after_calibration_autocast_reuses_no_earlier_weights(net):
    with torch.autocast("cpu", torch.bfloat16):
        sparsifier = Sparsifier(net, criteria="snip")
        sparsifier.calibrate(batches(1), F.cross_entropy)
        sparsifier.sparsify(0.9)
        inputs = batches(1)[0][0]
        seen = net(inputs)
        torch.clear_autocast_cache()
        assert torch.equal(seen, net(inputs))


@pytest.mark.parametrize("mistake", BAD_CALIBRATIONS)
def test_a_calibration_that_fails_changes_nothing(mistake, net):
    criterion, given, loss = BAD_CALIBRATIONS[mistake]
    sparsifier = Sparsifier(net, criteria=criterion)
    sparsifier.calibrate(batches(1), F.cross_entropy)
    before = sparsifier.collected.state()
    with pytest.raises((TypeError, ValueError), match="calibrate|activation"):
        sparsifier.calibrate(given, loss)
    after = sparsifier.collected.state()
    assert after["counts"] == before["counts"]
    assert all(
        torch.equal(value, before["stored"][quantity][name])
        for quantity, values in after["stored"].items()
        for name, value in values.items()
    )
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_batch_that_fails_drops_the_batches_before_it(net):
    sparsifier = Sparsifier(net, criteria="snip")
    sparsifier.calibrate(batches(1), F.cross_entropy)
    before = sparsifier.collected.state()
    with pytest.raises(ValueError, match="batch 2"):
        sparsifier.calibrate([*batches(2)[1:], (torch.randn(4, 5, 8, 8), torch.zeros(4).long())], F.cross_entropy)
    assert sparsifier.collected.counts == before["counts"]
    assert all(
        torch.equal(value, before["stored"]["grad"][name])
        for name, value in sparsifier.collected.stored["grad"].items()
    )


def test_a_linear_loss_has_no_hessian_and_a_frozen_layer_no_gradient():
    model = nn.Sequential(nn.Linear(3, 2))
    sparsifier = Sparsifier(model, criteria="grasp", layers="0")
    sparsifier.calibrate([(torch.ones(1, 3), torch.zeros(1))], lambda output, target: output.sum())
    assert (sparsifier.collected.stored["hessian_grad"]["0.weight"] == 0).all()
    model[0].weight.requires_grad_(False)
    for criterion in ("grasp", "snip"):
        with pytest.raises(ValueError, match="frozen"):
            Sparsifier(model, criteria=criterion, layers="0").calibrate(
                [(torch.ones(1, 3), torch.zeros(1))], lambda output, target: output.square().sum()
            )
    sparsifier = Sparsifier(model, criteria="snip", layers="0")
    sparsifier.mask_gradients()  # there is no gradient to collect


def test_wanda_names_attention_whose_inputs_it_cannot_see():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match="in_proj_weight"):
        Sparsifier(layer, criteria="wanda").calibrate([torch.randn(2, 5, 8)])
    with pytest.raises(ValueError, match="out_proj.weight"):
        Sparsifier(layer, criteria="wanda", exclude="*in_proj*").calibrate([torch.randn(2, 5, 8)])
    sparsifier = Sparsifier(layer, context="2:4", criteria="wanda", exclude="self_attn")
    sparsifier.calibrate([torch.randn(2, 5, 8)])
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == 0.5


class WithDeadLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("criterion", ["snip", "grasp", "wanda", "synflow"])
def test_a_layer_that_is_not_used_is_named(criterion):
    batch = (torch.randn(5, 4), torch.randint(3, (5,)))
    sparsifier = Sparsifier(WithDeadLayer(), criteria=criterion, example_input=batch[0])

    def calibrate_and_sparsify():
        sparsifier.calibrate([batch], F.cross_entropy)
        sparsifier.sparsify(0.5)

    with pytest.raises(ValueError, match=r"unused\.weight"):
        calibrate_and_sparsify()
    assert sparsifier.sparsity == 0
    sparsifier = Sparsifier(WithDeadLayer(), criteria=criterion, exclude="unused", example_input=batch[0])
    sparsifier.calibrate([batch], F.cross_entropy)
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == 0.5


@torch.inference_mode()
def made_under_inference_mode():
    return torch.randn(5, 4), torch.randint(3, (5,)), nn.Linear(4, 3)


@pytest.mark.parametrize("criterion", ["snip", "grasp", "wanda", "taylor"])
@pytest.mark.parametrize("inside", [False, True])
def test_batches_made_under_inference_mode(criterion, inside):
    inputs, targets, _ = made_under_inference_mode()
    torch.manual_seed(0)
    model, masks = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), []
    for batch in ((inputs, targets), (inputs.clone(), targets.clone())):
        sparsifier = Sparsifier(copy.deepcopy(model), criteria=criterion)
        with torch.inference_mode(inside):
            sparsifier.calibrate([batch], F.cross_entropy)
        sparsifier.sparsify(0.5)
        masks.append(sparsifier.masks)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_targets_and_dictionaries_made_under_inference_mode():
    model, batch = nn.Linear(4, 3), dict(zip(("input", "target"), made_under_inference_mode(), strict=False))
    model.forward = lambda input, target: F.linear(input, model.weight, model.bias)
    sparsifier = Sparsifier(model, criteria="snip", layers="*")
    sparsifier.calibrate([batch], lambda output, batch: F.cross_entropy(output, batch["target"]))
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == 0.5


def test_a_model_made_under_inference_mode_is_refused():
    inputs, targets, model = made_under_inference_mode()
    sparsifier = Sparsifier(model, criteria="snip", layers="*")
    with pytest.raises(ValueError, match=r"^calibrate: the tensors of Linear were made under torch.inference_mode"):
        sparsifier.calibrate([(inputs, targets)], F.cross_entropy)
    sparsifier = Sparsifier(copy.deepcopy(model), criteria="snip", layers="*")
    sparsifier.calibrate([(inputs, targets)], F.cross_entropy)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_single_batch_is_not_taken_for_several(net, kind):
    batch, told = kind(batches()[0]), r"put it in a list, \[\(inputs, targets\)\]"
    sparsifier = Sparsifier(net, criteria="snip")
    with pytest.raises(TypeError, match=f"^calibrate: batches is a list of batches, and this is one .*{told}"):
        sparsifier.calibrate(batch, F.cross_entropy)
    with pytest.raises(TypeError, match=f"^calibration is a list of batches.*{told}"):
        Sparsify(0.5, criteria="snip", calibration=batch)
    with pytest.raises(TypeError, match=f"^quantize: calibration is a list of batches.*{told}"):
        quantize(net, batch, "model.onnx")
    with pytest.raises(TypeError, match=told):
        sensitivity(net, lambda model: 0.0, criteria="snip", calibration=batch, loss_func=F.cross_entropy)


def test_a_list_of_inputs_is_several_batches(net):
    sparsifier = Sparsifier(net, criteria="wanda")
    sparsifier.calibrate([inputs for inputs, _ in batches()])
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == pytest.approx(0.5, abs=0.01)
