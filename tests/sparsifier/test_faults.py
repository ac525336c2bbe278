"""Updates that fail in the middle: nothing has changed, or the next call ends what was begun, with the same result."""

import copy
import random
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from conftest import levels_of, misses_sparsity, small_net
from faults import Fault, places_of, state_of, unzeroed
from torch import nn
from updates import batches, moved, same_state, show_gradients

from sparsifai import Sparsifier, contexts
from sparsifai.sparsifier import masking

pytestmark = pytest.mark.filterwarnings(
    "ignore:straight_through. no gradient reaches whole outputs",
    "ignore:straight_through. mask_gradients was not called",
)


def prepared(*axes, first=None, gradients=False, **options):
    """A function that makes a Sparsifier, and an optimizer that has made a step."""

    def make():
        torch.manual_seed(0)
        model = small_net()
        sparsifier = Sparsifier(model, *axes, **options)
        if sparsifier.collected.looks_at_data or sparsifier.ranking.options.compensate:
            sparsifier.calibrate(batches(1), F.cross_entropy)
        if first is not None:
            sparsifier.sparsify(first)
            with sparsifier.dense_weights():
                moved(model)
        if gradients:
            show_gradients(sparsifier)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW(model.parameters())
        with sparsifier.dense_weights():
            optimizer.step()
        return sparsifier, optimizer

    return make


def sparsify(level, **options):
    return lambda sparsifier, optimizer: sparsifier.sparsify(level, **options)


def update(level, **options):
    return lambda sparsifier, optimizer: sparsifier.update_masks(level, optimizer, **options)


def set_masks(sparsifier, optimizer):
    generator = torch.Generator().manual_seed(0)
    sparsifier.set_masks({name: torch.rand(mask.shape, generator=generator) > 0.5 for name, mask in
                          sparsifier.masks.items()})  # fmt: skip


def load(**options):
    def action(sparsifier, optimizer):
        torch.manual_seed(1)
        other = Sparsifier(small_net(), **options)
        other.sparsify(0.5)
        sparsifier.load_state_dict(other.state_dict())

    return action


def settle(sparsifier, optimizer):
    sparsifier.settle(optimizer)


def unfreeze(sparsifier, optimizer):
    sparsifier.model.requires_grad_(True)
    sparsifier.sparsify(0.4)


def frozen():
    torch.manual_seed(0)
    model = small_net()
    model[0].requires_grad_(False)
    sparsifier = Sparsifier(model, "filter", "local", criteria="movement")
    moved(model)
    return sparsifier, None


CASES = {
    "weights": (prepared(first=0.2), sparsify(0.5)),
    "weights, with an optimizer": (prepared(first=0.2), update(0.5)),
    "a falling sparsity": (prepared(first=0.6), sparsify(0.3)),
    "filters and what follows them": (prepared("filter", "local", first=0.2), sparsify(0.5)),
    "filters, with an optimizer": (prepared("filter", "local", first=0.2), update(0.5)),
    "2:4": (prepared("weight", "2:4"), update(0.5)),
    "regrowth by gradients": (
        prepared("weight", "local", regrow="grad", first=0.4, gradients=True), update(0.5, drop=0.3),
    ),
    "random regrowth": (prepared("weight", "local", regrow="random", first=0.4), sparsify(0.5, drop=0.3)),
    "gradients of data": (prepared(criteria="snip"), update(0.5)),
    "activations": (prepared(criteria="wanda"), sparsify(0.5)),
    "random scores": (prepared(criteria="random", first=0.2), sparsify(0.5)),
    "values of the last update": (prepared(criteria="updating_movement", first=0.2), update(0.5)),
    "steps": (prepared(criteria="snip"), sparsify(0.5, steps=2)),
    "calibration": (prepared(criteria="taylor"), lambda sparsifier, optimizer: sparsifier.calibrate(
        batches(2), F.cross_entropy)),
    "given masks": (prepared(regrow="random"), set_masks),
    "masks from zeros": (prepared("filter", "local"), lambda sparsifier, optimizer: sparsifier.recover_masks()),
    "weights that make up for others": (prepared(first=0.2, compensate=True, layers=["0", "10"]), update(0.5)),
    "blocks of gradients": (prepared(criteria="obs", first=0.2, layers=["0", "10"]), sparsify(0.5)),
    "a sweep through columns": (prepared("weight", "local", "sparsegpt", layers=["0", "10"]), update(0.5)),
    "a saved state": (
        prepared(criteria="movement", regrow="random"), load(criteria="movement", regrow="random"),
    ),
    "a layer that was frozen": (frozen, unfreeze),
    "dense weights": (prepared(straight_through=True, first=0.2), sparsify(0.5)),
    "dense weights, for the first time": (prepared(straight_through=True), update(0.5)),
    "dense weights, with an optimizer": (prepared(straight_through=True, first=0.2), update(0.5)),
    "dense weights of a falling sparsity": (prepared(straight_through=True, first=0.6), update(0.3)),
    "dense weights in steps": (prepared(straight_through=True, first=0.2), sparsify(0.5, steps=2)),
    "dense weights of filters": (prepared("filter", "local", straight_through=True, first=0.2), update(0.5)),
    "dense weights of which some are trained": (
        prepared(straight_through=True, gradient_sparsity=0.3, first=0.2), update(0.5),
    ),
    "dense weights and given masks": (prepared(straight_through=True, first=0.2), set_masks),
    "dense weights and masks from zeros": (
        prepared(straight_through=True, first=0.2), lambda sparsifier, optimizer: sparsifier.recover_masks(),
    ),
    "dense weights of a saved state": (
        prepared(straight_through=True, gradient_sparsity=0.3, first=0.2),
        load(straight_through=True, gradient_sparsity=0.3),
    ),
    "dense weights that are dropped": (prepared(straight_through=True, first=0.2), settle),
}  # fmt: skip


