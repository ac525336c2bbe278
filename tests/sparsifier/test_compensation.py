"""Weights that stay make up for those that are pruned: exact solutions, and that nothing else changes."""

import copy
import gc
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import misses_sparsity, random_state, small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from second_order import LAYERS, Transposed, error_of, fisher_of, gradients_of, layer_and_input, least_squares
from torch import nn
from updates import batches, moved, same_state

from sparsifai import Sparsifier, register_layer, shrink

register_layer(Transposed, weight=("in", "out"))


def pruned(model, data, sparsity=0.5, *axes, loss=None, **options):
    sparsifier = Sparsifier(model, *axes, **{"compensate": True, **options})
    sparsifier.calibrate(data, loss)
    sparsifier.sparsify(sparsity)
    return sparsifier


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_the_weights_that_stay_are_the_least_squares_solution(name, sparsity):
    model, value = layer_and_input(name)
    dense = copy.deepcopy(model[0])
    sparsifier = pruned(model, [value[:2], value[2:]], sparsity)
    (mask,) = sparsifier.masks.values()
    expected = least_squares(dense, value, mask)
    assert torch.allclose(model[0].weight, expected, atol=1e-6)
    assert ((model[0].weight == 0) == ~mask).all()
    assert not torch.allclose(model[0].weight, dense.weight * mask, atol=1e-3)


@pytest.mark.parametrize("axes", [("row", "local"), ("channel", "local"), ("weight", "2:4"), ("4x4", "global"),
                                  (("out", "h"), "local")], ids=str)  # fmt: skip
def test_masks_of_any_shape(axes):
    layer, value = nn.Conv2d(8, 6, 3).double(), torch.randn(6, 8, 6, 6).double()
    model = nn.Sequential(copy.deepcopy(layer))
    sparsifier = pruned(model, [value], 0.5, *axes, layers="0")
    assert torch.allclose(model[0].weight, least_squares(layer, value, sparsifier.masks["0.weight"]), atol=1e-6)


def test_a_layer_sees_what_the_pruned_layers_before_it_give():
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    dense, value = copy.deepcopy(model), torch.randn(40, 10).double()
    sparsifier = pruned(model, [value[:25], value[25:]])
    with torch.no_grad():
        for place in (0, 2, 4):
            expected = least_squares(dense[place], value, sparsifier.masks[f"{place}.weight"])
            assert torch.allclose(model[place].weight, expected, atol=1e-6)
            value = torch.relu(model[place](value))


class Branches(nn.Module):
    """Layers that read the same tensor, one that runs twice, one that runs in some batches, in another order."""

    def __init__(self):
        super().__init__()
        self.last, self.twice = nn.Linear(6, 3), nn.Linear(6, 6)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        y = self.one(x) * torch.sigmoid(self.two(x))
        y = torch.relu(self.twice(y)) if len(x) > 4 else y
        return self.last(torch.relu(self.twice(y)))


class InPlace(nn.Module):
    """Layers that read the same tensor, which changes in between, and one that unfolds it otherwise."""

    def __init__(self):
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.skip, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        h = self.stem(x)
        skipped = self.skip(h)
        y = self.one(h)
        return skipped + y + self.two(h.relu_())


NETS = {
    "branches": (Branches, ("one", "two", "twice", "last"), lambda: [torch.randn(9, 6), torch.randn(3, 6)]),
    "in place": (InPlace, ("stem", "skip", "one", "two"), lambda: [torch.randn(2, 3, 5, 5) for _ in range(2)]),
}


