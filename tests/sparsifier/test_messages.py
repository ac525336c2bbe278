"""What errors and warnings of the Sparsifier say. A mistake is a small function; "..." stands for any text."""

import pickle
import re
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_net
from kinds_of_weights import made_in_inference_mode
from torch import nn
from torch.nn.utils import parametrizations, prune
from updates import BAD_CALIBRATIONS, batches

from sparsifai import Sparsifier, bounded, criteria, from_torch_prune, schedules, sensitivity

NAN, INF = float("nan"), float("inf")


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def sparsify(sparsity=None, model=None, *axes, drop=0.0, steps=1, ratio=None, **options):
    sparsifier = Sparsifier(mlp() if model is None else model, *axes, **options)
    sparsifier.sparsify(sparsity, compression_ratio=ratio, drop=drop, steps=steps)


def calibrate(criterion, given, loss=None):
    Sparsifier(small_net().eval(), criteria=criterion).calibrate(given, loss)


# --- Options ----------------------------------------------------------------------------------------------------------

FRACTION = "sparsity must be a number from 0 to 1, or a dictionary of them by layer, not "
SEED = "seed must be a whole number, not "
ROUND_TO = "round_to must be a whole number ...not "
DROP = "drop is the fraction of the remaining weights that is pruned and regrown, from 0 to less than 1, not "

OPTIONS = [
    ("no model", lambda: Sparsifier(torch.zeros(3)), TypeError,
     "Sparsifier: model is a torch.nn.Module, not Tensor"),
    ("a percentage", lambda: sparsify(50), ValueError,
     "sparsity 50 is a percentage, not a fraction; pass 0.5 for 50 %"),
    ("a little more than 1", lambda: sparsify(1.5), ValueError,
     "sparsity 1.5 is a percentage, not a fraction; pass 0.015 for 1.5 %"),
    ("more than 100 %", lambda: sparsify(101), ValueError, "sparsity 101.0 is not a fraction from 0 to 1..."),
    ("a negative sparsity", lambda: sparsify(-0.1), ValueError, "sparsity -0.1 is not a fraction from 0 to 1..."),
    ("pickled with a lambda", lambda: pickle.dumps(Sparsifier(mlp(), criteria=lambda weight: weight.abs())),
     pickle.PicklingError,
     "Sparsifier: criteria=<lambda> cannot be pickled, which is also how a Sparsifier gets to another process (...); "
     "use a function that is defined by def at the top level of a module, or a functools.partial of one"),
    ("NaN for a sparsity", lambda: sparsify(NAN), ValueError, "sparsity nan is not a fraction from 0 to 1..."),
    ("True for a sparsity", lambda: sparsify(True), TypeError, f"{FRACTION}True"),
    ("numpy's True for a sparsity", lambda: sparsify(np.bool_(True)), TypeError, f"{FRACTION}..."),
    ("a string for a sparsity", lambda: sparsify("0.5"), TypeError, f"{FRACTION}'0.5'"),
    ("a list of sparsities", lambda: sparsify([0.5, 0.5]), TypeError, f"{FRACTION}[0.5, 0.5]"),
    ("an empty dictionary", lambda: sparsify({}), ValueError,
     "the dictionary of sparsities is empty; give it at least one pattern: {'layer1.*': 0.5}"),
    ("a percentage in a dictionary", lambda: sparsify({"0": 50}), ValueError,
     "sparsity 50 is a percentage, not a fraction; pass 0.5 for 50 %"),
    ("no sparsity", lambda: sparsify(), TypeError,
     "no sparsity is given; pass the fraction of the weights that are zero at the end: sparsity=0.9"),
    ("both names of a sparsity", lambda: sparsify(0.5, ratio=0.5), TypeError,
     "sparsity= and compression_ratio= are two names of one number, and both are given; pass one"),
    ("a sparsity for a granularity", lambda: Sparsifier(mlp(), 0.9), TypeError,
     "granularity 0.9 is a number; if it is the sparsity, pass it to sparsify: Sparsifier(model).sparsify(0.9)"),
    ("unknown granularity", lambda: Sparsifier(mlp(), "filters"), ValueError,
     "unknown granularity 'filters'; did you mean 'filter'...?"),
    ("unknown context", lambda: Sparsifier(mlp(), context="globl"), ValueError,
     "unknown context 'globl'; did you mean 'global'...?"),
    ("unknown criterion", lambda: Sparsifier(mlp(), criteria="larg_final"), ValueError,
     "unknown criterion 'larg_final'; did you mean 'large_final'...?"),
    ("unknown pooling", lambda: Sparsifier(mlp(), pool="average"), ValueError,
     "unknown pooling 'average'; choose from 'l2', 'max', 'mean', 'squared_sum', 'sum'"),
    ("a schedule for a granularity", lambda: Sparsifier(mlp(), schedules["cos"]), ValueError,
     "granularity cos fails on the axes ...; a granularity is a function of a layer's axes that returns those that "
     "index the mask, such as ('out',)"),
    ("a criterion for a context", lambda: Sparsifier(mlp(), "weight", criteria["large_final"]), ValueError,
     "context large_final is not a function of (layers, sparsity): ..."),
    *((f"round_to {wrong}", lambda wrong=wrong: Sparsifier(mlp(), round_to=wrong), ValueError, f"{ROUND_TO}{wrong!r}")
      for wrong in (0, -2, 1.5, True)),
    *((f"seed {wrong}", lambda wrong=wrong: Sparsifier(mlp(), seed=wrong), TypeError, f"{SEED}{wrong!r}")
      for wrong in ("a", 1.5, True, None)),
    *((f"{wrong} steps", lambda wrong=wrong: sparsify(0.5, steps=wrong), ValueError,
       f"steps must be a whole number of at least 1, not {wrong!r}") for wrong in (0, 2.5, True, "3")),
    ("straight_through with regrow", lambda: Sparsifier(mlp(), straight_through=True, regrow="grad"), ValueError,
     "straight_through=True and regrow= are two ways to let masks change; pass one of them"),
    *((f"{name} without straight_through", lambda name=name: Sparsifier(mlp(), **{name: 0.1}), ValueError,
       f"{name}=0.1 needs straight_through=True: it says how dense weights are trained")
      for name in ("decay", "gradient_sparsity")),
    *((f"decay {wrong}", lambda wrong=wrong: Sparsifier(mlp(), straight_through=True, decay=wrong), ValueError,
       f"decay must be a number of at least 0, not {wrong!r}") for wrong in (-1, NAN, True, "much")),
    ("decay inf", lambda: Sparsifier(mlp(), straight_through=True, decay=INF), ValueError,
     "decay must be a finite number, not inf"),
    ("gradient_sparsity in percent", lambda: Sparsifier(mlp(), straight_through=True, gradient_sparsity=50), ValueError,
     "gradient_sparsity 50 is a percentage, not a fraction; pass 0.5 for 50 %"),
    ("gradient_sparsity that is text", lambda: Sparsifier(mlp(), straight_through=True, gradient_sparsity="half"),
     TypeError, "gradient_sparsity must be a number from 0 to 1, not 'half'"),
    ("drop in steps", lambda: sparsify(0.5, drop=0.3, steps=2, regrow="random"), ValueError,
     "sparsify: steps= and drop= do not go together; drop after the steps"),
]  # fmt: skip