# These run the model once for each layer.
IN_PASSES = ("weights that make up for others", "blocks of gradients", "a sweep through columns")


def check_fault(name, number, error=KeyboardInterrupt):
    """Raise an error at a line; then all is as before or as it would be without, and no masked weight is not zero."""
    make, action = CASES[name]
    sparsifier, optimizer = make()
    levels = levels_of(sparsifier)
    fault = Fault(number, error)
    # What the code of a user raises gets a message of ours; here that is the fault.
    with suppress(error, ValueError):
        fault(lambda: action(sparsifier, optimizer))
    assert fault.place is not None
    before, after = expected(name)
    now = levels_of(sparsifier)
    assert now in (levels, after["levels"], dict.fromkeys(now, 0)), fault.place
    sparsifier.apply_masks()
    assert unzeroed(sparsifier) == [], fault.place
    if not same_state(state_of(sparsifier, optimizer), after["state"]):
        if name == "a layer that was frozen":  # it may have joined
            sparsifier.select_unfrozen()
        else:
            assert same_state(state_of(sparsifier, optimizer), before), fault.place
        action(sparsifier, optimizer)
        sparsifier.apply_masks()
        assert same_state(state_of(sparsifier, optimizer), after["state"]), fault.place


def expected(name, known={}):  # noqa: B006
    """The state before an action, and after it."""
    if name not in known:
        make, action = CASES[name]
        sparsifier, optimizer = make()
        sparsifier.apply_masks()
        before = state_of(sparsifier, optimizer)
        action(sparsifier, optimizer)
        levels = levels_of(sparsifier)
        sparsifier.apply_masks()
        known[name] = before, {"levels": levels, "state": state_of(sparsifier, optimizer)}
    return known[name]


def numbers_of(name, share):
    """Some of the lines that an action runs through, and each line of the code at least once if the share is 1."""
    expected(name)  # what the first call of all keeps for the next ones is not done again in the calls below
    make, action = CASES[name]
    sparsifier, optimizer = make()
    places = places_of(lambda: action(sparsifier, optimizer))
    first = {place: number for number, place in reversed([*enumerate(places, 1)])}
    last = {place: number for number, place in enumerate(places, 1)}
    numbers = sorted({*first.values(), *last.values()})
    return random.Random(0).sample(numbers, max(1, round(share * len(numbers))))


@misses_sparsity
@pytest.mark.filterwarnings("ignore:.*are frozen", "ignore:criterion .* compares")
@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_at_any_line_changes_nothing_or_is_made_up_for(name):
    for number in numbers_of(name, 0.01 if name in IN_PASSES else 0.04):
        check_fault(name, number)


@pytest.mark.slow
@misses_sparsity
@pytest.mark.filterwarnings("ignore:.*are frozen", "ignore:criterion .* compares")
@pytest.mark.parametrize("name", CASES)
def test_an_error_at_every_line_changes_nothing_or_is_made_up_for(name):
    # These run through much of what the other cases run through, too.
    share = 0.25 if name.startswith("dense weights") or name in ("a saved state", "steps") else 0.6
    share = 0.1 if name in IN_PASSES else share
    for number in numbers_of(name, share):
        check_fault(name, number, MemoryError)


