"""Layers that a batch skips, and batches that do not count: their gradients are not finite, or they have no rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from updates import no_waiting

from sparsifai import Sparsifier, quantities, taken


class Skipping(nn.Module):
    """Skips its middle layer for negative inputs, as LayerDrop does by chance."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + torch.tanh(self.middle(x)) if float(x.detach().sum()) > 0 else x)


class Experts(nn.Module):
    """Sends each row to one of two experts; one may get no rows."""

    def __init__(self, skips):
        super().__init__()
        self.experts, self.skips = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]), skips

    def forward(self, x):
        out = x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            rows = (x[:, 0] > 0) == bool(number)
            if rows.any() or not self.skips:
                out[rows] = expert(x[rows])
        return out


def skipping():
    """A model, a batch that uses its middle layer, and one that skips it."""
    model = Skipping()
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(4) + 0.01 * torch.rand(4, 4)), model.first.bias.zero_()
    labels = torch.tensor([0, 1, 2])
    used = torch.rand(3, 4)
    return model, (used, labels), (-used, labels)


def gradient_of(model, batch, name):
    model.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    gradient = model.get_parameter(name).grad
    model.zero_grad()
    return gradient


@pytest.mark.parametrize("skipped_first", [False, True])
@pytest.mark.parametrize("way", ["calibrate", "collect_gradients", "mask_gradients"])
def test_a_missing_gradient_is_zero_for_its_batch(way, skipped_first):
    model, used, skipped = skipping()
    sparsifier = Sparsifier(model, criteria="snip")
    expected = gradient_of(model, used, "middle.weight") / 2
    both = [skipped, used] if skipped_first else [used, skipped]
    if way == "calibrate":
        sparsifier.calibrate(both, F.cross_entropy)
    else:
        for inputs, labels in both:
            model.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            getattr(sparsifier, way)()
    assert torch.allclose(sparsifier.collected.stored["grad"]["middle.weight"], expected, atol=1e-7)
    assert sparsifier.collected.counts["grad"] == dict.fromkeys(sparsifier.masks, 2)
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == pytest.approx(0.5, abs=0.02)


def test_the_gradient_that_was_missing_is_none_again():
    model, _, skipped = skipping()
    sparsifier = Sparsifier(model, criteria="snip")
    F.cross_entropy(model(skipped[0]), skipped[1]).backward()
    sparsifier.collect_gradients()
    assert model.middle.weight.grad is None


def test_a_hessian_counts_a_skipped_layer_as_zero():
    model, used, skipped = skipping()
    alone, both = (Sparsifier(model, criteria="grasp") for _ in range(2))
    alone.calibrate([used], F.cross_entropy)
    both.calibrate([used, skipped], F.cross_entropy)
    one, two = (each.collected.stored["hessian_grad"]["middle.weight"] for each in (alone, both))
    assert torch.allclose(two, one / 2)
    assert two.abs().max() > 0


def test_quantities_of_users_see_zeros_too():
    @quantities.register
    @taken("backward")
    def sign_of_gradient(source, name):
        return source.layers[name].parameter.grad.sign()

    try:
        model, used, skipped = skipping()
        sparsifier = Sparsifier(model, criteria=lambda weight, sign_of_gradient: (weight * sign_of_gradient).abs())
        sparsifier.calibrate([used, skipped], F.cross_entropy)
        stored = sparsifier.collected.stored["sign_of_gradient"]["middle.weight"]
        assert torch.equal(stored, gradient_of(model, used, "middle.weight").sign() / 2)
    finally:
        del quantities._functions["sign_of_gradient"]


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("criterion", ["snip", "fisher", "taylor", "movement_pruning", "grasp", "wanda"])
def test_an_expert_without_rows_is_scored_by_the_other_batches(criterion, skips):
    model = Experts(skips)
    rows, labels = torch.rand(6, 4) + 0.1, torch.tensor([0, 1, 2, 0, 1, 2])
    mixed = rows * torch.tensor([1, -1, 1, -1, 1, -1]).unsqueeze(1)
    sparsifier = Sparsifier(model, context="local", criteria=criterion, layers="*")
    sparsifier.calibrate([(rows, labels), (mixed, labels)], F.cross_entropy)
    for quantity, values in sparsifier.collected.stored.items():
        assert all(bool(value.isfinite().all()) for value in values.values()), quantity
    if criterion == "wanda":  # the first batch has no rows for this expert
        seen = sparsifier.collected.value("activation", "experts.0.weight")
        assert torch.allclose(seen, mixed[1::2].square().mean(0).sqrt())
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == 0.5


