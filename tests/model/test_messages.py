"""The messages of all errors of this folder; those of channels are beside its tests."""

import re
import warnings
from threading import Lock

import pytest
import torch
from torch import nn

from sparsifai import Sparsifier, register_layer
from sparsifai.model.flops import count_flops
from sparsifai.model.layers import find_weights, parameter_of
from sparsifai.model.norms import check_fused_norms
from sparsifai.model.patterns import as_patterns
from sparsifai.model.running import check_runs, copy_of
from sparsifai.model.tensors import first_tensor
from sparsifai.model.tracing import find_flow
from sparsifai.model.zeros import Count, check_counted


class Conv1D(nn.Module):
    """A layer whose weight is (in, out)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))


class Branching(nn.Module):
    """A model that torch.fx cannot trace: what it computes depends on values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def fused_with_zeros():
    qat = pytest.importorskip("torch.ao.nn.intrinsic.qat", reason="torch's own quantization, where it is still there")
    fake = torch.ao.quantization.QConfig(activation=nn.Identity, weight=nn.Identity)
    layer = qat.ConvBn2d(2, 4, 1, qconfig=fake)
    with torch.no_grad():
        layer.bn.weight[:3] = 0
    return nn.Sequential(layer)


class Wrapper(nn.Module):
    """A wrapper that this library does not know, such as those that average weights."""

    def __init__(self):
        super().__init__()
        self.average = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(4, 2))})


def register(axes, kind=Conv1D):
    return lambda: register_layer(kind, weight=axes)


def too_many_axes():
    class Own(Conv1D):
        """A class of its own, since a kind stays registered."""

    register_layer(Own, weight=("in", "out", "h"))
    Sparsifier(Own())


def selects(pattern, argument="layers"):
    """A Sparsifier of a model with layers 'body' and 'head'."""
    model = nn.ModuleDict({"body": nn.Conv2d(1, 4, 3), "head": nn.Linear(4, 4)})
    return lambda: Sparsifier(model, **{argument: pattern})


def prepared_for_quantization():
    fused = pytest.importorskip("torch.ao.nn.intrinsic", reason="torch's own quantization, where it is still there")
    find_flow(nn.Sequential(fused.LinearReLU(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)))


NO_LAYER = "no layer with a weight to sparsify matches "
NO_PATTERN = (
    " cannot select layers; pass a module class, a module, a name, a glob such as 'layer1.*', 're:' followed by a "
    "regular expression, or a function of (name, module)"
)
NO_DICTIONARY = "{'0': 1} cannot select layers; pass a dictionary of sparsities as the first argument, `sparsity`"
BATCH = (
    "pass a batch that the model accepts, on its device: a tuple for several positional arguments, or for one list: "
    "([...],); a dictionary for"
)


class Locked(nn.Sequential):
    """A model that cannot be copied."""

    def __init__(self):
        super().__init__(nn.Linear(4, 3), nn.Linear(3, 2))
        self.lock = Lock()


LOCKED = ["Locked cannot be copied by copy.deepcopy (", "leave out what cannot be copied in __getstate__ of its"]


def sparse_layer():
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.eye(4, 3).to_sparse())
    return layer


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


