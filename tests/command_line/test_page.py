"""The pages of the documentation: their commands run in the order in which a reader can paste them."""

import re
import shlex

import pytest
import torch
from forked import ROOT

from sparsifai import Recipe
from sparsifai.command_line.main import COMMANDS, main


@pytest.mark.slow
def test_every_block_of_the_page_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchvision", reason="the models are torchvision's")
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"(?s)```(\w+)\n(.*?)```", (ROOT / "docs/command_line.md").read_text())
    ran = set()
    for kind, text in blocks:
        if kind == "python":
            exec(text, {})
            continue
        for line in text.replace("\\\n", "").splitlines():
            program, *arguments = shlex.split(line)
            assert program == "sparsifai"
            assert main(arguments) == 0, (line, capsys.readouterr().err)
            ran.add(arguments[0])
    assert ran == COMMANDS.keys() - {"convert"}


@pytest.mark.parametrize("page", ["recipes", "from_sparseml"])
def test_commands_of_other_pages_run_with_files_of_the_reader(page, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchvision", reason="the model is torchvision's")
    monkeypatch.chdir(tmp_path)
    Recipe({"epochs": 5, "steps": [{"sparsify": {"sparsity": 0.8}}]}).save("recipe.yaml" if page == "recipes" else "x")
    torch.save(torch.nn.Linear(4, 2).state_dict(), "checkpoint.pth")
    of_sparseml = "modifiers:\n  - !EpochRangeModifier {start_epoch: 0, end_epoch: 5}\n"
    of_sparseml += "  - !ConstantPruningModifier {params: __ALL__}\n"
    (tmp_path / "sparseml.yaml").write_text(of_sparseml)
    (tmp_path / "sparseml.md").write_text(f"---\n{of_sparseml}---\n")
    commands = re.findall(r"(?m)^    sparsifai (.*)$", (ROOT / f"docs/{page}.md").read_text())
    assert commands
    for command in commands:
        assert main(shlex.split(command)) == 0, (command, capsys.readouterr().err)
