"""2:4 in torch's own form: which layers are converted, why not the others, and the check against the dense layer.

Most tests replace the kernels by the dense product, so they need no GPU. The tests at the end use the kernels.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from sparsifai import SemiStructured, Sparsifier, is_nm, semi_structured_layers, to_semi_structured
from sparsifai.export.two_four import why_no_kernels
from sparsifai.gradual.plan import plan_of


def two_four(model, layers=None):
    """The model with 2:4 weights, in half precision, in evaluation mode."""
    Sparsifier(model, context="2:4", layers=layers).sparsify(0.5)
    return model.half().eval()


def net():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def reasons(model):
    return {layer.name: layer.why_not for layer in semi_structured_layers(model).layers}


@pytest.fixture
def kernels(monkeypatch):
    """Replaces the compressed weight by a dense one, on any device. A list of the weights that were converted."""
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
        "sides.weight": "sides not multiples of 16",
        "few.weight": "sides not multiples of 16",
        "conv.weight": "not a Linear weight",
        "own.weight": "not a Linear weight",
        "attention.in_proj_weight": "not a Linear weight",
        "attention.out_proj.weight": "not a Linear weight",
        "normed.parametrizations.weight.original0": "computed in each forward",
        "block.linear1.weight": "used directly by TransformerEncoderLayer",
        "block.linear2.weight": "used directly by TransformerEncoderLayer",
        "table.weight": "not a Linear weight",
        "tied.weight": "tied",
        "own_matrix.matrix": "not a Linear weight",
    }
    assert {name for name, layer in found.items() if layer.is_two_four} == set(own)
    assert (found["bf16.weight"].kind, found["bf16.weight"].shape) == ("Linear", (16, 16))
    assert found["bf16.weight"].dtype == torch.bfloat16


def test_the_share_of_blocks_that_are_not_2_4():
    model = nn.Linear(16, 16, bias=False).half()
    with torch.no_grad():
        model.weight.fill_(1)
        model.weight.view(16, 4, 4)[:, :3, :2] = 0
    assert reasons(model) == {"weight": "not 2:4: 25.00% of the blocks have more than two nonzero weights"}
    assert reasons(model.float()) == {
        "weight": "float32: half precision is needed; not 2:4: 25.00% of the blocks have more than two nonzero weights"
    }


def test_blocks_are_along_the_inputs():
    model = nn.Linear(16, 16, bias=False).half()
    with torch.no_grad():
        model.weight.fill_(1)
        model.weight.view(4, 4, 16)[:, :2] = 0  # two of every four outputs, which the kernels cannot skip
    assert reasons(model) == {"weight": "not 2:4: 50.00% of the blocks have more than two nonzero weights"}
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    assert not semi_structured_layers(depthwise).layers[0].is_two_four


def test_the_table():
    table = semi_structured_layers(two_four(net(), layers=["0", "2"]))
    assert isinstance(table, SemiStructured)
    assert table.convertible == ("0.weight", "2.weight")
    lines = [line.split() for line in str(table).splitlines()]
    assert lines[0] == ["layer", "kind", "shape", "dtype", "2:4", "form", "why", "not"]
    assert lines[2] == ["0.weight", "Linear", "64x32", "float16", "yes"]
    assert lines[4] == ["4.weight", "Linear", "10x48", "float16", "no", "sides", "not", "multiples", "of", "16"]
    assert lines[-1] == ["convertible", "of", "3", "2"]
    assert repr(table) == str(table)
    assert table._repr_html_().count("<tr>") == 5


def test_a_plan_gives_the_same_reasons():
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 24))
    model[2].weight = model[1].weight
    plan = plan_of(Sparsifier(model, context="2:4"), 0.5, "agp", 1, 1)
    planned = {layer.name: layer.why_not_two_four for layer in plan.layers}
    assert planned.pop("2.weight") == "tied"  # the table of 2:4 has the weight once
    assert planned == {"0.weight": "", "1.weight": "tied", "3.weight": "sides not multiples of 16"}
    assert reasons(two_four(model)) == planned


# --- The copy --------------------------------------------------------------------------------------------------------


def test_a_copy_is_converted_and_the_model_is_unchanged(kernels):
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


def test_the_model_in_a_wrapper_is_converted(kernels):
    wrapped = nn.DataParallel(two_four(net(), layers=["0", "2"])).eval()
    assert semi_structured_layers(wrapped).convertible == ("0.weight", "2.weight")
    assert isinstance(to_semi_structured(wrapped), nn.Sequential)


def test_a_layer_with_other_outputs_is_an_error(kernels, monkeypatch):
    model = two_four(net(), layers=["0", "2"])

    def wrong(weight):
        changed = weight.clone()
        if len(weight) == 48:
            changed[7, weight[7].nonzero()[0]] *= -1
        return changed

    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", wrong)
    with pytest.raises(RuntimeError, match=r"2\.weight has other outputs"):
        to_semi_structured(model)
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", lambda weight: weight * float("nan"))
    with pytest.raises(RuntimeError, match=r"0\.weight has other outputs"):
        to_semi_structured(model)
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", lambda weight: weight[:, :4].clone())
    with pytest.raises(RuntimeError, match=r"0\.weight does not run"):
        to_semi_structured(model)


def test_a_weight_that_torch_does_not_convert_is_an_error(kernels, monkeypatch):
    def refuse(weight):
        raise RuntimeError("cuSPARSELt not supported on your machine")

    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", refuse)
    with pytest.raises(RuntimeError, match="cuSPARSELt not supported"):
        to_semi_structured(two_four(net(), layers=["0", "2"]))


def test_rounding_is_not_an_error(kernels, monkeypatch):
    # One more rounding than in the dense product, in both dtypes.
    rounded = lambda weight: weight * (1 + torch.finfo(weight.dtype).eps)  # noqa: E731
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", rounded)
    to_semi_structured(two_four(net(), layers=["0", "2"]))
    to_semi_structured(two_four(net(), layers=["0", "2"]).bfloat16())


def test_a_warning_lists_layers_that_are_2_4_but_cannot_be_converted(kernels):
    with pytest.warns(UserWarning, match=r"4\.weight") as caught:
        to_semi_structured(two_four(net(), layers=["0", "2", "4"]))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning for a dense layer
        to_semi_structured(two_four(net(), layers=["0"]))


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_weights_on_the_cpu_are_refused():
    model = two_four(net(), layers=["0", "2"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="on cpu"):
        to_semi_structured(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    assert why_no_kernels(torch.device("cuda", 1)) == "cuda:1 has compute capability 7.5"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    assert not why_no_kernels(torch.device("cuda", 1))


def test_a_model_without_layers_to_convert_is_refused(kernels):
    for model in (net(), nn.Sequential(nn.Linear(4, 4)), nn.ReLU()):
        with pytest.raises(ValueError, match="no layer"):
            to_semi_structured(model.eval())
    assert not kernels


def test_a_model_in_training_mode_is_refused(kernels):
    with pytest.raises(ValueError, match="training mode"):
        to_semi_structured(two_four(net()).train())
    with pytest.raises(TypeError):
        to_semi_structured("model")
    with pytest.raises(TypeError):
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
def test_on_a_gpu_the_outputs_are_those_of_the_dense_model(dtype, bias):
    model = nn.Sequential(nn.Linear(512, 1024, bias=bias), nn.ReLU(), nn.Linear(1024, 256, bias=bias))
    model = two_four(model).to("cuda", dtype)
    converted = to_semi_structured(model)
    assert all(isinstance(converted[place].weight, torch.sparse.SparseSemiStructuredTensor) for place in (0, 2))
    assert semi_structured_layers(converted).layers[0].why_not == "already converted"
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
def test_on_a_gpu_the_smallest_layer_is_converted():
    to_semi_structured(two_four(nn.Sequential(nn.Linear(16, 16))).cuda())