@pytest.mark.parametrize("criterion", ["snip", "grasp", "wanda"])
def test_a_batch_without_rows_is_skipped(criterion):
    model = nn.Sequential(nn.Linear(4, 3))
    inputs, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    empty = inputs[:0], labels[:0]
    one, two = (Sparsifier(model, criteria=criterion, layers="0") for _ in range(2))
    one.calibrate([(inputs, labels)], F.cross_entropy)
    two.calibrate([empty, (inputs, labels), empty], F.cross_entropy)
    for quantity, values in one.collected.stored.items():
        assert torch.equal(values["0.weight"], two.collected.stored[quantity]["0.weight"])
    with pytest.raises(ValueError, match="all are without rows"):
        two.calibrate([empty], F.cross_entropy)


def test_a_layer_that_no_batch_uses_is_told_at_the_update():
    model, used, skipped = skipping()
    sparsifier = Sparsifier(model, criteria="snip")
    F.cross_entropy(model(skipped[0]), skipped[1]).backward()
    sparsifier.collect_gradients()
    with pytest.warns(UserWarning, match=r"snip: no batch so far has used middle\.weight"):
        sparsifier.sparsify(0.2)
    model.zero_grad()
    F.cross_entropy(model(used[0]), used[1]).backward()
    sparsifier.collect_gradients()
    sparsifier.sparsify(0.3)  # now one has
    assert sparsifier.sparsity == pytest.approx(0.3, abs=0.02)


def test_gradients_that_no_backward_has_made_are_refused():
    model, _, _ = skipping()
    with pytest.raises(ValueError, match="no gradient has reached first.weight or any other selected layer"):
        Sparsifier(model, criteria="snip").collect_gradients()


# --- Gradients that are not finite ------------------------------------------------------------------------------------


def poison(model, value, name="last.weight"):
    with torch.no_grad():
        model.get_parameter(name).grad[0, 0] = value


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("criterion", ["snip", "taylor", "fisher", "movement_pruning"])
def test_a_batch_whose_gradients_are_not_finite_is_left_out(criterion, value):
    model, used, _ = skipping()
    sparsifiers = [Sparsifier(model, criteria=criterion) for _ in range(2)]
    for overflow in (False, True, False):
        model.zero_grad()
        F.cross_entropy(model(used[0]), used[1]).backward()
        for sparsifier in sparsifiers[overflow:]:
            if overflow:
                poison(model, value)
            sparsifier.collect_gradients()
    plain, poisoned = (each.collected for each in sparsifiers)
    for quantity, values in plain.stored.items():
        for name, mean in values.items():
            assert torch.equal(mean, poisoned.stored[quantity][name])
            assert poisoned.counts[quantity][name] == 2
    sparsifiers[1].sparsify(0.5)
    assert sparsifiers[1].sparsity == pytest.approx(0.5, abs=0.02)


def test_an_overflow_keeps_the_mean_of_before_the_last_update():
    model, used, _ = skipping()
    sparsifier = Sparsifier(model, criteria="snip")
    sparsifier.calibrate([used], F.cross_entropy)
    sparsifier.sparsify(0.2)
    F.cross_entropy(model(used[0]), used[1]).backward()
    poison(model, float("inf"))
    sparsifier.collect_gradients()
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == pytest.approx(0.5, abs=0.02)


def test_with_overflows_alone_there_is_nothing_to_score_by():
    model, used, _ = skipping()
    sparsifier = Sparsifier(model, criteria="snip")
    F.cross_entropy(model(used[0]), used[1]).backward()
    poison(model, float("nan"))
    sparsifier.mask_gradients()
    with pytest.raises(ValueError, match="has seen no batch with finite gradients"):
        sparsifier.sparsify(0.5)


def test_a_grad_scaler_in_a_plain_loop_poisons_nothing():
    model, used, _ = skipping()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**125)
    sparsifier, skipped = Sparsifier(model, criteria="snip"), 0
    for step in range(8):
        optimizer.zero_grad()
        scaler.scale(10 * F.cross_entropy(model(used[0]), used[1])).backward()
        scaler.unscale_(optimizer)
        skipped += not all(bool(each.grad.isfinite().all()) for each in model.parameters())
        sparsifier.mask_gradients()
        scaler.step(optimizer)
        scaler.update()
        sparsifier.apply_masks()
        if step % 4 == 3:
            sparsifier.sparsify(0.1 * step)
    assert 0 < skipped < 8
    assert sparsifier.sparsity == pytest.approx(0.7, abs=0.02)