def steps(sparsifier, optimizer):
    sparsifier.mask_gradients()
    with sparsifier.dense_weights():
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"gradient_sparsity": 0.3}, {"granularity": "filter", "context": "local"}])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_at_any_line_of_a_step_leaves_a_sparse_model_that_agrees_with_its_dense_weights(options, error):
    make = prepared(straight_through=True, first=0.4, **options)
    for first in (make(), make()):  # what the first call of all keeps for later ones is not done again
        count = len(places_of(lambda first=first: steps(*first)))
    assert count > 150
    for number in random.Random(0).sample(range(1, count + 1), 40):
        sparsifier, optimizer = made = make()
        memory = {name: each.data_ptr() for name, each in sparsifier.model.named_parameters()}
        fault = Fault(number, error)
        with pytest.raises(error):
            fault(lambda made=made: steps(*made))
        check_dense_weights(sparsifier, memory, fault.place)


def check_dense_weights(sparsifier, memory, place):
    """The model has the sparse weights in its own memory, before anything is called; and they are the dense ones."""
    parameters = dict(sparsifier.model.named_parameters())
    assert {name: each.data_ptr() for name, each in parameters.items()} == memory, place
    assert unzeroed(sparsifier) == [], place
    sparse = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    dense = sparsifier.state_dict()["straight_through"]["values"]
    assert dense.keys() == sparsifier.all_masks.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, sparse[name]), place
        assert name not in dense or torch.equal(dense[name] * sparsifier.all_masks[name], sparse[name]), place


CALLS = {
    "apply_masks": lambda sparsifier: sparsifier.apply_masks(),
    "report": lambda sparsifier: sparsifier.report(),
    "mask_gradients": lambda sparsifier: sparsifier.mask_gradients(),
    "sparsity": lambda sparsifier: sparsifier.sparsity,
    "state_dict": lambda sparsifier: sparsifier.state_dict(),
    "a copy": lambda sparsifier: copy.deepcopy(sparsifier),
}


@pytest.mark.parametrize("call", CALLS)
def test_zeroing_that_fails_in_the_middle_is_ended_by_the_next_call(call, monkeypatch):
    sparsifier, optimizer = prepared("filter", "local")()
    with monkeypatch.context() as patch:
        patch.setattr(masking, "zero_masked", FailsAtThird())
        with pytest.raises(MemoryError):
            sparsifier.update_masks(0.5, optimizer)
    assert unzeroed(sparsifier)
    CALLS[call](sparsifier)
    assert unzeroed(sparsifier) == []
    undisturbed, its_optimizer = prepared("filter", "local")()
    undisturbed.update_masks(0.5, its_optimizer)
    assert same_state(state_of(sparsifier, optimizer), state_of(undisturbed, its_optimizer))


class FailsAtThird:
    """Masks two tensors and has no memory for the third."""

    def __init__(self):
        self.calls, self.zero_masked = 0, masking.zero_masked

    def __call__(self, *given):
        self.calls += 1
        if self.calls == 3:
            raise MemoryError
        self.zero_masked(*given)


