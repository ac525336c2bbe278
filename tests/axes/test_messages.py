"""What errors and warnings of the four axes say. A mistake is a small function; "..." stands for any text."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from sparsifai import (
    Sparsifier,
    along,
    between,
    block,
    blocks,
    bounded,
    contexts,
    criteria,
    during,
    granularities,
    is_nm,
    iterative,
    plot_schedule,
    quantities,
    raised,
    schedules,
    select_groups,
    stepped,
    taken,
)
from sparsifai.axes.grouping import Grouping, UnavailableError
from sparsifai.axes.quantity import UnsuitableLayerError
from sparsifai.axes.ranking.scored_layer import ScoredLayer
from sparsifai.axes.schedule import progress


def matrices():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def convolutions():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 3), nn.Linear(64, 10))


def sparsify(sparsity=0.5, model=None, **options):
    Sparsifier(matrices() if model is None else model, **options).sparsify(sparsity)


def with_nan():
    model = matrices()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    return model


def swept(size, name, context, **options):
    criterion = partial(criteria[name], block_size=size, **options)
    sparsifier = Sparsifier(matrices(), context=context, criteria=criterion)
    sparsifier.calibrate([(torch.ones(3, 4), torch.zeros(3).long())], torch.nn.functional.cross_entropy)
    sparsifier.sparsify(0.5)


def frozen():
    model = matrices()
    model[0].requires_grad_(False)
    return model


def grouping(answer):
    return Grouping.of(lambda axes: answer, {"out": 5, "in": 4})


def calibrated(criterion, model=None, batch=None, **options):
    """Run a batch through a model for a criterion."""
    model = matrices() if model is None else model
    sparsifier = Sparsifier(model, criteria=criterion, layers=nn.Linear, **options)
    inputs = torch.randn(3, 4) if batch is None else batch
    sparsifier.calibrate([(inputs, torch.tensor([0, 1, 0]))], nn.functional.cross_entropy)


class Halves(nn.Module):
    """The loss depends on one of the two layers only."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.used(x)


class Casting(nn.Linear):
    def forward(self, x):
        return super().forward(x.float())


def not_a_list(layers, sparsity):
    return None


def everything(layers, sparsity):
    return [np.zeros(len(layer), bool) for layer in layers]


def strange(weight, colour):
    return weight


def too_much(t):
    return 2 * t


def wrong_pooling(grouping, scores):
    return scores


GRANULARITY = [
    ("axes by number", lambda: granularities.resolve((0, 1)), TypeError,
     "granularity (0, 1): name the axes, as in ('out', 'h')"),
    ("axes by number, called", lambda: along(0, 1), TypeError, "granularity (0, 1): name the axes, as in ('out', 'h')"),
    ("tile of no size", lambda: block(0, 4), ValueError,
     "block: rows and columns must be whole numbers of at least 1, not 0"),
    ("tile of no size, by name", lambda: granularities.resolve("4x0"), ValueError,
     "block: rows and columns must be whole numbers of at least 1, not 0"),
    ("half a tile", lambda: block(2.5, 4), ValueError,
     "block: rows and columns must be whole numbers of at least 1, not 2.5"),
    ("a bool for a side", lambda: block(4, True), ValueError,
     "block: rows and columns must be whole numbers of at least 1, not True"),
    ("unknown granularity", lambda: granularities.resolve("fliter"), ValueError,
     "unknown granularity 'fliter'; did you mean 'filter'...?"),
    ("a schedule for a granularity", lambda: Grouping.of(schedules["cos"], {"out": 5, "in": 4}), ValueError,
     "granularity cos fails on the axes {'out': 5, 'in': 4} (...); a granularity is a function of a layer's axes that "
     "returns those that index the mask, such as ('out',)"),
    ("a number for axes", lambda: grouping(3), TypeError,
     "granularity <lambda> must return the names of the axes that index the mask, such as ('out',), or the extents of "
     "a group, such as {'out': 2}; got 3"),
    ("a string for axes", lambda: grouping("out"), TypeError,
     "granularity <lambda> must return the names of ... got 'out'"),
    ("missing axis", lambda: Grouping.of(granularities["shared_channel"], {"out": 5, "in": 4}), UnavailableError,
     "shared_channel needs axis 'h', but the layer has only (out, in)"),
    *((f"extent {extent}", lambda extent=extent: grouping({"out": extent}), ValueError,
       f"granularity <lambda>: the extent of a group along 'out' must be a whole number of at least 1, not {extent}")
      for extent in (0, -1, 1.5, True)),
    ("too few groups", lambda: Sparsifier(matrices(), "row", layers="2", round_to=2), ValueError,
     "...2.weight: has 2 groups, of which 2 must be kept..."),
    ("one group", lambda: Sparsifier(nn.Sequential(nn.Linear(4, 1)), "row", layers="0"), ValueError,
     "...0.weight: has 1 group, of which 1 must be kept..."),
    ("scores that are not pooled", lambda: sparsify(granularity="column", layers="2", pool=wrong_pooling), ValueError,
     "pooling wrong_pooling must return one score per group, a tensor of shape (8,); got shape (2, 8)"),
    ("no tensor from a pooling", lambda: sparsify(granularity="column", layers="2", pool=lambda *_: 1), ValueError,
     "pooling <lambda> must return one score per group, a tensor of shape (8,); got 1"),
]  # fmt: skip