@pytest.mark.parametrize("net", NETS)
def test_layers_that_have_inputs_in_common(net):
    kind, order, data_of = NETS[net]
    model, data = kind().double(), [value.double() for value in data_of()]
    dense = copy.deepcopy(model)
    sparsifier = pruned(model, data)
    state = copy.deepcopy(dense)  # the layers that were passed are pruned, and the next sees what they give
    for name in order:
        layer, inputs = getattr(state, name), []
        # While it is not solved yet, a layer is as the mask leaves it.
        with torch.no_grad():
            layer.weight.mul_(sparsifier.masks[f"{name}.weight"])
        handle = layer.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0].clone()))
        for batch in data:
            state(batch)
        handle.remove()
        value = torch.cat(inputs).detach()
        expected = least_squares(getattr(dense, name), value, sparsifier.masks[f"{name}.weight"])
        assert torch.allclose(getattr(model, name).weight, expected, atol=1e-6), name
        layer.load_state_dict(getattr(model, name).state_dict())


def test_weights_that_would_leave_their_range_stay_as_they_are():
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).half()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[600.0, 65000.0]]))
    pruned(model, [torch.tensor([[1.0, 0.01], [2.0, 0.02]]).half()])  # the second would get 66,000
    assert model[0].weight.tolist() == [[0.0, 64992.0]]


@misses_sparsity
@given(
    outputs=st.integers(1, 6), inputs=st.integers(2, 9), samples=st.integers(1, 30), sparsity=st.floats(0.1, 0.95),
    scale=st.sampled_from([1e-6, 1.0, 1e4]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_error_is_never_above_that_of_the_mask_alone(outputs, inputs, samples, sparsity, scale, dtype, seed):
    torch.manual_seed(seed)
    value = (scale * torch.randn(samples, inputs)).to(dtype)
    if seed % 3 == 0:
        value[:, seed % inputs] = 0  # an input that nothing is known of
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=False)).to(dtype)
    dense = copy.deepcopy(model[0])
    sparsifier = pruned(model, [value], sparsity, "weight", "local")
    mask = sparsifier.masks["0.weight"]
    assert model[0].weight.dtype == dtype
    assert (model[0].weight[~mask] == 0).all()
    square = value.double().square().mean(0)
    changes = [
        other.double() - dense.weight.detach().double()
        for other in (model[0].weight.detach(), dense.weight.detach() * mask)
    ]
    # What is least is the error with the damping.
    damped = [float((change @ value.double().T).square().sum() / samples + _damping(square) * change.square().sum())
              for change in changes]  # fmt: skip
    assert damped[0] <= damped[1] * (1 + 1e-5)


def _damping(square):
    return 0.01 * (square.mean() or 0.5)


# --- obs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [50, 7])
@pytest.mark.parametrize("compensate", [None, False])
def test_obs_is_that_of_explicit_blocks(size, compensate):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(11, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    data = [(torch.randn(3, 11).double(), torch.randint(4, (3,))) for _ in range(30)]
    dense = copy.deepcopy(model)
    criterion = "obs" if size == 50 else partial_obs
    sparsifier = Sparsifier(model, criteria=criterion, compensate=compensate)
    sparsifier.calibrate(data, F.cross_entropy)
    sparsifier.sparsify(0.6)
    scores, expected = {}, {}
    damping = 1e-7 if size == 50 else 1e-4
    for name, mask in sparsifier.masks.items():
        gradients, weight = gradients_of(dense, data, name), dense.get_parameter(name).detach().flatten()
        scores[name], expected[name] = torch.empty_like(weight), torch.zeros_like(weight)
        for start in range(0, len(weight), size):
            stop = min(start + size, len(weight))
            fisher = fisher_of(gradients, start, stop, damping)
            scores[name][start:stop] = weight[start:stop] ** 2 / (2 * torch.linalg.inv(fisher).diagonal())
            kept = mask.flatten()[start:stop].nonzero().flatten()
            solved = torch.linalg.solve(fisher[kept][:, kept], fisher[kept] @ weight[start:stop])
            expected[name][start + kept] = solved
    everything = torch.cat(list(scores.values()))
    threshold = everything.sort().values[round(0.6 * len(everything))]
    for name, mask in sparsifier.masks.items():
        assert torch.equal(mask.flatten(), scores[name] >= threshold)
        if compensate is False:
            expected[name] = dense.get_parameter(name).flatten() * mask.flatten()
        assert torch.allclose(model.get_parameter(name).flatten(), expected[name], rtol=1e-4, atol=1e-6)


def _partial_obs():
    from sparsifai import criteria

    return partial(criteria["obs"], block_size=7, damping=1e-4)


partial_obs = _partial_obs()


def test_blocks_are_computed_in_parts_of_the_size_of_the_largest_layer(monkeypatch):
    from sparsifai.sparsifier import passes

    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 5), nn.ReLU(), nn.Linear(5, 4))
    seen, zeros_for = [], passes.zeros_for
    monkeypatch.setattr(passes, "zeros_for", lambda kind, weight: seen.append(weight.name) or zeros_for(kind, weight))
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    data = [(torch.randn(4, 6), torch.randint(4, (4,))) for _ in range(2)]
    sparsifier = Sparsifier(model, criteria=_partial_obs(), compensate=False)
    sparsifier.calibrate(data, F.cross_entropy)
    runs.clear()
    sparsifier.sparsify(0.5)
    assert seen == ["0.weight", "2.weight", "4.weight"]
    assert len(runs) == 2 * 2  # the two small layers together


