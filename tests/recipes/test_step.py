"""The options of the steps of a recipe."""

import inspect

import pytest

from sparsifai.recipes.step import OPTIONS


@pytest.mark.fastai
def test_the_options_of_a_step_are_the_arguments_of_its_callback():
    pytest.importorskip("fastai", reason="the callbacks need fastai")
    from sparsifai import DistillCallback, FreezeCallback, QuantizeCallback, RegularizeCallback, SparsifyCallback

    kinds = {
        "sparsify": SparsifyCallback,
        "regularize": RegularizeCallback,
        "distil": DistillCallback,
        "freeze": FreezeCallback,
        "quantize": QuantizeCallback,
    }
    # Functions and data, which a file cannot hold, and a second name of `sparsity`.
    left_out = {"teacher", "calibration", "example_input", "compression_ratio"}
    for kind, callback in kinds.items():
        arguments = set(inspect.signature(callback).parameters) - left_out
        assert arguments == set(OPTIONS[kind]) - (
            {"update_every"} if kind in ("freeze", "quantize") else {"start", "end", "update_every"}
        )
