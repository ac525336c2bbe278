"""The repr of callbacks, parts and Sparsifiers says what they do, as it is written in a call."""

import pytest
import torch
from conftest import small_net
from torch import nn

from sparsifai import Sparsifier, Sparsify, TrainingManager, between, bounded


def own(weight):
    return weight.abs()


@pytest.mark.parametrize(
    ("part", "written"),
    [
        (Sparsify(0.9), "0.9"),
        (Sparsify(1), "1.0"),
        (Sparsify(compression_ratio=0.5), "0.5"),
        (Sparsify(0.9, "weight", "global", "large_final"), "0.9"),
        (Sparsify(0.9, "filter", "erk"), "0.9, granularity='filter', context='erk'"),
        (Sparsify(0.5, "4x4", schedule=between("lin", 0, 1)), "0.5, granularity='4x4', schedule=between(lin, 0, 1)"),
        (Sparsify(0.5, schedule=between("agp", 0, 0.75)), "0.5"),
        (Sparsify(0.5, context="2:4", criteria=own), "0.5, context='2:4', criteria=own"),
        (Sparsify(0.5, criteria="taylor"), "0.5, criteria='taylor'"),
        (Sparsify(0.5, criteria="obs"), "0.5, criteria='obs'"),
        (Sparsify(0.5, criteria="obs", compensate=False), "0.5, criteria='obs', compensate=False"),
        (Sparsify(0.5, criteria="obs", compensate=False, straight_through=True),
         "0.5, criteria='obs', straight_through=True, compensate=False"),
        (Sparsify(0.5, criteria="obs", compensate=False, regrow="grad"),
         "0.5, criteria='obs', regrow='grad', compensate=False"),
        (Sparsify(0.5, "filter", pool="max", every=3), "0.5, granularity='filter', pool='max', every=3"),
        (Sparsify({"0.*": 0.5}, layers=[nn.Conv2d, "0"], exclude="1"),
         "{'0.*': 0.5}, layers=[Conv2d, '0'], exclude=['1']"),
        (Sparsify(0.5, regrow="grad"), "0.5, regrow='grad'"),
        (Sparsify(0.5, regrow="grad", drop=0.1, drop_schedule="lin"),
         "0.5, regrow='grad', drop=0.1, drop_schedule='lin'"),
        (Sparsify(0.5, straight_through=True), "0.5, straight_through=True"),
        (Sparsify(0.5, straight_through=True, decay=0.1, settle=0.9),
         "0.5, straight_through=True, decay=0.1, settle=0.9"),
        (Sparsify(0.5, initial_sparsity=0.25, seed=3), "0.5, seed=3, initial_sparsity=0.25"),
        (Sparsify(0.5, context=bounded("global", {"0.*": 0.3})), "0.5, context=bounded(global)"),
    ],
)  # fmt: skip
def test_what_is_not_the_default_is_written(part, written):
    assert repr(part) == f"Sparsify({written})"
    callback = pytest.importorskip("sparsifai.callbacks.sparsify", reason="needs fastai").SparsifyCallback(0.5)
    callback.pruning = part.pruning
    assert repr(callback) == f"SparsifyCallback({written})"


def test_long_values_are_shortened():
    text = repr(Sparsify({f"layer{number}.*": 0.5 for number in range(99)}, layers=[*map(str, range(99))]))
    assert len(text) < 120


@pytest.mark.fastai
def test_a_callback_that_was_refused_has_a_repr():
    sparsify = pytest.importorskip("sparsifai.callbacks.sparsify", reason="needs fastai").SparsifyCallback
    assert repr(sparsify.__new__(sparsify)) == "SparsifyCallback"


def test_a_sparsifier_tells_what_is_measured():
    sparsifier = Sparsifier(small_net(), context="local")
    axes = "weight, local, large_final"
    assert repr(sparsifier) == f"Sparsifier of Sequential: 5 layers, 0.00% of 474 weights are zero; {axes}"
    sparsifier.sparsify(0.5)
    assert "5 layers, 50.00% of 474 weights are zero; " in repr(sparsifier)
    sparsifier.release()
    assert repr(sparsifier) == f"Sparsifier without a model, which was released; {axes}"


def test_a_manager_tells_how_far_it_is():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    manager = TrainingManager(model, optimizer, Sparsify(0.5, context="erk"), epochs=2, steps_per_epoch=3)
    assert repr(manager) == "TrainingManager of Sequential: step 0 of 6; Sparsify(0.5, context='erk')"
