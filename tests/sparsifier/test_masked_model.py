"""A model with masks: masks are applied, recovered from zeros, and released."""

import copy
import math
import pickle

import pytest
import torch
from conftest import follower_masks, levels_of, small_net
from torch import nn
from updates import moved

from sparsifai import Sparsifier


def test_gradients_of_masked_weights_are_zero_even_when_not_finite(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.5)
    mlp(torch.randn(3, 4)).sum().backward()
    mlp[0].weight.grad[0] = math.inf
    mlp[0].weight.grad[1] = math.nan
    before = mlp[0].weight.grad.clone()
    sparsifier.mask_gradients()
    mask = sparsifier.masks["0.weight"]
    assert (mlp[0].weight.grad[~mask] == 0).all()
    assert torch.equal(mlp[0].weight.grad[mask].nan_to_num(7), before[mask].nan_to_num(7))


def test_masks_are_applied_to_weights_that_are_not_finite(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.5)
    with torch.no_grad():
        mlp[0].weight.fill_(math.inf)
        mlp[2].weight.fill_(math.nan)
    sparsifier.apply_masks()
    assert sparsifier.sparsity == 0.5


def test_an_embedding_with_sparse_gradients_is_masked():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2))
    sparsifier = Sparsifier(model, layers=["0", "2"])
    sparsifier.sparsify(0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randint(10, (3, 2))).sum().backward()
    sparsifier.mask_gradients()
    optimizer.step()
    sparsifier.apply_masks()
    assert sparsifier.sparsity == 0.5


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_plain_loop_keeps_the_zeros(net, optimizer):
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    step = optimizer(net.parameters(), 0.05, weight_decay=0.1, **options)
    sparsifier = Sparsifier(net, "filter")
    sparsifier.sparsify(0.5)
    before, followed = sparsifier.report().selected.zeros, follower_masks(sparsifier)
    assert any(not mask.all() for mask in followed.values())
    for _ in range(5):
        step.zero_grad()
        nn.functional.cross_entropy(net(torch.randn(8, 2, 8, 8)), torch.randint(3, (8,))).backward()
        sparsifier.mask_gradients()
        step.step()
        sparsifier.apply_masks()
        assert sparsifier.report().selected.zeros == before
        parameters = dict(net.named_parameters())
        assert all((parameters[name][~mask] == 0).all() for name, mask in followed.items())


def test_nothing_is_left_on_the_model(net):
    keys, objects = list(net.state_dict()), {name: id(parameter) for name, parameter in net.named_parameters()}
    sparsifier = Sparsifier(net, "filter", criteria="magnitude_increase")
    moved(net)
    sparsifier.sparsify(0.5)
    assert list(net.state_dict()) == keys
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == objects
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in net.modules()
    )
    assert all(not parameter._backward_hooks for parameter in net.parameters())
    assert len(list(net.buffers())) == len(list(small_net().buffers()))
    copied = copy.deepcopy(net)
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), net.parameters(), strict=True))
    pickle.loads(pickle.dumps(net)).load_state_dict(net.state_dict(), strict=True)


def test_autograd_notices_that_masks_were_applied(mlp):
    sparsifier = Sparsifier(mlp)
    output = mlp(torch.randn(2, 4)).square().sum()
    sparsifier.sparsify(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@pytest.mark.parametrize("granularity", ["weight", "filter", "channel", lambda axes: {"out": 2}])
def test_masks_are_recovered_from_the_zeros_of_a_checkpoint(granularity):
    model = small_net()
    sparsifier = Sparsifier(model, granularity)
    sparsifier.sparsify(0.6)
    loaded = small_net()
    loaded.load_state_dict(model.state_dict())
    recovered = Sparsifier(loaded, granularity)
    recovered.recover_masks()
    for name, mask in sparsifier.masks.items():
        assert torch.equal(recovered.masks[name], mask)
    assert sorted(recovered.all_masks) == sorted(sparsifier.all_masks)
    shares = {name: float((~mask).float().mean()) for name, mask in sparsifier.masks.items()}
    assert levels_of(recovered) == pytest.approx(
        {name: min(share, recovered.sparsity) for name, share in shares.items()}
    )


def test_a_layer_of_zeros_is_recovered_as_dense(mlp):
    nn.init.zeros_(mlp[2].weight)
    sparsifier = Sparsifier(mlp)
    sparsifier.recover_masks()
    assert sparsifier.masks["2.weight"].all()


def test_a_group_with_some_zeros_is_recovered_as_kept(net):
    with torch.no_grad():
        net[3].weight[0, 0] = 0
    sparsifier = Sparsifier(net, "filter")
    sparsifier.recover_masks()
    assert sparsifier.masks["3.weight"].all()


def test_sparsifying_recovered_masks_at_the_same_level_revives_nothing():
    for seed in range(30):
        torch.manual_seed(seed)
        model = small_net()
        sparsifier = Sparsifier(model, "filter")
        sparsifier.sparsify(0.4)
        recovered = Sparsifier(model, "filter")
        recovered.recover_masks()
        before = dict(recovered.masks)
        recovered.sparsify(sparsifier.sparsity)
        assert all((mask <= before[name]).all() for name, mask in recovered.masks.items())


def test_given_masks_are_taken_and_stay_pruned_while_the_sparsity_rises(net):
    earlier = Sparsifier(net, "kernel", criteria="small_final")
    earlier.sparsify(0.3)
    for granularity in ("weight", "kernel"):
        later = Sparsifier(net, granularity)
        later.all_masks.add(earlier.masks)
        later.sparsify(0.1)
        for name, mask in earlier.masks.items():
            assert torch.equal(later.masks[name].expand_as(later.layers[name].parameter),
                               mask.expand_as(later.layers[name].parameter))  # fmt: skip
    rows = Sparsifier(net, "filter")
    rows.all_masks.add(earlier.masks)
    whole = (earlier.masks["3.weight"] == 0).flatten(1).all(1)
    assert torch.equal(~rows.masks["3.weight"].flatten(), whole)


@pytest.mark.parametrize("granularity", ["weight", "filter"])  # filters have followers, weights have none
def test_release_returns_the_model_and_ends_all_calls(mlp, granularity):
    sparsifier = Sparsifier(mlp, granularity)
    sparsifier.sparsify(0.5)
    assert sparsifier.release() is mlp
    assert (mlp[0].weight == 0).any()
    for call in ("apply_masks", "mask_gradients", "report", "state_dict", "release", "recover_masks"):
        with pytest.raises(RuntimeError, match="released"):
            getattr(sparsifier, call)()
    assert "released" in repr(sparsifier)
