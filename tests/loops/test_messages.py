"""What errors and warnings of loops say. A mistake is a small function; "..." stands for any text."""

import re

import pytest
import torch
from conftest import small_net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsifai import Distil, Freeze, Keep, Quantize, Recipe, Regularize, Sparsifier, Sparsify, TrainingManager


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def made(*parts, model=None, optimizer=None, epochs=2, steps_per_epoch=3, **options):
    model = mlp() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if optimizer is None else optimizer
    return TrainingManager(model, optimizer, *parts, epochs=epochs, steps_per_epoch=steps_per_epoch, **options)


def step(manager, steps=1):
    for _ in range(steps):
        manager.model(torch.ones(2, 4)).sum().backward()
        manager.step()


def of_recipe(content=None, **options):
    model = mlp()
    content = content or {"epochs": 2, "steps": [{"sparsify": {"sparsity": 0.5}}]}
    arguments = {"steps_per_epoch": 3, **options}
    return Recipe(content).manager(model, torch.optim.SGD(model.parameters(), 0.1), **arguments)


def recurrent():
    return nn.Sequential(nn.LSTM(4, 3, num_layers=2), nn.Linear(3, 2))


def sparse_without_keep():
    model = mlp()
    with torch.no_grad():
        model[0].weight[:, :2] = 0
    made(Quantize(), model=model)


def never_stepped():
    model = mlp()
    manager = made(Sparsify(0.5, schedule="one_shot"), model=model)
    manager.optimizer.step()
    manager.finish()


def stopped_early():
    manager = made(Quantize(0.5))
    step(manager)
    manager.finish()


def released():
    manager = made(Quantize(0))
    manager.release()
    step(manager)


def other_ranges():
    manager = made(Quantize(0))
    step(manager)
    made(Quantize(0, layers="0")).load_state_dict(manager.state_dict())


def other_parameters():
    return torch.optim.SGD(mlp().parameters(), 0.1)


def finished():
    manager = made(Sparsify(0.5))
    step(manager, 6)
    manager.finish()
    return manager


def ended_early():
    manager = made(Sparsify(0.5, schedule="one_shot"))
    step(manager, 2)
    manager.finish()
    step(manager)


def without_loss(part):
    return lambda: step(made(part))


def half_of_the_optimizer():
    model = mlp()
    return made(Sparsify(0.5), model=model, optimizer=torch.optim.SGD(model[2].parameters(), 0.1))


def frozen_in_parallel():
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module, wrapped.find_unused_parameters = mlp(), False
    Freeze("0").acting(wrapped, None, None, None)


def load(state=None, **options):
    def mistake():
        given = made(Sparsify(0.5), **options).state_dict() if state is None else state
        made(Sparsify(0.5)).load_state_dict(given)

    return mistake


def resumed_too_far():
    state = made(Sparsify(0.5)).state_dict() | {"steps_done": 9}
    made(Sparsify(0.5)).load_state_dict(state)