@pytest.mark.parametrize("criterion", ["large_final", "wanda", "sparsegpt", "obs"])
def test_one_curvature_is_in_memory_at_a_time(criterion, monkeypatch):
    from sparsifai.axes.curvature import Curvature
    from sparsifai.sparsifier import passes

    alive, zeros_for = [], passes.zeros_for

    def seen(kind, weight):
        alive.append(sum(type(each) is Curvature for each in gc.get_objects()))
        return zeros_for(kind, weight)

    monkeypatch.setattr(passes, "zeros_for", seen)
    pruned(small_net(), batches(1), 0.5, "weight", "local", criterion, loss=F.cross_entropy)
    assert len(alive) == (10 if criterion == "obs" else 5)
    assert not any(alive)


def test_a_criterion_of_ones_own_may_use_the_curvature_of_inputs():
    layer, value = nn.Linear(6, 4).double(), torch.randn(20, 6).double() @ torch.randn(6, 6).double()
    model = nn.Sequential(copy.deepcopy(layer))
    sparsifier = pruned(model, [value], 0.5, criteria=lambda weight, inverse_curvature: weight**2 / inverse_curvature,
                        compensate=False)  # fmt: skip
    curvature = 2 / 20 * value.T @ value
    curvature += 0.01 * curvature.diagonal().mean() * torch.eye(6)
    scores = layer.weight**2 / torch.linalg.inv(curvature).diagonal()
    assert torch.equal(sparsifier.masks["0.weight"], scores > scores.flatten().sort().values[11])


# --- The contract -----------------------------------------------------------------------------------------------------


CRITERIA = ("large_final", "wanda", "obs", "sparsegpt", "snip", "random")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_all_else_stays_as_it_was(criterion):
    model = small_net().train()
    model[0].weight.grad = gradient = torch.ones_like(model[0].weight)
    parameters, names = dict(model.named_parameters()), list(model.state_dict())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    others = {name: each.detach().clone() for name, each in model.named_parameters() if each.dim() == 1}
    data, before = batches(2), random_state()
    sparsifier = pruned(model, data, 0.5, "weight", "local", criterion, loss=F.cross_entropy, compensate=True)
    assert random_state() == before
    assert all(module.training for module in model.modules())
    assert list(model.state_dict()) == names
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(torch.equal(model.get_parameter(name), value) for name, value in others.items())
    assert model[0].weight.grad is gradient
    assert all(parameter.grad is None for name, parameter in parameters.items() if name != "0.weight")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, mask in sparsifier.masks.items():
        assert ((parameters[name] == 0) == ~mask).all(), name
        assert abs(float((~mask).sum()) - 0.5 * mask.numel()) <= 0.5, name
    assert type(sparsifier.collected.source.curvatures) is type(None)


