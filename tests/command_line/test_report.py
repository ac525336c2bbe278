"""sparsifai report: the zeros of checkpoints, and what is not counted."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sparsifai import SparseFile, Sparsifier, save_sparse
from sparsifai.command_line.main import main


@pytest.fixture
def checkpoint(tmp_path):
    return tmp_path / "checkpoint.pth"


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


def sparse_csr(*shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(*shape).to_sparse_csr()


# Kind -> a tensor of 3 x 4 whose zeros cannot be counted, its name in the report, and the reason.
SKIPPED = {
    "packed": (lambda: {"qweight": torch.ones(3, 4, dtype=torch.int32)}, "other.qweight", r"packed \(GPTQ"),
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


def test_report_counts_the_weights_of_a_quantized_model(checkpoint, capsys):
    quantization = pytest.importorskip("torch.ao.quantization", reason="torch's own quantization")
    model = nn.Sequential(nn.Linear(4, 5))
    Sparsifier(model).sparsify(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(quantization.quantize_dynamic(model, {nn.Linear}).state_dict(), checkpoint)
    assert main(["report", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"_packed_params\[0\] +5x4 +20 +10 +50.00%", out)
    assert re.search(r"whole file|all that are counted +27 ", out)  # the bias, a scale and a zero point


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
