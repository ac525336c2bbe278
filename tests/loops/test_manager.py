"""TrainingManager in plain loops: its state, several parts, clipping, interrupts, and what it leaves behind."""

import copy
import io

import pytest
import torch
from conftest import misses_sparsity
from interrupts import interrupted, places
from torch import nn
from torch.nn.functional import cross_entropy

from sparsifai import Distil, Freeze, Keep, Quantize, Recipe, Regularize, Sparsify, TrainingManager

pytestmark = misses_sparsity

EPOCHS, STEPS = 3, 6


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def batch(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def made(*parts, model=None, optimizer=torch.optim.AdamW, **options):
    model = net() if model is None else model
    optimizer = optimizer(model.parameters(), lr=0.05)
    return TrainingManager(model, optimizer, *parts, epochs=EPOCHS, steps_per_epoch=STEPS, **options)


def train(manager, steps=EPOCHS * STEPS, seen=None):
    """Train from where the manager is, some steps at most."""
    model, optimizer = manager.model, manager.optimizer
    for number in range(manager.steps_done, min(manager.steps_done + steps, manager.steps)):
        inputs, targets = batch(number)
        optimizer.zero_grad()
        output = model(inputs)
        assert unzeroed(manager) == []
        manager.loss(cross_entropy(output, targets), output, inputs).backward()
        manager.step()
        assert unzeroed(manager) == []
        if seen is not None:
            seen.append((manager.sparsity, manager.has_reached_target))
    return manager


def unzeroed(manager):
    """Names of the parameters that are not zero where they are masked."""
    named = dict(manager.model.named_parameters())
    return [name for name, mask in manager.masks.items() if named[name][~mask.expand_as(named[name])].any()]


def values(model):
    return {name: each.detach().clone() for name, each in model.state_dict().items()}


def same(model, other):
    return all(
        torch.equal(*pair) for pair in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def teacher():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


KINDS = {
    "weights": lambda: [Sparsify(0.8)],
    "filters": lambda: [Sparsify(0.5, "filter", "local", schedule="cos")],
    "gradients": lambda: [Sparsify(0.6, criteria="movement_pruning", schedule="lin", every=2)],
    "movement": lambda: [Sparsify(0.6, criteria="updating_movement", schedule="lin")],
    "random": lambda: [Sparsify(0.6, criteria="random", schedule="lin")],
    "RigL": lambda: [Sparsify(0.7, regrow="grad", every=2, initial_sparsity=0.5)],
    "SET": lambda: [Sparsify(0.7, regrow="random", every=2, schedule="one_shot")],
    "straight-through": lambda: [Sparsify(0.7, straight_through=True, gradient_sparsity=0.3)],
    "random at once": lambda: [Sparsify(0.7, criteria="random", schedule="one_shot")],
    "falling": lambda: [Sparsify(0.7, schedule="dsd")],
    "all": lambda: [
        Sparsify(0.8, layers="0", schedule="lin"),
        Sparsify(0.5, layers=["2", "4"], regrow="grad", every=3),
        Regularize(0.01, criteria="movement", layers="2"),
        Regularize(0.01, layers="4", proximal=True),
        Distil(teacher(), 0.5, features=["2"]),
        Freeze("0", 0.2, 0.7),
        Quantize(0.2, exclude="4"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "way"), [*((kind, "state=") for kind in KINDS), *((kind, "load_state_dict") for kind in ("RigL", "all"))]
)
def test_a_training_resumes_bit_for_bit(kind, way):
    whole = train(made(*KINDS[kind]()))
    first = train(made(*KINDS[kind]()), 7)
    file = io.BytesIO()
    saved = {"model": first.model, "optimizer": first.optimizer, "manager": first}
    torch.save({name: each.state_dict() for name, each in saved.items()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.rand(5)  # random numbers that others draw do not matter
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    parts = KINDS[kind]()

    def load():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    if way == "state=":
        load()
        resumed = made(*parts, model=model, optimizer=lambda *_, **__: optimizer, state=state["manager"])
    else:
        resumed = made(*parts, model=model, optimizer=lambda *_, **__: optimizer)
        load()
        resumed.load_state_dict(state["manager"])
    assert resumed.steps_done == 7
    train(resumed)
    assert same(resumed.model, whole.model)
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in whole.masks.items())
    assert resumed.is_done
    ended = made(*KINDS[kind]())
    ended.load_state_dict(whole.state_dict())
    with pytest.raises(RuntimeError, match="all 18 steps are done"):
        ended.step()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_zeros_is_left_on_the_model(kind):
    model = net()
    before = list(model.parameters()), list(model.state_dict()), [dict(vars(each)) for each in model.modules()]
    manager = train(made(*KINDS[kind](), model=model))
    assert [id(each) for each in model.parameters()] == [id(each) for each in before[0]]
    assert list(model.state_dict()) == before[1]
    assert all(not each._forward_hooks and not each._forward_pre_hooks for each in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(not parameter._backward_hooks for parameter in model.parameters())
    assert not manager.optimizer._optimizer_step_pre_hooks
    copy.deepcopy(model)


def test_the_end_is_exact_and_the_target_is_reached_when_the_masks_are_final():
    seen = []
    manager = train(made(Sparsify(0.75, schedule="lin")), seen=seen)
    assert manager.sparsity == 0.75 == manager.report().selected.sparsity
    assert [final for _, final in seen] == [False] * 17 + [True]
    seen = []
    train(made(Sparsify(0.75)), seen=seen)  # the default schedule ends after three quarters
    assert [final for _, final in seen] == [False] * 13 + [True] * 5
    assert all(sparsity == 0.75 for sparsity, final in seen if final)
    seen = []
    train(made(Sparsify(0.5, schedule="one_shot", regrow="grad", every=2)), seen=seen)
    assert [final for _, final in seen] == [False] * 13 + [True] * 5  # weights regrow until then
    seen = []
    train(made(Sparsify(0.5, schedule="dsd")), seen=seen)  # which begins where it ends
    assert not seen[0][1]
    assert train(made(Freeze("0", end=0.5)), 1).has_reached_target


def test_a_last_batch_without_a_step_is_made_up_for():
    manager = train(made(Sparsify(0.75, schedule="lin")), 17)
    assert manager.sparsity < 0.75
    manager.finish()
    manager.finish()
    assert manager.sparsity == 0.75
    assert not manager.is_done
    early = train(made(Sparsify(0.75, schedule="lin"), Freeze("0")), 6)
    with pytest.warns(UserWarning, match="ended after 6 of 18 steps, at a sparsity of 25"):
        early.finish()
    assert early.sparsity == pytest.approx(0.25, abs=0.01)
    assert early.model[0].weight.requires_grad


def test_parts_prune_their_own_layers():
    manager = train(made(Sparsify(0.8, layers="0"), Sparsify(0.5, "filter", "local", layers="2", schedule="lin")))
    rows = {row.name: row.count.sparsity for row in manager.report().rows if not row.why_dense}
    assert rows == {"0.weight": pytest.approx(0.8, abs=0.01), "2.weight": 0.5}
    assert [list(each.masks) for each in manager.sparsifiers] == [["0.weight"], ["2.weight"]]
    zeros = sum(int((manager.model[each].weight == 0).sum()) for each in (0, 2))
    assert manager.sparsity == zeros / (96 + 256)
    assert not manager.model[2].bias[(manager.model[2].weight == 0).all(1)].any()


def test_the_manager_of_a_recipe_with_several_sparsify_steps():
    steps = [{"sparsify": {"sparsity": 0.8, "layers": ["0"]}}, {"sparsify": {"sparsity": 0.5, "layers": ["2", "4"]}}]
    model = net()
    manager = Recipe({"epochs": 3, "steps": steps}).manager(model, torch.optim.SGD(model.parameters(), 0.05), STEPS)
    train(manager)
    assert [each.sparsity for each in manager.sparsifiers] == pytest.approx([0.8, 0.5], abs=0.01)


def test_the_manager_of_a_recipe():
    recipe = Recipe.loads("""
    epochs: 3
    steps:
      - sparsify: {sparsity: 0.8, context: erk, end: 2}
      - regularize: {weight: 0.01, layers: ["4"]}
      - distil: {weight: 0.5, end: 50%}
      - freeze: {layers: ["0"], end: 1}
      - keep
    """)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    manager = recipe.manager(model, optimizer, STEPS, teacher=teacher())
    assert (manager.epochs, manager.steps) == (3, 18)
    assert not model[0].weight.requires_grad
    train(manager, 6)
    assert model[0].weight.requires_grad
    train(manager)
    assert manager.sparsity == pytest.approx(0.8, abs=0.002)


def test_the_arguments_of_sparsify_are_those_of_the_callback():
    pytest.importorskip("fastai", reason="compares with the callback")
    from inspect import signature

    from sparsifai import SparsifyCallback

    values = {"sparsity": 0.5, "schedule": "lin", "regrow": "grad", "drop": 0.2, "drop_schedule": "cos", "every": 3}
    others = {"initial_sparsity": 0.1, "layers": "0", "exclude": "2", "pool": "sum", "round_to": 2, "coupled": False}
    for given in (values, {**others, "sparsity": 0.5}):
        theirs = SparsifyCallback(**given).pruning
        ours = Sparsify(**given).pruning
        assert ours.ramp.sparsity == theirs.ramp.sparsity
        assert (ours.every, ours.drop, ours.ramp.initial) == (theirs.every, theirs.drop, theirs.ramp.initial)
    positional = [0.5, "row", "local", "movement", "cos"]
    assert Sparsify(*positional).pruning.options == SparsifyCallback(*positional).pruning.options
    defaults = {name: each.default for name, each in signature(SparsifyCallback.__init__).parameters.items()}
    given = {**defaults, "sparsity": 0.5}
    del given["self"]
    assert Sparsify(**given).pruning.options == SparsifyCallback(**given).pruning.options
    with pytest.raises(TypeError):
        Sparsify(0.5, sparsty=0.5)


@pytest.mark.parametrize("interrupts", [False, True])
def test_masked_gradients_do_not_count_in_the_norm(interrupts):
    manager = train(made(Sparsify(0.8, schedule="one_shot")), 1)
    inputs, targets = batch(1)
    if interrupts:
        with pytest.raises(KeyboardInterrupt), manager.stepping():
            raise KeyboardInterrupt
        assert manager.steps_done == 1
    manager.optimizer.zero_grad()
    cross_entropy(manager.model(inputs), targets).backward()
    dense = nn.utils.clip_grad_norm_(manager.model.parameters(), 1e9)
    manager.before_step()
    manager.before_step()
    sparse = nn.utils.clip_grad_norm_(manager.model.parameters(), 1e9)
    assert sparse < dense
    gradients = {name: each.grad for name, each in manager.model.named_parameters()}
    assert all(not gradients[name][~mask].any() for name, mask in manager.masks.items())


def test_a_grad_scaler_steps_and_may_skip():
    scaled = made(Sparsify(0.8, regrow="grad", every=1, initial_sparsity=0.3), optimizer=torch.optim.SGD)
    plain = made(Sparsify(0.8, regrow="grad", every=1, initial_sparsity=0.3), optimizer=torch.optim.SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for number in range(scaled.steps):
        inputs, targets = batch(number)
        for manager in (scaled, plain):
            manager.optimizer.zero_grad()
            loss = manager.loss(cross_entropy(manager.model(inputs), targets))
            (scaler.scale(loss) if manager is scaled else loss).backward()
        if number in (4, 12):  # an overflow
            for manager in (scaled, plain):
                manager.model[0].weight.grad[0, 0] = float("inf")
            before = values(scaled.model)
            scaled.step(scaler)
            assert [name for name, each in scaled.model.state_dict().items() if each[before[name] == 0].any()] == []
            with plain.stepping():
                pass
        else:
            scaled.step(scaler)
            plain.step()
        scaler.update()
    assert scaled.is_done
    assert same(scaled.model, plain.model)
    assert scaled.sparsity == pytest.approx(0.8, abs=0.002)


def test_gradients_may_add_up_over_batches():
    manager = made(Sparsify(0.8), Regularize(0.1))
    for number in range(2 * manager.steps):
        inputs, targets = batch(number)
        (manager.loss(cross_entropy(manager.model(inputs), targets)) / 2).backward()
        if number % 2:
            manager.step()
            manager.optimizer.zero_grad()
    assert manager.is_done
    assert manager.sparsity == pytest.approx(0.8, abs=0.002)


def test_criteria_of_data_are_calibrated():
    batches = [batch(number) for number in range(2)]
    manager = train(made(Sparsify(0.5, "weight", "per_output", "wanda", calibration=batches, schedule="lin")))
    assert manager.sparsity == 0.5
    manager = made(Sparsify(0.5, criteria="snip", schedule="one_shot", calibration=batches), loss_func=cross_entropy)
    assert manager.sparsity == 0.5
    train(manager)


def test_a_recipe_is_given_the_batches_that_its_criteria_need():
    batches, options = [batch(number) for number in range(2)], {"criteria": "obs", "schedule": "lin", "every": 6}
    recipe, model = Recipe({"epochs": EPOCHS, "steps": [{"sparsify": {"sparsity": 0.5, **options}}]}), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    manager = recipe.manager(model, optimizer, STEPS, calibration=batches, loss_func=cross_entropy)
    (part,) = recipe.parts(calibration=batches)
    assert part.pruning.calibration is batches
    assert train(manager).sparsity == pytest.approx(0.5, abs=0.002)


def test_weights_make_up_for_others_while_the_sparsity_grows():
    batches = [batch(number) for number in range(2)]
    for options in ({"compensate": True}, {"criteria": "obs"}, {"criteria": "sparsegpt", "context": "local"}):
        manager = made(Sparsify(0.5, calibration=batches, schedule="lin", **options), loss_func=cross_entropy)
        assert train(manager).sparsity == pytest.approx(0.5, abs=0.002)


def test_zeros_of_before_are_kept_and_the_user_is_warned_of_more_than_was_asked_for():
    model = net()
    with torch.no_grad():
        model[2].weight[:12] = 0
    manager = made(Sparsify(0.2, layers="2"), model=model)
    with pytest.warns(UserWarning, match=r"75.00% of the weights are pruned, more than the 20.00% asked for"):
        train(manager)
    assert manager.sparsity == 0.75
    model = net()
    with torch.no_grad():
        model[2].weight[:4] = 0
    manager = made(Sparsify(0.5, straight_through=True), model=model)
    with pytest.warns(UserWarning, match="64 weights were zero before this training and stay so"):
        train(manager)
    kept = train(made(Keep(), model=manager.model))
    assert kept.sparsity == pytest.approx(0.5, abs=0.01)
    assert kept.report().selected.sparsity == kept.sparsity


class Moves(torch.optim.SGD):
    """Moves all weights, whatever their gradients are."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.01)


@pytest.mark.parametrize("kind", ["weights", "RigL", "straight-through", "all"])
def test_zeros_hold_whatever_the_optimizer_does(kind):
    train(made(*KINDS[kind](), optimizer=Moves))


@pytest.mark.parametrize("kind", ["RigL", "straight-through", "all"])
def test_an_interrupt_at_any_line_of_a_step_leaves_a_sparse_model_from_which_it_goes_on(kind):
    def prepared():
        manager = train(made(*KINDS[kind](), optimizer=Moves), 5)
        inputs, targets = batch(5)
        manager.optimizer.zero_grad()
        output = manager.model(inputs)
        manager.loss(cross_entropy(output, targets), output, inputs).backward()
        return manager

    lines = interrupted(prepared().step).lines
    target = train(prepared()).sparsity
    for at in places(lines, 6):
        manager = prepared()
        where = interrupted(manager.step, at).where
        assert where is not None
        assert unzeroed(manager) == [], where
        train(manager)
        assert manager.is_done, where
        assert manager.sparsity == pytest.approx(target, abs=0.01), where
