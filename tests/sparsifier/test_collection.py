"""Quantities that look at data: what they are, where they are collected, and that collecting leaves no trace."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_net
from torch import nn

from sparsifai import Sparsifier, criteria, quantities, taken
from sparsifai.sparsifier.collection import CollectedQuantities


def batches(count=3):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(4, 2, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator))
        for _ in range(count)
    ]


def mean_gradients(model, seen):
    """dL/dw of each batch, plainly."""
    gradients = []
    for inputs, labels in seen:
        model.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    model.zero_grad()
    return gradients


@pytest.fixture
def net():
    return small_net().eval()


def scores_of(sparsifier, name):
    """What the criterion scores, of the quantities as they are."""
    values = {each: sparsifier.collected.value(each, name, sparsifier) for each in sparsifier.collected.named}
    return sparsifier.criteria(**values)


FORMULAS = {
    "snip": lambda weight, gradients: (weight * torch.stack(gradients).mean(0)).abs(),
    "taylor": lambda weight, gradients: weight * torch.stack(gradients).mean(0),
    "fisher": lambda weight, gradients: weight**2 * (torch.stack(gradients) ** 2).mean(0) / 2,
    "movement_pruning": lambda weight, gradients: -(weight * torch.stack(gradients)).mean(0),
}


@pytest.mark.parametrize("criterion", FORMULAS)
def test_criteria_of_gradients_are_their_formulas(net, criterion):
    gradients = mean_gradients(copy.deepcopy(net), batches())
    sparsifier = Sparsifier(net, criteria=criterion)
    sparsifier.calibrate(batches(), F.cross_entropy)
    for name, target in sparsifier.targets.items():
        expected = FORMULAS[criterion](target.parameter.detach(), [each[name] for each in gradients])
        assert torch.allclose(scores_of(sparsifier, name), expected, rtol=1e-4, atol=1e-9)
        assert expected.abs().max() > 0


def test_grasp_is_the_weight_times_the_hessian_times_the_gradient():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs, labels = torch.randn(5, 3), torch.randint(2, (5,))
    sparsifier = Sparsifier(model, criteria="grasp")
    sparsifier.calibrate([(inputs, labels)], F.cross_entropy)
    names = list(sparsifier.targets)
    weights = [model.get_parameter(name) for name in names]

    def loss(*weights):
        output = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (inputs,))
        return F.cross_entropy(output, labels)

    hessian = torch.autograd.functional.hessian(loss, tuple(weights))
    gradients = torch.autograd.grad(loss(*weights), weights)
    for row, name in enumerate(names):
        product = sum(
            hessian[row][column].reshape(weights[row].numel(), -1) @ gradients[column].flatten()
            for column in range(len(names))
        )
        expected = weights[row] * product.view_as(weights[row])
        assert torch.allclose(scores_of(sparsifier, name), expected, rtol=1e-3, atol=1e-7)


def test_synflow_conserves_the_flow_through_every_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False),
    )  # fmt: skip
    sparsifier = Sparsifier(model, criteria="synflow", example_input=torch.randn(7, 3, 8, 8))
    sums = [float(scores_of(sparsifier, name).sum()) for name in sparsifier.targets]
    positive = copy.deepcopy(model).double()
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()
        expected = float(positive(torch.ones(1, 3, 8, 8, dtype=torch.float64)).sum())
    assert sums == pytest.approx([expected] * 4, rel=1e-12)


LAYERS = {
    "linear": (nn.Linear(5, 4), torch.randn(6, 5)),
    "linear over a sequence": (nn.Linear(5, 4), torch.randn(6, 7, 5)),
    "linear of one example": (nn.Linear(5, 4), torch.randn(5)),
    "convolution": (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 8, 8)),
    "convolution of one example": (nn.Conv2d(4, 6, 3), torch.randn(4, 8, 8)),
    "grouped convolution": (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 8, 8)),
    "depthwise convolution": (nn.Conv1d(4, 4, 3, groups=4), torch.randn(2, 4, 8)),
    "transposed convolution": (nn.ConvTranspose2d(4, 6, 3), torch.randn(2, 4, 8, 8)),
    "grouped transposed convolution": (nn.ConvTranspose2d(4, 6, 3, groups=2), torch.randn(2, 4, 8, 8)),
    "convolution in three dimensions": (nn.Conv3d(2, 3, 2), torch.randn(2, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_activations_are_those_that_a_weight_is_multiplied_with(kind):
    layer, inputs = LAYERS[kind]
    model = nn.Sequential(layer)
    sparsifier = Sparsifier(model, criteria="wanda", layers=[layer])
    sparsifier.calibrate([inputs, 2 * inputs])
    seen = sparsifier.collected.value("activation", "0.weight", sparsifier).expand_as(layer.weight)
    # A weight is multiplied with those inputs that its product with the output changes by: as many as the output tells.
    axis = -1 if isinstance(layer, nn.Linear) else -(layer.weight.dim() - 1)
    squares = torch.stack([inputs, 2 * inputs]).double().square().movedim(axis, 0).flatten(1).mean(1).sqrt()
    for place in ((0,) * layer.weight.dim(), tuple(size - 1 for size in layer.weight.shape), (1, 0, 0, 0, 0)):
        place = place[: layer.weight.dim()]
        reads = []
        for channel in range(len(squares)):
            probe = torch.zeros_like(inputs)
            probe.movedim(axis, 0)[channel] = 1
            with torch.enable_grad():
                gradient = torch.autograd.grad(layer(probe).sum(), layer.weight)[0][place]
            reads.append(bool(gradient != 0))
        assert sum(reads) == 1
        assert float(seen[place]) == pytest.approx(float(squares[reads.index(True)]), rel=1e-5)


def test_calibrating_leaves_no_trace():
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
        assert sparsifier.inputs == {}
        assert sparsifier.loss is None


def test_means_are_over_the_batches_since_the_last_update(net):
    sparsifier = Sparsifier(net, criteria="snip")
    first, second, third = batches()
    one = mean_gradients(copy.deepcopy(net), [first, second, third])
    sparsifier.calibrate([first], F.cross_entropy)
    sparsifier.calibrate([second], F.cross_entropy)
    assert torch.allclose(
        sparsifier.statistics["grad"]["0.weight"], (one[0]["0.weight"] + one[1]["0.weight"]) / 2, atol=1e-7
    )
    sparsifier.sparsify(0.0)
    sparsifier.sparsify(0.0)  # what is there stays, until a batch comes
    sparsifier.calibrate([third], F.cross_entropy)
    assert torch.allclose(sparsifier.statistics["grad"]["0.weight"], one[2]["0.weight"], atol=1e-7)


def test_what_movement_pruning_sums_is_not_forgotten_at_an_update(net):
    sparsifier = Sparsifier(net, criteria="movement_pruning")
    gradients = mean_gradients(copy.deepcopy(net), batches(2))
    for batch in batches(2):
        sparsifier.calibrate([batch], F.cross_entropy)
        sparsifier.sparsify(0.0)
    expected = sum(each["0.weight"] for each in gradients) / 2 * net[0].weight
    assert torch.allclose(sparsifier.statistics["weight_grad"]["0.weight"], expected, atol=1e-7)


def test_in_a_plain_loop_gradients_are_seen_before_they_are_masked(net):
    sparsifier = Sparsifier(net, criteria="snip")
    (gradients,) = mean_gradients(copy.deepcopy(net), batches(1))
    inputs, labels = batches(1)[0]
    F.cross_entropy(net(inputs), labels).backward()
    sparsifier.mask_gradients()
    assert torch.allclose(sparsifier.statistics["grad"]["0.weight"], gradients["0.weight"])


def test_nothing_is_collected_that_no_criterion_names(net):
    sparsifier = Sparsifier(net)
    sparsifier.calibrate(batches())
    assert sparsifier.statistics == {}


def test_an_own_statistic_is_one_function(net):
    @quantities.register
    @taken("backward")
    def largest_gradient(sparsifier, name):
        return sparsifier.targets[name].parameter.grad.abs().max()

    try:
        sparsifier = Sparsifier(net, criteria=lambda weight, largest_gradient: weight.abs() * largest_gradient)
        sparsifier.calibrate(batches(2), F.cross_entropy)
        gradients = mean_gradients(copy.deepcopy(net), batches(2))
        expected = sum(each["0.weight"].abs().max() for each in gradients) / 2
        assert torch.allclose(sparsifier.statistics["largest_gradient"]["0.weight"], expected)
        sparsifier.sparsify(0.5)
        assert sparsifier.sparsity == pytest.approx(0.5, abs=0.01)
    finally:
        del quantities._functions["largest_gradient"]


@pytest.mark.parametrize(
    ("criterion", "given", "loss", "error", "message"),
    [
        ("snip", batches(1), None, TypeError, "snip needs grad, so give it a loss_func, too"),
        ("snip", [], F.cross_entropy, ValueError, "there are no batches"),
        ("snip", [torch.randn(4, 2, 8, 8)], F.cross_entropy, ValueError, r"a batch is \(input, target\)"),
        ("snip", [(torch.randn(4, 5, 8, 8), torch.zeros(4).long())], F.cross_entropy, ValueError, "batch 1 fails"),
        ("snip", batches(1), lambda output, target: torch.ones(()), ValueError, "has no graph"),
        ("snip", batches(1), lambda output, target: output, ValueError, "must return one number"),
        ("snip", batches(1), lambda output, target: output.sum() * float("nan"), ValueError, "batch 1 is nan"),
        ("wanda", [torch.randn(4, 5, 8, 8)], None, ValueError, "is not multiplied with what Conv2d is given"),
        ("snip", None, F.cross_entropy, TypeError, "batches are a list or a data loader"),
        ("snip", torch.randn(4, 2, 8, 8), F.cross_entropy, TypeError, "batches are a list or a data loader"),
        ("grasp", batches(1), lambda output, target: output.detach().sum(), ValueError, "has no graph"),
    ],
)
def test_what_cannot_be_calibrated_with_is_an_error_and_nothing_has_changed(
    net, criterion, given, loss, error, message
):
    sparsifier = Sparsifier(net, criteria=criterion)
    good = sparsifier.calibrate(batches(1), F.cross_entropy)
    before = sparsifier.collected.state()
    assert good is None
    with pytest.raises(error, match=message):
        sparsifier.calibrate(given, loss)
    after = sparsifier.collected.state()
    assert after["counts"] == before["counts"]
    assert all(
        torch.equal(value, before["stored"][quantity][name])
        for quantity, values in after["stored"].items()
        for name, value in values.items()
    )
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_batch_that_fails_behind_a_good_one_leaves_nothing_of_the_good_one(net):
    sparsifier = Sparsifier(net, criteria="snip")
    sparsifier.calibrate(batches(1), F.cross_entropy)
    before = sparsifier.collected.state()
    with pytest.raises(ValueError, match="batch 2 fails"):
        sparsifier.calibrate([*batches(2)[1:], (torch.randn(4, 5, 8, 8), torch.zeros(4).long())], F.cross_entropy)
    assert sparsifier.collected.counts == before["counts"]
    assert all(
        torch.equal(value, before["stored"]["grad"][name]) for name, value in sparsifier.statistics["grad"].items()
    )


def test_no_forward_after_calibrating_uses_what_autocast_has_cast_before(net):
    with torch.autocast("cpu", torch.bfloat16):
        sparsifier = Sparsifier(net, criteria="snip")
        sparsifier.calibrate(batches(1), F.cross_entropy)
        sparsifier.sparsify(0.9)
        inputs = batches(1)[0][0]
        seen = net(inputs)
        torch.clear_autocast_cache()
        assert torch.equal(seen, net(inputs))


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


def test_calibrating_steps_nothing_and_makes_nothing():
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


def test_generators_of_data_loaders_are_as_they_were():
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


def test_an_activation_is_the_mean_over_all_rows_of_batches_of_any_size():
    model = nn.Sequential(nn.Linear(2, 3))
    sparsifier = Sparsifier(model, criteria="wanda", layers="0")
    sparsifier.calibrate([torch.ones(99, 2), 10 * torch.ones(1, 2)])
    assert float(sparsifier.collected.value("activation", "0.weight", sparsifier)[0, 0]) == pytest.approx(
        ((99 + 100) / 100) ** 0.5
    )


def test_a_quantity_of_any_shape_is_kept_in_a_state(net):
    @quantities.register
    @taken("backward")
    def gradient_norms(sparsifier, name):
        return sparsifier.targets[name].parameter.grad.flatten(1).norm(dim=1)

    try:
        by_norm = lambda weight, gradient_norms: weight.abs() * gradient_norms.view(-1, *[1] * (weight.dim() - 1))  # noqa: E731
        sparsifier = Sparsifier(net, criteria=by_norm)
        sparsifier.calibrate(batches(1), F.cross_entropy)
        other = Sparsifier(copy.deepcopy(net), criteria=by_norm)
        other.load_state_dict(sparsifier.state_dict())
        for each in (sparsifier, other):
            each.sparsify(0.5)
        assert all(torch.equal(mask, other.masks[name]) for name, mask in sparsifier.masks.items())
    finally:
        del quantities._functions["gradient_norms"]


def test_in_steps_no_layer_is_sparser_on_the_way_than_at_the_end():
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    sparsifier = Sparsifier(model, context="local")
    sparsifier.sparsify({"0": 0.9, "1": 0.1})
    sparsifier.sparsify(0.5, steps=5)
    assert int((model[1].weight == 0).sum()) == 450


def test_in_steps_data_are_looked_at_anew_after_an_update(net, monkeypatch):
    sparsifier, calls = Sparsifier(net, criteria="snip"), []
    monkeypatch.setattr(
        CollectedQuantities,
        "add",
        lambda self, moment, *rest, add=CollectedQuantities.add: calls.append(moment) or add(self, moment, *rest),
    )
    sparsifier.calibrate(batches(1), F.cross_entropy)
    sparsifier.sparsify(0.3, steps=2)
    sparsifier.sparsify(0.6, steps=2)
    assert len(calls) == 1 + 1 + 2


def test_losses_that_are_linear_and_layers_that_are_frozen():
    model = nn.Sequential(nn.Linear(3, 2))
    sparsifier = Sparsifier(model, criteria="grasp", layers="0")
    sparsifier.calibrate([(torch.ones(1, 3), torch.zeros(1))], lambda output, target: output.sum())
    assert (sparsifier.statistics["hessian_grad"]["0.weight"] == 0).all()
    model[0].weight.requires_grad_(False)
    for criterion in ("grasp", "snip"):
        with pytest.raises(ValueError, match=r"no gradient .*0\.weight.* frozen"):
            Sparsifier(model, criteria=criterion, layers="0").calibrate(
                [(torch.ones(1, 3), torch.zeros(1))], lambda output, target: output.square().sum()
            )
    sparsifier = Sparsifier(model, criteria="snip", layers="0")
    sparsifier.mask_gradients()  # there is none to see


def test_attention_is_named_where_its_inputs_cannot_be_had():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"in_proj_weight is not multiplied with what MultiheadAttention is given"):
        Sparsifier(layer, criteria="wanda").calibrate([torch.randn(2, 5, 8)])
    with pytest.raises(ValueError, match=r"self_attn.out_proj.weight: computes nothing by itself"):
        Sparsifier(layer, criteria="wanda", exclude="*in_proj*").calibrate([torch.randn(2, 5, 8)])
    sparsifier = Sparsifier(layer, context="2:4", criteria="wanda", exclude="self_attn")
    sparsifier.calibrate([torch.randn(2, 5, 8)])
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == 0.5


def test_synflow_says_what_it_needs():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x.float())

    with pytest.raises(ValueError, match="cast nothing to another type in forward"):
        Sparsifier(Casts(), criteria="synflow", example_input=torch.ones(1, 4)).sparsify(0.5)


def test_without_data_it_says_what_to_do(net):
    for criterion, quantity in (("snip", "grad"), ("wanda", "activation"), ("grasp", "hessian_grad")):
        with pytest.raises(ValueError, match=f"criterion {criterion} needs {quantity}, of which no batch was seen"):
            Sparsifier(net, criteria=criterion).sparsify(0.5)
    with pytest.raises(ValueError, match="give the Sparsifier an example_input="):
        Sparsifier(net, criteria="synflow").sparsify(0.5)


class WithDeadLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("criterion", ["snip", "grasp", "wanda", "synflow"])
def test_a_layer_that_computes_nothing_is_named(criterion):
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


def test_a_state_holds_what_was_collected(net, tmp_path):
    sparsifier = Sparsifier(net, criteria="snip")
    sparsifier.calibrate(batches(2), F.cross_entropy)
    torch.save(sparsifier.state_dict(), tmp_path / "state.pth")
    other = Sparsifier(copy.deepcopy(net), criteria="snip")
    other.load_state_dict(torch.load(tmp_path / "state.pth"))
    for each in (sparsifier, other):
        each.calibrate(batches(3)[2:], F.cross_entropy)
        each.sparsify(0.6)
    assert all(torch.equal(mask, other.masks[name]) for name, mask in sparsifier.masks.items())
    wrong = sparsifier.state_dict()
    wrong["statistics"]["stored"]["grad"]["0.weight"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"grad of 0\.weight is numbers of the shape \(5,\)"):
        other.load_state_dict(wrong)


@pytest.mark.parametrize("criterion", ["snip", "synflow", "large_final"])
def test_in_steps_scores_are_taken_anew_and_density_falls_exponentially(net, criterion, monkeypatch):
    levels, moments = [], []
    update, add = Sparsifier._update, CollectedQuantities.add

    def seen_update(self, level, *rest):
        levels.append(level)
        update(self, level, *rest)

    def seen_add(self, moment, *rest):
        moments.append(moment)
        add(self, moment, *rest)

    monkeypatch.setattr(Sparsifier, "_update", seen_update)
    monkeypatch.setattr(CollectedQuantities, "add", seen_add)
    sparsifier = Sparsifier(net, criteria=criterion, example_input=batches(1)[0][0])
    if criterion == "snip":
        sparsifier.calibrate(batches(2), F.cross_entropy)
    sparsifier.sparsify(0.9, steps=5)
    assert levels == pytest.approx([1 - 0.1 ** (step / 5) for step in range(1, 6)])
    assert len(moments) == (10 if criterion == "snip" else 0)
    assert sparsifier.sparsity == pytest.approx(0.9, abs=0.005)
    levels.clear()
    sparsifier.sparsify({"0": 0.95}, steps=2)
    assert levels == [pytest.approx({"0": 1 - 0.1**0.5 * 0.05**0.5}), {"0": 0.95}]


def nan_when_sparse(weight):
    return weight.abs() if (weight != 0).float().mean() > 0.6 else torch.full_like(weight, float("nan"))


def test_steps_that_fail_change_nothing(net):
    sparsifier = Sparsifier(net, criteria=nan_when_sparse)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="NaN scores"):
        sparsifier.sparsify(0.9, steps=10)
    assert sparsifier.level == 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    sparsifier = Sparsifier(net, criteria="snip")
    sparsifier.calibrate(iter(batches()), F.cross_entropy)
    with pytest.raises(ValueError, match="batches that can be gone through again"):
        sparsifier.sparsify(0.9, steps=10)
    assert sparsifier.level == 0


def test_taken_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="a mean over batches at one moment"):
        taken("backward", "start")
    with pytest.raises(ValueError, match="are for means over batches"):
        taken("start", running=True)


@pytest.mark.filterwarnings("ignore:taylor")
def test_all_criteria_that_look_at_data_work_with_groups(net):
    for criterion in ("snip", "grasp", "synflow", "taylor", "fisher", "movement_pruning", "wanda", "lamp"):
        for granularity in ("filter", "kernel", "weight"):
            model = copy.deepcopy(net)
            sparsifier = Sparsifier(model, granularity, criteria=criteria[criterion], example_input=batches(1)[0][0])
            sparsifier.calibrate(batches(1), F.cross_entropy)
            sparsifier.sparsify(0.5)
            assert sparsifier.sparsity == pytest.approx(0.5, abs=0.2), (criterion, granularity)


def test_sums_over_filters_that_a_batch_norm_rescales_are_warned_of():
    def net(norm):
        return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))

    with pytest.warns(
        UserWarning, match="taylor: a batch norm undoes the scale of the outputs of 0.weight, so"
    ) as caught:
        sparsifier = Sparsifier(net(nn.BatchNorm2d(4)), "filter", criteria="taylor")
    assert caught[0].filename == __file__
    images = torch.randn(5, 1, 9, 9)
    sparsifier.calibrate([(images, images)], lambda output, target: output.square().mean())
    scores = {name: scores_of(sparsifier, name).flatten(1).sum(1).abs().max() for name in ("0.weight", "3.weight")}
    assert scores["0.weight"] < 1e-4 * scores["3.weight"]  # as it says
    Sparsifier(net(nn.GroupNorm(1, 4)), "filter", criteria="taylor")
    Sparsifier(net(nn.BatchNorm2d(4)), "kernel", criteria="taylor")
    Sparsifier(net(nn.BatchNorm2d(4)), "filter", criteria="taylor", pool="mean")


def test_taylor_squares_the_sum_over_a_group():
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    sparsifier = Sparsifier(model, "row", "local", "taylor", layers=["0"])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0], [0.1, 0.2], [2.0, 0.5]]))
    # The gradient of the sum is the input: w g summed over rows is 0, 0.3, 2.5.
    sparsifier.calibrate([(torch.ones(1, 2), torch.zeros(1))], lambda output, target: output.sum())
    sparsifier.sparsify(1 / 3)
    assert sparsifier.masks["0.weight"].flatten().tolist() == [False, True, True]
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0], [0.1, 0.2], [2.0, 0.5]]))
    single = Sparsifier(model, "weight", "local", "taylor", layers=["0"])
    single.calibrate([(torch.ones(1, 2), torch.zeros(1))], lambda output, target: output.sum())
    single.sparsify(0.5)
    # w g is 1, -1, 0.1, 0.2, 2, 0.5; unsquared, -1 would be the lowest.
    assert single.masks["0.weight"].tolist() == [[True, True], [False, False], [True, False]]


# --- In a Learner --------------------------------------------------------------------------------------------------

OF_DATA = ("snip", "grasp", "synflow", "taylor", "fisher", "movement_pruning", "wanda")


@pytest.mark.fastai
@pytest.mark.parametrize("criterion", OF_DATA)
@pytest.mark.parametrize("schedule", ["one_shot", "lin"])
def test_in_a_learner_criteria_of_data_reach_their_target(make_learner, criterion, schedule):
    from sparsifai import SparsifyCallback

    learn = make_learner()
    callback = SparsifyCallback(0.5, criteria=criterion, schedule=schedule)
    learn.fit(2, 0.01, cbs=callback)
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.005)
    assert not any(module._forward_pre_hooks for module in learn.model.modules())
    learn.fit(1, 0.01)  # the keeper goes on, and looks at nothing more
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.005)


@pytest.mark.fastai
@pytest.mark.parametrize("criterion", OF_DATA)
def test_in_a_learner_looking_at_data_changes_nothing_else(make_learner, criterion):
    from sparsifai import SparsifyCallback, schedules

    ends = []
    for callbacks in ([], [SparsifyCallback(1e-9, criteria=criterion, schedule=schedules["lin"])]):
        torch.manual_seed(3)
        model = small_net()
        model.insert(3, nn.Dropout(0.3))
        learn = make_learner(model)
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        learn.fit(2, 0.01, cbs=callbacks)
        ends.append([*learn.model.state_dict().values(), torch.get_rng_state(), torch.rand(3)])
        ends.append([random.random(), float(np.random.rand()), learn.recorder.values])
    assert all(map(torch.equal, ends[0], ends[2]))
    assert ends[1][:2] == ends[3][:2]
    assert [row[:2] for row in ends[1][2]] == [row[:2] for row in ends[3][2]]


@pytest.mark.fastai
def test_in_a_learner_gradients_are_those_that_pass_unscaled_and_unmasked(make_learner):
    from fastai.callback.core import Callback

    from sparsifai import SparsifyCallback

    learn, seen = make_learner(), []
    callback = SparsifyCallback(0.5, criteria="snip", schedule="one_shot", every=4)

    def look(self):
        seen.append({name: parameter.grad.clone() for name, parameter in self.model.named_parameters()})

    learn.fit(1, 0.01, cbs=[callback, Callback(after_backward=look)])
    stored = callback.sparsifier.statistics["grad"]
    for name, mean in stored.items():
        assert torch.allclose(mean, torch.stack([each[name] for each in seen]).mean(0), atol=1e-7), name
    masked = ~callback.sparsifier.masks["0.weight"]
    assert (stored["0.weight"][masked] != 0).any()
    assert len(seen) == 4


@pytest.mark.fastai
def test_in_a_learner_other_batches_can_be_given(make_learner):
    from sparsifai import SparsifyCallback

    learn = make_learner()
    calls = []

    class Counted:
        def __iter__(self):
            calls.append(1)
            return iter(batches(2))

    callback = SparsifyCallback(
        0.5, criteria="wanda", context="per_output", schedule="iterative", calibration=Counted()
    )
    learn.fit(2, 0.01, cbs=callback)
    assert len(calls) >= 2
    assert callback.sparsifier.collected.counts["activation"]["0.weight"] == 2 * 4 * 2 * 8 * 8


@pytest.mark.fastai
def test_in_a_fit_of_frozen_layers_no_gradient_is_asked_for(make_learner):
    from sparsifai import SparsifyCallback

    learn = make_learner()
    callback = SparsifyCallback(0.5, criteria="snip", schedule="one_shot")
    learn.fit(1, 0.01, cbs=callback)
    for parameter in list(learn.model.parameters())[:2]:
        parameter.requires_grad_(False)
        parameter.grad = None
    learn.opt = None
    learn.fit(1, 0.01)
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.005)


@pytest.mark.fastai
def test_in_a_learner_the_training_data_can_be_looked_at_without_a_trace(make_learner):
    from sparsifai import SparsifyCallback

    ends = []
    for given in (False, True):
        torch.manual_seed(3)
        learn = make_learner(small_net())
        learn.dls.train.shuffle, learn.dls.train.rng = True, random.Random(4)
        calibration = learn.dls.train if given else None
        learn.fit(3, 0.01, cbs=SparsifyCallback(1e-9, criteria="snip", schedule="lin", calibration=calibration))
        ends.append(list(learn.model.state_dict().values()))
    assert all(map(torch.equal, *ends))


@pytest.mark.fastai
def test_in_a_learner_no_batch_counts_twice(make_learner):
    from sparsifai import SparsifyCallback

    learn = make_learner()
    callback = SparsifyCallback(0.5, criteria="movement_pruning", schedule="lin")
    learn.fit(2, 0.01, cbs=callback)
    assert set(callback.sparsifier.collected.counts["weight_grad"].values()) == {8}


@pytest.mark.fastai
def test_in_a_learner_outputs_of_language_models_are_taken_apart(make_learner):
    from fastai.callback.core import Callback

    from sparsifai import SparsifyCallback

    class WithState(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return self.net(x), x

    def first(self):
        self.learn.pred = self.pred[0]

    learn = make_learner(WithState())
    callback = SparsifyCallback(0.5, criteria="snip", schedule="one_shot")
    learn.fit(1, 0.01, cbs=[callback, Callback(after_pred=first)])
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.005)


@pytest.mark.fastai
def test_more_than_n_of_m_is_refused_in_the_constructor():
    from sparsifai import SparsifyCallback

    with pytest.raises(ValueError, match="context 2:4 makes 0.5 of the weights zero at most"):
        SparsifyCallback(0.9, context="2:4")
    SparsifyCallback(0.67, context="1:3")
