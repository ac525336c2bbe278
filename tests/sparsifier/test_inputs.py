"""Inputs of any form: several, named, in lists, called by keyword, and made under inference_mode."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import layers_of
from torch import nn
from updates import scores_of

from sparsifai import Sparsifier, sensitivity

OF_DATA = ("snip", "grasp", "taylor", "fisher", "movement_pruning", "wanda")


class Two(nn.Module):
    """Two inputs of the same size, and layers that are called by keyword."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, one, two):
        return self.last(input=torch.relu(self.left(input=one) + self.right(input=two)))


class Positional(Two):
    def forward(self, one, two):
        return self.last(torch.relu(self.left(one) + self.right(two)))


class Images(nn.Module):
    """Takes a list of images of different sizes, as detection models do."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 3)

    def forward(self, images, targets=None):
        return self.head(torch.stack([torch.relu(self.body(image[None])).mean((0, 2, 3)) for image in images]))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids, scale=None):
        out = self.embedding(ids).mean(1)
        return {"logits": self.head(torch.relu(self.layer(out if scale is None else out * scale))), "ids": ids}


def pair(size=5):
    return torch.randn(size, 4), torch.randn(size, 4)


def same_masks(one, two):
    return one.masks.keys() == two.masks.keys() and all(
        torch.equal(mask, two.masks[name]) for name, mask in one.masks.items()
    )


# --- synflow ----------------------------------------------------------------------------------------------------------


def flow_of(model, run):
    """dR/d|w| of every weight, plainly; R is the sum of the outputs for one example of ones."""
    positive = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()
    run(positive).sum().backward()
    return {name: parameter.grad for name, parameter in positive.named_parameters()}


ONES = torch.ones(1, 4, dtype=torch.float64)


@pytest.mark.parametrize("form", ["a tuple", "a list", "a dictionary", "keywords of a keyword model"])
def test_synflow_of_several_inputs_is_its_formula(form):
    model, (one, two) = (Two() if "model" in form else Positional()), pair()
    given = {"a tuple": (one, two), "a list": [one, two]}.get(form, {"one": one, "two": two})
    sparsifier = Sparsifier(model, criteria="synflow", example_input=given)
    expected = flow_of(model, lambda positive: positive(ONES, ONES))
    for name, weight in layers_of(sparsifier).items():
        score = scores_of(sparsifier, name)
        assert torch.allclose(score.double(), expected[name] * weight.parameter.detach().abs().double())
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("given", [(torch.tensor([[1, 2], [3, 4]]),), {"ids": torch.tensor([[1, 2], [3, 4]])}])
def test_synflow_of_tokens_and_of_outputs_in_a_dictionary(given):
    sparsifier = Sparsifier(Tokens(), criteria="synflow", example_input=given)
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == pytest.approx(0.5, abs=0.02)


def images():
    return [torch.randn(3, 8, 8), torch.randn(3, 6, 9)]


@pytest.mark.parametrize("form", ["a tuple", "a dictionary"])
@pytest.mark.parametrize("criterion", ["synflow", "large_final"])
def test_a_list_of_images_is_not_cut(criterion, form):
    given = (images(),) if form == "a tuple" else {"images": images()}
    sparsifier = Sparsifier(Images(), "filter", criteria=criterion, example_input=given)
    sparsifier.sparsify(0.4)
    assert [len(image) for image in (given[0] if form == "a tuple" else given["images"])] == [3, 3]
    assert sparsifier.sparsity == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("criterion", OF_DATA)
def test_a_list_of_images_is_calibrated_with(criterion):
    model, labels = Images(), torch.tensor([0, 2])
    sparsifier = Sparsifier(model, criteria=criterion)
    sparsifier.calibrate([(images(), labels)], F.cross_entropy)
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == pytest.approx(0.5, abs=0.02)


@pytest.mark.fastai
def test_a_list_of_images_in_a_learner(make_learner):
    from fastai.callback.core import Callback

    from sparsifai import SparsifyCallback

    class AsList(Callback):
        def before_batch(self):
            self.learn.xb = ([*self.xb[0]],)

    learn = make_learner(Images(), shape=(3, 8, 8))
    callback = SparsifyCallback(0.4, "filter", criteria="synflow", schedule="one_shot")
    learn.fit(1, 0.01, cbs=[AsList(), callback])
    assert callback.sparsifier.sparsity == pytest.approx(0.4, abs=0.01)


def test_inputs_of_other_first_axes_are_not_cut():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, nodes, edges):
            source, target = edges
            hidden = torch.relu(self.layer(nodes))
            return self.last(hidden.index_add(0, target, hidden[source]))

    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    sparsifier = Sparsifier(Graph(), criteria="synflow", example_input=(torch.randn(3, 4), edges))
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == pytest.approx(0.5, abs=0.02)


# --- Layers that are called by keyword --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["several inputs", "named inputs"])
@pytest.mark.parametrize("criterion", OF_DATA)
def test_layers_called_by_keyword_are_calibrated_like_others(criterion, batch):
    one, labels = Two(), torch.tensor([0, 1, 2, 0, 1])
    two = Positional()
    two.load_state_dict(one.state_dict())
    inputs = pair()
    named = {"one": inputs[0], "two": inputs[1]}
    given, loss = ((*inputs, labels), F.cross_entropy) if batch == "several inputs" else (
        named, lambda output, batch: F.cross_entropy(output, labels)
    )  # fmt: skip
    sparsifiers = [Sparsifier(model, criteria=criterion) for model in (one, two)]
    for sparsifier in sparsifiers:
        sparsifier.calibrate([given], loss)
        sparsifier.sparsify(0.5)
    assert same_masks(*sparsifiers)
    assert sparsifiers[0].sparsity == pytest.approx(0.5, abs=0.02)


def test_the_input_is_the_first_parameter_of_a_layer_in_whatever_order_keywords_come():
    class Gated(nn.Linear):
        def forward(self, input, gate):
            return super().forward(input) * gate

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Gated(4, 3)

        def forward(self, x):
            return self.layer(gate=torch.ones(3), input=x)

    inputs = torch.randn(5, 4)
    sparsifier = Sparsifier(Net(), criteria="wanda", layers="layer")
    sparsifier.calibrate([inputs])
    seen = sparsifier.collected.value("activation", "layer.weight")
    assert torch.allclose(seen, inputs.square().mean(0).sqrt())


# --- Tensors made under inference_mode --------------------------------------------------------------------------------


def calibrated(model, criterion, batch, example=None):
    sparsifier = Sparsifier(model, criteria=criterion, example_input=example)
    sparsifier.calibrate([batch], F.cross_entropy)
    sparsifier.sparsify(0.5)
    return sparsifier


@pytest.mark.parametrize("criterion", OF_DATA)
def test_batches_made_under_inference_mode_give_the_same_masks(criterion):
    model, labels = Positional(), torch.tensor([0, 1, 2, 0, 1])
    inputs = pair()
    plain = calibrated(copy.deepcopy(model), criterion, (*inputs, labels))
    with torch.inference_mode():
        frozen = tuple(each.clone() for each in (*inputs, labels))
    assert all(each.is_inference() for each in frozen)
    assert same_masks(plain, calibrated(copy.deepcopy(model), criterion, frozen))
    with torch.inference_mode():
        within = Sparsifier(model, criteria=criterion)
        within.calibrate([frozen], F.cross_entropy)
        within.sparsify(0.5)
    assert same_masks(plain, within)


@pytest.mark.parametrize("within", [False, True])
def test_synflow_takes_an_example_made_under_inference_mode(within):
    with torch.inference_mode():
        ids, scale = torch.tensor([[1, 2], [3, 4]]), torch.ones(2, 1)
    model = Tokens()
    plain = Sparsifier(copy.deepcopy(model), criteria="synflow", example_input=(ids.clone(), scale.clone()))
    plain.sparsify(0.5)
    with torch.inference_mode(within):
        sparsifier = Sparsifier(model, criteria="synflow", example_input=(ids, scale))
        sparsifier.sparsify(0.5)
    assert same_masks(plain, sparsifier)


def test_sensitivity_calibrates_with_such_batches():
    with torch.inference_mode():
        batch = (*pair(), torch.tensor([0, 1, 2, 0, 1]))
    model = Positional()
    metric = lambda model: float(model(*(each.clone() for each in batch[:2])).sum())  # noqa: E731
    measured = sensitivity(model, metric, criteria="snip", calibration=[batch], loss_func=F.cross_entropy, levels=[0.5])
    assert len(str(measured)) > 0


@pytest.mark.fastai
@pytest.mark.parametrize("criterion", ["snip", "wanda", "grasp"])
def test_such_batches_calibrate_in_a_learner(make_learner, criterion):
    from updates import batches

    from sparsifai import SparsifyCallback

    with torch.inference_mode():
        given = [tuple(each.clone() for each in batch) for batch in batches(2)]
    learn = make_learner()
    callback = SparsifyCallback(0.5, criteria=criterion, schedule="one_shot", calibration=given)
    learn.fit(1, 0.01, cbs=callback)
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.005)
