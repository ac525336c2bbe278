"""Masks that come from elsewhere."""

import copy

import pytest
import torch
from conftest import follower_masks, small_net
from torch import nn
from torch.nn.utils import prune

from sparsifai import Sparsifier, from_torch_prune


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
def test_masks_of_another_sparsifier_are_set_and_applied(net, prefix, dtype):
    first = Sparsifier(copy.deepcopy(net), "filter", "local")
    first.sparsify(0.5)
    second = Sparsifier(net, "filter", "local")
    second.set_masks({prefix + name: mask.to(dtype) for name, mask in first.masks.items()})
    assert all(torch.equal(mask, second.masks[name]) for name, mask in first.masks.items())
    assert all(torch.equal(mask, second.all_masks[name]) for name, mask in follower_masks(first).items())
    assert second.sparsity == first.sparsity > 0.3
    assert (net[0].bias[~second.masks["0.weight"].flatten()] == 0).all()


def test_layers_that_are_not_named_stay_as_they_are_and_sparsify_goes_on_from_there(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.25)
    before = sparsifier.masks["2.weight"]
    mask = torch.ones(8, 4, dtype=torch.bool)
    mask[:6] = False
    sparsifier.set_masks({"0.weight": mask})
    assert torch.equal(sparsifier.masks["2.weight"], before)
    sparsifier.sparsify(0.75)
    assert not sparsifier.masks["0.weight"][:6].any()
    assert sparsifier.sparsity == 0.75
    sparsifier.sparsify(0.25)  # a falling sparsity lets weights come back
    assert sum(int((~mask).sum()) for mask in sparsifier.masks.values()) == 12


