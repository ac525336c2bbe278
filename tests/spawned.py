"""What a process does that was started with 'spawn': it gets Sparsifiers and uses them."""

import pickle

import torch
from conftest import EXAMPLE, show_data, small_net

from sparsifai import Sparsifier, quantities, taken


@quantities.register
@taken("score")
def distance_to_start_here(source, name):
    return source.layers[name].parameter.abs()


def far_from_zero_here(weight, distance_to_start_here):
    return weight.abs() * distance_to_start_here


def own_axes(axes):
    return {"out": 2}


CASES = {
    "weight": {},
    "filter": {"granularity": "filter"},
    "coupled": {"granularity": "filter", "coupled": True, "example_input": EXAMPLE},
    "own criterion": {"criteria": far_from_zero_here},
    "own granularity": {"granularity": own_axes},
    "2:4": {"context": "2:4"},
    "movement": {"criteria": "movement"},
    "wanda": {"criteria": "wanda", "context": "local"},
    "regrow": {"regrow": "grad", "criteria": "random"},
}


def made(name):
    """A Sparsifier that has masks, of a model of its own."""
    torch.manual_seed(0)
    sparsifier = Sparsifier(small_net(), **CASES[name])
    with torch.no_grad():
        for parameter in sparsifier.model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    show_data(sparsifier)
    sparsifier.sparsify(0.3)
    return sparsifier


def used(sparsifier):
    """Use a Sparsifier as training does, and tell what it has then."""
    optimizer = torch.optim.SGD(sparsifier.model.parameters(), 0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        optimizer.zero_grad()
        sparsifier.model(torch.randn(4, 2, 8, 8, generator=generator)).square().mean().backward()
        sparsifier.mask_gradients()
        optimizer.step()
        sparsifier.apply_masks()
    show_data(sparsifier, seed=1)
    sparsifier.sparsify(0.5)
    return {
        "masks": {name: mask.clone() for name, mask in sparsifier.all_masks.items()},
        "weights": {name: weight.detach().clone() for name, weight in sparsifier.model.named_parameters()},
        "sparsity": sparsifier.sparsity,
    }


def use(sparsifiers, pickled, path):
    """What the process does."""
    torch.set_num_threads(1)
    sparsifiers["as bytes"] = pickle.loads(pickled)
    torch.save({name: used(sparsifier) for name, sparsifier in sparsifiers.items()}, path)