def test_showing_an_unfinished_sparsifier_changes_nothing(monkeypatch):
    sparsifier = Sparsifier(small_net())
    with monkeypatch.context() as patch:
        patch.setattr(masking, "zero_masked", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sparsifier.sparsify(0.5)
    before = [parameter.clone() for parameter in sparsifier.model.parameters()]
    assert "layers, in an unfinished call; " in repr(sparsifier)
    assert all(map(torch.equal, before, sparsifier.model.parameters()))
    assert sparsifier.sparsity == 0.5
    assert "50.00% of " in repr(sparsifier)


def test_a_saved_state_replaces_what_is_unfinished(monkeypatch):
    sparsifier, optimizer = prepared("filter", "local")()
    state = sparsifier.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(masking, "zero_masked", FailsAtThird())
        with pytest.raises(MemoryError):
            sparsifier.update_masks(0.5, optimizer)
    sparsifier.load_state_dict(state)
    weights = [parameter.detach().clone() for parameter in sparsifier.model.parameters()]
    sparsifier.apply_masks()
    assert all(mask.all() for mask in sparsifier.masks.values())
    assert all(torch.equal(*pair) for pair in zip(weights, sparsifier.model.parameters(), strict=True))


# --- Failures that are real ---------------------------------------------------------------------------------------


class Failing:
    """A criterion that fails in one layer, or returns NaN there."""

    def __init__(self, at, wrong):
        self.at, self.wrong, self.layers = at, wrong, []

    def __call__(self, weight, previous):
        self.layers.append(weight)
        if len(self.layers) - 1 == self.at:
            if isinstance(self.wrong, BaseException):
                raise self.wrong
            return weight * float("nan")
        return weight.abs()


def unchanged_after(sparsifier, optimizer, action, error, match=None):
    """Check that an action fails, and that nothing has changed then."""
    sparsifier.apply_masks()
    before = state_of(sparsifier, optimizer)
    weights = [parameter.detach().clone() for parameter in sparsifier.model.parameters()]
    with pytest.raises(error, match=match):
        action()
    assert same_state(state_of(sparsifier, optimizer), before)
    assert all(torch.equal(*pair) for pair in zip(weights, sparsifier.model.parameters(), strict=True))


@pytest.mark.parametrize("layer", range(5))
@pytest.mark.parametrize("wrong", ["NaN", RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("call", ["sparsify", "update_masks", "check"])
def test_a_criterion_that_fails_in_a_layer_changes_nothing(layer, wrong, call):
    sparsifier, optimizer = prepared(first=0.3)()
    sparsifier = Sparsifier(sparsifier.model, criteria=Failing(layer, wrong))
    error, match = (ValueError, "NaN scores") if wrong == "NaN" else (type(wrong), None)
    given = (0.5, optimizer) if call == "update_masks" else (0.5,)
    unchanged_after(sparsifier, optimizer, lambda: getattr(sparsifier, call)(*given), error, match)


WRONG_ANSWERS = {
    "nothing": lambda layers, sparsity: None,
    "too few layers": lambda layers, sparsity: contexts["global"](layers, sparsity)[1:],
    "scores": lambda layers, sparsity: [layer.score for layer in layers],
    "another size": lambda layers, sparsity: [each[:-1] for each in contexts["global"](layers, sparsity)],
    "all of a layer": lambda layers, sparsity: [layer.alive & False for layer in layers],
    "a wrong last layer": lambda layers, sparsity: [*contexts["global"](layers, sparsity)[:-1], 3],
}


@pytest.mark.parametrize("answer", WRONG_ANSWERS)
def test_a_context_that_answers_wrongly_changes_nothing(answer):
    sparsifier, optimizer = prepared(context=WRONG_ANSWERS[answer])()
    unchanged_after(sparsifier, optimizer, lambda: sparsifier.update_masks(0.5, optimizer), ValueError)


STRANGE = {
    "an expanded moment": lambda parameter: torch.zeros(()).expand(parameter.shape),
    "a sparse moment": lambda parameter: torch.zeros(parameter.shape).to_sparse(),
    "a moment of inference": lambda parameter: inference_zeros(parameter.shape),
}


def inference_zeros(shape):
    with torch.inference_mode():
        return torch.zeros(shape)


@pytest.mark.parametrize("call", ["update_masks", "mask_moments"])
@pytest.mark.parametrize("kind", STRANGE)
def test_an_optimizer_with_a_moment_that_cannot_be_changed_is_refused_and_nothing_changes(kind, call):
    sparsifier, optimizer = prepared(first=0.3)()
    last = sparsifier.model[12].weight
    optimizer.state[last]["exp_avg"] = STRANGE[kind](last)
    earlier = {each: value.clone() for each, value in optimizer.state[sparsifier.model[0].weight].items()}
    given = (0.5, optimizer) if call == "update_masks" else (optimizer,)
    unchanged_after(sparsifier, None, lambda: getattr(sparsifier, call)(*given), TypeError, "keeps `exp_avg`")
    assert same_state(optimizer.state[sparsifier.model[0].weight], earlier)


@pytest.mark.parametrize("optimizer", [3, [], nn.Linear(2, 2), object()], ids=lambda each: type(each).__name__)
def test_what_is_no_optimizer_is_refused_and_nothing_changes(optimizer):
    sparsifier, _ = prepared(first=0.3)()
    unchanged_after(sparsifier, None, lambda: sparsifier.update_masks(0.5, optimizer), TypeError, "is no optimizer")


def test_means_are_neither_lost_nor_counted_twice_when_an_update_fails(monkeypatch):
    sparsifier, optimizer = prepared("weight", "local", criteria="snip", regrow="grad", gradients=True)()
    before = sparsifier.state_dict()
    monkeypatch.setattr(torch, "as_tensor", raising(MemoryError()))
    with pytest.raises(MemoryError):
        sparsifier.update_masks(0.5, optimizer, drop=0.3)
    assert same_state(sparsifier.state_dict(), before)
    assert set(sparsifier.collected.counts["grad"].values()) == {2}


def test_gradients_that_fail_in_one_criterion_are_counted_by_neither(monkeypatch):
    sparsifier, _ = prepared(criteria="snip", regrow="grad")()
    for parameter in sparsifier.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = sparsifier.state_dict()
    monkeypatch.setattr(sparsifier._regrowth, "with_gradients", raising(MemoryError()))
    with pytest.raises(MemoryError):
        sparsifier.collect_gradients()
    assert same_state(sparsifier.state_dict(), before)


def raising(error):
    def fails(*given, **named):
        raise error

    return fails


def test_lines_are_counted():
    sparsifier, optimizer = prepared()()
    assert len(places_of(lambda: sparsifier.sparsify(0.5))) > 500
