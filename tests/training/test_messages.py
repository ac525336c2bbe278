"""The messages of all errors of this folder."""

import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import small_learner, small_net
from torch import nn

import sparsifai
from sparsifai import LotteryTickets, Regularizer, Sensitivity, Ticket, bounded, highest_sparsity, sensitivity

INF, NAN = float("inf"), float("nan")

# Rows of the tables: name, mistake, class of the error, and its message or the parts of it that matter. What other
# folders say (checks of numbers, registries, the Sparsifier) is given in parts.


# --- DistillCallback ----------------------------------------------------------------------------------------------


def distill(**arguments):
    """A mistake in the constructor."""
    return lambda: sparsifai.DistillCallback(small_net(), **arguments)


def distill_fit(teacher=None, model=small_net, loss_func=None, **arguments):
    """A mistake that shows in the fit. teacher: a function of the Learner; model, loss_func: make the Learner's."""

    def mistake():
        learn = small_learner(model())
        learn.loss_func = loss_func() if loss_func else learn.loss_func
        before = [parameter.clone() for parameter in learn.model.parameters()]
        try:
            learn.fit(1, cbs=sparsifai.DistillCallback(teacher(learn) if teacher else small_net(), **arguments))
        finally:
            assert all(map(torch.equal, before, learn.model.parameters()))

    return mistake


