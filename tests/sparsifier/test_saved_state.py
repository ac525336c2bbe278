"""Saving and loading the state of a Sparsifier."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from conftest import levels_of, small_net
from updates import alive, batches, moved, show_gradients

from sparsifai import Sparsifier, quantities, taken


@pytest.mark.parametrize("criterion", ["large_final", "random", "updating_movement", "magnitude_increase"])
def test_state_dict_resumes_bit_for_bit(criterion):
    def run(sparsifier, model, levels):
        for level in levels:
            moved(model)
            sparsifier.apply_masks()
            sparsifier.sparsify(level)

    model = small_net()
    sparsifier = Sparsifier(model, "kernel", criteria=criterion)
    run(sparsifier, model, (0.2, 0.4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "sparsifier": sparsifier.state_dict()}, file)
    torch.manual_seed(5)
    run(sparsifier, model, (0.6, 0.8))

    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = small_net()
    resumed.load_state_dict(state["model"])
    again = Sparsifier(resumed, "kernel", criteria=criterion)
    again.load_state_dict(state["sparsifier"])
    torch.manual_seed(5)
    run(again, resumed, (0.6, 0.8))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(mask, again.masks[name]) for name, mask in sparsifier.masks.items())
    assert levels_of(again) == levels_of(sparsifier)


def test_loading_a_state_applies_its_masks_and_levels(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.5)
    state = sparsifier.state_dict()
    other = copy.deepcopy(mlp)
    with torch.no_grad():
        other[0].weight.fill_(1)
    loaded = Sparsifier(other)
    loaded.load_state_dict(state)
    assert torch.equal(other[0].weight != 0, sparsifier.masks["0.weight"])
    assert levels_of(loaded) == levels_of(sparsifier)
    loaded.sparsify(0.25)  # a falling level, which only the levels tell
    assert sum(int((~mask).sum()) for mask in loaded.masks.values()) == 12


def without_levels(state):
    return {**state, "levels": {}}


def with_another_generator(state):
    return {**state, "rng": torch.zeros(3, dtype=torch.uint8)}


@pytest.mark.parametrize("change", [without_levels, with_another_generator])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, net):
    sparse = Sparsifier(small_net())
    sparse.sparsify(0.5)
    sparsifier, before = Sparsifier(net), copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="level|RNG"):
        sparsifier.load_state_dict(change(sparse.state_dict()))
    assert all(mask.all() for mask in sparsifier.masks.values())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert sparsifier.level == 0


def test_a_state_holds_collected_quantities(net, tmp_path):
    sparsifier = Sparsifier(net, criteria="snip")
    sparsifier.calibrate(batches(2), F.cross_entropy)
    torch.save(sparsifier.state_dict(), tmp_path / "state.pth")
    other = Sparsifier(copy.deepcopy(net), criteria="snip")
    other.load_state_dict(torch.load(tmp_path / "state.pth"))
    for each in (sparsifier, other):
        each.calibrate(batches(3)[2:], F.cross_entropy)
        each.sparsify(0.6)
    assert all(torch.equal(mask, other.masks[name]) for name, mask in sparsifier.masks.items())


def test_a_state_holds_quantities_of_any_shape(net):
    @quantities.register
    @taken("backward")
    def gradient_norms(sparsifier, name):
        return sparsifier.layers[name].parameter.grad.flatten(1).norm(dim=1)

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


def test_regrowth_continues_from_a_saved_state(mlp):
    def run(sparsifier, steps):
        for step in steps:
            show_gradients(sparsifier, step)
            with torch.no_grad():
                for name, mask in sparsifier.masks.items():
                    sparsifier.layers[name].parameter.add_(mask * 0.1)
            sparsifier.sparsify(0.6, drop=0.3)

    def increase(weight, init, grad):
        return (weight - init).abs() + grad.abs()

    first = Sparsifier(mlp, context="local", regrow=increase)
    run(first, range(3))
    weights, state = {name: value.clone() for name, value in mlp.state_dict().items()}, first.state_dict()
    run(first, range(3, 6))
    expected, explored = alive(first), first.report().explored
    mlp.load_state_dict(weights)
    second = Sparsifier(mlp, context="local", regrow=increase)
    second.load_state_dict(state)
    run(second, range(3, 6))
    assert torch.equal(alive(second), expected)
    assert second.report().explored == explored
