"""A Sparsifier in a process that was started with 'spawn', and what cannot get there."""

import copy
import multiprocessing
import pickle

import pytest
import torch
from conftest import has_ties, misses_sparsity
from spawned import CASES, made, own_axes, use, used

from sparsifai import Sparsifier

pytestmark = [has_ties, misses_sparsity]


@pytest.mark.slow
def test_a_spawned_process_goes_on_as_this_one_does(tmp_path):
    pytest.importorskip("torch_pruning", reason="coupled=True needs torch-pruning")
    sparsifiers = {name: made(name) for name in CASES}
    # One goes as bytes. The others go as they are: then both processes share the memory of their tensors.
    expected = {name: used(copy.deepcopy(sparsifier)) for name, sparsifier in sparsifiers.items()}
    process = multiprocessing.get_context("spawn").Process(
        target=use, args=(sparsifiers, pickle.dumps(sparsifiers["filter"]), tmp_path / "there")
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0
    there = torch.load(tmp_path / "there", weights_only=True)
    torch.testing.assert_close(there, {**expected, "as bytes": expected["filter"]}, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_copy_and_a_pickle_go_on_as_the_sparsifier_does(name):
    if "coupled" in CASES[name]:
        pytest.importorskip("torch_pruning", reason="coupled=True needs torch-pruning")
    sparsifier = made(name)
    others = copy.deepcopy(sparsifier), pickle.loads(pickle.dumps(sparsifier))
    expected = used(sparsifier)
    for other in others:
        torch.testing.assert_close(used(other), expected, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_what_cannot_be_pickled_can_be_copied(mlp, copied):
    mlp[0].register_forward_hook(lambda layer, inputs, output: None)
    sparsifier = Sparsifier(mlp, lambda axes: {"out": 1}, criteria=lambda weight: weight.abs())
    other = copied(sparsifier)
    other.sparsify(0.5)
    assert (other.model is mlp) == (copied is copy.copy)
    assert other.sparsity == 0.5


@pytest.mark.parametrize(
    ("options", "hook", "message"),
    [
        ({"criteria": lambda weight: weight.abs()}, None, "criteria=<lambda> cannot be pickled"),
        ({"granularity": lambda axes: {"out": 1}}, None, "granularity=<lambda> cannot be pickled"),
        ({"context": lambda layers, sparsity: []}, None, "context=<lambda> cannot be pickled"),
        ({"granularity": own_axes}, lambda layer, inputs, output: None, "the hook <lambda> on '0' .*; remove the hook"),
    ],
)
def test_what_cannot_be_pickled_is_named(mlp, options, hook, message):
    sparsifier = Sparsifier(mlp, **options)
    if hook is not None:
        mlp[0].register_forward_hook(hook)
    with pytest.raises(pickle.PicklingError, match=message):
        pickle.dumps({"kept": [sparsifier]})


class Counted(torch.nn.Sequential):
    """A model that hooks its own method on its layers, and counts how often it is pickled."""

    pickled = 0

    def see(self, layer, inputs, output):
        pass

    def __getstate__(self):
        Counted.pickled += 1
        return super().__getstate__()


def test_a_model_with_its_own_methods_as_hooks_is_pickled_once():
    model = Counted(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    for layer in model:
        layer.register_forward_hook(model.see)
    sparsifier, Counted.pickled = Sparsifier(model), 0
    other = pickle.loads(pickle.dumps(sparsifier))
    assert Counted.pickled == 1
    assert next(iter(other.model[0]._forward_hooks.values())).__self__ is other.model
