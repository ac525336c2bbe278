"""Wrong arguments of public functions: the error names what was called, and the right argument."""

import importlib
import inspect
import pickle
import pydoc

import pytest
import torch
from torch import nn

import sparsifai
from sparsifai import Distil, Recipe, Sparsifier, Sparsify, TrainingManager, compare, lamp, sensitivity, shrink
from sparsifai.support.arguments import checks_arguments
from sparsifai.support.foreign_names import ARGUMENTS, ATTRIBUTES, PUBLIC, VALUES
from sparsifai.support.table import Table

RECIPE = Recipe({"epochs": 1, "steps": [{"keep": {}}]})
# These take what Python's own error says enough of: one argument, axes by name, or none.
EXCEPT = {"Keep", "Recipe", "Ticket", "along", "iterative", "register_layer", "select_groups", "taken"}


def callables():
    """Name -> what users call with arguments by name: no formulas, which are called by the library, and no tables."""
    registries = [each for each in vars(sparsifai.public).values() if type(each).__name__ == "Registry"]
    formulas = [each for registry in registries for each in registry.values()]
    for name in sparsifai.__all__:
        value = getattr(sparsifai, name)
        is_table = isinstance(value, type) and issubclass(value, Table)
        if callable(value) and value not in formulas and not is_table and name not in EXCEPT:
            yield name, value


CALLABLES = dict(callables())


def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("name", CALLABLES)
def test_every_public_function_tells_of_a_wrong_argument(name):
    with pytest.raises(TypeError, match=f"^{name} has no argument 'no_such_thing'; "):
        CALLABLES[name](no_such_thing=1)


def test_functions_are_found():
    assert {"Sparsifier", "Sparsify", "TrainingManager", "shrink", "compare", "sensitivity"} < {*CALLABLES}
    assert "large_final" not in CALLABLES


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sparsifier(model(), layer_type=nn.Conv2d), "Sparsifier has no argument 'layer_type'; its name here is "
         "layers: layers=nn.Conv2d"),
        (lambda: Sparsifier(model(), nm=True), "Sparsifier has no argument 'nm'; its name here is context: "
         "context='2:4'"),
        (lambda: Sparsify(amount=0.5), "Sparsify has no argument 'amount'; its name here is sparsity: sparsity=0.5"),
        (lambda: Sparsify(final_sparsity=0.5), "its name here is sparsity: sparsity=0.5"),
        (lambda: Sparsify(0.5, update_frequency=10), "its name here is every: every=10, in batches"),
        (lambda: Sparsify(0.5, sparsity_distribution_fn=None), "its name here is context: context='erk'"),
        (lambda: Sparsify(0.5, lth=True), "lottery tickets are found by a function: lottery_ticket(learn, 0.9"),
        (lambda: Sparsify(0.5, exlude="0"), "Sparsify has no argument 'exlude'; did you mean 'exclude'?"),
        (lambda: sensitivity(model(), level=0.5), "sensitivity has no argument 'level'; its name here is levels: "),
        (lambda: sensitivity(model(), granularty="filter"), "did you mean 'granularity'?"),
        (lambda: Sparsifier(model()).sparsify(0.5, round_to=8), "Sparsifier.sparsify has no argument 'round_to'; it "
         "is an argument of Sparsifier"),
        (lambda: compare(model(), model(), None, layer_type=1), "its arguments are dense, example_input, repeats, "),
        (lambda: TrainingManager(model(), None, epochs=2), "TrainingManager() missing 1 required keyword-only "
         "argument: 'steps_per_epoch'"),
        (lambda: RECIPE.manager(model()), "Recipe.manager() missing 2 required positional arguments: 'optimizer' and"),
        (lambda: shrink(model()), "shrink() missing 1 required positional argument: 'example_input'"),
        (lambda: Sparsifier(*[model()] * 6), "Sparsifier() takes from 2 to 5 positional arguments but 7 were given; "
         "pass the others by name: layers=, exclude=, "),
        (lambda: Sparsify(0.5, method="local"), "Sparsify has no argument 'method'; its name here is context: "),
        (lambda: Sparsify(*[0.5] * 9), "Sparsify(): too many positional arguments"),
        (lambda: Sparsify(0.5, sparsity=0.5), "Sparsify(): multiple values for argument 'sparsity'"),
        (lambda: Distil(), "Distil(): missing a required argument: 'teacher'"),
    ],
)  # fmt: skip
def test_the_right_argument_is_told(call, message):
    with pytest.raises(TypeError) as raised:
        call()
    assert message in str(raised.value)