CONTEXT = [
    ("unknown tiles", lambda: granularities.resolve("2x2x"), ValueError,
     "unknown granularity '2x2x'; choose from ..., or tiles such as '4x4', or a tuple of axes such as ('out', 'in')"),
    ("unknown blocks", lambda: Sparsifier(matrices(), context="2/4"), ValueError,
     "unknown context '2/4'; choose from ..., or any N:M such as '2:4'"),
    ("unknown context", lambda: Sparsifier(matrices(), context="globl"), ValueError,
     "unknown context 'globl'; did you mean 'global'...?"),
    ("blocks that is not called", lambda: Sparsifier(matrices(), context=blocks), TypeError,
     "context blocks: call it first, as in blocks(4) or bounded('global', {'fc': 0.5})"),
    ("bounded that is not called", lambda: Sparsifier(matrices(), context=bounded), TypeError,
     "context bounded: call it first, as in blocks(4) or bounded('global', {'fc': 0.5})"),
    ("a criterion for a context", lambda: Sparsifier(matrices(), context=criteria["large_final"]), ValueError,
     "context large_final is not a function of (layers, sparsity): too many positional arguments; pass a criterion as "
     "criteria=, and a schedule as schedule="),
    ("no list", lambda: sparsify(context=not_a_list), ValueError,
     "context not_a_list must return a list with, for each layer, a bool array over its groups, True where a group is "
     "kept; got NoneType"),
    ("no bools", lambda: sparsify(context=lambda layers, sparsity: [layer.score for layer in layers]), ValueError,
     "context <lambda> must return a list ... got [('float32', (32,)), ('float32', (16,))]"),
    ("all pruned", lambda: sparsify(context=everything), ValueError,
     "context everything prunes all of 0.weight; every layer must keep at least one group, unless may_empty=True is "
     "given"),
    ("nothing to prune", lambda: sparsify(granularity="layer", context="local", layers=["0"]), UserWarning,
     "sparsity 0.5 was asked for, but with granularity layer and context local no group can be pruned, because the "
     "best group of each scope is kept; choose smaller groups, or context 'global'"),
    ("per_output with whole outputs", lambda: sparsify(context="per_output", granularity="row"), ValueError,
     "context per_output ranks the groups within one output, and the groups of 0.weight are not parts of outputs; "
     "choose another granularity, such as 'weight', or leave the layer out with exclude="),
    ("per_output with round_to", lambda: sparsify(context="per_output", round_to=2), ValueError,
     "context per_output cannot be combined with round_to=; leave one of them out"),
    ("more than uniform_plus allows", lambda: sparsify(0.999, convolutions(), context="uniform_plus"), ValueError,
     "context uniform_plus: sparsity 0.999 cannot be reached, because its limits allow 0.9881 at most; ask for less, "
     "or widen the limits"),
    ("more than limits allow", lambda: sparsify(0.9, context=bounded("global", {"*": (0, 0.5)})), ValueError,
     "context bounded(global): sparsity 0.9 cannot be reached, because its limits allow 0.5 at most; ask for less, or "
     "widen the limits"),
    ("limits for no layer", lambda: sparsify(0.1, context=bounded("local", {"head": 0.5})), ValueError,
     "context bounded(local): no layer with a weight to sparsify matches 'head'; ...; bounds can only name layers that "
     "are pruned together: with a dictionary of sparsities, the layers of one of its patterns"),
    *((f"limits {wrong}", lambda wrong=wrong: bounded("global", wrong), ValueError,
       "bounded: ... must be a layer name or glob, and a sparsity from 0 to 1 or a pair (lowest, highest) of them")
      for wrong in ({"0": 1.5}, {"0": (0.6, 0.4)}, {nn.Linear: 0.5}, {"0": (0.1,)}, {"0": None}, {"0": True})),
    ("bounded with an unknown context", lambda: bounded("globl", {}), ValueError,
     "unknown context 'globl'; did you mean 'global'...?"),
    ("limits that are a number", lambda: bounded("global", 0.5), TypeError,
     "bounded: bounds must be a dictionary, such as {'fc': 0.5, 'layer1.*': (0, 0.8)}, not 0.5"),
    ("more than 2:4", lambda: sparsify(0.6, context="2:4"), ValueError,
     "context 2:4 prunes at most 0.5 of the weights, and sparsity 0.6 was asked for; ask for 0.5 or less, or use "
     "blocks(4)"),
    ("2:4 of filters", lambda: sparsify(model=convolutions(), granularity="filter", context="2:4"), ValueError,
     "context 2:4: 0.weight has no groups along 'in' that could form blocks; choose another granularity or axis, or "
     "leave the layer out with exclude="),
    ("2:4 with round_to", lambda: sparsify(context="2:4", round_to=2), ValueError,
     "context 2:4 cannot be combined with round_to=; leave one of them out"),
    ("4:4", lambda: contexts.resolve("4:4"), ValueError,
     "context '4:4': N:M keeps N of every M weights, so N must be from 1 to M - 1"),
    ("0:4, in the constructor", lambda: Sparsifier(matrices(), context="0:4"), ValueError,
     "context '0:4': N:M keeps N of every M weights, so N must be from 1 to M - 1"),
    *((f"blocks of {size}", lambda size=size: blocks(size), ValueError,
       f"blocks: size must be a whole number of at least 2, not {size}") for size in (1, 0, 2.5, True)),
    ("blocks along axis 1", lambda: blocks(4, axis=1), TypeError,
     "blocks: axis must be the name of an axis, such as 'in' or 'out', not 1"),
    ("is_nm with 4:4", lambda: is_nm(torch.ones(4, 4), 4, 4), ValueError,
     "is_nm: needs 0 < n < m and an axis of the weight, got 4:4 along axis 1 of 2 axes"),
    ("is_nm of a sparse layout", lambda: is_nm(torch.eye(4).to_sparse(), 2, 4), ValueError,
     "is_nm: zeros of the weight cannot be counted: it is in the layout sparse_coo; to_dense() makes it countable"),
    ("is_nm of a vector", lambda: is_nm(torch.ones(4), 2, 4), ValueError,
     "is_nm: needs 0 < n < m and an axis of the weight, got 2:4 along axis 1 of 1 axes"),
]  # fmt: skip

