"""The quantities that a criterion names: what they are, and over which batches they are averaged."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import layers_of, small_net
from torch import nn
from updates import batches, mean_gradients, moved, scores_of

from sparsifai import Sparsifier, criteria, quantities, taken


@pytest.fixture
def net():
    return small_net().eval()


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
    for name, target in layers_of(sparsifier).items():
        expected = FORMULAS[criterion](target.parameter.detach(), [each[name] for each in gradients])
        assert torch.allclose(scores_of(sparsifier, name), expected, rtol=1e-4, atol=1e-9)
        assert expected.abs().max() > 0


def test_grasp_is_the_weight_times_the_hessian_times_the_gradient():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs, labels = torch.randn(5, 3), torch.randint(2, (5,))
    sparsifier = Sparsifier(model, criteria="grasp")
    sparsifier.calibrate([(inputs, labels)], F.cross_entropy)
    names = list(layers_of(sparsifier))
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
    sums = [float(scores_of(sparsifier, name).sum()) for name in layers_of(sparsifier)]
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
def test_an_activation_is_the_input_that_a_weight_is_multiplied_with(kind):
    layer, inputs = LAYERS[kind]
    model = nn.Sequential(layer)
    sparsifier = Sparsifier(model, criteria="wanda", layers=[layer])
    sparsifier.calibrate([inputs, 2 * inputs])
    seen = sparsifier.collected.value("activation", "0.weight").expand_as(layer.weight)
    # The gradient shows which input channel a weight is multiplied with.
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


def test_an_activation_is_the_mean_over_all_rows_of_batches_of_any_size():
    model = nn.Sequential(nn.Linear(2, 3))
    sparsifier = Sparsifier(model, criteria="wanda", layers="0")
    sparsifier.calibrate([torch.ones(99, 2), 10 * torch.ones(1, 2)])
    assert float(sparsifier.collected.value("activation", "0.weight")[0, 0]) == pytest.approx(((99 + 100) / 100) ** 0.5)


def test_means_are_over_the_batches_since_the_last_update(net):
    sparsifier = Sparsifier(net, criteria="snip")
    first, second, third = batches()
    one = mean_gradients(copy.deepcopy(net), [first, second, third])
    sparsifier.calibrate([first], F.cross_entropy)
    sparsifier.calibrate([second], F.cross_entropy)
    assert torch.allclose(
        sparsifier.collected.stored["grad"]["0.weight"], (one[0]["0.weight"] + one[1]["0.weight"]) / 2, atol=1e-7
    )
    sparsifier.sparsify(0.0)
    sparsifier.sparsify(0.0)  # the means stay until the next batch
    sparsifier.calibrate([third], F.cross_entropy)
    assert torch.allclose(sparsifier.collected.stored["grad"]["0.weight"], one[2]["0.weight"], atol=1e-7)


def test_the_sum_of_movement_pruning_continues_over_updates(net):
    sparsifier = Sparsifier(net, criteria="movement_pruning")
    gradients = mean_gradients(copy.deepcopy(net), batches(2))
    for batch in batches(2):
        sparsifier.calibrate([batch], F.cross_entropy)
        sparsifier.sparsify(0.0)
    expected = sum(each["0.weight"] for each in gradients) / 2 * net[0].weight
    assert torch.allclose(sparsifier.collected.stored["weight_grad"]["0.weight"], expected, atol=1e-7)


def test_mask_gradients_collects_gradients_before_it_masks_them(net):
    sparsifier = Sparsifier(net, criteria="snip")
    (gradients,) = mean_gradients(copy.deepcopy(net), batches(1))
    inputs, labels = batches(1)[0]
    F.cross_entropy(net(inputs), labels).backward()
    sparsifier.mask_gradients()
    assert torch.allclose(sparsifier.collected.stored["grad"]["0.weight"], gradients["0.weight"])


def test_only_named_quantities_are_collected(net):
    sparsifier = Sparsifier(net)
    sparsifier.calibrate(batches())
    assert sparsifier.collected.stored == {}


def test_previous_is_the_value_at_the_last_update(mlp):
    sparsifier = Sparsifier(mlp, criteria="updating_movement", context="local")
    start = mlp[0].weight.detach().clone()
    assert torch.equal(sparsifier.collected.stored["previous"]["0.weight"], start)
    with torch.no_grad():
        mlp[0].weight.add_(1)
    sparsifier.sparsify(0.25)
    updated = sparsifier.collected.stored["previous"]["0.weight"]
    assert torch.equal(updated, mlp[0].weight)
    assert not torch.equal(updated, start)
    assert set(sparsifier.collected.stored) == {"previous"}


def test_init_is_the_value_when_the_sparsifier_was_made(mlp):
    start = mlp[0].weight.detach().clone()
    sparsifier = Sparsifier(mlp, criteria="movement")
    for level in (0.2, 0.4):
        moved(mlp)
        sparsifier.sparsify(level)
    assert torch.equal(sparsifier.collected.stored["init"]["0.weight"], start)


def test_a_quantity_of_your_own_is_one_function(net):
    @quantities.register
    @taken("backward")
    def largest_gradient(sparsifier, name):
        return sparsifier.layers[name].parameter.grad.abs().max()

    try:
        sparsifier = Sparsifier(net, criteria=lambda weight, largest_gradient: weight.abs() * largest_gradient)
        sparsifier.calibrate(batches(2), F.cross_entropy)
        gradients = mean_gradients(copy.deepcopy(net), batches(2))
        expected = sum(each["0.weight"].abs().max() for each in gradients) / 2
        assert torch.allclose(sparsifier.collected.stored["largest_gradient"]["0.weight"], expected)
        sparsifier.sparsify(0.5)
        assert sparsifier.sparsity == pytest.approx(0.5, abs=0.01)
    finally:
        del quantities._functions["largest_gradient"]


@pytest.mark.filterwarnings("ignore:taylor")
def test_all_criteria_that_need_data_work_with_groups(net):
    for criterion in ("snip", "grasp", "synflow", "taylor", "fisher", "movement_pruning", "wanda", "lamp"):
        for granularity in ("filter", "kernel", "weight"):
            model = copy.deepcopy(net)
            sparsifier = Sparsifier(model, granularity, criteria=criteria[criterion], example_input=batches(1)[0][0])
            sparsifier.calibrate(batches(1), F.cross_entropy)
            sparsifier.sparsify(0.5)
            assert sparsifier.sparsity == pytest.approx(0.5, abs=0.2), (criterion, granularity)


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
