"""Training for int8 in plain loops: what is rounded and what is not, recipes, and what is left on the model."""

import copy
import io
import pickle

import pytest
import torch
from interrupts import interrupted, places
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from sparsifai import Keep, Quantize, Recipe, Sparsify, TrainingManager
from sparsifai.quantization.fake_quantization import rounded_weight

STEPS = 4


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def batch(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def made(*parts, model=None, **options):
    model = net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return TrainingManager(model, optimizer, *parts, epochs=2, steps_per_epoch=STEPS, **options)


def train(manager, steps=2 * STEPS):
    for number in range(manager.steps_done, min(manager.steps_done + steps, manager.steps)):
        inputs, targets = batch(number)
        manager.optimizer.zero_grad()
        cross_entropy(manager.model(inputs), targets).backward()
        manager.step()
    return manager


def hooked(model):
    return any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def outputs(model, inputs=None):
    """Those of evaluation."""
    was_training = model.training
    with torch.no_grad():
        found = model.eval()(batch(99)[0] if inputs is None else inputs)
    model.train(was_training)
    return found


def float_outputs(model):
    plain = net()
    plain.load_state_dict(model.state_dict())
    return outputs(plain)


def test_training_rounds_from_the_start_on_and_evaluation_does_not():
    manager = made(Quantize(0.5), Sparsify(0.5))
    model, seen = manager.model, []
    model[2].register_forward_hook(lambda layer, *_: seen.append((layer.weight, layer._parameters["weight"].clone())),
                                   prepend=True)  # fmt: skip
    for step in range(2 * STEPS):
        assert torch.equal(outputs(model), float_outputs(model))
        seen.clear()
        train(manager, 1)
        ((weight, own),) = seen
        assert torch.equal(weight, rounded_weight(own, 0)) == (step >= STEPS)
        assert manager.has_reached_target == (step >= 5)  # the default schedule ends after three quarters
    assert torch.equal(outputs(model), float_outputs(model))


def test_the_rounded_model_can_be_measured_within_the_training_and_after_it():
    manager = train(made(Quantize(0)), 3)
    plain = outputs(manager.model)
    with manager.fake_quantized():
        rounded = outputs(manager.model)
        with manager.fake_quantized():
            assert torch.equal(outputs(manager.model), rounded)
        manager.release()
        assert torch.equal(outputs(manager.model), rounded)
    assert not torch.equal(rounded, plain)
    assert torch.equal(outputs(manager.model), plain)
    whole, undisturbed = train(manager), train(made(Quantize(0)))
    assert all(map(torch.equal, whole.model.parameters(), undisturbed.model.parameters()))
    assert not hooked(manager.model)
    with manager.fake_quantized():
        assert not torch.equal(outputs(manager.model), float_outputs(manager.model))
    assert not hooked(manager.model)


def test_a_manager_that_is_released_goes_on():
    manager = made(Quantize(0))
    for _ in range(2 * STEPS):
        manager.release()
        assert not hooked(manager.model)
        manager.prepare()
        train(manager, 1)
    assert all(map(torch.equal, manager.model.parameters(), train(made(Quantize(0))).model.parameters()))


def test_a_step_that_is_left_out_changes_nothing_of_the_next_one():
    manager = made(Quantize(0))
    for number in range(3):
        inputs, targets = batch(number)
        manager.optimizer.zero_grad()
        cross_entropy(manager.model(inputs), targets).backward()
        manager.before_step()
        if number != 1:
            manager.step()
        assert hooked(manager.model)


def test_copies_within_the_training_are_float_models():
    manager = train(made(Quantize(0)), 3)
    for copied in (copy.deepcopy(manager.model), pickle.loads(pickle.dumps(manager.model))):
        copied.train()
        assert torch.equal(copied(batch(99)[0]), float_outputs(manager.model))


def test_a_state_of_before_the_start_takes_the_rounding_off():
    earlier = train(made(Quantize(0.5)), 2)
    state = {name: each.state_dict() for name, each in vars(earlier).items() if name in ("model", "optimizer")}
    file = io.BytesIO()
    torch.save({**state, "manager": earlier.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    manager = train(made(Quantize(0.5)), 6)
    manager.model.load_state_dict(state["model"])
    manager.optimizer.load_state_dict(state["optimizer"])
    manager.load_state_dict(state["manager"])
    assert not hooked(manager.model)
    assert not manager.has_reached_target
    train(manager)
    assert all(map(torch.equal, manager.model.parameters(), train(made(Quantize(0.5))).model.parameters()))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.reentrant = net(), reentrant

    def forward(self, inputs):
        if self.reentrant is None:
            return self.body(inputs)
        return checkpoint(self.body, inputs.requires_grad_(), use_reentrant=self.reentrant)


def test_a_forward_that_is_run_again_in_the_backward_rounds_again():
    weights = []
    for reentrant in (None, False, True):
        manager = train(made(Quantize(0), model=Checkpointed(reentrant)), 1)
        weights.append(torch.cat([each.flatten() for each in manager.model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.allclose(weights[0], weights[2], atol=1e-4)  # it sees each batch twice, so the range is another


def test_an_interrupt_at_any_line_of_a_forward_leaves_a_model_that_evaluates_and_trains():
    def prepared():
        return train(made(Quantize(0)), 2)

    inputs = batch(2)[0]
    lines = interrupted(lambda: prepared().model(inputs)).lines
    first = prepared()
    expected = outputs(first.model)
    for at in places(lines, 12):
        manager = prepared()
        where = interrupted(lambda model=manager.model: model(inputs), at).where
        assert torch.equal(outputs(manager.model), expected), where
        train(manager)
        assert manager.is_done
        assert not hooked(manager.model)
        assert all(not vars(each).keys() & each._parameters.keys() for each in manager.model.modules()), where


def test_zeros_of_before_are_kept_beside_keep():
    model = net()
    with torch.no_grad():
        model[0].weight[:, :3] = 0
    manager = train(made(Keep(), Quantize(0), model=model))
    assert not manager.model[0].weight[:, :3].any()
    assert manager.model[0].weight[:, 3:].all()


SPARSEML = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 2}
  - !ConstantPruningModifier {start_epoch: 0, params: ['0.weight']}
  - !QuantizationModifier {start_epoch: 1, ignore: ['2']}
"""


@pytest.mark.parametrize("text", ["epochs: 2\nsteps:\n- quantize: {start: 1, exclude: '2'}\n", SPARSEML])
def test_a_recipe_rounds_in_a_loop(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    recipe = Recipe.from_sparseml(path) if text is SPARSEML else Recipe.load(path)
    model = net()
    manager = recipe.manager(model, torch.optim.SGD(model.parameters(), 0.1), STEPS)
    train(manager, STEPS - 1)
    assert not hooked(model)
    train(manager, 2)
    assert model[0]._forward_hooks
    assert not model[2]._forward_hooks
    assert train(manager).is_done
