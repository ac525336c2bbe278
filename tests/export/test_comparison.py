"""What zeros buy: figures computed by hand, forms that cannot be had with the reason, and models left as they were."""

import copy
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsifai import Comparison, Sparsifier, compare
from sparsifai.export.comparison import ROUNDS, _take_turns, _with_time
from sparsifai.export.comparison_table import Form, caption

EXAMPLE = torch.linspace(-1, 1, 4 * 16).view(4, 16)


def mlp(inputs=16, hidden=32, outputs=8):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def sparsified(dense, *arguments, level=0.5, **options):
    sparse = copy.deepcopy(dense)
    Sparsifier(sparse, *arguments, **options).sparsify(level)
    return sparse


def save_plainly(model, path):
    values = model.state_dict().values()
    stored, dense = sum(int(value.count_nonzero()) for value in values), sum(value.numel() for value in values)
    Path(path).write_bytes(bytes(stored))
    return SimpleNamespace(bytes=stored, dense_bytes=dense)


def shrink_hidden(model, example):
    """Of a perceptron with one hidden layer."""
    if not isinstance(model, nn.Sequential):
        raise ValueError("shrink: only perceptrons")
    smaller = copy.deepcopy(model)
    alive = smaller[0].weight.abs().sum(1) > 0
    smaller[0].weight, smaller[0].bias = nn.Parameter(smaller[0].weight[alive]), nn.Parameter(smaller[0].bias[alive])
    smaller[2].weight = nn.Parameter(smaller[2].weight[:, alive])
    return smaller


@pytest.fixture(autouse=True)
def _other_exits(monkeypatch):
    """Stand-ins for what is not there."""
    for module, needed, function in (
        ("sparse_file", "safetensors", {"save_sparse": save_plainly}),
        ("shrinking", "torch_pruning", {"shrink": shrink_hidden}),
    ):
        if find_spec(f"sparsifai.{module}") is None or find_spec(needed) is None:
            monkeypatch.setitem(sys.modules, f"sparsifai.{module}", SimpleNamespace(**function))


@pytest.fixture
def shrinks(monkeypatch):
    """Have a function in the place of `shrink`."""

    def put(function):
        monkeypatch.setitem(sys.modules, "sparsifai.model.channels.removal", SimpleNamespace(shrink=function))

    return put


# --- Figures ---------------------------------------------------------------------------------------------------------


