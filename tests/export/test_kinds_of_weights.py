"""Exports of weights of every type and in every layout: right, or refused by name, and -0.0 is zero in all of them."""

import contextlib
import re

import pytest
import torch
from kinds_of_weights import IN, OUT, bits_of, channels_last, dense, net, pruned, same, uncounted, values, wide
from torch import nn

from sparsifai import (
    SparseFile,
    Sparsifier,
    compare,
    is_nm,
    load_sparse,
    save_sparse,
    semi_structured_layers,
    shrink,
    to_sparse_layout,
)
from sparsifai.export.checkpoint import Checkpoint
from sparsifai.model.zeros import Count
from sparsifai.sparsifier.report import Report

pytestmark = pytest.mark.filterwarnings("ignore:shrink. nothing is removed")  # most have no zero filter

SMALL = "sparsifai.export.csr.WEIGHTS"


@pruned
def test_files_hold_every_bit_and_count_every_zero(make, tmp_path):
    model, path = make(), tmp_path / "file"
    if model[0].weight.dtype == torch.complex128:
        with pytest.raises(ValueError, match="0.weight of Sequential is complex128, which safetensors cannot store"):
            save_sparse(model, path)
        return
    saved = save_sparse(model, path)
    assert SparseFile.read(path) == saved
    counts = {row.name: row.count for row in saved.rows}
    for name, each in model.state_dict().items():
        assert counts[name] == Count(each.numel(), int((wide(each) == 0).sum()))
    if model[0].weight.is_inference():
        with pytest.raises(ValueError, match="0.weight of the model, which was made in inference mode"):
            load_sparse(path, model)
        return
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    with torch.no_grad():
        for each in model.parameters():
            each.data.copy_(torch.ones_like(each))
    load_sparse(path, model)
    assert all(torch.equal(bits_of(each), bits_of(before[name])) for name, each in model.named_parameters())


@uncounted
def test_files_refuse_what_they_cannot_hold(make, why, tmp_path):
    model = make()
    if model[0].weight.dtype == getattr(torch, "float8_e8m0fnu", None):
        assert next(row.count for row in save_sparse(model, tmp_path / "file").rows).zeros == 0
        return
    with pytest.raises(ValueError, match="save_sparse: 0.weight of Sequential is .*(quantized|convert it)"):
        save_sparse(model, tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pruned
def test_every_table_has_the_same_zeros(make, tmp_path):
    model = make()
    with torch.no_grad():
        expected = sum(int((wide(each) == 0).sum()) for each in model.parameters())
    assert Count.of(*model.parameters()).zeros == expected
    assert Report.of(model).model.zeros == expected
    state = {name: each.detach() for name, each in model.named_parameters()}  # tied ones once
    assert Checkpoint.of(state).tables()[0].totals()[-1]["zeros"] == expected
    assert sum(row.count.zeros for row in Report.of(model).rows) == sum(
        int((wide(each) == 0).sum()) for each in model.parameters() if each.dim() > 1
    )


def test_minus_zero_is_zero_in_every_export(monkeypatch, tmp_path):
    monkeypatch.setattr(SMALL, 1)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, 8)).eval()
    with torch.no_grad():
        for weight in (model[0].weight, model[2].weight):
            weight.copy_(values(*weight.shape))
            weight[:, ::4], weight[:, 1::4] = 0.0, -0.0
        model[0].weight[:4] = -0.0
        model[0].bias[:4] = -0.0
    nonzero = sum(int((wide(each) != 0).sum()) for each in model.parameters())
    forms = {form.name: form for form in compare(model, model, torch.ones(2, IN), repeats=3).forms}
    assert forms["masked"].nonzeros == forms["dense"].nonzeros == nonzero
    assert is_nm(model[0].weight, 2, 4)
    assert all(layer.is_two_four for layer in semi_structured_layers(model).layers)
    assert len(to_sparse_layout(model, 0.5)[0].values) == (wide(model[0].weight) != 0).sum()
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    smaller = shrink(model, torch.ones(2, IN))
    assert smaller[0].weight.shape[0] <= OUT - 4
    inputs = torch.randn(5, IN)
    assert torch.allclose(smaller(inputs), model(inputs), atol=1e-6)


