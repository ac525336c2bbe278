"""Straight-through training in plain torch: dense weights move, masks are ranked from them, and the model is sparse."""

import copy
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import CRITERIA, EXAMPLE, show_data, small_net
from interrupts import interrupted, places
from torch import nn

from sparsifai import Sparsifier, blocks, contexts
from sparsifai.sparsifier import dense_weights

OPTIMIZERS = {
    "SGD": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=1e-2),
    "AdamW": lambda weights: torch.optim.AdamW(weights, 1e-2),
    "RMSprop": lambda weights: torch.optim.RMSprop(weights, 1e-3),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batch(step, size=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, size, generator=generator), torch.randint(4, (16,), generator=generator)


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def step(model, sparsifier, optimizer, number):
    inputs, targets = batch(number)
    loss = F.cross_entropy(model(inputs), targets)
    loss.backward()
    sparsifier.mask_gradients()
    with sparsifier.dense_weights():
        optimizer.step()
    optimizer.zero_grad()


def by_hand(weights, masks, decay, optimizer_of, number, state):
    """A step of the dense weights with the gradients at the sparse ones, by nothing but torch."""
    model = net()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name] * masks.get(name, torch.tensor(True)))
    inputs, targets = batch(number)
    gradients = torch.autograd.grad(F.cross_entropy(model(inputs), targets), list(model.parameters()))
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        pruned = ~masks[name] if name in masks else torch.tensor(False)
        weight.grad = gradient + decay * pruned * weight
    state.setdefault("optimizer", optimizer_of(list(weights.values()))).step()


def top(weight, sparsity):
    """The mask of the largest magnitudes; of equal ones the later."""
    pruned = int(sparsity * weight.numel() + 0.5)
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[weight.abs().flatten().sort(stable=True).indices[:pruned]] = False
    return mask.view(weight.shape)


