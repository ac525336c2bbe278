"""Every pair of steps of a recipe is trained for two epochs: no step ends the fit of another."""

from itertools import combinations

import pytest
from torch import nn

from sparsifai import Recipe, SparsifyCallback

pytestmark = pytest.mark.fastai


def net():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 8), nn.Tanh(), nn.Linear(8, 3),
    )  # fmt: skip


SPARSIFY = {
    "magnitude": {},
    "change": {"criteria": "movement"},
    "random": {"criteria": "random"},
    "snip": {"criteria": "snip"},
    "grasp": {"criteria": "grasp"},
    "fisher": {"criteria": "fisher"},
    "taylor of filters": {"criteria": "taylor", "granularity": "filter", "context": "local"},
    "movement of scores": {"criteria": "movement_pruning"},
    "synflow": {"criteria": "synflow"},
    "wanda": {"criteria": "wanda", "context": "per_output"},
    "filters": {"granularity": "filter", "context": "local"},
    "2:4": {"context": "2:4", "layers": ["3", "6", "8"]},
    "regrowth by gradients": {"regrow": "grad", "every": 2},
    "dense weights": {"straight_through": True, "decay": 0.01, "gradient_sparsity": 0.25, "settle": 0.75},
    "random regrowth": {"regrow": "random", "every": 2, "criteria": "snip"},
}
OTHERS = {
    "keep": {"keep": {}},
    "a penalty": {"regularize": {"weight": 1e-3}},
    "a proximal penalty": {"regularize": {"weight": 1e-3, "proximal": True, "granularity": "filter"}},
    "a teacher": {"distil": {"weight": 0.5}},
    "frozen at first": {"freeze": {"layers": ["0", "3"], "end": 1}},
    "frozen later": {"freeze": {"layers": ["0", "8"], "start": 1}},
    "frozen all the time": {"freeze": {"layers": "6"}},
    "int8": {"quantize": {"start": 0}},
    "all weights frozen at first": {"freeze": {"layers": ["0", "3", "6.weight", "8.weight"], "end": 1}},
}
STEPS = {name: {"sparsify": {"sparsity": 0.5, **options}} for name, options in SPARSIFY.items()} | OTHERS
PAIRS = [pair for pair in combinations(STEPS, 2) if not {*pair} <= {*SPARSIFY}]


@pytest.mark.filterwarnings("ignore:(?s).*criterion movement compares", "ignore:(?s).*taylor. a batch norm undoes")
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_every_pair_of_steps_is_trained(make_learner, pair):
    recipe = Recipe({"epochs": 2, "steps": [STEPS[name] for name in pair]})
    learn, callbacks = make_learner(net()), recipe.callbacks(teacher=net())
    learn.fit_one_cycle(2, 1e-2, cbs=callbacks)
    parameters = dict(learn.model.named_parameters())
    assert len(learn.recorder.values) == 2
    assert all(parameter.isfinite().all() and parameter.requires_grad for parameter in parameters.values())
    if pair[0] in SPARSIFY:
        sparsifier = callbacks[0].sparsifier
        masks = sparsifier.all_masks
        assert all((parameters[name].masked_fill(mask, 0) == 0).all() for name, mask in masks.items())
        assert sparsifier.sparsity >= 0.45 or pair == ("regrowth by gradients", "frozen all the time")


@pytest.mark.parametrize("criteria", ["grasp", "snip", "movement_pruning"])
@pytest.mark.parametrize("regrow", [None, "grad"])
def test_a_layer_that_no_gradient_reaches_rests_until_it_is_trained(make_learner, criteria, regrow, capsys):
    from fastai.callback.core import Callback

    sparsities = []

    def note(self):
        sparsities.append(float((self.model[6].weight == 0).float().mean()))

    class FreezesBefore(Callback):
        """Freezes a layer that is selected, before anything has seen its gradient; until the second epoch."""

        order = -100

        def before_batch(self):
            self.model[6].weight.requires_grad_(self.epoch > 0)

    learn = make_learner(net())
    callback = SparsifyCallback(0.5, criteria=criteria, regrow=regrow, every=1, layers=["0", "3", "6"], schedule="lin")
    learn.fit(2, 1e-2, cbs=[callback, FreezesBefore(), Callback(after_epoch=note)])
    assert sparsities[0] == 0
    assert sparsities[1] > 0.2
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.001)
    told = "SparsifyCallback: no gradient reaches 6.weight, frozen at present, so its sparsity stays as it is until it"
    assert capsys.readouterr().out.count(told) == 1


MODIFIERS = {
    "GMPruningModifier": {"init_sparsity": 0.05, "final_sparsity": 0.5, "params": "__ALL_PRUNABLE__"},
    "GlobalMagnitudePruningModifier": {"init_sparsity": 0.05, "final_sparsity": 0.5, "params": "__ALL_PRUNABLE__"},
    "MovementPruningModifier": {"init_sparsity": 0.05, "final_sparsity": 0.5, "params": "__ALL_PRUNABLE__"},
    "StructuredPruningModifier": {"init_sparsity": 0.05, "final_sparsity": 0.5, "params": "__ALL_PRUNABLE__",
                                  "mask_type": "filter"},
    "RigLPruningModifier": {"final_sparsity": 0.5, "params": "__ALL_PRUNABLE__", "update_frequency": 0.25},
    "ACDCPruningModifier": {"compression_sparsity": 0.5, "params": "__ALL_PRUNABLE__", "update_frequency": 0.5},
}  # fmt: skip
MORE = {
    "TrainableParamsModifier": {"trainable": False, "params": ["re:0.weight", "re:6.*"], "start_epoch": 0,
                                "end_epoch": 1},
    "ConstantPruningModifier": {"params": "__ALL__"},
    "DistillationModifier": {"hardness": 0.5, "temperature": 2.0},
    "SetLearningRateModifier": {"start_epoch": 0, "learning_rate": 0.01},
    "LearningRateFunctionModifier": {"lr_func": "linear", "init_lr": 0.1, "final_lr": 0.01, "start_epoch": 0,
                                     "end_epoch": 2},
    "EpochRangeModifier": {"start_epoch": 0, "end_epoch": 2},
}  # fmt: skip


def sparseml_text(*names):
    """A recipe of SparseML with one modifier of each kind, for two epochs."""
    of_all = {**MODIFIERS, **MORE}
    blocks = ["modifiers:"]
    for name in dict.fromkeys(("EpochRangeModifier", *names)):
        times = {"start_epoch": 0, "end_epoch": 2} if name in MODIFIERS else {}
        blocks += [f"  - !{name}", *(f"    {key}: {value!r}" for key, value in {**times, **of_all[name]}.items())]
    return "\n".join(blocks)


@pytest.mark.filterwarnings("ignore:(?s).*")
@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_every_pair_of_modifiers_of_sparseml_is_trained(make_learner, modifier, more, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(sparseml_text(modifier, more))
    recipe = Recipe.from_sparseml(path)
    assert recipe.epochs == 2
    learn, callbacks = make_learner(net()), recipe.callbacks(teacher=net())
    learn.fit(2, 1e-2, cbs=callbacks)
    assert len(learn.recorder.values) == 2
    (sparsify,) = (each for each in callbacks if isinstance(each, SparsifyCallback))
    assert sparsify.sparsifier.sparsity >= 0.4
