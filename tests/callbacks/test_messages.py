"""The messages of all errors and warnings of this folder, as tables."""

import copy
import math
from functools import partial

import pytest
import torch
from conftest import small_learner, small_net
from torch import nn

import sparsifai
from sparsifai import Sparsifier, between
from sparsifai.gradual.plan import plan_of

# Rows of the tables: name, mistake, class of the error or warning, and the parts of its message that matter. What other
# folders say (checks of numbers, registries, the Sparsifier) is given in a word or two.


# --- Plans, which need no fastai --------------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def plan(*arguments):
    return lambda: plan_of(Sparsifier(mlp()), *arguments)


def planned(sparsity, *axes, schedule="lin", example_input=None, model=mlp):
    return lambda: plan_of(
        Sparsifier(model(), *axes, example_input=example_input), sparsity, schedule, 2, 4, None, example_input
    )


def with_nan():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    return model


def twice(t):
    return 2 * t


PLANS = [
    ("no epochs", plan(0.5, "lin", 0, 4), ValueError, ["n_epoch must be a whole number of at least 1, not 0"]),
    ("half a batch", plan(0.5, "lin", 2, 1.5), ValueError, ["n_iter must be a whole number of at least 1, not 1.5"]),
    ("every 0", plan(0.5, "lin", 2, 4, 0), ValueError, ["every must be a whole number of at least 1, not 0"]),
    ("sparsity in percent", plan(50, "lin", 2, 4), ValueError, ["pass 0.5 for 50 %"]),
    ("unknown schedule", plan(0.5, "linear", 2, 4), ValueError, ["unknown schedule 'linear'"]),
    ("schedule above 1", plan(0.5, twice, 2, 4), ValueError, ["schedule twice", "must return"]),
    ("no such layer", plan({"9": 0.5}, "lin", 2, 4), ValueError, ["no layer with a weight to sparsify matches '9'"]),
    (
        "plan of a model", lambda: plan_of(mlp(), 0.5, "lin", 2, 4), TypeError,
        ["plan_of: sparsifier must be a Sparsifier, not Sequential"],
    ),
    ("more than 2:4", planned(0.75, "weight", "2:4"), ValueError, ["2:4 prunes at most 0.5 of the weights"]),
    ("NaN", planned(0.5, model=with_nan), ValueError, ["NaN scores for 0.weight"]),
    (
        "wrong example", planned(0.5, example_input=torch.zeros(1, 5, 8, 8), model=small_net), ValueError,
        ["does not run on example_input", "a tuple for several"],
    ),
]  # fmt: skip

PLAN_WARNINGS = [
    (
        "near collapse", planned(0.75, "weight", "local"), UserWarning,
        [
            "near collapse at a sparsity of 75.00%: 2.weight; lower the sparsity, choose context='erk', limit these "
            "layers with bounded(...), or exclude them with exclude="
        ],
    ),
    (
        "a schedule that ends at 0", planned(0.5, "weight", "local", schedule="dsd"), UserWarning,
        ["schedule dsd ends at a sparsity of 0.00%; the layers of the plan are those at 50.00%"],
    ),
]  # fmt: skip


# --- SparsifyCallback -------------------------------------------------------------------------------------------------


def sparsify(sparsity=0.5, **arguments):
    """A mistake in the constructor."""
    return lambda: sparsifai.SparsifyCallback(sparsity, **arguments)


def fit(sparsity=0.5, **arguments):
    """A mistake that shows at the first batch, before anything is changed."""

    def mistake():
        learn = small_learner(steps=3)
        before = [parameter.clone() for parameter in learn.model.parameters()]
        callback = sparsifai.SparsifyCallback(sparsity, schedule=between("agp", 0.5, 1), **arguments)
        try:
            learn.fit(1, cbs=callback)
        finally:
            assert all(map(torch.equal, before, learn.model.parameters()))
            assert len(learn.metrics) == 0
            assert len(learn.validate()) == 1

    return mistake


def plan_by_callback(sparsity=0.5, model=small_net, arguments=(2, 4), **options):
    return lambda: sparsifai.SparsifyCallback(sparsity, **options).plan(model(), *arguments)


def heat(weight, heat):
    return weight


def total(weight):
    return weight.sum()


def nothing(layers, sparsity):
    return None


def unpooled(grouping, scores):
    return scores


def not_a_number(t):
    return float("nan")


def above_one(t):
    return 1 + t


def sneaky(t):
    return 2.0 if t == 1 / 3 else t


def fit_with_sneaky_schedule():
    small_learner(steps=3).fit(1, cbs=sparsifai.SparsifyCallback(0.5, schedule=sneaky))


