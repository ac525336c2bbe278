"""2:4 in torch's own form: which layers, why not the others, and that what comes out is compared with the dense layer.

Without a GPU, the kernels are stood in for by the dense product; the tests at the end are of the kernels themselves.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from sparsifai import SemiStructured, Sparsifier, is_nm, semi_structured_layers, to_semi_structured
from sparsifai.callbacks.plan import plan_of
from sparsifai.export.conversion import listed


def two_four(model, layers=None):
    """The model with weights in 2:4, in half precision, for inference."""
    Sparsifier(model, context="2:4", layers=layers).sparsify(0.5)
    return model.half().eval()


def net():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def reasons(model):
    return {layer.name: layer.why_not for layer in semi_structured_layers(model).layers}


@pytest.fixture
def kernels(monkeypatch):
    """The dense tensor in the place of the compressed one, on any device; a list of what was converted."""
    converted = []

    def keep(weight):
        converted.append(weight)
        return weight.clone()

    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", keep)
    monkeypatch.setattr("sparsifai.export.two_four.why_no_kernels", lambda device: "")
    return converted


# --- Which layers ----------------------------------------------------------------------------------------------------


def test_layers_and_why_not():
    class Own(nn.Linear):
        def forward(self, value):
            return value @ self.weight.t()

    model = nn.ModuleDict({
        "fits": nn.Linear(32, 64), "bf16": nn.Linear(16, 16).bfloat16(), "single": nn.Linear(32, 64),
        "sides": nn.Linear(32, 24), "few": nn.Linear(8, 16), "conv": nn.Conv2d(16, 16, 1), "own": Own(16, 16),
        "attention": nn.MultiheadAttention(16, 2), "normed": weight_norm(nn.Linear(16, 16)),
        "block": nn.TransformerEncoderLayer(16, 2, 32), "table": nn.Embedding(16, 16),
    })  # fmt: skip
    model["tied"] = nn.Linear(16, 16)
    model["twin"] = nn.Linear(16, 16)
    model["twin"].weight = model["tied"].weight
    own = [f"{name}.weight" for name in ("fits", "bf16", "single", "sides", "few", "conv", "own", "table", "tied")]
    Sparsifier(model, context="2:4", layers=own, exclude="normed").sparsify(0.5)
    for name in ("fits", "sides", "few", "conv", "own", "tied", "attention", "normed", "block"):
        model[name].half()
    model["own_matrix"] = nn.ParameterDict({"matrix": torch.ones(16, 16)})
    found = {layer.name: layer for layer in semi_structured_layers(model).layers}
    assert {name: layer.why_not for name, layer in found.items() if not name.startswith("block.self")} == {
        "fits.weight": "",
        "bf16.weight": "",
        "single.weight": "float32: half precision is needed",
        "sides.weight": "sides not in 16s",
        "few.weight": "sides not in 16s",
        "conv.weight": "not of a Linear",
        "own.weight": "not of a Linear",
        "attention.in_proj_weight": "not of a Linear",
        "attention.out_proj.weight": "not of a Linear",
        "normed.parametrizations.weight.original0": "computed in each forward",
        "block.linear1.weight": "read by TransformerEncoderLayer itself",
        "block.linear2.weight": "read by TransformerEncoderLayer itself",
        "table.weight": "not of a Linear",
        "tied.weight": "tied",
        "own_matrix.matrix": "not of a Linear",
    }
    assert {name for name, layer in found.items() if layer.is_two_four} == set(own)
    assert (found["bf16.weight"].kind, found["bf16.weight"].shape) == ("Linear", (16, 16))
    assert found["bf16.weight"].dtype == torch.bfloat16


def test_the_share_of_blocks_that_are_not_two_four():
    model = nn.Linear(16, 16, bias=False).half()
    with torch.no_grad():
        model.weight.fill_(1)
        model.weight.view(16, 4, 4)[:, :3, :2] = 0
    assert reasons(model) == {"weight": "not 2:4: 25.00% of the blocks hold more than two"}
    assert reasons(model.float()) == {
        "weight": "float32: half precision is needed; not 2:4: 25.00% of the blocks hold more than two"
    }


def test_blocks_lie_along_the_inputs():
    model = nn.Linear(16, 16, bias=False).half()
    with torch.no_grad():
        model.weight.fill_(1)
        model.weight.view(4, 4, 16)[:, :2] = 0  # of every four outputs two, which the kernels cannot skip
    assert reasons(model) == {"weight": "not 2:4: 50.00% of the blocks hold more than two"}
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    assert not semi_structured_layers(depthwise).layers[0].is_two_four


def test_the_table():
    table = semi_structured_layers(two_four(net(), layers=["0", "2"]))
    assert isinstance(table, SemiStructured)
    assert table.convertible == ("0.weight", "2.weight")
    lines = [line.split() for line in str(table).splitlines()]
    assert lines[0] == ["layer", "kind", "shape", "dtype", "2:4", "form"]
    assert lines[2] == ["0.weight", "Linear", "64x32", "float16", "yes"]
    assert lines[4] == ["4.weight", "Linear", "10x48", "float16", "no:", "sides", "not", "in", "16s"]
    assert lines[-1] == ["convertible", "2", "of", "3", "layers"]
    assert repr(table) == str(table)
    assert table._repr_html_().count("<tr>") == 5


def test_a_plan_says_the_same_of_kinds_and_shapes():
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 24))
    model[2].weight = model[1].weight
    plan = plan_of(Sparsifier(model, context="2:4"), 0.5, "agp", 1, 1)
    planned = {layer.name: layer.why_not_two_four for layer in plan.layers}
    assert planned == {"0.weight": "", "1.weight": "tied", "3.weight": "sides not in 16s"}
    assert reasons(two_four(model)) == planned


# --- The copy --------------------------------------------------------------------------------------------------------


def test_a_copy_is_converted_and_the_model_left_as_it_was(kernels):
    model = two_four(net(), layers=["0", "2"])
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    converted = to_semi_structured(model)
    assert [weight.shape for weight in kernels] == [(64, 32), (48, 64)]
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in converted.parameters())
    ids = {id(parameter) for parameter in model.parameters()}
    assert not ids & {id(parameter) for parameter in converted.parameters()}
    inputs = torch.randn(3, 32).half()
    assert torch.equal(converted(inputs), model(inputs))
    assert not converted.training


def test_what_is_in_a_wrapper_is_converted(kernels):
    wrapped = nn.DataParallel(two_four(net(), layers=["0", "2"])).eval()
    assert semi_structured_layers(wrapped).convertible == ("0.weight", "2.weight")
    assert isinstance(to_semi_structured(wrapped), nn.Sequential)


def test_a_layer_that_gives_something_else_is_an_error(kernels, monkeypatch):
    model = two_four(net(), layers=["0", "2"])

    def wrong(weight):
        changed = weight.clone()
        if len(weight) == 48:
            changed[7, weight[7].nonzero()[0]] *= -1
        return changed

    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", wrong)
    with pytest.raises(RuntimeError, match=r"2.weight gives something else in its new form: outputs up to .* by up to"):
        to_semi_structured(model)
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", lambda weight: weight * float("nan"))
    with pytest.raises(RuntimeError, match="0.weight gives something else"):
        to_semi_structured(model)
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", lambda weight: weight[:, :4].clone())
    with pytest.raises(RuntimeError, match="0.weight does not run in its new form"):
        to_semi_structured(model)


def test_torch_refuses(kernels, monkeypatch):
    def refuse(weight):
        raise RuntimeError("cuSPARSELt not supported on your machine")

    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", refuse)
    with pytest.raises(RuntimeError, match="torch does not convert 0.weight: cuSPARSELt not supported"):
        to_semi_structured(two_four(net(), layers=["0", "2"]))


def test_rounding_is_no_difference(kernels, monkeypatch):
    # One more rounding than the dense product has, in either type.
    rounded = lambda weight: weight * (1 + torch.finfo(weight.dtype).eps)  # noqa: E731
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", rounded)
    to_semi_structured(two_four(net(), layers=["0", "2"]))
    to_semi_structured(two_four(net(), layers=["0", "2"]).bfloat16())


def test_layers_that_are_two_four_but_cannot_be_converted_are_warned_of(kernels):
    with pytest.warns(UserWarning, match=r"2:4, but not converted: 4.weight \(sides not in 16s\)$") as caught:
        to_semi_structured(two_four(net(), layers=["0", "2", "4"]))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layer that is dense there is nothing to say
        to_semi_structured(two_four(net(), layers=["0"]))


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_weights_on_the_cpu():
    model = two_four(net(), layers=["0", "2"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"the weights are on cpu; .* 8.0 or newer, so move .* 2 of its 3 layers"):
        to_semi_structured(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_old_gpu(monkeypatch):
    from sparsifai.export.two_four import why_no_kernels

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    assert why_no_kernels(torch.device("cuda", 1)) == "cuda:1 has compute capability 7.5"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    assert not why_no_kernels(torch.device("cuda", 1))


def test_reasons_are_listed_with_the_layers_that_they_are_given_for():
    assert listed({"a": "small", "b": "tied", "c": "small"}) == "a, c (small); b (tied)"
    assert listed(dict.fromkeys("abcdef", "small")) == "a, b, c and 3 more (small)"
    assert listed({f"{number}": f"reason {number // 2}" for number in range(16)}).endswith("and 3 more reasons")
    assert listed({}) == "it has no weights with named axes"


def test_nothing_to_convert(kernels):
    reasons = (
        r"0.weight, 2.weight \(float32: half precision is needed; not 2:4: \S+ of the blocks hold more than two\); 4"
    )
    with pytest.raises(ValueError, match=f"no layer of Sequential can be converted: {reasons}"):
        to_semi_structured(net().eval())
    with pytest.raises(ValueError, match=r"converted: 0.weight, 1.weight, 2.weight and 9 more \(sides not in 16s\)$"):
        to_semi_structured(nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))).eval())
    with pytest.raises(ValueError, match="no layer of ReLU can be converted: it has no weights with named axes"):
        to_semi_structured(nn.ReLU().eval())
    assert not kernels


def test_what_is_no_model_for_inference(kernels):
    with pytest.raises(ValueError, match="in training mode, .* call model.eval()"):
        to_semi_structured(two_four(net()).train())
    with pytest.raises(TypeError, match="model is a torch.nn.Module, not str"):
        to_semi_structured("model")
    with pytest.raises(TypeError, match="model is a torch.nn.Module, not str"):
        semi_structured_layers("model")
    assert not kernels


# --- The kernels themselves ------------------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="torch multiplies 2:4 weights on CUDA GPUs of compute capability 8.0 or newer",
)


@pytest.mark.cuda
@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_on_a_gpu_outputs_are_those_of_the_dense_model(dtype, bias):
    model = nn.Sequential(nn.Linear(512, 1024, bias=bias), nn.ReLU(), nn.Linear(1024, 256, bias=bias))
    model = two_four(model).to("cuda", dtype)
    converted = to_semi_structured(model)
    assert all(isinstance(converted[place].weight, torch.sparse.SparseSemiStructuredTensor) for place in (0, 2))
    assert semi_structured_layers(converted).layers[0].why_not == "converted already"
    for batch in (1, 7, 8, 33, 64):
        inputs = torch.randn(batch, 512, device="cuda", dtype=dtype)
        with torch.no_grad():
            expected, output = model(inputs), converted(inputs)
        assert output.shape == (batch, 256)
        assert (output - expected).abs().max() <= 0.03 * expected.abs().max()
    sequences = torch.randn(3, 5, 512, device="cuda", dtype=dtype)
    with torch.inference_mode():
        assert (converted(sequences) - model(sequences)).abs().max() <= 0.03 * model(sequences).abs().max()
    assert is_nm(model[0].weight, 2, 4)
    assert not isinstance(model[0].weight, torch.sparse.SparseSemiStructuredTensor)


@pytest.mark.cuda
@on_a_gpu
def test_on_a_gpu_the_smallest_sides_are_taken():
    to_semi_structured(two_four(nn.Sequential(nn.Linear(16, 16))).cuda())