def test_an_error_within_a_function_is_left_as_it_is():
    @checks_arguments
    def adds(one):
        return one + ""

    with pytest.raises(TypeError, match="unsupported operand"):
        adds(1)

    @checks_arguments
    def calls():
        adds(other=1)

    with pytest.raises(TypeError, match="^adds has no argument 'other'"):
        calls()


def test_a_subclass_is_named_as_what_was_called():
    class Mine(Sparsifier):
        pass

    with pytest.raises(TypeError, match="^Mine has no argument 'lth'"):
        Mine(model(), lth=True)


def test_help_and_pickles_stay():
    assert [*inspect.signature(Sparsifier).parameters][:4] == ["model", "granularity", "context", "criteria"]
    assert {"layers", "regrow", "every", "schedule"} < {*inspect.signature(Sparsify).parameters}
    assert {"granularity", "exclude", "progress"} < {*inspect.signature(sensitivity).parameters}
    assert "granularity: 'str | tuple" in pydoc.render_doc(sensitivity)
    assert pickle.loads(pickle.dumps(shrink)) is shrink
    assert shrink.__doc__.startswith("Remove filters")


@pytest.mark.parametrize("name", ATTRIBUTES["Sparsifier"])
def test_attributes_of_other_libraries_are_told(name):
    with pytest.raises(AttributeError, match=f"^Sparsifier has no attribute '{name}'; what to use here is "):
        getattr(Sparsifier(model()), name)


def test_other_attributes_are_missing_as_ever():
    sparsifier = Sparsifier(model())
    assert not hasattr(sparsifier, "nothing")
    with pytest.raises(AttributeError, match="^Recipe has no attribute 'modify'; what to use here is manager: recipe"):
        RECIPE.modify(model())
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1)
    manager = TrainingManager(sparsifier.model, torch.optim.SGD(sparsifier.model.parameters(), lr=0.1), Sparsify(0.5),
                              epochs=1, steps_per_epoch=1)  # fmt: skip
    with pytest.raises(AttributeError, match="^TrainingManager has no attribute 'finalize'; what to use here is fini"):
        manager.finalize(optimizer)


def test_an_error_within_a_property_is_not_hidden():
    class Broken(Sparsifier):
        @property
        def share(self):
            return self.model.no_such_layer

    with pytest.raises(AttributeError, match="no_such_layer"):
        _ = Broken(model()).share


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in VALUES.items() for name in names])
def test_values_of_other_libraries_are_told(kind, name):
    registry = {
        "granularity": sparsifai.granularities, "context": sparsifai.contexts, "criterion": sparsifai.criteria,
        "schedule": sparsifai.schedules,
    }[kind]  # fmt: skip
    with pytest.raises(ValueError, match=f"^unknown {kind} '{name}'; its name here is ") as raised:
        registry.resolve(name)
    with pytest.raises(KeyError, match=f"unknown {kind} '{name}'; its name here is "):
        registry[name]
    right = str(raised.value).partition("its name here is ")[2]
    if right.startswith("'"):
        registry.resolve(right.split("'")[1])


@pytest.mark.parametrize("name", [*PUBLIC, *VALUES["schedule"], "grad_crit", "GMPruningModifier"])
def test_public_names_of_other_libraries_are_told(name):
    with pytest.raises(AttributeError, match=f"^sparsifai has no {name}; what to use here is "):
        getattr(sparsifai, name)
    assert not hasattr(sparsifai, name)
    with pytest.raises(ImportError, match=f"^sparsifai has no {name}; what to use here is "):
        exec(f"from sparsifai import {name}")


@pytest.mark.fastai
def test_the_star_module_tells_them_too():
    pytest.importorskip("fastai", reason="sparsifai.all needs fastai")
    module = importlib.import_module("sparsifai.all")
    with pytest.raises(
        ImportError, match="^sparsifai.all has no PruneCallback; what to use here is SparsifyCallback: "
    ):
        from sparsifai.all import PruneCallback  # noqa: F401
    with pytest.raises(ImportError, match="^cannot import name 'nothing' from 'sparsifai.all'"):
        from sparsifai.all import nothing  # noqa: F401
    for name in ("PruneCallback", "nothing"):
        assert not hasattr(module, name)


def test_every_argument_that_is_told_exists():
    known = {each for value in CALLABLES.values() for each in inspect.signature(value).parameters}
    known |= {"n_epoch", "lr_max", "learn", "path", "rewind_to"}  # of learn.sparsify and lottery_ticket
    told = {ours for pairs in ARGUMENTS.values() for ours, _ in pairs} - {""}
    assert told <= known
    assert lamp is sparsifai.criteria["lamp"]  # formulas are not wrapped