def root_of_zero(output, target):
    return F.cross_entropy(output, target) + (0 * output.sum()).abs().sqrt()


@pytest.mark.parametrize("criterion", ["snip", "grasp"])
def test_calibrate_leaves_out_such_batches_and_says_how_many(criterion):
    model, used, _ = skipping()
    calls = []

    def sometimes(output, target):
        calls.append(1)
        return (root_of_zero if len(calls) % 2 else F.cross_entropy)(output, target)

    one, two = (Sparsifier(model, criteria=criterion) for _ in range(2))
    one.calibrate([used], F.cross_entropy)
    with pytest.warns(UserWarning, match="1 of 2 batches are left out, because their gradients have inf or NaN"):
        two.calibrate([used, used], sometimes)
    for quantity, values in one.collected.stored.items():
        assert all(torch.equal(value, two.collected.stored[quantity][name]) for name, value in values.items())
    with pytest.raises(ValueError, match="the gradients of all batches have inf or NaN"):
        two.calibrate([used], root_of_zero)


def test_regrowth_is_left_out_where_no_gradient_is_finite():
    model, used, _ = skipping()
    sparsifier = Sparsifier(model, regrow="grad")
    sparsifier.sparsify(0.5)
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    F.cross_entropy(model(used[0]), used[1]).backward()
    poison(model, float("inf"))
    sparsifier.collect_gradients()
    with pytest.warns(UserWarning, match="nothing regrows in this update"):
        sparsifier.sparsify(0.5, drop=0.3)
    assert all(torch.equal(mask, before[name]) for name, mask in sparsifier.masks.items())
    model.zero_grad()
    F.cross_entropy(model(used[0]), used[1]).backward()
    sparsifier.collect_gradients()
    sparsifier.sparsify(0.5, drop=0.3)
    assert not all(torch.equal(mask, before[name]) for name, mask in sparsifier.masks.items())


@pytest.mark.parametrize("overflows", [(1,), (1, 2), (0, 2)])
def test_flags_that_nobody_reads_give_the_same_means(overflows, monkeypatch):
    """On a GPU the host does not read whether gradients are finite."""
    model, used, _ = skipping()
    read, unread = (Sparsifier(model, criteria="snip") for _ in range(2))

    def go(sparsifier):
        for step in range(6):
            model.zero_grad()
            F.cross_entropy(model(used[0] * (step + 1)), used[1]).backward()
            if step in overflows:
                poison(model, float("nan"))
            sparsifier.collect_gradients()
            if step == 3:
                sparsifier.collected.take("update")
        return sparsifier.collected

    plain = go(read)
    monkeypatch.setattr("sparsifai.sparsifier.collection._is_known", lambda flag: False)
    lazy = go(unread)
    assert {name: int(count) for name, count in lazy.counts["grad"].items()} == plain.counts["grad"]
    assert lazy.state()["counts"] == plain.state()["counts"]
    for name, mean in plain.stored["grad"].items():
        assert torch.allclose(mean, lazy.stored["grad"][name])


def test_flags_are_not_read_where_there_is_an_earlier_mean():
    """Tensors of torch's `meta` device have no values: whatever would wait for a GPU raises."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    sparsifier = Sparsifier(model, criteria="snip")
    collected = sparsifier.collected
    model.to("meta")
    for layer in collected.source.layers.values():
        layer.parameter.grad = torch.ones_like(layer.parameter)
    shapes = {name: layer.parameter.shape for name, layer in collected.source.layers.items()}
    collected.stored["grad"] = {name: torch.zeros(shape, device="meta") for name, shape in shapes.items()}
    collected.counts["grad"] = dict.fromkeys(shapes, 1)
    for _ in range(2):
        sparsifier.collect_gradients()
        collected.take("update")
    assert all(count.device.type == "meta" for count in collected.counts["grad"].values())


@pytest.mark.cuda
def test_on_a_gpu_no_overflow_is_waited_for():
    model, used, _ = skipping()
    model, used = model.cuda(), tuple(each.cuda() for each in used)
    sparsifier = Sparsifier(model, criteria="snip")
    for step in range(4):
        model.zero_grad()
        F.cross_entropy(model(used[0]), used[1]).backward()
        if step == 1:
            poison(model, float("inf"))
        if step:
            with no_waiting():
                sparsifier.collect_gradients()
        else:
            sparsifier.collect_gradients()
    assert {int(count) for count in sparsifier.collected.counts["grad"].values()} == {3}
    assert all(bool(mean.isfinite().all()) for mean in sparsifier.collected.stored["grad"].values())
