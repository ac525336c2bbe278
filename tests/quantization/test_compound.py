"""One recipe that prunes, distils and quantizes: from the plan of the command line to an ONNX file that runs."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from sparsifai import Quantized, Recipe, quantize
from sparsifai.__main__ import main

RECIPE = """
epochs: 8
steps:
  - sparsify: {sparsity: 0.75, context: erk, end: 4}
  - distil: {weight: 0.5, temperature: 4}
  - quantize: {start: 5, exclude: 'head'}
"""


def net():
    net = nn.Sequential()
    net.add_module("body", nn.Sequential(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)))
    net.add_module("pool", nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    net.add_module("head", nn.Linear(16, 3))
    return net


def test_the_plan_tells_what_is_rounded_and_from_when_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "my_net.py").write_text("import test_compound\nnet = test_compound.net\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "test_compound", sys.modules[__name__])
    arguments = ["plan", str(tmp_path / "recipe.yaml"), "--model", "my_net:net", "--input", "1,2,8,8"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "quantize: from 62.50% of training on, the weights and inputs of 2 layers are rounded as in int8; " in shown
    assert "75.00%" in shown
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("'head'", "tail"))
    assert main(arguments) == 2
    assert "line 6: steps.2.quantize: quantize: no layer matches 'tail'" in capsys.readouterr().err
    del sys.modules["my_net"]


@pytest.mark.fastai
def test_one_recipe_prunes_distils_and_quantizes_and_the_onnx_file_has_its_zeros(tmp_path, make_learner, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="it runs the int8 model")
    pytest.importorskip("onnxscript", reason="torch's exporter needs it")
    recipe, teacher = Recipe.loads(RECIPE), net()
    learn = make_learner(net(), steps=8)
    callbacks = recipe.callbacks(teacher)
    learn.fit(recipe.epochs, 0.05, cbs=callbacks)
    sparsifier, step = callbacks[0].sparsifier, callbacks[2]
    assert (step.start, step.exclude, step.ranges.keys()) == (5 / 8, ["head"], {"body.0", "body.3"})
    assert sparsifier.sparsity == pytest.approx(0.75, abs=0.01)

    made = quantize(learn.model, learn.dls.train, tmp_path / "net.onnx", exclude=step.exclude)
    weights = made.weights()
    assert weights.keys() == {"body.0.weight", "body.3.weight"}
    for name, (integers, _) in weights.items():
        assert (integers[~sparsifier.masks[name]] == 0).all()
        assert (integers != 0).any()
    assert Quantized.read(made.path).rows == made.rows
    assert main(["report", str(made.path)]) == 0
    assert capsys.readouterr().out.endswith(f"{made}\n")

    images = torch.randn(5, 2, 8, 8)
    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    (given,) = (each.name for each in session.get_inputs())
    (found,) = session.run(None, {given: images.numpy()})
    with torch.no_grad():
        expected = learn.model.eval()(images).numpy()
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.fastai
def test_a_recipe_without_times_begins_where_the_callback_does():
    pytest.importorskip("fastai", reason="the callback needs fastai")
    step = Recipe.loads("steps:\n- quantize: {layers: 'body.*'}")
    (callback,) = step.callbacks()
    assert (callback.start, callback.layers, callback.exclude) == (0.75, ["body.*"], None)
    (callback,) = Recipe.loads("steps:\n- quantize: {start: 50%}").callbacks()
    assert callback.start == 0.5