@pytest.mark.parametrize("way", ["sparsify", "update_masks"])
@pytest.mark.parametrize("optimizer_of", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_masks_at_every_step_are_a_plain_top_k_of_dense_weights_that_move_as_the_formula_says(decay, optimizer_of, way):
    model, state, changes = net(), {}, 0
    optimizer = optimizer_of(model.parameters())
    sparsifier = Sparsifier(model, context="local", straight_through=True, decay=decay)
    dense = {name: nn.Parameter(weight) for name, weight in weights_of(model).items()}
    masks = {}
    for number in range(30):
        step(model, sparsifier, optimizer, number)
        by_hand(dense, masks, decay, optimizer_of, number, state)
        level = min(0.75, 0.05 * number)
        getattr(sparsifier, way)(level)
        earlier = masks
        masks = {name: top(dense[name].detach(), level) for name in ("0.weight", "2.weight")}
        changes += sum(int((masks[name] & ~mask).sum()) for name, mask in earlier.items())
        for name, parameter in model.named_parameters():
            expected = dense[name].detach() * masks.get(name, torch.tensor(True))
            assert torch.equal(parameter.detach(), expected), (number, name)
        assert all(torch.equal(sparsifier.masks[name], mask) for name, mask in masks.items())
    assert changes > 3  # masks have changed their mind


def test_the_step_of_sr_ste_is_its_formula():
    """Zhou et al., 2021, equation 10: W - lr (g(W * M) + decay (1 - M) W)."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 2, bias=False)
    sparsifier = Sparsifier(layer, context=blocks(4), straight_through=True, decay=0.1)
    sparsifier.sparsify(0.5)
    dense, mask = torch.randn(2, 8), sparsifier.masks["weight"].clone()
    state = sparsifier.state_dict()
    state["straight_through"]["values"]["weight"] = torch.where(mask, layer.weight.detach(), dense)
    sparsifier.load_state_dict(state)
    dense = state["straight_through"]["values"]["weight"]
    inputs = torch.randn(5, 8)
    (layer(inputs).square().sum() / 2).backward()
    gradient = (dense * mask @ inputs.T @ inputs).double()
    sparsifier.mask_gradients()
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    with sparsifier.dense_weights():
        optimizer.step()
        moved = layer.weight.detach().clone()
    expected = dense.double() - 0.01 * (gradient + 0.1 * (~mask) * dense.double())
    assert torch.allclose(moved.double(), expected, atol=1e-6)
    assert torch.equal(layer.weight.detach(), moved * mask)
    sparsifier.sparsify(0.5)
    quarters = moved.view(2, 2, 4).abs()
    kept = torch.zeros_like(quarters, dtype=torch.bool).scatter_(2, quarters.topk(2).indices, True)
    assert torch.equal(sparsifier.masks["weight"], kept.view(2, 8))


def show_pictures(model, number):
    """A backward pass of the small net, with a batch that the number makes."""
    torch.manual_seed(number)
    F.cross_entropy(model(torch.randn(4, 2, 8, 8)), torch.arange(4) % 3).backward()


unmoved = pytest.mark.filterwarnings("ignore:straight_through. no gradient reaches whole outputs")


def test_whole_outputs_are_told_to_get_no_gradient():
    with pytest.warns(UserWarning, match=r"no gradient reaches whole outputs.*kept again only where others shrink"):
        sparsifier = Sparsifier(small_net(), "filter", straight_through=True, example_input=EXAMPLE)
    sparsifier.sparsify(0.5)
    F.cross_entropy(sparsifier.model(torch.randn(4, 2, 8, 8)), torch.arange(4) % 3).backward()
    for name in ("0.weight", "3.weight"):
        pruned = ~sparsifier.masks[name].flatten()
        assert (sparsifier.layers[name].parameter.grad[pruned] == 0).all()


@unmoved
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter", "channel"])
@pytest.mark.parametrize("context", ["global", "local", "erk"])
def test_every_granularity_and_context_ranks_the_dense_weights(granularity, context, memory):
    model = small_net().to(memory_format=memory)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, granularity, context, straight_through=True, example_input=EXAMPLE)
    for number in range(6):
        show_pictures(model, number)
        sparsifier.mask_gradients()
        with sparsifier.dense_weights():
            optimizer.step()
            dense = copy.deepcopy(model)
        optimizer.zero_grad()
        level = 0.1 * (number + 1)
        expected = Sparsifier(dense, granularity, context, example_input=EXAMPLE)
        expected.sparsify(level)
        sparsifier.update_masks(level, optimizer)
        assert all(torch.equal(mask, sparsifier.masks[name]) for name, mask in expected.masks.items())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, dense.get_parameter(name)), name
            assert parameter.stride() == dense.get_parameter(name).stride()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_works_and_takes_the_weights_from_the_dense_ones(criterion):
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, criteria=criterion, context="local", straight_through=True, example_input=EXAMPLE)
    for number in range(4):
        show_pictures(model, number)
        sparsifier.mask_gradients()
        with sparsifier.dense_weights():
            optimizer.step()
        optimizer.zero_grad()
        if sparsifier.collected.at("forward", "loss"):
            show_data(sparsifier)
        sparsifier.sparsify(0.2 * (number + 1))
        assert all((weight_of(model, name)[~mask] == 0).all() for name, mask in sparsifier.masks.items())
    sparsifier.settle(optimizer)
    assert sparsifier.sparsity == pytest.approx(0.8, abs=0.02)


def weight_of(model, name):
    return model.get_parameter(name).detach()


def test_quantities_see_the_dense_weights_of_pruned_ones():
    seen = {}

    def criterion(weight, previous, init, weight_grad):
        seen.update(weight=weight.clone(), previous=previous.clone(), init=init.clone(), grad=weight_grad.clone())
        return weight.abs()

    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False)
    first = layer.weight.detach().clone()
    sparsifier = Sparsifier(layer, criteria=criterion, straight_through=True, decay=0)
    inputs = torch.randn(3, 4)
    layer(inputs).square().sum().backward()
    sparsifier.mask_gradients()
    sparsifier.sparsify(0.75)
    mask, layer.weight.grad = sparsifier.masks["weight"], None
    layer(inputs).square().sum().backward()
    sparse_gradient = layer.weight.grad.clone()
    sparsifier.mask_gradients()
    sparsifier.sparsify(0.75)
    assert (~mask).sum() == 12
    for quantity in ("weight", "previous", "init"):
        assert torch.equal(seen[quantity], first)
    dense_gradient = 2 * first @ inputs.T @ inputs
    # The mean of both batches: the values of pruned weights are there, so their scores go on accumulating.
    assert torch.allclose(seen["grad"], (first * dense_gradient + first * sparse_gradient) / 2, atol=1e-5)


def test_movement_pruning_as_published_freezes_what_is_pruned_while_its_scores_go_on():
    """Sanh et al., 2020: weights get gradients through the mask, scores get -w dL/d(w m) of all weights."""
    model = net()
    sparsifier = Sparsifier(
        model, context="local", criteria="movement_pruning", straight_through=True, decay=0, gradient_sparsity=1.0
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dense = {name: nn.Parameter(weight) for name, weight in weights_of(model).items()}
    scores, masks, returned = dict.fromkeys(("0.weight", "2.weight"), 0.0), {}, 0
    for number in range(20):
        step(model, sparsifier, optimizer, number)
        plain = net()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(dense[name] * masks.get(name, torch.tensor(True)))
        inputs, targets = batch(number)
        F.cross_entropy(plain(inputs), targets).backward()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if name in scores:
                    scores[name] = scores[name] - dense[name] * parameter.grad
                dense[name] -= 0.1 * parameter.grad * masks.get(name, torch.tensor(True))
        level = 0.04 * number
        sparsifier.sparsify(level)
        for name, score in scores.items():
            order = score.detach().flatten().sort(stable=True).indices
            mask = torch.ones(score.numel(), dtype=torch.bool)
            mask[order[: int(level * score.numel() + 0.5)]] = False
            returned += int((mask.view(score.shape) & ~masks.get(name, torch.ones_like(score, dtype=torch.bool))).sum())
            masks[name] = mask.view(score.shape)
            assert torch.equal(sparsifier.masks[name], masks[name])
            assert torch.allclose(weight_of(model, name), (dense[name] * masks[name]).detach(), atol=1e-6)
    assert returned > 0


@pytest.mark.parametrize(("lowest", "level"), [(0.5, 0.75), (0.75, 0.5), (0.5, 0.5)])
def test_top_kast_gives_gradients_to_the_highest_ranked_of_a_larger_set(lowest, level):
    model = net()
    sparsifier = Sparsifier(model, context="local", straight_through=True, decay=0, gradient_sparsity=lowest)
    dense = weights_of(model)
    sparsifier.sparsify(level)
    inputs, targets = batch(0)
    F.cross_entropy(model(inputs), targets).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    sparsifier.mask_gradients()
    for name, mask in sparsifier.masks.items():
        trained = top(dense[name], min(lowest, level))
        assert torch.equal(model.get_parameter(name).grad, gradients[name] * trained)
        assert (trained | ~mask).all()


@pytest.mark.parametrize("optimizer_of", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_at_sparsity_zero_training_is_that_of_a_dense_model_bit_for_bit(optimizer_of):
    ends = []
    for sparse in (False, True):
        model = net()
        optimizer = optimizer_of(model.parameters())
        sparsifier = Sparsifier(model, straight_through=True, decay=0.1) if sparse else None
        for number in range(10):
            inputs, targets = batch(number)
            F.cross_entropy(model(inputs), targets).backward()
            if sparsifier:
                sparsifier.mask_gradients()
            with sparsifier.dense_weights() if sparsifier else nullcontext():
                optimizer.step()
            optimizer.zero_grad()
            if sparsifier:
                sparsifier.sparsify(0.0)
        ends.append(weights_of(model))
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items())


def trained(steps=8, level=0.6, **options):
    model = net()
    sparsifier = Sparsifier(model, context="local", straight_through=True, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    for number in range(steps):
        step(model, sparsifier, optimizer, number)
        sparsifier.update_masks(level * (number + 1) / steps, optimizer)
    return model, sparsifier, optimizer


def go_on(model, sparsifier, optimizer, steps=range(8, 14)):
    for number in steps:
        step(model, sparsifier, optimizer, number)
        sparsifier.sparsify(0.8)
    return {**weights_of(model), **{f"mask of {name}": mask for name, mask in sparsifier.masks.items()}}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("order", ["model first", "Sparsifier first"])
@pytest.mark.parametrize("options", [{}, {"gradient_sparsity": 0.3}, {"criteria": "movement_pruning"}])
def test_training_resumes_exactly_from_saved_states(options, order, tmp_path):
    model, sparsifier, optimizer = trained(**options)
    saved = {"model": model.state_dict(), "sparsifier": sparsifier.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "saved")
    end = go_on(model, sparsifier, optimizer)
    saved = torch.load(tmp_path / "saved", weights_only=True)
    other, other_sparsifier, other_optimizer = trained(steps=3, **options)
    other_optimizer.load_state_dict(saved["optimizer"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in (other, other_sparsifier) if order == "model first" else (other_sparsifier, other):
            part.load_state_dict(saved["model" if part is other else "sparsifier"])
        assert same(end, go_on(other, other_sparsifier, other_optimizer))


def test_a_settled_state_resumes_settled():
    model, sparsifier, optimizer = trained()
    sparsifier.settle(optimizer)
    other, other_sparsifier, _ = trained(steps=3)
    other.load_state_dict(model.state_dict())
    other_sparsifier.load_state_dict(sparsifier.state_dict())
    assert not other_sparsifier.is_straight_through
    assert same(sparsifier.masks, other_sparsifier.masks)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_with_its_model_goes_on_like_the_first(way):
    together = trained()
    copied = copy.deepcopy(together) if way == "deepcopy" else pickle.loads(pickle.dumps(together))
    assert same(go_on(*together), go_on(*copied))


def test_settled_masks_stay_and_training_goes_on_as_that_of_a_sparse_model():
    model, sparsifier, optimizer = trained()
    masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    sparsifier.settle(optimizer)
    for name, mask in masks.items():
        moments = optimizer.state[model.get_parameter(name)]
        assert (moments["exp_avg"][~mask] == 0).all()
    for number in range(20, 26):
        step(model, sparsifier, optimizer, number)
        assert all((weight_of(model, name)[~mask] == 0).all() for name, mask in masks.items())
        sparsifier.sparsify(0.6)
        assert same(masks, sparsifier.masks)
    assert sparsifier.state_dict()["straight_through"] == {"values": {}, "trained": {}, "settled": True}
    sparsifier.sparsify(0.9)  # a rising sparsity only prunes more from here on
    assert all((mask <= masks[name]).all() for name, mask in sparsifier.masks.items())


def test_all_that_looks_at_the_model_sees_sparse_weights():
    model, sparsifier, optimizer = trained()
    views = {name: parameter.detach() for name, parameter in model.named_parameters()}  # the same memory
    step(model, sparsifier, optimizer, 50)
    sparsifier.sparsify(0.7)
    for name, mask in sparsifier.masks.items():
        parameter = model.get_parameter(name)
        assert torch.equal(parameter == 0, ~mask)
        assert parameter.data_ptr() == views[name].data_ptr()
        assert torch.equal(parameter.detach(), views[name])
        assert torch.equal(model.state_dict()[name], parameter)
    assert model.state_dict().keys() == net().state_dict().keys()
    assert sparsifier.report().selected.sparsity == sparsifier.sparsity


def test_what_is_changed_where_weights_are_kept_is_taken_over_and_the_rest_stays():
    model, sparsifier, optimizer = trained()
    dense = copy.deepcopy(sparsifier.state_dict()["straight_through"]["values"])
    masks = sparsifier.masks
    with torch.no_grad():
        for name in masks:
            model.get_parameter(name).mul_(2.0)
    with sparsifier.dense_weights():
        inside = weights_of(model)
    for name, mask in masks.items():
        assert torch.equal(inside[name], torch.where(mask, 2 * dense[name], dense[name]))


def test_a_step_outside_of_the_block_is_told():
    model, sparsifier, optimizer = trained()
    inputs, targets = batch(0)
    F.cross_entropy(model(inputs), targets).backward()
    sparsifier.mask_gradients()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"outside of the step of the optimizer.*with sparsifier.dense_weights"):
        sparsifier.sparsify(0.6)
    assert sparsifier.sparsity == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("step_of", ["scaler", "clipped", "accumulated"])
def test_scaled_clipped_and_accumulated_gradients_move_the_dense_weights(step_of):
    model, sparsifier, optimizer = trained()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    before = sparsifier.state_dict()["straight_through"]["values"]
    for part in range(2 if step_of == "accumulated" else 1):
        inputs, targets = batch(part)
        loss = F.cross_entropy(model(inputs), targets)
        (scaler.scale(loss) if step_of == "scaler" else loss).backward()
    if step_of == "scaler":
        scaler.unscale_(optimizer)
    sparsifier.mask_gradients()
    if step_of == "clipped":
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with sparsifier.dense_weights():
        scaler.step(optimizer) if step_of == "scaler" else optimizer.step()
    after = sparsifier.state_dict()["straight_through"]["values"]
    assert all((after[name] != before[name]).float().mean() > 0.9 for name in sparsifier.masks)
    assert all(torch.equal(weight_of(model, name) == 0, ~mask) for name, mask in sparsifier.masks.items())


def test_a_step_that_a_scaler_skips_changes_nothing():
    model, sparsifier, optimizer = trained()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    before, dense = weights_of(model), sparsifier.state_dict()["straight_through"]["values"]
    inputs, targets = batch(0)
    scaler.scale(F.cross_entropy(model(inputs), targets)).backward()
    scaler.unscale_(optimizer)
    model[0].weight.grad[0, 0] = float("inf")
    scaler._per_optimizer_states.clear()
    sparsifier.mask_gradients()
    with sparsifier.dense_weights():
        scaler.step(optimizer)
    assert same(before, weights_of(model))
    assert same(dense, sparsifier.state_dict()["straight_through"]["values"])


def test_an_error_in_the_step_leaves_the_model_sparse_and_keeps_what_it_moved():
    model, sparsifier, optimizer = trained()

    def failing():
        with sparsifier.dense_weights():
            model[0].weight.data.add_(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    for name, mask in sparsifier.masks.items():
        assert torch.equal(weight_of(model, name) == 0, ~mask)
    dense = sparsifier.state_dict()["straight_through"]["values"]["0.weight"]
    assert torch.equal(weight_of(model, "0.weight"), dense * sparsifier.masks["0.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["step", "sparsify", "update_masks", "settle"])
def test_an_interrupt_at_any_line_leaves_a_sparse_model_and_dense_weights_that_agree(way):
    def call(parts):
        model, sparsifier, optimizer = parts
        if way == "step":
            step(model, sparsifier, optimizer, 8)
        elif way == "settle":
            sparsifier.settle(optimizer)
        else:
            getattr(sparsifier, way)(0.75)

    def prepared():
        model, sparsifier, optimizer = trained()
        if way != "step":
            step(model, sparsifier, optimizer, 8)
        return model, sparsifier, optimizer

    whole = prepared()
    lines = interrupted(lambda: call(whole)).lines
    for at in places(lines, 150):
        model, sparsifier, optimizer = parts = prepared()
        interrupted(lambda parts=parts: call(parts), at)
        assert all(parameter.data_ptr() for parameter in model.parameters())
        sparsifier.apply_masks()
        state = sparsifier.state_dict()
        for name, mask in sparsifier.masks.items():
            assert (weight_of(model, name)[~mask] == 0).all(), at
            if name in state["straight_through"]["values"]:
                dense = state["straight_through"]["values"][name]
                assert torch.equal(dense * mask, weight_of(model, name)), at
        if way in ("sparsify", "update_masks", "settle"):  # doing it again gives what it gives without an interrupt
            call(parts)
            assert same(whole[1].masks, sparsifier.masks), at
            assert same(weights_of(whole[0]), weights_of(model)), at


@unmoved
def test_several_patterns_and_filters_followers_and_falling_levels_work():
    model = small_net()
    sparsifier = Sparsifier(model, "filter", straight_through=True, example_input=EXAMPLE)
    first = weights_of(model)
    sparsifier.sparsify({"0": 0.5, "3": 0.25})
    assert sparsifier.layers["5.weight"].level == 0
    assert (model[1].weight == 0).sum() == 4  # the norm layer behind the pruned filters
    sparsifier.sparsify(0.0)
    assert same(first, weights_of(model))  # nothing was lost


def test_a_failing_step_in_steps_restores_everything():
    def criterion(weight):
        calls.append(1)
        if len(calls) == 5:
            raise ZeroDivisionError
        return weight.abs()

    calls = []
    model = net()
    sparsifier = Sparsifier(model, context="local", criteria=criterion, straight_through=True)
    sparsifier.sparsify(0.3)
    with sparsifier.dense_weights():
        model[0].weight.data.add_(0.1)
    before, state = weights_of(model), sparsifier.state_dict()
    with pytest.raises(ZeroDivisionError):
        sparsifier.sparsify(0.9, steps=3)
    assert same(before, weights_of(model))
    assert same(state["masks"], sparsifier.masks)
    after = sparsifier.state_dict()["straight_through"]["values"]
    assert same(state["straight_through"]["values"], after)


def test_recovered_and_given_masks_are_ranked_anew_too():
    model, sparsifier, _ = trained()
    with torch.no_grad():
        model[0].weight[:, 0] = 0
    sparsifier.recover_masks()
    assert not sparsifier.masks["0.weight"][:, 0].any()
    given = torch.ones(16, 8, dtype=torch.bool)
    given[:, 1] = False
    dense = weight_of(model, "0.weight").clone()
    sparsifier.set_masks({"0.weight": given})
    assert torch.equal(weight_of(model, "0.weight"), dense * given)
    sparsifier.sparsify({"0.weight": 0.0})
    assert torch.equal(weight_of(model, "0.weight"), dense)


def test_a_random_criterion_can_have_fewer_gradients():
    model = net()
    sparsifier = Sparsifier(model, criteria="random", straight_through=True, gradient_sparsity=0.5)
    for level in (0.2, 0.4, 0.6, 0.8):
        sparsifier.sparsify(level)
        trained_masks = sparsifier.state_dict()["straight_through"]["trained"]
        assert all((trained_masks[name] | ~mask).all() for name, mask in sparsifier.masks.items())


@pytest.mark.parametrize("context", contexts)
def test_masks_do_not_depend_on_what_was_pruned_before(context):
    models = [net(), net()]
    for model, before in zip(models, ([], [0.25, 0.45]), strict=True):
        sparsifier = Sparsifier(model, context=context, straight_through=True)
        for level in before:
            sparsifier.sparsify(level)
            weights = weights_of(model)
        sparsifier.sparsify(0.5)
        model.masks = sparsifier.masks
    assert same(models[0].masks, models[1].masks)
    assert weights.keys() == weights_of(models[0]).keys()


def test_a_call_inside_the_block_is_refused():
    _, sparsifier, _ = trained()
    with sparsifier.dense_weights(), pytest.raises(RuntimeError, match="outside of this block"):
        sparsifier.sparsify(0.7)
    with sparsifier.dense_weights():
        assert repr(sparsifier).startswith("Sparsifier of Sequential: 2 layers, with dense weights; weight, ")
    sparsifier.sparsify(0.7)


@pytest.mark.parametrize("way", ["closure", "backward"])
def test_a_backward_pass_inside_the_block_is_refused_and_changes_nothing(way):
    model, sparsifier, optimizer = trained()
    before, dense = weights_of(model), sparsifier.state_dict()["straight_through"]["values"]
    inputs, targets = batch(0)

    def closure():
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"0\.weight|2\.weight"), sparsifier.dense_weights():  # noqa: PT012
        optimizer.step(closure) if way == "closure" else closure()
    assert same(before, weights_of(model))
    assert same(dense, sparsifier.state_dict()["straight_through"]["values"])
    closure()  # outside of the block it is allowed again


@pytest.mark.parametrize("options", [{}, {"decay": 0, "gradient_sparsity": 0.2}, {"decay": 0}], ids=str)
def test_a_step_that_no_gradients_were_prepared_for_is_told_once(options):
    model, sparsifier, optimizer = trained(**options)
    inputs, targets = batch(0)
    F.cross_entropy(model(inputs), targets).backward()
    told = pytest.warns(match="mask_gradients was not called") if options != {"decay": 0} else nullcontext()
    with told, sparsifier.dense_weights():
        optimizer.step()
    step(model, sparsifier, optimizer, 1)


def test_the_dense_weights_of_recovered_masks_are_moved_by_the_first_step():
    model, _, _ = trained()
    sparsifier, optimizer = Sparsifier(model, straight_through=True), torch.optim.SGD(model.parameters(), 0.1)
    sparsifier.recover_masks()
    assert sparsifier.sparsity > 0.5
    optimizer.zero_grad()
    step(model, sparsifier, optimizer, 0)
    values = sparsifier.state_dict()["straight_through"]["values"]
    assert all((values[name][~mask] != 0).float().mean() > 0.8 for name, mask in sparsifier.masks.items())
    assert all(torch.equal(weight_of(model, name) == 0, ~mask) for name, mask in sparsifier.masks.items())


def test_settling_before_anything_is_pruned_is_told():
    sparsifier = Sparsifier(net(), straight_through=True)
    with pytest.warns(match="no weight is pruned yet"):
        sparsifier.settle()
    sparsifier.settle()


def test_masks_of_a_layer_that_joins_are_applied_before_it_has_dense_weights():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
    model[1].weight.requires_grad_(False)
    sparsifier = Sparsifier(model, straight_through=True)
    sparsifier.sparsify(0.5)
    model[1].weight.requires_grad_(True)
    assert sparsifier.select_unfrozen() == ["1.weight"]
    mask = torch.arange(32).view(2, 16) % 3 > 0
    sparsifier.all_masks.add({"1.weight": mask})
    sparsifier.apply_masks()
    assert torch.equal(model[1].weight != 0, mask)
    assert (model[0].weight == 0).sum() == 64


def test_sparse_gradients_are_refused_if_they_are_to_be_pulled():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2))
    sparsifier = Sparsifier(model, layers=nn.Embedding, straight_through=True)
    sparsifier.sparsify(0.5)
    model(torch.arange(3)).sum().backward()
    with pytest.raises(ValueError, match=r"sparse tensor.*decay=0"):
        sparsifier.mask_gradients()


def test_a_model_that_is_cast_takes_its_dense_weights_along():
    model, sparsifier, _ = trained()
    dense = sparsifier.state_dict()["straight_through"]["values"]
    model.double()
    with sparsifier.dense_weights():
        assert all(torch.equal(weight_of(model, name), dense[name].double()) for name in sparsifier.masks)
    sparsifier.sparsify(0.7)
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())


def test_what_is_kept_by_given_masks_gets_gradients_though_it_ranked_low():
    model = net()
    sparsifier = Sparsifier(model, context="local", straight_through=True, decay=0, gradient_sparsity=0.5)
    sparsifier.sparsify(0.5)
    others = {name: ~mask for name, mask in sparsifier.masks.items()}
    sparsifier.set_masks(others)
    inputs, targets = batch(0)
    F.cross_entropy(model(inputs), targets).backward()
    gradients = {name: model.get_parameter(name).grad.clone() for name in others}
    sparsifier.mask_gradients()
    assert all(torch.equal(model.get_parameter(name).grad, gradients[name]) for name in others)


@pytest.mark.parametrize("call", ["apply_masks", "sparsify", "state_dict", "step", "settle"])
def test_sparse_weights_that_could_not_be_written_after_a_step_are_written_by_the_next_call(call, monkeypatch):
    """As when memory is short: the error comes at each try to write them."""
    model, sparsifier, optimizer = trained()

    def failing(*given):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(dense_weights, "write_masked", failing)
        with pytest.raises(MemoryError):
            step(model, sparsifier, optimizer, 8)
    assert all((weight_of(model, name)[~mask] == 0).all() for name, mask in sparsifier.masks.items())
    other, undisturbed, its_optimizer = trained()
    step(other, undisturbed, its_optimizer, 8)
    for parts in ((model, sparsifier, optimizer), (other, undisturbed, its_optimizer)):
        parts[2].zero_grad()
        if call == "step":
            with parts[1].dense_weights():
                pass
        elif call == "sparsify":
            parts[1].sparsify(0.7)
        else:
            getattr(parts[1], call)()
    assert same(weights_of(other), weights_of(model))
    assert same(undisturbed.masks, sparsifier.masks)
    sparsifier.apply_masks()
    assert same(weights_of(other), weights_of(model))


@pytest.mark.parametrize("way", ["sparsify", "apply_masks", "set_masks", "state_dict"])
def test_what_is_written_through_data_is_not_lost(way):
    """torch does not count such a write, with which the optimizers of fastai and older ones step."""
    model, sparsifier, _ = trained()
    layer, mask = model[0], sparsifier.masks["0.weight"]
    before = layer.weight.detach().clone()
    layer.weight.data.mul_(2)
    arguments = {"sparsify": (0.6,), "set_masks": ({"0.weight": mask},)}.get(way, ())
    getattr(sparsifier, way)(*arguments)
    with sparsifier.dense_weights():
        pass
    kept = mask & sparsifier.masks["0.weight"]
    assert torch.equal(layer.weight.detach()[kept], 2 * before[kept])


def test_a_step_through_data_outside_of_the_block_is_told():
    model, sparsifier, _ = trained()
    model[0].weight.data.add_(0.1)
    with pytest.warns(UserWarning, match="outside of the step of the optimizer"):
        sparsifier.sparsify(0.6)


@pytest.mark.parametrize("way", ["recovered", "recovered and saved"])
def test_a_step_after_masks_were_recovered_leaves_a_sparse_model(way):
    model = net()
    Sparsifier(model, context="local").sparsify(0.5)
    sparsifier = Sparsifier(model, context="local", straight_through=True)
    sparsifier.recover_masks()
    if way == "recovered and saved":
        state = sparsifier.state_dict()
        sparsifier = Sparsifier(model, context="local", straight_through=True)
        sparsifier.load_state_dict(state)
    step(model, sparsifier, torch.optim.SGD(model.parameters(), 0.1), 0)
    assert sparsifier.sparsity == 0.5
    dense = sparsifier.state_dict()["straight_through"]["values"]
    assert all((weight != 0).float().mean() > 0.9 for weight in dense.values())


def test_what_gets_gradients_stays_in_layers_that_are_not_asked_for():
    sparsifier = Sparsifier(net(), context="local", straight_through=True, gradient_sparsity=0.25)
    sparsifier.sparsify({"0": 0.75})
    sparsifier.sparsify({"2": 0.75})
    trained_masks = sparsifier.state_dict()["straight_through"]["trained"]
    assert {name: float((~mask).float().mean()) for name, mask in trained_masks.items()} == {
        "0.weight": 0.25, "2.weight": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize("way", ["sparsify", "apply_masks", "state_dict", "load_state_dict"])
def test_what_is_called_in_inference_mode_can_be_trained_on(way):
    model, sparsifier, optimizer = trained() if way != "sparsify" else (net(), None, None)
    if way == "sparsify":
        sparsifier = Sparsifier(model, straight_through=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.load_state_dict(model.state_dict())  # so that there is something to take over
    state = sparsifier.state_dict()
    with torch.inference_mode():
        getattr(sparsifier, way)(*{"sparsify": (0.5,), "load_state_dict": (state,)}.get(way, ()))
    model.load_state_dict(model.state_dict())
    step(model, sparsifier, optimizer, 0)
    sparsifier.sparsify(0.7)
    step(model, sparsifier, optimizer, 1)
    assert sparsifier.sparsity == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("way", ["sparsify", "update_masks"])
@pytest.mark.parametrize(("before", "after"), [(torch.channels_last, torch.contiguous_format),
                                               (torch.contiguous_format, torch.channels_last)])  # fmt: skip
def test_dense_weights_follow_the_memory_format_of_the_model(before, after, way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)).to(memory_format=before)
    sparsifier = Sparsifier(model, straight_through=True)
    sparsifier.sparsify(0.5)
    model.to(memory_format=after)
    with sparsifier.dense_weights():
        assert all(each.weight.is_contiguous(memory_format=after) for each in model)
    getattr(sparsifier, way)(0.505)
    assert sparsifier.sparsity == pytest.approx(0.505, abs=0.01)


def test_a_copy_inside_the_block_is_refused():
    model, sparsifier, _ = trained()
    with sparsifier.dense_weights():
        with pytest.raises(RuntimeError, match="copy.*outside of this block"):
            copy.deepcopy((model, sparsifier))
        with pytest.raises(RuntimeError, match="copy.*outside of this block"):
            pickle.dumps((model, sparsifier))


class Codes(torch.optim.SGD):
    """Keeps a moment as codes, which cannot be set to zero."""

    def step(self):
        super().step()
        for values in self.state.values():
            values["codes"] = values["momentum_buffer"].to(torch.uint8)


@pytest.mark.parametrize("way", ["mask_moments", "settle"])
def test_moments_that_cannot_be_set_to_zero_are_told_before_anything_is_settled(way):
    model, sparsifier, _ = trained()
    optimizer = Codes(model.parameters(), 0.1, momentum=0.9)
    step(model, sparsifier, optimizer, 0)
    with pytest.raises(TypeError, match="keeps `codes` of a weight as codes"):
        getattr(sparsifier, way)(optimizer)
    assert sparsifier.is_straight_through
    sparsifier.settle()


def test_moments_that_cannot_be_written_are_told_at_an_update():
    model, sparsifier, optimizer = trained()
    optimizer.state[model[0].weight]["exp_avg"] = torch.zeros(1, 1).expand(16, 8)
    with pytest.raises(TypeError, match="keeps `exp_avg` of a weight as an expanded tensor"):
        sparsifier.update_masks(0.7, optimizer)
    assert sparsifier.sparsity == pytest.approx(0.6, abs=0.01)