def test_a_mask_of_groups_broadcasts_to_single_weights(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.set_masks({"0.weight": torch.tensor([1.0, 0, 1, 0, 1, 1, 1, 1]).view(8, 1)})
    assert (mlp[0].weight == 0).sum(1).tolist() == [0, 4, 0, 4, 0, 0, 0, 0]


@pytest.mark.parametrize("amount", [0.3, 0.8])
def test_a_checkpoint_of_torch_prune_is_read(mlp, amount):
    pruned = copy.deepcopy(mlp)
    for index in (0, 2):
        prune.l1_unstructured(pruned[index], "weight", amount)
    prune.random_unstructured(pruned[0], "bias", 0.5)
    weights, masks = from_torch_prune(pruned.state_dict())
    assert set(weights) == set(mlp.state_dict())
    mlp.load_state_dict(weights)
    assert torch.equal(mlp[0].bias, pruned[0].bias)
    sparsifier = Sparsifier(mlp)
    sparsifier.set_masks({name: mask for name, mask in masks.items() if name in sparsifier.masks})
    for index in (0, 2):
        assert torch.equal(mlp[index].weight, pruned[index].weight)
        assert torch.equal(sparsifier.masks[f"{index}.weight"], pruned[index].weight_mask.bool())
    assert set(masks) == {"0.weight", "0.bias", "2.weight"}


def test_infinite_pruned_weights_of_a_checkpoint_become_zero():
    state = {"weight_orig": torch.tensor([[float("inf"), 2.0]]), "weight_mask": torch.tensor([[0.0, 1.0]])}
    assert from_torch_prune(state)[0]["weight"].tolist() == [[0.0, 2.0]]


@pytest.mark.parametrize("spoil", [
    lambda masks: {**masks, "12.wieght": torch.ones(1)},
    lambda masks: {**masks, "12.weight": masks["12.weight"][:, :1].expand(3, 5)},
    lambda masks: {**masks, "12.weight": torch.rand(3, 6)},
    lambda masks: {**masks, "12.weight": torch.tensor([[1.0, float("nan"), 0, 0, 0, 0]])},
])  # fmt: skip
def test_masks_that_do_not_fit_change_nothing(spoil):
    model = small_net()
    sparsifier = Sparsifier(model)
    sparsifier.sparsify(0.3)
    state, before = copy.deepcopy(sparsifier.state_dict()), copy.deepcopy(model.state_dict())
    masks = {name: torch.zeros_like(mask) for name, mask in sparsifier.masks.items()}
    masks["0.weight"][0] = True
    with pytest.raises(ValueError, match="set_masks"):
        sparsifier.set_masks(spoil(masks))
    assert all(torch.equal(mask, state["masks"][name]) for name, mask in sparsifier.masks.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_keeper_of_the_sparsifier_keeps_the_masks_that_are_set(make_learner):
    from sparsifai import KeepSparsity

    learn = make_learner()
    sparsifier = Sparsifier(learn.model)
    keeper = KeepSparsity(sparsifier)
    sparsifier.set_masks({"0.weight": nn.functional.pad(torch.ones(4, 2, 3, 3), (0, 0, 0, 0, 0, 0, 0, 4)) > 0})
    learn.fit(1, 0.1, cbs=keeper)
    assert (learn.model[0].weight[4:] == 0).all()
    assert (learn.model[0].weight[:4] != 0).all()


def test_a_model_with_a_child_of_the_name_of_a_wrapper_has_its_own_names():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 4)

    sparsifier = Sparsifier(Model())
    sparsifier.set_masks({"module.weight": torch.eye(4)})
    assert sparsifier.sparsity == 0.75
    sparsifier.set_masks({"_orig_mod.module.module.weight": 1 - torch.eye(4)})
    assert int((~sparsifier.masks["module.weight"]).sum()) == 4


def test_masks_that_are_no_masks_of_pruning_stay_in_a_checkpoint(mlp):
    prune.l1_unstructured(mlp[0], "weight", 0.5)
    state = {**mlp.state_dict(), "attn_mask": torch.ones(2)}
    weights, masks = from_torch_prune(state)
    assert set(weights) == {"0.weight", "0.bias", "2.weight", "2.bias", "attn_mask"}
    assert set(masks) == {"0.weight"}


def test_weights_that_were_active_by_given_masks_were_explored(mlp):
    sparsifier = Sparsifier(mlp, regrow="random")
    sparsifier.sparsify(0.5)
    before = sparsifier.report().explored
    sparsifier.set_masks({name: ~mask for name, mask in sparsifier.masks.items()})
    assert before == pytest.approx(0.5)
    assert sparsifier.report().explored == 1


def test_given_masks_stay_while_the_sparsity_of_all_layers_rises():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    sparsifier = Sparsifier(model, criteria="random")
    mask = torch.arange(100).view(10, 10) >= 90  # of both layers 45 %, which is less than is asked for next
    sparsifier.set_masks({"0.weight": mask})
    sparsifier.sparsify(0.5)
    assert not sparsifier.masks["0.weight"][~mask].any()
    assert sparsifier.sparsity == 0.5


TYPES = [
    getattr(torch, name)
    for name in (
        "float16", "bfloat16", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
        "float8_e5m2fnuz", "bool", "uint8", "int8", "int64", "uint16", "uint32", "uint64",
    )
]  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_masks_and_pruned_checkpoints_of_every_type(dtype):
    mask, model = torch.eye(4), nn.Linear(4, 4)
    sparsifier = Sparsifier(model)
    sparsifier.set_masks({"weight": mask.to(dtype)})
    assert torch.equal(sparsifier.masks["weight"], mask.bool())
    signed = -torch.ones(4, 4) if dtype.is_signed else torch.ones(4, 4)
    weights, masks = from_torch_prune({"w_orig": signed.to(dtype), "w_mask": mask.to(dtype)})
    assert torch.equal(masks["w"], mask.bool())
    assert weights["w"].dtype == dtype
    zeros = weights["w"].view(torch.uint8).reshape(16, -1)
    assert not zeros[~mask.bool().flatten()].any()
    assert zeros[mask.bool().flatten()].any(1).all()