DONE = (
    "(2 epochs of 3 steps); make the manager with more epochs, or with the number of steps that an epoch has, or make "
    "a new one"
)
NO_STATE = "load_state_dict: give what TrainingManager.state_dict() returned"
ROWS = [
    ("no parts", made, ValueError, "TrainingManager: there is nothing to do; pass a part, such as Sparsify(0.9)"),
    ("a recipe for a part", lambda: made(Recipe({"steps": ["keep"]})), TypeError,
     "TrainingManager: parts are Sparsify, Keep, Regularize, Distil, Freeze and Quantize, each an argument of its "
     "own, not Recipe; call recipe.manager(...) for a Recipe"),
    ("parts in a list", lambda: made([Keep()]), TypeError,
     "...each an argument of its own, not list; call recipe.manager(...) for a Recipe"),
    ("zeros that are not kept", sparse_without_keep, UserWarning,
     "TrainingManager: 33.33% of the weights are zero, and this training does not keep them so; add Keep() to keep "
     "them"),
    ("steps of the optimizer alone", never_stepped, UserWarning,
     "TrainingManager.finish: no step was done, so nothing was pruned or trained as asked for; call manager.step() "
     "instead of optimizer.step()"),
    ("a state of other parts", lambda: made(Freeze("0")).load_state_dict(made(Regularize(0.1)).state_dict()),
     ValueError,
     "load_state_dict: the state is of 6 steps, 0 Sparsify parts and ['regularize'], and this manager of 6 steps, 0 "
     "Sparsify parts and ['freeze']; make it with the same arguments"),
    ("no model", lambda: made(Keep(), model=3, optimizer=3), TypeError,
     "TrainingManager: model must be a torch.nn.Module, not int"),
    ("no epochs", lambda: made(Keep(), epochs=0), ValueError,
     "TrainingManager: epochs must be a whole number of at least 1, not 0"),
    ("half a step", lambda: made(Keep(), steps_per_epoch=1.5), ValueError,
     "TrainingManager: steps_per_epoch must be a whole number of at least 1, not 1.5"),
    ("more steps than in all epochs", lambda: made(Keep(), steps=7), ValueError, "TrainingManager: steps must be..."),
    ("no optimizer", lambda: made(Keep(), optimizer=3), TypeError,
     "TrainingManager: optimizer must be an optimizer of torch, not int"),
    ("an optimizer of another model", lambda: made(Keep(), optimizer=other_parameters()), ValueError,
     "TrainingManager: the optimizer holds no parameter of the model, so that nothing would be trained; make it of "
     "model.parameters(), after the model was moved or replaced"),
    ("LBFGS", lambda: made(Keep(), optimizer=torch.optim.LBFGS(mlp().parameters())), TypeError,
     "TrainingManager: LBFGS moves all weights along one vector, which masks cannot reach; use another optimizer"),
    ("a large part that is not trained", half_of_the_optimizer, UserWarning,
     "TrainingManager: 66.67% of the weights to prune (0.weight) are not in the optimizer, so they are pruned but "
     "never trained; give them to the optimizer, or name the layers to prune in layers="),
    ("two parts for a layer", lambda: made(Sparsify(0.5, layers="0"), Sparsify(0.5)), ValueError,
     "TrainingManager: two Sparsify parts both prune 0.weight; give each of them its own layers with layers= or "
     "exclude="),
    ("wanda without data", lambda: made(Sparsify(0.5, criteria="wanda")), ValueError,
     "TrainingManager: criterion wanda needs data before the first masks are made, which a loop does not show; pass "
     "calibration=, a list of batches, to Sparsify or beside the recipe, and loss_func= if it needs gradients"),
    *((f"{name} without data", lambda options=options: made(Sparsify(0.5, **options)), ValueError,
       f"TrainingManager: {name} needs data before the first masks are made, ...")
      for name, options in {"compensate=True": {"compensate": True}, "criterion obs": {"criteria": "obs"}}.items()),
    ("gradients at once", lambda: made(Sparsify(0.5, criteria="taylor", schedule="one_shot")), ValueError,
     "TrainingManager: criterion taylor needs data..."),
    ("no such layer", lambda: made(Sparsify(0.5, layers="9")), ValueError, "...matches '9'..."),
    ("too much for 2:4", lambda: made(Sparsify(0.75, context="2:4")), ValueError, "...2:4 prunes at most 0.5..."),
    ("a step after the end", lambda: step(finished()), RuntimeError,
     f"TrainingManager.step: all 6 steps are done {DONE}"),
    ("a loss after the end", lambda: finished().loss(torch.tensor(0.0)), RuntimeError,
     f"TrainingManager.loss: all 6 steps are done {DONE}"),
    ("a step after an early end", ended_early, RuntimeError, f"TrainingManager.step: the training was finished {DONE}"),
    ("a penalty without loss", without_loss(Regularize(0.1)), RuntimeError,
     "TrainingManager.step: regularize adds to the loss; call loss = manager.loss(loss, output, inputs) before "
     "loss.backward()"),
    ("a teacher without loss", without_loss(Distil(mlp())), RuntimeError,
     "TrainingManager.step: distil adds to the loss..."),
    ("a teacher without outputs", lambda: made(Distil(mlp())).loss(torch.tensor(0.0)), TypeError,
     "TrainingManager.loss: distil compares outputs; call loss = manager.loss(loss, output, inputs), with the output "
     "and the inputs of the model"),
    ("a negative penalty", lambda: Regularize(-1), ValueError,
     "Regularize: weight, the factor of the penalty, must be..."),
    ("a proximal penalty on gradients", lambda: Regularize(1, criteria="movement", proximal=True), ValueError,
     "a proximal step needs the criterion large_final..."),
    ("a penalty of what is not trained",
     lambda: Regularize(1, proximal=True).acting(mlp(), other_parameters(), None, None), ValueError,
     "Regularize: the optimizer trains none of the regularized weights, so a proximal step has no learning rate; leave "
     "out proximal=True"),
    ("frozen by number", lambda: Freeze(3), TypeError, "..."),
    ("frozen backwards", lambda: Freeze("0", 0.5, 0.5), ValueError,
     "Freeze: 0 <= start < end <= 1 must hold, not start=0.5, end=0.5"),
    ("no layer to freeze", lambda: made(Freeze("9")), ValueError, "Freeze: no layer matches '9'..."),
    ("frozen in parallel", frozen_in_parallel, ValueError,
     "Freeze: DistributedDataParallel waits for the gradients of frozen layers; make it with "
     "find_unused_parameters=True"),
    *((f"{state!r:.30} for a state", load(state), ValueError, NO_STATE)
      for state in (3, [], {}, {"steps": 3}, Sparsifier(mlp()).state_dict())),
    ("a state of more steps", load(epochs=3), ValueError,
     "load_state_dict: the state is of 9 steps, 1 Sparsify parts and [], and this manager of 6 steps, 1 Sparsify parts "
     "and []; make it with the same arguments"),
    ("a state of another model", load(model=small_net()), ValueError, "load_state_dict: ... absent..."),
    ("a state beyond the end", resumed_too_far, ValueError, "load_state_dict: steps_done + 1 must be..."),
    ("a recipe without epochs", lambda: of_recipe({"steps": ["keep"]}), ValueError,
     "manager: the recipe does not say how many epochs there are; pass epochs="),
    ("a recipe of other epochs", lambda: of_recipe(epochs=3), ValueError,
     "manager: epochs=3, but the recipe says 2; leave out one of them"),
    ("a recipe without its teacher", lambda: of_recipe({"epochs": 2, "steps": ["distil"]}), ValueError,
     "line 1: steps.0.distil: distil needs a teacher; pass teacher=, a trained model"),
    ("rounding of nothing", lambda: Quantize(1), ValueError,
     "Quantize: start must be below 1, so that some of the training is left; give 0.75"),
    ("rounding by number", lambda: Quantize(layers=3), TypeError, "Quantize: layers must be names or globs..."),
    ("no layer to round", lambda: made(Quantize(exclude="9")), ValueError, "Quantize: no layer matches '9'..."),
    ("two roundings", lambda: made(Quantize(layers="0"), Quantize(layers="2")), ValueError,
     "TrainingManager: two Quantize parts would round twice; use one, with layers= or exclude="),
    ("rounding in evaluation mode", lambda: step(made(Quantize(), model=mlp().eval())), RuntimeError,
     "Quantize: the model is in evaluation mode, in which layers do not round; call model.train() before the forward "
     "of each step"),
    ("a forward without rounding", released, RuntimeError,
     "Quantize: no layer has rounded before this step; run the forward in training mode, and call manager.prepare() "
     "before it if manager.release() was called"),
    ("rounding that came too late", stopped_early, UserWarning,
     "Quantize: the training has ended before start=0.5, so nothing was quantized"),
    ("weights that stay float", lambda: made(Quantize(0), model=recurrent()), UserWarning,
     "Quantize: 4 weights stay float, since their kind of layer is not quantized: 0.weight_ih_l0, ..."),
    ("the rounded model of no part", lambda: made(Keep()).fake_quantized().__enter__(), ValueError,
     "fake_quantized: the manager has no Quantize part; pass one when you make it"),
    ("the rounded model before its start", lambda: made(Quantize()).fake_quantized().__enter__(), ValueError,
     "fake_quantized: the training has not reached start=, so no ranges are known; train first"),
    ("ranges of other layers", other_ranges, ValueError,
     "load_state_dict: the state has the range of the input of '2', which is not quantized here; give Quantize the "
     "same layers"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "kind", "text"), [pytest.param(*row, id=name) for name, *row in ROWS])
def test_message(mistake, kind, text):
    pattern = "(?s)^" + ".*".join(map(re.escape, text.split("..."))) + "$"
    expected = pytest.warns if issubclass(kind, Warning) else pytest.raises
    with expected(kind, match=pattern):
        mistake()