def fit_at_a_lower_sparsity(**arguments):
    learn = small_learner(steps=3)
    learn.fit(1, cbs=sparsifai.SparsifyCallback(0.8))
    learn.fit(1, cbs=sparsifai.SparsifyCallback(**arguments))


def fit_a_replaced_model(*callbacks):
    def mistake():
        learn = small_learner(steps=3)
        learn.fit(1)
        learn.model = small_net()
        learn.fit(1, cbs=[make() for make in callbacks])

    return mistake


REPLACED = [
    "the optimizer of the Learner holds no parameter of its model, so that nothing would be trained: the model was "
    "replaced after the optimizer was made. Set learn.opt = None, and the fit makes a new optimizer"
]
LOWER = [
    "SparsifyCallback: 79.", "% of the weights are pruned, more than the 50.00% asked for, because zeros of earlier "
    "fits stay; to let them go, call learn.remove_cb(KeepSparsity) and train without sparsity for a while, or load "
    "weights from before they were pruned"
]  # fmt: skip


def save_before_a_fit():
    sparsifai.SparsifyCallback(0.5).state_dict()


def load_state(state):
    return lambda: sparsifai.SparsifyCallback(0.5).load_state_dict(state)


def used_callback():
    callback = sparsifai.SparsifyCallback(0.5)
    small_learner(steps=3).fit(1, cbs=callback)
    return callback


def load_into_a_used_callback():
    callback = used_callback()
    callback.load_state_dict(callback.state_dict())


def fit_from(state, **arguments):
    """Fit from a state of a callback without straight_through, of another model."""

    def mistake():
        learn = small_learner(steps=3)
        before = [parameter.clone() for parameter in learn.model.parameters()]
        callback = sparsifai.SparsifyCallback(0.5, **arguments)
        callback.load_state_dict({"sparsifier": state(), "reached": 0.5})
        try:
            learn.fit(1, cbs=callback)
        finally:
            assert all(map(torch.equal, before, learn.model.parameters()))

    return mistake


NO_STATE = ["load_state_dict: give what SparsifyCallback.state_dict() returned"]


def fit_with_two():
    small_learner(cbs=sparsifai.SparsifyCallback(0.5)).fit(1, cbs=sparsifai.SparsifyCallback(0.8))