# Name, mistake, class of the error, parts of the message in their order.
MESSAGES = [
    (
        "a kind of layer by its short name",
        register(("in", "out"), "Conv1D"),
        TypeError,
        ["register_layer: 'Conv1D' is not a module class; pass a class, or its full name such as"],
    ),
    (
        "the same axis twice",
        register(("in", "in")),
        ValueError,
        ["register_layer: weight=('in', 'in') does not name the axes; give a tuple of different axis names, such as"],
    ),
    ("axes as a word", register("in"), ValueError, ["weight='in'", "give a tuple of different axis names"]),
    (
        "another number of axes",
        too_many_axes,
        ValueError,
        [
            "Sparsifier: Own.weight is registered with the axes ('in', 'out', 'h'), but has the shape (4, 6)",
            "leave it out with exclude=, or name the axes by a function of the layer: register_layer(Own, "
            "weight=function)",
        ],
    ),
    (
        "a lazy layer",
        lambda: Sparsifier(nn.Sequential(nn.LazyLinear(3))),
        ValueError,
        ["0 is lazy and has no shape yet; run one batch through the model first"],
    ),
    *(
        (f"a model that cannot be copied, {name}", mistake, ValueError, LOCKED)
        for name, mistake in [
            ("traced", lambda: Sparsifier(Locked(), "filter", example_input=torch.ones(2, 4))),
            ("run", lambda: copy_of(Locked())),
            (
                "by synflow",
                lambda: Sparsifier(Locked(), criteria="synflow", example_input=torch.ones(2, 4)).sparsify(0.5),
            ),
        ]
    ),
    (
        "a mask of another model",
        lambda: parameter_of(nn.Linear(4, 2), "0.weight", torch.ones(2, 4)),
        ValueError,
        ["Linear is not a copy of the masked model: it has no parameter '0.weight'; did you mean 'weight'?"],
    ),
    (
        "a mask of a model in a wrapper",
        lambda: parameter_of(Wrapper(), "0.weight", torch.ones(2, 4)),
        ValueError,
        [
            "Wrapper is not a copy of the masked model: it has no parameter '0.weight'; it holds one as "
            "'average.inner': pass that module, model.average.inner"
        ],
    ),
    (
        "a mask of a model without parameters",
        lambda: parameter_of(nn.ReLU(), "weight", torch.ones(2, 4)),
        ValueError,
        ["ReLU is not a copy of the masked model: it has no parameter 'weight'; it has no parameters"],
    ),
    (
        "a mask of another shape",
        lambda: parameter_of(nn.Linear(4, 2), "weight", torch.ones(3, 4)),
        ValueError,
        ["Linear is not a copy of the masked model: 'weight' has the shape (2, 4), and its mask (3, 4)"],
    ),
    ("a name in layers=", selects("heed.*"), ValueError, [f"{NO_LAYER}'heed.*'; did you mean 'head"]),
    ("a name in exclude=", selects("heed.*", "exclude"), ValueError, [f"{NO_LAYER}'heed.*'; did you mean 'head"]),
    ("a class in layers=", selects(nn.Conv3d), ValueError, [f"{NO_LAYER}Conv3d; the model has Conv2d, Linear"]),
    ("a class in exclude=", selects(nn.Conv3d, "exclude"), ValueError, [f"{NO_LAYER}Conv3d"]),
    ("a function in layers=", selects(lambda name, module: False), ValueError, [f"{NO_LAYER}<lambda>"]),
    ("a function in exclude=", selects(lambda name, module: False, "exclude"), ValueError, [f"{NO_LAYER}<lambda>"]),
    (
        "a regular expression of a part of a name",
        selects("re:bod"),
        ValueError,
        [f"{NO_LAYER}'re:bod'; did you mean 'body'"],
    ),
    ("a number in layers=", selects(3), TypeError, [f"3{NO_PATTERN}"]),
    ("a dictionary in layers=", selects({"0": 1}), TypeError, [NO_DICTIONARY]),
    (
        "a wrong regular expression in layers=",
        selects("re:(head"),
        ValueError,
        ["'re:(head' is not a valid regular expression: missing )"],
    ),
    (
        "a wrong regular expression in exclude=",
        selects(["head", "re:*"], "exclude"),
        ValueError,
        ["'re:*' is not a valid regular expression: nothing to repeat"],
    ),
    (
        "a wrong regular expression before the model is known",
        lambda: as_patterns(["head", "re:("]),
        ValueError,
        ["'re:(' is not a valid regular expression: missing )"],
    ),
    (
        "a regular expression that calls itself",
        lambda: as_patterns("re:a(?R)?"),
        ValueError,
        ["'re:a(?R)?' is not a valid regular expression: it calls itself or a group, which is not supported"],
    ),
    (
        "too many patterns",
        lambda: as_patterns([f"{number}*" for number in range(2001)]),
        ValueError,
        ["there are 2,001 globs and regular expressions, more than 2,000; name layers or containers instead"],
    ),
    (
        "a pattern that is too long",
        lambda: as_patterns("a" * 2000),
        ValueError,
        ["the pattern 'aaa", "aaa' has 2,000 characters, more than 1,100"],
    ),
    (
        "a model that cannot be traced",
        lambda: find_flow(Branching()),
        ValueError,
        [
            "the data flow of Branching cannot be traced (",
            "), and this granularity needs it to know the first and the last layer; pass example_input=, a batch that",
        ],
    ),
    (
        "a model that is prepared for quantization",
        prepared_for_quantization,
        ValueError,
        [
            "the data flow of Sequential cannot be traced after the model was prepared for quantization, and this "
            "granularity needs it to know the first and the last layer; sparsify the model before preparing it"
        ],
    ),
    (
        "an example of another shape in tracing",
        lambda: find_flow(Branching(), torch.ones(3)),
        ValueError,
        ["example_input does not run through Branching (", f"); {BATCH}"],
    ),
    (
        "an example of another shape",
        lambda: check_runs(nn.Linear(4, 2), torch.ones(3)),
        ValueError,
        ["example_input does not run through Linear (", f"); {BATCH}"],
    ),
    (
        "an example of another shape for FLOPs",
        lambda: count_flops(nn.Linear(4, 2), find_weights(nn.Linear(4, 2)), torch.ones(3)),
        ValueError,
        [
            "the model does not run on example_input (",
            "); pass a batch of inputs on the device of the model: a tuple for several positional inputs",
        ],
    ),
    (
        "pruned filters in fused batch norms",
        lambda: check_fused_norms(fused_with_zeros()),
        ValueError,
        [
            "quantization-aware training divides by the scales of the batch norms that are fused into Sequential, and "
            "some are zero, those of pruned filters: 0 (3). The outputs would be NaN; call shrink(model, "
            "example_input) before fuse_modules_qat, which removes them; with coupled=True in the Sparsifier it can "
            "remove all"
        ],
    ),
    (
        "a dictionary for an output",
        lambda: first_tensor({"logits": torch.ones(2)}, "the teacher"),
        ValueError,
        ["the teacher returns dict, but only tensors can be compared; wrap it in a module that returns a tensor"],
    ),
    (
        "a copy of a sparse layout",
        lambda: copy_of(sparse_layer()),
        ValueError,
        ["weight of Linear cannot be copied (", "); replace it by a plain dense tensor"],
    ),
    (
        "zeros of a nested tensor",
        lambda: Count.of(NESTED),
        ValueError,
        ["zeros cannot be counted: a tensor is a nested tensor; count its parts, which unbind() gives"],
    ),
    (
        "zeros of a lazy layer",
        lambda: check_counted("compare", {"weight": nn.LazyLinear(3).weight}),
        ValueError,
        ["compare: the zeros of weight cannot be counted, because it is lazy and has no shape yet; run one batch "],
    ),
]


@pytest.mark.parametrize(("mistake", "error", "parts"), [row[1:] for row in MESSAGES], ids=[row[0] for row in MESSAGES])
def test_errors(mistake, error, parts):
    with pytest.raises(error, match=".*".join(map(re.escape, parts))) as raised:
        mistake()
    assert type(raised.value) is error