def test_dead_filters():
    dense = mlp()
    sparse = sparsified(dense, "filter", layers=["0"])
    found = compare(dense, sparse, EXAMPLE, repeats=3)
    assert isinstance(found, Comparison)
    assert [form.name for form in found.forms] == ["dense", "masked", "shrunk", "semi-structured", "CSR"]
    weights, biases = 16 * 32 + 32 * 8, 32 + 8
    left = weights // 2 + 16 + 8
    flops = 2 * 4 * weights
    figures = {form.name: (form.parameters, form.nonzeros, form.flops) for form in found.forms[:3]}
    # The 16 dead filters take their biases with them; what reads them keeps its weights until it shrinks.
    masked = 16 * 16 + 32 * 8 + 16 + 8
    assert figures == {
        "dense": (weights + biases, weights + biases, flops),
        "masked": (weights + biases, masked, flops),
        "shrunk": (left, left, flops // 2),
    }
    assert found.relative("shrunk", "flops") == 0.5
    assert found.relative("masked", "flops") == found.relative("dense", "milliseconds") == 1
    assert found["masked"].note.startswith(
        "its zeros are multiplied with like any other weight: as many FLOPs as dense"
    )
    assert all(form.milliseconds > 0 for form in found.forms[:3])
    assert all(form.milliseconds is None and form.note for form in found.forms[3:])


def test_file_bytes_are_those_of_files(tmp_path):
    from sparsifai.export.sparse_file import save_sparse

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
    # 16 x 32 weights are converted; of the other layer 8 outputs are too few, which is warned of.
    assert found["masked"].parameters - found["semi-structured"].parameters == 16 * 32 // 2
    assert found["masked"].flops - found["semi-structured"].flops == 4 * 16 * 32
    assert found["semi-structured"].nonzeros == found["masked"].nonzeros
    assert "2:4, but not converted: 2.weight (sides not in 16s)" in found["semi-structured"].note
    assert found["semi-structured"].milliseconds > 0


# --- Forms that cannot be had ----------------------------------------------------------------------------------------


def test_nothing_to_remove(shrinks):
    dense = mlp()
    shrinks(lambda model, example: copy.deepcopy(model))
    form = compare(dense, sparsified(dense), EXAMPLE, repeats=3)["shrunk"]
    assert form == Form("shrunk", note="nothing to remove: no filter is zero as a whole")


def test_shrink_is_not_asked_where_no_filter_is_zero(shrinks):
    """It takes minutes for some models of attention."""
    asked = []
    shrinks(lambda model, example: asked.append(model) or copy.deepcopy(model))
    sparse = mlp()
    compare(sparse, sparse, EXAMPLE, repeats=3)
    assert not asked
    for place, (name, parameter) in enumerate(sparse.named_parameters()):
        changed = copy.deepcopy(sparse)
        with torch.no_grad():
            changed.get_parameter(name)[..., 0] = 0  # an input, or an entry of a bias
        compare(sparse, changed, EXAMPLE, repeats=3)
        assert len(asked) == place + 1, (name, parameter.shape)


def test_what_shrink_says(shrinks):
    dense = mlp()

    def refuse(model, example):
        raise ImportError("shrink: needs torch-pruning: pip install torch-pruning")

    shrinks(refuse)
    sparse = sparsified(dense, "filter", layers=["0"])
    form = compare(dense, sparse, EXAMPLE, repeats=3)["shrunk"]
    assert form == Form("shrunk", note="needs torch-pruning: pip install torch-pruning")

    def warn(model, example):
        import warnings

        warnings.warn("shrink: 3 dead filters\n must stay", stacklevel=2)
        return shrink_hidden(model, example)

    shrinks(warn)
    form = compare(dense, sparse, EXAMPLE, repeats=3)["shrunk"]
    assert form.note.startswith("3 dead filters must stay")
    assert form.milliseconds > 0


def test_without_a_gpu_the_table_says_so():
    dense = mlp()
    sparse = sparsified(dense, context="2:4", layers=["0"]).half()
    text = str(compare(dense.half(), sparse, EXAMPLE.half(), repeats=3))
    assert "semi-structured: the weights are on cpu; torch multiplies 2:4 weights on CUDA GPUs" in " ".join(
        text.split()
    )
    assert "CSR: no layer of Sequential can be converted: 0.weight, 2.weight (float16: float32 is needed)" in " ".join(
        text.split()
    )


def test_a_form_that_does_not_run_is_a_reason():
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


def test_whatever_the_code_of_a_model_raises_is_a_reason(shrinks):
    shrinks(lambda model, example: {}["0.weight"])
    dense = mlp()
    found = compare(dense, sparsified(dense, "filter", layers=["0"]), EXAMPLE, repeats=3)
    assert found["shrunk"] == Form("shrunk", note="KeyError: '0.weight'")
    assert found["masked"].milliseconds > 0


def test_a_file_that_cannot_be_written_is_a_reason(monkeypatch):
    def refuse(model, path):
        raise ValueError("save_sparse: extra is no tensor")

    monkeypatch.setitem(sys.modules, "sparsifai.export.sparse_file", SimpleNamespace(save_sparse=refuse))
    form = compare(mlp(), mlp(), EXAMPLE, repeats=3)["dense"]
    assert (form.bytes, form.note) == (None, "extra is no tensor")


# --- Times -----------------------------------------------------------------------------------------------------------


def test_runs_are_taken_in_turn_there_and_back():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    taken = _take_turns(runs, 4, lambda: order.append("wait"))
    assert order[::3] == ["wait"] * 21
    assert order[2::3] == ["wait"] * 21
    assert "".join(order[1::3]) == "abcabcabc" + "cba" + "abc" + "cba" + "abc"
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 4, "b": 4, "c": 4}


def test_rounds_are_as_many_as_fit(monkeypatch):
    from sparsifai import comparison

    monkeypatch.setattr(comparison, "SECONDS", 0)
    assert len(_take_turns({"dense": lambda: None}, None, lambda: None)["dense"]) == 7
    monkeypatch.setattr(comparison, "SECONDS", 1e9)
    assert len(_take_turns({"dense": lambda: None}, None, lambda: None)["dense"]) == 200


def test_what_is_noise():
    dense = [1.0, 1.2, 0.9, 1.0, 1.1, 1.0, 1.0]
    for factors, is_noise in (
        ([1, 0.9, 1.1, 1.2, 0.8, 1, 1], True),
        ([0.9] * 7, False),
        ([1.3, 1.1, 1.3, 1.2, 1.3, 1.4, 1.2], False),  # slower, too, is no noise
        ([0.7, 0.8, 0.8, 0.7, 0.8, 0.7, 1.1], True),
    ):
        seconds = {"dense": dense, "masked": [each * factor for each, factor in zip(dense, factors, strict=True)]}
        form = _with_time(Form("masked", note="before"), seconds)
        assert (form.note, form.is_noise) == ("before", is_noise)
        assert form.milliseconds == pytest.approx(1000 * sorted(seconds["masked"])[3])
    assert _with_time(Form("dense"), {"dense": dense}) == Form("dense", milliseconds=1000)
    assert _with_time(Form("shrunk", note="none"), {"dense": dense}) == Form("shrunk", note="none")