# --- Layers -----------------------------------------------------------------------------------------------------------


def computed(change, place):
    model = small_net()
    change(model[place])
    return Sparsifier(model)


def dense_layers(count):
    return Sparsifier(nn.Sequential(*(nn.Linear(4, 4) for _ in range(count))), exclude="*")


def recurrent():
    model = nn.Sequential(nn.LSTM(4, 4), nn.Identity())
    prune.random_unstructured(model[0], "weight_hh_l0", 0.5)
    return Sparsifier(model)


PRUNED = (
    "in each forward, so zeros in it do not last; remove it first: torch.nn.utils.prune.remove(module, '{}') leaves "
    "the zeros; or load from_torch_prune(model.state_dict()) into a new model, or exclude the layer with exclude="
)
REMOVE_IT = (
    "in each forward, so zeros in it do not last; remove the parametrization first (...), or exclude the layer with "
    "exclude="
)


def with_weight(weight, bias=None):
    """A net whose first layer has this weight, and this bias."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    trains = weight.is_floating_point()
    model[0].weight = nn.Parameter(weight, requires_grad=trains)
    if bias is not None:
        model[0].bias = nn.Parameter(bias, requires_grad=bias.is_floating_point())
    return model


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch: nested tensors are a prototype
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
INTEGERS = "of int8, a type that is not pruned; cast it to float32, or to complex64 if it is complex"
EXPANDED = "a view whose elements share memory with each other, as expand() gives; copy it with clone()"
LAYERS = [
    ("a weight of integers by name", lambda: Sparsifier(with_weight(torch.ones(8, 4).char()), layers="0"), ValueError,
     f"Sparsifier: 0.weight cannot be pruned, because it is {INTEGERS}; or exclude it with exclude="),
    ("a weight of integers", lambda: Sparsifier(with_weight(torch.ones(8, 4).char())), UserWarning,
     "Sparsifier: 1 of 2 layers stay dense, because their weights cannot be pruned: 0.weight is "
     f"{INTEGERS}; or leave them out with exclude="),
    ("an expanded weight by its class", lambda: Sparsifier(with_weight(torch.ones(4).expand(8, 4)), layers=nn.Linear),
     ValueError, f"Sparsifier: 0.weight cannot be pruned, because it is {EXPANDED}; or exclude it with exclude="),
    ("an expanded bias of filters",
     lambda: Sparsifier(with_weight(torch.ones(8, 4), torch.ones(1).expand(8)), "filter", layers="0"), ValueError,
     f"Sparsifier: 0.bias, which is pruned with outputs of 0.weight, is {EXPANDED}; or exclude these layers with "
     "exclude="),
    ("a pattern of a sparsity that matches nothing", lambda: sparsify({"0": 0.5, "nothing": 0.5}), ValueError,
     "...matches 'nothing'..."),
    ("a pattern of dense layers only", lambda: sparsify({"0": 0.5, "2": 0.5}, exclude="2"), ValueError,
     "sparsity: '2' matches only layers that stay dense (2.weight: excluded)"),
    ("a granularity of no layer", lambda: Sparsifier(mlp(), "shared_channel"), ValueError,
     "Sparsifier: no layer of Sequential is left to prune; 0.weight: shared_channel needs axis 'h', but the layer has "
     "only (out, in); 2.weight: ... Choose another granularity, or name layers in layers="),
    ("the last layer only", lambda: Sparsifier(nn.Linear(4, 2), "filter"), ValueError,
     "Sparsifier: no layer of Linear is left to prune; weight: yields the model's output. Choose another ..."),
    ("more layers than are listed", lambda: dense_layers(7),
     ValueError, "...4.weight: excluded; and 2 more. Choose another granularity, ..."),
    ("no weights with axes", lambda: Sparsifier(nn.Sequential(nn.ReLU())), ValueError,
     "Sparsifier: no layer of Sequential is left to prune; it has no weights with named axes; name those of its "
     "layers: register_layer(kind, weight=('out', 'in'))"),
    ("fewer groups than round_to", lambda: Sparsifier(small_net(), "filter", round_to=5), ValueError,
     "...0.weight: has 8 groups, of which 5 must be kept; ..."),
    ("a parametrization", lambda: computed(parametrizations.weight_norm, 5), ValueError,
     f"Sparsifier: weight of 5 is computed from 5.parametrizations.weight.original0 {REMOVE_IT}"),
    ("weights pruned by torch", lambda: computed(lambda layer: prune.l1_unstructured(layer, "weight", 0.5), 5),
     ValueError, "Sparsifier: weight of 5 is computed from 5.weight_orig " + PRUNED.format("weight")),
    ("recurrent weights pruned by torch", recurrent, ValueError,
     "Sparsifier: weight_hh_l0 of 0 is computed from 0.weight_hh_l0_orig " + PRUNED.format("weight_hh_l0")),
]  # fmt: skip

# --- Masks ------------------------------------------------------------------------------------------------------------


def no_group(layers, sparsity):
    return [layer.alive & False for layer in layers]


def revive(call="sparsify"):
    sparsifier = Sparsifier(small_net(), "filter")
    sparsifier.sparsify(0.5)
    getattr(sparsifier, call)(0.25)


def with_nan():
    model = mlp()
    model[0].weight.data[0, 0] = NAN
    return model


def nan_when_sparse(weight):
    return weight.abs() if (weight != 0).float().mean() > 0.6 else torch.full_like(weight, NAN)


def released(call, *given):
    sparsifier = Sparsifier(mlp())
    sparsifier.release()
    getattr(sparsifier, call)(*given)


def iterated_once():
    sparsifier = Sparsifier(small_net(), criteria="snip")
    sparsifier.calibrate(iter(batches()), F.cross_entropy)
    sparsifier.sparsify(0.9, steps=10)


def batch_norm_behind_filters():
    Sparsifier(small_net(), "filter", criteria="taylor")


def moments_by_name():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.state["0.weight"] = {"momentum_buffer": torch.ones(8, 4)}
    Sparsifier(model).mask_moments(optimizer)


def straight_through(model=None, **options):
    """A Sparsifier that keeps dense weights of which half are pruned."""
    sparsifier = Sparsifier(mlp() if model is None else model, straight_through=True, **options)
    sparsifier.sparsify(0.5)
    return sparsifier


def in_the_block(call, *given):
    sparsifier = straight_through()
    with sparsifier.dense_weights():
        getattr(sparsifier, call)(*given)


def pull_sparse_gradients():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2))
    sparsifier = straight_through(model, layers=nn.Embedding)
    model(torch.arange(3)).sum().backward()
    sparsifier.mask_gradients()


def stepped_outside(call, *given):
    sparsifier = straight_through()
    with torch.no_grad():
        for parameter in sparsifier.model.parameters():
            parameter.add_(1.0)
    getattr(sparsifier, call)(*given)


CALLS = [["apply_masks"], ["mask_gradients"], ["mask_moments", None], ["report"], ["state_dict"], ["recover_masks"],
         ["set_masks", {}], ["sparsify", 0.5], ["update_masks", 0.5], ["check", 0.5], ["calibrate", []],
         ["collect_gradients"], ["load_state_dict", {}], ["dense_weights"], ["settle"],
         ["release"]]  # fmt: skip
OUTSIDE = [["apply_masks"], ["mask_gradients"], ["state_dict"], ["set_masks", {}], ["sparsify", 0.5],
           ["update_masks", 0.5], ["check", 0.5], ["settle"]]  # fmt: skip
SCORES = "criterion <lambda> must return one real score per weight: for 0.weight a tensor of the shape (8, 4), not "
MASKS = [
    ("an answer of a context for no layer", lambda: sparsify(0.5, context=lambda layers, sparsity: []), ValueError,
     "context <lambda> must return a list with, for each layer, a bool array over its groups, True where a group is "
     "kept; got ..."),
    ("scores from a context", lambda: sparsify(0.5, context=lambda layers, sparsity: [layer.score for layer in layers]),
     ValueError, "context <lambda> must return a list with, for each layer, a bool array over its groups, ..."),
    ("an empty layer", lambda: sparsify(0.5, context=no_group), ValueError,
     "context no_group prunes all of 0.weight; every layer must keep at least one group, unless may_empty=True is "
     "given"),
    ("groups that are all needed", lambda: sparsify(0.5, None, "layer", "local", layers="0"), UserWarning,
     "sparsity 0.5 was asked for, but with granularity layer and context local no group can be pruned, because ..."),
    ("NaN in a weight", lambda: sparsify(0.5, with_nan()), ValueError, "NaN scores for 0.weight: ..."),
    ("NaN in a later step", lambda: sparsify(0.9, small_net(), criteria=nan_when_sparse, steps=10), ValueError,
     "NaN scores for ..."),
    ("one score for a layer", lambda: sparsify(0.5, criteria=lambda weight: weight.sum()), ValueError,
     f"{SCORES}(), torch.float32"),
    ("complex scores", lambda: sparsify(0.5, criteria=lambda weight: weight * 1j), ValueError,
     f"{SCORES}(8, 4), torch.complex64"),
    ("no scores", lambda: sparsify(0.5, criteria=lambda weight: 1), ValueError, f"{SCORES}int"),
    ("scores of a comparison before training", lambda: sparsify(0.5, criteria="movement"), UserWarning,
     "criterion movement compares with an earlier value, and nothing has changed since then: all scores are equal, so "
     "weights are pruned in index order; train before the first update"),
    *((f"outputs revived by {call}", lambda call=call: revive(call), UserWarning,
       "a falling sparsity revives whole outputs from zero, and their bias and norm entries too. Behind a ReLU or a "
       "norm layer no gradient reaches them, so they stay zero; revive single weights instead, or re-initialize them")
      for call in ("sparsify", "update_masks")),
    ("taylor of filters before a batch norm", batch_norm_behind_filters, UserWarning,
     "taylor: a batch norm undoes the scale of the outputs of 0.weight, so the sum of w g over a filter is zero but "
     "for rounding; choose snip or fisher, or smaller groups such as kernels"),
    ("data for steps, iterated once", iterated_once, ValueError,
     "sparsify: with steps=, snip looks at data in each step; call calibrate before, with batches that can be "
     "iterated over again, such as a list"),
    *((f"{call} after release", lambda call=call, given=given: released(call, *given), RuntimeError,
       f"{call}: this Sparsifier has released its model; make a new one") for call, *given in CALLS),
    *((f"{call} with dense weights", lambda call=call, given=given: in_the_block(call, *given), RuntimeError,
       f"{call}: the model has its dense weights inside `with sparsifier.dense_weights():`; call it outside "
       "of this block")
      for call, *given in CALLS if call != "mask_moments"),
    *((f"{call} after a step outside of the block", lambda call=call, given=given: stepped_outside(call, *given),
       UserWarning, "straight_through: pruned weights were changed outside of the step of the optimizer, and are set "
       "to zero again; call the step inside `with sparsifier.dense_weights():`, so that it moves the dense weights")
      for call, *given in OUTSIDE),
    ("sparse gradients of dense weights", pull_sparse_gradients, ValueError,
     "straight_through: the gradient of 0.weight is a sparse tensor, to which the pull of decay= cannot be added; pass "
     "decay=0, or make the layer with sparse=False"),
    ("dense weights of inference mode", lambda: straight_through(made_in_inference_mode()), ValueError,
     "straight_through: 0.weight was made in inference mode, so that no optimizer can move it; make the model outside "
     "of torch.inference_mode()"),
    ("settling what keeps no dense weights", lambda: Sparsifier(mlp()).settle(), ValueError,
     "settle: this Sparsifier has no dense weights; make it with straight_through=True"),
    ("a list for an optimizer", lambda: Sparsifier(mlp()).mask_moments([]), TypeError,
     "list is no optimizer, because it has no `state` by parameter; pass an optimizer of torch or fastai"),
    ("moments that are kept by name", moments_by_name, TypeError,
     "mask_moments: SGD keeps its state by str, not by parameter, so moments of pruned weights cannot be set to zero; "
     "call apply_masks() after each step instead"),
    *((name, lambda masks=masks, options=options: Sparsifier(mlp(), **options).set_masks(masks), error, message)
      for name, masks, options, error, message in [
        ("masks in a list", [1], {}, TypeError,
         "set_masks: masks must be a dictionary from parameter names to masks, not [1]"),
        ("an unknown mask", {"0.wieght": torch.ones(8, 4)}, {}, ValueError,
         "set_masks: the model has no weight with named axes '0.wieght'; did you mean '0.weight'..."),
        ("a mask of torch's prune", {"0.weight_mask": torch.ones(8, 4)}, {}, ValueError,
         "set_masks: the model has no weight with named axes '0.weight_mask'; did you mean '0.weight'..."),
        ("a mask of a dense layer", {"0.weight": torch.ones(8, 4)}, {"exclude": "0"}, ValueError,
         "set_masks: 0.weight stays dense (excluded), so it has no mask; name it in layers= of the Sparsifier"),
        ("a mask that is a list", {"0.weight": [1, 0]}, {}, TypeError,
         "set_masks: the mask of 0.weight must be a dense tensor with values, but it is of type list"),
        ("a sparse mask", {"0.weight": torch.ones(8, 4).to_sparse()}, {}, TypeError,
         "set_masks: the mask of 0.weight must be a dense tensor with values, but it is in the layout sparse_coo; ..."),
        ("a nested mask", {"0.weight": NESTED}, {}, TypeError,
         "set_masks: the mask of 0.weight must be a dense tensor with values, but it is a nested tensor; ..."),
        ("a name that is a number", {0: torch.ones(8, 4)}, {}, ValueError,
         "set_masks: the model has no weight with named axes 0; ..."),
        ("two masks of a weight", {"0.weight": torch.ones(8, 4), "module.0.weight": torch.ones(8, 4)}, {}, ValueError,
         "set_masks: there are two masks of 0.weight, with a prefix and without; pass one of them"),
        ("a mask that empties a layer", {"0.weight": torch.zeros(8, 4)}, {}, ValueError,
         "set_masks: the mask of 0.weight prunes the whole layer; keep at least one group of it, or make the "
         "Sparsifier with may_empty=True"),
        ("a mask of another shape", {"0.weight": torch.ones(4, 8)}, {}, ValueError,
         "set_masks: the mask of 0.weight has the shape (4, 8), which does not fit its weight of (8, 4); an axis has "
         "its size or 1"),
        ("a mask of scores", {"0.weight": torch.full((8, 4), 0.5)}, {}, ValueError,
         "set_masks: the mask of 0.weight must be of bools, or of 0 and 1; compare it: mask > threshold"),
        ("a mask of parts of rows", {"0.weight": torch.eye(8, 4)}, {"granularity": "filter"}, ValueError,
         "set_masks: the mask of 0.weight prunes parts of 4 groups, which this granularity keeps or prunes as a whole; "
         "use granularity='weight'"),
      ]),
    ("a checkpoint with a mask of another shape",
     lambda: from_torch_prune({"w_orig": torch.ones(2, 3), "w_mask": torch.ones(2, 1)}), ValueError,
     "from_torch_prune: w_mask has the shape (2, 1) and its _orig (2, 3); pass the state_dict of one model"),
    ("a checkpoint of a sparse layout",
     lambda: from_torch_prune({"w_orig": torch.ones(2).to_sparse(), "w_mask": torch.ones(2)}), ValueError,
     "from_torch_prune: w_orig cannot be masked, because it is in the layout sparse_coo; to_dense() makes it ..."),
    ("a checkpoint that is a number", lambda: from_torch_prune(3), TypeError,
     "from_torch_prune: state must be a state_dict, not int; pass model.state_dict()"),
    *((name, lambda change=change: from_torch_prune({"0.weight_orig": torch.ones(2), **change}), ValueError,
       "from_torch_prune: " + message)
      for name, change, message in [
        ("a key that is a number", {3: torch.ones(2)},
         "keys must be names of parameters, not 3; pass a state_dict"),
        ("a mask of torch that is a list", {"0.weight_mask": [1, 0]},
         "0.weight_mask cannot be masked, because it is of type list"),
        ("an original weight without values",
         {"0.weight_orig": torch.ones(2, device="meta"), "0.weight_mask": torch.ones(2)},
         "0.weight_orig cannot be masked, because it is on the meta device, without values; load the model into memory "
         "first"),
        ("a mask of torch of another shape", {"0.weight_mask": torch.ones(3)},
         "0.weight_mask has the shape (3,) and its _orig (2,); pass the state_dict of one model"),
        ("a mask of torch that multiplies", {"0.weight_mask": torch.tensor([3, 0], dtype=torch.uint8)},
         "0.weight_mask has other values than 0 and 1; call prune.remove of each layer, and save the model again"),
        ("a weight beside its original", {"0.weight_mask": torch.ones(2), "0.weight": torch.ones(2)},
         "the checkpoint has both 0.weight and the same name with _orig; remove the one that is not that of the model"),
      ]),
    *((name, lambda state=state: from_torch_prune(state), ValueError,
       "from_torch_prune: a checkpoint of torch.nn.utils.prune has NAME_orig and NAME_mask, but " + message)
      for name, state, message in [
        ("a checkpoint without masks", {"0.weight": torch.ones(2)}, "it has none; load it as it is"),
        ("a checkpoint that lacks a mask", {"0.weight_orig": torch.ones(2)},
         "0.weight has no mask; load it as it is"),
      ]),
]  # fmt: skip

# --- Data -------------------------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """The output depends on one of two layers."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.used(x)