UNUSED = (
    "no gradient has reached unused.weight: the loss does not depend on it, or all of these batches skip it; leave it "
    "out with exclude=, or add batches that use it"
)
CRITERION = [
    ("unknown criterion", lambda: criteria.resolve("movment"), ValueError,
     "unknown criterion 'movment'; did you mean 'movement'...?"),
    ("unknown quantity", lambda: criteria.register(strange), ValueError,
     "criterion strange needs the unknown quantity 'colour'; weight, init, previous, rng, grad, ... are known. If "
     "'colour' is an option, give it a default value; if it is a quantity of your own, first register it with "
     "@quantities.register"),
    ("unknown quantity, in the constructor", lambda: Sparsifier(matrices(), criteria=lambda x: x), ValueError,
     "criterion <lambda> needs the unknown quantity 'x'; ..."),
    ("hidden parameters", lambda: criteria.resolve(torch.abs), ValueError,
     "criterion abs hides its parameters, so the quantities it needs are not known; wrap it: lambda weight: "
     "abs(weight)"),
    ("parameters by position", lambda: criteria.resolve(lambda weight, /: weight), ValueError,
     "criterion <lambda>: quantities are given by name; remove the '/' from its parameters"),
    ("one score per layer", lambda: sparsify(criteria=lambda weight: weight.sum()), ValueError,
     "...must return one real score per weight: for 0.weight a tensor of the shape (8, 4)..."),
    ("NaN scores", lambda: sparsify(model=with_nan()), ValueError,
     "NaN scores for 2.weight: look for NaN or inf in its weights, or in what the criterion computes from them"),
    ("NaN scores, ranked directly",
     lambda: select_groups([ScoredLayer(Sparsifier(matrices()).layers["0.weight"], np.array([1, np.nan]).__getitem__,
                                        np.ones(2, bool))], 0.5),
     ValueError, "NaN scores for 0.weight: look for NaN or inf in its weights, ..."),
    ("a moment that is none", lambda: taken("often"), ValueError,
     "taken: give one or more of 'score', 'passes', 'start' and 'update', or one of 'backward', 'forward', "
     "'loss' and 'input_grad'; not ('often',)"),
    ("a function for a moment", lambda: taken(print), ValueError,
     "taken: give one or more of 'score', 'passes', 'start' and 'update', ... not (<built-in function print>,)"),
    ("no moment", lambda: taken(), ValueError,
     "taken: give one or more of 'score', 'passes', 'start' and 'update', ... not ()"),
    ("a mean at two moments", lambda: taken("backward", "loss"), ValueError,
     "taken: give one or more of 'score', 'passes', 'start' and 'update', ... not ('backward', 'loss')"),
    ("a mean and a stored value", lambda: taken("backward", "start"), ValueError,
     "taken: give one or more of 'score', 'passes', 'start' and 'update', ... not ('backward', 'start')"),
    *((f"a sweep with context {name}", lambda context=context: Sparsifier(
        matrices(), context=context, criteria="sparsegpt"), ValueError,
       "criterion sparsegpt chooses the masks of a layer column by column, so it needs a context that ranks within a "
       f"layer and along its inputs, not {name}; choose 'local', 'per_output' or N:M such as '2:4'")
      for name, context in (("global", "global"), ("erk", "erk"), ("blocks(4, axis='out')", blocks(4, axis="out")))),
    ("no damping", lambda: sparsify(criteria=partial(criteria["obs"], damping=-1.0)), ValueError,
     "damping must be a number of at least 0, not -1.0"),
    *((f"blocks of {size} for {name}", lambda size=size, name=name, context=context: swept(size, name, context),
       ValueError, f"block_size must be a whole number of at least 1, not {size!r}")
      for size in (0, 2.5) for name, context in (("obs", "global"), ("sparsegpt", "local"))),
    ("a curvature without damping", lambda: swept(8, "sparsegpt", "local", damping=0.0), ValueError,
     "the curvature of 0.weight is not positive definite, because its damping is too small for these batches; give the "
     "criterion a larger damping=, by functools.partial, or more batches"),
    ("a running value", lambda: taken("start", running=True), ValueError,
     "taken: running= and finish= are for means over batches, at backward, forward, loss, input_grad"),
    ("a finished value", lambda: taken("score", finish=torch.sqrt), ValueError,
     "taken: running= and finish= are for means over batches, at backward, forward, loss, input_grad"),
    ("a quantity without a moment", lambda: quantities.register(print), ValueError,
     "quantity print does not say when it is computed; mark it with @taken(...) below the registration, and with one "
     "or more of score, passes, start, update, backward, forward, loss, input_grad"),
    ("gradients of a layer without any", lambda: calibrated("snip", Halves()), ValueError,
     f"calibrate: {UNUSED}"),
    ("the Hessian of a layer without gradients", lambda: calibrated("grasp", Halves()), ValueError,
     f"calibrate: {UNUSED}"),
    ("the Hessian of a frozen layer", lambda: calibrated("grasp", frozen()), UnsuitableLayerError,
     "no gradient reaches 0.weight, which is frozen; leave it out with exclude="),
    ("an input of another size",
     lambda: Sparsifier(nn.Sequential(nn.Conv2d(3, 4, 1)), criteria="wanda").calibrate([torch.randn(4, 5, 8, 8)]),
     UnsuitableLayerError, "activation: 0.weight is not multiplied with the input of Conv2d, of shape (4, 5, 8, 8); "
     "leave it out with exclude="),
    ("synflow without an input", lambda: sparsify(criteria="synflow"), ValueError,
     "synflow needs the shape of an input: give the Sparsifier a batch, example_input="),
    ("synflow of a layer that casts",
     lambda: sparsify(model=Casting(4, 3), criteria="synflow", example_input=torch.ones(2, 4)), ValueError,
     "synflow: the model fails on ones in float64 in the shape of example_input (...); pass an example_input= that "
     "fits, a tuple for several inputs or one list, a dictionary for named ones, and cast nothing to another type in "
     "forward"),
    ("synflow of an unused layer",
     lambda: sparsify(model=Halves(), criteria="synflow", example_input=torch.ones(2, 4)), ValueError,
     "synflow: the output does not depend on unused.weight; leave it out with exclude="),
]  # fmt: skip