SPARSIFY = [
    ("percent", sparsify(50), ValueError, ["pass 0.5 for 50 %"]),
    ("sparsity NaN", sparsify(float("nan")), ValueError, ["sparsity nan is not a fraction"]),
    ("sparsity as bool", sparsify(True), TypeError, ["not True"]),
    ("no sparsity", sparsify(None), TypeError, ["no sparsity is given"]),
    ("sparsity twice", sparsify(compression_ratio=0.5), TypeError, ["both are given"]),
    ("unknown granularity", sparsify(granularity="wieght"), ValueError, ["did you mean 'weight'"]),
    ("unknown context", sparsify(context="locale"), ValueError, ["did you mean 'local'"]),
    ("unknown criterion", sparsify(criteria="mouvement"), ValueError, ["did you mean 'movement'"]),
    ("unknown schedule of a callback", sparsify(schedule="onecycle"), ValueError, ["did you mean 'one_cycle'"]),
    ("unknown quantity", sparsify(criteria=heat), ValueError, ["unknown quantity 'heat'"]),
    ("schedule NaN", sparsify(schedule=not_a_number), ValueError, ["gives nan at t=0"]),
    ("schedule that starts at 1", sparsify(schedule=above_one), ValueError, ["gives 1.1 at t=0.1"]),
    ("round_to 0", sparsify(round_to=0), ValueError, ["round_to must be a whole number"]),
    ("layers as number", sparsify(layers=3), TypeError, ["3 cannot select layers"]),
    ("seed as text", sparsify(seed="a"), TypeError, ["seed must be a whole number, not 'a'"]),
    *(
        (f"every {every!r}", sparsify(every=every), ValueError, ["every must be a whole number of at least 1"])
        for every in (0, -1, 1.5, True, "2")
    ),
    (
        "drop without regrow", sparsify(drop=0.3), ValueError,
        ["drop=0.3 needs regrow=: pass regrow='grad', 'random' or another criterion"],
    ),
    (
        "initial_sparsity above a target", sparsify({"1": 0.75, "3": 0.5}, initial_sparsity=0.6), ValueError,
        ["initial_sparsity 0.6"],
    ),
    (
        "exclude without match", fit(exclude="nothing.*"), ValueError,
        ["no layer with a weight to sparsify matches 'nothing"],
    ),
    ("layers without match", fit(granularity="filter", layers=[nn.Embedding]), ValueError, ["matches Embedding"]),
    (
        "sparsities without match", fit({"nothing.*": 0.5}), ValueError,
        ["no layer with a weight to sparsify matches 'nothing"],
    ),
    ("one score for all", fit(criteria=total), ValueError, ["must return one real score per weight"]),
    ("context that returns None", fit(context=nothing), ValueError, ["must return a list with"]),
    ("pool that does not pool", fit(pool=unpooled, granularity="kernel"), ValueError, ["one score per group"]),
    (
        "schedule that fails at one point", fit_with_sneaky_schedule, ValueError,
        ["schedule sneaky gives 2.0 at t=0.333333"],
    ),
    (
        "settle without straight_through", sparsify(settle=0.5), ValueError,
        ["settle=0.5 needs straight_through=True: other masks do not change their mind"],
    ),
    (
        "decay without straight_through", sparsify(decay=0.1), ValueError,
        ["decay=0.1 needs straight_through=True: it says how dense weights are trained"],
    ),
    (
        "gradient_sparsity without straight_through", sparsify(gradient_sparsity=0.5), ValueError,
        ["gradient_sparsity=0.5 needs straight_through=True"],
    ),
    (
        "straight_through and regrow", sparsify(straight_through=True, regrow="grad"), ValueError,
        ["straight_through=True and regrow= are two ways to let masks change; pass one of them"],
    ),
    (
        "settle in percent", sparsify(straight_through=True, settle=75), ValueError,
        ["settle 75 is a percentage, not a fraction; pass 0.75 for 75 %"],
    ),
    (
        "settle as text", sparsify(straight_through=True, settle="end"), TypeError,
        ["settle must be a number from 0 to 1, not 'end'"],
    ),
    ("negative decay", sparsify(straight_through=True, decay=-1), ValueError, ["decay must be", "not -1"]),
    (
        "gradient_sparsity in percent", sparsify(straight_through=True, gradient_sparsity=50), ValueError,
        ["gradient_sparsity 50 is a percentage"],
    ),
    (
        "state before a fit", save_before_a_fit, ValueError,
        ["state_dict: there is no Sparsifier before the first batch of a fit; call it later"],
    ),
    *(
        (f"{state!r:.40} for a state", load_state(state), ValueError, NO_STATE)
        for state in (
            None, 3, [], {}, {"sparsifier": {}}, {"sparsifier": [], "reached": 0.5}, {"masks": {}, "levels": {}},
        )
    ),
    *(
        (
            f"{reached!r:.40} for how far a fit has come", load_state({"sparsifier": {}, "reached": reached}),
            ValueError, [f"load_state_dict: reached must be a number from 0 to 1, not {reached!r}"],
        )
        for reached in ("a", True, math.nan, 2.0, 10**400)
    ),
    (
        "state for a used callback", load_into_a_used_callback, ValueError,
        ["load_state_dict: this callback has pruned a model already; make a new SparsifyCallback"],
    ),
    (
        "state without dense weights", fit_from(lambda: Sparsifier(small_net()).state_dict(), straight_through=True),
        ValueError, ["load_state_dict: only one of the state and this Sparsifier has straight_through=True"],
    ),
    (
        "state of another model", fit_from(lambda: Sparsifier(mlp()).state_dict()), ValueError,
        ["load_state_dict: the mask of 10.weight is absent in the state"],
    ),
    ("a replaced model", fit_a_replaced_model(lambda: sparsifai.SparsifyCallback(0.5)), ValueError, REPLACED),
    ("a replaced model, kept", fit_a_replaced_model(lambda: sparsifai.KeepSparsity()), ValueError, REPLACED),
    ("a lower sparsity", lambda: fit_at_a_lower_sparsity(sparsity=0.5), UserWarning, LOWER),
    ("a lower sparsity of a layer", lambda: fit_at_a_lower_sparsity(sparsity={"3": 0.5}), UserWarning,
     ["more than the 50.00% asked for"]),
    (
        "two callbacks", fit_with_two, ValueError,
        [
            "fit: two SparsifyCallbacks both prune 0.weight, 10.weight, 12.weight and 2 others; give each of them its "
            "own layers with layers= or exclude=, prune in two fits (the second keeps the zeros of the first), or "
            "remove one of them"
        ],
    ),
    (
        "plan of a Learner", plan_by_callback(model=small_learner), TypeError,
        ["plan: model must be a torch.nn.Module, such as learn.model, not Learner"],
    ),
    ("plan without epochs", plan_by_callback(arguments=()), TypeError, ["n_epoch"]),
    (
        "plan of 0 epochs", plan_by_callback(arguments=(0, 4)), ValueError,
        ["n_epoch must be a whole number of at least 1, not 0"],
    ),
    (
        "plan of layers that stay dense", plan_by_callback({"0": 0.5, "3": 0.25}, exclude="3"), ValueError,
        ["matches only layers that stay dense"],
    ),
]  # fmt: skip