class Casting(nn.Linear):
    def forward(self, x):
        return super().forward(x.float())


def calibrate_halves(criterion):
    sparsifier = Sparsifier(Halves(), criteria=criterion, example_input=torch.ones(5, 4))
    sparsifier.calibrate([(torch.randn(5, 4), torch.randint(3, (5,)))], F.cross_entropy)
    sparsifier.sparsify(0.5)


def calibrate_frozen(criterion):
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    sparsifier = Sparsifier(model, criteria=criterion, layers="0")
    sparsifier.calibrate([(torch.ones(1, 3), torch.zeros(1))], lambda output, target: output.square().sum())


def calibrate_attention(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    Sparsifier(layer, criteria="wanda", **options).calibrate([torch.randn(2, 5, 8)])


def root_of_zero(output, target):
    return F.cross_entropy(output, target) + (0 * output.sum()).abs().sqrt()


def calibrate_empty():
    Sparsifier(mlp(), criteria="wanda").calibrate([torch.ones(0, 4)])


def collected_halves(value=1.0, **options):
    """A Sparsifier that has seen the gradients of one batch, in which a layer was skipped."""
    model = Halves()
    sparsifier = Sparsifier(model, **options)
    (value * model(torch.ones(5, 4)).square().sum()).backward()
    sparsifier.collect_gradients()
    return sparsifier


def second_batch():
    wrong = torch.randn(4, 5, 8, 8), torch.zeros(4).long()
    Sparsifier(small_net(), criteria="snip").calibrate([*batches(1), wrong], F.cross_entropy)


BATCH = "a batch is (input, target), (input, input, target) or a dictionary of named inputs, and the loss is "
TEXTS = {
    "no loss": (TypeError, "calibrate: snip needs grad; give it a loss_func"),
    "no batches": (ValueError, "calibrate: there are no batches; give it a list or a data loader that has some"),
    "no labels": (ValueError, "calibrate: a batch is (input, target), or a dictionary of named inputs; got a tensor of "
                              "the shape (4, 2, 8, 8)"),
    "another number of channels": (ValueError, f"calibrate: batch 1 fails (...); {BATCH}loss_func(output, target)"),
    "a constant loss": (ValueError, "calibrate: the loss of the batch has no graph, so no gradient reaches the "
                                    "weights; compute it from the output of the model, outside of torch.no_grad and "
                                    "without detach or item"),
    "a loss per class": (ValueError, "calibrate: loss_func must return one number, a mean over the batch; got a tensor "
                                     "of the shape (4, 3)"),
    "a loss that is NaN": (ValueError, "calibrate: the loss of batch 1 is nan"),
    "inputs of another size": (ValueError, "activation: 0.weight is not multiplied with the input of Conv2d, of shape "
                                           "(4, 5, 8, 8); leave it out with exclude="),
    "None for batches": (TypeError, "calibrate: batches is a list or a data loader of batches, not NoneType"),
    "one batch for batches": (TypeError, "calibrate: batches is a list or a data loader of batches, not a tensor of "
                                         "the shape (4, 2, 8, 8)"),
    "a loss that is detached": (ValueError, "calibrate: the loss of the batch has no graph, ..."),
}  # fmt: skip
DATA = [
    *((name, lambda given=given: calibrate(*given), *TEXTS[name]) for name, given in BAD_CALIBRATIONS.items()),
    ("batches without rows", calibrate_empty, ValueError,
     "calibrate: there are no batches, or all are without rows; give it a list or a data loader that has some"),
    ("gradients that are NaN in all batches", lambda: calibrate("snip", batches(2), root_of_zero), ValueError,
     "calibrate: the gradients of all batches have inf or NaN; look for it in the model"),
    ("gradients that are inf in the only batch", lambda: collected_halves(INF, criteria="snip").sparsify(0.5),
     ValueError, "criterion snip needs grad, but has seen no batch with finite gradients; call calibrate(...) ..."),
    ("a layer that no batch has used", lambda: collected_halves(criteria="snip").sparsify(0.5), UserWarning,
     "snip: no batch so far has used unused.weight, so the scores are zero and these weights are pruned first; leave "
     "them out with exclude=, or score with more batches (calibration=, every=)"),
    ("regrowth after an overflow", lambda: collected_halves(INF, regrow="grad").sparsify(0.5, drop=0.3), UserWarning,
     "regrow: the gradients since the last update have inf or NaN, as after an overflow in mixed precision, so nothing "
     "regrows in this update"),
    ("a second batch that fails", second_batch, ValueError, "calibrate: batch 2 fails (...); a batch is ..."),
    ("attention without a call of its projection", lambda: calibrate_attention(exclude="*in_proj*"), ValueError,
     "calibrate: self_attn.out_proj.weight: the module is not called in these batches, or only with inputs that have "
     "no rows (attention, for instance, reads the weights of its projections itself); exclude the layer with exclude=, "
     "or add batches that use it"),
    ("attention with its own projection", calibrate_attention, ValueError,
     "activation: self_attn.in_proj_weight is not multiplied with the input of MultiheadAttention, of shape (2, 5, 8);"
     " leave it out with exclude="),
    *((f"{criterion} of a layer that is not used", lambda criterion=criterion: calibrate_halves(criterion), ValueError,
       "...unused.weight...exclude=...") for criterion in ("snip", "grasp", "wanda", "synflow")),
    *((f"{criterion} of a frozen layer", lambda criterion=criterion: calibrate_frozen(criterion), ValueError,
       "...no gradient ...0.weight...frozen...exclude=...") for criterion in ("snip", "grasp")),
    ("synflow of a layer that casts", lambda: sparsify(0.5, Casting(4, 3), criteria="synflow",
                                                       example_input=torch.ones(1, 4)), ValueError,
     "...cast nothing to another type in forward"),
    ("synflow without an input", lambda: sparsify(0.5, criteria="synflow"), ValueError,
     "synflow needs the shape of an input: ...example_input="),
    *((f"{criterion} without data", lambda criterion=criterion: sparsify(0.5, criteria=criterion), ValueError,
       f"criterion {criterion} needs {quantity}, but has seen no batch; call calibrate(batches, loss_func)...before "
       "sparsify") for criterion, quantity in (("snip", "grad"), ("wanda", "activation"), ("grasp", "hessian_grad"))),
    ("gradients before a backward", lambda: Sparsifier(mlp(), criteria="snip").collect_gradients(), ValueError,
     "collect_gradients: no gradient has reached 0.weight or any other selected layer; call it after a backward of a "
     "loss that depends on them, and before zero_grad"),
    ("snip without data", lambda: sparsify(0.5, criteria="snip"), ValueError,
     "criterion snip needs grad, but has seen no batch; call calibrate(batches, loss_func), or collect_gradients() "
     "after a backward, before sparsify"),
]  # fmt: skip

# --- Regrowth ---------------------------------------------------------------------------------------------------------


def callback(**options):
    from sparsifai import SparsifyCallback

    SparsifyCallback(**{"sparsity": 0.5, **options})


FIRST_PRUNES = (
    "regrow: regrowth first prunes more than context 2:4 allows; use context=blocks(4), which ends at the same sparsity"
)
REGROWTH = [
    ("unknown regrow", lambda: Sparsifier(mlp(), regrow="gradient"), ValueError,
     "unknown criterion 'gradient'; did you mean 'grad'...?"),
    ("regrow by activations", lambda: Sparsifier(mlp(), regrow="wanda"), ValueError,
     "regrow=wanda needs activation, which a backward pass does not give; choose 'grad', 'random', or a function of "
     "weight, ..."),
    ("regrow with 2:4", lambda: Sparsifier(mlp(), context="2:4", regrow="grad"), ValueError,
     FIRST_PRUNES),
    ("regrow of whole outputs", lambda: Sparsifier(small_net(), "filter", regrow="grad"), UserWarning,
     "regrow: whole outputs regrow from zero, and their bias and norm entries too. Behind a ReLU or a norm layer no "
     "gradient reaches them, so they stay zero; choose smaller groups, such as kernels or weights"),
    ("regrow without gradients", lambda: sparsify(0.5, regrow="grad", drop=0.3), ValueError,
     "criterion large_gradient needs grad, but has seen no batch; call collect_gradients() after a backward, before "
     "gradients are masked, before sparsify"),
    ("drop without regrow", lambda: sparsify(0.5, drop=0.3), ValueError,
     "drop=0.3: nothing says what regrows; make the Sparsifier with regrow="),
    *((f"drop {wrong}", lambda wrong=wrong: sparsify(0.5, regrow="random", drop=wrong), ValueError, f"{DROP}{wrong!r}")
      for wrong in (-0.1, 1, 30, True, "much", NAN)),
]  # fmt: skip
CALLBACK = [
    ("unknown regrow of a callback", lambda: callback(regrow="grd"), ValueError,
     "unknown criterion 'grd'; did you mean 'grad'...?"),
    ("regrow by activations in a callback", lambda: callback(regrow="wanda"), ValueError,
     "regrow=wanda needs activation, which a backward pass does not give; ..."),
    ("regrow with 2:4 in a callback", lambda: callback(regrow="grad", context="2:4"), ValueError,
     FIRST_PRUNES),
    ("regrow with bounded 2:4 in a callback",
     lambda: callback(regrow="grad", context=bounded("2:4", {"0": 0.25})), ValueError,
     FIRST_PRUNES.replace("2:4", "bounded(2:4)").replace("blocks(4)", "bounded(blocks(4), ...)")),
    ("straight_through with regrow in a callback", lambda: callback(regrow="grad", straight_through=True), ValueError,
     "straight_through=True and regrow= are two ways to let masks change; pass one of them"),
    ("drop of a callback", lambda: callback(regrow="grad", drop=1.5), ValueError, f"{DROP}1.5"),
    ("drop without regrow in a callback", lambda: callback(drop=0.5), ValueError,
     "drop=0.5 needs regrow=..."),
    ("unknown drop_schedule of a callback", lambda: callback(regrow="grad", drop_schedule="cosine"), ValueError,
     "unknown schedule 'cosine'; did you mean 'cos'...?"),
    ("more than 2:4 in a callback", lambda: callback(sparsity=0.9, context="2:4"), ValueError,
     "context 2:4 prunes at most 0.5 of the weights, and sparsity 0.9 was asked for; ..."),
]  # fmt: skip

# --- State ------------------------------------------------------------------------------------------------------------


def load(changes=None, into=None, **options):
    """Load a state of a Sparsifier of the small net into another one. changes: function that changes the state."""
    state = Sparsifier(small_net(), **options).state_dict()
    if changes is not None:
        changes(state)
    Sparsifier(small_net(), **(options if into is None else into)).load_state_dict(state)


def misfit(what, there, here):
    return (f"load_state_dict: the {what} is {there} in the state and {here} here; use the same model, granularity, "
            "layers and exclude as when it was saved, and freeze the same layers")  # fmt: skip


def collected(change):
    """Load a state whose collected gradients are changed."""
    sparsifier = Sparsifier(small_net(), criteria="snip")
    sparsifier.calibrate(batches(1), F.cross_entropy)
    state = sparsifier.state_dict()
    change(state["statistics"]["stored"]["grad"])
    sparsifier.load_state_dict(state)


def counted(count):
    """Load a state that counts the batches of a layer differently."""
    sparsifier = Sparsifier(small_net(), criteria="snip")
    sparsifier.calibrate(batches(1), F.cross_entropy)
    state = sparsifier.state_dict()
    state["statistics"]["counts"]["grad"]["0.weight"] = count
    sparsifier.load_state_dict(state)


def half_of_a_block(mask):
    mask = mask.clone()
    mask[0] = False
    return mask


def first_mask(state, change):
    state["masks"]["0.weight"] = change(state["masks"]["0.weight"])


def used(state, masks):
    state["regrowth"]["used"] = masks


def dense(change):
    """Load a state whose dense weights are changed."""
    state = straight_through().state_dict()
    change(state["straight_through"])
    Sparsifier(mlp(), straight_through=True).load_state_dict(state)


ONE_IS_STRAIGHT = (
    "load_state_dict: only one of the state and this Sparsifier has straight_through=True; use the same "
    "straight_through= as when the state was saved"
)
NO_STATE = (
    "load_state_dict: the state lacks the masks, levels, statistics or rng of a Sparsifier; give what state_dict() "
    "returned"
)
DAMAGED = "give what state_dict() returned; the file may be damaged, or another one"
ONE_REGROWS = (
    "load_state_dict: only one of the state and this Sparsifier has regrow=; use the same regrow= as when the state "
    "was saved"
)
STATE = [
    ("None for a state", lambda: Sparsifier(mlp()).load_state_dict(None), ValueError, NO_STATE),
    ("a state of masks only", lambda: Sparsifier(mlp()).load_state_dict({"masks": {}}), ValueError, NO_STATE),
    ("another granularity", lambda: load(granularity="kernel", into={}), ValueError,
     misfit("mask of 0.weight", "bools of the shape (8, 2, 1, 1)", "bools of the shape (8, 2, 3, 3)")),
    ("a mask of numbers", lambda: load(lambda state: first_mask(state, torch.Tensor.float)), ValueError,
     misfit("mask of 0.weight", "numbers of the shape (8, 2, 3, 3)", "bools of the shape (8, 2, 3, 3)")),
    ("a mask too many", lambda: load(lambda state: state["masks"].update({"else": state["masks"]["0.weight"]})),
     ValueError, misfit("mask of else", "bools of the shape (8, 2, 3, 3)", "absent")),
    ("no level", lambda: load(lambda state: state["levels"].clear()), ValueError,
     misfit("level of 0.weight", "absent", "a number")),
    ("no random state", lambda: load(lambda state: state.update(rng=torch.zeros(3, dtype=torch.uint8))), ValueError,
     f"load_state_dict: the rng of the state is no RNG state of this version of torch; {DAMAGED}"),
    *((f"{wrong} for a level", lambda wrong=wrong: load(lambda state: state["levels"].update({"0.weight": wrong})),
       ValueError, f"load_state_dict: the level of 0.weight must be a number from 0 to 1, not {wrong!r}; {DAMAGED}")
      for wrong in (NAN, INF, -1, 1.5, "high", True, None)),
    ("a list of levels", lambda: load(lambda state: state.update(levels=[0.5])), ValueError,
     f"load_state_dict: the levels must be a dictionary by name, not list; {DAMAGED}"),
    ("a mask on the meta device", lambda: load(lambda state: first_mask(state, lambda mask: mask.to("meta"))),
     ValueError, misfit("mask of 0.weight", "a tensor without plain values of the shape (8, 2, 3, 3)",
                        "bools of the shape (8, 2, 3, 3)")),
    ("a mask of parts of blocks", lambda: load(lambda state: first_mask(state, half_of_a_block), granularity="4x1"),
     ValueError, "load_state_dict: the mask of 0.weight prunes parts of groups in the state, which this granularity "
     "keeps or prunes as a whole; use the same ..."),
    ("an unknown part of a state", lambda: load(lambda state: state.update(mask={})), ValueError,
     f"load_state_dict: the state has the unknown part 'mask'; {DAMAGED}"),
    ("a count of half a batch", lambda: counted(0.5), ValueError,
     f"load_state_dict: the count of grad of 0.weight must be a whole number, 0 or more, not 0.5; {DAMAGED}"),
    ("a count of a layer without a mean", lambda: collected(lambda grad: grad.pop("0.weight")), ValueError,
     f"load_state_dict: the state counts batches of grad of 0.weight, but has no value of it; {DAMAGED}"),
    ("a mean of integers", lambda: collected(lambda grad: grad.update({"0.weight": grad["0.weight"].long()})),
     ValueError, misfit("grad of 0.weight", "of torch.int64", "of torch.float32")),
    ("a mean that is NaN", lambda: collected(lambda grad: grad["0.weight"].mul_(NAN)), ValueError,
     "load_state_dict: grad of 0.weight has NaN in the state, which cannot be scored; load a state from before "
     "training has diverged"),
    ("a number for begins", lambda: load(lambda state: state["statistics"].update(begins=3)), ValueError,
     f"load_state_dict: the begins of statistics must be a list of quantities, not 3; {DAMAGED}"),
    ("another criterion", lambda: load(criteria="movement", into={}), ValueError,
     "load_state_dict: the state has the quantities ['init'], the criterion large_final needs []; use the same "
     "criterion"),
    ("quantities of no Sparsifier", lambda: load(lambda state: state.update(statistics={})), ValueError,
     "load_state_dict: the statistics of the state are not those of a Sparsifier, which have stored, counts, begins; "
     f"{DAMAGED}"),
    ("quantities of a layer that is not pruned", lambda: collected(lambda grad: grad.update(other=torch.zeros(5))),
     ValueError, "load_state_dict: the state has quantities of other, which is not selected here; use the same layers "
     "and exclude as when it was saved"),
    ("a quantity of another shape", lambda: collected(lambda grad: grad.update({"0.weight": torch.zeros(5)})),
     ValueError, misfit("grad of 0.weight", "numbers of the shape (5,)", "numbers of the shape (8, 2, 3, 3)")),
    ("a state of regrowth for none", lambda: load(regrow="grad", into={}), ValueError, ONE_REGROWS),
    ("no state of regrowth", lambda: load(into={"regrow": "grad"}), ValueError, ONE_REGROWS),
    ("another criterion of regrowth",
     lambda: load(regrow=lambda weight, init: weight - init, into={"regrow": "random"}), ValueError,
     "load_state_dict: the state has the quantities ['init'], the criterion random needs []; use the same criterion"),
    ("a state of dense weights for none", lambda: load(straight_through=True, into={}), ValueError, ONE_IS_STRAIGHT),
    ("no state of dense weights", lambda: load(into={"straight_through": True}), ValueError, ONE_IS_STRAIGHT),
    ("dense weights without a part", lambda: dense(lambda saved: saved.pop("trained")), ValueError,
     f"load_state_dict: the straight_through of the state lacks values, trained, settled of it; {DAMAGED}"),
    ("dense weights with a part more", lambda: dense(lambda saved: saved.update(more=1)), ValueError,
     f"load_state_dict: straight_through has the unknown part 'more'; {DAMAGED}"),
    ("dense weights that are settled or not", lambda: dense(lambda saved: saved.update(settled=1)), ValueError,
     f"load_state_dict: the settled of straight_through must be True or False, not 1; {DAMAGED}"),
    ("dense weights that are settled", lambda: dense(lambda saved: saved.update(settled=True)), ValueError,
     f"load_state_dict: the straight_through of the state is settled, but has dense weights; {DAMAGED}"),
    ("dense weights in a list", lambda: dense(lambda saved: saved.update(values=[])), ValueError,
     f"load_state_dict: the dense weights must be a dictionary by name, not list; {DAMAGED}"),
    ("a dense weight that is missing", lambda: dense(lambda saved: saved["values"].pop("0.weight")), ValueError,
     misfit("dense weight of 0.weight", "absent", "numbers of the shape (8, 4)")),
    ("a dense weight of no layer", lambda: dense(lambda saved: saved["values"].update(more=torch.ones(3))), ValueError,
     misfit("dense weight of more", "numbers of the shape (3,)", "absent")),
    ("a dense weight of another shape",
     lambda: dense(lambda saved: saved["values"].update({"0.weight": torch.ones(3)})), ValueError,
     misfit("dense weight of 0.weight", "numbers of the shape (3,)", "numbers of the shape (8, 4)")),
    ("a dense weight of integers",
     lambda: dense(lambda saved: saved["values"].update({"0.weight": torch.ones(8, 4).long()})), ValueError,
     misfit("dense weight of 0.weight", "of torch.int64", "of torch.float32")),
    ("a dense weight that is NaN", lambda: dense(lambda saved: saved["values"]["0.weight"].mul_(NAN)), ValueError,
     "load_state_dict: dense weight of 0.weight has NaN in the state, which cannot be scored; load a state from before "
     "training has diverged"),
    ("a trained mask of numbers", lambda: dense(lambda saved: saved["trained"].update({"0.weight": torch.ones(8, 4)})),
     ValueError, misfit("trained mask of 0.weight", "numbers of the shape (8, 4)", "bools of the shape (8, 4)")),
    ("no used weights", lambda: load(lambda state: state["regrowth"].pop("used"), regrow="grad"), ValueError,
     "load_state_dict: the state lacks the weights that were ever used; save it with regrow="),
    ("used weights of another shape",
     lambda: load(lambda state: used(state, {"0.weight": torch.ones(3)}), regrow="grad"), ValueError,
     misfit("used mask of 0.weight", "numbers of the shape (3,)", "bools of the shape (8, 2, 3, 3)")),
]  # fmt: skip

# --- Coupled filters --------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    """The outputs of two layers are added."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.out(self.stem(x) + self.branch(x))


def coupled(model=None, granularity="filter", example_input=None, **options):
    pytest.importorskip("torch_pruning", reason="torch-pruning finds coupled filters")
    example_input = torch.randn(2, 3, 8, 8) if example_input is None else example_input
    model = Sum() if model is None else model
    return Sparsifier(model, granularity, coupled=True, example_input=example_input, **options)


def mixed_channels():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 2, 1))


