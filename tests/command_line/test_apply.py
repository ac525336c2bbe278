"""sparsifai apply, shrink and compare: a checkpoint is pruned, made smaller, and measured."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sparsifai import SparseFile, load_shrunk, load_sparse
from sparsifai.command_line.main import main

from .conftest import INPUT, net, small_bert

NET = ["--model", "sparsifai_models:net", "--checkpoint", "net.pth"]


def zeros_of(state):
    return sum(int((value == 0).sum()) for name, value in state.items() if name in ("0.weight", "4.weight"))


def test_apply_prunes_exactly_and_writes_each_format(folder, capsys):
    weights = 8 * 2 * 9 + 3 * 288
    for name in ("a.pth", "a.safetensors"):
        assert main(["apply", *NET, "--sparsity", "0.75", "--to", name]) == 0
        out = capsys.readouterr().out
        assert f"{name}: {(folder / name).stat().st_size:,} bytes" in out
        assert "75.00%" in out
        state = torch.load(name, weights_only=True) if name == "a.pth" else load_file(name)
        net().load_state_dict(state)
        assert zeros_of(state) == round(0.75 * weights)
    assert main(["apply", *NET, "--sparsity", "0.75", "--to", "a.sparse", "--format", "sparse"]) == 0
    assert zeros_of(load_sparse("a.sparse", net()).state_dict()) == round(0.75 * weights)
    assert SparseFile.read("a.sparse").count.zeros >= round(0.75 * weights)


def test_apply_prints_json_with_raw_numbers(folder, capsys):
    assert main(["apply", *NET, "--sparsity", "0.5", "--exclude", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sparsity"] == 0.5
    assert found["file"] is None
    first, second = found["rows"]
    assert (first["shape"], first["zeros"], second["zeros"]) == ([8, 2, 3, 3], 72, 0)


def test_apply_takes_values_of_all_axes(folder, capsys):
    pytest.importorskip("torch_pruning", reason="coupled needs it")
    options = [
        ["--sparsity", "0.5", "--context", "2:4"],
        ["--sparsity", "0.5", "--granularity", "filter", "--coupled", "--input", INPUT],
        ["--sparsity", "0.5", "--granularity", "out,h", "--layers", "0"],
        ["--sparsity", "0.5", "--granularity", "4x4", "--criteria", "random"],
        ["--sparsity", "0.5", "--context", "{bounded: [local, {'0': 0.1}]}"],
        ["--sparsity", "0=0.25", "--sparsity", "4=0.5", "--context", "local"],
        ["--sparsity", "0.5", "--criteria", "synflow", "--input", INPUT],
    ]
    for each in options:
        assert main(["apply", *NET, *each]) == 0, capsys.readouterr().err


def test_apply_follows_a_recipe(folder, capsys):
    (folder / "recipe.yaml").write_text("training: false\nsteps:\n- sparsify: {sparsity: 0.5, context: local}\n")
    assert main(["apply", *NET, "--recipe", "recipe.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == 0.5
    (folder / "recipe.yaml").write_text("training: false\nsteps:\n- sparsify: {sparsity: 0.5, criteria: snip}\n")
    assert main(["apply", *NET, "--recipe", "recipe.yaml"]) == 2
    assert "criteria snip needs grad, which a checkpoint does not have" in capsys.readouterr().err


def test_apply_writes_tied_weights_under_each_name(folder):
    torch.save({"0.weight": torch.rand(6, 4) + 1}, "tied.pth")
    given = ["--model", "sparsifai_models:tied", "--checkpoint", "tied.pth", "--sparsity", "0.5", "--layers", "0"]
    assert main(["apply", *given, "--to", "tied.safetensors"]) == 0
    assert {name: int((value == 0).sum()) for name, value in load_file("tied.safetensors").items()} == {
        "0.weight": 12, "1.weight": 12,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "0.5", "--criteria", "wanda"], "criteria wanda needs activation, which a checkpoint does not"),
        (["--sparsity", "0.5", "--criteria", "movement"], "criteria movement needs init, which a checkpoint does not"),
        (["--sparsity", "50"], "sparsity 50 is a percentage"),
        (["--sparsity", "half"], "--sparsity is one fraction such as 0.8, or several PATTERN=FRACTION, not half"),
        (["--sparsity", "0.5", "--sparsity", "fc=0.5"], "--sparsity is one fraction"),
        (["--sparsity", "0.5", "--criteria", "large_finl"], "did you mean 'large_final'"),
        (["--sparsity", "0.5", "--recipe", "net.pth"], "leave out --sparsity"),
        ([], "give --sparsity, such as --sparsity 0.8, or --recipe"),
        (["--sparsity", "0.5", "--to", "net.pth"], "net.pth exists already; choose another name, or give --force"),
        (["--sparsity", "0.5", "--to", "a.onnx"], "the format of a.onnx is not known by its suffix; give --format"),
        (
            ["--sparsity", "0.5", "--to", "no/a.pth"],
            "no/a.pth: the folder does not exist; give the path of a file",
        ),
        (["--sparsity", "0.5", "--to", "net.pth/a.pth"], "the folder does not exist"),
        (["--sparsity", "0.5", "--to", ".", "--force"], ".: this is a folder"),
    ],
)
def test_apply_refuses_and_writes_nothing(options, message, folder, capsys):
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert main(["apply", *NET, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparsifai apply: ")
    assert message in error
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert main(["apply", *NET[:2], "--sparsity", "0.5"]) == 2
    assert "give --checkpoint, the weights that are pruned" in capsys.readouterr().err


def test_force_replaces_a_file(folder):
    assert main(["apply", *NET, "--sparsity", "0.5", "--to", "net.pth", "--force"]) == 0
    assert zeros_of(torch.load("net.pth", weights_only=True)) == 504


def test_a_pruned_model_is_shrunk_and_compared(folder, capsys):
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    filters = ["--sparsity", "0.5", "--granularity", "filter", "--coupled", "--input", INPUT]
    assert main(["apply", *NET, *filters, "--to", "filters.pth"]) == 0
    capsys.readouterr()
    given = ["--model", "sparsifai_models:net", "--checkpoint", "filters.pth", "--input", INPUT]
    assert main(["shrink", *given, "--to", "small.safetensors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters_left"] < found["parameters"]
    assert found["file"]["bytes"] == (folder / "small.safetensors").stat().st_size
    assert load_shrunk(net(), "small.safetensors")[0].out_channels == 4
    assert main(["shrink", *given]) == 0
    assert "all filters" in capsys.readouterr().out
    assert main(["compare", *given, "--repeats", "3", "--json"]) == 0
    dense, masked, small = json.loads(capsys.readouterr().out)["rows"][:3]
    assert dense["nonzeros"] > masked["nonzeros"] > small["nonzeros"] * 0.9
    assert dense["parameters"] == masked["parameters"] > small["parameters"]
    assert main(["compare", *given, "--repeats", "3", "--dense", "net.pth"]) == 0
    out = capsys.readouterr().out
    assert "Median latency of 3 runs" in out
    assert "random numbers" not in out
    assert main(["compare", *given, "--repeats", "3"]) == 0
    assert "dense: the weights of --checkpoint, with random numbers in place of zeros" in capsys.readouterr().out


def test_shrink_writes_nothing_if_nothing_can_be_removed(folder, capsys):
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    assert main(["shrink", *NET, "--input", INPUT, "--to", "small.safetensors"]) == 2
    assert "nothing can be removed; prune whole filters, heads or neurons first; small.saf" in capsys.readouterr().err
    assert not (folder / "small.safetensors").exists()
    assert main(["shrink", *NET, "--input", INPUT, "--json"]) == 0
    out, error = capsys.readouterr()
    assert error == "sparsifai shrink: warning: nothing can be removed; prune whole filters, heads or neurons first\n"
    assert json.loads(out)["parameters_left"] == json.loads(out)["parameters"]
    for command in ("shrink", "compare"):
        assert main([command, *NET]) == 2
        assert "give --checkpoint and --input, such as " in capsys.readouterr().err


def test_heads_of_a_folder_of_save_pretrained_are_pruned(folder, capsys):
    small_bert().save_pretrained("bert")
    heads = ["--granularity", "head", "--sparsity", "0.5", "--to", "bert.pth"]
    assert main(["apply", "--checkpoint", "bert", *heads, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == 0.5
    value = torch.load("bert.pth", weights_only=True)["bert.encoder.layer.0.attention.self.value.weight"]
    assert int((value == 0).all(1).sum()) == 8
    small_bert().load_state_dict(torch.load("bert.pth", weights_only=True))
