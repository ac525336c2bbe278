"""The command line: sparsifai plan, report and convert."""

import re
import sys
import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
from sparseml_texts import RECIPE as SPARSEML
from torch import nn

from sparsifai import Recipe, SparseFile, Sparsifier, save_sparse
from sparsifai.__main__ import main


@pytest.fixture
def checkpoint(tmp_path):
    return tmp_path / "checkpoint.pth"


def test_help_says_what_a_command_does_and_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("plan", "report", "convert"))
    for command in ("plan", "report", "convert"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"example: sparsifai {command} " in capsys.readouterr().out


# --- plan -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Run `sparsifai plan` with a recipe and a module of models."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 4\nsteps:\n- sparsify: {sparsity: 0.9, context: erk, end: 75%}\n")
    (tmp_path / "sparsifai_models.py").write_text("from conftest import small_net as small\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    return lambda model, *options, recipe=recipe: main(["plan", str(recipe), "--model", model, *options])


def test_plan_prints_a_table_and_draws_a_picture(plan, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture is drawn with it")
    picture = tmp_path / "plan.png"
    assert plan("sparsifai_models:small", "--input", "1,2,8,8", "--picture", str(picture)) == 0
    assert "0.weight" in capsys.readouterr().out
    assert picture.stat().st_size > 5000


def test_plan_prints_a_table_for_each_stage_that_prunes(plan, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture is drawn with it")
    recipe, picture = tmp_path / "stages.yaml", tmp_path / "stages.png"
    once = "{name: once, training: false, steps: [{sparsify: {sparsity: 0.5}}, keep]}"
    tune, more = "{epochs: 2, steps: [keep]}", "{epochs: 4, steps: [{sparsify: {sparsity: 0.75}}]}"
    recipe.write_text(f"stages:\n- {once}\n- {tune}\n- {more}\n")
    assert plan("sparsifai_models:small", "--picture", str(picture), recipe=recipe) == 0
    found = capsys.readouterr().out
    titles = [line for line in found.splitlines() if line.startswith(("Stage", "Plan for"))]
    assert titles == [
        "Stage once, applied at once, without training: sparsify, keep.",
        "Plan for 50.00% zeros (weight, global, large_final) at once, without training.",
        "Stage 2, a fit of 2 epochs: keep; nothing is pruned.",
        "Stage 3, a fit of 4 epochs: sparsify.",
        "Plan for 75.00% zeros (weight, global, large_final, between(agp, 0, 0.75)) in 4 x 100 batches; nothing is "
        "trained yet.",
    ]
    assert picture.stat().st_size > 5000
    recipe.write_text(f"stages:\n- {tune}\n- {tune}\n")
    assert plan("sparsifai_models:small", recipe=recipe) == 2
    assert "no stage of the recipe has a sparsify step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet50", "--model resnet50: give package:function, such as torchvision:resnet50"),
        ("sparsifai_models:number", "number is not a torch.nn.Module, nor a function that returns one"),
        ("torchvision:resnet500", "--model torchvision:resnet500: "),
        ("no_such_package:model", "--model no_such_package:model: No module named 'no_such_package'"),
    ],
)
def test_plan_refuses_what_is_not_a_model(plan, model, message, capsys):
    assert plan(model) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparsifai plan: ")
    assert message in error


def test_plan_refuses_a_missing_recipe_and_a_wrong_shape(plan, tmp_path, capsys):
    assert plan("torchvision:resnet18", recipe=tmp_path / "none.yaml") == 2
    assert "none.yaml" in capsys.readouterr().err
    for shape in ("1,x", "1,0"):
        with pytest.raises(SystemExit):
            plan("sparsifai_models:small", "--input", shape)
        assert f"'{shape}' is not a shape such as 1,3,224,224" in capsys.readouterr().err


# --- report -----------------------------------------------------------------------------------------------------------


def test_report_counts_the_zeros_of_a_checkpoint(checkpoint, capsys):
    model = nn.Linear(10, 10)
    Sparsifier(model).sparsify(0.5)
    for state in (model.state_dict(), {"model": model.state_dict(), "opt": {}}):
        torch.save(state, checkpoint)
        assert main(["report", str(checkpoint)]) == 0
        out = capsys.readouterr().out
        assert re.search(r"weight +10x10 +100 +50 +50.00%", out)
        assert re.search(r"whole file +110 +50 +45.45%", out)
        assert "not counted" not in out


def quantized(*shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.qint8)


def sparse_csr(*shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(*shape).to_sparse_csr()


# Kind -> a tensor of 3 x 4 whose zeros cannot be counted, its name in the report, and the reason.
SKIPPED = {
    "quantized": (lambda: quantized(3, 4), "other", r"quantized \(qint8\); dequantize\(\) makes it countable"),
    "packed": (lambda: (quantized(3, 4), None), r"other\[0\]", r"quantized \(qint8\); dequantize\(\)"),
    "csr": (lambda: sparse_csr(3, 4), "other", r"in the layout sparse_csr; to_dense\(\) makes it countable"),
    "coo": (lambda: torch.eye(3, 4).to_sparse(), "other", r"in the layout sparse_coo; to_dense\(\) makes it countable"),
    "meta": (lambda: torch.empty(3, 4, device="meta"), "other", "on the meta device, without values; load the model"),
    "optimizer": (
        lambda: {"state": {0: {"momentum": torch.zeros(3, 4)}}, "param_groups": [{"lr": 0.1}]}, "other",
        "the state of an optimizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SKIPPED)
def test_report_says_which_tensors_it_skips_and_why_and_counts_the_others(kind, checkpoint, capsys):
    make, name, why = SKIPPED[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about how it stores them
        torch.save({"weight": torch.eye(10), "other": make(), "bias": torch.ones(10)}, checkpoint)
    assert main(["report", str(checkpoint)]) == 0
    counted, _, skipped = capsys.readouterr().out.partition("not counted")
    assert re.search(r"weight +10x10 +100 +90 +90.00%", counted)
    assert re.search(r"all that are counted +110 +90 +81.82%", counted)
    assert "other" not in counted
    assert "whole file" not in counted
    assert re.search(rf"\n{name} +(3x4)? +12 +{why}", skipped)
    assert re.search(r"\nall of these +12\n", skipped)


def test_report_of_a_quantized_model_lists_its_packed_weights(checkpoint, capsys):
    quantization = pytest.importorskip("torch.ao.quantization", reason="torch's own quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 5)), {nn.Linear})
        torch.save(model.state_dict(), checkpoint)
    assert main(["report", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"_packed_params\[0\] +5x4 +20 +quantized \(qint8\)", out)
    assert re.search(r"all that are counted +7 ", out)  # the bias, a scale and a zero point


def test_report_refuses_a_checkpoint_of_which_nothing_can_be_counted(checkpoint, capsys):
    torch.save({"weight": torch.empty(3, 4, device="meta")}, checkpoint)
    assert main(["report", str(checkpoint)]) == 2
    error = capsys.readouterr().err
    assert "has no tensors whose zeros can be counted (weight: on the meta device, without values; " in error


@pytest.mark.fastai
def test_report_of_a_file_of_learn_save_leaves_out_the_optimizer(make_learner, tmp_path, capsys):
    from fastai.optimizer import Adam

    learn = make_learner(opt_func=Adam)
    with learn.no_logging():
        learn.fit_one_cycle(1, 1e-3)  # hyperparameters become numbers of numpy
    learn.path = tmp_path
    Sparsifier(learn.model).sparsify(0.5)
    assert main(["report", str(learn.save("all"))]) == 0
    text = capsys.readouterr().out
    assert re.search("(?m)^opt .* beside 'model', which is counted$", text)
    assert re.search("(?m)^all of these .* 50.00%$", text)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64, np.bool_])
def test_report_reads_numbers_of_numpy(kind, tmp_path, capsys):
    torch.save({"w": torch.eye(2), "best": kind(1)}, tmp_path / "numbers.pth")
    assert main(["report", str(tmp_path / "numbers.pth")]) == 0
    assert re.search("(?m)^w .* 50.00%$", capsys.readouterr().out)


def test_report_prints_the_table_of_a_sparse_file(tmp_path, capsys):
    path = tmp_path / "sparse.safetensors"
    save_sparse(nn.Linear(10, 10), path)
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out == f"{SparseFile.read(path)}\n"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["report", str(path)]) == 2
    assert "sparsifai report: " in (error := capsys.readouterr().err)
    assert "damaged" in error
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "sparsifai report sparse.safetensors" in capsys.readouterr().out


def test_report_refuses_other_files(checkpoint, capsys):
    for broken in (b"", b"text\n", b"PK\x03\x04 broken"):
        checkpoint.write_bytes(broken)
        assert main(["report", str(checkpoint)]) == 2
    torch.save(nn.Linear(10, 10), checkpoint)
    capsys.readouterr()
    assert main(["report", str(checkpoint)]) == 2
    error = capsys.readouterr().err
    assert "is not a state_dict written by torch.save; whole models and other pickles are not loaded" in error
    torch.save([1, 2], checkpoint)
    assert main(["report", str(checkpoint)]) == 2
    assert "has no tensors by name; give a file of torch.save(model.state_dict(), path)" in capsys.readouterr().err


# --- convert ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sparseml(tmp_path):
    path = tmp_path / "sparseml.md"
    path.write_text(SPARSEML)
    return path


LOST = "  - !LayerPruningModifier\n    layers: [layer1]\n"


def test_convert_writes_or_prints_a_recipe_and_lists_what_has_no_counterpart(sparseml, tmp_path, capsys):
    converted = tmp_path / "converted.yaml"
    assert main(["convert", str(sparseml), "--to", str(converted)]) == 0
    assert "LearningRateFunctionModifier" in capsys.readouterr().err
    assert Recipe.load(converted) == Recipe.from_sparseml(sparseml)
    assert main(["convert", str(sparseml), "--strict"]) == 0
    assert Recipe.loads(capsys.readouterr().out) == Recipe.from_sparseml(sparseml)


def test_convert_says_with_its_exit_status_that_something_is_lost(sparseml, tmp_path, capsys):
    sparseml.write_text(SPARSEML + LOST)
    assert main(["convert", str(sparseml), "--to", str(tmp_path / "converted.yaml")]) == 3
    assert "LayerPruningModifier: has no counterpart" in capsys.readouterr().err
    assert Recipe.load(tmp_path / "converted.yaml").epochs == 30
    assert main(["convert", str(sparseml), "--strict"]) == 2
    assert "LayerPruningModifier" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "the exit status is 3" in capsys.readouterr().out


def test_convert_replaces_a_file_only_with_force(sparseml, tmp_path, capsys):
    kept = tmp_path / "kept.yaml"
    for make in (lambda: kept.write_text("mine"), lambda: (kept.unlink(), kept.symlink_to("nowhere"))):
        make()
        assert main(["convert", str(sparseml), "--to", str(kept)]) == 2
        assert "kept.yaml exists already; choose another name, or give --force to replace it" in capsys.readouterr().err
        assert kept.is_symlink() or kept.read_text() == "mine"
    kept.unlink()
    kept.write_text("mine")
    assert main(["convert", str(sparseml), "--to", str(kept), "--force"]) == 0
    assert Recipe.load(kept) == Recipe.from_sparseml(sparseml)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files, and /dev/full")
def test_convert_writes_a_whole_file_or_none(sparseml, tmp_path, monkeypatch, capsys):
    import resource

    before = {*tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as if the disk was full after some bytes
    try:
        status = main(["convert", str(sparseml), "--to", str(tmp_path / "new.yaml")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, {*tmp_path.iterdir()}) == (2, before)
    assert "new.yaml" in (error := capsys.readouterr().err)
    assert "the file was not written, and an earlier one is unchanged" in error
    status = None
    with suppress(OSError), open("/dev/full", "w") as full:  # an error of the disk, when it is closed
        monkeypatch.setattr(sys, "stdout", full)
        status = main(["convert", str(sparseml)])
    assert status == 2
    assert "No space left on device" in capsys.readouterr().err


def test_convert_takes_the_number_of_epochs(tmp_path, capsys):
    sparseml = tmp_path / "sparseml.yaml"
    sparseml.write_text("modifiers:\n  - !ConstantPruningModifier\n")
    assert main(["convert", str(sparseml), "--epochs", "3"]) == 0
    assert Recipe.loads(capsys.readouterr().out).epochs == 3