# --- KeepSparsity, FreezeCallback, plot_sparsity ----------------------------------------------------------------------


def keep(wrong):
    return lambda: sparsifai.KeepSparsity(wrong() if callable(wrong) else wrong)


def fit_with_keeper_of_another_model():
    small_learner(cbs=sparsifai.KeepSparsity(Sparsifier(small_net()))).fit(1)


def fit_with_another_model(model=None):
    learn = small_learner()
    learn.fit(1, cbs=sparsifai.SparsifyCallback(0.5))
    learn.model = copy.deepcopy(learn.model) if model is None else model()
    learn.fit(1)


def fit_with_changed_weights():
    learn = small_learner()
    learn.fit(1, cbs=sparsifai.SparsifyCallback(0.7))
    with torch.no_grad():
        for parameter in learn.model.parameters():
            parameter.add_(0.01)
    learn.fit(1)


def freeze(layers="0", **arguments):
    return lambda: sparsifai.FreezeCallback(layers, **arguments)


ANOTHER_MODEL = (
    "KeepSparsity keeps the zeros of another model than the Learner's; remove it with learn.remove_cb(KeepSparsity), "
    "or use KeepSparsity() to keep the zeros of this model"
)
NO_SPARSIFIER = "KeepSparsity: sparsifier must be a Sparsifier, whose masks are kept, not "

OTHERS = [
    ("keeper of a number", keep(0.5), TypeError, [NO_SPARSIFIER + "0.5"]),
    ("keeper of a callback", keep(sparsify()), TypeError, [NO_SPARSIFIER + "SparsifyCallback"]),
    ("a Sparsifier of another model", fit_with_keeper_of_another_model, ValueError, [ANOTHER_MODEL]),
    ("a copy of the model", fit_with_another_model, ValueError, [ANOTHER_MODEL]),
    ("another model", partial(fit_with_another_model, small_net), ValueError, [ANOTHER_MODEL]),
    (
        "no layers", freeze([]), TypeError,
        ["FreezeCallback: layers must be names or globs of layers, or a list, not []"],
    ),
    ("layers that are no names", freeze([3]), TypeError, ["or a list, not [3]"]),
    (
        "end before start", freeze(start=0.5, end=0.5), ValueError,
        ["FreezeCallback: 0 <= start < end <= 1 must hold, not start=0.5, end=0.5"],
    ),
    (
        "a layer that is not there", lambda: small_learner().fit(1, cbs=sparsifai.FreezeCallback("head")), ValueError,
        ["FreezeCallback: no layer matches 'head'; "],
    ),
    (
        "a plot before any fit", lambda: small_learner().recorder.plot_sparsity(), ValueError,
        ["plot_sparsity: no fit with a SparsifyCallback is recorded; fit with one first"],
    ),
]  # fmt: skip

KEEP_WARNINGS = [
    (
        "changed weights", fit_with_changed_weights, UserWarning,
        [
            "KeepSparsity: pruned weights were changed or loaded and are not zero any more; they are set to zero "
            "again. To keep the new values, call learn.remove_cb(KeepSparsity) before the fit"
        ],
    ),
]  # fmt: skip


def rows(*tables, marks=()):
    return [pytest.param(*row[1:], id=row[0], marks=marks) for table in tables for row in table]


def needs_fastai(request):
    if request.node.get_closest_marker("fastai"):
        pytest.importorskip("fastai.vision.all", reason="the callbacks are fastai's")


@pytest.mark.parametrize(
    ("mistake", "error", "parts"), [*rows(PLANS), *rows(SPARSIFY, OTHERS, marks=pytest.mark.fastai)]
)
def test_the_message_of_a_mistake(request, mistake, error, parts):
    needs_fastai(request)
    with pytest.raises(error) as caught:
        mistake()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("cause", "warning", "parts"), [*rows(PLAN_WARNINGS), *rows(KEEP_WARNINGS, marks=pytest.mark.fastai)]
)
def test_the_message_of_a_warning(request, cause, warning, parts):
    needs_fastai(request)
    with pytest.warns(warning) as caught:
        cause()
    (message,) = [str(each.message) for each in caught]
    for part in parts:
        assert part in message