def test_masks_are_those_without_compensation():
    for criterion in ("large_final", "wanda", "snip"):
        torch.manual_seed(0)
        model = small_net().eval()
        plain, changed = (
            pruned(copy.deepcopy(model), batches(2), 0.7, criteria=criterion, loss=F.cross_entropy, compensate=each)
            for each in (False, True)
        )
        assert same_state(plain.masks, changed.masks)
        assert not torch.equal(plain.model[3].weight, changed.model[3].weight)


@pytest.mark.parametrize("criterion", ["large_final", "obs", "sparsegpt"])
def test_a_rising_sparsity_compensates_again(criterion):
    model = small_net().double().eval()
    data = [(inputs.double(), labels) for inputs, labels in batches(3)]
    sparsifier = pruned(model, data, 0.3, "weight", "local", criterion, loss=F.cross_entropy)
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    with torch.no_grad():  # as a step leaves them
        moved(model)
    layer, before = copy.deepcopy(model[0]), model[0].weight.detach() * first["0.weight"]
    layer.weight.data.copy_(before)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier.update_masks(0.6, optimizer)
    for name, mask in sparsifier.masks.items():
        assert not (mask & ~first[name]).any()
        assert abs(float((~mask).sum()) - 0.6 * mask.numel()) <= 0.5
        assert ((model.get_parameter(name) == 0) == ~mask).all()
    if criterion == "large_final":
        value = torch.cat([inputs for inputs, _ in data])
        assert torch.allclose(model[0].weight, least_squares(layer, value, sparsifier.masks["0.weight"]), atol=1e-6)


def test_steps_and_a_falling_sparsity():
    for criterion in ("large_final", "obs", "sparsegpt", "wanda"):
        model = small_net()
        sparsifier = Sparsifier(model, "weight", "local", criterion, compensate=True)
        sparsifier.calibrate(batches(2), F.cross_entropy)
        sparsifier.sparsify(0.75, steps=3)
        assert abs(sparsifier.sparsity - 0.75) < 0.01
        sparsifier.sparsify(0.5)
        assert sum(int((~mask).sum()) for mask in sparsifier.masks.values()) <= 0.51 * 628
        sparsifier.sparsify({"0": 0.8})
        assert abs(float((model[0].weight == 0).float().mean()) - 0.8) < 0.01


def test_a_weight_that_comes_out_as_zero_is_kept():
    model, value = nn.Sequential(nn.Linear(2, 1, bias=False)), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.01]]))  # the kept one takes over what the other did
    sparsifier = pruned(model, [value])
    assert sparsifier.masks["0.weight"].tolist() == [[False, True]]
    assert abs(float(model[0].weight[0, 1].detach())) < 0.02


def test_half_precision_in_and_out():
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    half, value = copy.deepcopy(exact).bfloat16(), torch.randn(64, 16) @ torch.randn(16, 16)
    exact.load_state_dict(half.float().state_dict())
    half = half.bfloat16()
    for model, data in ((exact, value.bfloat16().float()), (half, value.bfloat16())):
        pruned(model, [data], 0.5, "weight", "local", "sparsegpt")
    assert half[0].weight.dtype == torch.bfloat16
    assert torch.allclose(half[0].weight.float(), exact[0].weight, rtol=0.02, atol=0.02)


def test_layers_whose_inputs_are_not_seen_are_told(recwarn):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    sparsifier = Sparsifier(layer, compensate=True)
    sparsifier.calibrate([torch.randn(4, 6, 8)])
    with pytest.warns(UserWarning, match=r"stay in self_attn.in_proj_weight, self_attn.out_proj.weight are not changed "
                      r"\(50.00% of the weights"):  # fmt: skip
        sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == 0.5
    with pytest.raises(ValueError, match=r"sparsegpt: no batch shows what self_attn.in_proj_weight, .* exclude="):
        pruned(copy.deepcopy(layer), [torch.randn(4, 6, 8)], 0.5, "weight", "local", "sparsegpt")


class Scaled(nn.Conv2d):
    """A convolution whose weight is scaled by a number."""

    def forward(self, x):
        return self._conv_forward(x, 0.5 * self.weight, self.bias)