def without_torch_pruning():
    with mock.patch.dict(sys.modules, {"torch_pruning": None}):
        Sparsifier(Sum(), "filter", coupled=True, example_input=torch.randn(2, 3, 8, 8))


COUPLED = [
    ("one of two coupled layers", lambda: coupled().sparsify({"stem": 0.5}), ValueError,
     "stem.weight and branch.weight are pruned together, because their filters are coupled, so both need the same "
     "sparsity; give one fraction for both"),
    ("coupled without an input", lambda: Sparsifier(Sum(), "filter", coupled=True), ValueError,
     "coupled=True: coupled filters are found by running the model once; give example_input=, a batch"),
    *((f"coupled with granularity {name}", lambda granularity=granularity: coupled(granularity=granularity), ValueError,
       "coupled=True couples whole filters; give granularity 'filter'")
      for name, granularity in (("weight", "weight"), ("channel", "channel"), ("own", lambda axes: {"out": 2}))),
    ("coupled with an input of another size", lambda: coupled(example_input=torch.randn(2, 4, 8, 8)), ValueError,
     "...example_input does not run..."),
    ("no layer that can be removed", lambda: coupled(mixed_channels()), ValueError,
     "coupled=True: no layer is left whose filters can be removed (0.weight: goes through ...)"),
    ("sensitivity of coupled filters",
     lambda: sensitivity(Sum(), lambda model: 0.0, granularity="filter", coupled=True), ValueError,
     "sensitivity prunes one layer at a time, but coupled filters are pruned together; leave out coupled=True"),
    ("no torch-pruning", without_torch_pruning, ImportError, "...pip install 'sparsifai[shrink]'..."),
]  # fmt: skip