class Projected(nn.Module):
    """A loss with parameters."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Conv2d(8, 16, 1)


class WithUnusedLayer(nn.Sequential):
    """The small net, and a layer that does not run."""

    def __init__(self):
        super().__init__(*small_net())
        self.add_module("extra", nn.Linear(2, 2))

    def forward(self, x):
        for layer in list(self)[:-1]:
            x = layer(x)
        return x


class OfADictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        return {"classes": self.net(x)}


def wide(classes):
    return lambda learn: nn.Sequential(nn.Conv2d(2, 16, 3), nn.Flatten(), nn.Linear(16 * 36, classes))


def soft_targets(*shape):
    return lambda: sparsifai.soft_targets(torch.zeros(shape), torch.zeros(shape), 4.0, 1)


def compared(loss, *shapes):
    return lambda: sparsifai.distillation_losses[loss](*map(torch.zeros, shapes))


def not_recorded():
    distillation = sparsifai.Distillation(small_net(), features="0")
    distillation.loss(torch.tensor(1.0), small_net()(torch.zeros(2, 2, 8, 8)), torch.zeros(2, 2, 8, 8), 0.0)


def other_outputs():
    output, teacher = {"start_logits": torch.zeros(2, 5), "end_logits": torch.zeros(2, 5)}, nn.Linear(2, 3)
    sparsifai.Distillation(teacher).loss(torch.tensor(1.0), output, torch.zeros(2, 2), 0.0)


def fastai_loss(name):
    import fastai.losses

    return getattr(fastai.losses, name)()


def fit_with_a_copy_without_teacher():
    callback = pickle.loads(pickle.dumps(sparsifai.DistillCallback(small_net())))
    small_learner().fit(1, cbs=callback)


SHARES = (
    "distillation: the teacher shares parameters with the model, so training would change it; pass a copy as the "
    "teacher: copy.deepcopy(model)"
)
NO_CLASSES = (
    "soft_targets compares at least two classes, but outputs of shape {} have none along axis 1; pass axis=, or "
    "another loss= such as 'mean_squared_error'"
)
FEATURES = (
    "distillation: features must be names of layers that both nets have, or a dictionary {name in the model: name "
    "in the teacher}, not "
)

DISTILL = [
    (
        "other outputs", other_outputs, ValueError,
        [
            "distillation: the model returns start_logits, end_logits, and the teacher an output without a name; wrap "
            "one of them in a module that returns what the other does"
        ],
    ),
    ("weight above 1", distill(weight=1.5), ValueError, ["distillation: weight", "from 0 to 1", "not 1.5"]),
    ("weight below 0", distill(weight=-0.1), ValueError, ["distillation: weight", "not -0.1"]),
    ("weight as text", distill(weight="a"), ValueError, ["distillation: weight", "not 'a'"]),
    ("weight as bool", distill(weight=True), ValueError, ["distillation: weight", "not True"]),
    ("weight NaN", distill(weight=NAN), ValueError, ["distillation: weight", "not nan"]),
    ("temperature 0", distill(temperature=0), ValueError, ["distillation: temperature must be above 0, not 0"]),
    ("temperature inf", distill(temperature=INF), ValueError, ["distillation: temperature", "not inf"]),
    ("feature_weight", distill(feature_weight=-1), ValueError, ["distillation: feature_weight", "not -1"]),
    (
        "loss", distill(loss=3), TypeError,
        ["distillation: loss must be a name of distillation_losses or a function of (student, teacher), not 3"],
    ),
    (
        "feature_loss", distill(feature_loss=None), TypeError,
        [
            "distillation: feature_loss must be a name of distillation_losses or a function of (student, teacher), not "
            "None"
        ],
    ),
    (
        "feature_loss without features", distill(feature_loss="similarity"), ValueError,
        ["distillation: feature_loss is given without features; pass features=, names of layers, or leave it out"],
    ),
    (
        "unknown loss", distill(loss="soft_target"), ValueError,
        ["unknown distillation loss 'soft_target'; did you mean 'soft_targets'?"],
    ),
    (
        "a loss of one output", distill(loss=torch.nn.Softmax), ValueError,
        ["distillation loss Softmax must be a function of (student, teacher) (too many positional arguments)"],
    ),
    (
        "a loss with an option that it does not have",
        distill(features="0", feature_loss=partial(sparsifai.relational, angel_weight=1)), ValueError,
        [
            "distillation loss relational(angel_weight=1): relational has no such option; it has distance_weight, "
            "angle_weight"
        ],
    ),
    ("features with a number", distill(features={"0": 1}), TypeError, [FEATURES + "{'0': 1}"]),
    ("no features", distill(features=[]), TypeError, [FEATURES + "[]"]),
    ("features as number", distill(features=3), TypeError, [FEATURES + "3"]),
    (
        "unknown layer of the teacher", distill(features={"0": "layer4"}), ValueError,
        ["distillation: features= has 'layer4', which is not a layer of the teacher; choose from '0'"],
    ),
    ("unknown schedule", distill(schedule="linear"), ValueError, ["'linear'", "did you mean 'lin'"]),
    (
        "feature_loss with parameters", distill(features="0", feature_loss=Projected()), ValueError,
        [
            "distillation: feature_loss has parameters that no optimizer trains; freeze them, or move the layer "
            "that projects the features into the model"
        ],
    ),
    (
        "teacher as text", lambda: sparsifai.DistillCallback("resnet50"), TypeError,
        ["distillation: teacher must be a torch.nn.Module or a fastai Learner, not str"],
    ),
    ("the model as teacher", distill_fit(lambda learn: learn.model), ValueError, [SHARES]),
    ("the Learner as teacher", distill_fit(lambda learn: learn), ValueError, [SHARES]),
    ("a shared layer", distill_fit(lambda learn: nn.Sequential(learn.model[0], nn.ReLU())), ValueError, [SHARES]),
    (
        "pickled without teacher", fit_with_a_copy_without_teacher, ValueError,
        [
            "distillation has no teacher, because what is pickled does not include it; make a new one with the "
            "teacher, for a fastai Learner after learn.remove_cb(DistillCallback)"
        ],
    ),
    (
        "unknown layer of the model",
        distill_fit(lambda learn: nn.ModuleDict({"body": small_net()}), features=["body.1"]), ValueError,
        ["distillation: features= has 'body.1', which is not a layer of the model; choose from '0', '1'"],
    ),
    (
        "outputs of different shapes", distill_fit(wide(4)), ValueError,
        [
            "distillation: the model gives shape (2, 3) and the teacher (2, 4), which soft_targets cannot compare; "
            "make the shapes equal, or pass another loss=, such as 'similarity', or a function of (student, "
            "teacher)"
        ],
    ),
    (
        "features of different shapes", distill_fit(wide(3), features=["0"]), ValueError,
        [
            "distillation: layer '0' of the model gives shape (2, 8, 6, 6) and layer '0' of the teacher "
            "(2, 16, 6, 6), which mse_loss cannot compare; make the shapes equal, or pass another feature_loss=, "
            "such as 'similarity', or a function of (student, teacher)"
        ],
    ),
    (
        "a loss that gives a tensor",
        distill_fit(features=["0"], feature_loss=partial(F.mse_loss, reduction="none")), ValueError,
        [
            "distillation: feature_loss mse_loss(reduction='none') must return a tensor with one number, but it "
            "returned a tensor of shape (2, 8, 6, 6)"
        ],
    ),
    (
        "a loss that gives no tensor", distill_fit(loss=lambda student, teacher: 1.0), ValueError,
        ["distillation: loss <lambda> must return a tensor with one number, but it returned float"],
    ),
    ("an output that is no tensor", distill_fit(lambda learn: OfADictionary()), ValueError, ["the teacher", "dict"]),
    (
        "a layer that does not run", distill_fit(model=WithUnusedLayer, features={"extra": "0"}), ValueError,
        ["distillation: layer 'extra' of the model did not run in this batch; leave it out of features="],
    ),
    ("soft targets of one class", soft_targets(4, 1), ValueError, [NO_CLASSES.format((4, 1))]),
    ("soft targets of one axis", soft_targets(4), ValueError, [NO_CLASSES.format((4,))]),
    (
        "relations of other examples", compared("relational", (4, 2), (3, 2)), ValueError,
        [
            "relational compares the examples of one batch, which both nets must have along their first axis, but the "
            "shapes are (4, 2) and (3, 2)"
        ],
    ),
    ("similarity of numbers", compared("similarity", (), ()), ValueError, ["the shapes are () and ()"]),
    (
        "attention without positions", compared("attention_transfer", (4, 2), (4, 2)), ValueError,
        [
            "attention_transfer compares maps, both of shape (batch, channels, ...) or both of shape (batch, tokens, "
            "channels), not the shapes (4, 2) and (4, 2)"
        ],
    ),
    (
        "attention of other tokens", compared("attention_transfer", (4, 5, 2), (4, 6, 2)), ValueError,
        [
            "attention_transfer compares the positions of the same examples, but the shapes (4, 5, 2) and (4, 6, 2) "
            "differ in examples or tokens; choose layers that agree in them, or pass channels=1 if the channels are "
            "axis 1"
        ],
    ),
    (
        "features that were not recorded", not_recorded, ValueError,
        [
            "distillation: the outputs of the layers were not recorded; call the model inside of `with "
            "distillation.recording(model):`"
        ],
    ),
    *(
        (
            f"soft targets with {name}", distill_fit(loss_func=loss_func), ValueError,
            [
                f"distillation: soft_targets compares classes, but the loss of the labels, {name}, is not one of "
                "classes; pass another loss=, such as 'mean_squared_error'"
            ],
        )
        for name, loss_func in (
            ("MSELoss", lambda: fastai_loss("MSELossFlat")), ("L1Loss", lambda: fastai_loss("L1LossFlat")),
            ("BCEWithLogitsLoss", lambda: fastai_loss("BCEWithLogitsLossFlat")), ("HuberLoss", nn.HuberLoss),
        )
    ),
]  # fmt: skip


# --- lottery_ticket -----------------------------------------------------------------------------------------------


def lottery(learner=small_learner, **options):
    """A mistake of which lottery_ticket tells before anything is trained."""

    def mistake():
        from lottery_runs import run, same, weights_of

        learn = learner()
        before, callbacks = weights_of(learn.model), sorted(each.name for each in learn.cbs)
        try:
            run(learn, **options)
        finally:
            assert same(before, weights_of(learn.model))
            assert sorted(each.name for each in learn.cbs) == callbacks

    return mistake


def rewind_after_the_end():
    from lottery_runs import run

    run(small_learner(), rewind_to=3)


def with_callback(make):
    return lambda: small_learner(cbs=make())


def without_validation_data():
    from fastai.vision.all import DataLoaders

    learn = small_learner()
    learn.dls = DataLoaders(learn.dls.train)
    return learn


def without_recorder():
    sparsifai.lottery_ticket(small_learner(default_cbs=False), 0.5, 1)


def resume(first=None, learner=small_learner, **second):
    """Runs with a file, and resumes it with other arguments."""

    def mistake(folder):
        from lottery_runs import run

        run(small_learner(), rounds=1, path=folder / "run", **(first or {}))
        run(learner(), **{"rounds": 1, "path": folder / "run", **(first or {}), **second})

    return mistake


def changed_run(change):
    """Resumes a run whose file was changed."""

    def mistake(folder):
        from lottery_runs import run

        run(small_learner(), rounds=1, path=folder / "run")
        state = torch.load(folder / "run", weights_only=True)
        change(state)
        torch.save(state, folder / "run")
        run(small_learner(), rounds=1, path=folder / "run")

    return mistake


def tickets_only(folder):
    from lottery_runs import run

    run(small_learner(), rounds=1).save(folder / "run")
    run(small_learner(), rounds=1, path=folder / "run")


def a_text(folder):
    from lottery_runs import run

    (folder / "run").write_text("no")
    run(small_learner(), rounds=1, path=folder / "run")


def a_tensor(folder):
    torch.save({"weight": torch.ones(3)}, folder / "run")
    LotteryTickets.load(folder / "run")


def tickets(rounds=2):
    return LotteryTickets([Ticket({}, 0.0, {"valid_loss": 1.0, "error_rate": 0.5})] * rounds)


REWIND = "lottery_ticket: rewind_to must be an epoch of at least 0, such as 0, 0.5 or 2, not "
WRITTEN = "pass the same arguments to resume that run, or another path= to begin a new one"
HAS_CALLBACK = (
    "lottery_ticket begins with a dense net and prunes between its fits, so the Learner must not have a {0}; call "
    "learn.remove_cb({0})"
)
CANNOT_MEASURE = "lottery_ticket measures each ticket, so the Learner needs validation data and a Recorder"
OTHER_MODEL = (
    "the ticket belongs to another model, with other names or shapes in its state_dict; pass a model "
    "that is built like the one that the ticket was found with"
)

LOTTERY = [
    ("sparsity in percent", lottery(sparsity=80), ValueError, ["80 is a percentage"]),
    ("rounds", lottery(rounds=0), ValueError, ["rounds", "not 0"]),
    ("fit", lottery(fit="five"), ValueError, ["fit", "not 'five'"]),
    ("rewind_to below 0", lottery(rewind_to=-1), ValueError, [REWIND + "-1"]),
    ("rewind_to as text", lottery(rewind_to="1"), ValueError, [REWIND + "'1'"]),
    ("rewind_to inf", lottery(rewind_to=INF), ValueError, [REWIND + "inf"]),
    (
        "unknown control", lottery(controls=["reinitialised"]), ValueError,
        ["lottery_ticket: unknown control 'reinitialised'; did you mean 'reinitialized'?"],
    ),
    ("controls_every", lottery(controls_every=0), ValueError, ["controls_every", "not 0"]),
    ("unknown granularity", lottery(granularity="filters"), ValueError, ["granularity 'filters'", "'filter'"]),
    ("unknown criterion", lottery(criteria="large"), ValueError, ["criterion 'large'"]),
    ("unknown option", lottery(layer="0"), TypeError, ["'layer'"]),
    ("no such layer", lottery(criteria="snip", sparsity={"foo": 0.5}), ValueError, ["'foo'"]),
    (
        "calibration", lottery(criteria="snip", calibration=3), TypeError,
        ["lottery_ticket: calibration must be a list or a data loader of batches, not 3"],
    ),
    (
        "regrow", lottery(regrow="grad"), TypeError,
        ["lottery_ticket: tickets keep their masks, so regrow= is not possible; use SparsifyCallback"],
    ),
    (
        "straight_through", lottery(straight_through=True), TypeError,
        ["lottery_ticket: tickets keep their masks, so straight_through= is not possible; use SparsifyCallback"],
    ),
    ("more than 2:4 allows", lottery(sparsity=0.9, context="2:4"), ValueError, ["0.5"]),
    (
        "rewind_to after the end", rewind_after_the_end, ValueError,
        [
            "lottery_ticket: rewind_to=3 is after the end of the fit, which had 8 batches, 4 in an epoch; pass a "
            "smaller rewind_to"
        ],
    ),
    (
        "with SparsifyCallback", lottery(with_callback(lambda: sparsifai.SparsifyCallback(0.5))), ValueError,
        [HAS_CALLBACK.format("SparsifyCallback")],
    ),
    (
        "with KeepSparsity", lottery(with_callback(lambda: sparsifai.KeepSparsity())), ValueError,
        [HAS_CALLBACK.format("KeepSparsity")],
    ),
    ("no validation data", lottery(without_validation_data), ValueError, [CANNOT_MEASURE]),
    ("no Recorder", without_recorder, ValueError, [CANNOT_MEASURE]),
    ("resumed with other rounds", resume(rounds=2), ValueError, ["was written with rounds=1, not 2; " + WRITTEN]),
    (
        "resumed with another criterion", resume(criteria="movement"), ValueError,
        ["was written with criteria=large_final, not movement; " + WRITTEN],
    ),
    (
        "resumed with another fit", resume({"exclude": nn.Linear}, fit=3), ValueError,
        ["was written with fit=2, not 3; " + WRITTEN],
    ),
    (
        "resumed with another context",
        resume({"context": bounded("global", {"0": 0.5})}, context=bounded("global", {"0": 0.4})), ValueError,
        ["was written with context=bounded", WRITTEN],
    ),
    (
        "resumed with another model",
        resume(learner=lambda: small_learner(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)))), ValueError,
        [OTHER_MODEL],
    ),
    (
        "a file without run", tickets_only, ValueError,
        ["has tickets but no run that can be resumed; pass another path=, or remove the file"],
    ),
    ("a text", a_text, ValueError, ["is not a file of lottery tickets ("]),
    (
        "another file of torch", a_tensor, ValueError,
        ["is not a file of lottery tickets: it has no tickets, metric and start"],
    ),
    (
        "a ticket of another model", lambda: Ticket({}, 0.0, {}, {}, {"weight": torch.ones(1)}).apply(nn.Linear(3, 3)),
        ValueError, [OTHER_MODEL],
    ),
    (
        "a ticket with a mask of numbers", lambda: Ticket(
            {"weight": torch.ones(3, 3, dtype=torch.uint8)}, 0.0, {}, {}, nn.Linear(3, 3).state_dict()
        ).apply(nn.Linear(3, 3)), ValueError,
        [
            "Ticket.apply: masks['weight'] is a tensor of uint8, and a mask is bool; convert it with .bool() if it "
            "holds 0 and 1 only"
        ],
    ),
    (
        "a ticket that is applied to a Learner", lambda: tickets()[0].apply(3), TypeError,
        ["Ticket.apply: model must be a torch.nn.Module, not int; for a Learner, pass learn.model"],
    ),
    (
        "a file with a wrong mask", changed_run(lambda state: state["tickets"][1]["masks"].update({"0.weight": 3})),
        ValueError,
        ["cannot be resumed: tickets[1].masks['0.weight'] is of type int, and should be a bool tensor"],
    ),
    (
        "a file with too many tickets", changed_run(lambda state: state["tickets"].append(state["tickets"][1])),
        ValueError, ["cannot be resumed: tickets has 3 entries, for a dense net and 1 rounds"],
    ),
    (
        "a file with tickets in another order", changed_run(lambda state: state["tickets"].reverse()), ValueError,
        ["cannot be resumed: tickets[0].masks['0.weight'] has pruned weights that a later mask keeps"],
    ),
    (
        "a file without a state of random numbers", changed_run(lambda state: state["run"]["random"].update(torch=1)),
        ValueError, ["cannot be resumed: run.random['torch'] is not the state of a generator ("],
    ),
    (
        "a file without a state of the optimizer", changed_run(lambda state: state["run"].update(optimizer={})),
        ValueError, ["cannot be resumed: run.optimizer is not the state of an optimizer; it lacks state, and hypers"],
    ),
    (
        "a file that lacks something", changed_run(lambda state: state["run"].pop("trained")), ValueError,
        ["cannot be resumed: run lacks 'trained'"],
    ),
    (
        "a file with something unknown", changed_run(lambda state: state["run"].update(more=1)), ValueError,
        ["cannot be resumed: run has the unknown entry 'more'"],
    ),
    (
        "unknown metric of tickets", lambda: LotteryTickets(tickets().tickets, "error"), ValueError,
        ["LotteryTickets: the tickets have no metric 'error'; did you mean 'error_rate'?"],
    ),
    (
        "a plot of runs of different lengths", lambda: tickets().plot(tickets(3)), ValueError,
        ["LotteryTickets.plot: all runs must have the same number of rounds; slice the longer ones"],
    ),
]  # fmt: skip


# --- Regularizer and RegularizeCallback ---------------------------------------------------------------------------


def two_layers():
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))


def regularizer(criteria):
    return lambda: Regularizer(two_layers(), criteria=criteria)


def proximal_step(threshold, criteria="large_final"):
    """A mistake that changes no weight."""

    def mistake():
        model = two_layers()
        before = copy.deepcopy(model)
        try:
            Regularizer(model, criteria=criteria).proximal_step(threshold)
        finally:
            assert all(map(torch.equal, before.parameters(), model.parameters()))

    return mistake


def regularize(weight=1, **arguments):
    return lambda: sparsifai.RegularizeCallback(weight, **arguments)


def regularize_fit(other_optimizer=False, **arguments):
    """A mistake that shows before the first step of a fit."""

    def mistake():
        from fastcore.foundation import L

        learn = small_learner()
        before = [parameter.clone() for parameter in learn.model.parameters()]
        if other_optimizer:
            learn.create_opt()
            learn.opt.param_lists = L(L([nn.Parameter(torch.zeros(2))]))
        try:
            learn.fit(1, cbs=sparsifai.RegularizeCallback(1.0, **arguments))
        finally:
            assert all(map(torch.equal, before, learn.model.parameters()))

    return mistake


def signs(weight):
    return (weight > 0).float()


def total(weight):
    return weight.abs().sum()


CHOOSE = (
    ", so it cannot be a penalty; choose one that uses only weight, init and previous, such as large_final, movement "
    "or magnitude_increase"
)
NO_GRADIENT = ", through which no gradient reaches the weight" + CHOOSE
NO_PROXIMAL_STEP = "; for other criteria, add the penalty to the loss instead"


@torch.inference_mode()
def made_in_inference_mode():
    return nn.Linear(3, 4)


REGULARIZER = [
    (
        "inference", lambda: Regularizer(made_in_inference_mode()), ValueError,
        [
            "Regularizer: the tensors of Linear were made under torch.inference_mode, which autograd refuses; make the "
            "model outside of it, or take copy.deepcopy(model) outside of it"
        ],
    ),
    ("random", regularizer("random"), ValueError, ["criterion random uses rng" + NO_GRADIENT]),
    ("snip", regularizer("snip"), ValueError, ["criterion snip uses grad" + NO_GRADIENT]),
    ("synflow", regularizer("synflow"), ValueError, ["criterion synflow uses flow" + NO_GRADIENT]),
    ("wanda", regularizer("wanda"), ValueError, ["criterion wanda uses activation" + NO_GRADIENT]),
    (
        "large_init", regularizer("large_init"), ValueError,
        ["criterion large_init does not use the present weight" + CHOOSE],
    ),
    ("a step function", regularizer(signs), ValueError, ["criterion signs returns scores without a gradient" + CHOOSE]),
    (
        "one score", regularizer(total), ValueError,
        [
            "criterion total must return one real score per weight: for 0.weight a tensor of the shape (4, 3), not (), "
            "torch.float32"
        ],
    ),
    ("unknown criterion", regularizer("large_finl"), ValueError, ["'large_finl'", "did you mean 'large_final'"]),
    ("no model", lambda: Regularizer([]), TypeError, ["torch.nn.Module", "list"]),
    (
        "threshold below 0", proximal_step(-1), ValueError,
        ["proximal_step: a threshold must be a finite number of at least 0, not -1"],
    ),
    ("threshold as text", proximal_step("a"), ValueError, ["proximal_step: a threshold must be", "not 'a'"]),
    ("threshold NaN", proximal_step(NAN), ValueError, ["proximal_step: a threshold must be", "not nan"]),
    (
        "unknown weight", proximal_step({"0.wieght": 1.0}), ValueError,
        ["proximal_step: '0.wieght' is not a regularized weight; did you mean '0.weight'"],
    ),
    (
        "no proximal step", proximal_step(0.1, "squared_final"), ValueError,
        ["a proximal step needs the criterion large_final, not squared_final" + NO_PROXIMAL_STEP],
    ),
]  # fmt: skip

REGULARIZE = [
    (
        "weight below 0", regularize(-1), ValueError,
        ["RegularizeCallback: weight, the factor of the penalty,", "not -1"],
    ),
    ("weight inf", regularize(INF), ValueError, ["weight", "not inf"]),
    ("weight as text", regularize("filter"), ValueError, ["weight", "not 'filter'"]),
    (
        "weight last", regularize(sparsifai.large_final), ValueError,
        ["weight, the factor of the penalty, comes first, not 'large_final'; write RegularizeCallback(1e-3, 'filter'"],
    ),
    ("weight as bool", regularize(True), ValueError, ["weight", "not True"]),
    ("unknown granularity", regularize(granularity="filtr"), ValueError, ["'filtr'", "did you mean 'filter'"]),
    ("random in a Learner", regularize(criteria="random"), ValueError, ["criterion random uses rng" + NO_GRADIENT]),
    ("snip in a Learner", regularize(criteria="snip"), ValueError, ["criterion snip uses grad" + NO_GRADIENT]),
    (
        "large_init in a Learner", regularize(criteria="large_init"), ValueError,
        ["criterion large_init does not use the present weight" + CHOOSE],
    ),
    (
        "proximal movement", regularize(criteria="movement", proximal=True), ValueError,
        ["a proximal step needs the criterion large_final, not movement" + NO_PROXIMAL_STEP],
    ),
    ("unknown schedule of a penalty", regularize(schedule="linear"), ValueError, ["'linear'", "did you mean 'lin'"]),
    ("layers", regularize(layers=3), TypeError, ["3"]),
    ("exclude without match", regularize_fit(exclude="nothing.*"), ValueError, ["'nothing.*'"]),
    (
        "a step function in a fit", regularize_fit(criteria=signs), ValueError,
        ["criterion signs returns scores without a gradient" + CHOOSE],
    ),
    (
        "an optimizer of other parameters", regularize_fit(True, proximal=True), ValueError,
        [
            "RegularizeCallback: the optimizer trains none of the regularized weights, so a proximal step has no "
            "learning rate; leave out proximal=True"
        ],
    ),
]  # fmt: skip


# --- sensitivity, highest_sparsity --------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def one(model):
    return 1.0


def mse(predictions, targets):
    return 0.0


def measured(metric=one, levels=(0.5,), model=mlp, **options):
    return lambda: sensitivity(model(), metric, levels, progress=False, **options)


def highest(**options):
    return lambda: highest_sparsity(mlp(), **{"tolerance": 1, "metric": one, **options})


def budget(sparsity):
    return lambda: Sensitivity(("0.weight",), (100,), (0.5, 0.9), ((1, 5),), 0.0, "loss", True).budget(sparsity)


def of_learner(metric=None, **options):
    def mistake():
        from fastai.vision.all import accuracy, error_rate

        sensitivity(small_learner(metrics=[accuracy, error_rate]), metric, [0.5], progress=False, **options)

    return mistake


def without_data(which, **options):
    def mistake():
        from fastai.vision.all import DataLoader, DataLoaders

        learn = small_learner()
        if which == "valid":
            learn.dls.loaders = learn.dls.loaders[:1]
        else:
            learn.dls = DataLoaders(DataLoader([], bs=2), learn.dls.valid)
        sensitivity(learn, progress=False, **options)

    return mistake


BATCHES = [(torch.zeros(4, 4), torch.tensor([0, 1, 0, 1]))]
LEVELS = "levels must be fractions above 0 and below 1, such as (0.5, 0.7, 0.8, 0.9, 0.95, 0.98), not "
METRIC = "; for a fastai Learner it may also be the name of one of its metrics, or None for its validation loss"

SENSITIVITY = [
    (
        "no model to measure", measured(model=lambda: 3), TypeError,
        ["pass a fastai Learner or a torch.nn.Module, not int"],
    ),
    (
        "no metric", measured(None), TypeError,
        ["metric must be a function of the model that returns a number, not None" + METRIC],
    ),
    (
        "metric by name without a Learner", measured("accuracy"), TypeError,
        ["metric must be a function of the model that returns a number, not 'accuracy'" + METRIC],
    ),
    (
        "metric that returns None", measured(lambda model: None), TypeError,
        ["metric <lambda> must return a number, but it returned None"],
    ),
    (
        "metric that is NaN", measured(lambda model: NAN), ValueError,
        ["metric <lambda> is nan before pruning, so nothing can be compared with it; check the model and its data"],
    ),
    (
        "metric of predictions", measured(mse), TypeError,
        [
            "metric mse must be a function of the model alone (missing a required argument: 'targets'); add a metric "
            "of predictions and targets to the metrics of the Learner, and pass its name"
        ],
    ),
    ("no levels", measured(levels=[]), ValueError, [LEVELS + "()"]),
    ("level 1", measured(levels=[0.5, 1]), ValueError, [LEVELS + "(0.5, 1.0)"]),
    ("level 0", measured(levels=[0, 0.5]), ValueError, [LEVELS + "(0.0, 0.5)"]),
    ("level in percent", measured(levels=[50]), ValueError, ["pass 0.5 for 50 %"]),
    (
        "one level", measured(levels=0.5), TypeError,
        ["levels must be several fractions, such as (0.5, 0.7, 0.8, 0.9, 0.95, 0.98), not 0.5"],
    ),
    ("a level by layer", measured(levels=[{"0": 0.5}]), TypeError, ["a level", "not {'0': 0.5}"]),
    ("unknown granularity to measure", measured(granularity="filtre"), ValueError, ["did you mean 'filter'"]),
    ("unknown option to measure", measured(granularty="filter"), TypeError, ["'granularty'"]),
    ("exclude without match to measure", measured(exclude="nothing"), ValueError, ["'nothing'"]),
    (
        "coupled", measured(coupled=True), ValueError,
        [
            "sensitivity prunes one layer at a time, but coupled filters are pruned together; leave out coupled=True"
        ],
    ),
    (
        "criterion of data without data", measured(criteria="snip"), TypeError,
        ["criterion snip looks at data; pass calibration= a list of batches, and loss_func= if it needs gradients"],
    ),
    (
        "criterion of gradients without a loss", measured(criteria="snip", calibration=BATCHES), TypeError,
        ["grad", "loss_func"],
    ),
    ("more than 2:4 allows in a layer", measured(levels=[0.3, 0.9], context="2:4"), ValueError, ["0.5"]),
    *(
        (
            name, measured(criteria=name), ValueError,
            [
                f"criterion {name} compares the weights with earlier values, but nothing is trained here; choose a "
                "criterion of the present weights, such as large_final, or of data, such as snip"
            ],
        )
        for name in ("movement", "magnitude_increase", "updating_movmag")
    ),
    ("tolerance below 0", highest(tolerance=-1), ValueError, ["tolerance", "not -1"]),
    ("tolerance NaN", highest(tolerance=NAN), ValueError, ["tolerance", "not nan"]),
    ("tolerance as text", highest(tolerance="a"), ValueError, ["tolerance", "not 'a'"]),
    (
        "precision 0", highest(precision=0), ValueError,
        ["precision must be above 0, not 0; it is the distance between the sparsities that are tried, such as 0.005"],
    ),
    ("precision 2", highest(precision=2), ValueError, ["precision", "from 0 to 1", "not 2"]),
    (
        "budget above the levels", budget(0.95), ValueError,
        [
            "budget: sparsity 0.95 is above 0.9, the highest level that was measured; measure higher levels: "
            "sensitivity(..., levels=(..., 0.95))"
        ],
    ),
    ("budget in percent", budget(95), ValueError, ["pass 0.95 for 95 %"]),
    ("budget by layer", budget({"0": 0.5}), TypeError, ["sparsity", "from 0 to 1", "not {'0': 0.5}"]),
]  # fmt: skip

SENSITIVITY_OF_LEARNER = [
    (
        "unknown metric", of_learner("acuracy"), ValueError,
        ["the Learner has no metric 'acuracy'; did you mean 'accuracy'"],
    ),
    (
        "metric as number", of_learner(3), TypeError,
        ["metric must be a function of the model that returns a number, not 3" + METRIC],
    ),
    (
        "no data to validate with", without_data("valid"), ValueError,
        [
            "learn.validate() returns no valid_loss, because the Learner has no validation data or no Recorder; add "
            "them, or pass a function of the model as metric"
        ],
    ),
    (
        "no data to train on", without_data("train", metric=one, criteria="snip"), ValueError,
        ["the Learner has no data to train on", "example_input="],
    ),
]  # fmt: skip


def rows(*tables, marks=()):
    return [pytest.param(*row[1:], id=row[0], marks=marks) for table in tables for row in table]


@pytest.mark.parametrize(
    ("mistake", "error", "parts"),
    [
        *rows(REGULARIZER, SENSITIVITY),
        *rows(DISTILL, LOTTERY, REGULARIZE, SENSITIVITY_OF_LEARNER, marks=pytest.mark.fastai),
    ],
)
def test_the_message_of_a_mistake(request, tmp_path, mistake, error, parts):
    if request.node.get_closest_marker("fastai"):
        pytest.importorskip("fastai.vision.all", reason="the callbacks are fastai's")
    with pytest.raises(error) as caught:
        mistake(tmp_path) if "folder" in inspect.signature(mistake).parameters else mistake()
    for part in parts:
        assert part in str(caught.value)
