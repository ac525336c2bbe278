"""Models in wrappers, compiled, or with weights that are computed from others: they work, or are refused clearly."""

import pytest
import torch
from conftest import small_net
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from sparsifai import Sparsifier


def spectral_norm(layer):
    return torch.nn.utils.spectral_norm(layer)


def weight_norm(layer):
    return torch.nn.utils.weight_norm(layer)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


class Halves(nn.Module):
    def forward(self, weight):
        return weight / 2


def halved(layer):
    parametrize.register_parametrization(layer, "weight", Halves())
    return layer


COMPUTED = {
    "parametrizations.weight_norm": (parametrizations.weight_norm, "5.parametrizations.weight.original0"),
    "parametrizations.spectral_norm": (parametrizations.spectral_norm, "5.parametrizations.weight.original"),
    "parametrizations.orthogonal": (lambda layer: parametrizations.orthogonal(layer), None),
    "an own parametrization": (halved, "5.parametrizations.weight.original"),
    "utils.weight_norm": (weight_norm, "5.weight_v"),
    "utils.spectral_norm": (spectral_norm, "5.weight_orig"),
    "utils.prune": (pruned, "5.weight_orig"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("granularity", ["weight", "filter"])
@pytest.mark.parametrize("way", COMPUTED)
def test_weights_that_are_computed_from_others_are_refused(way, granularity):
    wrap, name = COMPUTED[way]
    model = small_net()
    place = "12" if name is None else "5"
    model[int(place)] = wrap(model[int(place)])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"computed from {name or place}"):
        Sparsifier(model, granularity)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    sparsifier = Sparsifier(model, granularity, exclude=place)
    sparsifier.sparsify(0.5)
    assert not any(masked.startswith(f"{place}.") for masked in sparsifier.masks)
    assert [row.why_dense for row in sparsifier.report().rows if row.name.startswith(f"{place}.")] == ["excluded"]
    assert "0.weight" in sparsifier.masks
    assert "12.weight" not in sparsifier.masks or granularity == "weight"


def test_a_recurrent_layer_with_a_computed_weight_is_refused():
    model = nn.Sequential(nn.LSTM(4, 4), nn.Identity())
    prune.random_unstructured(model[0], "weight_hh_l0", 0.5)
    with pytest.raises(ValueError, match="computed from"):
        Sparsifier(model)
    assert list(Sparsifier(model, exclude="0.weight_hh*").masks) == ["0.weight_ih_l0"]


def test_a_layer_is_pruned_once_its_parametrization_is_removed():
    model = small_net()
    parametrizations.spectral_norm(model[5])
    parametrize.remove_parametrizations(model[5], "weight")
    Sparsifier(model).sparsify(0.5)
    assert 0 < (model[5].weight == 0).float().mean() < 1


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_in_part(model):
    model[3] = torch.compile(model[3], backend="eager")
    return model


WRAPPERS = {
    "torch.compile": compiled,
    "Module.compile": compiled_in_place,
    "a compiled layer": compiled_in_part,
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "compiled and averaged": lambda model: torch.optim.swa_utils.AveragedModel(compiled(model)),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
@pytest.mark.parametrize("granularity", ["weight", "filter"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_trained_like_the_model_inside(wrapper, granularity):
    torch.manual_seed(1)
    ends = []
    for wrap in (lambda model: model, WRAPPERS[wrapper]):
        torch.manual_seed(0)
        model = wrap(small_net())
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        sparsifier = Sparsifier(model, granularity, criteria="movement")
        for step in range(4):
            model(torch.randn(4, 2, 8, 8)).square().mean().backward()
            sparsifier.mask_gradients()
            optimizer.step()
            optimizer.zero_grad()
            sparsifier.sparsify(0.2 * (step + 1))
            sparsifier.mask_moments(optimizer)
        ends.append((model, sparsifier))
    (plain, expected), (wrapped, sparsifier) = ends
    if wrapper != "a compiled layer":
        assert list(sparsifier.masks) == list(expected.masks)
    masks = zip(sparsifier.masks.values(), expected.masks.values(), strict=True)
    assert all(torch.equal(mask, other) for mask, other in masks)
    parameters = zip(wrapped.parameters(), plain.parameters(), strict=True)
    assert all(torch.allclose(parameter, other) for parameter, other in parameters)
    assert sparsifier.sparsity == expected.sparsity


def test_a_learner_trains_a_compiled_model(make_learner):
    from sparsifai.all import SparsifyCallback

    callback, learn = SparsifyCallback(0.8), make_learner(compiled(small_net()))
    learn.fit(2, 0.1, cbs=callback)
    learn.fit(1, 0.1)
    weights = [parameter for parameter in learn.model.parameters() if parameter.dim() > 1]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == int(0.8 * sum(weight.numel() for weight in weights) + 0.5)
    assert "0.weight" in callback.sparsifier.masks