class Clamped(nn.Conv2d):
    """A convolution with another weight than its parameter."""

    def forward(self, x):
        return self._conv_forward(x, self.weight.clamp(-0.05, 0.05), self.bias)


def test_the_forward_of_a_subclass_counts():
    model, value = nn.Sequential(Scaled(3, 4, 3, padding=1).double()), torch.randn(4, 3, 5, 5).double()
    layer = copy.deepcopy(model[0])
    sparsifier = pruned(model, [value])
    assert torch.allclose(model[0].weight, least_squares(layer, value, sparsifier.masks["0.weight"]), atol=1e-6)


def test_a_layer_that_computes_another_weight_is_not_compensated():
    model = nn.Sequential(Clamped(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    with pytest.warns(UserWarning, match="stay in 0.weight are not changed"):
        pruned(model, [torch.randn(4, 3, 4, 4)])


def test_copies_and_states_keep_their_form():
    model = small_net()
    sparsifier = pruned(model, batches(2), 0.5)
    plain = Sparsifier(small_net())
    plain.sparsify(0.5)
    assert sparsifier.state_dict().keys() == plain.state_dict().keys()
    for copied in (copy.deepcopy(sparsifier), pickle.loads(pickle.dumps(sparsifier))):
        assert same_state(copied.masks, sparsifier.masks)
        with pytest.raises(ValueError, match="call calibrate"):
            copied.sparsify(0.6)
        copied.calibrate(batches(2))
        copied.sparsify(0.6)
        assert copied.sparsity == pytest.approx(0.6, abs=0.01)


def test_check_changes_nothing():
    for criterion in ("large_final", "obs", "sparsegpt"):
        model = small_net()
        sparsifier = Sparsifier(model, "weight", "local", criterion, compensate=True)
        with pytest.raises(ValueError, match="call calibrate"):
            sparsifier.check(0.5)
        sparsifier.calibrate(batches(1), F.cross_entropy)
        before = copy.deepcopy(model.state_dict())
        sparsifier.check(0.5)
        assert same_state(before, model.state_dict())


def test_whole_inputs_are_compensated_and_can_be_removed():
    pytest.importorskip("torch_pruning", reason="shrink of channels needs torch-pruning")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))
    data = [torch.randn(8, 3, 8, 8)]
    errors = {}
    for compensate in (False, True):
        other = copy.deepcopy(model)
        sparsifier = pruned(other, data, 0.5, "channel", "local", layers="2", compensate=compensate)
        errors[compensate] = error_of(model[2], torch.relu(model[0](data[0])).detach(), other[2].weight.detach())
        assert sparsifier.sparsity == 0.5
    assert errors[True] < 0.7 * errors[False]
    assert shrink(other, data[0])[2].in_channels == 4


@pytest.mark.cuda
@pytest.mark.parametrize("criterion", ["large_final", "obs", "sparsegpt"])
@pytest.mark.parametrize("context", ["local", "per_output"])
def test_on_a_gpu_all_is_as_on_the_cpu(criterion, context):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(), nn.Linear(96, 3))
    seen = []
    for device in ("cpu", "cuda"):
        other = copy.deepcopy(model).double().to(device)
        data = [(inputs.double().to(device), labels.to(device)) for inputs, labels in batches(3)]
        sparsifier = pruned(other, data, 0.5, "weight", context, criterion, loss=F.cross_entropy)
        seen.append((sparsifier.masks, other.state_dict()))
    for name, mask in seen[0][0].items():
        assert torch.equal(mask, seen[1][0][name].cpu())
        assert torch.allclose(seen[0][1][name], seen[1][1][name].cpu(), atol=1e-6)


def test_heads_are_scored_by_obs_without_compensation():
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    sparsifier = Sparsifier(model, "head", criteria="obs", compensate=False)
    sparsifier.calibrate([(torch.randn(3, 5, 16), torch.randn(3, 5, 16)) for _ in range(4)], F.mse_loss)
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == pytest.approx(0.5, abs=0.01)