SCHEDULE = [
    ("unknown schedule", lambda: between("linear", 0, 1), ValueError, "unknown schedule 'linear'; ..."),
    ("a criterion for a schedule", lambda: schedules.resolve(criteria["movmag"]), ValueError,
     "schedule movmag fails at t=0 (...); a schedule is a function of t alone, which returns the share of the target "
     "sparsity, in [0, 1]"),
    ("more than the target", lambda: schedules.register(too_much), ValueError,
     "schedule too_much gives 1.2 at t=0.6; a schedule must return the share of the target sparsity, in [0, 1], for "
     "every t in [0, 1]"),
    ("NaN", lambda: schedules.resolve(lambda t: float("nan")), ValueError, "schedule <lambda> gives nan at t=0; ..."),
    ("less than nothing", lambda: schedules.resolve(lambda t: t - 1), ValueError,
     "schedule <lambda> gives -1.0 at t=0; ..."),
    ("NaN in training", lambda: progress(lambda t: float("nan"), 0.25), ValueError,
     "schedule <lambda> gives nan at t=0.25; ..."),
    *((f"{n} steps", lambda n=n: iterative(n), ValueError,
       f"iterative(n): n is the number of steps, a whole number of at least 1, not {n!r}")
      for n in (0, -1, 2.5, True, "3")),
    *((f"the part from {start} to {end}", lambda start=start, end=end: between("lin", start, end), ValueError,
       f"between: start and end are shares of training, 0 <= start < end <= 1, but are {start!r} and {end!r}")
      for start, end in ((0.5, 0.5), (0.8, 0.2), (-0.1, 1), (0, 1.1), (float("nan"), 1), ("0", 1))),
    ("an empty part", lambda: during("lin", 0.5, 0.5), ValueError,
     "during: start and end are shares of training, 0 <= start < end <= 1, but are 0.5 and 0.5"),
    *((f"raised by {share}", lambda share=share: raised("lin", share), ValueError,
       f"raised: share must be a number from 0 to 1, not {share!r}") for share in (1.5, -0.1, True, "a")),
    *((f"stepped {n} times", lambda n=n: stepped("lin", n), ValueError,
       f"stepped: n is how often the schedule changes, a finite number above 0, not {n!r}")
      for n in (0, -1, float("inf"), True, "3")),
    ("a picture of no schedule", plot_schedule, ValueError,
     "plot_schedule: give at least one schedule; choose from ...agp..."),
]  # fmt: skip

ROWS = [*GRANULARITY, *CONTEXT, *CRITERION, *SCHEDULE]


@pytest.mark.parametrize(("mistake", "kind", "text"), [pytest.param(*row, id=name) for name, *row in ROWS])
def test_message(mistake, kind, text):
    pattern = "^" + ".*".join(map(re.escape, text.split("..."))) + "$"
    expected = pytest.warns if issubclass(kind, Warning) else pytest.raises
    with expected(kind, match=pattern) as caught:
        mistake()
    if expected is pytest.raises:
        assert caught.type is kind


def test_nothing_is_registered_by_a_mistake():
    assert "strange" not in criteria
    assert "too_much" not in schedules
    assert "print" not in quantities