def test_of_what_is_the_same_few_are_called_different():
    draw = random.Random(0)

    def of_same(rounds):
        seconds = {name: [draw.lognormvariate(0, 0.3) for _ in range(rounds)] for name in ("dense", "masked")}
        return _with_time(Form("masked"), seconds).is_noise

    for rounds in (ROUNDS[0], 20):
        assert sum(of_same(rounds) for _ in range(400)) > 0.95 * 400


# --- Shown -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def comparison():
    return Comparison(
        (
            Form("dense", 4000, 1000, 1000, 2000, 2.0),
            Form("masked", 1000, 1000, 100, 2000, 2.2, "as many <FLOPs>", is_noise=True),
            Form("shrunk", note="nothing to remove"),
        ),
        "Median times",
    )


def test_text_and_html(comparison):
    lines = str(comparison).splitlines()
    assert lines[0] == "Median times"
    assert lines[1].split("  ")[0] == "form"
    assert lines[3].split() == ["dense", "4,000", "1", "1,000", "1", "1,000", "1", "2,000", "1", "2", "1"]
    assert lines[4].split() == ["masked", "1,000", "0.25", "1,000", "1", "100", "0.1", "2,000", "1", "2.2", "~1.1"]
    assert lines[5].split() == ["shrunk"] + ["-"] * 10
    assert lines[6:] == ["masked: as many <FLOPs>", "shrunk: nothing to remove"]
    assert repr(comparison) == str(comparison)
    html = comparison._repr_html_()
    assert html.count("<tr>") == 4
    assert "as many &lt;FLOPs&gt;" in html
    assert "<caption>Median times</caption>" in html


def test_lines_of_large_models_fit():
    sizes = (1_340_000_000, 335_000_000, 335_000_000, 9_876_543_210_123, 12345.6)  # of a large BERT
    forms = Form("dense", *sizes), Form("semi-structured", *sizes, note="a reason, " * 50, is_noise=True)
    lines = str(Comparison(forms, caption({"dense": [1.0] * 200}, mlp()))).splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) > 9
    assert lines[3].split()[-2:] == ["12,346", "1"]
    assert all(line.startswith("  ") for line in lines[6:])


def test_a_form_by_its_name(comparison):
    assert comparison["masked"].nonzeros == 100
    assert comparison.relative("masked", "bytes") == 0.25
    assert comparison.relative("shrunk", "bytes") is None
    with pytest.raises(KeyError, match="no form is called 'smaller'; there are dense, masked, shrunk"):
        comparison["smaller"]


def test_plot(comparison):
    matplotlib = pytest.importorskip("matplotlib", reason="the plot is drawn with it")
    matplotlib.use("Agg")
    ax = comparison.plot()
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(
        [1, 0.25, 0, 1, 1, 0, 1, 0.1, 0, 1, 1, 0, 1, 1.1, 0]
    )
    assert [label.get_text() for label in ax.get_yticklabels()] == ["dense", "masked", "shrunk"]
    assert [text.get_text() for text in ax.texts[:3]] == ["1", "0.25", ""]
    assert (ax.texts[-1].get_text(), ax.texts[-1].get_position()[1]) == ("not to be had: the note says why", 2)
    assert [text.get_text() for text in ax.texts[-4:-1]] == ["1", "~1.1", ""]
    assert len(ax.texts) == 5 * 3 + 1
    titles = ["file bytes", "parameters", "non-zeros", "FLOPs", "latency"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == titles
    assert comparison.plot(ax) is ax
    matplotlib.pyplot.close("all")


# --- Models ----------------------------------------------------------------------------------------------------------


def test_models_are_left_as_they_were(shrinks):
    seen = set()
    shrinks(shrink_hidden)

    class Restless(nn.Module):
        """Counts and draws, whatever its mode."""

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


def test_inputs_of_any_kind_and_a_wrapper(shrinks):
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


def test_errors():
    dense = mlp()
    with pytest.raises(ValueError, match=r"compare: dense: the model does not run on example_input .* a tuple for"):
        compare(dense, dense, EXAMPLE[:, :3])
    with pytest.raises(ValueError, match="compare: sparse: the model does not run"):
        compare(dense, mlp(3), EXAMPLE)
    assert dense.training
    with pytest.raises(TypeError, match="compare: sparse is a torch.nn.Module, not str; of a Learner, learn.model"):
        compare(dense, "sparse", EXAMPLE)
    with pytest.raises(ValueError, match="repeats is at least 3, not 2"):
        compare(dense, dense, EXAMPLE, repeats=2)
    with pytest.raises(ValueError, match="repeats is a whole number from 1 on, not 1.5"):
        compare(dense, dense, EXAMPLE, repeats=1.5)


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
    assert "weights are on cuda" in found["CSR"].note or "float32 is needed" in found["CSR"].note
    assert "on cuda:0" in found.caption