WITHOUT_BATCHES = ("needs batches each time that weights are pruned; call calibrate(batches{}) before, also on a "
                   "Sparsifier that was copied or loaded")  # fmt: skip
ALONE = "chooses single weights, column by column, so it needs granularity 'weight', and no round_to=, coupled=, "


def compensated(data=None, loss=F.cross_entropy, model=None, **options):
    sparsifier = Sparsifier(small_net() if model is None else model, **{"compensate": True, **options})
    sparsifier.calibrate(batches(1) if data is None else data, loss)
    sparsifier.sparsify(0.5)


class Once(nn.Module):
    """Runs while it trains, and in no copy."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        if not self.training:
            raise RuntimeError("not now")
        return self.layer(x)


def overflowing():
    return nn.Sequential(nn.Linear(4, 4), Huge(), nn.Linear(4, 2))


class Huge(nn.Module):
    def forward(self, x):
        return x * 1e30


class Apart(nn.Module):
    """The output does not depend on one layer."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.used(x) + self.unused(x).detach()


PAIR = [(torch.ones(5, 4), torch.zeros(5).long())]

COMPENSATION = [
    ("compensated without batches", lambda: sparsify(0.5, compensate=True), ValueError,
     f"compensate=True {WITHOUT_BATCHES.format('')}"),
    ("obs without batches", lambda: sparsify(0.5, criteria="obs"), ValueError,
     f"criterion obs {WITHOUT_BATCHES.format(', loss_func')}"),
    ("sparsegpt without batches", lambda: sparsify(0.5, None, "weight", "local", "sparsegpt"), ValueError,
     f"criterion sparsegpt {WITHOUT_BATCHES.format('')}"),
    ("obs without a loss", lambda: compensated(loss=None, criteria="obs"), TypeError,
     "calibrate: obs needs gradients; give it a loss_func"),
    ("batches that come once", lambda: compensated(iter(batches(1))), ValueError,
     "calibrate: the batches are run again whenever weights are pruned, and an iterator has them once; give a list or "
     "a data loader"),
    ("batches that do not run", lambda: compensated([torch.randn(4, 5, 8, 8)], loss=None), ValueError,
     "calibrate: batch 1 fails (...)..."),
    ("a model that runs in training alone", lambda: compensated(PAIR, model=Once()), ValueError,
     "sparsify: batch 1 of calibrate fails in a copy of the model in evaluation mode (not now); give calibrate batches "
     "that run in this mode, too"),
    ("compensated and straight_through", lambda: Sparsifier(mlp(), compensate=True, straight_through=True), ValueError,
     "compensate=True changes the weights that stay for the masks as they are, and straight_through=True lets masks "
     "change their mind; leave one of them out, or pass compensate=False"),
    ("obs and regrowth", lambda: Sparsifier(mlp(), criteria="obs", regrow="grad"), ValueError,
     "compensate=True, which criterion obs does by default, changes ... and regrow= lets masks change their mind; ..."),
    *((f"compensated {name}s", lambda name=name: Sparsifier(small_net(), name, compensate=True), ValueError,
       f"compensate: with granularity {name} whole outputs are pruned, of which no weight stays that could make up for "
       "the others; choose smaller groups, such as 'weight', or pass compensate=False")
      for name in ("filter", "layer")),
    ("compensated heads", lambda: Sparsifier(nn.TransformerEncoderLayer(8, 2, 16), "head", compensate=True), ValueError,
     "compensate: with granularity head whole outputs are pruned, ..."),
    ("compensated complex weights", lambda: Sparsifier(nn.Linear(4, 2, dtype=torch.cfloat), compensate=True),
     ValueError,
     "compensate: weight is complex, and curvatures are computed of real weights alone; leave it out with exclude=, or "
     "prune without compensate= and by another criterion"),
    *((f"sparsegpt with {name}", lambda options=options: Sparsifier(
        small_net(), **{"context": "local", "criteria": "sparsegpt", **options}), ValueError,
       f"criterion sparsegpt {ALONE}straight_through= or regrow=") for name, options in {
           "rows": {"granularity": "row"}, "round_to": {"round_to": 2}, "regrowth": {"regrow": "grad"},
           "straight_through": {"straight_through": True, "compensate": False}}.items()),
    ("sparsegpt of what is not seen", lambda: compensated(
        [torch.randn(2, 3, 8)], None, nn.TransformerEncoderLayer(8, 2, 16), context="local", criteria="sparsegpt"),
     ValueError,
     "criterion sparsegpt: no batch shows what self_attn.in_proj_weight, self_attn.out_proj.weight is multiplied with, "
     "as in MultiheadAttention or in a module that is not called; leave it out with exclude="),
    ("a curvature of what is not seen", lambda: compensated(
        [torch.randn(2, 3, 8)], None, nn.TransformerEncoderLayer(8, 2, 16), compensate=False,
        criteria=lambda weight, inverse_curvature: weight.abs() / inverse_curvature), ValueError,
     "inverse_curvature: no batch shows what self_attn.in_proj_weight is multiplied with, as in MultiheadAttention or "
     "in a module that is not called; leave it out with exclude=, or choose a criterion without it"),
    ("layers that are not seen", lambda: compensated(
        [torch.randn(2, 3, 8)], None, nn.TransformerEncoderLayer(8, 2, 16)), UserWarning,
     "compensate: the weights that stay in self_attn.in_proj_weight, self_attn.out_proj.weight are not changed (50.00% "
     "of the weights of the selected layers), because no batch shows what they are multiplied with, as in an attention "
     "that reads its weights itself, an embedding, or a module that is not called"),
    ("inputs that are too large", lambda: compensated(PAIR, None, overflowing()), ValueError,
     "sparsify: the inputs of 2.weight have inf or NaN, or are too large, in the batches of calibrate; look for it in "
     "the model, or leave the layer out with exclude="),
    ("obs of a layer without a gradient", lambda: compensated(PAIR, model=Apart(), criteria="obs"), ValueError,
     "sparsify: no gradient has reached unused.weight: the loss of the batches of calibrate does not depend on it; "
     "leave it out with exclude=, or add batches that use it"),
    ("obs with infinite gradients", lambda: compensated(PAIR, Infinite(), criteria="obs", model=mlp()), ValueError,
     "sparsify: the gradients of all batches have inf or NaN; look for it in the model"),
    ("weights beyond half precision", lambda: compensated(
        [torch.tensor([[1.0, 0.01], [2.0, 0.02]]).half()], None, large_halves(), context="local",
        criteria="sparsegpt"), ValueError,
     "sparsify: the new weights of 0.weight leave the range of torch.float16; give the criterion a larger damping=, by "
     "functools.partial, or leave the layer out with exclude="),
]  # fmt: skip


class Infinite:
    """A loss that is finite once."""

    def __init__(self):
        self.calls = 0

    def __call__(self, output, target):
        self.calls += 1
        return output.sum() if self.calls == 1 else (output * 0).sum().sqrt()


def large_halves():
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).half()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[600.0, 65000.0]]))
    return model


ROWS = [*OPTIONS, *LAYERS, *MASKS, *DATA, *REGROWTH, *STATE, *COUPLED, *COMPENSATION]
ROWS_OF_FASTAI = [pytest.param(*row, id=name, marks=pytest.mark.fastai) for name, *row in CALLBACK]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("mistake", "kind", "text"), [*(pytest.param(*row, id=name) for name, *row in ROWS), *ROWS_OF_FASTAI]
)
def test_message(mistake, kind, text):
    pattern = "(?s)^" + ".*".join(map(re.escape, text.split("..."))) + "$"
    expected = pytest.warns if issubclass(kind, Warning) else pytest.raises
    with expected(kind, match=pattern):
        mistake()