LAYOUTS = {
    "transposed": lambda: net(values(IN, OUT).t()),
    "every third column": lambda: net(values(OUT, 3 * IN)[:, ::3]),
    "channels_last": channels_last,
    "expanded": lambda: net(values(1, IN).expand(OUT, IN)),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_sparse_layouts_and_smaller_models_have_the_same_outputs(make, monkeypatch):
    monkeypatch.setattr(SMALL, 1)
    model = make().eval()
    inputs = torch.randn(3, *((8, 2, 2) if model[0].weight.dim() == 4 else (IN,)))
    expected = model(inputs)
    assert torch.allclose(to_sparse_layout(model, 0.0)(inputs), expected, atol=1e-5)
    assert compare(model, model, inputs, repeats=3).forms[1].nonzeros == Report.of(model).model.weights - sum(
        int((wide(each) == 0).sum()) for each in model.parameters()
    )
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    assert torch.allclose(shrink(model, inputs)(inputs), expected, atol=1e-5)


@uncounted
def test_what_has_no_zeros_to_count_is_refused_by_name(make, why, monkeypatch):
    monkeypatch.setattr(SMALL, 1)
    model, example = make().eval(), torch.ones(2, IN)
    reason = re.escape(why)
    with pytest.raises(ValueError, match=f"compare: the zeros of 0.weight cannot be counted, because it is {reason}"):
        compare(model, model, example)
    with pytest.raises(ValueError, match=f"is_nm: zeros of the weight cannot be counted: it is {reason}"):
        is_nm(model[0].weight, 2, 4)
    with pytest.raises(ValueError, match=f"zeros cannot be counted: a tensor is {reason}"):
        Count.of(model[0].weight)
    rows = {layer.name: layer for layer in semi_structured_layers(model).layers}
    assert (rows["0.weight"].is_two_four, rows["0.weight"].why_not) == (False, why)
    with pytest.raises(ValueError, match=rf"to_sparse_layout: .* 0.weight \(({reason}|.*: float32 is needed)\)"):
        to_sparse_layout(nn.Sequential(model[0]).eval())
    report = Report.of(model)
    assert report.not_counted == {"0.weight": why}
    assert report.left_out == OUT * IN
    assert report.model.weights == OUT + 4 * OUT + 4
    assert f"Not counted: 512 values of 0.weight ({why})." in str(report)
    assert next(row for row in report.rows if row.name == "0.weight").count == Count(0, 0)
    assert report.selected == report.rows[1].count
    alone = nn.Linear(IN, OUT, bias=False)
    alone.weight = model[0].weight
    with pytest.raises(ValueError, match="zeros cannot be counted in any parameter of Linear: weight is "):
        Report.of(alone)


@dense
def test_a_copy_is_made_or_refused_by_name(make, why):
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    model = make()
    before = model[0].weight.detach().clone()
    with contextlib.suppress(ValueError):  # most such models do not run; other errors are none that a user understands
        shrink(model, torch.ones(2, IN))
    assert same(model[0].weight, before)


def test_a_subclass_that_cannot_be_copied_is_named(monkeypatch):
    monkeypatch.setattr(SMALL, 1)

    class Own(torch.Tensor):
        pass

    model = net(values().as_subclass(Own))
    for use in (lambda: shrink(model, torch.ones(2, IN)), lambda: to_sparse_layout(model.eval(), 0.0)):
        with pytest.raises(ValueError, match=r"0.weight of Sequential cannot be copied \(The default.*; replace it by"):
            use()
    Sparsifier(model).sparsify(0.5)
