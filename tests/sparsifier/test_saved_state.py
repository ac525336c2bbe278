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


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(net):
    sparsifier = Sparsifier(net)
    state = Sparsifier(small_net(), "kernel").state_dict()
    with pytest.raises(
        ValueError,
        match="the mask of 0.weight is bools of the shape .8, 2, 1, 1. in the state and bools of",
    ):
        sparsifier.load_state_dict(state)
    with pytest.raises(
        ValueError, match="quantities .'init'., the criterion large_final needs ..; use the same criterion"
    ):
        sparsifier.load_state_dict(Sparsifier(small_net(), criteria="movement").state_dict())
    for foreign in ({"masks": {}}, None):
        with pytest.raises(ValueError, match="lacks the masks, levels, statistics or rng of a Sparsifier"):
            sparsifier.load_state_dict(foreign)
    good = Sparsifier(small_net()).state_dict()
    for key, value, message in (
        ("levels", {}, "the level of 0.weight is absent in the state and a number here"),
        ("masks", {**good["masks"], "0.weight": good["masks"]["0.weight"].float()}, "is numbers of the shape"),
        ("masks", {**good["masks"], "else": good["masks"]["0.weight"]}, "the mask of else is bools .* and absent here"),
    ):
        with pytest.raises(ValueError, match=message):
            sparsifier.load_state_dict({**good, key: value})
    with pytest.raises(RuntimeError, match="RNG state"):
        sparsifier.load_state_dict({**good, "rng": torch.zeros(3, dtype=torch.uint8)})
    assert all(mask.all() for mask in sparsifier.masks.values())


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


def test_a_quantity_of_any_shape_is_kept_in_a_state(net):
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


def test_saved_and_restored_it_goes_on_as_if_nothing_had_been(mlp):
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
    expected, explored = alive(first), first.explored
    mlp.load_state_dict(weights)
    second = Sparsifier(mlp, context="local", regrow=increase)
    second.load_state_dict(state)
    run(second, range(3, 6))
    assert torch.equal(alive(second), expected)
    assert second.explored == explored
    with pytest.raises(ValueError, match="use the same regrow="):
        Sparsifier(mlp, context="local").load_state_dict(state)
    with pytest.raises(ValueError, match="use the same criterion"):
        Sparsifier(mlp, context="local", regrow="random").load_state_dict(state)
    with pytest.raises(ValueError, match="lacks the weights that were ever used"):
        second.load_state_dict({**state, "regrowth": {k: v for k, v in state["regrowth"].items() if k != "used"}})
    state["regrowth"]["used"] = {"0.weight": torch.ones(3)}
    with pytest.raises(ValueError, match=r"the used mask of 0\.weight is numbers of the shape \(3,\)"):
        second.load_state_dict(state)
