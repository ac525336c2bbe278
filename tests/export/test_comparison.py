"""`compare`: numbers computed by hand, forms that are not available, and models that are unchanged afterwards."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from sparsifai import Comparison, Sparsifier, compare, save_sparse
from sparsifai.export.comparison_table import Form

EXAMPLE = torch.linspace(-1, 1, 4 * 16).view(4, 16)


def mlp(inputs=16, hidden=32, outputs=8):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def sparsified(dense, *arguments, level=0.5, **options):
    sparse = copy.deepcopy(dense)
    Sparsifier(sparse, *arguments, **options).sparsify(level)
    return sparse


def shrink_hidden(model, example):
    """`shrink` for a perceptron with one hidden layer."""
    if not isinstance(model, nn.Sequential):
        raise ValueError("shrink: only perceptrons are supported")
    smaller = copy.deepcopy(model)
    alive = smaller[0].weight.abs().sum(1) > 0
    smaller[0].weight, smaller[0].bias = nn.Parameter(smaller[0].weight[alive]), nn.Parameter(smaller[0].bias[alive])
    smaller[2].weight = nn.Parameter(smaller[2].weight[:, alive])
    return smaller


@pytest.fixture
def shrinks(monkeypatch):
    """Replaces `shrink` by a function."""
    return lambda function: monkeypatch.setattr("sparsifai.export.comparison.shrink", function)


@pytest.fixture(autouse=True)
def _shrinks_without_torch_pruning(shrinks):
    if find_spec("torch_pruning") is None:
        shrinks(shrink_hidden)


# --- Numbers ------------------------------------------------------------------------------------------------------


def test_zero_filters():
    dense = mlp()
    sparse = sparsified(dense, "filter", layers=["0"])
    found = compare(dense, sparse, EXAMPLE, repeats=3)
    assert isinstance(found, Comparison)
    assert [form.name for form in found.forms] == ["dense", "masked", "shrunk", "semi-structured", "CSR"]
    weights, biases = 16 * 32 + 32 * 8, 32 + 8
    left = weights // 2 + 16 + 8
    flops = 2 * 4 * weights
    figures = {form.name: (form.parameters, form.nonzeros, form.flops) for form in found.forms[:3]}
    # The biases of the 16 zero filters are zero too. The weights that read them are removed only by shrinking.
    masked = 16 * 16 + 32 * 8 + 16 + 8
    assert figures == {
        "dense": (weights + biases, weights + biases, flops),
        "masked": (weights + biases, masked, flops),
        "shrunk": (left, left, flops // 2),
    }
    assert found.relative("shrunk", "flops") == 0.5
    assert found.relative("masked", "flops") == found.relative("dense", "milliseconds") == 1
    assert found["masked"].note.startswith("its zeros are multiplied like any other weight: as many FLOPs as dense")
    assert all(form.milliseconds > 0 for form in found.forms[:3])
    assert all(form.milliseconds is None and form.note for form in found.forms[3:])


def test_file_bytes_are_those_of_saved_files(tmp_path):
    dense = mlp()
    sparse = sparsified(dense, level=0.9)
    found = compare(dense, sparse, EXAMPLE, repeats=3)
    assert found["dense"].bytes == save_sparse(dense, tmp_path / "dense").dense_bytes
    assert found["masked"].bytes == save_sparse(sparse, tmp_path / "sparse").bytes
    assert found["masked"].bytes == (tmp_path / "sparse").stat().st_size < found["dense"].bytes


def test_another_dense_model():
    found = compare(mlp(hidden=64), mlp(), EXAMPLE, repeats=3)
    assert found.relative("masked", "flops") == 0.5
    assert "as many FLOPs" not in found["masked"].note


def test_csr_on_a_cpu():
    if not torch.backends.mkl.is_available():
        pytest.skip("torch multiplies with CSR by MKL")
    dense = mlp(16, 1024, 1024).append(nn.Linear(1024, 4))
    sparse = sparsified(dense, level=0.95, context="local", layers=["2"])
    found = compare(dense, sparse, EXAMPLE, repeats=3)
    weights, stored = 1024 * 1024, round(0.05 * 1024 * 1024)
    assert found["masked"].parameters - found["CSR"].parameters == weights - stored
    assert found["masked"].flops - found["CSR"].flops == pytest.approx(2 * 4 * (weights - stored), abs=1)
    assert (found["CSR"].nonzeros, found["CSR"].bytes) == (found["masked"].nonzeros, found["masked"].bytes)
    assert found["CSR"].note.startswith("its file is that of masked")
    assert found["CSR"].milliseconds > 0


def test_two_four(monkeypatch):
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", lambda weight: weight.clone())
    monkeypatch.setattr("sparsifai.export.two_four.why_no_kernels", lambda device: "")
    dense = mlp()
    sparse = sparsified(dense, context="2:4", layers=["0", "2"]).half()
    found = compare(dense.half(), sparse, EXAMPLE.half(), repeats=3)
    # 16 x 32 weights are converted. The other layer has too few outputs, which the warning says.
    assert found["masked"].parameters - found["semi-structured"].parameters == 16 * 32 // 2
    assert found["masked"].flops - found["semi-structured"].flops == 4 * 16 * 32
    assert found["semi-structured"].nonzeros == found["masked"].nonzeros
    assert "these layers are 2:4, but cannot be converted: 2.weight (" in found["semi-structured"].note
    assert found["semi-structured"].milliseconds > 0


# --- Forms that are not available ----------------------------------------------------------------------------------


def test_nothing_to_remove(shrinks):
    dense = mlp()
    shrinks(lambda model, example: copy.deepcopy(model))
    form = compare(dense, sparsified(dense), EXAMPLE, repeats=3)["shrunk"]
    assert form == Form("shrunk", note="nothing to remove: no whole filter, head or neuron is zero")


def test_shrink_is_not_tried_where_no_filter_is_zero(shrinks):
    """It takes minutes for some models with attention."""
    asked = []
    shrinks(lambda model, example: asked.append(model) or copy.deepcopy(model))
    sparse = mlp()
    compare(sparse, sparse, EXAMPLE, repeats=3)
    assert not asked
    for name, parameter in sparse.named_parameters():
        changed = copy.deepcopy(sparse)
        with torch.no_grad():
            changed.get_parameter(name)[..., 0] = 0  # an input, or an entry of a bias, which removes nothing
        asked.clear()
        compare(sparse, changed, EXAMPLE, repeats=3)
        assert len(asked) == ("bias" not in name), (name, parameter.shape)


def test_errors_and_warnings_of_shrink_become_notes(shrinks):
    dense = mlp()

    def refuse(model, example):
        raise ImportError("shrink: needs torch-pruning: pip install torch-pruning")

    shrinks(refuse)
    sparse = sparsified(dense, "filter", layers=["0"])
    form = compare(dense, sparse, EXAMPLE, repeats=3)["shrunk"]
    assert form == Form("shrunk", note="needs torch-pruning: pip install torch-pruning")

    def warn(model, example):
        import warnings

        warnings.warn("shrink: 3 zero filters\n cannot be removed", stacklevel=2)
        return shrink_hidden(model, example)

    shrinks(warn)
    form = compare(dense, sparse, EXAMPLE, repeats=3)["shrunk"]
    assert form.note.startswith("3 zero filters cannot be removed")
    assert form.milliseconds > 0


def test_the_table_says_that_there_is_no_gpu():
    dense = mlp()
    sparse = sparsified(dense, context="2:4", layers=["0"]).half()
    text = str(compare(dense.half(), sparse, EXAMPLE.half(), repeats=3))
    assert "semi-structured: the weights are on cpu, but torch multiplies 2:4 weights only on CUDA" in " ".join(
        text.split()
    )
    assert "CSR: no layer of Sequential can be converted: 0.weight, 2.weight (float16: float32 is needed)" in " ".join(
        text.split()
    )


def test_a_form_that_does_not_run_is_not_available():
    if not torch.backends.mkl.is_available():
        pytest.skip("torch multiplies with CSR by MKL")

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1024, 1024)

        def forward(self, inputs):
            return self.layer(inputs) if isinstance(self.layer, nn.Linear) else torch.mm(inputs, inputs)

    dense = Own()
    form = compare(dense, sparsified(dense, layers=["layer"], level=0.95), torch.ones(2, 1024), repeats=3)["CSR"]
    assert (form.milliseconds, form.parameters) == (None, None)
    assert "cannot be multiplied" in form.note


def test_any_error_of_the_code_of_a_model_becomes_a_note(shrinks):
    shrinks(lambda model, example: {}["0.weight"])
    dense = mlp()
    found = compare(dense, sparsified(dense, "filter", layers=["0"]), EXAMPLE, repeats=3)
    assert found["shrunk"] == Form("shrunk", note="KeyError: '0.weight'")
    assert found["masked"].milliseconds > 0


def test_an_error_of_save_sparse_becomes_a_note(monkeypatch):
    def refuse(model, path):
        raise ValueError("save_sparse: extra is not a tensor")

    monkeypatch.setattr("sparsifai.export.comparison.save_sparse", refuse)
    form = compare(mlp(), mlp(), EXAMPLE, repeats=3)["dense"]
    assert (form.bytes, form.note) == (None, "extra is not a tensor")


# --- Models ----------------------------------------------------------------------------------------------------------


def test_models_are_unchanged(shrinks):
    seen = set()
    shrinks(shrink_hidden)

    class Restless(nn.Module):
        """Counts its calls and draws random numbers in every mode."""

        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, inputs):
            seen.add((self.training, torch.is_grad_enabled()))
            self.calls += 1
            return inputs + torch.rand(1)

    dense = nn.Sequential(*mlp(), nn.BatchNorm1d(8), nn.Dropout(0.5), Restless())
    sparse = sparsified(dense, "filter", layers=["0"])
    dense[3].eval()
    for model in (dense, sparse):
        model(EXAMPLE).sum().backward()
    before = [
        (model, copy.deepcopy(model.state_dict()), [part.training for part in model.modules()],
         [(id(parameter), parameter.grad.clone(), parameter.requires_grad) for parameter in model.parameters()])
        for model in (dense, sparse)
    ]  # fmt: skip
    state = torch.get_rng_state()
    seen.clear()
    compare(dense, sparse, EXAMPLE, repeats=3)
    assert seen == {(False, False)}
    assert torch.equal(torch.get_rng_state(), state)
    for model, values, modes, parameters in before:
        assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
        assert [part.training for part in model.modules()] == modes
        for (identity, gradient, trained), parameter in zip(parameters, model.parameters(), strict=True):
            assert (id(parameter), parameter.requires_grad) == (identity, trained)
            assert torch.equal(parameter.grad, gradient)
    assert not any(part._forward_hooks for part in sparse.modules())


def test_inputs_of_any_kind_and_a_model_in_a_wrapper(shrinks):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, first, second):
            return self.layer(first) + second

    model, shrunk = sparsified(Two(), "filter", layers=["layer"]), []
    shrinks(lambda model, example: shrunk.append(type(model)) or copy.deepcopy(model))
    for inputs in ((EXAMPLE, EXAMPLE), {"first": EXAMPLE, "second": EXAMPLE}):
        assert compare(model, nn.DataParallel(model), inputs, repeats=3)["dense"].flops == 2 * 4 * 16 * 16
    assert shrunk == [Two, Two]


def test_modules_without_weights():
    found = compare(nn.ReLU(), nn.ReLU(), EXAMPLE, repeats=3)
    assert (found["dense"].flops, found["dense"].parameters, found.relative("masked", "parameters")) == (None, 0, None)


def test_forms_have_the_times_that_were_measured(monkeypatch):
    seconds = {"dense": [0.5, 1.0, 2.0, 1.0], "masked": [1.0, 2.0, 4.0, 2.0], "shrunk": [0.5, 1.0, 2.0, 1.0]}
    monkeypatch.setattr("sparsifai.export.comparison.time_in_turn", lambda runs, repeats, wait: seconds)
    dense = mlp()
    found = compare(dense, sparsified(dense, "filter", layers=["0"]), EXAMPLE)
    assert [form.milliseconds for form in found.forms] == [1000, 2000, 1000, None, None]
    assert [form.is_noise for form in found.forms] == [False, False, True, False, False]


def test_modes_are_unchanged_after_an_error():
    dense = mlp()
    with pytest.raises(ValueError, match="sparse"):
        compare(dense, mlp(3), EXAMPLE)
    assert dense.training


@pytest.mark.fastai
def test_the_model_of_a_learner(make_learner):
    learn = make_learner(mlp(), shape=(16,), classes=8)
    dense = copy.deepcopy(learn.model)
    learn.fit(1)
    Sparsifier(learn.model).sparsify(0.5)
    assert compare(dense, learn.model, EXAMPLE, repeats=3).relative("masked", "nonzeros") < 0.6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a GPU")
def test_on_a_gpu():
    dense = mlp(64, 128, 64).cuda()
    sparse = sparsified(dense, context="2:4", layers=["0", "2"]).half()
    found = compare(dense.half(), sparse, torch.randn(8, 64, device="cuda").half(), repeats=3)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert found["semi-structured"].milliseconds > 0
    assert "the weights are on cuda" in found["CSR"].note or "float32 is needed" in found["CSR"].note
    assert "on cuda:0" in found.caption
